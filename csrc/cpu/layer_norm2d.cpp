// layer_norm2d: layer norm of (N, C, H, W) over C, with the formulas of layer_norm.cpp. channels_last is its rows; this
// file has the planes. Lanes are pixels, so no sum crosses lanes but those of dweight and dbias, and those once for
// many pixels.
// A thread owns strips of kVectors vectors of pixels by all of C, which stay in its own cache while they are read three
// times forward (sums of x, of x - mean, result), twice backward; the next strip is fetched meanwhile, since nothing
// else foresees the jumps from plane to plane.
// Traffic in tensors read or written: 2 forward, 3 backward. Accumulators: the arithmetic type for at most kRun
// additions a lane, then double; dweight and dbias over pieces that depend on the shape alone, added in their order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>

#include "cpu/dispatch.h"
#include "cpu/layer_norm.h"
#include "cpu/layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int kVectors = 4;           // of pixels side by side
constexpr int64_t kLeastStrips = 4;   // of a piece

// Vector k of `kCount`, of which the last has n lanes if kPartial.
template <int kCount, bool kPartial, typename T>
inline Vec<T> load(const T* p, int k, int64_t n, Vec<T> rest) {
  return kPartial && k == kCount - 1 ? vload(p + k * kLanes<T>, n, rest) : vload(p + k * kLanes<T>);
}
template <int kCount, bool kPartial, typename T>
inline void store(T* p, int k, int64_t n, Vec<T> v, bool stream) {
  if (kPartial && k == kCount - 1)
    vstore(p + k * kLanes<T>, v, n);
  else if (stream)
    vstream(p + k * kLanes<T>, v);
  else
    vstore(p + k * kLanes<T>, v);
}

// How planes are cut into strips, and where each begins.
template <typename T>
struct Strips {
  int64_t N, C, HW;
  static constexpr int64_t kLength = kVectors * kLanes<T>;
  int64_t per_image() const { return HW / kLength + divup(HW % kLength, kLanes<T>); }
  int64_t count() const { return N * per_image(); }
  int64_t first_pixel(int64_t strip) const {
    const int64_t i = strip % per_image(), whole = HW / kLength;
    return i <= whole ? i * kLength : whole * kLength + (i - whole) * kLanes<T>;
  }
  int64_t offset(int64_t strip) const { return strip / per_image() * C * HW + first_pixel(strip); }
  // f(vectors and whether the last is partial, as types; lanes of the last)
  template <typename F>
  void dispatch(int64_t strip, const F& f) const {
    using std::integral_constant;
    const int64_t left = HW - first_pixel(strip), L = kLanes<T>;
    if (left >= kLength)
      f(integral_constant<int, kVectors>{}, std::false_type{}, L);
    else if (left >= L)
      f(integral_constant<int, 1>{}, std::false_type{}, L);
    else
      f(integral_constant<int, 1>{}, std::true_type{}, left);
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
constexpr int kStripLanes = std::max<int>(8, Strips<T>::kLength);

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
      for (int64_t i = 0; i < lanes; ++i) m.set_exact(i, exact_moments(in + i, C, HW), eps);
    const int64_t pixel = index / strips.per_image() * HW + strips.first_pixel(index);
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

// Sums over pixels for each channel: lane by lane in the arithmetic type, moved to double from time to time.
template <typename T>
class ChannelSums {
  using S = compute_t<T>;

 public:
  ChannelSums(int64_t C, double* totals) : C_(C), totals_(totals), acc_(std::make_unique<S[]>(2 * (C + 1) * kLanes<T>)) {}
  S* weight(int64_t c) { return acc_.get() + 2 * c * kLanes<T>; }
  S* bias(int64_t c) { return weight(c) + kLanes<T>; }
  void added(int64_t vectors) {
    if ((pending_ += vectors) + kVectors > kRun) flush();
  }
  void flush() {
    for (int64_t c = 0; c < C_; c += 2) {  // two channels' sums side by side
      Vec<T> lanes[4];
      for (int i = 0; i < 4; ++i) lanes[i] = Vec<T>::loadu(weight(c) + i * kLanes<T>);
      double sums[4];
      sum_lanes(lanes, sums);
      for (int i = 0; i < (c + 1 < C_ ? 4 : 2); ++i) {
        double& total = totals_[i % 2 * C_ + c + i / 2];
        total = (flushed_ ? total : 0.0) + sums[i];
      }
    }
    std::fill_n(acc_.get(), 2 * C_ * kLanes<T>, S(0));
    flushed_ = true, pending_ = 0;
  }

 private:
  int64_t C_;
  double* totals_;
  std::unique_ptr<S[]> acc_;
  int64_t pending_ = 0;
  bool flushed_ = false;
};

template <typename T>
struct Backward {
  using S = compute_t<T>;
  using V = Vec<T>;
  const T *dy, *x;
  T* dx;  // nullptr where not wanted
  const S *mean, *rstd, *weight;
  Strips<T> strips;
  bool sums;  // whether the parameters' gradients are wanted
  bool stream;

  template <int kCount, bool kPartial>
  C10_NOINLINE void strip(int64_t index, int64_t n, ChannelSums<T>& channels) const {
    constexpr int64_t L = V::size();
    const int64_t C = strips.C, HW = strips.HW, offset = strips.offset(index);
    const T *const in = x + offset, *const g = dy + offset;
    T* const out = dx == nullptr ? nullptr : dx + offset;
    const int64_t ahead = index + 1 < strips.count() ? strips.offset(index + 1) - offset : 0;
    const int64_t pixel = index / strips.per_image() * HW + strips.first_pixel(index);
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
    for (int64_t c = 0; c < C; ++c) {
      const V w(weight[c]);
      V dw(0), db(0);
      for (int k = 0; k < kCount; ++k) {
        __builtin_prefetch(in + c * HW + k * L + ahead, 0, 2), __builtin_prefetch(g + c * HW + k * L + ahead, 0, 2);
        const V gr = load<kCount, kPartial>(g + c * HW, k, n, V(0));
        const V xhat = (load<kCount, kPartial>(in + c * HW, k, n, center[k]) - center[k]) * scale[k];
        dw = at::vec::fmadd(gr, xhat, dw), db = db + gr;
        if (out != nullptr)
          store<kCount, kPartial>(
              out + c * HW, k, n,
              at::vec::fnmadd(xhat, slope[k], gr * w - level[k]) * scale[k], stream);
      }
      if (sums) {
        (V::loadu(channels.weight(c)) + dw).store(channels.weight(c));
        (V::loadu(channels.bias(c)) + db).store(channels.bias(c));
      }
    }
    if (sums) channels.added(kCount);
  }

  void run(const Tensor& dweight, const Tensor& dbias) const {
    const int64_t C = strips.C, numel = strips.N * C * strips.HW, count = strips.count();
    const int64_t pieces = pieces_of(count, kLeastStrips, numel);
    const auto totals = std::make_unique_for_overwrite<double[]>(sums ? pieces * 2 * C : 0);
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        ChannelSums<T> channels(sums ? C : 0, totals.get() + p * 2 * C);
        for (int64_t i = p * count / pieces; i < (p + 1) * count / pieces; ++i)
          strips.dispatch(i, [&](auto vectors, auto partial, int64_t n) {
            strip<decltype(vectors)::value, decltype(partial)::value>(i, n, channels);
          });
        channels.flush();
      }
      stream_fence();
    });
    for (int k = 0; k < 2; ++k)
      store_gradient<T>(k == 0 ? dweight : dbias, 0, C, [&](int64_t c) {
        double total = 0;
        for (int64_t p = 0; p < pieces; ++p) total += totals[(p * 2 + k) * C + c];
        return total;
      });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_cpu(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps) {
  check_layer_norm2d("cnnkern::layer_norm2d", x, weight, bias);
  const Tensor x_ = in_layout(x), &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  Tensor y = at::empty_like(x_);
  auto [mean, rstd] = empty_statistics(x_, 1, 2);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  const Layout layout = layout_of(x_);
  if (layout.rows) {
    layer_norm_rows(x_, layout.C, w, b, eps, y, mean, rstd);
    return {y, mean, rstd};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "layer_norm2d", [&] {
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
  check_layer_norm2d(op, x, weight, bias);
  check_layer_norm_saved(op, dy, x, statistics_shape(x, 1, 2), weight, bias, mean, rstd, output_mask);
  const Tensor x_ = in_layout(x), dy_ = in_layout_of(dy, x_), &w = tensor_or_undefined(weight);
  LayerNormGradients grads(x_, weight, bias, output_mask);
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
                       .sums = grads.dweight.defined() || grads.dbias.defined(),
                       .stream = streams(out, x.numel(), layout.HW)}
        .run(grads.dweight, grads.dbias);
  });
  return grads.tuple(x);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern

CNNKERN_REGISTER_CPU(layer_norm2d, layer_norm2d_cpu)
CNNKERN_REGISTER_CPU(layer_norm2d_backward, layer_norm2d_backward_cpu)
