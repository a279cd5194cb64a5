"""Tensors without kernels: layers compute the same as torch's, and return the same types."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d

import cnnkern
from cnnkern import testing
from cnnkern.ops import route

# What PyTorch says when a nested or a quantized tensor is made.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:.*quantize.*deprecated"),
]


class Renamed(Tensor):
    """A subclass without behaviour of its own."""


class Watching(Tensor):
    """A subclass that sees torch's functions."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Added(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.relu(a + b)


IMAGES = (2, 8, 5, 6)
LAYERS = {
    "batch norm": (lambda: cnnkern.nn.BatchNorm2d(8), lambda: nn.BatchNorm2d(8)),
    "batch norm, ReLU": (
        lambda: nn.Sequential(cnnkern.nn.BatchNormReLU2d(8)),
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
    ),
    "layer norm": (lambda: cnnkern.nn.LayerNorm(6), lambda: nn.LayerNorm(6)),
    "layer norm of channels": (lambda: cnnkern.nn.LayerNorm2d(8), lambda: LayerNorm2d(8, eps=1e-6)),
    "convolution": (
        lambda: cnnkern.nn.GroupedConv2d(8, 8, 3, groups=4),
        lambda: nn.Conv2d(8, 8, 3, groups=4),
    ),
    "convolution of sequences": (
        lambda: nn.Sequential(nn.Flatten(2), cnnkern.nn.GroupedConv1d(8, 8, 3, groups=4)),
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3, groups=4)),
    ),
    "addition": (cnnkern.nn.AddReLU, Added),
}
ALL = tuple(LAYERS)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def nested(layout: torch.layout, *shapes: tuple[int, ...]) -> Tensor:
    return torch.nested.nested_tensor([drawn(*shape) for shape in shapes], layout=layout)


TYPES = {
    "nested, jagged": (lambda: nested(torch.jagged, (5, 6), (3, 6)), ("layer norm",)),
    "nested, strided": (lambda: nested(torch.strided, (5, 6), (3, 6)), ("layer norm",)),
    "dispatching": (lambda: TwoTensor(drawn(*IMAGES), 2 * drawn(*IMAGES)), ALL),
    "image": (lambda: tv_tensors.Image(drawn(*IMAGES)), ALL),
    "renamed": (lambda: drawn(*IMAGES).as_subclass(Renamed), ALL),
    "watching": (lambda: drawn(*IMAGES).as_subclass(Watching), ALL),
    "sparse": (lambda: drawn(*IMAGES).relu().to_sparse(), ("addition",)),
    "oneDNN's": (lambda: drawn(*IMAGES).to_mkldnn(), ("batch norm", "convolution", "addition")),
}


def parts(t: Tensor) -> list[Tensor]:
    """The plain tensors that hold what t does."""
    if t.is_nested:
        return list(t.unbind())
    if isinstance(t, TwoTensor):
        return [t.a, t.b]
    if t.layout != torch.strided:
        return [t.to_dense()]
    return [t.as_subclass(Tensor)]


def total(t: Tensor) -> Tensor:
    return t.square().sum()


@pytest.mark.parametrize(("kind", "layer"), [(k, name) for k, (_, layers) in TYPES.items() for name in layers])
@pytest.mark.parametrize("training", [True, False])
def test_layers_compute_what_torch_s_do(kind, layer, training):
    if kind == "oneDNN's" and training and layer != "addition":
        return  # PyTorch has them for inference
    results = []
    for make in LAYERS[layer]:
        torch.manual_seed(0)
        module, x = make().train(training), TYPES[kind][0]()
        for p in module.parameters():
            nn.init.normal_(p)
        differentiable = x.layout in (torch.strided, torch.jagged) and kind != "image"
        if differentiable:
            x = x.detach().requires_grad_()
        with torch.set_grad_enabled(differentiable):
            y = module(*[x] * (1 + (layer == "addition")))
        found = {"y": y}
        if differentiable:
            (sum(map(total, y.unbind())) if y.is_nested else total(y)).backward()
            found |= {"dx": x.grad, **{n: p.grad for n, p in module.named_parameters()}}
        results.append((found, dict(module.named_buffers())))
    (ours, our_buffers), (theirs, their_buffers) = results
    for name, mine in ours.items():
        expected = theirs[name]
        assert type(mine) is type(expected), name
        assert mine.layout == expected.layout, name
        for a, b in zip(parts(mine), parts(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(our_buffers.values(), their_buffers.values(), strict=True):
        for mine, expected in zip(parts(a), parts(b), strict=True):
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("case", testing.CASES.values(), ids=testing.CASES.keys())
def test_functions_take_them_in_every_argument(case):
    """A parameter of another type is PyTorch's as well: their operators see it, ours would not."""
    inputs = case.inputs(case.gradcheck_shapes[0], torch.float32, generator=torch.Generator().manual_seed(0))
    expected = case.reference(**{n: copy.deepcopy(v) for n, v in inputs.items()})
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        arguments = {n: copy.deepcopy(v) for n, v in inputs.items()} | {name: value.clone().as_subclass(Watching)}
        Watching.seen.clear()
        found = case.function(**arguments)
        assert type(found) is Watching
        assert not any("cnnkern" in str(getattr(f, "_schema", f)) for f in Watching.seen)
        torch.testing.assert_close(found.as_subclass(Tensor), expected)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", testing.CASES.values(), ids=testing.CASES.keys())
def test_modes_see_our_operators(case):
    """Of tensors that we have kernels for: plain ones, parameters, subclasses without behaviour."""
    inputs = case.inputs(case.gradcheck_shapes[0], torch.float32, generator=torch.Generator().manual_seed(0))
    for change in (lambda t: t, lambda t: t.as_subclass(Renamed), nn.Parameter):
        arguments = {
            n: change(v.clone()) if n in case.differentiable and v is not None else v for n, v in inputs.items()
        }
        with Operators() as operators:
            case.function(**arguments).sum().backward() if change is nn.Parameter else case.function(**arguments)
        assert f"cnnkern::{case.name}" in operators.called
        assert (f"cnnkern::{case.name}_backward" in operators.called) == (change is nn.Parameter)


def test_what_is_no_tensor_is_refused_by_our_operators():
    for wrong in (None, 1.0, [[1.0]], drawn(2, 3).numpy()):
        with pytest.raises((RuntimeError, TypeError), match="cnnkern::add_relu"):
            cnnkern.functional.add_relu(drawn(2, 3), wrong)
        with pytest.raises((RuntimeError, TypeError), match="cnnkern::add_relu"):
            cnnkern.functional.add_relu(wrong, drawn(2, 3))


@pytest.mark.parametrize("layer", ["layer norm", "batch norm", "convolution", "addition"])
@pytest.mark.parametrize("kind", ["nested, jagged", "dispatching"])
def test_torch_compile(kind, layer):
    if layer not in TYPES[kind][1]:
        return
    ours, x = LAYERS[layer][0](), TYPES[kind][0]()
    arguments = [x] * (1 + (layer == "addition"))
    expected = copy.deepcopy(ours)(*arguments)
    torch._dynamo.reset()
    found = torch.compile(ours, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(parts(found), parts(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_accelerators_that_there_are_no_kernels_for():
    """Their tensors know a device of their own; this one is registered and has no memory behind it."""

    class Elsewhere:
        layout, is_cpu, is_cuda, is_meta, is_nested, is_quantized = torch.strided, False, False, False, False, False

    assert not route.has_kernels(Elsewhere())
    assert route.has_kernels(drawn(2, 3))
    assert route.has_kernels(drawn(2, 3).to("meta"))
    assert not route.has_kernels(torch.quantize_per_tensor(drawn(2, 3), 0.1, 0, torch.quint8))


def test_functions_are_nodes_under_fx():
    functions = cnnkern.functional

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(drawn(8, 2, 3, 3))
            self.mean, self.var = nn.Buffer(torch.zeros(8)), nn.Buffer(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y = functions.conv2d(x, self.w, None, 1, 1, 1, 4)
            y = functions.batch_norm_act(y, self.mean, self.var, act="silu")
            y = functions.batch_norm_add_relu(y, x, self.mean, self.var)
            y = functions.layer_norm2d(functions.add_relu(x, y))
            return functions.layer_norm(y, (6,))

    model, x = Model(), drawn(*IMAGES)
    traced = fx.symbolic_trace(model)
    called = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    expected = ["conv2d", "batch_norm_act", "batch_norm_add_act", "add_relu", "layer_norm2d", "layer_norm"]
    assert called == expected
    assert torch.equal(traced(x), model(x))
    assert torch.equal(copy.deepcopy(traced)(x), model(x))
