"""cnnkern's operators by PyTorch's own: the backend ``"eager"``, which also computes where there is no other.

Each function has the signature of its operator in csrc/ops.cpp, and its errors. Backward recomputes what cnnkern's
operators do not save. There is a file per operator, as in the other backends.
"""

from collections.abc import Callable

from cnnkern.eager.add_relu import add_relu, add_relu_backward
from cnnkern.eager.batch_norm import (
    bn_act,
    bn_act_backward,
    bn_add_act,
    bn_add_act_backward,
    bn_prelu,
    bn_prelu_backward,
)
from cnnkern.eager.grouped_conv2d import grouped_conv2d, grouped_conv2d_backward
from cnnkern.eager.layer_norm import layer_norm, layer_norm2d, layer_norm2d_backward, layer_norm_backward
from cnnkern.eager.max_pool2d import max_pool2d, max_pool2d_backward
from cnnkern.eager.sync_bn import sync_bn, sync_bn_backward, sync_bn_stats, sync_bn_sums

FORWARD: tuple[Callable, ...] = (
    *(bn_act, bn_add_act, bn_prelu, add_relu, grouped_conv2d, layer_norm, layer_norm2d, max_pool2d),
)
BACKWARD: tuple[Callable, ...] = (
    *(bn_act_backward, bn_add_act_backward, bn_prelu_backward, add_relu_backward),
    *(grouped_conv2d_backward, layer_norm_backward, layer_norm2d_backward, max_pool2d_backward),
)
# Parts of a layer whose derivative is that of the whole: cnnkern/ops/sync_bn_autograd.py.
PARTS: tuple[Callable, ...] = (sync_bn_stats, sync_bn, sync_bn_sums, sync_bn_backward)
LAUNCHERS: dict[str, Callable] = {function.__name__: function for function in (*FORWARD, *BACKWARD, *PARTS)}
