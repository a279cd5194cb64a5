"""Converted models under torch.compile: one graph, no recompilation, any batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

import cnnkern
from cnnkern.ops import route

NAMES = ["resnet18", "resnext50_32x4d", "convnext_tiny"]
BATCHES = (4, 4, 3, 6)


def converted(name: str) -> nn.Module:
    torch.manual_seed(0)
    return cnnkern.convert(torchvision.models.get_model(name, weights=None, num_classes=10))


def shortened(name: str) -> nn.Module:
    """The network with one block of each stage, which its others repeat: tracing a backward pass takes its time."""
    torch.manual_seed(0)
    if name == "convnext_tiny":
        stages = [CNBlockConfig(a, b, 1) for a, b in ((96, 192), (192, 384), (384, 768), (768, None))]
        # Stochastic depth would draw random numbers.
        return cnnkern.convert(torchvision.models.ConvNeXt(stages, stochastic_depth_prob=0.0, num_classes=10))
    block, extra = BasicBlock, {}
    if name == "resnext50_32x4d":
        block, extra = Bottleneck, {"groups": 32, "width_per_group": 4}
    return cnnkern.convert(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, **extra))


def images(batch: int) -> torch.Tensor:
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
    torch._dynamo.mark_dynamic(x, 0)
    return x


class Graphs:
    """Counts what dynamo hands to the backend."""

    def __init__(self, backend: str) -> None:
        self.count, self.backend = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.count += 1
        return self.backend(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_inference_is_one_graph_for_every_batch(name):
    model = converted(name).eval()
    graphs = Graphs("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for batch in BATCHES:
            x = images(batch)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert graphs.count == 1


@pytest.mark.parametrize("name", NAMES)
def test_training_is_one_graph_for_every_batch(name):
    """In float64, where a sum in another order does not take an activation to the other side of a ReLU's kink."""
    model = shortened(name).double()
    twin = copy.deepcopy(model)
    graphs = Graphs("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    for batch in BATCHES:
        x, target = images(batch).double(), torch.arange(batch)
        torch._dynamo.mark_dynamic(x, 0)
        losses = []
        for m, optimiser in zip((compiled, twin), optimisers, strict=True):
            optimiser.zero_grad()
            loss = F.cross_entropy(m(x), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert graphs.count == 1
    for (n, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8, msg=n)


class Small(nn.Module):
    """Every operator that convert puts into a model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = BasicBlock(16, 16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        y = self.grouped(self.block(self.stem(x)))
        return self.norm(F.relu(y + y.flip(-1)).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(0)
    return cnnkern.convert(Small())


class Ours(nn.Module):
    """Every operator, by our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), cnnkern.nn.BatchNormReLU2d(16))
        self.bn, self.add = cnnkern.nn.BatchNormAddReLU2d(16), cnnkern.nn.AddReLU()
        self.grouped, self.norm = cnnkern.nn.GroupedConv2d(16, 16, 3, groups=4), cnnkern.nn.LayerNorm(16)

    def forward(self, x):
        y = self.stem(x)
        y = self.grouped(self.bn(y, y))
        return self.norm(self.add(y, y.flip(-1)).mean((2, 3)))


@pytest.mark.slow
def test_inductor_trains_and_infers():
    model = small()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (4, 4):
        x = images(batch)[..., :12, :12]
        for m in (compiled, twin):
            m.zero_grad()
            m(x).square().sum().backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    model.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_who_computes_batch_norms_in_a_compiled_graph(training, layout):
    """The rule of ops/route.py: without gradients ours where statistics are taken, with them in channels_last."""
    called = set()

    def backend(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.manual_seed(0)
    model = Ours().train(training).to(memory_format=layout)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images(4)[..., :12, :12].contiguous(memory_format=layout)
    ours = {f"cnnkern.{name}.default" for name in ("bn_act", "bn_add_act", "add_relu")}
    with torch.no_grad():
        compiled(x)
    assert called & ours == ({"cnnkern.bn_act.default", "cnnkern.bn_add_act.default"} if training else set())
    assert {"cnnkern.grouped_conv2d.default", "cnnkern.layer_norm.default"} <= called
    called.clear()
    compiled(x)
    assert called & ours == (ours if layout == torch.channels_last else set())
    assert {"cnnkern.grouped_conv2d.default", "cnnkern.layer_norm.default"} <= called


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_contiguous_training_is_left_to_inductor_on_a_gpu_too(device):
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device=device)
        assert route._left_to_inductor(x, training=True)
        assert not route._left_to_inductor(x.contiguous(memory_format=torch.channels_last), training=True)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_of_a_converted_model_are_pytorchs_in_a_compiled_graph(training):
    """Inductor fuses them with what follows."""
    called: list[str] = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    model = small().train(training)
    twin, x = copy.deepcopy(model), images(4)[..., :12, :12]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    ours = [name for name in called if name.startswith("cnnkern.")]
    assert ours == ["cnnkern.grouped_conv2d.default", "cnnkern.layer_norm.default"]  # once each: one graph
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def graphs_of(model: nn.Module, x: torch.Tensor, training: bool) -> list[list[tuple]]:
    """The operators of the forward and backward graphs, and the shapes of their results."""
    found = []

    def compiler(graph, inputs):
        shapes = [getattr(node.meta.get("val"), "shape", None) for node in graph.graph.nodes]
        found.append([(str(n.target), shape) for n, shape in zip(graph.graph.nodes, shapes, strict=True)])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    with torch.set_grad_enabled(training):
        y = torch.compile(model.train(training), fullgraph=True, backend=backend)(x)
        if training:
            y.sum().backward()
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
def test_inductor_gets_the_originals_graph_where_batch_norms_are_its_own(training, layout):
    """So a converted model is as fast as the original there. In training in channels_last batch norms are ours."""
    model = torchvision.models.resnet18(weights=None).to(memory_format=layout)
    x = images(2).contiguous(memory_format=layout)
    original, converted = (graphs_of(m, x, training) for m in (copy.deepcopy(model), cnnkern.convert(model)))
    assert len(original) == len(converted) == 1 + training
    named = [[("cnnkern" in name) for name, _ in graph] for graph in converted]
    if training and layout == torch.channels_last:
        assert all(any(graph) for graph in named)
    else:
        assert converted == original


def test_errors_are_ours_in_a_compiled_graph_too():
    x, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
    compiled = torch.compile(cnnkern.functional.batch_norm_add_act, backend="eager")
    with torch.no_grad():
        for residual, act in ((x, "tanh"), (x[:1], "relu"), (x.double(), "relu")):
            with pytest.raises(Exception, match="cnnkern::bn_add_act"):
                compiled(x, residual, vector, vector, act=act)
