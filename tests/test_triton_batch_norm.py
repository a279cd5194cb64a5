"""What is peculiar to the Triton kernels of batch norm, beyond the battery of test_triton.py."""

import itertools

import pytest
import torch
from torch import Tensor

from cnnkern import testing

pytest.importorskip("triton", reason="Triton has no build for this platform")
import guarded_triton
from test_triton import DTYPES, small_tiles  # noqa: F401  (a fixture)

CASE = testing.CASES["bn_act"]


@pytest.fixture(scope="module")
def kernels():
    with guarded_triton.guarded() as modules:
        yield modules


@pytest.fixture
def batch_norm_act(kernels):
    """The public function on the Triton launchers."""

    class BnAct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param):
            y, mean, rstd = kernels.bn_act.bn_act(
                x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param
            )
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            ctx.training, ctx.act, ctx.act_param = training, act, act_param
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, rstd = ctx.saved_tensors
            mask = list(ctx.needs_input_grad[:3])
            grads = kernels.bn_act.bn_act_backward(
                dy, x, weight, bias, mean, rstd, ctx.training, ctx.act, mask, ctx.act_param
            )
            return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), *[None] * 7

    def function(
        input,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
        act="relu",
        act_param=None,
    ):
        return BnAct.apply(input, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param)

    return function


def make(shape, dtype=torch.float32, parameters=None, layout="contiguous", seed=0, **variant):
    generator = torch.Generator().manual_seed(seed)
    inputs = CASE.inputs(shape, dtype, generator=generator, parameter_dtype=parameters, **variant)
    dy = testing.randn(shape, generator, dtype)
    return inputs | {"input": testing.with_layout(inputs["input"], layout)}, testing.with_layout(dy, layout)


def operator_inputs(shape, dtype=torch.float32, layout="contiguous", **variant):
    """Arguments of the operator, in the schema's order."""
    inputs, dy = make(shape, dtype, layout=layout, **variant)
    names = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "act")
    return [inputs["input"], *(inputs[n] for n in names)], dy


# Tiles


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16, float32"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 3, 4, 9), (61, 2, 2, 1), (2, 3, 11, 7)], ids=str)
def test_many_tiles_and_chunks(batch_norm_act, kernels, shape, layout, training, dtypes):
    inputs, dy = make(shape, *DTYPES[dtypes], layout, training=training)
    cut = kernels.layout.Cut.of(inputs["input"])
    assert cut.steps > cut.chunk > 1
    testing.check(CASE, inputs, dy, function=batch_norm_act)


def test_cut_covers_the_tensor(kernels):
    for N, C, H in itertools.product((1, 2, 32, 33), (1, 3, 64, 2048), (1, 7, 14, 56, 112)):
        for rows in (False, True):
            x = torch.empty((N, C, H, H), device="meta")
            x = x.to(memory_format=torch.channels_last) if rows else x
            cut = kernels.layout.Cut.of(x)
            assert cut.outer * cut.width * (1 if cut.rows else C) == x.numel()
            assert cut.R * cut.B <= kernels.layout.TILE
            assert cut.width % cut.unit == 0
            assert cut.chunk <= kernels.layout.MAX_CHUNK
            assert (cut.chunks - 1) * cut.chunk < cut.steps <= cut.chunks * cut.chunk


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced channels_last", "permuted"])
def test_layouts_of_results(kernels, rank, layout):
    shape = (3, 6, 4, 5, 2)[:rank]
    base, order = layout.removeprefix("sliced ").replace("permuted", "contiguous"), list(range(rank))
    x, dy = (t.clone(memory_format=torch.preserve_format) for t in pair_of_tensors(shape, base))
    if layout == "sliced channels_last":
        x = torch.cat([x, x], dim=1)[:, : shape[1]]
    if layout == "permuted":  # neither layout, and not to be kept
        order[0], order[-1] = order[-1], order[0]
        x = x.permute(order).contiguous().permute(order)
    arguments = [x, None, None, None, None, True, 0.1, 1e-5, "relu"]
    y, mean, rstd = kernels.bn_act.bn_act(*arguments)
    theirs = torch.ops.cnnkern.bn_act(*arguments)
    torch.testing.assert_close((y, mean, rstd), theirs)
    assert y.stride() == theirs[0].stride()
    gradients = []
    for g in (dy, dy.contiguous(), testing.with_layout(dy, "channels_last"), testing.with_layout(dy, "sliced")):
        dx = kernels.bn_act.bn_act_backward(g, x, None, None, mean, rstd, True, "relu", [True, False, False])[0]
        assert dx.stride() == y.stride()
        gradients.append(dx)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def pair_of_tensors(shape, layout):
    inputs, dy = make(shape, layout=layout)
    return inputs["input"], dy


def test_strided_vectors(batch_norm_act):
    inputs, dy = make((3, 7, 4, 4))
    strided = {n: torch.stack([inputs[n], torch.full_like(inputs[n], torch.nan)], 1) for n in ("weight", "bias")}
    testing.check(CASE, inputs | {n: v[:, 0] for n, v in strided.items()}, dy, function=batch_norm_act)
    state = {n: torch.stack([inputs[n], torch.full_like(inputs[n], 7.0)], 1) for n in CASE.mutated}
    batch_norm_act(**inputs | {n: v[:, 0] for n, v in state.items()})
    dense = {n: inputs[n].clone() for n in CASE.mutated}
    batch_norm_act(**inputs | dense)
    for n in CASE.mutated:
        assert torch.equal(state[n][:, 0], dense[n])
        assert (state[n][:, 1] == 7).all()


# Statistics


HARD = {
    "mean >> std": lambda x: 1e4 + 1e-2 * x,
    "mean >> std, far first": lambda x: torch.cat([x[:1] - 1e3, x[1:]]),
    "constant": lambda x: torch.full_like(x, 0.1),
    "constant and large": lambda x: torch.full_like(x, -1e10 / 3),
    "zero": torch.zeros_like,
    "large": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "denormal": lambda x: 1e-41 * x,
    "outlier first": lambda x: torch.cat([x.flatten()[:1] * 1e6, x.flatten()[1:]]).view_as(x),
    "trend": lambda x: x + 100 * torch.arange(x.shape[-1], dtype=x.dtype),
}


@pytest.mark.parametrize(
    ("layout", "tiles"), [("contiguous", "small_tiles"), ("channels_last", "small_tiles"), ("channels_last", None)]
)
@pytest.mark.parametrize("data", HARD)
def test_statistics_of_hard_data(batch_norm_act, request, data, layout, tiles):
    if tiles is not None:
        request.getfixturevalue(tiles)
    inputs, dy = make((4, 3, 5, 9), act="none")
    x = HARD[data](inputs["input"].double()).float()
    inputs["running_mean"].zero_(), inputs["running_var"].zero_()
    testing.check(CASE, inputs | {"input": testing.with_layout(x, layout)}, dy, function=batch_norm_act)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("offset", "scale", "eps"), [(1e4, 1e-2, 1e-5), (-3e29, 1e30, 1e-5), (0.0, 1e-22, 1e-50)])
def test_digits_that_eager_loses(batch_norm_act, offset, scale, eps, layout):
    """Eager is no measure here: it rounds the mean to float32, squares out of its range, or both."""
    inputs, dy = make((6, 3, 5, 7), layout=layout, act="none", running=False, eps=eps)
    inputs["input"] = offset + scale * inputs["input"].sub(2)
    mine = testing.run(batch_norm_act, CASE, inputs, dy)
    truth = testing.run(CASE.reference, CASE, testing.to_float64(inputs), dy.double())
    if offset != 1e4:  # the slope of dx in x, of the order of rstd squared, is out of float32's range too
        del mine["grad of input"], truth["grad of input"]
    for name, value in mine.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=0, atol=2e-6 * truth[name].abs().max().item())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_poison_their_channel_alone(kernels, value, layout, training):
    (x, *rest), dy = operator_inputs((3, 5, 4, 4), layout=layout, training=training)
    clean = kernels.bn_act.bn_act(x, *[r.clone() if isinstance(r, Tensor) else r for r in rest])
    clean_grads = kernels.bn_act.bn_act_backward(
        dy, x, rest[0], rest[1], clean[1], clean[2], training, "relu", [True] * 3
    )
    x[1, 2, 3, 0] = value
    state = [r.clone() if isinstance(r, Tensor) else r for r in rest]
    y, mean, rstd = kernels.bn_act.bn_act(x, *state)
    grads = kernels.bn_act.bn_act_backward(dy, x, rest[0], rest[1], mean, rstd, training, "relu", [True] * 3)
    others = [0, 1, 3, 4]
    for mine, theirs in zip((y, grads[0]), (clean[0], clean_grads[0]), strict=True):
        assert torch.equal(mine[:, others], theirs[:, others])
    for mine, theirs in zip((mean, rstd, *grads[1:]), (*clean[1:], *clean_grads[1:]), strict=True):
        assert torch.equal(mine[others], theirs[others])
    eager = torch.relu(torch.native_batch_norm(x, *rest[:2], *[r.clone() for r in rest[2:4]], *rest[4:7])[0])
    assert torch.equal(y.isnan(), eager.isnan())
    if training:
        assert y[:, 2].isnan().all()
        assert state[2][2].isnan() if value != value else state[2][2] == value
        assert state[3][2].isnan()


# Contracts


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-40])
@pytest.mark.parametrize("dtypes", ["float32", "float64", "bfloat16, float32", "float16, float32"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_mask_is_the_outputs(kernels, layout, dtypes, scale):
    """With dy = 1, dbias counts the outputs that are not zero; tiny scales give values that round to zero."""
    dtype, parameters = DTYPES[dtypes]
    for training in (True, False):
        inputs, _ = make((4, 5, 6, 7), dtype, parameters, layout, training=training)
        x, weight, bias = inputs["input"], inputs["weight"] * scale, inputs["bias"] * scale * 0.1
        y, mean, rstd = kernels.bn_act.bn_act(
            x, weight, bias, inputs["running_mean"], inputs["running_var"], training, 0.1, 1e-5, "relu"
        )
        ones = torch.ones_like(x)
        dx, _, dbias = kernels.bn_act.bn_act_backward(ones, x, weight, bias, mean, rstd, training, "relu", [True] * 3)
        assert 0 < y.count_nonzero() < y.numel() or (dtypes, scale) == ("float16, float32", 1e-40)
        assert torch.equal(dbias.double(), (y != 0).sum((0, 2, 3)).double())
        if not training and scale >= 1e-3:
            wanted = (y != 0) & (weight != 0).view(1, -1, 1, 1)
            assert torch.equal(dx != 0, wanted)


def test_empty_batch(kernels):
    for shape in ((0, 3, 4, 4), (2, 3, 0), (0, 3), (2, 0, 3)):
        for training in (True, False):
            (x, *rest), dy = operator_inputs(shape, training=training)
            before = [r.clone() if isinstance(r, Tensor) else r for r in rest]
            mine, theirs = kernels.bn_act.bn_act(x, *rest), torch.ops.cnnkern.bn_act(x, *before)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
            assert all(torch.equal(rest[i], before[i]) for i in (2, 3))
            backward = (dy, x, rest[0], rest[1], *mine[1:], training, "relu", [True] * 3)
            torch.testing.assert_close(
                kernels.bn_act.bn_act_backward(*backward),
                torch.ops.cnnkern.bn_act_backward(*backward),
                rtol=0,
                atol=0,
            )


FORWARD_ERRORS = {
    "integers": lambda a: a.update(x=a["x"].long()),
    "one dimension": lambda a: a.update(x=a["x"][0, :, 0, 0]),
    "six dimensions": lambda a: a.update(x=a["x"][..., None, None]),
    "weight of another length": lambda a: a.update(weight=a["weight"][:-1]),
    "bias of two dimensions": lambda a: a.update(bias=a["bias"][None]),
    "weight of another dtype": lambda a: a.update(weight=a["weight"].bfloat16()),
    "half running_mean beside bfloat16": lambda a: a.update(x=a["x"].bfloat16(), running_mean=a["running_mean"].half()),
    "float32 running_var beside float64": lambda a: a.update(
        x=a["x"].double(), weight=None, bias=None, running_mean=a["running_mean"].double()
    ),
    "weight on another device": lambda a: a.update(weight=a["weight"].to("meta")),
    "running_mean alone": lambda a: a.update(running_var=None),
    "running_var alone": lambda a: a.update(running_mean=None),
    "eval without statistics": lambda a: a.update(running_mean=None, running_var=None, training=False),
    "one value per channel": lambda a: a.update(x=a["x"][:1, :, :1, :1]),
    "eps of zero in training": lambda a: a.update(eps=0.0),
    "negative eps in eval": lambda a: a.update(eps=-1e-5, training=False),
    "unknown activation": lambda a: a.update(act="tanh"),
}
BACKWARD_ERRORS = {
    "dy of another shape": lambda a: a.update(dy=a["dy"][:, :, :-1]),
    "dy of another dtype": lambda a: a.update(dy=a["dy"].double()),
    "dy on another device": lambda a: a.update(dy=a["dy"].to("meta")),
    "weight of another length": lambda a: a.update(weight=a["weight"][:-1]),
    "float32 mean": lambda a: a.update(mean=a["mean"].float()),
    "strided rstd": lambda a: a.update(rstd=a["rstd"].repeat_interleave(2)[::2]),
    "dweight without weight": lambda a: a.update(weight=None),
    "dbias without bias": lambda a: a.update(bias=None),
    "unknown activation": lambda a: a.update(act="tanh"),
}


def raised(function, arguments) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the caller compares type and message)
        function(*arguments)
    return caught.value


@pytest.mark.parametrize("misuse", FORWARD_ERRORS)
def test_forward_errors_are_those_of_the_cpp_kernel(kernels, misuse):
    names = ("x", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "act")
    values, _ = operator_inputs((3, 5, 4, 4))
    arguments = dict(zip(names, values, strict=True))
    FORWARD_ERRORS[misuse](arguments)
    before = {n: arguments[n].clone() for n in CASE.mutated if arguments[n] is not None}
    mine = raised(kernels.bn_act.bn_act, arguments.values())
    if misuse != "weight on another device":  # which the dispatcher sends elsewhere
        theirs = raised(torch.ops.cnnkern.bn_act, arguments.values())
        assert type(mine) is type(theirs)
        assert str(mine) == str(theirs)
    else:
        assert "expected weight on cpu like the input; got meta" in str(mine)
    assert all(torch.equal(arguments[n], v) for n, v in before.items())


@pytest.mark.parametrize("misuse", BACKWARD_ERRORS)
def test_backward_errors_are_those_of_the_cpp_kernel(kernels, misuse):
    values, dy = operator_inputs((3, 5, 4, 4))
    _, mean, rstd = kernels.bn_act.bn_act(*values)
    names = ("dy", "x", "weight", "bias", "mean", "rstd", "training", "act", "output_mask")
    arguments = dict(zip(names, (dy, *values[:3], mean, rstd, True, "relu", [True] * 3), strict=True))
    BACKWARD_ERRORS[misuse](arguments)
    mine = raised(kernels.bn_act.bn_act_backward, arguments.values())
    if misuse != "dy on another device":
        theirs = raised(torch.ops.cnnkern.bn_act_backward, arguments.values())
        assert type(mine) is type(theirs)
        assert str(mine) == str(theirs)
    else:
        assert "dy must be on cpu; got meta" in str(mine)
