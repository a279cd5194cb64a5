"""Faults of triton_kernels, by Triton's interpreter under guard (tests/guarded_triton.py): nothing is built."""

from faults import Fault

NORMS = "tests/test_triton_batch_norm.py"


def fault(operator: str, name: str, file: str, right: str, wrong: str, tests: tuple[str, ...] = ()) -> Fault:
    return Fault("triton", operator, name, file, right, wrong, tests or asking(operator))


def asking(operator: str, chosen: str = "as_good_as or every_dtype or ragged") -> tuple[str, ...]:
    return ("tests/test_triton.py", "-k", f"({chosen}) and {operator} and not {operator}2d")


HARD = (NORMS, "-k", "hard_data or eager_loses")
TILES = "many_tiles"

FAULTS = [
    fault(
        "bn_act",
        "no activation",
        "bn_act.py",
        "out = act_value(tl.fma(v - center, scale, offset), PARAM, ACT)",
        "out = tl.fma(v - center, scale, offset)",
    ),
    fault(
        "bn_act",
        "what the center loses is forgotten",
        "batch_norm.py",
        "offset = tl.fma(-lost_of(m, center), scale, load_wide(bias, c, mask, 0.0))",
        "offset = tl.fma(0.0 * center.to(tl.float64), scale, load_wide(bias, c, mask, 0.0))",
        HARD,
    ),
    fault(
        "bn_act",
        "tiles counted as one",
        "batch_norm.py",
        "        count += n\n",
        "",
        asking("bn_act", TILES),
    ),
    fault(
        "bn_act",
        "a biased running variance",
        "batch_norm.py",
        "momentum * (m2 / (count - 1.0))",
        "momentum * (m2 / count)",
    ),
    fault(
        "bn_act",
        "no second look at sums that are not sound",
        "batch_norm.py",
        "    if tl.max(unsound.to(tl.int32)) > 0:",
        "    if tl.max(unsound.to(tl.int32)) > 1:",
        HARD,
    ),
    fault(
        "bn_act",
        "a factor left out of backward's slope",
        "batch_norm_backward.py",
        "slope = -scale * r * r * centered_sum / n",
        "slope = -scale * r * centered_sum / n",
    ),
    fault(
        "bn_act",
        "a gradient where the output rounds to zero",
        "activations.py",
        "return tl.full([], 2.0**-25, tl.float32)",
        "return tl.full([], 0.0, tl.float32)",
        (NORMS, "-k", "gradient_mask and float16"),
    ),
    fault(
        "bn_act",
        "a column beyond the end",
        "batch_norm.py",
        "columns = tl.minimum(width - column, B)",
        "columns = B",
    ),
    fault(
        "bn_prelu",
        "no residual",
        "bn_prelu.py",
        "z += tl.load(residual + at, mask, other=0.0).to(S)",
        "z += 0.0",
    ),
    fault(
        "bn_prelu",
        "positive numbers in the slope's gradient",
        "batch_norm_backward.py",
        "tl.where(pre > 0.0, 0.0, g * pre)",
        "g * pre",
    ),
    fault(
        "bn_add_act",
        "no residual",
        "bn_add_act.py",
        "v = tl.fma(v - center, scale, offset) + tl.load(residual + at, mask, other=0.0).to(S)",
        "v = tl.fma(v - center, scale, offset)",
    ),
    fault(
        "bn_add_act",
        "the mask of what comes in",
        "bn_add_act.py",
        'return pack_positive(y) if act == "relu" and bits is None else mask',
        'return pack_positive(x) if act == "relu" and bits is None else mask',
    ),
    fault(
        "bn_add_act",
        "a bit read one element off",
        "bits.py",
        "return (byte >> (at & 7).to(tl.int32)) & 1 != 0",
        "return (byte >> ((at + 1) & 7).to(tl.int32)) & 1 != 0",
    ),
    fault(
        "bn_add_act",
        "the residual's gradient scaled as x's",
        "batch_norm_backward.py",
        "s3 += below\n        if dresidual is not None:\n            tl.store(dresidual + at, g.to(",
        "s3 += below\n        if dresidual is not None:\n            tl.store(dresidual + at, (g * scale).to(",
    ),
    fault(
        "sync_bn",
        "the sums of all processes exchanged",
        "sync_bn.py",
        "slope = -scale * r * tl.load(sums + C + c, mask, other=0.0) / n",
        "slope = -scale * r * tl.load(sums + c, mask, other=0.0) / n",
    ),
    fault(
        "add_relu",
        "backward without the mask",
        "add_relu.py",
        "tl.store(dx + at, tl.where(unpacked(bits), g, 0.0), inside)",
        "tl.store(dx + at, tl.where(unpacked(bits), g, g), inside)",
    ),
    fault(
        "add_relu",
        "a store beyond the end",
        "add_relu.py",
        'tl.store(y + at, act_value(v, 0.0, "relu").to(y.dtype.element_ty), inside)',
        'tl.store(y + at, act_value(v, 0.0, "relu").to(y.dtype.element_ty), at >= 0)',
    ),
    fault(
        "add_relu",
        "no ReLU",
        "add_relu.py",
        'act_value(v, 0.0, "relu")',
        'act_value(v, 0.0, "none")',
    ),
    fault(
        "layer_norm",
        "deviations of what is beyond a line",
        "lines.py",
        "        d = tl.where(inside, v - shift[:, None], 0.0)\n        s1 = tl.sum(d, axis=1)",
        "        d = v - shift[:, None]\n        s1 = tl.sum(d, axis=1)",
    ),
    fault(
        "layer_norm",
        "the mean of the gradient left in it",
        "lines.py",
        "out = (tl.fma(-xhat, (s2 / n)[:, None], g) - (s1 / n)[:, None]) * r[:, None]",
        "out = tl.fma(-xhat, (s2 / n)[:, None], g) * r[:, None]",
    ),
    fault(
        "layer_norm",
        "the last tile of a long line for all of it",
        "lines.py",
        "        s2 = tl.fma(g, xhat, s2)\n    tl.store(sums + line",
        "        s2 = g * xhat\n    tl.store(sums + line",
        ("tests/test_triton.py", "-k", "longer_than_a_tile and layer_norm-"),
    ),
    fault(
        "layer_norm2d",
        "a chunk's sums that begin anew at each tile",
        "lines.py",
        "        db += g\n",
        "        db = g\n",
        ("tests/test_triton.py", "-k", f"{TILES} and layer_norm2d"),
    ),
    fault(
        "layer_norm2d",
        "the bias added before the weight",
        "lines.py",
        "out = tl.fma(xhat, parameter(weight, c, C, 1.0, S), parameter(bias, c, C, 0.0, S))",
        "out = (xhat + parameter(bias, c, C, 0.0, S)) * parameter(weight, c, C, 1.0, S)",
        ("tests/test_triton.py", "-k", "as_good_as and layer_norm2d"),
    ),
    fault(
        "grouped_conv2d",
        "dilation left out",
        "grouped_conv2d.py",
        "p = o * STRIDE - pad + tap * DILATION",
        "p = o * STRIDE - pad + tap",
    ),
    fault(
        "grouped_conv2d",
        "in backward a pixel meets taps of other strides",
        "grouped_conv2d.py",
        "return p // STRIDE, (p >= 0) & (p % STRIDE == 0) & (p // STRIDE < size)",
        "return p // STRIDE, (p >= 0) & (p // STRIDE < size)",
    ),
    fault(
        "grouped_conv2d",
        "no bias",
        "grouped_conv2d.py",
        "total += tl.load(bias + c, there, other=0.0).to(S)[None, :]",
        "total += 0.0",
    ),
    fault(
        "grouped_conv2d",
        "channels of other groups",
        "grouped_conv2d.py",
        "same = (i[:, None] // WIDTH == i[None, :] // WIDTH) & there[:, None] & there[None, :]\n        if TRANSPOSED:",
        "same = there[:, None] & there[None, :]\n        if TRANSPOSED:",
    ),
    # ---- max_pool2d
    fault(
        "max_pool2d",
        "the last of equal values",
        "max_pool2d.py",
        "larger = (v > largest) | (v != v)",
        "larger = (v >= largest) | (v != v)",
    ),
    fault(
        "max_pool2d",
        "a window too few for a pixel",
        "max_pool2d.py",
        "DOWN: tl.constexpr = (KH - 1) // SH + 1",
        "DOWN: tl.constexpr = (KH - 1) // SH",
    ),
]
