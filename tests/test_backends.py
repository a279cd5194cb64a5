"""Switching who answers for CUDA tensors, which needs no GPU; what answers is tried on the dispatch key of the CPU."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import cnnkern
from cnnkern import backends, functional, testing

CASE = testing.CASES["bn_act"]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
}
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton has no build for this platform")
BUILT_WITH_CUDA = bool(cnnkern._C.build_info()["cuda"])
BY_DEFAULT = "CUDA C++" if BUILT_WITH_CUDA else "none: the extension was built without CUDA"


def cuda_status() -> set[str]:
    return {kernels["cuda"] for kernels in backends.status().values()}


@pytest.fixture(autouse=True)
def restored():
    yield
    backends._switch(None)


@pytest.fixture
def eager_on_cpu():
    """The eager backend in the place of the C++ kernels, where there are tensors to call it with."""
    library = torch.library.Library("cnnkern", "IMPL")
    for name, launcher in backends._launchers("eager").items():
        library.impl(name, launcher, "CPU", allow_override=True)
    yield
    library._destroy()


def make(shape, dtype=torch.float32, parameters=None, layout="contiguous", **variant):
    generator = torch.Generator().manual_seed(0)
    inputs = CASE.inputs(shape, dtype, generator=generator, parameter_dtype=parameters, **variant)
    return inputs | {"input": testing.with_layout(inputs["input"], layout)}, testing.randn(shape, generator, dtype)


def test_status_names_every_operator_and_its_kernels():
    status = backends.status()
    assert {"bn_act", "bn_act_backward"} <= status.keys()
    for operator, kernels in status.items():
        assert kernels["cpu"] == f"C++ {torch.backends.cpu.get_cpu_capability()}"
        served = "cuda" in testing.CASES[operator.removesuffix("_backward")].devices
        served = served and (BUILT_WITH_CUDA or operator in backends._NEVER_LEFT_TO_PYTORCH)
        assert kernels["cuda"].startswith(BY_DEFAULT if served else "PyTorch's own operators")
    if not BUILT_WITH_CUDA:
        assert "CNNKERN_CUDA=1" in status["bn_act"]["cuda"]


@pytest.mark.parametrize(
    ("name", "label"), [pytest.param("triton", "Triton", marks=needs_triton), ("eager", "eager PyTorch")]
)
def test_switching_there_and_back(name, label):
    def registered() -> set[str]:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return {operator for operator in before if has_kernel(f"cnnkern::{operator}", "CUDA")}

    before = backends.status()
    registered_before = registered()
    with backends.backend(name) as chosen:
        assert chosen.name == name
        inside = backends.status()
        for operator in ("bn_act", "bn_act_backward"):
            assert inside[operator] == {"cpu": before[operator]["cpu"], "cuda": label}
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{operator}", "CUDA")
    assert backends.status() == before
    assert registered() == registered_before


@needs_triton
def test_a_call_switches_for_good_and_blocks_nest():
    backends.backend("triton")
    assert "Triton" in cuda_status()
    with backends.backend("eager"):
        assert "eager PyTorch" in cuda_status()
        with backends.backend("triton"):
            assert "Triton" in cuda_status()
        assert "eager PyTorch" in cuda_status()
        backends.backend("eager")
    assert "Triton" in cuda_status()


def test_a_block_that_raises_switches_back():
    before = backends.status()
    with pytest.raises(KeyError), backends.backend("eager"):
        raise KeyError
    assert backends.status() == before


def test_unknown_backend():
    before = backends.status()
    with pytest.raises(ValueError, match=r"backend must be one of cuda, triton, eager; got 'cudnn'"):
        backends.backend("cudnn")
    assert backends.status() == before


@pytest.mark.skipif(BUILT_WITH_CUDA, reason="the extension was built with CUDA")
def test_cuda_backend_that_was_not_built():
    backends.backend("eager")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the extension was built without CUDA"):
        backends.backend("cuda")
    assert "eager PyTorch" in cuda_status()


@pytest.mark.skipif(not BUILT_WITH_CUDA, reason="the extension was built without CUDA")
def test_back_to_the_cuda_kernels():
    before = backends.status()
    backends.backend("eager")
    backends.backend("cuda")
    assert backends.status() == before


def test_triton_that_is_not_installed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    backends.backend("eager")
    with pytest.raises(RuntimeError, match="backend 'triton' needs the package triton"):
        backends.backend("triton")
    assert "eager PyTorch" in cuda_status()


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, cnnkern, cnnkern.backends as b; b.status(); b.backend('eager'); "
        "assert not any(m.partition('.')[0] == 'triton' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_triton
def test_launchers_are_importable_from_the_package():
    code = "import cnnkern.triton_kernels.bn_act as m; assert callable(m.bn_act) and callable(m.bn_act_backward)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.usefixtures("eager_on_cpu")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("variant", CASE.variants)
def test_eager_backend_is_eager(variant, dtypes):
    for layout in ("contiguous", "channels_last"):
        inputs, dy = make((3, 6, 5, 7), *DTYPES[dtypes], layout, **CASE.variants[variant])
        testing.check(CASE, inputs, dy, function=functional.batch_norm_act)


@pytest.mark.usefixtures("eager_on_cpu")
def test_eager_backend_keeps_the_contract():
    inputs, dy = make((3, 6, 5, 7))
    frozen = inputs | {"weight": inputs["weight"], "bias": None}
    testing.check(CASE, frozen, dy, function=functional.batch_norm_act)
    x = inputs["input"]
    _, mean, rstd = torch.ops.cnnkern.bn_act(x, None, None, None, None, True, 0.1, 1e-5, "relu")
    assert mean.dtype == rstd.dtype == torch.float64
    grads = torch.ops.cnnkern.bn_act_backward(dy, x, None, None, mean, rstd, True, "relu", [True, False, False])
    assert [g.shape for g in grads] == [x.shape, (0,), (0,)]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.batch_norm_act(x[:1, :, :1, :1], None, None, training=True)
    state = [inputs[n].clone() for n in CASE.mutated]
    empty = functional.batch_norm_act(x[:0], *state, training=True)
    assert empty.shape == (0, 6, 5, 7)
    assert all(torch.equal(v, inputs[n]) for v, n in zip(state, CASE.mutated, strict=True))
