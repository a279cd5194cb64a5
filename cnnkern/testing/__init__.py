"""One row per operator, `CASES`, from which tests and benchmarks are generated, and the check of results.

A result may be at most twice as far from float64 as eager PyTorch's in the same dtype (:func:`assert_as_good_as`).
"""

from cnnkern.testing.add_relu import ADD_RELU
from cnnkern.testing.batch_norm import BN_ACT, BN_ADD_ACT
from cnnkern.testing.bn_prelu import BN_PRELU
from cnnkern.testing.case import Case, Layer, Shape, randn, run, saved_bytes, with_layout
from cnnkern.testing.grouped_conv2d import GROUPED_CONV2D
from cnnkern.testing.judge import assert_as_good_as, check, to_float64
from cnnkern.testing.layer_norm import LAYER_NORM, LAYER_NORM2D
from cnnkern.testing.max_pool2d import MAX_POOL2D
from cnnkern.testing.sync_bn import SYNC_BN

__all__ = [
    "CASES",
    "Case",
    "Layer",
    "Shape",
    "assert_as_good_as",
    "check",
    "randn",
    "run",
    "saved_bytes",
    "to_float64",
    "with_layout",
]

_ROWS = (BN_ACT, BN_ADD_ACT, BN_PRELU, SYNC_BN, ADD_RELU, GROUPED_CONV2D, LAYER_NORM, LAYER_NORM2D, MAX_POOL2D)
CASES: dict[str, Case] = {case.name: case for case in _ROWS}
