"""`cnnkern.nn.GroupedConv1d` beside its counterpart in torch, converted, compiled, exported; what is saved, counted."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import cnnkern
from cnnkern import functional, testing
from cnnkern.nn import GroupedConv1d, LazyGroupedConv1d
from tests.convolution_twins import assert_reruns_are_bit_equal
from tests.test_grouped_conv1d import CASE, arguments, called
from tests.twins import assert_as_good_as_twin

SETTINGS = [
    {"kernel_size": 3, "padding": 1, "groups": 8},
    {"kernel_size": 31, "padding": 15, "groups": 8, "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2, "bias": False},
    {"kernel_size": 5, "padding": "same", "groups": 8, "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "groups": 8},
    {"kernel_size": 3, "padding": 1, "groups": 8, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "groups": 4, "padding_mode": "circular"},
    {"kernel_size": 5, "padding": 3, "groups": 8, "stride": 2, "padding_mode": "replicate"},
    {"kernel_size": 4, "padding": "same", "groups": 2, "padding_mode": "circular"},
    {"kernel_size": 3},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_module_beside_its_twin(settings):
    torch.manual_seed(0)
    theirs, ours = nn.Conv1d(8, 8, **settings), GroupedConv1d(8, 8, **settings)
    assert isinstance(ours, nn.Conv1d)
    assert repr(ours) == repr(theirs).replace("Conv1d", "GroupedConv1d")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 40)
    for rows in (x, testing.with_layout(x, "channels_last"), x[0]):
        assert_as_good_as_twin(ours, theirs, rows)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    torch.testing.assert_close(copy.deepcopy(ours).double()(x.double()), copy.deepcopy(theirs).double()(x.double()))
    assert GroupedConv1d(8, 8, device="meta", **settings)(x.to("meta")).shape == theirs(x).shape
    trained = GroupedConv1d(8, 8, **settings)
    theirs.load_state_dict(trained.state_dict())
    assert_as_good_as_twin(trained, theirs, x)


def test_lazy_module_beside_its_twin():
    torch.manual_seed(0)
    theirs, ours = (m(8, 3, groups=4, padding=1) for m in (nn.LazyConv1d, LazyGroupedConv1d))
    x = torch.randn(2, 8, 12)
    theirs(x)
    assert ours.has_uninitialized_params()
    ours(x)
    assert type(ours) is GroupedConv1d
    ours.load_state_dict(theirs.state_dict())
    assert_as_good_as_twin(ours, theirs, x)


class ConformerConvolution(nn.Module):
    """The convolution module of a Conformer, over (N, L, C)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Conv1d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.batch_norm = nn.BatchNorm1d(channels)
        self.act = nn.SiLU()
        self.project = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.expand(self.norm(x).transpose(1, 2)), 1)
        return self.project(self.act(self.batch_norm(self.depthwise(y)))).transpose(1, 2)


def test_convert_and_revert():
    torch.manual_seed(0)
    model = ConformerConvolution(16, 31)
    state = model.state_dict()
    converted = cnnkern.convert(model, verify=torch.randn(2, 40, 16))
    assert [type(m) for m in (converted.expand, converted.depthwise)] == [nn.Conv1d, GroupedConv1d]
    converted(torch.randn(2, 40, 16))
    report = cnnkern.conversion_report(converted)
    assert report.counts == {"BatchNorm + SiLU": 1, "GroupedConv1d": 1, "LayerNorm": 1}
    assert "depthwise" in str(report)
    assert converted.state_dict().keys() == state.keys()
    assert type(copy.deepcopy(converted).depthwise) is GroupedConv1d
    assert type(cnnkern.revert(converted).depthwise) is nn.Conv1d


def test_fold_leaves_the_batch_norm_of_a_grouped_convolution():
    """Its own kernels take the sequence, which a folded convolution's do not."""
    torch.manual_seed(0)
    model = ConformerConvolution(16, 31).eval()
    with torch.no_grad():
        for t in (*model.batch_norm.parameters(), *model.batch_norm.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
    folded, x = cnnkern.fold(model), torch.randn(2, 40, 16)
    with torch.no_grad():
        truth = {"output": copy.deepcopy(model).double()(x.double())}
        testing.assert_as_good_as({"output": folded(x)}, {"output": model(x)}, truth)
        assert "cnnkern::grouped_conv2d" in called(lambda: folded(x))
    assert type(folded.depthwise) is GroupedConv1d
    assert cnnkern.conversion_report(folded).counts == {
        "BatchNorm + SiLU": 1,
        "Conv": 2,
        "GroupedConv1d": 1,
        "LayerNorm": 1,
    }
    assert type(cnnkern.revert(folded).depthwise) is nn.Conv1d


def test_compiled(generator):
    torch.manual_seed(0)
    ours, theirs = GroupedConv1d(8, 8, 31, padding=15, groups=8), nn.Conv1d(8, 8, 31, padding=15, groups=8)
    ours.load_state_dict(theirs.state_dict())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (40, 50):
        x = torch.randn(2, 8, length)
        assert_as_good_as_twin(compiled, _Named(theirs), x)
        assert compiled(x).stride() == theirs(x).stride()


class _Named(nn.Module):
    """Its parameters as torch.compile names them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


def test_exported_and_traced():
    module, x = nn.Sequential(GroupedConv1d(8, 8, 3, padding=1, groups=8)).eval(), torch.randn(2, 8, 20)
    exported = torch.export.export(module, (x,))
    targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert targets == {"aten.conv1d.default"}
    torch.testing.assert_close(exported.module()(x), module(x))
    with cnnkern.keep_operators():
        kept = torch.export.export(module, (x,))
    assert any("cnnkern.grouped_conv2d" in str(n.target) for n in kept.graph.nodes)
    torch.testing.assert_close(kept.module()(x), module(x))
    traced = fx.symbolic_trace(module)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(traced(x), module(x))


def test_functional_is_one_node_under_fx():
    weight = torch.randn(8, 1, 3)

    def function(x):
        return functional.conv1d(x, weight, groups=8)

    nodes = [n for n in fx.symbolic_trace(function).graph.nodes if n.op == "call_function"]
    assert [n.target for n in nodes] == [functional.conv1d]


def test_transforms_and_per_sample_gradients(generator):
    inputs, _ = arguments((3, 8, 12), generator)
    weight, bias = inputs["weight"], inputs["bias"]

    def loss(conv1d):
        return lambda w, x: conv1d(x, w, bias, 1, 1, 1, 8).square().sum()

    per_sample = [
        torch.func.vmap(torch.func.grad(loss(f)), (None, 0))(weight, inputs["input"])
        for f in (functional.conv1d, F.conv1d)
    ]
    torch.testing.assert_close(*per_sample)
    tangents = [
        torch.func.jvp(
            lambda x, f=f: f(x, weight, bias, 1, 1, 1, 8), (inputs["input"],), (torch.ones_like(inputs["input"]),)
        )
        for f in (functional.conv1d, F.conv1d)
    ]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_flops_are_counted_as_those_of_the_twin(settings):
    counted = []
    for layer in (GroupedConv1d, nn.Conv1d):
        with FlopCounterMode(display=False) as counter:
            layer(8, 8, **settings)(torch.randn(2, 8, 40, requires_grad=True)).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_reruns_are_bit_equal_for_any_number_of_threads(generator):
    kinds = ((1, 31), (1, 3), (8, 3))
    drawn = (arguments((3, 32, 200), generator, width=width, kernel=kernel) for width, kernel in kinds)
    assert_reruns_are_bit_equal("conv1d", drawn)


def test_a_contiguous_input_and_the_weight_alone_are_saved(generator):
    inputs, _ = arguments((2, 16, 50), generator)
    for name in CASE.differentiable:
        inputs[name].requires_grad_()
    saved = testing.saved_bytes(lambda: functional.conv1d(**inputs))
    assert saved == inputs["input"].nbytes + inputs["weight"].nbytes
