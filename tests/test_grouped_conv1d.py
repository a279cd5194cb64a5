"""Grouped convolution of sequences, which the operator for images computes: its numbers, arguments, errors, module."""

import copy
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cnnkern
from cnnkern import functional, testing
from cnnkern.nn import GroupedConv1d, LazyGroupedConv1d

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def in_float32(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv1d, of 16-bit tensors computed in float32 and rounded once, as test_grouped_conv2d.py has it."""
    dtype = torch.promote_types(input.dtype, FLOAT)
    bias = None if bias is None else bias.to(dtype)
    return F.conv1d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups).to(input.dtype)


CASE = dataclasses.replace(testing.CASES["grouped_conv2d"], function=functional.conv1d, reference=in_float32)


def arguments(
    shape, generator, dtype=FLOAT, *, width=1, kernel=3, multiplier=1, layout="contiguous", bias=True, **settings
):
    """(inputs, dy) of a convolution of groups of `width` channels."""
    channels = shape[-2]
    x = testing.randn(shape, generator, dtype)
    weight = testing.randn((channels * multiplier, width, kernel), generator, DOUBLE) * (width * kernel) ** -0.5
    inputs = {
        "input": testing.with_layout(x, layout),
        "weight": weight.to(dtype),
        "bias": testing.randn((channels * multiplier,), generator, dtype) if bias else None,
        "groups": channels // width,
        "padding": kernel // 2,
        **settings,
    }
    dy = testing.randn(CASE.reference(**inputs).shape, generator, dtype)
    return inputs, testing.with_layout(dy, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF, DOUBLE], ids=str)
def test_against_float64(dtype, layout, generator):
    """Conformer's kernel of 31, short and even ones, wider groups, and what is PyTorch's: width 3, longer kernels."""
    for width, kernel, stride in (
        *((1, kernel, stride) for kernel in (1, 2, 3, 5, 31) for stride in (1, 2)),
        *((width, 3, stride) for width in (2, 4, 8, 16, 24) for stride in (1, 2)),
        *((1, 3, 3), (3, 3, 1), (1, 33, 1), (8, 9, 1)),
    ):
        inputs, dy = arguments(
            (2, 6 * width, 45), generator, dtype, width=width, kernel=kernel, stride=stride, layout=layout
        )
        testing.check(CASE, inputs, dy)


VARIANTS = [
    {"dilation": 2},
    {"dilation": (3,), "padding": [4], "stride": (2,)},
    {"stride": np.int64(2), "padding": torch.Size([1])},
    {"padding": 0, "bias": False},
    {"padding": 7},
    {"padding": "same"},
    {"padding": "same", "kernel": 4},
    {"padding": "same", "kernel": 4, "dilation": 3},
    {"padding": "valid", "stride": 2},
    {"multiplier": 2},
    {"kernel": 31, "padding": 15, "stride": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_arguments_of_every_form(variant, generator):
    for width, dtype in itertools.product((1, 4), (FLOAT, BFLOAT)):
        for shape in ((2, 8, 19), (8, 19), (0, 8, 19)):
            inputs, dy = arguments(shape, generator, dtype, width=width, **variant)
            testing.check(CASE, inputs, dy)


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 5, 1), (1, 4, 300), (2, 4, 2), (2, 33, 70), (2, 0, 5)], ids=str)
def test_sizes_of_every_kind(shape, generator):
    for kernel, stride in itertools.product((1, 3, 31), (1, 2)):
        if shape[1]:
            testing.check(CASE, *arguments(shape, generator, kernel=kernel, stride=stride))
    if not shape[1]:
        x, weight = torch.randn(shape), torch.randn(0, 1, 3)
        for conv1d in (functional.conv1d, F.conv1d):
            with pytest.raises(RuntimeError):
                conv1d(x, weight, groups=2)


def test_strides_are_pytorchs(generator):
    layouts = ("contiguous", "channels_last", "sliced", "permuted")
    for shape, of_x, of_weight, of_dy in itertools.product(
        ((2, 8, 9), (1, 2, 1), (3, 4, 1), (8, 9)), layouts, layouts, layouts
    ):
        for width, kernel in itertools.product((1, 2), (1, 3)):
            inputs, dy = arguments(shape, generator, width=width, kernel=kernel)
            inputs["input"] = testing.with_layout(inputs["input"], of_x)
            inputs["weight"] = testing.with_layout(inputs["weight"], of_weight)
            dy = testing.with_layout(dy, of_dy)
            if of_x == of_weight == of_dy:
                testing.check(CASE, inputs, dy)
            mine, theirs = (testing.run(f, CASE, inputs, dy) for f in (functional.conv1d, F.conv1d))
            found = {n: (mine[n].stride(), theirs[n].stride()) for n in mine}
            assert all(a == b for a, b in found.values()), (shape, of_x, of_weight, of_dy, width, kernel, found)


def test_gradients_of_first_and_second_order(generator):
    for width, kernel, stride, shape in ((1, 3, 1, (2, 4, 5)), (2, 2, 2, (2, 4, 6)), (1, 5, 1, (4, 6))):
        inputs, _ = arguments(shape, generator, DOUBLE, width=width, kernel=kernel, stride=stride)
        rest = {n: v for n, v in inputs.items() if not isinstance(v, Tensor)}
        leaves = [inputs[n].requires_grad_() for n in ("input", "weight", "bias")]

        def function(x, weight, bias, rest=rest):
            return functional.conv1d(x, weight, bias, **rest)

        torch.autograd.gradcheck(function, leaves)
        torch.autograd.gradgradcheck(function, leaves)


def test_second_order_in_float32(generator):
    inputs, dy = arguments((2, 8, 20), generator)
    both = []
    for conv1d in (functional.conv1d, F.conv1d):
        leaves = [inputs[n].detach().requires_grad_() for n in ("input", "weight")]
        y = conv1d(*leaves, inputs["bias"], padding=1, groups=8)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        both.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_whole_and_complex_numbers(generator):
    x, w = (torch.randint(-9, 9, shape, generator=generator) for shape in ((2, 6, 9), (6, 1, 3)))
    assert torch.equal(functional.conv1d(x, w, padding=1, groups=6), F.conv1d(x, w, padding=1, groups=6))
    x, w = torch.complex(x.float(), -x.float()), torch.complex(w.float(), w.float())
    torch.testing.assert_close(functional.conv1d(x, w, padding=1, groups=6), F.conv1d(x, w, padding=1, groups=6))


# (shape of the input, of the weight, other arguments)
ROWS, DEPTHWISE = (2, 6, 5), (6, 1, 3)
ERRORS = [
    (ROWS, DEPTHWISE, {"groups": 4}),
    (ROWS, (7, 3, 3), {"groups": 2}),
    (ROWS, DEPTHWISE, {"groups": 3}),
    ((2, 5, 5), DEPTHWISE, {"groups": 6}),
    ((5, 5), DEPTHWISE, {"groups": 6}),
    (ROWS, (0, 1, 3), {"groups": 6}),
    (ROWS, (6, 0, 3), {"groups": 6}),
    (ROWS, (6, 1, 0), {"groups": 6}),
    (ROWS, (6, 1, 7), {"groups": 6}),
    (ROWS, (6, 1, 8), {"groups": 6, "padding": 1}),
    (ROWS, (6, 1, 8), {"groups": 6, "padding": "valid"}),
    (ROWS, DEPTHWISE, {"groups": 6, "dilation": 3}),
    ((2, 6, 0), DEPTHWISE, {"groups": 6}),
    (ROWS, (6, 1, 3, 3), {"groups": 6}),
    ((6,), DEPTHWISE, {"groups": 6}),
    ((2, 6, 5, 5), DEPTHWISE, {"groups": 6}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": 0}),
    (ROWS, DEPTHWISE, {"groups": 6, "dilation": 0}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": -1}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": (1, 1)}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": (1, 1)}),
    (ROWS, DEPTHWISE, {"groups": 6, "dilation": ()}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": 1.5}),
    (ROWS, DEPTHWISE, {"groups": 6, "stride": None}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": "same", "stride": 2}),
    (ROWS, DEPTHWISE, {"groups": 6, "padding": "some"}),
    (ROWS, DEPTHWISE, {"groups": 0}),
    (ROWS, DEPTHWISE, {"groups": -1}),
    (ROWS, DEPTHWISE, {"groups": 6, "bias": torch.ones(5)}),
    (ROWS, DEPTHWISE, {"groups": 6, "bias": torch.ones(6, 1)}),
    (ROWS, DEPTHWISE, {"groups": 6, "bias": torch.ones(6).double()}),
]


@pytest.mark.parametrize(("shape", "weight", "keywords"), ERRORS, ids=str)
def test_the_same_errors_as_torch(shape, weight, keywords):
    x, w = torch.randn(shape), torch.randn(weight)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  the type is what is asked for
        F.conv1d(x, w, **keywords)
    with pytest.raises(theirs.type) as ours:
        functional.conv1d(x, w, **keywords)
    # That of another type of an argument says how the call was written; that of the bias's dtype is the operator's.
    if theirs.type is RuntimeError and "bias type" not in str(theirs.value):
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtypes", [(FLOAT, DOUBLE), (DOUBLE, FLOAT), (torch.complex64, FLOAT)], ids=str)
def test_a_dtype_that_does_not_fit(dtypes):
    x, w = torch.randn(ROWS).to(dtypes[0]), torch.randn(DEPTHWISE).to(dtypes[1])
    with pytest.raises(RuntimeError) as theirs:
        F.conv1d(x, w, groups=6)
    with pytest.raises(RuntimeError) as ours:
        functional.conv1d(x, w, groups=6)
    assert str(ours.value) == str(theirs.value)


class Called(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def called(function) -> set[str]:
    with Called() as mode:
        function()
    return mode.names


# (shape, width, kernel, stride, dtype) -> whether our operator answers
RULE = {
    ((8, 256, 40), 1, 31, 1, FLOAT): True,
    ((256, 40), 1, 31, 1, FLOAT): True,
    ((17, 8, 15), 1, 3, 1, FLOAT): False,  # short rows of many
    ((17, 8, 30), 1, 3, 2, FLOAT): False,
    ((17, 8, 16), 1, 3, 1, FLOAT): True,
    ((16, 8, 15), 1, 3, 1, FLOAT): True,
    ((17, 8, 15), 1, 4, 1, FLOAT): True,
    ((17, 8, 15), 1, 3, 1, BFLOAT): True,
    ((17, 16, 15), 8, 3, 1, FLOAT): True,
    ((8, 32, 63), 16, 3, 1, FLOAT): True,
    ((9, 32, 63), 16, 3, 1, FLOAT): False,
    ((9, 32, 64), 16, 3, 1, FLOAT): True,
    ((2, 40, 64), 20, 3, 1, FLOAT): False,
    ((2, 64, 40), 32, 31, 1, FLOAT): False,
    ((2, 16, 64), 8, 9, 1, BFLOAT): True,
    ((2, 24, 64), 12, 3, 1, BFLOAT): False,
    ((2, 16, 64), 8, 10, 1, HALF): False,
    ((2, 4, 64), 2, 31, 1, HALF): True,
    ((2, 8, 64), 4, 31, 1, HALF): False,
    ((2, 8, 64), 8, 3, 1, FLOAT): False,  # one group
}


@pytest.mark.parametrize("case", RULE, ids=str)
def test_who_answers(case, generator):
    shape, width, kernel, stride, dtype = case
    inputs, _ = arguments(shape, generator, dtype, width=width, kernel=kernel, stride=stride)
    assert ("cnnkern::grouped_conv2d" in called(lambda: functional.conv1d(**inputs))) == RULE[case]
    elsewhere = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}
    on_meta = called(lambda: functional.conv1d(**elsewhere))  # where the rule is that of images
    assert ("cnnkern::grouped_conv2d" in on_meta) == (inputs["groups"] > 1)


def test_autocast_runs_in_the_lower_precision(generator):
    inputs, _ = arguments((2, 8, 30), generator, kernel=31)
    with torch.autocast("cpu", dtype=BFLOAT):
        ours, theirs = functional.conv1d(**inputs), F.conv1d(**inputs)
    assert ours.dtype == theirs.dtype == BFLOAT
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


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


def output_and_gradients(module, x, dy):
    """By name."""
    x = x.detach().requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {"output": y.detach(), **dict(zip(("input", *names), gradients, strict=True))}


def assert_as_good_as_twin(ours, theirs, x):
    dy = torch.randn(theirs(x).shape)
    truth = output_and_gradients(copy.deepcopy(theirs).double(), x.double(), dy.double())
    testing.assert_as_good_as(output_and_gradients(ours, x, dy), output_and_gradients(theirs, x, dy), truth)


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
    threads = torch.get_num_threads()
    try:
        for width, kernel in ((1, 31), (1, 3), (8, 3)):
            inputs, dy = arguments((3, 32, 200), generator, width=width, kernel=kernel)
            runs = []
            for n in (1, 1, 2):
                torch.set_num_threads(n)
                runs.append(testing.run(functional.conv1d, CASE, inputs, dy))
            for other, (name, value) in itertools.product(runs[1:], runs[0].items()):
                assert torch.equal(value, other[name]), name
    finally:
        torch.set_num_threads(threads)


def test_a_contiguous_input_and_the_weight_alone_are_saved(generator):
    inputs, _ = arguments((2, 16, 50), generator)
    for name in CASE.differentiable:
        inputs[name].requires_grad_()
    saved = testing.saved_bytes(lambda: functional.conv1d(**inputs))
    assert saved == inputs["input"].nbytes + inputs["weight"].nbytes
