// What the batch-norm operators share: statistics, the affine map of them, and both gradients.
#pragma once

#include <ATen/Dispatch.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "aten.h"
#include "check.h"
#include "cpu/bits.h"
#include "cpu/layout.h"
#include "cpu/planes.h"
#include "cpu/rows.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

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

// Statistics and the affine map of them: all of batch norm's forward pass but what is stored.
// (The mode is a value, here and in the backward pass, and sums are taken of this type, not of what is derived from
// it: each type of a sweep takes seconds to compile.)
template <typename T>
struct BatchNormForward {
  using Scalar = T;
  using Reduction = BatchNormForward;
  using S = compute_t<T>;
  using V = Vec<T>;
  enum Row { kShift, kCenter, kScale, kOffset, kRows };

  const T* x;
  T* y;
  double *mean, *rstd;
  bool training;
  ChannelView view;
  Parameters parameters;
  RunningStatistics running;
  double eps;
  ChannelTable<T, kRows> table{};

  bool reduces() const { return training; }
  static constexpr bool maps() { return true; }
  T* output() const { return y; }
  void prefetch(int64_t i) const { __builtin_prefetch(x + i, 0, 2); }

  void prepare(int64_t c) {
    if (training) {
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
  V normalized(const At& at, V v) const {
    return at::vec::fmadd(v - at(kCenter), at(kScale), at(kOffset));
  }
};

template <typename T>
BatchNormForward<T> batch_norm_forward(const Tensor& x, const Layout& layout, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                                       const OptionalTensor& running_var, bool training, double momentum, double eps,
                                       Tensor& y, Tensor& mean, Tensor& rstd) {
  return {.x = x.const_data_ptr<T>(),
          .y = y.mutable_data_ptr<T>(),
          .mean = mean.mutable_data_ptr<double>(),
          .rstd = rstd.mutable_data_ptr<double>(),
          .training = training,
          .view = layout.channel(),
          .parameters = {tensor_or_undefined(weight), tensor_or_undefined(bias)},
          .running = {tensor_or_undefined(running_mean), tensor_or_undefined(running_var), momentum},
          .eps = eps};
}

// Rows of a backward kernel's table that the gates below read.
enum : int { kCenteredScale = 1, kCenteredOffset = 2 };

// Whether dy reaches the batch norm: through an activation that is computed again from x, through a mask, or always.
template <typename T, typename Act>
struct ThroughActivation {
  Act act;
  template <typename At>
  Vec<T> operator()(const At& at, Vec<T> dy, Vec<T> centered, int64_t) const {
    return act.template grad<T>(dy, at::vec::fmadd(centered, at(kCenteredScale), at(kCenteredOffset)));
  }
};
struct ThroughMask {
  BitReader mask;
  template <typename At, typename V>
  V operator()(const At&, V dy, V, int64_t i) const {
    return zero_unless(dy, mask.from(i));
  }
};
struct ThroughNothing {
  template <typename At, typename V>
  V operator()(const At&, V dy, V, int64_t) const {
    return dy;
  }
};

// Batch norm's backward pass, from g, the part of dy that `Gate` lets through. dresidual is g itself.
template <typename T, typename Gate>
struct BatchNormBackward {
  using Scalar = T;
  using Reduction = BatchNormBackward;
  using S = compute_t<T>;
  using V = Vec<T>;
  enum Row { kCenter, kScale = kCenteredScale, kOffset = kCenteredOffset, kMeanGradient, kSlope, kRows };

  const T *dy, *x;
  T *dx, *dresidual;  // nullptr where not wanted
  bool training;
  const double *mean, *rstd;
  ChannelView view;
  Parameters parameters;
  ChannelVector dweight, dbias;
  Gate gate;
  ChannelTable<T, kRows> table{};

  // In eval the gradients need no sums and are written in the first sweep.
  static constexpr bool reduces() { return true; }
  bool maps() const { return training && (dx != nullptr || dresidual != nullptr); }
  T* output() const { return dx != nullptr ? dx : dresidual; }
  void prefetch(int64_t i) const { __builtin_prefetch(x + i, 0, 2), __builtin_prefetch(dy + i, 0, 2); }

  void prepare(int64_t c) {
    const Affine a = affine<S>(mean[c], rstd[c], parameters.weight_of(c), parameters.bias_of(c));
    table(kCenter, c) = a.center, table(kScale, c) = a.scale, table(kOffset, c) = a.offset;
  }

  template <bool kPartial, typename At>
  V gradient(const At& at, int64_t i, int64_t n, V& centered) const {
    const V center = at(kCenter);
    centered = (kPartial ? vload(x + i, n, center) : vload(x + i)) - center;
    return gate(at, kPartial ? vload(dy + i, n, V(0)) : vload(dy + i), centered, i);
  }

  template <bool kPartial, typename At>
  void term(const At& at, int64_t i, int64_t n, V& s1, V& s2) const {
    V centered;
    const V g = gradient<kPartial>(at, i, n, centered);
    s1 = s1 + g;
    s2 = at::vec::fmadd(g, centered, s2);
    if (!training) {
      if (dx != nullptr) kPartial ? vstore(dx + i, g * at(kScale), n) : vstore(dx + i, g * at(kScale));
      if (dresidual != nullptr) kPartial ? vstore(dresidual + i, g, n) : vstore(dresidual + i, g);
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
  void map(const At& at, int64_t i, bool stream) const {
    V centered;
    const V g = gradient<false>(at, i, 0, centered);
    if (dx != nullptr) vput(dx + i, result(at, g, centered), stream);
    if (dresidual != nullptr) vput(dresidual + i, g, stream);
  }
  template <typename At>
  void map_part(const At& at, int64_t i, int64_t n) const {
    V centered;
    const V g = gradient<true>(at, i, n, centered);
    if (dx != nullptr) vstore(dx + i, result(at, g, centered), n);
    if (dresidual != nullptr) vstore(dresidual + i, g, n);
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

// A gradient of t, or an empty tensor where it is not wanted.
inline Tensor gradient_like(bool wanted, const OptionalTensor& t, const Tensor& x) {
  return wanted ? aten::empty_like(*t) : aten::empty({0}, x.options());
}

// Calls f with a value of the element type.
template <typename F>
void with_type(const Tensor& x, F&& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] { f(scalar_t{}); });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
