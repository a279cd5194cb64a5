"""Fine-tunes a timm model, converted: an exponential moving average of the weights, bfloat16 autocast, channels_last.

    python examples/finetune_timm.py --model resnet26.bt_in1k
    python examples/finetune_timm.py --model efficientnet_b0 --device cuda --batch-size 64 --size 224

The task needs no download: which of scikit-learn's two photographs does a patch come from? Weights are random;
`timm.create_model(name, pretrained=True)` starts from ImageNet's.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from photographs import patches, photographs
from timm.utils import ModelEmaV3

import cnnkern


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """The losses of the first and the last step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet10t", help="timm's name of a model (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the patches in pixels (default: %(default)s)")
    parser.add_argument("--recompute", action="store_true", help="train with less memory")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = timm.create_model(options.model, num_classes=2).to(options.device, memory_format=torch.channels_last)
    model = cnnkern.convert(model, inplace=True, recompute=options.recompute)  # the only line that differs
    average = ModelEmaV3(model, decay=0.9)  # copies the converted model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    images, losses = photographs(), []
    for step in range(options.steps):
        x, labels = patches(images, options.batch_size, options.size, generator)
        x, labels = x.to(options.device, memory_format=torch.channels_last), labels.to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step)
        losses.append(loss.item())
        print(f"step {step + 1:2d}: loss {losses[-1]:.3f}")

    print(str(cnnkern.conversion_report(model)).splitlines()[0])
    average.module.eval()
    with torch.no_grad():
        predicted = average.module(x.float()).argmax(1)
    print(f"the average's accuracy on the last batch: {(predicted == labels).float().mean().item():.0%}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
