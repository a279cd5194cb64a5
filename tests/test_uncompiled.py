"""The package without the extension: in a separate process that cannot import it, from a copy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cnnkern
from tests.child import run_child

ROOT = Path(cnnkern.__file__).parent.parent
PROGRAM = """
import warnings
import torch
import cnnkern
from cnnkern import backends, testing, uncompiled
from pathlib import Path
assert Path(cnnkern.__file__).is_relative_to(Path.cwd()), cnnkern.__file__
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(2, 3, 4, 4)
    cnnkern.functional.add_relu(x, x), cnnkern.functional.layer_norm2d(x)
(warning,) = [w for w in caught if "cnnkern" in str(w.message)]
assert str(warning.message) == uncompiled.WARNING

generator = torch.Generator().manual_seed(0)
for case in testing.CASES.values():
    for arguments in case.variants.values():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                inputs = case.inputs((3, 6, 5, 7), dtype, generator=generator, **arguments)
                inputs = {
                    n: testing.with_layout(v, layout) if isinstance(v, torch.Tensor) and v.dim() == 4 else v
                    for n, v in inputs.items()
                }
                dy = torch.randn_like(testing.run(case.reference, case, inputs)["output"])
                testing.check(case, inputs, dy)
        # A hook that gives tensors back in another memory format; the last layout drawn is channels_last.
        place = lambda t: testing.with_layout(t, "contiguous" if t.dim() == 4 else "permuted").clone()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, place):
            testing.check(case, inputs, dy)

statistics = torch.zeros(3), torch.ones(3)
try:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 1 / 0, lambda t: t):
        cnnkern.functional.batch_norm_relu(x.clone().requires_grad_(), *statistics, training=True)
except ZeroDivisionError:
    assert statistics[0].eq(0).all() and statistics[1].eq(1).all(), "a refused call has changed them"
else:
    raise AssertionError("not refused")

status = backends.status()
assert status.keys() == {operator for case in testing.CASES.values() for operator in case.operators}
for kernels in status.values():
    assert kernels["cpu"].startswith("eager PyTorch: the extension was not built"), kernels
    assert kernels["cuda"].startswith(sys.argv[1]), kernels
for name in status:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{name}", "CUDA")

layer = cnnkern.nn.BatchNormReLU2d(3)
before = layer.running_mean._version
layer(x).sum().backward()
assert layer.weight.grad.shape == (3,) and layer.num_batches_tracked == 1
assert layer.running_mean._version > before
x.requires_grad_()
(gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
try:
    gradient.sum().backward()
except RuntimeError as error:
    assert "once_differentiable" in str(error), error
else:
    raise AssertionError("a second derivative that nobody computes")

compiled = torch.compile(cnnkern.functional.batch_norm_act, fullgraph=True, backend="aot_eager")
arguments = testing.CASES["bn_act"].inputs((3, 6, 5, 7), generator=generator)
arguments |= {"running_mean": None, "running_var": None, "input": arguments["input"].requires_grad_()}
eager = cnnkern.functional.batch_norm_act(**arguments)
assert torch.equal(compiled(**arguments), eager)
model = cnnkern.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()))
assert model(x.detach()).min() == 0
assert "not fused, which needs the compiled extension" in str(cnnkern.conversion_report(model))
print("all right")
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """The packages as a wheel without the extension installs them."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cnnkern", tmp_path / "cnnkern", ignore=without)
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "cnnkern" / "triton_kernels", ignore=without)
    (tmp_path / "cnnkern" / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "ops.cpp", tmp_path / "cnnkern" / "csrc")
    return tmp_path


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # What Python raises for a module that is not there, even if an editable installation has one.
    program = f"import sys; sys.modules['cnnkern._C'] = None\n{program}"
    return run_child([sys.executable, "-c", program, *arguments], cwd=folder)


@pytest.mark.parametrize("triton", [True, False])
def test_the_package_works_without_the_extension(copy, triton):
    program = PROGRAM
    if triton:
        pytest.importorskip("triton", reason="Triton has no build for this platform")
    else:
        hide = "import importlib.util as u; find = u.find_spec; "
        hide += "u.find_spec = lambda name: None if name == 'triton' else find(name)\n"
        program = hide + program
    done = run(copy, program, "Triton: " if triton else "eager PyTorch: ")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all right\n"


def test_schemas_that_are_not_there(copy):
    (copy / "cnnkern" / "csrc" / "ops.cpp").unlink()
    done = run(copy, "import cnnkern")
    assert done.returncode == 1
    assert "csrc/ops.cpp, with the operators' schemas, is neither in" in done.stderr


def test_the_package_needs_nothing_of_linux(copy):
    """Modules and functions that other systems lack; no file of /proc or /sys."""
    lacking = """
import os, sys
from pathlib import Path
for name in ("getloadavg", "sched_getaffinity"):
    delattr(os, name)
import torch
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
exists = Path.exists
Path.exists = lambda path: not str(path).startswith(("/proc", "/sys")) and exists(path)
import warnings
warnings.simplefilter("ignore")
import cnnkern
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
result = cnnkern.benchmark(model, torch.randn(2, 3, 8, 8), seconds=0.05)
assert "is not known here" in str(result), result
assert cnnkern.memory.total("cpu") is None
print("all right")
"""
    done = run(copy, lacking)
    assert done.stdout == "all right\n", done.stderr
