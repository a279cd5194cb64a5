"""Several threads and processes at once: the results of one."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cnnkern


def trained(model, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        x = torch.randn(2, 3, 48, 48, generator=g)
        optimiser.zero_grad()
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        optimiser.step()
    return [t.detach().clone() for t in model.state_dict().values()]


def resnext() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=4, groups=8, width_per_group=4)


def convnext() -> nn.Module:
    """Depthwise convolutions and both layer norms."""
    stage = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([stage(32, 64, 2), stage(64, None, 2)], num_classes=4)


@pytest.mark.parametrize("make", [lambda: torchvision.models.resnet18(num_classes=4), resnext, convnext])
def test_two_threads_train_two_models_as_one_thread_would(make):
    torch.manual_seed(0)
    models = [cnnkern.convert(make()) for _ in range(2)]
    alone = [trained(copy.deepcopy(m), seed) for seed, m in enumerate(models)]
    together: dict[int, list[torch.Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed, m=m: together.update({seed: trained(m, seed)}))
        for seed, m in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        for mine, one in zip(together[seed], expected, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-6)


class Through(Dataset):
    """Samples that went through a layer in the worker process."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((2, 8, 64, 64), float(index)) + torch.arange(64.0))


@pytest.mark.parametrize(
    "layer",
    [
        cnnkern.nn.BatchNormReLU2d(8),
        cnnkern.nn.GroupedConv2d(8, 8, 3, groups=2),
        cnnkern.nn.GroupedConv2d(8, 8, 3, groups=8),
        cnnkern.nn.LayerNorm(64),
        cnnkern.nn.LayerNorm2d(8),
    ],
    ids=str,
)
def test_fork_after_use(layer):
    layer(torch.randn(8, 8, 128, 64)).sum().backward()  # threads are up before the workers are forked
    layer = copy.deepcopy(layer).eval()
    expected = [Through(layer)[i] for i in range(8)]
    loader = DataLoader(Through(layer), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for mine, one in zip(loader, expected, strict=True):
        assert torch.equal(mine, one)
