// bn_act: y = act(pre), pre = (x - mean) * weight * rstd + bias.
// Backward, with g = dy * act'(pre), n elements a channel: dbias = sum(g), dweight = sum(g * (x - mean)) * rstd,
//   dx = weight * rstd * (g - dbias / n - (x - mean) * rstd * dweight / n)   training
//   dx = weight * rstd * g                                                   eval
// act'(pre) is recomputed from x by the same subtraction and fma as in the forward pass, so it is that of the
// output bit for bit, and nothing but x and two vectors of C is saved.
// Traffic in tensors read or written, while a channel (planes) or the tensor (rows) stays in cache: 2 forward,
// 3 backward; rows beyond the last-level cache 3 and 5. A thread owns blocks of channels, or pieces of rows.
// Accumulators: the arithmetic type for 64 additions, then double (see batch_norm.h).
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <tuple>

#include "check.h"
#include "cpu/batch_norm.h"
#include "cpu/dispatch.h"
#include "cpu/layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

// pre = fma(x - center, scale, offset). What rounding the mean to the arithmetic type loses is put into the offset.
struct Affine {
  double center, scale, offset;
};

template <typename S>
Affine affine(double mean, double rstd, double weight, double bias) {
  const S center = static_cast<S>(mean);
  const double lost = std::isfinite(mean) ? mean - center : 0.0;
  return {center, weight * rstd, bias - lost * weight * rstd};
}

struct Parameters {
  ChannelVector weight, bias;
  double weight_of(int64_t c) const { return weight ? weight.get(c) : 1.0; }
  double bias_of(int64_t c) const { return bias ? bias.get(c) : 0.0; }
};

struct RunningStatistics {
  ChannelVector mean, var;
  double momentum;
  void update(int64_t c, double batch_mean, double batch_var, int64_t n) const {
    if (!mean) return;
    const double unbiased = batch_var * (static_cast<double>(n) / static_cast<double>(n - 1));
    mean.set(c, momentum * batch_mean + (1 - momentum) * mean.get(c));
    var.set(c, momentum * unbiased + (1 - momentum) * var.get(c));
  }
};

template <typename T, typename Act, bool kTraining>
struct BnActForward {
  using Scalar = T;
  using S = compute_t<T>;
  using V = Vec<T>;
  enum Row { kShift, kCenter, kScale, kOffset, kRows };
  static constexpr bool kReduces = kTraining;

  const T* x;
  T* y;
  double *mean, *rstd;
  ChannelView view;
  Parameters parameters;
  RunningStatistics running;
  double eps;
  ChannelTable<T, kRows> table{};

  static constexpr bool maps() { return true; }
  bool streams(int64_t numel) const { return 4 * numel * static_cast<int64_t>(sizeof(T)) > last_level_cache_bytes(); }
  T* output() const { return y; }
  void prefetch(int64_t i) const {  __builtin_prefetch(x + i, 0, 2); }

  void prepare(int64_t c) {
    if constexpr (kTraining) {
      // Sums are taken of x - shift, so that a large mean costs no digits: a few elements' mean is near enough.
      const int64_t n = view.count(), samples = std::clamp<int64_t>(n / 256, 1, 16);
      double sum = 0;
      for (int64_t j = 0; j < samples; ++j) sum += static_cast<double>(x[view.offset(c, j * (n / samples))]);
      table(kShift, c) = static_cast<S>(sum / samples);
    } else {
      set_affine(c, running.mean.get(c), 1.0 / std::sqrt(running.var.get(c) + eps));
    }
  }

  template <bool kPartial, typename At>
  void term(const At& at, int64_t i, int64_t n, V& s1, V& s2) const {
    const V shift = at(kShift);
    const V d = (kPartial ? vload(x + i, n, shift) : vload(x + i)) - shift;
    s1 = s1 + d;
    s2 = at::vec::fmadd(d, d, s2);
  }

  void finish(int64_t c, double s1, double s2) {
    const double n = view.count();
    double delta = s1 / n, m = table(kShift, c) + delta, var = std::max((s2 - s1 * delta) / n, 0.0);
    // Far from the mean the shift was of no use; squares may have left the arithmetic type's range; NaN fails too.
    const bool sound = delta * delta <= 8 * var && s2 <= std::numeric_limits<S>::max() && s2 / n > 1e-28;
    if (!sound && !(s1 == 0 && s2 == 0)) std::tie(m, var) = exact_moments(c);
    set_affine(c, m, 1.0 / std::sqrt(var + eps));
    running.update(c, m, var, view.count());
  }

  std::tuple<double, double> exact_moments(int64_t c) const {
    const auto sum_of = [&](const auto& f) {
      double total = 0;
      for (int64_t r = 0; r < view.runs; ++r) {
        const T* p = x + c * view.channel_stride + r * view.run_stride;
        double sum = 0;
        for (int64_t j = 0; j < view.length; ++j) sum += f(static_cast<double>(p[j * view.step]));
        total += sum;
      }
      return total;
    };
    const double n = view.count();
    const double m = sum_of([](double v) { return v; }) / n;
    return {m, sum_of([m](double v) { return (v - m) * (v - m); }) / n};
  }

  void set_affine(int64_t c, double m, double r) {
    mean[c] = m, rstd[c] = r;
    const Affine a = affine<S>(m, r, parameters.weight_of(c), parameters.bias_of(c));
    table(kCenter, c) = a.center, table(kScale, c) = a.scale, table(kOffset, c) = a.offset;
  }

  template <typename At>
  V point(const At& at, int64_t i) const {
    return result(at, vload(x + i));
  }
  template <typename At>
  V point(const At& at, int64_t i, int64_t n) const {
    return result(at, vload(x + i, n, V(0)));
  }
  template <typename At>
  V result(const At& at, V v) const {
    return Act::template value<T>(at::vec::fmadd(v - at(kCenter), at(kScale), at(kOffset)));
  }
};

template <typename T, typename Act, bool kTraining>
struct BnActBackward {
  using Scalar = T;
  using S = compute_t<T>;
  using V = Vec<T>;
  enum Row { kCenter, kScale, kOffset, kMeanGradient, kSlope, kRows };
  static constexpr bool kReduces = true;

  const T *dy, *x;
  T* dx;
  const double *mean, *rstd;
  ChannelView view;
  Parameters parameters;
  ChannelVector dweight, dbias;
  ChannelTable<T, kRows> table{};

  // In eval dx needs no sums and is written in the first sweep.
  bool maps() const { return kTraining && dx != nullptr; }
  bool streams(int64_t numel) const { return 4 * numel * static_cast<int64_t>(sizeof(T)) > last_level_cache_bytes(); }
  T* output() const { return dx; }
  void prefetch(int64_t i) const {  __builtin_prefetch(x + i, 0, 2), __builtin_prefetch(dy + i, 0, 2); }

  void prepare(int64_t c) {
    const Affine a = affine<S>(mean[c], rstd[c], parameters.weight_of(c), parameters.bias_of(c));
    table(kCenter, c) = a.center, table(kScale, c) = a.scale, table(kOffset, c) = a.offset;
  }

  template <bool kPartial, typename At>
  V gradient(const At& at, int64_t i, int64_t n, V& centered) const {
    const V center = at(kCenter);
    centered = (kPartial ? vload(x + i, n, center) : vload(x + i)) - center;
    const V g = kPartial ? vload(dy + i, n, V(0)) : vload(dy + i);
    return Act::template grad<T>(g, at::vec::fmadd(centered, at(kScale), at(kOffset)));
  }

  template <bool kPartial, typename At>
  void term(const At& at, int64_t i, int64_t n, V& s1, V& s2) const {
    V centered;
    const V g = gradient<kPartial>(at, i, n, centered);
    s1 = s1 + g;
    s2 = at::vec::fmadd(g, centered, s2);
    if constexpr (!kTraining) {
      if (dx == nullptr) return;
      if constexpr (kPartial)
        vstore(dx + i, g * at(kScale), n);
      else
        vstore(dx + i, g * at(kScale));
    }
  }

  void finish(int64_t c, double s1, double s2) {
    const double n = view.count(), r = rstd[c];
    const double lost = std::isfinite(mean[c]) ? mean[c] - table(kCenter, c) : 0.0;
    const double centered_sum = s2 - lost * s1;  // of g * (x - mean)
    if (dbias) dbias.set(c, s1);
    if (dweight) dweight.set(c, centered_sum * r);
    const double slope = -r * r * centered_sum / n;
    table(kSlope, c) = slope;
    table(kMeanGradient, c) = s1 / n + slope * lost;
  }

  template <typename At>
  V point(const At& at, int64_t i) const {
    V centered;
    const V g = gradient<false>(at, i, 0, centered);
    return result(at, g, centered);
  }
  template <typename At>
  V point(const At& at, int64_t i, int64_t n) const {
    V centered;
    const V g = gradient<true>(at, i, n, centered);
    return result(at, g, centered);
  }
  // In this order the terms cancel before they are scaled, with one rounding each.
  template <typename At>
  V result(const At& at, V g, V centered) const {
    return at::vec::fmadd(centered, at(kSlope), g - at(kMeanGradient)) * at(kScale);
  }
};

template <typename Policy>
void run(Policy&& policy, const Layout& layout) {
  if (layout.rows)
    run_rows(policy, layout.as_rows());
  else
    run_planes(policy, layout.as_planes());
}

template <typename F>
void with_types(const char* op, const Tensor& x, std::string_view act, bool training, F&& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    with_activation(op, act, [&](auto a) {
      if (training)
        f(scalar_t{}, a, std::true_type{});
      else
        f(scalar_t{}, a, std::false_type{});
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                              bool training, double momentum, double eps, c10::string_view act) {
  check_batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps);
  check_activation("cnnkern::bn_act", act);
  const Tensor x_ = in_layout(x);
  const Layout layout = layout_of(x_);
  Tensor y = at::empty_like(x_);
  Tensor mean = at::empty({layout.C}, x.options().dtype(at::kDouble)), rstd = at::empty_like(mean);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  with_types("cnnkern::bn_act", x_, act, training, [&](auto scalar, auto activation, auto is_training) {
    using T = decltype(scalar);
    run(BnActForward<T, decltype(activation), decltype(is_training)::value>{
            .x = x_.const_data_ptr<T>(),
            .y = y.mutable_data_ptr<T>(),
            .mean = mean.mutable_data_ptr<double>(),
            .rstd = rstd.mutable_data_ptr<double>(),
            .view = layout.channel(),
            .parameters = {tensor_or_undefined(weight), tensor_or_undefined(bias)},
            .running = {tensor_or_undefined(running_mean), tensor_or_undefined(running_var), momentum},
            .eps = eps},
        layout);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, const Tensor& mean,
                                                       const Tensor& rstd, bool training, c10::string_view act,
                                                       std::array<bool, 3> output_mask) {
  check_batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, mean, rstd, output_mask);
  check_activation("cnnkern::bn_act_backward", act);
  const Tensor x_ = in_layout(x), dy_ = in_layout_of(dy, x_);
  const Layout layout = layout_of(x_);
  const auto like = [&](bool wanted, const Tensor& t) { return wanted ? at::empty_like(t) : at::empty({0}, t.options()); };
  Tensor dx = like(output_mask[0], x_);
  Tensor dweight = like(output_mask[1], output_mask[1] ? *weight : x_);
  Tensor dbias = like(output_mask[2], output_mask[2] ? *bias : x_);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_()};
  with_types("cnnkern::bn_act_backward", x_, act, training, [&](auto scalar, auto activation, auto is_training) {
    using T = decltype(scalar);
    run(BnActBackward<T, decltype(activation), decltype(is_training)::value>{
            .dy = dy_.const_data_ptr<T>(),
            .x = x_.const_data_ptr<T>(),
            .dx = output_mask[0] ? dx.mutable_data_ptr<T>() : nullptr,
            .mean = mean.const_data_ptr<double>(),
            .rstd = rstd.const_data_ptr<double>(),
            .view = layout.channel(),
            .parameters = {tensor_or_undefined(weight), tensor_or_undefined(bias)},
            .dweight = output_mask[1] ? dweight : Tensor(),
            .dbias = output_mask[2] ? dbias : Tensor()},
        layout);
  });
  return {dx, dweight, dbias};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern

CNNKERN_REGISTER_CPU(bn_act, bn_act_cpu)
CNNKERN_REGISTER_CPU(bn_act_backward, bn_act_backward_cpu)
