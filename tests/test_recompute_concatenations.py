"""Recomputed concatenations: the same gradients, and each part is saved once."""

import gc
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnnkern
from cnnkern.measure import profile
from tests.recomputing import LAYOUTS, C, N, assert_same, gradients, held, image, pair, seeded
from tests.test_recompute_concatenation_writes import NoActivation

PIXELS = 64  # of an image between the layers here
MAP = N * C * PIXELS * 4  # bytes of C channels


class Dense(nn.Module):
    """A dense block of plain layers, from a list of features or from one tensor that grows."""

    def __init__(self, depth: int = 6, grows: bool = False, dim: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(C * (i + 1)) for i in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(C * (i + 1), C, 1) for i in range(depth))
        self.norm, self.grows, self.dim = nn.BatchNorm2d(C * (depth + 1)), grows, dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            if self.grows:
                x = torch.cat([x, conv(F.relu(norm(x)))], self.dim)
            else:
                features.append(conv(F.relu(norm(torch.cat(features, self.dim)))))
        return F.relu(self.norm(x if self.grows else torch.cat(features, self.dim)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grows", [False, True], ids=["list", "grows"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_dense_block_keeps_each_feature_map_once(training, grows, layout):
    plain, again = pair(lambda: Dense(grows=grows, dim=-3 if grows else 1), layout=layout)
    plain.train(training), again.train(training)
    x = image(layout=layout)
    for _ in range(3):
        assert_same(gradients(plain, x), gradients(again, x))
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)
    # The stem's result, those of the six convolutions, and the result of the block; the rest are vectors.
    assert 7 + 7 <= held(lambda: again(x)) / MAP < 7 + 7 + 1
    assert held(lambda: plain(x)) / MAP > 21 + 21 + 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_other_dtypes_too(dtype):
    plain, again = pair(Dense, dtype=dtype)
    for _ in range(2):
        assert_same(gradients(plain, image(dtype)), gradients(again, image(dtype)))
    assert held(lambda: again(image(dtype))) < 0.4 * held(lambda: plain(image(dtype)))


@pytest.mark.parametrize("grows", [False, True], ids=["list", "grows"])
@pytest.mark.parametrize("order", [1, 2])
def test_against_the_model_in_float64(order, grows):
    """PyTorch's own layers, so that nothing of ours is on both sides."""
    model = seeded(lambda: Dense(3, grows), dtype=torch.float64)
    again = cnnkern.convert(model, recompute=True)

    def derivatives(of: nn.Module) -> list[Tensor]:
        x = image(torch.float64).requires_grad_()
        wanted = [x, *of.parameters()]
        first = torch.autograd.grad(of(x).square().sum(), wanted, create_graph=order == 2)
        return list(first if order == 1 else torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    for _ in range(2):
        wanted, found = derivatives(model), derivatives(again)
        largest = max(float(g.abs().max()) for g in wanted)  # some are sums whose terms cancel
        for a, b in zip(wanted, found, strict=True):
            # A sum of a few thousand products, each rounded in the last of 52 bits.
            torch.testing.assert_close(a, b, rtol=0, atol=1e4 * 2.0**-52 * largest)


def test_double_backward_is_bit_equal():
    found = []
    for model in pair(lambda: Dense(3), dtype=torch.float64):
        x = image(torch.float64).requires_grad_()
        first = torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()], create_graph=True)
        found.append(list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *model.parameters()])))
    assert_same(*found)


def test_a_graph_may_be_walked_again_and_in_part():
    found = []
    for model in pair(Dense):
        loss = model(image()).square().mean()
        wanted = list(model.parameters())
        grads = [g for _ in range(2) for g in torch.autograd.grad(loss, wanted, retain_graph=True)]
        grads += torch.autograd.grad(loss, [model.convs[2].weight], retain_graph=True)
        found.append([*grads, *torch.autograd.grad(loss, wanted)])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, wanted)
    assert_same(*found)


class Branches(nn.Module):
    """Branches that end in batch norms, as in an Inception network, and several layers that use them together."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(True)) for _ in range(3)
        )
        self.convs = nn.ModuleList(nn.Conv2d(3 * C, C, 1) for _ in range(2))
        self.norm, self.pool = nn.BatchNorm2d(3 * C) if norm else None, nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.concat([branch(x) for branch in self.branches], 1)
        found = self.pool(y).sum() + self.convs[0](y).square().sum() + self.convs[1](y).square().sum()
        return found if self.norm is None else found + F.silu(self.norm(y)).square().sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [False, True])
def test_parts_may_be_computed_again_themselves(norm, layout):
    plain, again = pair(lambda: Branches(norm), layout=layout)
    for _ in range(3):
        assert_same(gradients(plain, image(layout=layout)), gradients(again, image(layout=layout)))
    saved = held(lambda: plain(image(layout=layout))) - held(lambda: again(image(layout=layout)))
    # The concatenation; or, where the last norm keeps that (it would be one layer deeper), this norm's result.
    assert round(saved / MAP, 1) == 3


CATS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda a, b: torch.cat([a, b], 2)[:, :, ::2],
    "images": lambda a, b: torch.cat([a, b], 0),
    "both": lambda a, b: torch.cat([torch.cat([a, b], 0), torch.cat([b, a], 0)], 3),
    "in another": lambda a, b: torch.cat([torch.cat([a, b], 1), torch.cat([b, a], -3)], 1)[:, : 2 * C].sigmoid(),
    "twice the same": lambda a, _: torch.cat([a, a], 1),
    "one": lambda a, _: torch.cat([a], 1),
    "with a legacy empty one": lambda a, b: torch.cat([torch.empty(0), a, b], 1),
    "channels of each": lambda a, b: torch.cat([a[:, : C // 2], b[:, C // 2 :]], 1),
    "transposed": lambda a, b: torch.cat([a.transpose(2, 3), b], 1),
    "expanded": lambda a, b: torch.cat([a, b.mean((2, 3), keepdim=True).expand_as(b)], 1),
    "layouts": lambda a, b: torch.cat([a, b.contiguous(memory_format=torch.channels_last)], 1),
    "dtypes": lambda a, b: torch.cat([a, b.double()], 1).float(),
    "a number": lambda a, b: torch.cat([a, torch.ones(N, 1, 8, 8), b], 1),
    "concatenate": lambda a, b: torch.concatenate([a, b], 1),
    "axis": lambda a, b: torch.cat((a, b), axis=1),
    "hstack": lambda a, b: torch.hstack([a, b]),
    "out of the graph": lambda a, b: torch.cat([a.detach(), b.detach()], 1),
}


class Whatever(nn.Module):
    def __init__(self, cat: Callable[[Tensor, Tensor], Tensor], norm: bool):
        super().__init__()
        self.a, self.b, self.cat = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), cat
        self.norm = nn.BatchNorm2d(C) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.cat(self.norm(self.a(x)), self.norm(self.b(x)))
        norm = F.batch_norm(y, None, None, training=True)
        return y.exp() * F.conv2d(y, torch.ones(1, y.shape[1], 1, 1, requires_grad=True)) * norm


@pytest.mark.parametrize("norm", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("cat", CATS)
def test_whatever_is_concatenated(cat, norm):
    plain, again = pair(lambda: Whatever(CATS[cat], norm))
    for _ in range(2):
        found = [
            [torch.zeros(1) if g is None else g for g in gradients(model, image(), allow_unused=True)]
            for model in (plain, again)
        ]
        assert_same(*found)
    vectors = 1024  # bytes that recipes keep beside images: copies of weight and bias
    assert held(lambda: again(image())) <= held(lambda: plain(image())) + vectors


def test_a_view_of_much_is_not_kept_for_a_little():
    weight = torch.ones(1, 4, 1, 1, requires_grad=True)
    with cnnkern.recompute():
        large = torch.randn(8, 64, 16, 16) * 1

        def forward(large: Tensor) -> Tensor:
            return F.conv2d(torch.cat([large[:, :2], large[:, 2:4]], 1), weight)

        y = forward(large)
        del large
        kept = held(lambda: forward(torch.randn(8, 64, 16, 16) * 1))
    assert kept < 8 * 6 * 256 * 4
    y.sum().backward()


def test_graphs_are_freed_without_a_collection():
    """Also where a part was changed to what came of its concatenation, whose graph keeps the part."""
    models = [pair(Dense)[1], pair(lambda: NoActivation(lambda a, z: a.add_(z)))[1]]
    for model in models:
        model(image())
    gc.collect()
    gc.disable()
    try:
        for model in models:
            assert held(lambda m=model: m(image()).sum() and None) == 0, "a graph that nobody has is still there"
    finally:
        gc.enable()


def test_what_nobody_saves_is_not_kept_longer_than_it_is_there():
    with cnnkern.recompute():
        x = torch.randn(4, 64, 16, 16, requires_grad=True)

        def forward() -> Tensor:
            y = torch.cat([x * 2, x * 3], 1) + 1
            (x + 1).exp()  # the next thing to be saved
            return y

        kept = held(forward)
    assert 0 <= kept - 2 * x.numel() * 4 < 64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout):
    found, kept = [], []
    for model in pair(Dense, layout=layout):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(image(layout=layout)).float().square().mean()
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(held(lambda m=model: m(image(layout=layout))))
    assert_same(*found)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_around_and_within(reentrant):
    found = []
    for model in pair(Dense):
        model.zero_grad()
        x = image().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        with cnnkern.recompute() if model.__class__ is not Dense else torch.enable_grad():
            y = checkpoint(model.forward, x, use_reentrant=reentrant)
            torch.cat([y, y], 1).exp().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)


def test_transforms_of_torch_func_are_left_alone():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    with cnnkern.recompute():
        found = torch.func.vmap(lambda a, b: torch.cat([a, b]).exp())(a, b)
        tangent = torch.func.jvp(lambda a: torch.cat([a, b]).exp(), (a,), (b,))[1]
    assert torch.equal(found, torch.cat([a, b], 1).exp())
    assert torch.equal(tangent, torch.cat([a.exp() * b, torch.zeros_like(b)]))


DENSENETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.densenet121(num_classes=4),
    "timm": lambda: timm.create_model("densenet121", num_classes=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", DENSENETS)
def test_densenets_of_other_packages(package):
    model = seeded(DENSENETS[package])
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    eager = profile.held_bytes(lambda: model(x), "cpu")
    plain = cnnkern.convert(model)
    again = cnnkern.convert(model, recompute=True)
    for m in (plain, again):
        m(x)
    assert_same(*(gradients(m, x) for m in (plain, again)))
    assert profile.held_bytes(lambda: again(x), "cpu") <= 0.3 * eager


@pytest.mark.parametrize("name", ["densenet_small", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_those_of_the_zoo(name):
    torch.manual_seed(0)
    model = cnnkern.models.create_model(name, num_classes=4)
    eager = cnnkern.models.create_model(name, num_classes=4, fused=False)
    x = torch.randn(2, 1 if name == "densenet_small" else 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def within() -> Tensor:
        with cnnkern.recompute():
            return model(x)

    found = [
        torch.autograd.grad(call().square().mean(), list(model.parameters())) for call in (lambda: model(x), within)
    ]
    assert_same(*map(list, found))
    assert held(within) < (0.3 if name == "densenet121" else 0.45) * held(lambda: eager(x))
