"""Other packages' kernels in operators' rows. No GPU is here, so packages with their interfaces stand in for them."""

import contextlib
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.suite import operator_peers
from benchmarks.suite.groups import Contender, Unavailable
from benchmarks.suite.operators import Drawn, OperatorBench, group
from benchmarks.suite.options import Options
from benchmarks.suite.plan import make_plan
from cnnkern.testing import CASES, Layer

ROOT = Path(__file__).resolve().parent.parent
WRONG = 0.2  # what a package that computes something else adds


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def conv2d_gw8(inputs, weight, bias=None, stride=1, padding_y=0, padding_x=0, dilation=1, groups=1):
    assert inputs.dtype == torch.float16
    bias = None if bias is None else bias.to(inputs.dtype)
    return F.conv2d(inputs, weight, bias, stride, (padding_y, padding_x), dilation, groups)


def inplace_abn(x, weight, bias, running_mean, running_var, training, momentum, eps, activation, activation_param):
    assert activation == "leaky_relu"
    assert (weight >= 0).all()
    y = F.batch_norm(x, running_mean, running_var, weight + eps, bias, training, momentum, eps)
    return F.leaky_relu(y, activation_param)


def packages(error: float) -> dict[str, dict[str, object]]:
    def off(function):
        return lambda *args: function(*args) + error

    return {
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": SimpleNamespace(apply=off(layer_norm))},
        "quack.rmsnorm": {"layernorm_fwd": off(layer_norm)},
        "apex.normalization.fused_layer_norm": {
            "fused_layer_norm_affine": off(lambda x, weight, bias, shape, eps: layer_norm(x, weight, bias, eps))
        },
        "spio.functional": {"conv2d_gw8": off(conv2d_gw8)},
        "inplace_abn": {"inplace_abn": off(inplace_abn)},
        "flag_gems": {"use_gems": contextlib.nullcontext},
    }


@pytest.fixture
def install(monkeypatch):
    def into_place(error: float = 0.0) -> None:
        for path, attributes in packages(error).items():
            parts = path.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                module = ModuleType(name)
                module.__spec__ = ModuleSpec(name, None)
                monkeypatch.setitem(sys.modules, name, module)
            for name, value in attributes.items():
                setattr(module, name, value)

    return into_place


CONV = Layer((2, 16, 8, 8), {"width": 8, "kernel": 3, "padding": 1, "stride": 1})
TIMED = {
    "Liger-Kernel": ("layer_norm", Layer((6, 32)), "affine", "training", torch.float32, "contiguous"),
    "FlagGems": ("bn_act", Layer((4, 8, 6, 6)), "train relu", "training", torch.float32, "channels_last"),
    "quack": ("layer_norm", Layer((6, 32)), "affine", "inference", torch.bfloat16, "contiguous"),
    "spio": ("grouped_conv2d", CONV, CASES["grouped_conv2d"].bench_variant, "training", torch.float16, "channels_last"),
    "apex": ("layer_norm", Layer((6, 32)), "affine", "training", torch.float32, "contiguous"),
    "inplace_abn": ("bn_act", Layer((4, 8, 6, 6)), "train leaky_relu", "training", torch.float32, "contiguous"),
}


@pytest.mark.parametrize("name", operator_peers.PEERS)
def test_a_peer_is_compared_with_eager_before_it_is_timed(name, install):
    operator, layer, variant, mode, dtype, layout = TIMED[name]
    drawn = Drawn(CASES[operator], layer, dtype, variant, "cpu")
    contender = Contender(name, layout)
    assert contender in group("network", mode, drawn, False, False, peers=True).contenders
    assert contender not in group("network", mode, drawn, False, False).contenders
    bench = OperatorBench(drawn, mode)
    with pytest.raises(Unavailable, match=re.escape(f"needs `pip install {operator_peers.PEERS[name].install}`")):
        bench.step(contender, verify=True)
    install()
    bench.step(contender, verify=True)()
    if name != "FlagGems":  # which computes in PyTorch's operators
        install(WRONG)
        with pytest.raises(AssertionError, match="output: error"):
            bench.step(contender, verify=True)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("quack", {"mode": "training"}, "computes only inference"),
        ("spio", {"dtype": torch.bfloat16}, "computes only groups of 8 channels"),
        ("spio", {"layout": "contiguous"}, "computes only groups of 8 channels"),
        ("inplace_abn", {"variant": "train relu"}, "computes only leaky_relu, none, elu"),
    ],
)
def test_what_a_peer_does_not_compute_is_said(name, change, says, install):
    names = ("operator", "layer", "variant", "mode", "dtype", "layout")
    operator, layer, variant, mode, dtype, layout = (dict(zip(names, TIMED[name], strict=True)) | change).values()
    install()
    bench = OperatorBench(Drawn(CASES[operator], layer, dtype, variant, "cpu"), mode)
    with pytest.raises(Unavailable, match=says):
        bench.step(Contender(name, layout), verify=True)


def test_on_a_gpu_their_rows_are_operators():
    plan = make_plan(Options(peers=True, device="cuda"), "default")
    assert {g.suite for g in plan} == {"operators"}
    named = {c.name for g in plan for c in g.contenders}
    assert operator_peers.PEERS.keys() <= named
    assert {"eager", "cnnkern"} <= named


def test_the_documents_say_what_each_needs():
    table = dict(re.findall(r"^\| ([\w-]+) \| `pip install (\S+)` \|", (ROOT / "docs/bench.md").read_text(), re.M))
    assert table == {name: peer.install for name, peer in operator_peers.PEERS.items()}
