"""A torch that is built for ROCm, where Triton's kernels answer. The torch here says it is one, and kernels are
interpreted on the CPU: no AMD GPU has run them."""

import os
import sys

import pytest

from tests.child import run_child

PROGRAM = """
import torch
torch.version.cuda, torch.version.hip = None, "6.4.43482"

def refuse(*arguments, **named):
    raise AssertionError("only a torch that is built for CUDA has this")

for module, names in {
    torch.cuda: ("cudart", "get_arch_list", "get_gencode_flags", "get_device_capability"),
    torch.backends.cudnn: ("version", "is_acceptable"),
    torch.cuda.nvtx: ("range_push", "range_pop", "mark"),
}.items():
    for name in names:
        setattr(module, name, refuse)

import sys
sys.modules["cnnkern._C"] = None  # as a wheel without the extension leaves it
import cnnkern
from cnnkern import backends
for kernels in backends.status().values():
    assert kernels["cuda"].startswith("Triton: "), kernels

# Tensors on that GPU are on the CUDA key; here what stands there computes those on the CPU.
library, asked = torch.library.Library("cnnkern", "IMPL"), set()

def standing_on_the_cuda_key(name):
    def launch(*arguments):
        asked.add(name)
        return backends._answering[name](*arguments)
    return launch

for name in backends.status():
    library.impl(name, standing_on_the_cuda_key(name), "CPU", allow_override=True)

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.LayerNorm(32),
)
fused = cnnkern.convert(model, verify=torch.randn(2, 3, 8, 8))
fused(torch.randn(2, 3, 8, 8)).square().sum().backward()
assert all(p.grad is not None for p in model.parameters())
expected = {f"{name}{way}" for name in ("bn_act", "grouped_conv2d", "layer_norm") for way in ("", "_backward")}
assert expected <= asked, asked
print("all right")
"""


def test_a_converted_model_runs_on_triton_where_torch_is_rocm_s():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    done = run_child([sys.executable, "-W", "ignore", "-c", PROGRAM], env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.stdout == "all right\n", done.stderr
