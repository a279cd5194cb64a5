// layer_norm2d: layer norm of (N, C, H, W) over C, with the formulas of layer_norm.cpp. channels_last is its rows; this
// file has the planes. Lanes are pixels. Only the sums of dweight and dbias cross lanes, once for
// many pixels.
// A thread owns strips of up to kVectors vectors of pixels by all of C, which stay in its own cache while they are read
// three times forward (sums of x, of x - mean, result), twice backward. The next strip is prefetched, since the hardware
// does not predict the jumps from plane to plane.
// Memory traffic, in tensors read or written: 2 forward, 3 backward. Accumulators: the arithmetic type for at most kRun
// additions per lane, then double; dweight and dbias over the pixels of a strip, then double, over pieces that depend on
// the shape alone, added in their order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>

#include "cpu/layer_norm/layer_norm.h"
#include "cpu/layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int kVectors = 4;           // neighbouring vectors of pixels
constexpr int64_t kLeastStrips = 4;   // of a piece

// Vector k of `kCount`, of which the last has n lanes, all or some, if kPartial.
template <int kCount, bool kPartial, typename T>
inline Vec<T> load(const T* p, int k, int64_t n, Vec<T> rest) {
  constexpr int64_t L = kLanes<T>;
  return kPartial && k == kCount - 1 && n < L ? vload(p + k * L, n, rest) : vload(p + k * L);
}
template <int kCount, bool kPartial, typename T>
inline void store(T* p, int k, int64_t n, Vec<T> v, bool stream) {
  constexpr int64_t L = kLanes<T>;
  if (kPartial && k == kCount - 1 && n < L)
    vstore(p + k * L, v, n);
  else if (stream)
    vstream(p + k * L, v);
  else
    vstore(p + k * L, v);
}

// How planes are cut into strips: at most kVectors vectors each, as evenly as possible.
template <typename T>
struct Strips {
  int64_t N, C, HW;
  int64_t vectors = divup(HW, kLanes<T>), per_image = divup(vectors, kVectors);
  int64_t count() const { return N * per_image; }
  int64_t first_vector(int64_t i) const { return i * (vectors / per_image) + std::min(i, vectors % per_image); }
  int64_t first_pixel(int64_t strip) const { return first_vector(strip % per_image) * kLanes<T>; }
  int64_t offset(int64_t strip) const { return strip / per_image * C * HW + first_pixel(strip); }
  // f(vectors and whether the last may be partial, as types; lanes of the last)
  template <typename F>
  void dispatch(int64_t strip, const F& f) const {
    using std::integral_constant;
    const int64_t i = strip % per_image, width = first_vector(i + 1) - first_vector(i);
    const int64_t n = std::min(HW - (first_vector(i + 1) - 1) * kLanes<T>, kLanes<T>);
    static_assert(kVectors == 4, "the widths below");
    if (width == 4 && n == kLanes<T>)
      f(integral_constant<int, 4>{}, std::false_type{}, n);
    else if (width == 4)
      f(integral_constant<int, 4>{}, std::true_type{}, n);
    else if (width == 3)
      f(integral_constant<int, 3>{}, std::true_type{}, n);
    else if (width == 2)
      f(integral_constant<int, 2>{}, std::true_type{}, n);
    else
      f(integral_constant<int, 1>{}, std::true_type{}, n);
  }
};

// totals[k][lane] = sum over channels of what term(c, acc) adds to acc[k].
template <typename T, int kSums, int kCount, typename Term>
inline void sum_channels(int64_t C, double* const (&totals)[kSums], const Term& term) {
  using V = Vec<T>;
  for (int s = 0; s < kSums; ++s) std::fill_n(totals[s], kCount * kLanes<T>, 0.0);
  for (int64_t begin = 0; begin < C; begin += kRun) {
    V acc[kSums][kCount];
    for (auto& sums : acc)
      for (V& a : sums) a = V(0);
    for (int64_t c = begin; c < std::min(C, begin + kRun); ++c) term(c, acc);
    for (int s = 0; s < kSums; ++s)
      for (int k = 0; k < kCount; ++k) add_lanes(totals[s] + k * kLanes<T>, acc[s][k]);
  }
}

template <typename T>
constexpr int kStripLanes = std::max<int>(8, kVectors * kLanes<T>);

template <typename T>
struct Forward {
  using S = compute_t<T>;
  using V = Vec<T>;
  const T* x;
  T* y;
  S *mean, *rstd;
  const S *weight, *bias;
  Strips<T> strips;
  double eps;
  bool stream;

  template <int kCount, bool kPartial>
  C10_NOINLINE void strip(int64_t index, int64_t n) const {
    constexpr int64_t L = V::size();
    const int64_t C = strips.C, HW = strips.HW, lanes = (kCount - 1) * L + n;
    const T* const in = x + strips.offset(index);
    T* const out = y + strips.offset(index);
    const T* const next = index + 1 < strips.count() ? x + strips.offset(index + 1) : in;
    Moments<S, kStripLanes<T>> m;
    std::fill_n(m.sum, kStripLanes<T>, 0.0), std::fill_n(m.squares, kStripLanes<T>, 0.0);
    sum_channels<T, 1, kCount>(C, {m.sum}, [&](int64_t c, auto& acc) {
      for (int k = 0; k < kCount; ++k) acc[0][k] = acc[0][k] + load<kCount, kPartial>(in + c * HW, k, n, V(0));
    });
    m.set_center(static_cast<double>(C));
    V center[kCount], scale[kCount], offset[kCount];
    for (int k = 0; k < kCount; ++k) center[k] = V::loadu(m.center + k * L);
    sum_channels<T, 2, kCount>(C, {m.sum, m.squares}, [&](int64_t c, auto& acc) {
      for (int k = 0; k < kCount; ++k) {
        __builtin_prefetch(next + c * HW + k * L, 0, 2);
        const V d = load<kCount, kPartial>(in + c * HW, k, n, center[k]) - center[k];
        acc[0][k] = acc[0][k] + d;
        acc[1][k] = at::vec::fmadd(d, d, acc[1][k]);
      }
    });
    if (!m.finish(static_cast<double>(C), eps))
      for (int64_t i = 0; i < lanes; ++i)
        if (!m.sound(i, static_cast<double>(C))) m.set_exact(i, exact_moments(in + i, C, HW), eps);
    const int64_t pixel = index / strips.per_image * HW + strips.first_pixel(index);
    std::copy_n(m.mean, lanes, mean + pixel), std::copy_n(m.rstd, lanes, rstd + pixel);
    for (int k = 0; k < kCount; ++k) {
      center[k] = V::loadu(m.center + k * L), scale[k] = V::loadu(m.rstd + k * L), offset[k] = V::loadu(m.offset + k * L);
    }
    for (int64_t c = 0; c < C; ++c) {
      const V w(weight[c]), b(bias[c]);
      for (int k = 0; k < kCount; ++k) {
        const V d = load<kCount, kPartial>(in + c * HW, k, n, V(0)) - center[k];
        store<kCount, kPartial>(out + c * HW, k, n, at::vec::fmadd(at::vec::fmadd(d, scale[k], offset[k]), w, b), stream);
      }
    }
  }

  void run() const {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        strips.dispatch(i, [&](auto count, auto partial, int64_t n) { strip<decltype(count)::value, decltype(partial)::value>(i, n); });
      stream_fence();
    };
    if (strips.N * strips.C * strips.HW < kSerial)
      some(0, strips.count());
    else
      at::parallel_for(0, strips.count(), 1, some);
  }
};

template <typename T>
struct Backward {
  using S = compute_t<T>;
  using V = Vec<T>;
  const T *dy, *x;
  T* dx;  // nullptr if not needed
  const S *mean, *rstd, *weight;
  Strips<T> strips;
  bool stream;

  template <int kCount, bool kPartial>
  C10_NOINLINE void strip(int64_t index, int64_t n, double* totals) const {
    constexpr int64_t L = V::size();
    const int64_t C = strips.C, HW = strips.HW, offset = strips.offset(index);
    const T *const in = x + offset, *const g = dy + offset;
    T* const out = dx == nullptr ? nullptr : dx + offset;
    const int64_t ahead = index + 1 < strips.count() ? strips.offset(index + 1) - offset : 0;
    const int64_t pixel = index / strips.per_image * HW + strips.first_pixel(index);
    V center[kCount], scale[kCount], level[kCount], slope[kCount];
    for (int k = 0; k < kCount; ++k) {
      center[k] = load<kCount, kPartial>(mean + pixel, k, n, V(0));
      scale[k] = load<kCount, kPartial>(rstd + pixel, k, n, V(0));
      level[k] = slope[k] = V(0);
    }
    if (out != nullptr) {
      alignas(64) double sum[kStripLanes<T>], product[kStripLanes<T>];
      sum_channels<T, 2, kCount>(C, {sum, product}, [&](int64_t c, auto& acc) {
        const V w(weight[c]);
        for (int k = 0; k < kCount; ++k) {
          const V gw = load<kCount, kPartial>(g + c * HW, k, n, V(0)) * w;
          const V d = load<kCount, kPartial>(in + c * HW, k, n, center[k]) - center[k];
          acc[0][k] = acc[0][k] + gw;
          acc[1][k] = at::vec::fmadd(gw, d, acc[1][k]);
        }
      });
      alignas(64) S terms[2][kStripLanes<T>];
      for (int64_t i = 0; i < kCount * L; ++i)
        terms[0][i] = static_cast<S>(sum[i] / C), terms[1][i] = static_cast<S>(product[i] / C);
      for (int k = 0; k < kCount; ++k) level[k] = V::loadu(terms[0] + k * L), slope[k] = V::loadu(terms[1] + k * L) * scale[k];
    }
    for (int64_t first = 0; first < C; first += 2) {  // two channels, whose four sums are independent
      V found[4] = {V(0), V(0), V(0), V(0)};
      for (int64_t c = first; c < std::min(C, first + 2); ++c) {
        const V w(weight[c]);
        V dw(0), db(0);
        for (int k = 0; k < kCount; ++k) {
          const int64_t at = c * HW + k * L + ahead;
          __builtin_prefetch(in + at, 0, 2), __builtin_prefetch(g + at, 0, 2);
          const V gr = load<kCount, kPartial>(g + c * HW, k, n, V(0));
          const V xhat = (load<kCount, kPartial>(in + c * HW, k, n, center[k]) - center[k]) * scale[k];
          dw = at::vec::fmadd(gr, xhat, dw), db = db + gr;
          if (out != nullptr)
            store<kCount, kPartial>(out + c * HW, k, n,
                                    at::vec::fnmadd(xhat, slope[k], gr * w - level[k]) * scale[k], stream);
        }
        found[2 * (c - first)] = dw, found[2 * (c - first) + 1] = db;
      }
      if (totals == nullptr) continue;
      double sums[4];
      sum_lanes(found, sums);
      for (int64_t i = 0; i < 2 * std::min<int64_t>(C - first, 2); ++i) totals[2 * first + i] += sums[i];
    }
  }

  void run(const Tensor& dweight, const Tensor& dbias) const {
    const int64_t C = strips.C, numel = strips.N * C * strips.HW, count = strips.count();
    const int64_t pieces = pieces_of(count, kLeastStrips, numel);
    const bool sums = dweight.defined() || dbias.defined();
    const auto totals = std::make_unique<double[]>(sums ? pieces * 2 * C : 0);  // (pieces, C, 2)
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t i = p * count / pieces; i < (p + 1) * count / pieces; ++i)
          strips.dispatch(i, [&](auto vectors, auto partial, int64_t n) {
            strip<decltype(vectors)::value, decltype(partial)::value>(i, n, sums ? totals.get() + p * 2 * C : nullptr);
          });
      stream_fence();
    };
    if (pieces == 1)
      some(0, 1);
    else
      at::parallel_for(0, pieces, 1, some);
    for (int k = 0; k < 2; ++k)
      store_gradient<T>(k == 0 ? dweight : dbias, 0, C, [&](int64_t c) {
        double total = 0;
        for (int64_t p = 0; p < pieces; ++p) total += totals[(p * C + c) * 2 + k];
        return total;
      });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_cpu(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps, bool wide) {
  check_layer_norm2d("cnnkern::layer_norm2d", x, weight, bias, wide);
  const Tensor x_ = in_layout(widened(x, wide)), &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  Tensor y = aten::empty_like(x_);
  auto [mean, rstd] = empty_statistics(x_, 1, 2);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  const Layout layout = layout_of(x_);
  if (layout.rows) {
    layer_norm_rows(x_, layout.C, w, b, eps, y, mean, rstd);
    return {y, mean, rstd};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x_.scalar_type(), "layer_norm2d", [&] {
    using S = compute_t<scalar_t>;
    const ParameterValues<scalar_t> scales(w, layout.C, 1), offsets(b, layout.C, 0);
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    Forward<scalar_t>{.x = x_.const_data_ptr<scalar_t>(),
                      .y = out,
                      .mean = mean.mutable_data_ptr<S>(),
                      .rstd = rstd.mutable_data_ptr<S>(),
                      .weight = scales.data(),
                      .bias = offsets.data(),
                      .strips = {layout.N, layout.C, layout.HW},
                      .eps = eps,
                      .stream = streams(out, x.numel(), layout.HW)}
        .run();
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_backward_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                             const OptionalTensor& bias, const Tensor& mean,
                                                             const Tensor& rstd, std::array<bool, 3> output_mask) {
  const char* op = "cnnkern::layer_norm2d_backward";
  check_layer_norm2d(op, x, weight, bias, is_wide(dy, x));
  check_layer_norm_saved(op, dy, x, statistics_shape(x, 1, 2), weight, bias, mean, rstd, output_mask);
  if (is_wide(dy, x)) return narrowed(layer_norm2d_backward_cpu(dy, widened(x, true), weight, bias, mean, rstd, output_mask), x);
  const Tensor x_ = in_layout(x), dy_ = in_layout_of(dy, x_), &w = tensor_or_undefined(weight);
  LayerNormGradients grads(x_, x.sizes().slice(1, 1), weight, bias, output_mask);
  if (x.numel() == 0) return grads.zeros(x);
  const Layout layout = layout_of(x_);
  if (layout.rows) {
    layer_norm_rows_backward(dy_, x_, layout.C, w, mean, rstd, grads.dx, grads.dweight, grads.dbias);
    return grads.tuple(x);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "layer_norm2d_backward", [&] {
    using S = compute_t<scalar_t>;
    const ParameterValues<scalar_t> scales(w, layout.C, 1);
    scalar_t* const out = grads.dx.defined() ? grads.dx.mutable_data_ptr<scalar_t>() : nullptr;
    Backward<scalar_t>{.dy = dy_.const_data_ptr<scalar_t>(),
                       .x = x_.const_data_ptr<scalar_t>(),
                       .dx = out,
                       .mean = mean.const_data_ptr<S>(),
                       .rstd = rstd.const_data_ptr<S>(),
                       .weight = scales.data(),
                       .strips = {layout.N, layout.C, layout.HW},
                       .stream = streams(out, x.numel(), layout.HW)}
        .run(grads.dweight, grads.dbias);
  });
  return grads.tuple(x);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
