"""Residual additions: the fused modules beside eager, the bits that they save, errors."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from cnnkern.triton_kernels.layout import memory_order
from torch import nn

import cnnkern
from cnnkern import functional, testing

NAMES = [n for n in cnnkern.nn.__all__ if "Add" in n and n.startswith("BatchNorm")]
SHAPES = {"1d": ((6, 5), (6, 5, 7)), "2d": ((3, 5, 4, 6),), "3d": ((2, 5, 3, 4, 2),)}
LAYOUTS = ("contiguous", "channels_last")

names = pytest.mark.parametrize("name", NAMES)


def pair(name, **arguments):
    fused, twin = getattr(cnnkern.nn, name)(5, **arguments), getattr(nn, f"BatchNorm{name[-2:]}")(5)
    for p, q in zip(fused.parameters(), twin.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p.data)
    return fused, twin


@names
@pytest.mark.parametrize("act", ["relu", "none"])
def test_three_steps_and_eval_as_good_as_eager(name, act):
    if "ReLU" in name and act == "none":
        act, arguments = "relu", {}
    else:
        arguments = {} if "ReLU" in name else {"act": act}
    activation = F.relu if act == "relu" else lambda x: x
    for shape in SHAPES[name[-2:]]:
        fused, twin = pair(name, **arguments)
        assert isinstance(fused, type(twin))
        assert list(fused.state_dict()) == list(twin.state_dict())
        truth = copy.deepcopy(twin).double()
        g = torch.Generator().manual_seed(3)
        for step in range(4):
            if step == 3:
                fused.eval(), twin.eval(), truth.eval()
            x, r, dy = (testing.randn(shape, g, torch.float32) for _ in range(3))
            results = []
            for m, dtype in ((fused, torch.float32), (twin, torch.float32), (truth, torch.float64)):
                a, b = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, r))
                y = m(a, b) if m is fused else activation(m(a) + b)
                grads = torch.autograd.grad(y, [a, b, *m.parameters()], dy.to(dtype))
                results.append({"y": y, **{f"grad {i}": v for i, v in enumerate(grads)}, "mean": m.running_mean})
            results[2]["mean"] = results[2]["mean"].double()
            allowance = {n: 16 * 2**-23 * max(1, v.abs().max().item()) for n, v in results[2].items()}
            testing.assert_as_good_as(*results, allowance)
        assert fused.num_batches_tracked.item() == 3


@names
def test_copies_pickles_and_takes_the_twin_s_checkpoint(name):
    fused, twin = pair(name)
    shape = SHAPES[name[-2:]][-1]
    x, r = torch.randn(shape), torch.randn(shape)
    twin(x)
    fused.load_state_dict(twin.state_dict())
    twin.load_state_dict(fused.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other.eval()(x, r), fused.eval()(x, r))
    torch.testing.assert_close(fused(x, r), F.relu(twin.eval()(x) + r))


def test_frozen_parts_get_no_gradient_and_the_others_theirs():
    for frozen in itertools.product((True, False), repeat=4):
        if all(frozen):
            continue
        g = torch.Generator().manual_seed(1)
        tensors = [testing.randn(s, g, torch.float32) for s in ((3, 5, 4, 6), (3, 5, 4, 6), (5,), (5,))]
        grads = []
        for call in (
            lambda x, r, w, b: functional.batch_norm_add_relu(x, r, None, None, w, b, True),
            lambda x, r, w, b: F.relu(F.batch_norm(x, None, None, w, b, True) + r),
        ):
            leaves = [t.clone().requires_grad_(not f) for t, f in zip(tensors, frozen, strict=True)]
            call(*leaves).square().sum().backward()
            grads.append([t.grad for t in leaves])
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bits_of_elements_that_share_a_byte_between_threads_and_images(generator):
    threads = torch.get_num_threads()
    case = testing.CASES["bn_add_act"]
    try:
        torch.set_num_threads(4)
        for shape, layout in itertools.product(((7, 61, 23, 29), (5, 257, 13, 13), (33, 3, 41, 43)), LAYOUTS):
            inputs = case.inputs(shape, torch.float32, generator=generator)
            inputs = {n: testing.with_layout(v, layout) if n in ("input", "residual") else v for n, v in inputs.items()}
            testing.check(case, inputs, testing.randn(shape, generator, torch.float32))
    finally:
        torch.set_num_threads(threads)


def unpacked(mask, y):
    """(a bit of each element, in y's shape; the bits behind the last)"""
    bits = (mask[:, None] >> torch.arange(8)) & 1
    bits, rest = bits.flatten().bool().split([y.numel(), 8 * mask.numel() - y.numel()])
    if y.is_contiguous():
        return bits.view(y.shape), rest
    return bits.view(y.movedim(1, -1).shape).movedim(-1, 1), rest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_masks_are_the_signs_of_the_output_bit_for_bit(dtype, layout, generator):
    """Whatever rounds to zero on the way out; a NaN, whose gradient passes in eager too, has its bit set."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    # Of the smallest number that the dtype has: the residual a few, the batch norm about a third.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.full((5,), smallest / 3 if narrow else smallest, dtype=torch.float32 if narrow else dtype)
    for shape, training in itertools.product(((3, 5, 13, 11), (2, 5), (1, 5, 2)), (True, False)):
        x, tiny, whole = (testing.randn(shape, generator, torch.float64) for _ in range(3))
        tiny = (tiny.round() * smallest).flatten()
        tiny[7] = float("nan")
        x, tiny, whole = (testing.with_layout(t.view(shape).to(dtype), layout) for t in (x, tiny, whole))
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        y, *_, mask = torch.ops.cnnkern.bn_add_act(x, tiny, weight, None, mean, var, training, 0.1, 1e-5, "relu")
        if narrow and len(shape) == 4:
            # The batch norm alone is above zero, and rounds to it.
            assert ((y == 0) & (tiny == 0) & (x > 0.3)).any(), "nothing rounds to zero: the test tests nothing"
        results = [(y, mask), torch.ops.cnnkern.add_relu(x, whole), torch.ops.cnnkern.add_relu(tiny, -tiny.roll(1))]
        for y, mask in results:
            bits, rest = unpacked(mask, y)
            assert torch.equal(bits, ~(y <= 0))
            assert not rest.any()
            assert 0 < bits.sum() < y.numel()
            dx = torch.ops.cnnkern.add_relu_backward(torch.ones_like(y), mask, memory_order(y))
            assert torch.equal(dx != 0, bits)


def test_nan_and_infinity_go_where_eager_sends_them():
    x, r = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    r[0, 0, 0, 0], r[0, 1, 0, 0], r[1, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    for ours, eager in (
        (functional.add_relu(x, r), F.relu(x + r)),
        (
            functional.batch_norm_add_relu(x, r, None, None, training=True),
            F.relu(F.batch_norm(x, None, None, training=True) + r),
        ),
    ):
        torch.testing.assert_close(ours, eager, equal_nan=True)
    a = r.clone().requires_grad_()
    functional.add_relu(a, x).sum().backward()
    b = r.clone().requires_grad_()
    F.relu(b + x).sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_misuse_is_one_clear_error_and_leaves_running_statistics():
    x, rm, rv = torch.randn(2, 5, 3, 3), torch.zeros(5), torch.ones(5)
    call = functional.batch_norm_add_act
    with pytest.raises(RuntimeError, match=r"bn_add_act: residual must have .* shape \[2, 5, 3, 3\]; got \[5\]"):
        call(x, rm, rm, rv, training=True)
    with pytest.raises(RuntimeError, match=r"bn_add_act: residual must have the input's dtype Float; got Double"):
        call(x, x.double(), rm, rv, training=True)
    with pytest.raises(ValueError, match=r"bn_add_act: act must be one of none, relu, .*; got 'swish'"):
        call(x, x, rm, rv, training=True, act="swish")
    with pytest.raises(ValueError, match=r"BatchNormAddAct2d: act must be one of none, relu, .*; got 'swish'"):
        cnnkern.nn.BatchNormAddAct2d(5, act="swish")
    with pytest.raises(RuntimeError, match=r"add_relu: residual must have the input's shape"):
        functional.add_relu(x, x[:1])
    with pytest.raises(NotImplementedError, match=r"add_relu: input must be float32, float64, bfloat16 or float16"):
        functional.add_relu(x.int(), x.int())
    _, mask = torch.ops.cnnkern.add_relu(x, x)
    with pytest.raises(RuntimeError, match=r"add_relu_backward: mask must be the one .* 12 bytes.* got Byte \[11\]"):
        torch.ops.cnnkern.add_relu_backward(x, mask[:11], list(range(x.dim())))
    assert torch.equal(rm, torch.zeros(5))
    assert torch.equal(rv, torch.ones(5))


def test_add_relu_module_on_any_rank(generator):
    module = cnnkern.nn.AddReLU()
    for shape in ((), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5, 6)):
        x, r = testing.randn(shape, generator, torch.float32), testing.randn(shape, generator, torch.float32)
        assert torch.equal(module(x, r), F.relu(x + r))
    x, r = torch.randn(65, 43).t(), torch.randn(43, 65)
    assert torch.equal(module(x, r), F.relu(x + r))
