"""The shapes that tests and benchmarks draw on."""

from collections.abc import Sequence

from cnnkern.testing.case import Shape

# The shapes at 224x224 of the batch norms of three networks, each shape once, and of those that a residual follows.


def _at(side: int, *channels: int) -> list[Shape]:
    return [(32, c, side, side) for c in channels]


def _batch(n: int, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
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

BATCH_NORM_BENCH_SHAPES = {
    "resnet50": RESNET50,
    "resnext50": RESNEXT50,
    "densenet121": DENSENET121,
    "resnet50 batch 1": _batch(1, RESNET50),
    "resnext50 batch 1": _batch(1, RESNEXT50),
    "densenet121 batch 1": _batch(1, DENSENET121),
}
ADD_BENCH_SHAPES = {"resnet50": RESNET50_ADDS, "resnet50 batch 1": _batch(1, RESNET50_ADDS)}

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
)
