"""What a converted model does under other threads, and under collectives, as the original does."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import cnnkern

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_threads_train_one_model():
    """Their updates of the running statistics may come in any order."""
    norm = cnnkern.convert(nn.BatchNorm2d(4)).double()

    def train(_: int) -> torch.Tensor:
        return [F.relu(norm(X)).detach() for _ in range(300)][-1]

    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(train, range(4)))
    for found in results:
        torch.testing.assert_close(found, F.relu(F.batch_norm(X, None, None, training=True)))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("change", ["input", "parameter", "residual"])
def test_a_collective_writes_to_what_a_result_is_made_of(group, change):
    results = []
    original = nn.BatchNorm2d(4).double()
    for norm in (copy.deepcopy(original), cnnkern.convert(copy.deepcopy(original))):
        x, residual = X.clone(), X.clone()
        y = norm(x)
        if change == "residual":
            y = y + residual
        target = {"input": x, "parameter": norm.weight.data, "residual": residual}[change]
        dist.all_gather([target], target * 3)
        results.append(F.relu(y))
    torch.testing.assert_close(results[1], results[0])


def folded() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    return model, cnnkern.fold(model)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_folded_layers_output_may_ask_for_its_gradient(layer):
    gradients = []
    for model in folded():
        outputs: list[torch.Tensor] = []
        model[layer].register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y.requires_grad_()))
        model(X.float()).sum().backward()
        gradients.append(outputs[0].grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_a_folded_models_parameters_can_be_swapped():
    results = []
    for model in folded():
        model(X.float())
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            results.append(model.double()(X))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(results[1], results[0])
