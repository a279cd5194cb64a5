"""Faults of csrc/cuda. The kernels of one operator are built for the emulator, in float32 (tests/emulator)."""

from faults import Fault

EVERY = "tests/test_emulator.py::test_every_kernel"
BATTERY = ("tests/test_battery.py", EVERY)

WIDE = (EVERY, "-k", "grouped_conv2d-bfloat16")  # groups of more than 32 channels have kernels in 16 bits alone
IN_TF32 = ("tests/test_grouped_rows.py::test_every_kernel_in_tf32",)
HARD = ("tests/test_numerics.py", "-k", "emulator and bn_act and (extreme_scales or eager_loses or outlier)")


def fault(
    operator: str, name: str, file: str, right: str, wrong: str, more: str = "", tool: str = "float32", also: str = ""
) -> Fault:
    """`more`: of the battery's as_good_as_eager those that are asked beside test_every_kernel; `also`: others of it."""
    # test_every_kernel[bn_act-float32], and of the battery [bn_act-relu-float32].
    chosen = f"as_good_as and ({more})" if more else "as_good_as"
    chosen = f"(float32 and (every_kernel or ({chosen})))" + (f" or {also}" if also else "")
    return Fault("cuda", operator, name, file, right, wrong, (*BATTERY, "-k", f"{operator}- and ({chosen})"), tool)


FAULTS = [
    # ---- batch norm
    fault(
        "bn_act",
        "no activation",
        "batch_norm/bn_act.cuh",
        "out[k] = act.template value<T>(constants[K == 1 ? 0 : k].pre(in.x[k]));",
        "out[k] = constants[K == 1 ? 0 : k].pre(in.x[k]);",
    ),
    fault(
        "bn_act",
        "a factor left out of backward's slope",
        "batch_norm/batch_norm.cuh",
        "const double slope = -r * r * centered_sum / n;",
        "const double slope = -r * centered_sum / n;",
    ),
    fault(
        "bn_act",
        "a biased running variance",
        "batch_norm/batch_norm.cuh",
        "momentum * (var * (n / (n - 1)))",
        "momentum * (var * (n / n))",
    ),
    fault(
        "bn_act",
        "sums of g * x for those of g * (x - center)",
        "batch_norm/batch_norm.cuh",
        "sums[1] = fma(g, in.x[k] - b.center, sums[1]);",
        "sums[1] = fma(g, in.x[k], sums[1]);",
    ),
    fault(
        "bn_act",
        "a plane's last vector taken whole",
        "planes.cuh",
        "lanes.last = static_cast<int>(smaller(V, start + cut.HW - at[u]));",
        "lanes.last = V;",
    ),
    fault(
        "bn_act",
        "sums that have not been moved to double are dropped",
        "planes.cuh",
        "  mine.flush();\n#pragma unroll\n",
        "#pragma unroll\n",
    ),
    fault(
        "bn_act",
        "rows left over from whole batches left out",
        "rows.cuh",
        "  while (r < end) batch(std::integral_constant<int, 1>{});",
        "",
    ),
    fault(
        "bn_prelu",
        "no residual",
        "batch_norm/bn_prelu.cuh",
        "const S z = a.pre(in.x[k]) + in.residual[k];",
        "const S z = a.pre(in.x[k]);",
    ),
    fault(
        "bn_prelu",
        "positive numbers in the slope's gradient",
        "batch_norm/bn_prelu.cuh",
        "return z > S(0) ? S(0) : dy * z;",
        "return dy * z;",
    ),
    fault(
        "bn_prelu",
        "the third sum of rows left out",
        "rows.cuh",
        "turn < divup(kSums * kTileChannels, kThreads);",
        "turn < 1;",
    ),
    fault(
        "bn_prelu",
        "a residual off a vector that is read in vectors",
        "batch_norm/bn_prelu.cuh",
        "const T* reads() const { return residual; }",
        "const T* reads() const { return nullptr; }",
        tool="address+undefined",
    ),
    fault(
        "bn_add_act",
        "no residual",
        "batch_norm/bn_add_act.cuh",
        "const S pre = constants[K == 1 ? 0 : k].pre(in.x[k]) + in.residual[k];",
        "const S pre = constants[K == 1 ? 0 : k].pre(in.x[k]);",
    ),
    fault(
        "bn_add_act",
        "backward without the mask",
        "batch_norm/batch_norm.cuh",
        "for (int k = 0; k < V; ++k) dy[k] = bits >> k & 1 ? dy[k] : S(0);",
        "for (int k = 0; k < V; ++k) dy[k] = bits >> k & 1 ? dy[k] : dy[k];",
    ),
    fault(
        "bn_add_act",
        "bits of lanes that are another plane's",
        "bits.cuh",
        "bits &= (1u << last) - (1u << first);",
        "bits &= (1u << V) - (1u << first);",
    ),
    fault(
        "bn_add_act",
        "a mask that reads one byte where a vector's bits are in two",
        "bits.cuh",
        "if (shift + lanes.last - lanes.first > 8) bits |=",
        "if (shift + lanes.last - lanes.first > 16) bits |=",
        also="off_a_vector and relu",  # else no vector's bits are in two
    ),
    Fault(
        "cuda",
        "bn_act",
        "no second look at sums that are not sound",
        "batch_norm/batch_norm.cuh",
        "if (!sound[0]) publish_exact_moments(c);",
        "if (!sound[0]) publish(c, 0.0, 0.0);",
        HARD,
        "float32",
    ),
    Fault(
        "cuda",
        "bn_act",
        "what rounding the mean loses is forgotten",
        "channels.cuh",
        "return std::isfinite(mean) ? mean - static_cast<double>(static_cast<S>(mean)) : 0.0;",
        "return 0.0;",
        HARD,
        "float32",
    ),
    # ---- sync_bn
    fault(
        "sync_bn",
        "a slope of the elements of one process",
        "batch_norm/sync_bn.cuh",
        "const double n = *elements, slope = -this->rstd[c] * sums[channels + c] / n;",
        "const double n = *elements, slope = -this->rstd[c] * sums[channels + c] / (n + 1);",
    ),
    # ---- add_relu
    fault(
        "add_relu",
        "lanes' bits that are not joined",
        "add_relu.cuh",
        "word |= __shfl_xor_sync(kAllLanes, word, distance);",
        "word = __shfl_xor_sync(kAllLanes, word, distance);",
    ),
    fault(
        "add_relu",
        "backward without the mask",
        "add_relu.cuh",
        "g[u][k] = bits[u] >> k & 1 ? g[u][k] : S(0);",
        "g[u][k] = bits[u] >> k & 1 ? g[u][k] : g[u][k];",
    ),
    fault(
        "add_relu",
        "a word of the mask beyond its end",
        "add_relu.cuh",
        "(!kRagged || at < numel)) mask[at / 32] = word;",
        "true) mask[at / 32] = word;",
        "",
        "address+undefined",
    ),
    # ---- layer_norm
    fault(
        "layer_norm",
        "the gradients of weight and bias exchanged",
        "layer_norm/layer_norm_terms.cuh",
        "if (row == 0 && c < cols) gradients.set(c, sums[0], sums[1]);",
        "if (row == 0 && c < cols) gradients.set(c, sums[1], sums[0]);",
    ),
    fault(
        "layer_norm",
        "the mean of the gradient left in it",
        "layer_norm/layer_norm_rows.cuh",
        "out[k] = fma(-xhat[u][k], slope, dy[u][k] * weight[u][k] - level) * now.rstd;",
        "out[k] = fma(-xhat[u][k], slope, dy[u][k] * weight[u][k] - 0 * level) * now.rstd;",
    ),
    fault(
        "layer_norm",
        "squares of slices joined as if about one mean",
        "layer_norm/layer_norm_slices.cuh",
        "double squares[1] = {fma(n * d, d, mine.squares)};",
        "double squares[1] = {fma(0 * d, d, mine.squares)};",
    ),
    fault(
        "layer_norm",
        "the variance without eps",
        "layer_norm/layer_norm_terms.cuh",
        "const double var = fma(m.squares, per_element, eps);",
        "const double var = fma(m.squares, per_element, 0 * eps);",
    ),
    fault(
        "layer_norm",
        "the sum over a group of threads without its last step",
        "layer_norm/layer_norm_rows.cuh",
        "for (int distance = threads / 2; distance > 0; distance /= 2)",
        "for (int distance = threads / 2; distance > 1; distance /= 2)",
    ),
    fault(
        "layer_norm",
        "no barrier before shared memory is used again",
        "reduce.cuh",
        "  __syncthreads();  // the caller may call again immediately, and write scratch\n",
        "",
        tool="thread",  # which sees the race; the emulated threads' order hides it from the results
    ),
    # ---- layer_norm2d
    fault(
        "layer_norm2d",
        "the mean of the gradient left in it",
        "layer_norm/layer_norm2d.cuh",
        "out[k] = fma(-xhat, slope[k], in_dy[k] * weight[0] - level[k]) * rstd[k];",
        "out[k] = fma(-xhat, slope[k], in_dy[k] * weight[0] - 0 * level[k]) * rstd[k];",
    ),
    fault(
        "layer_norm2d",
        "the last chunk of channels for all of them",
        "layer_norm/layer_norm2d.cuh",
        "*cell = first ? v[k] : *cell + v[k];",
        "*cell = v[k];",
    ),
    fault(
        "layer_norm2d",
        "one warp's part left out of a pixel's sums",
        "layer_norm/layer_norm2d.cuh",
        "for (int w = 0; w < warps; ++w)\n",
        "for (int w = 1; w < warps; ++w)\n",
    ),
    fault(
        "layer_norm2d",
        "small images: the next channel's weight left out",
        "layer_norm/layer_norm_images.cuh",
        "if (both) p.load(channel + 1, otherwise, value), out[1] = value[0];",
        "",
    ),
    fault(
        "layer_norm2d",
        "small images: one group's part left out of a pixel's sums",
        "layer_norm/layer_norm_images.cuh",
        "for (int g = 0; g < groups; ++g)",
        "for (int g = 1; g < groups; ++g)",
    ),
    fault(
        "layer_norm2d",
        "small images: vectors of the last rounds not read again",
        "layer_norm/layer_norm_images.cuh",
        "if (p.dx == nullptr || cut.rounds > U) read(round);",
        "if (p.dx == nullptr) read(round);",
    ),
    fault(
        "layer_norm2d",
        "small images: a channel's last vector left out of its gradient",
        "layer_norm/layer_norm_images.cuh",
        "for (int v = begin; v < end; ++v) {",
        "for (int v = begin; v < end - 1; ++v) {",
    ),
    fault(
        "layer_norm2d",
        "small images: no barrier before a channel's sums are read",
        "layer_norm/layer_norm_images.cuh",
        "    if (partial == nullptr) continue;\n    __syncthreads();\n",
        "    if (partial == nullptr) continue;\n",
        tool="thread",
    ),
    # ---- grouped_conv2d
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
    # ---- max_pool2d
    fault(
        "max_pool2d",
        "the last of equal values",
        "max_pool2d.cuh",
        "const bool larger = v > value[k] || v != v;",
        "const bool larger = v >= value[k] || v != v;",
    ),
    fault(
        "max_pool2d",
        "a row that the next window does not get",
        "max_pool2d.cuh",
        "for (int r = 0; r < kKept; ++r) rows[r] = rows[r + S];",
        "for (int r = 0; r < kKept; ++r) rows[r] = rows[r];",
    ),
    fault(
        "max_pool2d",
        "any: a window too few for a pixel",
        "max_pool2d.cuh",
        "return static_cast<int>(smaller(stride.quotient(u) + 1, windows));",
        "return static_cast<int>(smaller(stride.quotient(u), windows));",
    ),
    fault(
        "max_pool2d",
        "a column beyond the image",
        "max_pool2d.cuh",
        "if (w + j >= 0 && w + j < W) store_vector",
        "if (w + j >= 0 && w + j <= W) store_vector",
        "",
        "address+undefined",
    ),
]
