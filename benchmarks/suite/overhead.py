"""Call overhead: batch norm and ReLU on a tensor of one kilobyte."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnkern import convert, functional, testing
from cnnkern.nn import BatchNormReLU2d

from .groups import AGAIN, Contender, Group
from .options import Options

SHAPE = (2, 8, 4, 4)


def groups(options: Options) -> list[Group]:
    return [
        Group(
            suite="overhead",
            operator="batch_norm_relu",
            network="none",
            shape="x".join(map(str, SHAPE)),
            mode=mode,
            api=api,
            contenders=tuple(Contender(name, "contiguous") for name in ("eager", AGAIN, "cnnkern")),
            open=lambda mode=mode, api=api: OverheadBench(mode == "training", api, options.device),
            weight=0.5,
            max_rounds=30,
            on_host=True,
        )
        for api in ("functional", "module", "converted")
        for mode in ("inference", "training")
    ]


class OverheadBench:
    def __init__(self, training: bool, api: str, device: str) -> None:
        self.training, self.api = training, api
        self.code: dict[Contender, str] = {}
        generator = torch.Generator().manual_seed(0)
        self.x = testing.randn(SHAPE, generator, torch.float32).to(device).requires_grad_(training)
        self.dy = testing.randn(SHAPE, generator, torch.float32).to(device)

    def layer(self, contender: Contender) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        """The call, and the module that holds its parameters and statistics."""
        ours, channels = contender.name == "cnnkern", SHAPE[1]
        if self.api != "functional":
            model = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
            if ours:
                model = BatchNormReLU2d(channels) if self.api == "module" else convert(model)
            model = model.to(self.x.device).train(self.training)
            return model, model
        bn = nn.BatchNorm2d(channels, device=self.x.device)
        mean, var, weight, bias, training = bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training
        if ours:
            return lambda x: functional.batch_norm_relu(x, mean, var, weight, bias, training), bn
        return lambda x: F.relu(F.batch_norm(x, mean, var, weight, bias, training)), bn

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.training):
            y = layer(x)
        grads = torch.autograd.grad(y, [x, *parameters], self.dy.to(x.dtype)) if self.training else []
        return {"output": y.detach()} | {f"gradient {i}": g for i, g in enumerate(grads)}

    def step(self, contender: Contender, verify: bool) -> Callable[[], object]:
        layer, model = self.layer(contender)
        parameters = list(model.parameters())
        if verify:
            eager, twin = self.layer(Contender("eager", contender.layout))
            model64 = copy.deepcopy(twin).double()
            reference = nn.Sequential(model64, nn.ReLU()).train(self.training)
            x64 = self.x.detach().double().requires_grad_(self.training)
            testing.assert_as_good_as(
                self.run(layer, self.x, parameters),
                self.run(eager, self.x, list(twin.parameters())),
                self.run(reference, x64, list(model64.parameters())),
            )
        x, dy = self.x, self.dy

        def training() -> Any:
            torch.autograd.grad(layer(x), [x, *parameters], dy)

        def inference() -> Any:
            with torch.no_grad():
                layer(x)

        return training if self.training else inference
