"""Converts torchvision's ResNet-18 and fine-tunes it on the photographs that scikit-learn ships.

    python examples/finetune_resnet.py

The task: which of the two photographs does a patch come from? Nothing is downloaded, so the weights are random: give
`torchvision.models.resnet18(weights="DEFAULT")` to start from ImageNet's. Takes seconds on two cores.
"""

import argparse
import time

import torch
import torch.nn.functional as F
import torchvision
from photographs import patches, photographs
from torch import Tensor, nn

import cnnkern


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(x).argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the patches in pixels")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = torchvision.models.resnet18(num_classes=2)
    model = cnnkern.convert(model)  # the only line that this example is about
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)

    images = photographs()
    x_test, y_test = patches(images, 64, options.size, generator)
    start = time.perf_counter()
    for step in range(options.steps):
        model.train()
        x, labels = patches(images, options.batch_size, options.size, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        print(f"step {step + 1:2d}: loss {loss.item():.3f}")
    print(cnnkern.conversion_report(model))  # what was fused is known once it has run
    # The running statistics have seen few batches: take them from the patches themselves.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(patches(images, 32, options.size, generator)[0])
    reached = accuracy(model, x_test, y_test)
    seconds = time.perf_counter() - start
    print(f"{reached:.0%} of {len(y_test)} test patches right, after {seconds:.1f} s")

    original = cnnkern.revert(model)  # torchvision's own classes again, with what was learnt
    assert type(original.bn1) is nn.BatchNorm2d
    torch.testing.assert_close(original(x_test), model(x_test), rtol=1e-3, atol=1e-3)
    return reached


if __name__ == "__main__":
    main()
