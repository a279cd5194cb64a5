"""The batch-norm modules beside their torch twins: constructor, state, errors, numbers of a few steps."""

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnkern
from cnnkern import functional, testing
from tests.leaks import MAY_STAY, leaked_by_ten_thousand

TWINS = {
    name: (
        getattr(cnnkern.nn, name),
        getattr(nn, f"BatchNorm{name[-2:]}"),
        "relu" if name[:-2] != "BatchNorm" else "none",
    )
    for name in cnnkern.nn.__all__
    if name.startswith("BatchNorm") and "Add" not in name
}
SHAPES = {"1d": ((6, 5), (6, 5, 7)), "2d": ((3, 5, 4, 6),), "3d": ((2, 5, 3, 4, 2),)}
MIXES = (
    {},
    {"affine": False},
    {"bias": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"track_running_stats": False},
    {"eps": 0.1},
    {"dtype": torch.float64},
)

twins = pytest.mark.parametrize("name", TWINS)


def pair(name: str, **arguments):
    fused_class, twin_class, act = TWINS[name]
    fused, twin = fused_class(5, **arguments), twin_class(5, **arguments)
    for p, q in zip(fused.parameters(), twin.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p.data)
    return fused, twin, (F.relu if act == "relu" else lambda x: x)


@twins
def test_is_its_torch_twin(name):
    fused_class, twin_class, act = TWINS[name]
    fused, twin, _ = pair(name)
    assert isinstance(fused, twin_class)
    assert list(fused.state_dict()) == list(twin.state_dict())
    ours, theirs = (dict(inspect.signature(c.__init__).parameters) for c in (fused_class, twin_class))
    if "Act" in name:
        assert ours.pop("act").default == "relu"
        assert ours.pop("act_param").default is None
        assert repr(fused) == repr(twin).replace("BatchNorm", "BatchNormAct").replace(")", f", act={act})")
    else:
        assert repr(fused) == repr(twin).replace(f"BatchNorm{name[-2:]}", name)
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@twins
def test_three_steps_and_eval_as_good_as_the_twin(name):
    for arguments, shape in itertools.product(MIXES, SHAPES[name[-2:]]):
        fused, twin, act = pair(name, **arguments)
        truth = copy.deepcopy(twin).double()
        g = torch.Generator().manual_seed(3)
        dtype = arguments.get("dtype", torch.float32)
        for step in range(4):
            if step == 3:
                fused.eval(), twin.eval(), truth.eval()
            x, dy = testing.randn(shape, g, torch.float32).to(dtype), testing.randn(shape, g, torch.float32).to(dtype)
            results = []
            for m, apply, t in ((fused, lambda x: x, x), (twin, act, x), (truth, act, x.double())):
                t = t.clone().requires_grad_()
                y = apply(m(t))
                grads = torch.autograd.grad(y, [t, *m.parameters()], dy.to(t.dtype))
                buffers = {n: b.double() for n, b in m.named_buffers() if b.is_floating_point()}
                results.append({"y": y, **{f"grad {i}": v for i, v in enumerate(grads)}, **buffers})
            # Means and gradients are sums that cancel; the numbers here are of the order of one.
            eps = torch.finfo(dtype).eps
            allowance = {n: 16 * eps * max(1, v.abs().max().item()) for n, v in results[2].items()}
            testing.assert_as_good_as(*results, allowance)
        if fused.num_batches_tracked is not None:
            assert fused.num_batches_tracked.item() == twin.num_batches_tracked.item() == 3


@twins
def test_copies_pickles_casts_and_moves(name):
    fused, _, _ = pair(name)
    shape = SHAPES[name[-2:]][-1]
    x = torch.randn(shape)
    fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other.eval()(x), fused.eval()(x))
        assert other.act == fused.act
    assert copy.deepcopy(fused).half().running_mean.dtype == torch.float16
    assert fused.double()(x.double()).dtype == torch.float64
    assert type(fused)(5, device="meta")(torch.empty(shape, device="meta")).shape == x.shape


def test_half_precision_with_float32_and_with_half_parameters():
    for dtype, cast in itertools.product((torch.bfloat16, torch.float16), (True, False)):
        fused, twin, act = pair("BatchNormReLU2d")
        truth = copy.deepcopy(twin).double()
        if cast:
            fused, twin = fused.to(dtype), twin.to(dtype)
            truth.load_state_dict(twin.state_dict())
        x = torch.randn(4, 5, 7, 9).to(dtype)
        out = {"y": fused(x)}, {"y": act(twin(x))}, {"y": act(truth(x.double()))}
        testing.assert_as_good_as(*out)


MISUSES = {
    "one value per channel": lambda m: m(torch.randn(1, 5, 1, 1)),
    "channel count": lambda m: m(torch.randn(2, 4, 3, 3)),
    "rank": lambda m: m(torch.randn(2, 5, 3)),
    "integer": lambda m: m(torch.ones(2, 5, 3, 3, dtype=torch.int64)),
    "dtype": lambda m: m(torch.randn(2, 5, 3, 3, dtype=torch.float64)),
    "device": lambda m: m(torch.empty(2, 5, 3, 3, device="meta")),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_the_same_error_and_leaves_all_state(misuse):
    fused, twin, _ = pair("BatchNormReLU2d")
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        MISUSES[misuse](twin)
    with pytest.raises(Exception) as ours:  # noqa: PT011
        MISUSES[misuse](fused)
    assert issubclass(ours.type, theirs.type) or issubclass(theirs.type, ours.type), (ours.type, theirs.type)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())


def test_errors_name_operator_what_came_and_what_is_allowed():
    x, rm, rv = torch.randn(2, 5, 3, 3), torch.zeros(5), torch.ones(5)
    call = functional.batch_norm_act
    with pytest.raises(
        ValueError,
        match=r"bn_act: act must be one of none, relu, .*, mish, hardsigmoid; got 'tanh'",
    ):
        call(x, rm, rv, training=True, act="tanh")
    with pytest.raises(ValueError, match=r"bn_act: act_param is the slope of leaky_relu or alpha of elu; got 0.2 for"):
        call(x, rm, rv, training=True, act="relu", act_param=0.2)
    with pytest.raises(ValueError, match=r"bn_act: act_param must be finite; got nan"):
        call(x, rm, rv, training=True, act="elu", act_param=math.nan)
    with pytest.raises(RuntimeError, match=r"bn_act: weight should contain 5 elements .* got shape \[4\]"):
        call(x, rm, rv, torch.ones(4), training=True)
    with pytest.raises(RuntimeError, match=r"bn_act: running_mean and running_var must be defined in evaluation mode"):
        call(x, None, None)
    with pytest.raises(ValueError, match=r"both be given or both be None; got only running_mean"):
        call(x, rm, None, training=True)
    with pytest.raises(ValueError, match=r"eps must be positive during training, but got 0"):
        call(x, rm, rv, training=True, eps=0.0)
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got input size \[1, 5\]"
    ):
        call(torch.randn(1, 5), rm, rv, training=True)
    with pytest.raises(RuntimeError, match=r"2 to 5 dimensions"):
        call(torch.randn(5), rm, rv, training=True)
    with pytest.raises(NotImplementedError, match=r"must be float32, float64, bfloat16 or float16"):
        call(torch.ones(2, 5, dtype=torch.int32), rm, rv, training=True)
    with pytest.raises(
        ValueError,
        match=r"BatchNormAct2d: act must be one of none, relu, .*, mish, hardsigmoid; got 'tanh'",
    ):
        cnnkern.nn.BatchNormAct2d(3, act="tanh")
    with pytest.raises(ValueError, match=r"BatchNormAddAct2d: act_param is the slope .*; got 0.2 for 'silu'"):
        cnnkern.nn.BatchNormAddAct2d(3, act="silu", act_param=0.2)
    assert torch.equal(rm, torch.zeros(5))
    assert torch.equal(rv, torch.ones(5))


def test_no_leak_over_ten_thousand_calls_errors_included():
    fused, _, _ = pair("BatchNormReLU2d")
    x = torch.randn(2, 5, 8, 8, requires_grad=True)
    wrong = torch.randn(2, 4, 8, 8)

    def call(i):
        fused(x).sum().backward()
        if i % 10 == 0:
            with pytest.raises(RuntimeError):
                fused(wrong)

    assert leaked_by_ten_thousand(call) < MAY_STAY


def test_pytorchs_batch_norm_and_ours_share_statistics_in_one_graph():
    """PyTorch's saves them for its gradient and updates them without a new version."""
    x = torch.randn(2, 5, 3, 3)
    results = []
    for batch_norm in (F.batch_norm, functional.batch_norm_act):
        rm, rv, weight, bias = torch.zeros(5), torch.ones(5), torch.ones(5).requires_grad_(), torch.zeros(5)
        act = {} if batch_norm is F.batch_norm else {"act": "none"}
        y = F.batch_norm(x, rm, rv, weight, bias, training=True)
        z = batch_norm(x, rm, rv, weight, bias, training=True, **act)
        (y * z).square().sum().backward()
        results.append((weight.grad, rm, rv))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_frozen_parts_get_no_gradient_and_the_others_theirs():
    for frozen in itertools.product((True, False), repeat=3):
        if all(frozen):
            continue
        fused, twin, act = pair("BatchNormReLU2d")
        x = torch.randn(3, 5, 4, 6)
        grads = []
        for m, apply in ((fused, lambda t: t), (twin, act)):
            t = x.clone().requires_grad_(not frozen[0])
            m.weight.requires_grad_(not frozen[1])
            m.bias.requires_grad_(not frozen[2])
            apply(m(t)).square().sum().backward()
            grads.append((t.grad, m.weight.grad, m.bias.grad))
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in cnnkern.nn.__all__ if n.startswith("LazyBatchNorm")])
def test_lazy_forms_become_the_module_they_stand_for(name):
    lazy_class, eager_class = getattr(cnnkern.nn, name), getattr(cnnkern.nn, name.removeprefix("Lazy"))
    twin = getattr(nn, f"LazyBatchNorm{name[-2:]}")
    x = torch.randn(SHAPES[name[-2:]][-1])
    inputs = (x, torch.randn_like(x)) if "Add" in name else (x,)
    for arguments in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 0.1}):
        lazy = lazy_class(**arguments)
        assert repr(lazy) == repr(twin(**arguments)).replace(f"LazyBatchNorm{name[-2:]}", name)
        copied = pickle.loads(pickle.dumps(lazy))
        y = lazy(*inputs)
        assert type(lazy) is eager_class
        eager = eager_class(x.shape[1], **arguments)
        assert torch.equal(y, eager(*inputs))
        assert list(lazy.state_dict()) == list(eager.state_dict())
        copied.load_state_dict(eager.state_dict())
        assert torch.equal(copied.eval()(*inputs), eager.eval()(*inputs))
