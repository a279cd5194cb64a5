// bn_prelu: y = z for z > 0, else slope * z; z = pre + residual, pre = (x - mean) * weight * rstd + bias, the residual optional.
// Backward, with g = dy for z > 0, else slope * dy: dslope = sum of dy * min(z, 0) over a channel, or over all of x for a single
// slope; dresidual = g, and dx, dweight, dbias as those of bn_act. z is recomputed from x and the residual, which alone are
// saved. dslope is a third sum of the first pass.
// Traffic in tensors read or written, while a channel (planes) or the tensor (rows) stays in cache: 2 forward, 3 backward; rows
// beyond the last-level cache 3 and 5; with a residual 3 and 5, and 4 and 8. Accumulators as those of bn_act.
#include <array>
#include <numeric>

#include "cpu/batch_norm/batch_norm.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

// One slope per channel, in the arithmetic type. A single slope is read with a stride of 0.
struct Slopes {
  ChannelVector slopes;
  Slopes(const Tensor& slope, int64_t channels) : slopes(slope.expand({channels})) {}
  template <typename S>
  void read(int64_t c, int64_t n, S* row) const {
    Lot values;
    slopes.read(c, n, values.data());
    for (int64_t j = 0; j < n; ++j) row[j] = static_cast<S>(values[j]);
  }
};

template <typename T>
struct BnPReluForward : BatchNormForward<T> {
  using Base = BatchNormForward<T>;
  using V = Vec<T>;
  const T* residual;  // or nullptr
  Slopes slopes;

  void prepare(int64_t c, int64_t n) {
    Base::prepare(c, n);
    slopes.read(c, n, this->table.row(Base::kOfAct) + c);
  }
  template <typename At>
  V value(const At& at, V z) const {
    return Lanewise<V>::where_le(z, V(0), z * at(Base::kOfAct), z);
  }
  template <typename At>
  void map(const At& at, int64_t i, bool stream) const {
    V z = this->normalized(at, vload(this->x + i));
    if (residual != nullptr) {
      if (stream) __builtin_prefetch(residual + i + kAhead / sizeof(T), 0, 2);
      z = z + vload(residual + i);
    }
    vput(this->y + i, value(at, z), stream);
  }
  template <typename At>
  void map_part(const At& at, int64_t i, int64_t n) const {
    V z = this->normalized(at, vload(this->x + i, n, V(0)));
    if (residual != nullptr) z = z + vload(residual + i, n, V(0));
    vstore(this->y + i, value(at, z), n);
  }
};

template <typename T>
struct ThroughPRelu {
  static constexpr int kRows = 1, kSums = 1;
  using V = Vec<T>;
  const T* residual;  // or nullptr
  Slopes slopes;
  double* sums;  // of dy * min(z, 0), one per channel

  void prefetch(int64_t i) const {
    if (residual != nullptr) __builtin_prefetch(residual + i, 0, 2);
  }
  template <typename S>
  void prepare(int64_t c, int64_t n, S* row) const {
    slopes.read(c, n, row);
  }
  template <bool kPartial, typename At>
  V z(const At& at, V centered, int64_t i, int64_t n) const {
    const V pre = at::vec::fmadd(centered, at(kCenteredScale), at(kCenteredOffset));
    if (residual == nullptr) return pre;
    return pre + (kPartial ? vload(residual + i, n, V(0)) : vload(residual + i));
  }
  template <bool kPartial, typename At>
  V through(const At& at, V dy, V centered, int64_t i, int64_t n) const {
    return Lanewise<V>::where_lt(V(0), z<kPartial>(at, centered, i, n), dy, dy * at(kOfGate));
  }
  template <bool kPartial, typename At>
  V add(const At& at, V dy, V centered, int64_t i, int64_t n, V sum) const {
    const V v = z<kPartial>(at, centered, i, n);
    return sum + Lanewise<V>::where_lt(V(0), v, V(0), dy * v);
  }
  void finish(int64_t c, int64_t n, const double* sum) const { std::copy_n(sum, n, sums + c); }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_prelu_cpu(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                                const OptionalTensor& bias, const Tensor& slope, const OptionalTensor& running_mean,
                                                const OptionalTensor& running_var, bool training, double momentum, double eps) {
  const char* op = "cnnkern::bn_prelu";
  check_batch_norm(op, x, weight, bias, running_mean, running_var, training, eps);
  check_slope(op, slope, x);
  const bool adds = tensor_or_undefined(residual).defined();
  if (adds) check_same_shape(op, "residual", *residual, x);
  const Tensor x_ = in_batch_norm_layout(x), residual_ = adds ? in_layout_of(*residual, x_) : Tensor();
  const Layout layout = layout_of(x_);
  Tensor y = aten::empty_like(x_);
  Tensor mean = aten::empty({layout.C}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean);
  const auto result = [&] { return adds ? in_strides_of_sum(y, x_, *residual, "prelu") : y; };
  if (x.numel() == 0) return {result(), mean.zero_(), rstd.fill_(1)};
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    run(BnPReluForward<T>{batch_norm_forward<T>(x_, layout, weight, bias, running_mean, running_var, training, momentum, eps, y,
                                                mean, rstd),
                          adds ? residual_.const_data_ptr<T>() : nullptr,
                          {slope, layout.C}},
        layout);
  });
  return {result(), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_prelu_backward_cpu(
    const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& slope, const Tensor& mean, const Tensor& rstd, bool channels_last, bool training,
    std::array<bool, 5> output_mask) {
  check_bn_prelu_backward("cnnkern::bn_prelu_backward", dy, x, residual, weight, bias, slope, mean, rstd, channels_last, output_mask);
  const bool adds = tensor_or_undefined(residual).defined();
  const Tensor x_ = laid_out(x, channels_last), dy_ = in_layout_of(dy, x_), residual_ = adds ? in_layout_of(*residual, x_) : Tensor();
  const Layout layout = layout_of(x_);
  Tensor dx = gradient_like(output_mask[0], x_), dresidual = gradient_like(output_mask[1], x_);
  Tensor dweight = parameter_gradient(output_mask[2], weight, x_), dbias = parameter_gradient(output_mask[3], bias, x_);
  Tensor dslope = output_mask[4] ? aten::empty_like(slope) : aten::empty({0}, x.options());
  if (x.numel() == 0) return {dx, dresidual, dweight.zero_(), dbias.zero_(), dslope.zero_()};
  const Tensor sums = aten::empty({layout.C}, mean.options());
  double* const of_slopes = sums.mutable_data_ptr<double>();
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    const ThroughPRelu<T> gate{adds ? residual_.const_data_ptr<T>() : nullptr, {slope, layout.C}, of_slopes};
    run(batch_norm_backward<T>(dy_, x_, layout, weight, bias, mean, rstd, training, {dx, dresidual, dweight, dbias}, gate), layout);
  });
  if (output_mask[4]) {
    if (slope.numel() == 1) of_slopes[0] = std::accumulate(of_slopes, of_slopes + layout.C, 0.0);
    ChannelVector(dslope.view({-1})).write(0, slope.numel(), of_slopes);
  }
  return {dx, dresidual, dweight, dbias, dslope};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
