// What the batch-norm operators share: statistics, the affine map of them, and both gradients.
#pragma once

#include <ATen/Dispatch.h>

#include <array>
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

// Values per channel are computed in double, for a lot of channels (kLot) step by step: the compiler vectorises the loop of
// each step. One channel at a time would wait for every root and quotient.
using Lot = std::array<double, kLot>;

// The error of rounding the mean to the arithmetic type.
template <typename S>
double lost_digits(double mean, S center) {
  return std::isfinite(mean) ? mean - center : 0.0;
}

struct Parameters {
  ChannelVector weight, bias;

  // pre = fma(x - center, scale, offset), for n channels from c. What the center loses is put into the offset.
  template <typename S>
  void affine(int64_t c, int64_t n, const double* mean, const double* rstd, S* center, S* scale, S* offset) const {
    Lot w, b;
    w.fill(1.0), b.fill(0.0);
    if (weight) weight.read(c, n, w.data());
    if (bias) bias.read(c, n, b.data());
    for (int64_t j = 0; j < n; ++j) {
      center[j] = static_cast<S>(mean[j]);
      scale[j] = static_cast<S>(w[j] * rstd[j]);
      offset[j] = static_cast<S>(b[j] - lost_digits(mean[j], center[j]) * w[j] * rstd[j]);
    }
  }
};

struct RunningStatistics {
  ChannelVector mean, var;
  double momentum;
  // batch_var: biased, over `count` elements; n channels from c.
  void update(int64_t c, int64_t n, const Lot& batch_mean, const Lot& batch_var, double count) const {
    if (!mean) return;
    const auto move = [&](const ChannelVector& statistic, const Lot& batch, double correction) {
      Lot value;
      statistic.read(c, n, value.data());
      for (int64_t j = 0; j < n; ++j) value[j] = momentum * (batch[j] * correction) + (1 - momentum) * value[j];
      statistic.write(c, n, value.data());
    };
    move(mean, batch_mean, 1.0);
    move(var, batch_var, count / (count - 1));
  }
};

// Statistics and the affine map of them: all of batch norm's forward pass but what is stored.
// (The mode is a value, here and in the backward pass, and sums are taken of this type, not of what is derived from
// it: each type of a pass takes seconds to compile.)
template <typename T>
struct BatchNormForward {
  using Scalar = T;
  using Reduction = BatchNormForward;
  using S = compute_t<T>;
  using V = Vec<T>;
  enum Row { kShift, kCenter, kScale, kOffset, kOfAct, kRows };  // kOfAct: of an activation that has a number per channel
  static constexpr int kSums = 2;

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

  void prepare(int64_t c, int64_t n) {
    Lot m{}, var;
    if (training) {
      // Sums are taken of x - shift, so that a large mean costs no digits: a few elements' mean is near enough.
      const int64_t count = view.count(), samples = std::clamp<int64_t>(count / 256, 1, 16);
      for (int64_t sample = 0; sample < samples; ++sample) {
        const T* p = x + view.offset(c, sample * (count / samples));
        for (int64_t j = 0; j < n; ++j) m[j] += static_cast<double>(p[j * view.channel_stride]);
      }
      S* const shift = table.row(kShift) + c;
      for (int64_t j = 0; j < n; ++j) shift[j] = static_cast<S>(m[j] / samples);
    } else {
      running.mean.read(c, n, m.data()), running.var.read(c, n, var.data());
      set_affine(c, n, m, var);
    }
  }

  template <bool kPartial, typename At>
  void term(const At& at, int64_t i, int64_t n, VectorSums<V, kSums>& sums) const {
    const V shift = at(kShift);
    const V d = (kPartial ? vload(x + i, n, shift) : vload(x + i)) - shift;
    sums[0] = sums[0] + d;
    sums[1] = at::vec::fmadd(d, d, sums[1]);
  }

  void finish(int64_t c, int64_t n, const double* sums, int64_t step) {
    Lot m, var;
    moments(c, n, sums, sums + step, m, var);
    set_affine(c, n, m, var);
    running.update(c, n, m, var, view.count());
  }

  // Means and biased variances of n channels from c.
  void moments(int64_t c, int64_t n, const double* s1, const double* s2, Lot& m, Lot& var) const {
    const double count = view.count();
    const S* const shift = table.row(kShift) + c;
    // The shift may be too far from the mean, and squares may have left the arithmetic type's range. NaN fails too.
    const auto sound = [&](int64_t j, double delta) {
      return bool((delta * delta <= 8 * var[j]) & (s2[j] <= std::numeric_limits<S>::max()) & (s2[j] > 1e-28 * count));
    };
    bool all_sound = true;
    for (int64_t j = 0; j < n; ++j) {
      const double delta = s1[j] / count;
      m[j] = shift[j] + delta;
      var[j] = std::max((s2[j] - s1[j] * delta) / count, 0.0);
      all_sound &= sound(j, delta);
    }
    if (!all_sound)
      for (int64_t j = 0; j < n; ++j)
        if (!sound(j, s1[j] / count) && !(s1[j] == 0 && s2[j] == 0)) std::tie(m[j], var[j]) = exact_moments(c + j);
  }

  C10_NOINLINE std::tuple<double, double> exact_moments(int64_t c) const {
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

  void set_affine(int64_t c, int64_t n, const Lot& m, const Lot& var) {
    std::copy_n(m.data(), n, mean + c);
    for (int64_t j = 0; j < n; ++j) rstd[c + j] = 1.0 / std::sqrt(var[j] + eps);
    parameters.affine(c, n, mean + c, rstd + c, table.row(kCenter) + c, table.row(kScale) + c, table.row(kOffset) + c);
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

// Rows of a backward kernel's table that the gates below read; the first of their own.
enum : int { kCenteredScale = 1, kCenteredOffset = 2, kOfGate = 5 };

// What reaches the batch norm of element i of dy, a vector, or its first n lanes if kPartial: through an activation that is
// recomputed from x, or from x and the residual; through a mask; all of it.
template <typename T, typename Act>
struct ThroughActivation {
  static constexpr int kRows = 0, kSums = 0;  // of its own
  Act act;
  void prefetch(int64_t) const {}
  template <bool kPartial, typename At>
  Vec<T> through(const At& at, Vec<T> dy, Vec<T> centered, int64_t, int64_t) const {
    return act.template grad<T>(dy, at::vec::fmadd(centered, at(kCenteredScale), at(kCenteredOffset)));
  }
};
template <typename T, typename Act>
struct ThroughActivationOfSum {
  static constexpr int kRows = 0, kSums = 0;
  Act act;
  const T* residual;
  void prefetch(int64_t i) const { __builtin_prefetch(residual + i, 0, 2); }
  template <bool kPartial, typename At>
  Vec<T> through(const At& at, Vec<T> dy, Vec<T> centered, int64_t i, int64_t n) const {
    const Vec<T> r = kPartial ? vload(residual + i, n, Vec<T>(0)) : vload(residual + i);
    return act.template grad<T>(dy, at::vec::fmadd(centered, at(kCenteredScale), at(kCenteredOffset)) + r);
  }
};
struct ThroughMask {
  static constexpr int kRows = 0, kSums = 0;
  BitReader mask;
  void prefetch(int64_t) const {}
  template <bool kPartial, typename At, typename V>
  V through(const At&, V dy, V, int64_t i, int64_t) const {
    return zero_unless(dy, mask.from(i));
  }
};
struct ThroughNothing {
  static constexpr int kRows = 0, kSums = 0;
  void prefetch(int64_t) const {}
  template <bool kPartial, typename At, typename V>
  V through(const At&, V dy, V, int64_t, int64_t) const {
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
  enum Row { kCenter, kScale = kCenteredScale, kOffset = kCenteredOffset, kMeanGradient, kSlope, kRows = kOfGate + Gate::kRows };
  static constexpr int kSums = 2 + Gate::kSums;

  const T *dy, *x;
  T *dx, *dresidual;  // nullptr if not needed
  bool training;
  const double *mean, *rstd;
  ChannelView view;
  Parameters parameters;
  ChannelVector dweight, dbias;
  Gate gate;
  ChannelTable<T, kRows> table{};

  // In eval the gradients need no sums and are written in the first pass.
  static constexpr bool reduces() { return true; }
  bool maps() const { return training && (dx != nullptr || dresidual != nullptr); }
  T* output() const { return dx != nullptr ? dx : dresidual; }
  void prefetch(int64_t i) const {
    __builtin_prefetch(x + i, 0, 2), __builtin_prefetch(dy + i, 0, 2);
    gate.prefetch(i);
  }

  void prepare(int64_t c, int64_t n) {
    parameters.affine(c, n, mean + c, rstd + c, table.row(kCenter) + c, table.row(kScale) + c, table.row(kOffset) + c);
    if constexpr (Gate::kRows > 0) gate.prepare(c, n, table.row(kOfGate) + c);
  }

  // `from`: x, or where x would begin if it lay as dy does (prefix_bn_relu.cpp).
  template <bool kPartial, typename At>
  V gradient(const At& at, const T* from, int64_t i, int64_t n, V& centered) const {
    const V center = at(kCenter);
    centered = (kPartial ? vload(from + i, n, center) : vload(from + i)) - center;
    return gate.template through<kPartial>(at, kPartial ? vload(dy + i, n, V(0)) : vload(dy + i), centered, i, n);
  }

  template <bool kPartial, typename At>
  void term(const At& at, int64_t i, int64_t n, VectorSums<V, kSums>& sums) const {
    V centered;
    const V g = gradient<kPartial>(at, x, i, n, centered);
    sums[0] = sums[0] + g;
    sums[1] = at::vec::fmadd(g, centered, sums[1]);
    if constexpr (Gate::kSums > 0)
      sums[2] = gate.template add<kPartial>(at, kPartial ? vload(dy + i, n, V(0)) : vload(dy + i), centered, i, n, sums[2]);
    if (!training) {
      if (dx != nullptr) kPartial ? vstore(dx + i, g * at(kScale), n) : vstore(dx + i, g * at(kScale));
      if (dresidual != nullptr) kPartial ? vstore(dresidual + i, g, n) : vstore(dresidual + i, g);
    }
  }

  void finish(int64_t c, int64_t n, const double* sums, int64_t step) {
    const double *const s1 = sums, *const s2 = sums + step;
    const S* const center = table.row(kCenter) + c;
    Lot normalized_sum;  // of g * (x - mean) * rstd
    for (int64_t j = 0; j < n; ++j)
      normalized_sum[j] = (s2[j] - lost_digits(mean[c + j], center[j]) * s1[j]) * rstd[c + j];
    if (dbias) dbias.write(c, n, s1);
    if (dweight) dweight.write(c, n, normalized_sum.data());
    set_slopes(c, n, s1, normalized_sum.data(), view.count());
    if constexpr (Gate::kSums > 0) gate.finish(c, n, sums + 2 * step);
  }

  // What the statistics' share of dx needs, from the sums over all `count` elements per channel.
  void set_slopes(int64_t c, int64_t n, const double* sum, const double* normalized_sum, double count) {
    const S* const center = table.row(kCenter) + c;
    S *const slope = table.row(kSlope) + c, *const mean_gradient = table.row(kMeanGradient) + c;
    for (int64_t j = 0; j < n; ++j) {
      const double s = -rstd[c + j] * normalized_sum[j] / count;
      slope[j] = static_cast<S>(s);
      mean_gradient[j] = static_cast<S>(sum[j] / count + s * lost_digits(mean[c + j], center[j]));
    }
  }

  template <typename At>
  void map(const At& at, int64_t i, bool stream) const {
    V centered;
    const V g = gradient<false>(at, x, i, 0, centered);
    if (dx != nullptr) vput(dx + i, result(at, g, centered), stream);
    if (dresidual != nullptr) vput(dresidual + i, g, stream);
  }
  template <typename At>
  void map_part(const At& at, int64_t i, int64_t n) const {
    V centered;
    const V g = gradient<true>(at, x, i, n, centered);
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

// The gradient of x, or of a tensor like it; an empty tensor if it is not needed.
inline Tensor gradient_like(bool wanted, const Tensor& x) {
  return wanted ? aten::empty_like(x) : aten::empty({0}, x.options());
}

// The gradient of a vector of C, in its dtype, or in the dtype of sums if the vector is not given.
inline Tensor parameter_gradient(bool wanted, const OptionalTensor& t, const Tensor& x) {
  if (!wanted) return aten::empty({0}, x.options());
  const Tensor& given = tensor_or_undefined(t);
  return given.defined() ? aten::empty_like(given) : aten::empty({x.size(1)}, x.options().dtype(wide_type(x)));
}

// Where a backward pass writes; a tensor that is empty or undefined is not needed.
struct BatchNormGradients {
  Tensor dx = {}, dresidual = {}, dweight = {}, dbias = {};
};

template <typename T, typename Gate>
BatchNormBackward<T, Gate> batch_norm_backward(const Tensor& dy, const Tensor& x, const Layout& layout, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, bool training,
                                               const BatchNormGradients& gradients, const Gate& gate) {
  const auto wanted = [](const Tensor& t) { return t.defined() && t.numel() > 0; };
  const auto image = [&](const Tensor& t) { return wanted(t) ? t.mutable_data_ptr<T>() : nullptr; };
  const auto vector = [&](const Tensor& t) { return wanted(t) ? t : Tensor(); };
  return {.dy = dy.const_data_ptr<T>(),
          .x = x.const_data_ptr<T>(),
          .dx = image(gradients.dx),
          .dresidual = image(gradients.dresidual),
          .training = training,
          .mean = mean.const_data_ptr<double>(),
          .rstd = rstd.const_data_ptr<double>(),
          .view = layout.channel(),
          .parameters = {tensor_or_undefined(weight), tensor_or_undefined(bias)},
          .dweight = vector(gradients.dweight),
          .dbias = vector(gradients.dbias),
          .gate = gate};
}

// Calls f with a value of the element type.
template <typename F>
void with_type(const Tensor& x, F&& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] { f(scalar_t{}); });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
