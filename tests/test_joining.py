"""The pass over graphs of torch.compile: what it fuses, what it does not, and that results stay the same."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnkern
from cnnkern.conversion import joining
from cnnkern.ops import route

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with config.patch(pre_grad_custom_pass=None):
        yield
    torch._dynamo.reset()


def batch_norms(graph: fx.Graph) -> Counter:
    """How many of our batch norms there are of each kind, and PyTorch's."""
    found: Counter = Counter()
    for node in graph.nodes:
        if node.target in (joining._bn_act, joining._bn_add_act):
            arguments = joining._by_name(node.target._schema, node.args, node.kwargs)
            found["add " * (node.target is joining._bn_add_act) + arguments["act"]] += 1
        elif getattr(node.target, "__name__", "") == "batch_norm":
            found["pytorch"] += 1
    return found


class Joined:
    """A backend that runs the pass and no compiler, and keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []
        self.backend = torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, module: fx.GraphModule, inputs):
        joining.PASS(module.graph)
        module.graph.lint()
        module.recompile()
        self.graphs.append(module.graph)
        return self.backend(module, inputs)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y, x.grad, *grads, *(b.clone() for b in model.buffers())]


def agree(model: nn.Module, layout: torch.memory_format = torch.channels_last, steps: int = 2) -> Counter:
    """Compares a converted and compiled model with the model; returns the batch norms in its graph."""
    model = model.double().to(memory_format=layout)
    backend, converted = Joined(), cnnkern.convert(copy.deepcopy(model))
    compiled = torch.compile(converted, fullgraph=True, backend=backend)
    for seed in range(steps):
        x = torch.randn(4, 8, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = x.to(memory_format=layout)
        for mine, theirs in zip(step(compiled, x), step(model, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
            assert mine.stride() == theirs.stride()
    (graph,) = backend.graphs
    return batch_norms(graph)


class Case(nn.Module):
    def __init__(self, forward: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn, self.bn2, self.prelu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.PReLU()
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self, self.conv1(x), x)
        return self.conv2(y) if y.shape == x.shape else y


JOINED = {
    "functional": (lambda m, h, x: F.relu(m.bn(h)), "relu"),
    "method": (lambda m, h, x: m.bn(h).relu(), "relu"),
    "torch.relu": (lambda m, h, x: torch.relu(m.bn(h)), "relu"),
    "in place": (lambda m, h, x: m.bn(h).relu_(), "relu"),
    "module": (lambda m, h, x: nn.ReLU(inplace=True)(m.bn(h)), "relu"),
    "relu6": (lambda m, h, x: F.relu6(m.bn(h)), "relu6"),
    "hardtanh": (lambda m, h, x: F.hardtanh(m.bn(h), 0.0, 6.0, inplace=True), "relu6"),
    "silu": (lambda m, h, x: F.silu(m.bn(h), inplace=True), "silu"),
    "hardswish": (lambda m, h, x: F.hardswish(m.bn(h)), "hardswish"),
    "sigmoid": (lambda m, h, x: m.bn(h).sigmoid(), "sigmoid"),
    "mish": (lambda m, h, x: F.mish(m.bn(h)), "mish"),
    "hardsigmoid": (lambda m, h, x: F.hardsigmoid(m.bn(h)), "hardsigmoid"),
    "gelu": (lambda m, h, x: F.gelu(m.bn(h)), "gelu"),
    "gelu tanh": (lambda m, h, x: F.gelu(m.bn(h), approximate="tanh"), "gelu_tanh"),
    "leaky_relu": (lambda m, h, x: F.leaky_relu(m.bn(h), 0.2), "leaky_relu"),
    "negative slope": (lambda m, h, x: F.leaky_relu(m.bn(h), -0.2), "leaky_relu"),
    "elu": (lambda m, h, x: F.elu(m.bn(h), 0.7, inplace=True), "elu"),
    "add": (lambda m, h, x: m.bn(h) + x, "add none"),
    "add behind": (lambda m, h, x: x + m.bn(h), "add none"),
    "torch.add": (lambda m, h, x: torch.add(m.bn(h), x, alpha=1).relu(), "add relu"),
    "add in place": (lambda m, h, x: m.bn(h).add_(x).relu_(), "add relu"),
    "add and silu": (lambda m, h, x: F.silu(x + m.bn(h)), "add silu"),
}


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined(name):
    forward, kind = JOINED[name]
    assert agree(Case(forward)) == {kind: 1}


def two_norms(m, h, x):
    y = m.bn(h)
    y += m.bn2(h)
    return y.relu_()


def test_a_sum_of_two_batch_norms_is_joined_with_the_second():
    """In place too: nobody else sees the first one's result."""
    assert agree(Case(two_norms)) == {"none": 1, "add relu": 1}


def changed_between(m, h, x):
    r = h * 1
    y = m.bn(h)
    r.mul_(2)
    return y + r


def statistics_between(m, h, x):
    y = m.bn(h)
    seen = m.bn.running_mean + 1
    return F.relu(y) * seen.view(1, -1, 1, 1)


def used_twice(m, h, x):
    y = m.bn(h)
    return F.relu(y) * y


def written_into_the_residual(m, h, x):
    r = h * 2
    other = r[:, :4]
    r += m.bn(h)
    return torch.cat([F.relu(r), other], 1)[:, 4:]


def written_into_the_first(m, h, x):
    y = m.bn(h)
    seen = y[:1]
    y += m.bn2(h)
    return F.relu(y) + seen


def without_gradients(m, h, x):
    y = m.bn(h)
    with torch.no_grad():
        z = F.relu(y)
    return z * h


def gradient_seen(m, h, x):
    y = m.bn(h)
    y.register_hook(lambda g: g * 2)
    return F.relu(y)


LEFT = {
    "prelu": lambda m, h, x: m.prelu(m.bn(h)),
    "softplus": lambda m, h, x: F.softplus(m.bn(h)),
    "hardtanh": lambda m, h, x: F.hardtanh(m.bn(h)),
    "threshold": lambda m, h, x: F.threshold(m.bn(h), 0.1, 0.0),
    "dropout": lambda m, h, x: F.dropout(m.bn(h), 0.0),
    "product": lambda m, h, x: m.bn(h) * x,
    "difference": lambda m, h, x: x - m.bn(h),
    "alpha": lambda m, h, x: torch.add(x, m.bn(h), alpha=2),
    "number": lambda m, h, x: m.bn(h) + 1,
    "broadcast": lambda m, h, x: m.bn(h) + x[:1],
    "another layout": lambda m, h, x: x.contiguous() + m.bn(h),
    "itself": lambda m, h, x: (lambda y: y + y)(m.bn(h)),
    "pooled": lambda m, h, x: F.relu(m.bn(h).mean((2, 3))),
    "an operator between": lambda m, h, x: F.relu(m.bn(h) * 1),
    **{f.__name__: f for f in (changed_between, statistics_between, used_twice, written_into_the_residual)},
    **{f.__name__: f for f in (written_into_the_first, without_gradients)},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    found = agree(Case(LEFT[name]))
    assert set(found) == {"none"}


def test_a_hook_on_the_result_sees_its_gradient():
    assert agree(Case(gradient_seen)) == {"none": 1}


def test_the_result_as_an_output_is_not_joined():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.bn(x)
            return y, F.relu(y)

    backend = Joined()
    converted = cnnkern.convert(Both()).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 5, 6).to(memory_format=torch.channels_last)
    y, z = torch.compile(converted, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(z, F.relu(y))
    assert batch_norms(backend.graphs[0]) == {"none": 1}


class Block(nn.Module):
    """A residual block with a projection, and what stands around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.projection = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.last, self.prelu = nn.BatchNorm2d(8), nn.PReLU()

    def forward(self, x):
        x = self.stem(x)
        y = self.bn(self.conv(x))
        y += self.projection(x)
        return self.prelu(self.last(self.relu(y))).mean((2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_in_either_layout(layout):
    """Contiguous images are Inductor's."""
    found = agree(Block(), layout, steps=3)
    assert found == ({"relu6": 1, "none": 2, "add relu": 1} if layout == torch.channels_last else {"pytorch": 4})


def test_one_graph_a_mode_and_no_recompilation_for_any_batch():
    model = Block().double().to(memory_format=torch.channels_last)
    backend, converted = Joined(), cnnkern.convert(copy.deepcopy(model))
    compiled = torch.compile(converted, fullgraph=True, backend=backend)

    def both(batch: int) -> None:
        x = torch.randn(batch, 8, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-11)

    for batch in (4, 4, 3, 7):
        both(batch)
    assert len(backend.graphs) == 1
    model.eval(), compiled.eval()
    both(4)
    model.train(), compiled.train()
    for batch in (5, 4):
        both(batch)
    assert [set(batch_norms(g)) for g in backend.graphs] == [{"relu6", "none", "add relu"}, {"pytorch"}]
    torch.testing.assert_close(converted.state_dict(), model.state_dict())


@pytest.mark.parametrize("autocast", [False, True])
def test_who_computes_in_16_bits(autocast):
    """Inductor, as that has not been timed."""
    backend = Joined()
    model = Block().to(memory_format=torch.channels_last)
    model = model if autocast else model.bfloat16()
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = torch.compile(cnnkern.convert(model), fullgraph=True, backend=backend)(x if autocast else x.bfloat16())
    y.float().square().mean().backward()
    assert set(batch_norms(backend.graphs[0])) == {"pytorch"}


def test_autocast_that_keeps_float32_between():
    backend = Joined()
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(cnnkern.convert(model), fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, twin(x), rtol=2e-2, atol=2e-2)
    assert batch_norms(backend.graphs[0]) == {"relu": 1}


def test_checkpointed_segments_update_statistics_once():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    model = Checkpointed().double().to(memory_format=torch.channels_last)
    converted = torch.compile(cnnkern.convert(copy.deepcopy(model)), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # in eager PyTorch they are updated twice
    for mine, theirs in zip(step(converted, x), step(compiled, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_the_rule():
    last = torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert route.joins(last, training=True)
    assert route.joins(torch.empty(2, 3, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d), training=True)
    assert not route.joins(last, training=False)
    assert not route.joins(last.bfloat16(), training=True)
    assert not route.joins(last.to("meta"), training=True)  # whatever is no CPU
    for other in (torch.empty(2, 3, 4, 4), last[:, :, :2], torch.empty(2, 3, 4), torch.empty(2, 3)):
        assert not route.joins(other, training=True)
    with torch.no_grad():
        assert not route.joins(last, training=True)


# ---- the pass in Inductor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_batch_norms_are_inductors(layout, training):
    """Of a whole converted model, on tensors that only say that they are on a GPU."""
    backend = Joined()
    backend.backend = torch._dynamo.lookup_backend("eager")
    with FakeTensorMode(), torch.device("cuda"):
        model = cnnkern.convert(nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), Block())).train(training)
        x = torch.empty(4, 8, 8, 8).contiguous(memory_format=layout)
        y = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert y.device.type == "cuda"
    assert [batch_norms(graph) for graph in backend.graphs] == [{"pytorch": 4}]
    assert torch.ops.cnnkern.grouped_conv2d.default in {node.target for node in backend.graphs[0].nodes}
