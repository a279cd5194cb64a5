// A tensor seen as channels: where their elements lie, vectors of one value per channel, and the affine map of batch norm.
#pragma once

#include "cuda/gpu_compat.cuh"

namespace cnnkern::gpu {

__host__ __device__ constexpr int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// A tensor of planes (N, C, HW), or of rows (N * HW, C).
struct Layout {
  bool rows;
  int64_t N, C, HW;
};

// Where the elements of a channel lie: `runs` runs of `length` elements, `step` apart.
struct ChannelView {
  int64_t channel_stride, runs, run_stride, length, step;
  explicit ChannelView(const Layout& s)
      : channel_stride(s.rows ? 1 : s.HW),
        runs(s.rows ? 1 : s.N),
        run_stride(s.rows ? 0 : s.C * s.HW),
        length(s.rows ? s.N * s.HW : s.HW),
        step(s.rows ? s.C : 1) {}
  __host__ __device__ int64_t count() const { return runs * length; }
};

// One value per channel, of type T or float; absent if data is null.
template <typename T>
struct ChannelVector {
  void* data;
  int64_t stride;
  bool is_float;
  __device__ double get(int64_t c) const {
    if (is_float) return static_cast<const float*>(data)[c * stride];
    return static_cast<compute_t<T>>(static_cast<const T*>(data)[c * stride]);
  }
  __device__ double get_or(double otherwise, int64_t c) const { return data == nullptr ? otherwise : get(c); }
  __device__ void set(int64_t c, double value) const {
    if (is_float)
      static_cast<float*>(data)[c * stride] = static_cast<float>(value);
    else
      static_cast<T*>(data)[c * stride] = static_cast<T>(static_cast<compute_t<T>>(value));
  }
};

template <typename T>
struct Parameters {
  ChannelVector<T> weight, bias;
};

// pre = fma(x - center, scale, offset). What rounding the mean to the arithmetic type loses is put into the offset.
template <typename S>
struct Affine {
  S center, scale, offset;
  __device__ __forceinline__ S pre(S x) const { return fma(x - center, scale, offset); }
};

template <typename S>
__device__ __forceinline__ double lost_by_rounding(double mean) {
  return std::isfinite(mean) ? mean - static_cast<double>(static_cast<S>(mean)) : 0.0;
}

// Forward and backward have to agree on every bit: no expression that a compiler may contract one way or another.
template <typename T, typename S = compute_t<T>>
__device__ __forceinline__ Affine<S> affine(const Parameters<T>& parameters, int64_t c, double mean, double rstd) {
  const double scale = parameters.weight.get_or(1.0, c) * rstd;
  const double offset = fma(-lost_by_rounding<S>(mean), scale, parameters.bias.get_or(0.0, c));
  return {static_cast<S>(mean), static_cast<S>(scale), static_cast<S>(offset)};
}

}  // namespace cnnkern::gpu
