"""Converts torchvision's detection and segmentation models, and checks what a training step of each gives.

    python examples/detection_segmentation.py

The detector takes lists of images of any size and a dict per image, and its backbone has frozen batch norms; the
segmentation model returns an OrderedDict. Neither forward pass is touched.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import cnnkern


def detection_loss(model: nn.Module) -> Tensor:
    """The sum of the detector's losses on two images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 200, 260, generator=generator), torch.rand(3, 240, 220, generator=generator)]
    box = {"boxes": torch.tensor([[20.0, 30.0, 120.0, 150.0]]), "labels": torch.tensor([1])}
    torch.manual_seed(0)  # the detector samples anchors
    return sum(model(images, [box, box]).values())


def segmentation_loss(model: nn.Module) -> Tensor:
    """Cross entropy of each pixel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 96, 96, generator=generator)
    labels = torch.randint(4, (2, 96, 96), generator=generator)
    torch.manual_seed(0)
    return F.cross_entropy(model(x)["out"], labels)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """The relative difference between the losses of the converted model and of the original, by task."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    torch.manual_seed(0)
    nothing = {"weights": None, "weights_backbone": None}
    tasks = {
        "detection": (fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=3, **nothing), detection_loss),
        "segmentation": (lraspp_mobilenet_v3_large(num_classes=4, **nothing), segmentation_loss),
    }
    differences = {}
    for task, (model, loss_of) in tasks.items():
        original = copy.deepcopy(model)
        fused = cnnkern.convert(model, inplace=True)
        optimizer = torch.optim.SGD([p for p in fused.parameters() if p.requires_grad], lr=0.01)
        expected, loss = loss_of(original.train()), loss_of(fused.train())
        loss.backward()
        optimizer.step()
        differences[task] = abs(loss.item() - expected.item()) / abs(expected.item())
        print(f"{task}: loss {loss.item():.4f}, unconverted {expected.item():.4f}")
        print(str(cnnkern.conversion_report(fused)).splitlines()[0])
    return differences


if __name__ == "__main__":
    main()
