"""How the libraries for vision write their models: registries, loops over layers, hooks, learners, parametrizations."""

import copy
import functools
import pickle
import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from meanings.base import Layers, case


class ConvModule(nn.Module):
    """mmcv's: the norm has a name of its own, and the order of the layers is a setting."""

    def __init__(self, order=("conv", "norm", "act"), norm="bn") -> None:
        super().__init__()
        self.order, self.norm_name, self.with_activation = order, norm, "act" in order
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.add_module(self.norm_name, nn.BatchNorm2d(4))
        self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.norm is not None:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


@case()
class IsOfMMCV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ConvModule()
        self.second = ConvModule(("norm", "act", "conv"), "gn1")
        self.third = ConvModule(("conv", "norm"), "bn3")

    def forward(self, x):
        y = self.first(x, activate=False) + self.first(x, norm=False)
        return F.relu(self.third(self.second(y)) + y)


class NormedConv(nn.Conv2d):
    """detectron2's: a convolution with a norm and an activation."""

    def __init__(self, *args: Any, norm: nn.Module, activation: Any = None) -> None:
        super().__init__(*args)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        x = self.norm(x)
        return x if self.activation is None else self.activation(x)


@case()
class IsOfDetectron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = NormedConv(4, 4, 1, norm=nn.BatchNorm2d(4), activation=F.relu_)
        self.lateral = NormedConv(4, 4, 1, norm=nn.BatchNorm2d(4))

    def forward(self, x):
        found = {"p2": self.stem(x)}
        found["p3"] = F.relu_(self.lateral(found["p2"]) + F.interpolate(found["p2"], scale_factor=1, mode="nearest"))
        return found


@case()
class IsOfUltralytics(nn.Module):
    """A loop over layers that say whose results they take; the results that others take are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList([ConvModule(), ConvModule(("conv", "norm")), nn.SiLU(), nn.Identity(), ConvModule()])
        for i, (m, f) in enumerate(zip(self.model, (-1, -1, -1, (-1, 1, 0), -1), strict=True)):
            m.i, m.f = i, f
        self.save = [0, 1]

    def forward(self, x):
        kept: list = []
        for m in self.model:
            if m.f != -1:
                x = sum(x if j == -1 else kept[j] for j in m.f)
            x = m(x)
            kept.append(x if m.i in self.save else None)
        return x


@case()
class FusesItself(Layers):
    """As ultralytics and RepVGG do for inference: the batch norm goes into the convolution, and away."""

    def forward(self, x):
        if self.training or not hasattr(self, "bn"):
            return F.relu(self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x))
        conv, bn = self.conv, self.bn
        self.conv = nn.utils.fusion.fuse_conv_bn_eval(conv, bn)
        del self.bn
        y = self.forward(x)
        self.conv, self.bn = conv, bn
        return y


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Identity()])

    def branches(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            yield norm(conv(x))


@case()
class SumsBranches(Branches):
    def forward(self, x):
        return F.relu(sum(self.branches(x)))


@case()
class TakesFromAGenerator(Branches):
    """The generator waits between its results, and is left before its end."""

    def forward(self, x):
        branches = self.branches(x)
        y = next(branches)
        z = F.silu(y)
        for other in branches:
            z = z + other
            break
        return z + y


@case()
class StacksBranches(Branches):
    def forward(self, x):
        return F.relu(torch.stack(list(self.branches(x))).sum(0)) + torch.cat(list(self.branches(x)), 1).mean(1, True)


class Hook:
    """fastai's: keeps what a layer gave, and its statistics."""

    def __init__(self, module: nn.Module, *, detach: bool) -> None:
        self.detach, self.stored, self.stats = detach, None, []
        module.register_forward_hook(self.call)

    def call(self, module, inputs, output):
        self.stored = output.detach() if self.detach else output
        self.stats.append((output.detach().mean(), output.detach().std()))


@case()
class KeepsActivationsByHooks(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.hooks = [Hook(self.bn, detach=True), Hook(self.features[1], detach=False)]

    def __deepcopy__(self, memo):  # hooks of this kind refer to no module
        made = type(self)().to(self.conv.weight.dtype).train(self.training)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x):
        y = self.hidden(self.features[:3](x))
        return y + self.hooks[0].stored + F.relu(self.hooks[1].stored) + self.hooks[0].stats[-1][1]


def doubled(module, inputs, output):
    return output * 2


def with_keywords(module, args, kwargs, output=None):
    return None if output is not None else ((args[0] + 1, *args[1:]), kwargs)


def scaled_in_place(module, inputs):
    inputs[0].mul_(0.5)


def halved(module, grad_input, grad_output):
    return tuple(None if g is None else g / 2 for g in grad_input)


def halved_before(module, grad_output):
    return tuple(None if g is None else g / 2 for g in grad_output)


@case()
class HasHooksOfAllKinds(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_hook(doubled)
        self.features[1].register_forward_pre_hook(with_keywords, with_kwargs=True)
        self.features[1].register_forward_hook(with_keywords, with_kwargs=True, always_call=True)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.features(x))


@case()
class HasHooksOnItsGradients(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_full_backward_hook(halved)
        self.features[1].register_full_backward_pre_hook(halved_before)
        self.act.register_full_backward_hook(halved)

    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + F.relu(self.features[1](x) + x)


@case()
class HasHooksThatWrite(Layers):
    """Onto the batch norm's input, and onto its output before the activation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_pre_hook(scaled_in_place)
        self.act.register_forward_pre_hook(scaled_in_place)

    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + self.act(self.features[1](x))


class Scaled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.abs() + 0.5


@case()
class IsParametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.other = parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
        self.bn, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        parametrize.register_parametrization(self.norm, "weight", Scaled())

    def forward(self, x):
        with parametrize.cached():
            return F.relu(self.bn(self.conv(x)) + self.norm(self.other(x)))


@case()
class IsKerasStyle(nn.Module):
    """Layers are made by a configuration, kept in a dictionary, and called by a walk over a graph of names."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = {"c": ("in",), "b": ("c",), "a": ("b",), "n": ("a",), "s": ("n", "a"), "out": ("s",)}
        self.layer = nn.ModuleDict({"c": nn.Conv2d(4, 4, 1), "b": nn.BatchNorm2d(4), "n": nn.BatchNorm2d(4)})
        self.operation = {"a": F.silu, "s": torch.add, "out": functools.partial(F.leaky_relu, negative_slope=0.2)}

    def forward(self, x):
        values = {"in": x}
        for name, sources in self.graph.items():
            call = self.layer[name] if name in self.layer else self.operation[name]
            values[name] = call(*(values[s] for s in sources))
        return {k: v for k, v in values.items() if k in ("out", "b")}


@case()
class SwitchesItsNorm(nn.Module):
    """A norm for each domain, chosen by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})

    def forward(self, x):
        return torch.stack([F.relu(self.norms["a" if v.sum() > 0 else "b"](v[None])) for v in x])


@case()
class NormalizesGhostBatches(Layers):
    def forward(self, x):
        return F.relu(torch.cat([self.bn(part) for part in x.chunk(3)])) + torch.cat(
            [F.silu(self.bn(v)) for v in x.split(2)]
        )


@case()
class IsConditional(Layers):
    """The scale and the offset are made of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.scale = nn.BatchNorm2d(4, affine=False), nn.Linear(4, 8)

    def forward(self, x):
        scale, offset = self.scale(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return F.relu(self.plain(x) * (1 + scale) + offset) + F.relu(torch.addcmul(offset, self.plain(x), scale))


@case()
class CopiesItsNorms(Layers):
    """As momentum encoders do: the copy is made while a result is there that nobody has used."""

    def forward(self, x):
        y = self.bn(x)
        target = copy.deepcopy(self.bn)
        shallow, pickled = copy.copy(self.bn), pickle.loads(pickle.dumps(self.bn))
        with torch.no_grad():
            z = F.relu(target(x)) + F.relu(pickled(x))
        return F.relu(y) + z + F.relu(shallow(x) + x)


class Slotted:
    __slots__ = ("__weakref__", "owner", "value")

    def __init__(self, value: Tensor) -> None:
        self.value, self.owner = value, weakref.ref(value)


@case()
class KeepsItInSlots(Layers):
    def forward(self, x):
        kept = Slotted(self.bn(self.conv(x)))
        table = weakref.WeakValueDictionary({"kept": kept})
        z = F.relu(table["kept"].value)
        del kept
        return z if "kept" not in table else z * 100


@case()
class RunsReplicas(Layers):
    """What DataParallel makes of a module: another one around the same tensors."""

    def forward(self, x):
        replica = self.bn._replicate_for_data_parallel()
        replica._parameters, replica._buffers = dict(self.bn._parameters), dict(self.bn._buffers)
        for name, value in (*replica._parameters.items(), *replica._buffers.items()):
            setattr(replica, name, value)
        return F.relu(replica(x)) + F.relu(self.bn(x))


@case()
class InitialisesItsLayersAgain(Layers):
    def forward(self, x):
        def init(module: nn.Module) -> None:
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                nn.init.constant_(module.weight, 2)

        y = self.bn(x)
        with torch.no_grad():
            weights = [copy.deepcopy(m.state_dict()) for m in (self.bn, self.features[1])]
            self.apply(init)
        z = F.relu(self.features[1](x).detach() + self.bn(x).detach())
        for module, state in zip((self.bn, self.features[1]), weights, strict=True):
            module.load_state_dict(state)
        return z + y.detach() + F.relu(self.features(x))


@case()
class CallsItsForwardItself(Layers):
    """Past `__call__`, bound to another module, and as a function of the class."""

    def forward(self, x):
        bound = types.MethodType(type(self.bn).forward, self.features[1])
        return F.relu(self.bn.forward(x)) + F.relu(type(self.bn).__call__(self.bn, x)) + F.relu(bound(x))


@case()
class IsFrozenInTraining(Layers):
    """The batch norms of detectors: eval mode, and no gradients of their own."""

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        self.bn.requires_grad_(False)
        self.features[1].weight.requires_grad_(False)
        return self

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + F.silu(self.features[1](x)))
