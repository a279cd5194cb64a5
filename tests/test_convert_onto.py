"""`cnnkern.convert` where a batch norm is added in place to another tensor: `r += bn(x)` has the same effects as in
eager."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from meanings import CASES
from meanings.onto import Branches, ScaleAndSkipFirst
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import cnnkern
from cnnkern.functional import batch_norm_add_act

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def converted_norm(channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple[nn.BatchNorm2d, nn.Module]:
    """A batch norm and the same converted, with parameters that no other value would pass for."""
    norm = nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(0)
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value, generator=generator)
    norm.to(dtype)
    return norm, cnnkern.convert(copy.deepcopy(norm))


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape or (3, 4, 5, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def fusions(norm: nn.Module) -> dict[str, int]:
    return {name: n for name, n in norm.__dict__["_cnnkern_site"].fusions().items() if n > 0}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_kernel_of_a_sum_bit_for_bit(dtype, layout, training):
    """Of the sizes of planes and rows that the kernels tell apart, up to what they store past the caches."""
    for shape in (
        (3, 4, 5, 6),
        (2, 5, 1, 1),
        (2, 3, 1, 7),
        (5, 3, 17, 9),
        (1, 64, 8, 8),
        (4, 8, 64, 65),
        (8, 16, 128, 128),
    ):
        norm, fused = converted_norm(shape[1], torch.float32 if dtype.itemsize == 2 else dtype)
        fused.train(training)
        norm.train(training)
        x, r = (image(*shape, dtype=dtype, seed=s).to(memory_format=LAYOUTS[layout]) for s in (1, 2))
        args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps)
        expected = batch_norm_add_act(x, r, *args, act="none")
        address = r.data_ptr()
        r += fused(x)
        assert r.data_ptr() == address
        assert torch.equal(r, expected)
        assert fusions(fused) == {"add": 1}
        assert torch.equal(fused.running_mean, norm.running_mean)
        assert torch.equal(fused.running_var, norm.running_var)


def test_rows_of_sequences_and_of_vectors_and_volumes():
    for make, shape in ((nn.BatchNorm1d, (7, 5)), (nn.BatchNorm1d, (3, 5, 9)), (nn.BatchNorm3d, (2, 5, 3, 4, 2))):
        norm = make(5).double()
        fused = cnnkern.convert(copy.deepcopy(norm))
        r, s = (image(*shape, seed=2) for _ in range(2))
        r += fused(image(*shape))
        s += norm(image(*shape))
        torch.testing.assert_close(r, s)
        assert fusions(fused) == {"add": 1}


def outcome(f: Callable[[nn.Module], object], norm: nn.Module) -> object:
    try:
        return f(norm)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).replace("output 0 of BatchNormAdd,", "output 0 of Add,")


def leaf(norm):
    r = image().requires_grad_()
    r += norm(image())
    return r


def view_of_a_leaf(norm):
    r = image().requires_grad_()
    r.view(-1).view(3, 4, 5, 6).add_(norm(image()))
    return r


def view_made_without_gradients(norm):
    r = image().requires_grad_() * 1
    with torch.no_grad():
        view = r.view(3, 4, 5, 6)
    view += norm(image())
    return r


def one_of_several_views(norm):
    r = torch.stack([image(seed=3), image()]).requires_grad_() * 1
    first, _ = r.unbind()
    first += norm(image())
    return r


def expanded(norm):
    r = image(3, 4, 5, 1).expand(3, 4, 5, 6)
    r += norm(image())
    return r


def part_of_its_input(norm):
    memory = torch.arange(400.0, dtype=torch.float64).sin()
    with torch.no_grad():
        memory[20:380].view(3, 4, 5, 6).add_(norm(memory[:360].view(3, 4, 5, 6)))
    return memory


def smaller(norm):
    r = image(1, 4, 5, 6)
    r += norm(image())
    return r


def integers(norm):
    r = torch.ones(3, 4, 5, 6, dtype=torch.int64)
    r += norm(image())
    return r


def other_float(norm):
    r = image(dtype=torch.float32)
    r += norm(image())
    return r


def saved_before(norm):
    r = image().requires_grad_() * 1
    y = r.sin()
    r += norm(image())
    (y.sum() + r.sum()).backward()
    return y


def an_inference_tensor(norm):
    with torch.inference_mode():
        r = image()
    with torch.no_grad():
        r += norm(image())
    return r


def in_inference_mode(norm):
    with torch.inference_mode():
        r = image()
        r += norm(image())
        s = image(seed=4) + norm(image())
        s += norm(image())
        return r.is_inference() and s.is_inference() and r + s


def a_normal_tensor_in_inference_mode(norm):
    r = image()
    with torch.inference_mode():
        r += norm(image())
    return r + r._version


def without_gradients(norm):
    r = image().requires_grad_()
    with torch.no_grad():
        r += norm(image())
    return r.detach() + r._version + r.is_leaf


def called_with_added_without_gradients(norm):
    r = image().requires_grad_() * 1
    y = norm(image())
    with torch.no_grad():
        r += y
    return torch.autograd.grad(r.square().sum(), r)[0] + r._version


def counts_versions(norm):
    r = image().requires_grad_() * 1
    view, alias = r.view(-1), r.detach()
    r += norm(image())
    r.add_(norm(image()))
    z = norm(image()) + r
    z += norm(image())
    z += norm(image())
    versions = [t._version for t in (r, view, alias, z)]
    return r * torch.tensor(versions[0]) + versions[1] + 10 * versions[2] + 100 * versions[3]


def learns_alone(norm):
    """r alone has a gradient."""
    for p in norm.parameters():
        p.requires_grad_(False)
    s = image().requires_grad_()
    r = s * 2
    r += norm(image())
    return torch.autograd.grad(r.square().sum(), s)[0]


def names_of_the_graph(norm):
    r = image().requires_grad_() * 1
    before = r.grad_fn
    r += norm(image())
    following = r.grad_fn.next_functions
    base = (image().requires_grad_() * 1).view(-1)
    base.view(3, 4, 5, 6).add_(norm(image()))
    return r * len(following) + (following[0][0] is before) + 10 * (base.grad_fn is not before)


def twice_differentiated(norm):
    x, s = image().requires_grad_(), image(seed=2).requires_grad_()
    r = s.sin()
    r.view(-1).view(3, 4, 5, 6).add_(norm(x))
    r += norm(x * s)
    inputs = [x, s, *norm.parameters()]
    first = torch.autograd.grad(r.pow(3).sum(), inputs, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])


def a_chain_twice_differentiated(norm):
    x = image().requires_grad_()
    r = 0 + norm(x)
    for factor in (2, 3):
        r += norm(x * factor + x.square())
    inputs = [x, *norm.parameters()]
    first = torch.autograd.grad(F.silu(r).pow(2).sum(), inputs, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])


def forward_mode(norm):
    norm.eval()
    with forward_ad.dual_level():
        r = forward_ad.make_dual(image(), image(seed=5))
        r += norm(image())
        s = image()
        s += norm(forward_ad.make_dual(image(), image(seed=6)))
        return torch.stack([forward_ad.unpack_dual(t).tangent for t in (r, s)])


def under_torch_func(norm):
    norm.eval()

    def f(x):
        r = x.sin()
        r += norm(x)
        return r.square().sum()

    return torch.func.grad(f)(image()) + torch.func.vmap(torch.func.grad(f))(image()[:, None])[:, 0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    def checkpointed(norm):
        def f(x):
            r = x.sin()
            r += norm(x)
            return r.cos()

        x = image().requires_grad_()
        checkpoint(f, x, use_reentrant=reentrant).square().sum().backward()
        return x.grad

    norm, fused = converted_norm()
    torch.testing.assert_close(checkpointed(fused), checkpointed(norm))
    torch.testing.assert_close(fused.state_dict(), norm.state_dict())


def test_autocast():
    norm, fused = converted_norm(dtype=torch.float32)
    weight = image(4, 4, 1, 1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        x, r = (F.conv2d(image(dtype=torch.float32, seed=s), weight) for s in (1, 2))
        args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
        expected = batch_norm_add_act(x, r, *args, act="none")
        r += fused(x)
    assert r.dtype == torch.bfloat16
    assert torch.equal(r, expected)
    assert fusions(fused) == {"add": 1}


def a_subclass(norm):
    class Named(Tensor):
        pass

    r = image().as_subclass(Named)
    r += norm(image())
    return (r * (type(r) is Named)).as_subclass(Tensor)


def written_to_again(norm):
    r = image().requires_grad_() * 1
    y = norm(image())
    r += y
    r.mul_(2)
    y.mul_(3)
    r += y
    return torch.cat([r.flatten(), *(g.flatten() for g in torch.autograd.grad(r.square().sum(), norm.parameters()))])


FORMS = (
    leaf,
    view_of_a_leaf,
    view_made_without_gradients,
    one_of_several_views,
    expanded,
    part_of_its_input,
    smaller,
    integers,
)
FORMS += (
    other_float,
    saved_before,
    an_inference_tensor,
    in_inference_mode,
    a_normal_tensor_in_inference_mode,
    without_gradients,
)
FORMS += (called_with_added_without_gradients, counts_versions, learns_alone, names_of_the_graph, twice_differentiated)
FORMS += (a_chain_twice_differentiated, forward_mode, under_torch_func, a_subclass, written_to_again)
ERRORS = {
    leaf,
    view_of_a_leaf,
    view_made_without_gradients,
    one_of_several_views,
    expanded,
    smaller,
    integers,
    saved_before,
}
ERRORS |= {an_inference_tensor}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_it_means_what_eager_s_means(form):
    norm, fused = converted_norm()
    expected, found = outcome(form, norm), outcome(form, fused)
    if isinstance(expected, str):
        assert form in ERRORS
        assert found == expected
    else:
        assert form not in ERRORS
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.state_dict(), norm.state_dict())


@pytest.mark.parametrize("change", [cnnkern.convert, lambda model: cnnkern.convert(model, recompute=True)])
def test_blocks_with_branches_are_fused_and_stay_so(change):
    """Counts of the third step: a batch norm that is not fused in the first is computed at once from then on."""
    add, relu = "BatchNorm + add", "BatchNorm + add + ReLU"
    x = image()
    for model, counts in (
        (Branches(), {"BatchNorm": 1, add: 2, relu: 1}),
        (Branches(3, scale=False), {"BatchNorm + 0": 1, add: 2, relu: 1}),
        (Branches(2, scale=False, skip=False), {"BatchNorm + 0": 1, relu: 1}),
        (Branches(1, skip=False), {"BatchNorm": 1, relu: 1}),
        (ScaleAndSkipFirst(2), {"BatchNorm": 1, add: 2, relu: 1}),
    ):
        converted = change(copy.deepcopy(model.double()))
        for _ in range(3):
            results = []
            for m in (model, converted):
                y = m(x)
                results.append([y, *torch.autograd.grad(y.square().sum(), m.parameters())])
            torch.testing.assert_close(*results)
        assert cnnkern.conversion_report(converted).counts == counts


def test_every_addition_between_branches_is_fused_in_eval():
    model = CASES["IsMobileOne"][0]().double().eval()
    converted = cnnkern.convert(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(converted(image()), model(image()))
    kinds = [entry.kind for entry in cnnkern.conversion_report(converted).entries]
    assert sum("add" in kind for kind in kinds) == 13
