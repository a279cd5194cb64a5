"""`cnnkern.recompute` among other things: checkpoints, hooks, threads, autocast, copies, compilers."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import cnnkern
from cnnkern import recomputation
from cnnkern.extension import extension
from tests.recomputing import LAYOUTS, C, Net, Users, assert_same, gradients, held, image, pair, seeded


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", ["inside", "outside", "a part"])
def test_checkpoint(place, reentrant):
    def call(model: nn.Module, x: Tensor, recompute: bool) -> Tensor:
        if place == "outside":
            return checkpoint(model, x, use_reentrant=reentrant)
        part = nn.Sequential(model.conv1, model.bn1, model.act) if place == "a part" else model
        with cnnkern.recompute() if recompute else torch.enable_grad():
            y = checkpoint(part, x, use_reentrant=reentrant)
            return model.bn2(model.conv2(y)) if place == "a part" else y

    found = []
    for i, model in enumerate(pair(Net)):
        x = image().requires_grad_()
        for _ in range(2):
            loss = call(model, x, recompute=i == 1).square().mean()
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if not reentrant else None
            if reentrant:  # which takes backward() alone
                model.zero_grad()
                loss.backward()
                grads = [p.grad for p in model.parameters()]
        found.append([g for g in grads if g is not None])
        assert len(found[-1]) >= 8 or place != "a part"
    assert_same(*found)


def test_checkpoint_outside_still_drops_what_it_drops():
    plain, again = pair(Net)
    x = image().requires_grad_()
    for model in (plain, again):
        model(x)
    bytes_of = [held(lambda m=m: checkpoint(m, x, use_reentrant=False)) for m in (plain, again)]
    assert bytes_of[0] == bytes_of[1] < held(lambda: again(x)) / 3


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_other_hooks(place):
    plain, again = pair(Net)
    seen = []

    def count(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t.detach()

    for hooks in (save_on_cpu, lambda: saved_tensors_hooks(count, lambda t: t)):
        found = []
        for model in (plain, again):
            seen.clear()
            outer, inner = (hooks, torch.enable_grad) if place == "outside" else (cnnkern.recompute, hooks)
            with outer(), inner():
                loss = (model if place == "outside" else model.forward)(image()).square().mean()
            found.append([*torch.autograd.grad(loss, list(model.parameters())), torch.tensor(len(seen))])
        assert_same(*found)


class Raises(nn.Module):
    def __init__(self, error: type[BaseException]):
        super().__init__()
        self.bn, self.error = nn.BatchNorm2d(3), error

    def forward(self, x: Tensor) -> Tensor:
        self.bn(x)
        raise self.error("of the model")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_leave_no_state(error):
    _, again = pair(lambda: Raises(error))
    with pytest.raises(error, match="of the model"):
        again(image())
    assert extension.may_recompute()
    with pytest.raises(error, match="of the model"), cnnkern.recompute():
        again.forward(image())
    assert extension.may_recompute()


def test_nested():
    plain, again = pair(Net)
    with cnnkern.recompute():
        assert not extension.may_recompute()
        with cnnkern.recompute():
            grads = gradients(again, image())
        assert not extension.may_recompute(), "the outer block goes on"
    assert extension.may_recompute()
    assert_same(gradients(plain, image()), grads)


@pytest.fixture
def one_thread():
    """PyTorch's convolutions differ by roundings where several threads of a caller share the threads that compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_threads_are_apart_and_agree():
    plain, again = pair(Net)
    wanted = gradients(plain, image())
    copies = [copy.deepcopy(again) for _ in range(4)]
    found: list[list[Tensor]] = [[] for _ in copies]
    states = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        states.append(extension.may_recompute())
        for _ in range(5):
            found[i] = gradients(copies[i], image())

    with cnnkern.recompute():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(copies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert states == [True] * 4, "a block is of one thread"
    for grads in found:
        assert_same(wanted, grads)


@pytest.mark.usefixtures("one_thread")
def test_one_graph_in_two_threads():
    plain, again = pair(Users)
    wanted = gradients(plain, image())[1:]
    loss = again(image()).square().mean()
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            found[i] = torch.autograd.grad(loss, list(again.parameters()), retain_graph=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grads in found:
        assert_same(wanted, list(grads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_on_a_cpu(layout):
    plain, again = pair(Net, layout=layout)

    def grads(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(image(layout=layout)).float().square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(image(layout=layout))

    for _ in range(2):
        assert_same(grads(plain), grads(again))
    assert held(lambda: forward(again)) < held(lambda: forward(plain))


def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        found = []
        for model in pair(Net):
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(3):
                model.zero_grad()
                parallel(image()).square().mean().backward()
            found.append([p.grad for p in model.parameters()])
        assert_same(*found)
    finally:
        dist.destroy_process_group()


def test_replicas_of_data_parallel_run_their_own_forward():
    _, again = pair(Net)
    replica = again._replicate_for_data_parallel()
    replica.conv1 = nn.Conv2d(3, C, 3)
    assert not torch.equal(replica(image()), again(image()))


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(_saved(m), weights_only=False),
        cnnkern.convert,
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "convert"],
)
def test_copies_compute_again_as_well(through):
    plain, again = pair(Net)
    other = through(again)
    assert recomputation.is_on(other)
    assert isinstance(other, Net)
    x = image()
    for model in (plain, other):
        model(x)
    assert held(lambda: other(x)) < held(lambda: plain(x))
    fresh = pair(Net)[0]
    other.load_state_dict(fresh.state_dict())
    assert_same(gradients(fresh, x), gradients(other, x))


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_revert_takes_it_back():
    model = seeded(Net)
    again = cnnkern.convert(model, recompute=True)
    assert type(cnnkern.revert(again)) is Net
    assert type(again) is not Net
    cnnkern.revert(again, inplace=True)
    assert type(again) is Net
    assert type(again.bn1) is nn.BatchNorm2d
    assert_same(gradients(model, image()), gradients(again, image()))


def test_it_can_be_switched_on_later_and_is_said():
    model = cnnkern.convert(seeded(Net), inplace=True)
    assert "computed again" not in str(cnnkern.conversion_report(model))
    assert cnnkern.convert(model, inplace=True, recompute=True) is model
    report = cnnkern.conversion_report(model)
    assert report.recompute
    assert "the backward pass recomputes results of norms" in str(report).splitlines()[0]
    assert "recompute=True" in repr(model)
    assert repr(model).startswith("Net(")
    assert cnnkern.conversion_report(cnnkern.convert(model)).recompute


def test_convert_verifies_with_it():
    model = cnnkern.convert(seeded(Net), verify=image(), recompute=True)
    assert recomputation.is_on(model)


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_another_argument_is_one_error(value):
    with pytest.raises(TypeError, match=r"recompute must be True or False; got"):
        cnnkern.convert(seeded(Net), recompute=value)


def test_without_the_extension_it_says_so(monkeypatch):
    monkeypatch.setattr(recomputation, "extension", None)
    with pytest.raises(RuntimeError, match="compiled extension, which was not built"):
        cnnkern.convert(seeded(Net), recompute=True)
    with pytest.raises(RuntimeError, match="compiled extension, which was not built"), cnnkern.recompute():
        pass


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_signatures_and_tracing_are_the_models_own():
    plain, again = pair(Net)
    assert torch.fx.symbolic_trace(again).code == torch.fx.symbolic_trace(plain).code
    traced = torch.jit.trace(again.eval(), image())
    torch.testing.assert_close(traced(image()), plain.eval()(image()))


def test_within_transforms_nothing_changes():
    plain, again = pair(Net)
    parameters = {n: p.detach() for n, p in again.named_parameters()}

    def loss(model: nn.Module) -> Callable[[Any], Tensor]:
        return lambda p: torch.func.functional_call(model, p, (image(),)).square().mean()

    found = [torch.func.grad(loss(model.eval()))(parameters) for model in (plain, again)]
    assert_same(*(list(f.values()) for f in found))


@pytest.mark.slow
def test_under_the_compiler_nothing_changes():
    plain, again = pair(Net)
    found = []
    for model in (plain, again):
        torch._dynamo.reset()
        found.append(gradients(torch.compile(model, backend="aot_eager", fullgraph=True), image()))
    assert_same(*found)
