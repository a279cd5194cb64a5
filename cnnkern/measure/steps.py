"""A step of a model: forward, backward and optimiser in training, forward alone in inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnkern.measure.clock import Step
from cnnkern.measure.values import mean_loss

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How a model is run."""

    training: bool
    device: str
    amp: str | None = None  # a key of AMP
    channels_last: bool = False
    loss: Callable[[Any], Tensor] = mean_loss  # of what the model returns

    def place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device).train(self.training)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, AMP[self.amp] if self.amp else None, enabled=self.amp is not None)


def forward(model: Callable[..., Any], arguments: tuple[Any, ...], setting: Setting) -> Any:
    with torch.set_grad_enabled(setting.training), setting.autocast():
        return model(*arguments)


def step(model: nn.Module, arguments: tuple[Any, ...], setting: Setting) -> Step:
    """The step that is timed. The optimiser is SGD with momentum. Gradients live from backward to the end of the
    step."""
    if not setting.training:
        return lambda: forward(model, arguments, setting)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)

    def training() -> None:
        with setting.autocast():
            loss = setting.loss(model(*arguments))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return training
