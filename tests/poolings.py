"""The max poolings in `cnnkern.convert`'s counts."""

from torch import nn


def with_poolings(counts: dict[str, int], model: nn.Module) -> dict[str, int]:
    """`counts`, and the model's max poolings if it has any."""
    poolings = sum(isinstance(m, nn.MaxPool2d) for m in model.modules())
    return counts | ({"MaxPool2d": poolings} if poolings else {})
