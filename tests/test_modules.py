"""Every module beside its torch twin: constructor, text, state, hooks, copies, casts, memory format, meta, torch.func.

Their numbers in every form are in test_batchnorm.py, test_add.py, test_layer_norm.py, test_grouped_conv*.py and
test_sync.py.
"""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.convnext import LayerNorm2d

import cnnkern

SHAPES = {"1d": (6, 5, 7), "2d": (3, 5, 4, 6), "3d": (2, 5, 3, 4, 2)}


class _Added(nn.Module):
    """A twin's batch norm, then the residual, then the activation."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.relu(a + b)


@dataclass
class Twin:
    """What a module of ours stands beside: a layer with the same state, and what is applied to its output."""

    layer: type
    arguments: tuple
    shape: tuple[int, ...]
    after: Callable[..., Tensor] = lambda y: y
    inputs: int = 1
    keywords: tuple[str, ...] = ()  # that the twin has not


def _twin(name: str) -> Twin:
    lazy, name = name.startswith("Lazy"), name.removeprefix("Lazy")
    prefix = "Lazy" if lazy else ""
    if name == "AddReLU":
        return Twin(_Added, (), (3, 5, 4, 6), inputs=2)
    if name == "LayerNorm":
        return Twin(nn.LayerNorm, ((4, 6),), (3, 5, 4, 6))
    if name == "MaxPool2d":
        return Twin(nn.MaxPool2d, (3, 1, 1), (3, 5, 4, 6))
    if name == "LayerNorm2d":
        return Twin(LayerNorm2d, (5, 1e-6), (3, 5, 4, 6))  # as torchvision's convnext makes them
    if name.startswith("GroupedConv"):
        twin = getattr(nn, prefix + name.removeprefix("Grouped"))
        rest = (1, 1, 1, 4)  # stride, padding, dilation, groups
        return Twin(twin, (8, 3, *rest) if lazy else (8, 8, 3, *rest), (3, 8, 6, 7) if "2d" in name else (3, 8, 7))
    adds, relu = "Add" in name, name.endswith("ReLU") or "ReLU" in name or "Act" in name
    dimensions = "2d" if name.startswith("Sync") else name[-2:]
    twin = nn.SyncBatchNorm if name.startswith("Sync") else getattr(nn, f"{prefix}BatchNorm{dimensions}")

    def after(y: Tensor, *residual: Tensor) -> Tensor:
        y = y + residual[0] if adds else y
        return F.relu(y) if relu else y

    return Twin(
        twin, () if lazy else (5,), SHAPES[dimensions], after, 1 + adds, ("act", "act_param") if "Act" in name else ()
    )


LAYERS = [name for name in cnnkern.nn.__all__ if name[0].isupper() and name != "DenseBlock"]  # which contains layers
TWINS = {name: _twin(name) for name in LAYERS}

names = pytest.mark.parametrize("name", TWINS)


def inputs_of(twin: Twin, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(twin.shape, generator=g).to(dtype) for _ in range(twin.inputs)]


def pair(name: str, **keywords: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and its twin, of the same parameters; lazy ones before their first input."""
    twin = TWINS[name]
    torch.manual_seed(0)
    ours, theirs = getattr(cnnkern.nn, name)(*twin.arguments, **keywords), twin.layer(*twin.arguments, **keywords)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if not nn.parameter.is_lazy(p):
                q.copy_(nn.init.normal_(p))
    return ours, theirs


def run(twin: Twin, layer: nn.Module, inputs: list[Tensor], ours: bool) -> Tensor:
    if ours or isinstance(layer, _Added):
        return layer(*inputs)
    if isinstance(layer, nn.SyncBatchNorm):  # in one process
        uses = not layer.training or layer.track_running_stats
        statistics = (layer.running_mean, layer.running_var) if uses else (None, None)
        y = F.batch_norm(inputs[0], *statistics, layer.weight, layer.bias, layer.training, layer.momentum, layer.eps)
        if layer.training:
            layer.num_batches_tracked.add_(1)
        return twin.after(y, *inputs[1:])
    return twin.after(layer(inputs[0]), *inputs[1:])


def described(module: nn.Module) -> dict[str, tuple]:
    return {n: (t.dtype, t.device, type(t).__name__) for n, t in module.state_dict(keep_vars=True).items()}


@names
def test_constructor_text_and_state(name):
    twin, ours = TWINS[name], getattr(cnnkern.nn, name)

    def parameters(cls: type) -> list[tuple]:
        found = inspect.signature(cls.__init__).parameters.values()
        return [(p.name, p.kind, p.default) for p in found if p.name not in twin.keywords]

    if name not in ("LayerNorm2d", "AddReLU"):  # torchvision's takes whatever nn.LayerNorm does; nothing
        assert parameters(ours) == parameters(twin.layer)
    module, theirs = pair(name)
    assert list(module.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in module.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert described(module) == described(theirs)
    text = repr(module)[len(name) + 1 : -1].replace(", act=relu", "")
    assert repr(module).startswith(f"{name}(")
    assert text == repr(theirs)[len(type(theirs).__name__) + 1 : -1]
    # DistributedDataParallel refuses torch's synchronised ones on a CPU; torchvision's layer norm is no part of torch.
    if twin.layer not in (_Added, nn.SyncBatchNorm, LayerNorm2d):
        assert isinstance(module, twin.layer if not name.startswith("Lazy") else twin.layer.cls_to_become)


@names
def test_trains_and_infers_as_the_twin_in_every_cast(name):
    twin = TWINS[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ours, theirs = pair(name)
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        inputs = inputs_of(twin, dtype)
        for training in (True, False):
            mine = run(twin, ours.train(training), inputs, ours=True)
            expected = run(twin, theirs.train(training), inputs, ours=False)
            if name.startswith("Lazy") and training:  # the first input has made their parameters
                theirs.load_state_dict(ours.state_dict())
                assert type(ours).__name__ == name.removeprefix("Lazy")
                continue
            assert mine.dtype == expected.dtype == dtype
            tolerance = 32 * torch.finfo(dtype).eps * expected.detach().abs().max().item()
            torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)
        assert described(ours) == described(theirs)


@names
def test_hooks_run_where_a_twin_s_do(name):
    twin = TWINS[name]
    seen: dict[bool, list] = {}
    for ours, module in zip((True, False), pair(name), strict=True):
        events = seen[ours] = []
        if not ours and twin.inputs == 2 and twin.layer is not _Added:
            continue  # a batch norm alone has another call
        inputs = [t.requires_grad_() for t in inputs_of(twin)]
        if isinstance(module, nn.SyncBatchNorm):
            module = nn.BatchNorm2d(5)
        module(*inputs)  # lazy modules have a hook of their own until here
        module.register_forward_pre_hook(lambda m, args, e=events: e.append(("pre", len(args))))
        module.register_forward_hook(lambda m, args, y, e=events: e.append(("forward", tuple(y.shape))))
        module.register_full_backward_pre_hook(lambda m, dy, e=events: e.append(("backward pre", tuple(dy[0].shape))))
        module.register_full_backward_hook(
            lambda m, dx, dy, e=events: e.append(("backward", [None if t is None else tuple(t.shape) for t in dx]))
        )
        module(*inputs).square().sum().backward()
    shape = seen[True][1][1]
    gradients = ("backward", [twin.shape] * twin.inputs)
    assert seen[True] == [("pre", twin.inputs), ("forward", shape), ("backward pre", shape), gradients]
    assert seen[False] in ([], seen[True])
    assert seen[False] or twin.inputs == 2


@names
def test_a_forward_hook_may_change_the_output(name):
    twin = TWINS[name]
    module, _ = pair(name)
    inputs = inputs_of(twin)
    module(*inputs)  # what is lazy can be copied after its first input, as torch's own
    plain = copy.deepcopy(module)(*inputs)
    module.register_forward_hook(lambda m, args, y: 2 * y)
    assert torch.equal(module(*inputs), 2 * plain)


@names
def test_copies_and_pickles_compute_the_same_and_share_nothing(name):
    twin = TWINS[name]
    module, _ = pair(name)
    inputs = inputs_of(twin)
    module(*inputs)  # what is lazy can be copied after its first input, as torch's own
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())
        assert torch.equal(other.eval()(*inputs), module.eval()(*inputs))


@names
def test_memory_format_is_the_input_s(name):
    twin = TWINS[name]
    if len(twin.shape) < 4:
        return
    form = torch.channels_last if len(twin.shape) == 4 else torch.channels_last_3d
    module, _ = pair(name)
    module(*inputs_of(twin))
    module.to(memory_format=form) if form is torch.channels_last else module
    inputs = [t.to(memory_format=form).requires_grad_() for t in inputs_of(twin)]
    y = module(*inputs)
    gradients = torch.autograd.grad(y, inputs, torch.randn_like(y))
    if name == "LayerNorm":  # over the last dimensions, whose result eager makes contiguous
        assert y.stride() == nn.LayerNorm((4, 6))(inputs[0]).stride()
        return
    for t in (y, *gradients):
        assert t.is_contiguous(memory_format=form)
    plain = copy.deepcopy(module).to(memory_format=torch.contiguous_format) if len(twin.shape) == 4 else module
    torch.testing.assert_close(plain.eval()(*inputs_of(twin)), module.eval()(*inputs))


@names
def test_meta_and_back(name):
    twin = TWINS[name]
    keywords = {} if twin.layer in (_Added, nn.MaxPool2d) else {"device": "meta", "dtype": torch.float64}
    module, theirs = (c(*twin.arguments, **keywords) for c in (getattr(cnnkern.nn, name), twin.layer))
    assert described(module) == described(theirs)
    inputs = inputs_of(twin, torch.float64)
    if not name.startswith("Lazy"):
        y = module(*(t.to("meta") for t in inputs))
        assert y.is_meta
        assert y.dtype == torch.float64
        assert y.shape == copy.deepcopy(pair(name)[0]).double()(*inputs).shape
    if name.startswith("Lazy"):
        with pytest.raises(ValueError, match="uninitialized parameter"):  # torch's own too
            module.to_empty(device="cpu")
        return
    real = module.to_empty(device="cpu")
    filled, _ = pair(name)
    filled = filled.double()
    filled(*inputs)
    real.load_state_dict(filled.state_dict())
    assert torch.equal(real.eval()(*inputs), filled.eval()(*inputs))


@names
def test_torch_func(name):
    """In eval mode, where the twins' batch norms can be transformed too."""
    twin = TWINS[name]
    ours, theirs = pair(name)
    inputs = inputs_of(twin)
    run(twin, ours, inputs, ours=True), run(twin, theirs, inputs, ours=False)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.double().eval(), theirs.double().eval()
    inputs = inputs_of(twin, torch.float64)

    def loss(module: nn.Module, mine: bool) -> Callable[..., Tensor]:
        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = module

            def forward(self, *inputs: Tensor) -> Tensor:
                return run(twin, self.layer, list(inputs), mine).square().sum()

        holder = Loss()

        def call(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            return torch.func.functional_call(holder, parameters, inputs)

        return call

    results = []
    for mine, module in ((True, ours), (False, theirs)):
        function = loss(module, mine)
        parameters = {f"layer.{n}": p.detach() for n, p in module.named_parameters()}
        gradients = torch.func.grad(function, argnums=tuple(range(1, 1 + twin.inputs)))(parameters, *inputs)
        of_parameters = torch.func.grad(function)(parameters, *inputs)
        stacked = [torch.stack([t, 2 * t]) for t in inputs]
        a_batch = torch.func.vmap(function, in_dims=(None, *[0] * twin.inputs))(parameters, *stacked)
        tangent = torch.func.jvp(functools.partial(function, parameters), tuple(inputs), tuple(inputs))[1]
        results.append((gradients, of_parameters, a_batch, tangent))
    torch.testing.assert_close(*results)


@names
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functionalize(name, training):
    twin = TWINS[name]
    ours, _ = pair(name)
    inputs = inputs_of(twin)
    run(twin, ours, inputs, ours=True)  # lazy ones know their sizes then
    ours.train(training)
    other = copy.deepcopy(ours)
    wanted = run(twin, other, inputs, ours=True)
    found = run(twin, torch.func.functionalize(ours), inputs, ours=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", [n for n in TWINS if not n.startswith("Sync")])
def test_vmap_in_training(name):
    """A batch of batches, each with statistics of its own, where eager has it: without running statistics."""
    twin = TWINS[name]
    ours, theirs = pair(name, **({"track_running_stats": False} if "BatchNorm" in name else {}))
    inputs = inputs_of(twin)
    run(twin, ours, inputs, ours=True), run(twin, theirs, inputs, ours=False)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.double().train(), theirs.double().train()
    stacked = [torch.stack([t, t.flip(0).square()]).double() for t in inputs]
    found = torch.func.vmap(lambda *inputs: run(twin, ours, list(inputs), True))(*stacked)
    expected = torch.func.vmap(lambda *inputs: run(twin, theirs, list(inputs), False))(*stacked)
    torch.testing.assert_close(found, expected)


@names
def test_leaf_under_fx(name):
    """As torch's layers are: one node, of the module, wherever the traced value comes in."""
    twin = TWINS[name]
    layer, _ = pair(name)
    inputs = inputs_of(twin)
    layer(*inputs)  # what is lazy becomes what it stands for

    class Model(nn.Module):
        def __init__(self, constant: int | None) -> None:
            super().__init__()
            self.layer, self.constant = layer.eval(), constant

        def forward(self, x: Tensor) -> Tensor:
            traced = [inputs[i] if i == self.constant else x for i in range(twin.inputs)]
            return self.layer(*traced)

    for constant in (None, 0, 1) if twin.inputs == 2 else (None,):
        model = Model(constant)
        traced = fx.symbolic_trace(model)
        nodes = [(node.op, node.target) for node in traced.graph.nodes if node.op not in ("get_attr", "placeholder")]
        assert nodes == [("call_module", "layer"), ("output", "output")]
        assert torch.equal(traced(inputs[-1]), model(inputs[-1]))


MIXES = (
    {"affine": False},
    {"bias": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"track_running_stats": False},
    {"eps": 0.1},
)


@pytest.mark.parametrize("name", [n for n in TWINS if "BatchNorm" in n and not n.startswith("Lazy")])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_every_form_of_batch_norm(name, mix):
    """Two steps and one in eval, gradients of all that has one: in float64, so that nothing else is the difference."""
    twin = TWINS[name]
    ours, theirs = pair(name, dtype=torch.float64, **mix)
    if isinstance(theirs, nn.SyncBatchNorm):
        stand_in = nn.BatchNorm2d(5, dtype=torch.float64, **mix)
        stand_in.load_state_dict(theirs.state_dict())
        theirs = stand_in
    for step in range(3):
        ours.train(step < 2), theirs.train(step < 2)
        inputs = [(step + 1) * t for t in inputs_of(twin, torch.float64)]
        found = []
        for mine, module in ((True, ours), (False, theirs)):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = run(twin, module, leaves, mine)
            gradients = torch.autograd.grad(y, [*leaves, *module.parameters()], torch.ones_like(y) + inputs[0])
            found.append((y, gradients, dict(module.named_buffers())))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


MISUSES = {
    "channels": lambda shape: torch.randn(shape[0], shape[1] - 1, *shape[2:]),
    "rank": lambda shape: torch.randn(shape[1:2]),
    "integers": lambda shape: torch.ones(shape, dtype=torch.int64),
    "dtype": lambda shape: torch.randn(shape, dtype=torch.float64),
    "device": lambda shape: torch.empty(shape, device="meta"),
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("name", [n for n in TWINS if TWINS[n].layer is not _Added and not n.startswith("Lazy")])
def test_misuse_is_the_twin_s_error_and_leaves_all_state(name, misuse):
    twin = TWINS[name]
    ours, theirs = pair(name)
    if isinstance(theirs, nn.SyncBatchNorm):
        theirs = nn.BatchNorm2d(5)
    if name.startswith("LayerNorm") and misuse == "channels":
        shape = (3, 4, 4, 6) if name == "LayerNorm2d" else (3, 5, 4, 5)
        wrong = torch.randn(shape)
    else:
        wrong = MISUSES[misuse](twin.shape)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    if name.startswith("GroupedConv") and misuse == "device":
        assert ours(wrong).is_meta == theirs(wrong).is_meta  # torch's convolution takes it
        return
    if name == "MaxPool2d" and misuse != "rank":
        assert ours(wrong).shape == theirs(wrong).shape  # nor has a pooling parameters that anything would not fit
        return
    with pytest.raises(Exception) as expected:  # noqa: PT011  the type is what is asked for
        theirs(wrong)
    with pytest.raises(expected.type):
        ours(*[wrong] * twin.inputs)
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    assert ours(*inputs_of(twin)).shape[0] == twin.shape[0]
