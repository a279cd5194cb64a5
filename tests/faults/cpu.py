"""Faults of csrc/cpu. The kernels of one operator are built, in float32 and float64 (tests/cpu_kernels)."""

from faults import Fault

BATTERY = "tests/test_battery.py"
GOOD = "as_good_as and (float32 or float64)"


def battery(operator: str, more: str = GOOD) -> tuple[str, ...]:
    return (BATTERY, "-k", f"{operator}- and ({more})")


def fault(
    operator: str, name: str, file: str, right: str, wrong: str, tests: tuple[str, ...] = (), tool="plain"
) -> Fault:
    return Fault("cpu", operator, name, file, right, wrong, tests or battery(operator), tool)


NUMERICS = ("tests/test_numerics.py", "-k", "(extreme_scales or eager_loses or outlier) and cpu")
LONG = "tests/test_long_sums.py"
LAYER_NORM = ("tests/test_layer_norm.py", "-k", "extreme_scales and device")
THREADS = "many_threads or reruns"

FAULTS = [
    # ---- batch norm: batch_norm.h, passes.h, planes.h, rows.h
    fault(
        "bn_act",
        "a factor left out of backward's slope",
        "batch_norm/batch_norm.h",
        "const double s = -rstd[c + j] * normalized_sum[j] / count;",
        "const double s = -normalized_sum[j] / count;",
    ),
    fault(
        "bn_act",
        "a biased running variance",
        "batch_norm/batch_norm.h",
        "move(var, batch_var, count / (count - 1));",
        "move(var, batch_var, 1.0);",
    ),
    fault(
        "bn_act",
        "momentum of the old value",
        "batch_norm/batch_norm.h",
        "value[j] = momentum * (batch[j] * correction) + (1 - momentum) * value[j];",
        "value[j] = (1 - momentum) * (batch[j] * correction) + momentum * value[j];",
    ),
    fault(
        "bn_act",
        "no activation in backward",
        "batch_norm/batch_norm.h",
        "return act.template grad<T>(dy, at::vec::fmadd(centered, at(kCenteredScale), at(kCenteredOffset)));",
        "return dy;",
    ),
    fault(
        "bn_act",
        "a mean rounded without its remainder",
        "batch_norm/batch_norm.h",
        "return std::isfinite(mean) ? mean - center : 0.0;",
        "return 0.0;",
        NUMERICS,
    ),
    fault(
        "bn_act",
        "no second look at sums that are not sound",
        "batch_norm/batch_norm.h",
        "    if (!all_sound)\n",
        "    if (false)\n",
        NUMERICS,
    ),
    fault(
        "bn_act",
        "in eval a last, partial vector without its scale",
        "batch_norm/batch_norm.h",
        "kPartial ? vstore(dx + i, g * at(kScale), n)",
        "kPartial ? vstore(dx + i, g, n)",
    ),
    fault(
        "bn_act",
        "an element of a plane left out of the second pass",
        "planes.h",
        "policy.map_part(K::broadcast(policy, c), i, n);",
        "policy.map_part(K::broadcast(policy, c), i, n - 1);",
    ),
    fault(
        "bn_act",
        "a plane's last elements left out of the sums",
        "planes.h",
        "  if (i < end) policy.template term<true>(at, i, end - i, sums);",
        "",
    ),
    fault(
        "bn_act",
        "one channel's constants for a vector of two channels",
        "planes.h",
        "K::joined(at, K::broadcast(policy, c), left)",
        "at",
    ),
    fault(
        "bn_act",
        "sums kept in float for 65,536 additions",
        "passes.h",
        "constexpr int64_t kFlush = 16; ",
        "constexpr int64_t kFlush = 65536; ",
        (LONG, "-k", "bn_act and contiguous"),
    ),
    fault(
        "bn_act",
        "sums of rows kept in float",
        "rows.h",
        "if ((pending += rows) >= 4 * kFlush) flush(), pending = 0;",
        "pending += rows;",
        (LONG, "-k", "bn_act and channels_last"),
    ),
    fault(
        "bn_act",
        "a last row left out of the sums",
        "rows.h",
        "  if (i < end) columns(std::integral_constant<int, 1>{}, i, end - i);\n",
        "",
    ),
    fault(
        "bn_act",
        "pieces of rows that depend on the number of threads",
        "rows.h",
        "std::clamp<int64_t>(divup(numel, width) / 32, 4, 64));",
        "4 * at::get_num_threads());",
        battery("bn_act", "reruns"),
    ),
    fault(
        "bn_act",
        "constants of another thread's channel are read",
        "planes.h",
        "const int64_t behind = left < L ? next : c;",
        "const int64_t behind = next;",
        battery("bn_act", f"({THREADS}) and train and relu"),
        "thread",
    ),
    # ---- bn_prelu
    fault(
        "bn_prelu",
        "the slope of the channel before",
        "batch_norm/bn_prelu.cpp",
        "slopes.read(c, n, this->table.row(Base::kOfAct) + c);",
        "slopes.read(c > 0 ? c - 1 : c, n, this->table.row(Base::kOfAct) + c);",
    ),
    fault(
        "bn_prelu",
        "positive numbers in the slope's gradient",
        "batch_norm/bn_prelu.cpp",
        "return sum + Lanewise<V>::where_lt(V(0), v, V(0), dy * v);",
        "return sum + dy * v;",
    ),
    fault(
        "bn_prelu",
        "the gradient of a single slope of one channel",
        "batch_norm/bn_prelu.cpp",
        "if (slope.numel() == 1) of_slopes[0] = std::accumulate(of_slopes, of_slopes + layout.C, 0.0);",
        "",
    ),
    fault(
        "bn_prelu",
        "the third sum of rows left out of the pieces",
        "rows.h",
        "for (int k = 0; k < kSums; ++k) total[k][c] += row[k * width + j + c];",
        "for (int k = 0; k < 2; ++k) total[k][c] += row[k * width + j + c];",
    ),
    # ---- bn_add_act, and masks: bits.h
    fault(
        "bn_add_act",
        "a residual left out at the ends",
        "batch_norm/bn_add_act.cpp",
        "vload(this->x + i, n, V(0)), vload(residual + i, n, V(0))",
        "vload(this->x + i, n, V(0)), V(0)",
    ),
    fault(
        "bn_add_act",
        "the residual's gradient without the mask",
        "batch_norm/batch_norm.h",
        "if (dresidual != nullptr) vput(dresidual + i, g, stream);",
        "if (dresidual != nullptr) vput(dresidual + i, vload(dy + i), stream);",
    ),
    fault(
        "bn_add_act",
        "a mask byte overwritten by its other half",
        "bits.h",
        "__atomic_fetch_or(p, static_cast<uint8_t>(shifted), __ATOMIC_RELAXED);",
        "*p = static_cast<uint8_t>(shifted);",
    ),
    fault(
        "bn_add_act",
        "a mask byte written without the atomic or",
        "bits.h",
        "__atomic_fetch_or(p, static_cast<uint8_t>(shifted), __ATOMIC_RELAXED);",
        "*p |= static_cast<uint8_t>(shifted);",
        battery("bn_add_act", f"({THREADS}) and train and relu"),
        "thread",
    ),
    fault(
        "bn_add_act",
        "a mask read one element off",
        "bits.h",
        "return bits >> (i - 8 * byte);",
        "return bits >> (i + 1 - 8 * byte);",
    ),
    # ---- sync_bn
    fault(
        "sync_bn",
        "the sums of all processes exchanged",
        "batch_norm/sync_bn.cpp",
        "this->set_slopes(c, n, sums + c, sums + channels + c, count);",
        "this->set_slopes(c, n, sums + channels + c, sums + c, count);",
    ),
    # ---- add_relu
    fault(
        "add_relu",
        "a last vector's gradient without the mask",
        "add_relu.cpp",
        "zero_unless(vload(dy + i, end - i, Vec<T>(0)), mask.from(i))",
        "vload(dy + i, end - i, Vec<T>(0))",
    ),
    fault(
        "add_relu",
        "bytes of the mask that nobody has cleared",
        "add_relu.cpp",
        "const int64_t from = L % 8 != 0 ? 0 : x.numel() / L * L / 8;",
        "const int64_t from = mask.numel();",
    ),
    fault(
        "add_relu",
        "a mask read beyond its end",
        "bits.h",
        "const int64_t byte = std::min(i / 8, size - 4);",
        "const int64_t byte = i / 8;",
        battery("add_relu", "as_good_as and float32"),
        "address+undefined",
    ),
    fault(
        "add_relu",
        "a last vector read whole",
        "vec.h",
        "  T narrow[kLanes<T>] = {};\n  std::memcpy(static_cast<void*>(narrow), p, n * sizeof(T));",
        "  T narrow[kLanes<T>] = {};\n  std::memcpy(static_cast<void*>(narrow), p, sizeof(narrow));",
        battery("add_relu", "as_good_as and float32"),
        "address+undefined",
    ),
    # ---- layer_norm
    fault(
        "layer_norm",
        "column sums never moved to double",
        "layer_norm/layer_norm.cpp",
        "if ((pending_ += rows) + kGroup > kRun) flush();",
        "pending_ += rows;",
        (f"{LONG}::test_a_hundred_thousand_rows[rows]",),
    ),
    fault(
        "layer_norm",
        "a row's last columns left out of its sums",
        "layer_norm/layer_norm.cpp",
        "term(r, j, end - j, std::true_type{}, sums[0][r]);",
        "(void)r;",
    ),
    fault(
        "layer_norm",
        "no second look at a row whose sums are not sound",
        "layer_norm/layer_norm.cpp",
        "if (!m.sound(r, static_cast<double>(cols)))",
        "if (false)",
        LAYER_NORM,
    ),
    fault(
        "layer_norm",
        "the mean of the gradient left in it",
        "layer_norm/layer_norm.cpp",
        "at::vec::fnmadd(xhat, slope[r], gr * w - level[r]) * scale[r];",
        "at::vec::fnmadd(xhat, slope[r], gr * w) * scale[r];",
    ),
    fault(
        "layer_norm",
        "a piece's sums left out of the parameters' gradients",
        "layer_norm/layer_norm.cpp",
        "for (int64_t p = 1; p < pieces; ++p)",
        "for (int64_t p = 2; p < pieces; ++p)",
        battery("layer_norm", "many_threads"),
    ),
    # ---- layer_norm2d
    fault(
        "layer_norm2d",
        "a sum over pixels that begins anew at each vector",
        "layer_norm/layer_norm2d.cpp",
        "dw = at::vec::fmadd(gr, xhat, dw), db = db + gr;",
        "dw = at::vec::fmadd(gr, xhat, dw), db = gr;",
    ),
    fault(
        "layer_norm2d",
        "a piece's sums left out of the parameters' gradients",
        "layer_norm/layer_norm2d.cpp",
        "for (int64_t p = 0; p < pieces; ++p) total +=",
        "for (int64_t p = 0; p < 1; ++p) total +=",
        battery("layer_norm2d", "many_threads"),
    ),
    fault(
        "layer_norm2d",
        "no second look at a pixel whose sums are not sound",
        "layer_norm/layer_norm2d.cpp",
        "if (!m.sound(i, static_cast<double>(C)))",
        "if (false)",
        LAYER_NORM,
    ),
    fault(
        "layer_norm2d",
        "a gradient without its last factor",
        "layer_norm/layer_norm2d.cpp",
        "at::vec::fnmadd(xhat, slope[k], gr * w - level[k]) * scale[k], stream);",
        "at::vec::fnmadd(xhat, slope[k], gr * w - level[k]), stream);",
    ),
    # ---- grouped_conv2d
    fault(
        "grouped_conv2d",
        "the first block's bias for every block",
        "conv/conv_tiled.h",
        "static_cast<float>(bias[b * blocks.channels + c]) : 0.0f;",
        "static_cast<float>(bias[c]) : 0.0f;",
        battery("grouped_conv2d", "as_good_as and float32"),
    ),
    fault(
        "grouped_conv2d",
        "a row of dy left out of the bias's gradient",
        "conv/conv_tiled.h",
        "for (int64_t row = 0; row < rows; ++row)",
        "for (int64_t row = 1; row < rows; ++row)",
        battery("grouped_conv2d", "as_good_as and float32"),
    ),
    fault(
        "grouped_conv2d",
        "one chunk's sums for those of all",
        "conv/conv_tiled.h",
        "for (int64_t chunk = 0; chunk < chunks; ++chunk) sum +=",
        "for (int64_t chunk = 0; chunk < 1; ++chunk) sum +=",
        battery("grouped_conv2d", "as_good_as and float32"),
    ),
    fault(
        "grouped_conv2d",
        "a row of dy that two tiles need and one has",
        "conv/conv_tiled.h",
        "lo = std::min(lo, (begin + g.ph) / s - divup(g.kh, s) + 1);",
        "lo = std::min(lo, (begin + g.ph) / s - divup(g.kh, s) + 2);",
        battery("grouped_conv2d", "as_good_as and float32"),
    ),
    fault(
        "grouped_conv2d",
        "in place, the gradient of the weight without its last part",
        "conv/conv_in_place.h",
        "for (int64_t part = 0; part < parts; ++part) {",
        "for (int64_t part = 0; part + 1 < parts; ++part) {",
        battery("grouped_conv2d", "as_good_as and float32"),
    ),
    fault(
        "grouped_conv2d",
        "in place, taps one pixel of dy off",
        "conv/conv_in_place.h",
        ".first = (w + g.pw) / s - columns.count + 1,",
        ".first = (w + g.pw) / s - columns.count + 2,",
        battery("grouped_conv2d", "as_good_as and float32"),
    ),
    # ---- max_pool2d
    fault(
        "max_pool2d",
        "padding whose position is the window's first",
        "max_pool2d.cpp",
        "Largest<T> found = nothing_yet<T>(down.begin * g.kw + across.begin);",
        "Largest<T> found = nothing_yet<T>(0);",
        ("tests/test_max_pool2d.py", "-k", "minus_infinity and cpu"),
    ),
    fault(
        "max_pool2d",
        "planes: a last vector that reads beyond the row",
        "max_pool2d.cpp",
        "reach = g.sw == 2 ? divup(g.kw, 2) * 2 : g.kw;",
        "reach = g.kw;",
        battery("max_pool2d", "as_good_as and float32"),
        "address+undefined",
    ),
    fault(
        "max_pool2d",
        "a window too many for a pixel",
        "max_pool2d.cpp",
        "return {u < kernel ? 0 : (u - kernel) / stride + 1,",
        "return {u < kernel ? 0 : (u - kernel) / stride,",
    ),
]
