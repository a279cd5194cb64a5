"""The pass over graphs of torch.compile in Inductor: where it is installed, beside users' passes."""

import copy
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch._inductor import codecache, config
from torch._inductor.custom_graph_pass import CustomGraphPass

import cnnkern
from cnnkern.conversion import joining
from tests.test_joining import Block, _fresh, batch_norms, step  # noqa: F401 - a fixture that every test uses


class Noting(CustomGraphPass):
    """A user's pass."""

    def __init__(self) -> None:
        self.graphs: list[Counter] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(batch_norms(graph))

    def uuid(self):
        return None  # what Inductor compiles with it is not kept


def test_what_is_compiled_with_it_can_be_kept():
    assert joining.PASS.uuid() == joining.JoinBatchNorms().uuid() is not None
    assert codecache.resolve_pre_grad_pass_timing() == "late"
    joining.install()
    assert codecache.resolve_pre_grad_pass_timing() == "late"  # behind the look into the cache


def traced(model: nn.Module) -> None:
    torch.compile(model, backend="eager")(torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last))


def test_it_is_installed_when_a_converted_model_is_traced_behind_other_passes():
    theirs = Noting()
    config.pre_grad_custom_pass = theirs
    traced(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    assert config.pre_grad_custom_pass is theirs
    traced(cnnkern.convert(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())))
    assert config.pre_grad_custom_pass == [theirs, joining.PASS]
    torch._dynamo.reset()
    traced(cnnkern.convert(nn.Sequential(nn.BatchNorm2d(8), nn.SiLU())))
    assert config.pre_grad_custom_pass == [theirs, joining.PASS]


def test_graphs_without_our_operators_come_out_as_they_were():
    texts = []

    def backend(module, inputs):
        texts.append(module.graph.python_code("self").src)
        joining.PASS(module.graph)
        texts.append(module.graph.python_code("self").src)
        return module.forward

    torch.compile(Block(), backend=backend)(torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last))
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_inductor_trains_with_joined_operators_and_a_users_pass():
    before, after = Noting(), Noting()
    model = Block().double().to(memory_format=torch.channels_last)
    converted = cnnkern.convert(copy.deepcopy(model))
    compiled = torch.compile(converted, fullgraph=True)
    config.pre_grad_custom_pass = [before, joining.PASS, after]
    for seed in range(2):
        x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = x.to(memory_format=torch.channels_last)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            results = step(compiled, x), step(model, x)
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert before.graphs == [{"none": 4}]
    assert after.graphs == [{"relu6": 1, "none": 2, "add relu": 1}]
