"""`cnnkern.nn.GroupedConv3d` beside its counterpart in torch, converted, folded, compiled, exported."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import cnnkern
from cnnkern import functional, testing
from cnnkern.nn import GroupedConv3d, LazyGroupedConv3d
from tests.test_grouped_conv1d import called
from tests.twins import assert_as_good_as_twin

SETTINGS = [
    {"kernel_size": 3, "padding": 1, "groups": 8},
    {"kernel_size": (5, 1, 1), "padding": (2, 0, 0), "groups": 8, "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 2, "stride": (1, 2, 2), "bias": False},
    {"kernel_size": 3, "padding": "same", "groups": 8, "dilation": (1, 2, 2)},
    {"kernel_size": 3, "padding": "valid", "groups": 8},
    {"kernel_size": 3, "padding": 1, "groups": 8, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "groups": 4, "padding_mode": "circular"},
    {"kernel_size": (1, 3, 3), "padding": 1, "groups": 8, "stride": 2, "padding_mode": "replicate"},
    {"kernel_size": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_module_beside_its_twin(settings):
    torch.manual_seed(0)
    theirs, ours = nn.Conv3d(8, 8, **settings), GroupedConv3d(8, 8, **settings)
    assert isinstance(ours, nn.Conv3d)
    assert repr(ours) == repr(theirs).replace("Conv3d", "GroupedConv3d")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 5, 7, 6)
    for videos in (x, testing.with_layout(x, "channels_last"), x[0]):
        assert_as_good_as_twin(ours, theirs, videos)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    torch.testing.assert_close(copy.deepcopy(ours).double()(x.double()), copy.deepcopy(theirs).double()(x.double()))
    assert GroupedConv3d(8, 8, device="meta", **settings)(x.to("meta")).shape == theirs(x).shape


def test_lazy_module_beside_its_twin():
    torch.manual_seed(0)
    theirs, ours = (m(8, 3, groups=4, padding=1) for m in (nn.LazyConv3d, LazyGroupedConv3d))
    x = torch.randn(2, 8, 3, 6, 5)
    theirs(x)
    assert ours.has_uninitialized_params()
    ours(x)
    assert type(ours) is GroupedConv3d
    ours.load_state_dict(theirs.state_dict())
    assert_as_good_as_twin(ours, theirs, x)


class Block(nn.Module):
    """X3D's bottleneck, without squeeze and excitation."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Conv3d(channels, inner, 1, bias=False)
        self.depthwise = nn.Conv3d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.batch_norm = nn.BatchNorm3d(inner)
        self.act = nn.SiLU()
        self.project = nn.Conv3d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.act(self.batch_norm(self.depthwise(self.expand(x)))))


def test_convert_and_revert():
    torch.manual_seed(0)
    model = Block(8, 18)
    converted = cnnkern.convert(model, verify=torch.randn(2, 8, 4, 6, 6))
    assert [type(m) for m in (converted.expand, converted.depthwise)] == [nn.Conv3d, GroupedConv3d]
    converted(torch.randn(2, 8, 4, 6, 6))
    assert cnnkern.conversion_report(converted).counts == {"BatchNorm + SiLU": 1, "GroupedConv3d": 1}
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert type(copy.deepcopy(converted).depthwise) is GroupedConv3d
    assert type(cnnkern.revert(converted).depthwise) is nn.Conv3d


def test_fold_takes_the_batch_norm_into_the_weights():
    torch.manual_seed(0)
    model = Block(8, 18).eval()
    with torch.no_grad():
        for t in (*model.batch_norm.parameters(), *model.batch_norm.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
    folded, x = cnnkern.fold(model), torch.randn(2, 8, 4, 6, 6)
    assert isinstance(folded.depthwise, GroupedConv3d)
    with torch.no_grad():
        truth = {"output": copy.deepcopy(model).double()(x.double())}
        testing.assert_as_good_as({"output": folded(x)}, {"output": model(x)}, truth)
    assert cnnkern.conversion_report(folded).counts == {"Conv": 1, "Conv + BatchNorm + SiLU": 1, "Conv + add": 1}
    assert type(cnnkern.revert(folded).depthwise) is nn.Conv3d


def test_compiled():
    torch.manual_seed(0)
    ours, theirs = (m(8, 8, 3, padding=1, groups=8) for m in (GroupedConv3d, nn.Conv3d))
    ours.load_state_dict(theirs.state_dict())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for frames, layout in ((4, "contiguous"), (5, "channels_last")):
        x = testing.with_layout(torch.randn(2, 8, frames, 6, 7), layout)
        torch.testing.assert_close(compiled(x), theirs(x))
        assert compiled(x).stride() == theirs(x).stride()


def test_exported_and_traced():
    module, x = nn.Sequential(GroupedConv3d(8, 8, 3, padding=1, groups=8)).eval(), torch.randn(2, 8, 3, 5, 4)
    exported = torch.export.export(module, (x,))
    assert {str(n.target) for n in exported.graph.nodes if n.op == "call_function"} == {"aten.conv3d.default"}
    torch.testing.assert_close(exported.module()(x), module(x))
    with cnnkern.keep_operators():
        kept = torch.export.export(module, (x,))
    assert any("cnnkern.grouped_conv2d" in str(n.target) for n in kept.graph.nodes)
    torch.testing.assert_close(kept.module()(x), module(x))
    traced = fx.symbolic_trace(module)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    weight = torch.randn(8, 1, 3, 3, 3)
    nodes = fx.symbolic_trace(lambda x: functional.conv3d(x, weight, groups=8)).graph.nodes
    assert [n.target for n in nodes if n.op == "call_function"] == [functional.conv3d]


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_flops_are_counted_as_those_of_the_twin(settings):
    counted = []
    for layer in (GroupedConv3d, nn.Conv3d):
        with FlopCounterMode(display=False) as counter:
            layer(8, 8, **settings)(torch.randn(2, 8, 5, 6, 6, requires_grad=True)).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_our_operator_computes_it():
    module, x = GroupedConv3d(8, 8, 3, padding=1, groups=8), torch.randn(2, 8, 3, 5, 4)
    assert "cnnkern::grouped_conv2d" in called(lambda: module(x))
