"""`cnnkern.recompute` where a concatenation, or a tensor that was concatenated, is written to afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkern
from tests.recomputing import C, assert_same, gradients, image, pair, seeded


class Writes(nn.Module):
    """Something is written to when it has been concatenated, which PyTorch allows: a concatenation is a copy."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], views: bool = False, norm: bool = False):
        super().__init__()
        self.a, self.b, self.conv = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), nn.Conv2d(2 * C, C, 1)
        self.norm = nn.BatchNorm2d(C) if norm else nn.Identity()
        self.write, self.views = write, views

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.norm(self.a(x))), self.b(x)
        view = a[:, 1]
        y = torch.cat([a, b], 1)
        z = self.conv(y)
        self.write(view if self.views else a, z)
        return z + a


def _past_the_graph(a: Tensor, _: Tensor) -> None:
    with torch.no_grad():
        a.mul_(2)


def _by_numpy(a: Tensor, _: Tensor) -> None:
    a.detach().numpy()[:] *= 2


PART_WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in the graph": lambda a, _: a.mul_(2),
    "past the graph": _past_the_graph,
    "what came of it": lambda a, z: a.add_(z),
    "a part of it": lambda a, _: a[:, 1].mul_(2),
    "numpy": _by_numpy,
    "data": lambda a, _: a.data.mul_(2),
}


@pytest.mark.parametrize("norm", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("how", PART_WRITES)
def test_what_was_concatenated_may_be_written_to(how, norm):
    make = lambda: Writes(PART_WRITES[how], norm=norm)  # noqa: E731
    if not norm and how != "numpy" and how != "data":  # the relu's gradient reads its result, as in PyTorch
        make = lambda: NoActivation(PART_WRITES[how])  # noqa: E731
    plain, again = pair(make)
    for _ in range(2):
        assert _outcome(plain) == _outcome(again)


class NoActivation(Writes):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        view = a[:, 1]
        z = self.conv(torch.cat([a, b], 1))
        self.write(view if self.views else a, z)
        return z + a


def _outcome(model: nn.Module) -> Any:
    """Gradients to the bit, or the beginning of PyTorch's error."""
    try:
        return [g.numpy().tobytes() for g in gradients(model, image())]
    except RuntimeError as error:
        return str(error)[:90]


@pytest.mark.parametrize("within", [True, False])
def test_views_that_were_made_before_are_seen_within_the_block_and_an_error_behind_it(within):
    def write(view: Tensor, _: Tensor) -> None:
        with torch.no_grad():
            view.mul_(2)

    views: list[Tensor] = []
    make = lambda: NoActivation(write if within else lambda view, _: views.append(view), views=True)  # noqa: E731
    plain, again = pair(make)
    if within:
        assert_same(gradients(plain, image()), gradients(again, image()))
        return
    loss = again(image()).sum()
    with torch.no_grad():
        views[0].mul_(2)
    with pytest.raises(
        RuntimeError, match=r"concatenated within cnnkern.recompute, through a view that was made before"
    ):
        loss.backward()


def test_writes_behind_the_block_are_seen_too():
    parts: list[Tensor] = []
    grads = []
    for model in pair(lambda: NoActivation(lambda a, _: parts.append(a))):
        loss = model(image()).square().mean()
        with torch.no_grad():
            parts[-1].mul_(2)
        grads.append(list(torch.autograd.grad(loss, list(model.conv.parameters()))))
    assert_same(*grads)


def test_writes_to_the_concatenation_are_the_error_they_are_without():
    def forward(model: NoActivation) -> tuple[Tensor, Tensor]:
        y = torch.cat([model.a(image()), model.b(image())], 1)
        return y, model.conv(y)

    model, found = seeded(lambda: NoActivation(lambda *_: None)), []
    for context in (torch.enable_grad, cnnkern.recompute):
        with context():
            y, z = forward(model)
        with torch.no_grad():
            y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        with context():
            y = torch.cat([model.a(image()), model.b(image())], 1)
            with torch.no_grad():
                y.mul_(2)  # before it is saved: what is saved is what it is now
            found.append(list(torch.autograd.grad(model.conv(y).square().sum(), [model.conv.weight])))
    assert_same(*found)
