"""Blocks of mobile networks that a folded model computes in one kernel: 1x1, depthwise and 1x1 convolutions, or two of
them. As good as eager in every shape, and nothing that a model does between the layers changes what it computes."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cnnkern
from benchmarks.studies import mobile_blocks
from cnnkern import _C, testing
from tests.test_fold import LAYOUTS, judged, randomised

pytestmark = pytest.mark.skipif(_C.cpu_capability() == "DEFAULT", reason="without AVX2 oneDNN computes the layers")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def blocks_run(call: Callable[[], object]) -> int:
    """How many blocks a call computes in one kernel."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return sum(event.count for event in recorded.key_averages() if event.key == "cnnkern::mobile_block")


class Inverted(nn.Module):
    """An inverted residual. `between` is called with the results of its layers, as code of a model might be."""

    def __init__(self, channels: int = 6, act: type[nn.Module] = nn.ReLU6, inplace: bool = True, k: int = 3) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(wide), act(inplace=inplace)
        self.depthwise = nn.Conv2d(wide, wide, k, padding=k // 2, groups=wide, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(wide), act(inplace=inplace)
        self.project, self.bn3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.between: Callable[[str, Tensor], Tensor] = lambda _, t: t

    def forward(self, x: Tensor) -> Tensor:
        y = self.between("expanded", self.act1(self.bn1(self.expand(x))))
        z = self.between("depthwise", self.act2(self.bn2(self.depthwise(y))))
        return self.between("projected", self.bn3(self.project(z))) + x


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Mish], ids=lambda a: a.__name__)
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "new"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_a_model_runs_its_blocks(act, inplace, mode):
    """From the first call on, and what is fused with what is reported as layer by layer."""
    torch.manual_seed(0)
    model = randomised(nn.Sequential(Inverted(act=act, inplace=inplace), Inverted(act=act, inplace=inplace, k=5)))
    folded = cnnkern.fold(model)
    for _ in range(3):
        with mode():
            x = torch.randn(2, 6, 14, 12)
            assert blocks_run(lambda x=x: folded(x).sum()) == 2
        judged(folded, model, x.clone(), layouts=LAYOUTS)
    name = {"ReLU6": "relu6"}.get(act.__name__, act.__name__)
    found = {kind.lower(): count for kind, count in cnnkern.conversion_report(folded).counts.items()}
    assert found == {f"conv + batchnorm + {name.lower()}": 4, "conv + batchnorm + add": 2}


def same_gradient(model: nn.Module, x: torch.Tensor) -> None:
    """A folded model that has run folded gives the original's gradient of its input."""
    folded, x = cnnkern.fold(model), x.requires_grad_()
    with torch.no_grad():
        folded(x)
    (gradient,) = torch.autograd.grad(folded(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def as_good_as_by_layer(model: nn.Module, folded: nn.Module, x: Tensor) -> None:
    """The folded model, compared with one whose layers are computed one by one, because hooks copy each result."""
    layers, exact = cnnkern.fold(model), copy.deepcopy(model).double()
    for module in layers.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: output.clone())
    for layout in LAYOUTS:
        given = x.to(memory_format=layout)
        with torch.no_grad():
            testing.assert_as_good_as({"y": folded(given)}, {"y": layers(given)}, {"y": exact(given.double())})


def test_torchvisions_networks():
    """Without squeeze-excitation all of a block, else its first two layers. The rule leaves some 5x5 to oneDNN."""
    for name, count in (
        ("mobilenet_v2", 17),
        ("mnasnet0_5", 17),
        ("mobilenet_v3_large", 15 - 3),
        ("efficientnet_b0", 15 - 7),
    ):
        model = mobile_blocks.build(name).eval()
        folded = cnnkern.fold(randomised(model))
        x = torch.randn(4, 3, 64, 64)
        with torch.no_grad(), threads(1):
            folded(x).sum(), folded(x).sum()
            assert blocks_run(lambda folded=folded, x=x: folded(x).sum()) == count, name
        as_good_as_by_layer(model, folded, x)


KEPT: list[Tensor] = []


def _keep(_: str, t: Tensor) -> Tensor:
    KEPT.append(t)
    return t


def _scaled_in_place(name: str, t: Tensor) -> Tensor:
    return t.mul_(2) if name != "projected" else t


def _read_by_numpy(_: str, t: Tensor) -> Tensor:
    KEPT.append(torch.from_numpy(t.detach().numpy().copy()))
    return t


def _written_by_numpy(name: str, t: Tensor) -> Tensor:
    if name == "expanded":
        t.detach().numpy()[:] += 1
    return t


def _view_written(name: str, t: Tensor) -> Tensor:
    if name != "projected":
        t[:, :3].zero_()
    return t


def _data_replaced(name: str, t: Tensor) -> Tensor:
    if name == "depthwise":
        t.data = t.detach() * 3
    return t


def _pooled_and_gated(name: str, t: Tensor) -> Tensor:
    return t * t.mean((2, 3), keepdim=True).sigmoid() if name == "depthwise" else t


def _another_thread_reads(_: str, t: Tensor) -> Tensor:
    thread = threading.Thread(target=lambda: KEPT.append(t.clone()))
    thread.start()
    thread.join()
    return t


BETWEEN = [
    _keep,
    _scaled_in_place,
    _read_by_numpy,
    _written_by_numpy,
    _view_written,
    _data_replaced,
    _pooled_and_gated,
    _another_thread_reads,
    lambda _, t: t.clone(),
    lambda name, t: F.dropout(t, training=False) if name != "projected" else t,
    lambda name, t: t[:, :, 1:, :] if name == "expanded" else F.pad(t, (0, 0, 1, 0)) if name == "projected" else t,
    lambda name, t: t.relu_() if name == "expanded" else t.sigmoid(),
]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: getattr(f, "__name__", "between"))
def test_what_happens_between_the_layers(between):
    """A model's own code reads, keeps, changes or replaces results. It sees what it sees in the original."""
    torch.manual_seed(0)
    model = randomised(Inverted())
    folded = cnnkern.fold(model)
    model.between = folded.between = between
    if between is _pooled_and_gated or between is BETWEEN[-2]:
        model.bn3 = folded.bn3 = nn.Identity()
    for _ in range(3):
        x = torch.randn(2, 6, 10, 8)
        seen = []
        for m in (model, folded):
            KEPT.clear()
            with torch.no_grad():
                y = m(x.clone())
            seen.append([y, *(t.clone() for t in KEPT)])
        assert len(seen[0]) == len(seen[1])
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    KEPT.clear()


def test_hooks_see_the_layers_results():
    model = randomised(Inverted())
    folded = cnnkern.fold(model)
    x, seen = torch.randn(1, 6, 9, 9), {}
    for m in (model, folded):
        seen[m] = []
        for child in m.children():
            child.register_forward_hook(lambda *args, m=m: seen[m].append(args[2].clone()))
    with torch.no_grad():
        for _ in range(2):
            for found in seen.values():
                found.clear()
            torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen[folded], seen[model], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("written", ["input", "weight"])
def test_what_changes_before_the_block_is_computed(written):
    """The input or a parameter is written to while the results wait."""
    model = randomised(Inverted())
    folded = cnnkern.fold(model)
    for m in (model, folded):
        with torch.no_grad():
            m(torch.randn(1, 6, 9, 9))

    def write(m: nn.Module, x: Tensor) -> Tensor:
        def change(name: str, t: Tensor) -> Tensor:
            if name == "depthwise":
                (x if written == "input" else m.expand.weight).mul_(2)
            return t

        m.between = change
        with torch.no_grad():
            return m(x)

    x = torch.randn(1, 6, 9, 9)
    torch.testing.assert_close(write(folded, x.clone()), write(model, x.clone()), rtol=1e-4, atol=1e-4)


def test_layers_that_never_lead_a_block_are_not_deferred_for_long():
    """A 1x1 convolution before a dense one: after the first call its result is computed at once again."""
    model = randomised(
        nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        )
    )
    folded = cnnkern.fold(model)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        folded(x)
        y = folded[2](folded[1](folded[0](x)))
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            y.sum()
    assert not any("convolution" in event.key for event in recorded.key_averages())
    judged(folded, model, x)


@pytest.mark.parametrize("where", ["expanded", "depthwise"])
def test_autocast_that_begins_within_a_block(where):
    model = randomised(Inverted())
    folded = cnnkern.fold(model)
    x = torch.randn(2, 6, 9, 9)
    results = []
    for m in (folded, model):
        with torch.no_grad():
            m(x)
            with ExitStack() as stack:

                def begin(name: str, t: Tensor, stack: ExitStack = stack) -> Tensor:
                    if name == where:
                        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                    return t

                m.between = begin
                results.append(m(x))
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_gradients_of_a_block():
    same_gradient(randomised(Inverted()), torch.randn(1, 6, 9, 9))


def test_threads_share_a_block():
    model = randomised(nn.Sequential(*(Inverted() for _ in range(3))))
    folded = cnnkern.fold(model)
    inputs = [torch.randn(1, 6, 9 + i, 9) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            results[i] += [folded(inputs[i]) for _ in range(20)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for found, y in zip(results, expected, strict=True):
        for mine in found:
            torch.testing.assert_close(mine, y, rtol=1e-4, atol=1e-4)
