"""Converted models in CUDA graphs: batch norms are fused there too, and computed in the graph that they belong to."""

import copy

import pytest
import torch
from torch import nn

import cnnkern
from cnnkern.conversion.deferral import SITE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv(x)))
        return self.relu(self.bn2(self.conv(y)) + x)


def model_and_input() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x = torch.randn(4, 8, 10, 10, dtype=torch.float64)
    return model.double().cuda(), x.cuda().to(memory_format=torch.channels_last)


def fused(model: nn.Module) -> list[int]:
    sites = [m.__dict__[SITE] for m in model.modules() if SITE in m.__dict__]
    return [sum(site.fusions().values()) for site in sites]


def warm_up(step, times: int = 3) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def test_a_captured_step_is_fused_and_computes_what_eager_does():
    model, x = model_and_input()

    def step_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            optimizer.zero_grad(set_to_none=True)
            model(x).square().sum().backward()
            optimizer.step()

        return step

    converted, eager = cnnkern.convert(model), copy.deepcopy(model)
    step, truth = step_of(converted), step_of(eager)
    warm_up(step)
    before = fused(converted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert len(before) == 4
    assert fused(converted) == [n + 1 for n in before]
    for _ in range(2):
        graph.replay()
    for _ in range(5):  # three to warm up; a capture runs nothing
        truth()
    state = eager.state_dict()
    for name, value in converted.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_norm_that_is_an_output_is_computed_in_the_graph():
    model, x = model_and_input()
    model = nn.Sequential(model, nn.BatchNorm1d(4)).double().cuda()
    converted = cnnkern.convert(model)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(converted), (x,))
    for _ in range(3):
        y = graphed(x)
        y.square().sum().backward()
    graphed.eval(), model.eval()
    model.load_state_dict(graphed.state_dict())
    torch.testing.assert_close(graphed(x), model(x), rtol=1e-9, atol=1e-11)
    model.train(), graphed.train()
    torch.testing.assert_close(graphed(x), model(x), rtol=1e-9, atol=1e-11)


def test_a_result_that_waits_beyond_its_graph_is_an_error():
    torch.manual_seed(0)
    norm = cnnkern.convert(nn.BatchNorm2d(8)).cuda()
    x = torch.randn(4, 8, 10, 10, device="cuda")
    warm_up(lambda: torch.relu(norm(x)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = norm(x)  # always followed by a ReLU before
    with pytest.raises(RuntimeError, match=r"in the capture of a CUDA graph, .* for the first time behind its end"):
        y.sum()


def test_a_result_from_before_a_capture_is_an_error_in_it():
    torch.manual_seed(0)
    norm = cnnkern.convert(nn.BatchNorm2d(8)).cuda()
    x = torch.randn(4, 8, 10, 10, device="cuda")
    y = norm(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match=r"before the capture of a CUDA graph"):
        y.sum()
