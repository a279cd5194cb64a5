"""Faults of csrc/cuda/conv. The kernels are built in float32, those of wide groups in 16 bits as well."""

from faults import Fault
from faults.emulated import EVERY, fault

WIDE = (EVERY, "-k", "grouped_conv2d-bfloat16")  # groups of more than 32 channels have kernels in 16 bits alone
IN_TF32 = ("tests/test_grouped_rows.py::test_every_kernel_in_tf32",)

FAULTS = [
    fault(
        "grouped_conv2d",
        "planes: the first channel's bias for all",
        "conv/depthwise_planes.cuh",
        "const S start = bias != nullptr ? static_cast<S>(bias[channel]) : S(0);",
        "const S start = bias != nullptr ? static_cast<S>(bias[0]) : S(0);",
    ),
    fault(
        "grouped_conv2d",
        "planes: a sum over a part of the lanes",
        "conv/depthwise_planes.cuh",
        "if (upper) first += kHalf;",
        "if (upper) first += 0;",
    ),
    fault(
        "grouped_conv2d",
        "rows: the filter not turned round for the gradient",
        "conv/depthwise_rows.cuh",
        "filters[(work.flipped ? K * K - 1 - tap : tap) * pitch + channel]",
        "filters[tap * pitch + channel]",
    ),
    fault(
        "grouped_conv2d",
        "rows: padding above taken for the image",
        "conv/depthwise_rows.cuh",
        "if (row + ky < 0 || row + ky >= H) continue;",
        "if (row + ky >= H) continue;",
        "",
        "address+undefined",
    ),
    fault(
        "grouped_conv2d",
        "groups: the filter not turned round for the gradient",
        "conv/grouped_planes.cuh",
        "    if (flipped) tap = kSquare - 1 - tap;\n",
        "",
    ),
    fault(
        "grouped_conv2d",
        "any: a gradient of the weight without dilation",
        "conv/conv_any.cuh",
        "const int h = oh * work.sh - work.ph + ky * work.dh, w = ow * work.sw - work.pw + kx * work.dw;",
        "const int h = oh * work.sh - work.ph + ky, w = ow * work.sw - work.pw + kx;",
    ),
    *(
        Fault("cuda", "grouped_conv2d", f"TF32: {name}", f"conv/{file}.cuh", right, wrong, IN_TF32, tool)
        for name, file, right, wrong, tool in (
            (
                "the halves of a filter's operand exchanged",
                "grouped_rows",
                "const unsigned b[2] = {filter[2 * step], filter[2 * step + 1]};",
                "const unsigned b[2] = {filter[2 * step + 1], filter[2 * step]};",
                "float32",
            ),
            (
                "a channel of the group beside for one of its own",
                "grouped_rows",
                "return there && j >= 0 && j < filters.width ?",
                "return there && j >= 0 ?",
                "float32",
            ),
            ("an operand that is not rounded", "grouped_rows", "      word = to_tf32(v);\n", "", "float32"),
            (
                "a row of the ring overwritten while it is multiplied",
                "grouped_rows",
                "    __syncthreads();\n    if (t + kDepth - 1 < part.end) copy_next();\n",
                "    if (t + kDepth - 1 < part.end) copy_next();\n    __syncthreads();\n",
                "thread",
            ),
            (
                "positions of x that are other ones of dy",
                "grouped_rows_sums",
                "(k / 2 * kDeep + k % 2) * kPitch<kOut>);",
                "(k / 2 * kDeep + 1 - k % 2) * kPitch<kOut>);",
                "float32",
            ),
            (
                "a bias's gradient as inexact as products",
                "grouped_rows_sums",
                "dy_sum += v;",
                "dy_sum += v * (1 + 0x1p-12f);",
                "float32",
            ),
        )
    ),
    *(
        Fault(
            "cuda",
            "grouped_conv2d",
            f"wide groups: {name}",
            f"conv/{file}.cuh",
            right,
            wrong,
            WIDE,
            "address+undefined",
        )
        for name, file, right, wrong in (
            ("outputs of a block beside", "row_stream", "out = {first + out_split * s.out, ", "out = {first, "),
            ("inputs of a block beside", "row_stream", "in = {first + in_split * s.in, ", "in = {first, "),
            (
                "gradients of inputs that another block has",
                "grouped_rows_sums",
                "first = Width::cut ? part.in_split * s.in * kVector<T> : 0;",
                "first = 0;",
            ),
        )
    ),
]
