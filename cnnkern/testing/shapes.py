"""The shapes that tests and benchmarks draw on."""

from collections.abc import Sequence

from cnnkern.testing.case import Layer, Shape

# The shapes at 224x224 of the batch norms of three networks, each shape once, and of those that a residual follows.


def _at(side: int, *channels: int) -> list[Shape]:
    return [(32, c, side, side) for c in channels]


def batch(n: int, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    return tuple((n, *shape[1:]) for shape in shapes)


RESNET50 = (
    *_at(112, 64),
    *_at(56, 64, 256, 128),
    *_at(28, 128, 512, 256),
    *_at(14, 256, 1024, 512),
    *_at(7, 512, 2048),
)
RESNEXT50 = tuple(_at(7, 1024))  # what ResNet-50 does not have
DENSENET121 = (  # what neither has: a step of 32 channels from layer to layer
    *_at(56, *(c for c in range(64, 257, 32) if c not in (64, 128, 256))),
    *_at(28, *(c for c in range(128, 513, 32) if c not in (128, 256, 512))),
    *_at(14, 128, *(c for c in range(256, 1025, 32) if c not in (256, 512, 1024))),
    *_at(7, 128, *(c for c in range(512, 1025, 32) if c not in (512, 1024))),
)
RESNET50_ADDS = (*_at(56, 256), *_at(28, 512), *_at(14, 1024), *_at(7, 2048))

# The layer norms of ConvNeXt-Tiny at 224x224, batch 16, and the one before its classifier.
CONVNEXT_TINY = ((16, 96, 56, 56), (16, 192, 28, 28), (16, 384, 14, 14), (16, 768, 7, 7), (16, 768, 1, 1))


def layers(shapes: Sequence[Shape]) -> tuple[Layer, ...]:
    return tuple(map(Layer, shapes))


BATCH_NORM_LAYERS = {
    "resnet50": layers(RESNET50),
    "resnext50": layers(RESNEXT50),
    "densenet121": layers(DENSENET121),
    "resnet50 batch 1": layers(batch(1, RESNET50)),
    "resnext50 batch 1": layers(batch(1, RESNEXT50)),
    "densenet121 batch 1": layers(batch(1, DENSENET121)),
}
ADD_LAYERS = {"resnet50": layers(RESNET50_ADDS), "resnet50 batch 1": layers(batch(1, RESNET50_ADDS))}


# The grouped convolutions of six networks at 224x224, each once: channels and side of the input, stride.


def _grouped(width: int, kernel: int, *layers: tuple[int, int, int]) -> tuple[Layer, ...]:
    arguments = {"width": width, "kernel": kernel, "padding": kernel // 2, "bias": False}
    return tuple(Layer((16, c, side, side), arguments | {"stride": stride}) for c, side, stride in layers)


def _of_batch(n: int, layers: dict[str, tuple[Layer, ...]]) -> dict[str, tuple[Layer, ...]]:
    return {
        f"{network} batch {n}": tuple(Layer((n, *layer.shape[1:]), layer.arguments) for layer in its)
        for network, its in layers.items()
    }


_GROUPED_LAYERS = {
    "mobilenet_v2": _grouped(
        *(1, 3, (32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2), (192, 28, 1), (192, 28, 2), (384, 14, 1)),
        *((576, 14, 1), (576, 14, 2), (960, 7, 1)),
    ),
    "efficientnet_b0": (
        *_grouped(1, 3, (32, 112, 1), (96, 112, 2), (144, 56, 1), (240, 28, 2), (480, 14, 1), (1152, 7, 1)),
        *_grouped(1, 5, (144, 56, 2), (240, 28, 1), (480, 14, 1), (672, 14, 1), (672, 14, 2), (1152, 7, 1)),
    ),
    "convnext_tiny": _grouped(1, 7, (96, 56, 1), (192, 28, 1), (384, 14, 1), (768, 7, 1)),
    "resnext50": (
        *_grouped(4, 3, (128, 56, 1)),
        *_grouped(8, 3, (256, 56, 2), (256, 28, 1)),
        *_grouped(16, 3, (512, 28, 2), (512, 14, 1)),
        *_grouped(32, 3, (1024, 14, 2), (1024, 7, 1)),
    ),
    "regnet_x_400mf": _grouped(
        *(16, 3, (32, 112, 2), (64, 56, 2), (64, 28, 1), (160, 28, 2), (160, 14, 1), (400, 14, 2), (400, 7, 1)),
    ),
    "regnet_y_400mf": _grouped(
        *(8, 3, (48, 112, 2), (104, 56, 2), (104, 28, 1), (208, 28, 2), (208, 14, 1), (440, 14, 2), (440, 7, 1)),
    ),
}
GROUPED_LAYERS = _GROUPED_LAYERS | _of_batch(1, _GROUPED_LAYERS)

# The poolings of three networks at 224x224, each once.


def _pooled(kernel: int, *layers: tuple[int, int, int]) -> tuple[Layer, ...]:
    """Of layers (channels, side, stride); 3x3 is padded."""
    return tuple(
        Layer((32, c, side, side), {"kernel": kernel, "stride": stride, "padding": kernel - 2})
        for c, side, stride in layers
    )


_POOL_LAYERS = {
    "resnet50": _pooled(3, (64, 112, 2)),
    "vgg16": _pooled(2, (64, 224, 2), (128, 112, 2), (256, 56, 2), (512, 28, 2), (512, 14, 2)),
    "googlenet": _pooled(3, (192, 28, 1), (512, 14, 1), (832, 7, 1)),
}
POOL_LAYERS = _POOL_LAYERS | _of_batch(1, _POOL_LAYERS)

RAGGED_SHAPES = (
    (3, 1),
    (5, 7),
    (64, 33),
    (3, 5, 2),
    (2, 3, 17),
    (2, 8, 4, 4),
    (1, 1, 1, 5),
    (7, 1, 5, 3),
    (3, 17, 7, 7),
    (2, 16, 15, 17),
    (33, 67, 3, 5),
    (2, 2, 97, 101),
    (1, 130, 11, 13),
    (2, 3, 4, 5, 3),
    (1, 4, 129, 130),
    (33, 17, 1, 1),  # both memory formats at once
)
