// Shared by the layer norms on the CPU: parameters as the kernels read them, statistics from sums, and the kernels over
// rows, which layer_norm2d uses for channels_last.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "cpu/passes.h"
#include "layer_norm_tensors.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kRun = 64;  // additions per lane before a sum moves to double

// Inputs seen as (rows, cols), dense; mean and rstd have one value per row. An undefined parameter is absent.
void layer_norm_rows(const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
                     const Tensor& mean, const Tensor& rstd);
// An undefined gradient is not needed.
void layer_norm_rows_backward(const Tensor& dy, const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& dbias);

// A wide result of 16-bit x, and its gradient: those of x in float32. GPU kernels read the 16 bits directly. On a CPU autocast
// does not change layer norms, so only direct calls come here.
inline Tensor widened(const Tensor& x, bool wide) { return wide ? x.to(wide_type(x)) : x; }
inline std::tuple<Tensor, Tensor, Tensor> narrowed(std::tuple<Tensor, Tensor, Tensor> gradients, const Tensor& x) {
  auto& [dx, dweight, dbias] = gradients;
  return {dx.to(x.scalar_type()), dweight, dbias};
}

// A parameter's n values in the arithmetic type: its own memory if it has that type, otherwise a copy; `otherwise` if
// there is no parameter.
template <typename T>
class ParameterValues {
  using S = compute_t<T>;

 public:
  ParameterValues(const Tensor& t, int64_t n, S otherwise) {
    if (t.defined() && t.is_contiguous() && t.scalar_type() == c10::CppTypeToScalarType<S>::value) {
      data_ = t.const_data_ptr<S>();
      return;
    }
    copy_ = std::make_unique_for_overwrite<S[]>(n);
    data_ = copy_.get();
    if (!t.defined()) {
      std::fill_n(copy_.get(), n, otherwise);
    } else {
      const Tensor dense = t.contiguous();
      if (t.scalar_type() == c10::CppTypeToScalarType<S>::value)
        std::copy_n(dense.const_data_ptr<S>(), n, copy_.get());
      else
        std::copy_n(dense.const_data_ptr<T>(), n, copy_.get());
    }
  }
  const S* data() const { return data_; }

 private:
  std::unique_ptr<S[]> copy_;
  const S* data_;
};

// Stores n values as the gradient of a parameter, in the parameter's type: T or the arithmetic type.
template <typename T, typename Values>
void store_gradient(const Tensor& gradient, int64_t begin, int64_t end, const Values& value) {
  const auto store = [&](auto* p) {
    for (int64_t j = begin; j < end; ++j) p[j] = static_cast<compute_t<T>>(value(j));
  };
  if (!gradient.defined()) return;
  if (gradient.scalar_type() == c10::CppTypeToScalarType<T>::value)
    store(gradient.mutable_data_ptr<T>());
  else
    store(gradient.mutable_data_ptr<compute_t<T>>());
}

// Whether a result, of which whole vectors begin every `length` elements, bypasses the caches: if the four tensors of a
// training step do not fit into the last-level cache, and its own memory has been used before.
template <typename T>
bool streams(const T* out, int64_t numel, int64_t length) {
  return 4 * numel * static_cast<int64_t>(sizeof(T)) > last_level_cache_bytes() && length % kLanes<T> == 0 &&
         short_of_alignment(out) == 0 && is_mapped(out + numel / 2);
}

// The number of pieces into which `units` of work are cut, over which gradients of parameters are summed: a power of two
// that depends only on the shape, with at least `least` units per piece.
inline int64_t pieces_of(int64_t units, int64_t least, int64_t numel) {
  const int64_t most = std::min(units / least, numel / kSerial);
  return std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(most, 1, 64)));
}

// Mean and variance of n elements, `step` apart, in double.
template <typename T>
std::tuple<double, double> exact_moments(const T* x, int64_t n, int64_t step) {
  double sum = 0, squares = 0;
  for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(x[j * step]);
  const double mean = sum / n;
  for (int64_t j = 0; j < n; ++j) squares += (static_cast<double>(x[j * step]) - mean) * (static_cast<double>(x[j * step]) - mean);
  return {mean, squares / n};
}

// Statistics of kCount rows (or pixels) together. The normalised value is (x - center) * rstd + offset, where offset is
// the error of rounding the mean to the arithmetic type.
template <typename S, int kCount>
struct Moments {
  static_assert(kCount % 8 == 0, "whole vectors of double");
  alignas(64) double sum[kCount];      // of x, then of x - center
  alignas(64) double squares[kCount];  // of x - center
  alignas(64) S center[kCount], mean[kCount], rstd[kCount], offset[kCount];

  void set_center(double n) {
    for (int i = 0; i < kCount; ++i) center[i] = static_cast<S>(sum[i] / n);
  }

  // They are wrong if squares leave the range of the arithmetic type.
  bool sound(int i, double n) const {
    return squares[i] <= std::numeric_limits<S>::max() && (squares[i] > 1e-28 * n || (squares[i] == 0 && sum[i] == 0));
  }

  // Statistics from the sums; returns whether all are valid.
  bool finish(double n, double eps) {
    using V = at::vec::Vectorized<double>;
    alignas(64) double delta[kCount], r[kCount];
    for (int i = 0; i < kCount; i += V::size()) {
      const V d = V::loadu(sum + i) / V(n);
      const V var = at::vec::clamp_min(V::loadu(squares + i) / V(n) - d * d, V(0));
      d.store(delta + i), (V(1) / (var + V(eps)).sqrt()).store(r + i);
    }
    for (int i = 0; i < kCount; ++i) {
      mean[i] = static_cast<S>(center[i] + delta[i]);
      rstd[i] = static_cast<S>(r[i]);
      offset[i] = static_cast<S>(-delta[i] * r[i]);
    }
    bool all = true;
    for (int i = 0; i < kCount; ++i) all &= sound(i, n);
    return all;
  }

  void set_exact(int i, std::tuple<double, double> moments, double eps) {
    const auto [m, var] = moments;
    const double r = 1.0 / std::sqrt(var + eps);
    mean[i] = center[i] = static_cast<S>(m);
    rstd[i] = static_cast<S>(r);
    offset[i] = static_cast<S>(std::isfinite(m) ? (center[i] - m) * r : 0.0);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
