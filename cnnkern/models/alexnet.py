"""AlexNet. Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012."""

from torch import nn

from cnnkern.models.layers import init_for_relu
from cnnkern.models.registry import register


@register(1, 224, 224)
def alexnet(
    num_classes: int = 10, in_channels: int = 1, fused: bool = True, dropout: float = 0.5, width_mult: float = 1.0
) -> nn.Sequential:
    """AlexNet with the paper's widths, which torchvision's has not. Input 1x224x224, 46,764,746 parameters.

    Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012. Shapes:
    96x54x54, pooled 96x26x26; 256x26x26, pooled 256x12x12; 384x12x12, 384x12x12, 256x12x12, pooled 256x5x5; then 6400,
    4096, 4096.

    ``width_mult`` scales every width. No layer to fuse.
    """
    wide = [round(c * width_mult) for c in (96, 256, 384, 4096)]
    model = nn.Sequential(
        nn.Conv2d(in_channels, wide[0], 11, stride=4, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(wide[0], wide[1], 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(wide[1], wide[2], 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(wide[2], wide[2], 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(wide[2], wide[1], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Flatten(),
        nn.Linear(wide[1] * 5 * 5, wide[3]),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(wide[3], wide[3]),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(wide[3], num_classes),
    )
    return init_for_relu(model)
