// bn_prelu: y = z for z > 0, else slope * z; z = pre + residual, pre = (x - mean) * weight * rstd + bias, the residual optional.
// Backward, with g = dy for z > 0, else slope * dy: dslope = sum of dy * min(z, 0) over a channel, or over all of x for a single
// slope; dresidual = g, and dx, dweight, dbias as those of bn_act. z is computed again from x and the residual, which alone are
// saved. dslope is a third sum of the first sweep.
// Traffic in tensors read or written, where a channel (planes) or the tensor (rows) stays in L2: 2 forward, 3 backward; else 3
// and 5. Eval: 2 and 3. With a residual 3 and 5; else 4 and 8; eval 3 and 5.
#pragma once

#include "cuda/batch_norm/batch_norm.cuh"
#include "cuda/launch.cuh"

namespace cnnkern::gpu {

template <typename S>
struct AffineAndSlope : Affine<S> {
  S below;  // the slope of numbers that are not positive
};

// The residual of a batch: zeros where there is none, which its pointer, null, says to all threads alike.
template <bool kRagged, typename T, int V>
__device__ __forceinline__ void load_optional(const T* residual, int64_t at, Lanes lanes, compute_t<T> (&out)[V]) {
  if (residual != nullptr) {
    gpu::load<kRagged>(residual + at, lanes, [](int) { return compute_t<T>(0); }, out);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = 0;
  }
}

template <typename T>
struct BnPReluForward : BatchNormForward<T> {
  using S = compute_t<T>;
  using After = AffineAndSlope<S>;
  template <int V>
  struct Input {
    S x[V], residual[V];
  };

  const T* residual;
  ChannelVector<T> slopes;

  __device__ After after(int64_t c, bool owner) const {
    return {BatchNormForward<T>::after(c, owner), static_cast<S>(slopes.get(c))};
  }

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(this->x + at, lanes, fill, in.x);
    load_optional<kRagged>(residual, at, lanes, in.residual);
  }

  template <bool kRagged, int V, int K>
  __device__ __forceinline__ void store(const Input<V>& in, int64_t at, Lanes lanes, const After (&constants)[K]) const {
    S out[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const After& a = constants[K == 1 ? 0 : k];
      const S z = a.pre(in.x[k]) + in.residual[k];
      out[k] = z > S(0) ? z : z * a.below;
    }
    gpu::store<kRagged>(this->y + at, lanes, out);
  }
};

template <typename T>
struct ThroughPRelu {
  static constexpr bool kResidual = true, kCostly = true;
  static constexpr int kSums = 1;
  template <typename S, int V>
  using Else = ResidualToo<S, V>;
  template <typename S>
  using Constants = AffineAndSlope<S>;

  const T* residual;             // or null
  ChannelVector<T> slopes, dslope;
  double* sums;                  // a channel's share in the gradient of a single slope, in the place of dslope

  template <typename>
  const T* reads() const { return residual; }
  template <typename S>
  __device__ Constants<S> constants(int64_t c, const Affine<S>& a) const {
    return {a, static_cast<S>(slopes.get(c))};
  }
  template <bool kRagged, typename S, int V>
  __device__ __forceinline__ void close(S (&)[V], ResidualToo<S, V>& in, int64_t at, Lanes lanes) const {
    load_optional<kRagged>(residual, at, lanes, in.residual);
  }
  template <typename S, int V>
  __device__ __forceinline__ S operator()(S dy, S pre, const ResidualToo<S, V>& in, int k, const Constants<S>& a) const {
    return pre + in.residual[k] > S(0) ? dy : dy * a.below;
  }
  template <typename S, int V>
  __device__ __forceinline__ S own_term(S dy, S pre, const ResidualToo<S, V>& in, int k) const {
    const S z = pre + in.residual[k];
    return z > S(0) ? S(0) : dy * z;
  }
  __device__ void finish(int64_t c, double sum) const {
    if (dslope.data != nullptr) dslope.set(c, sum);
    if (sums != nullptr) sums[c] = sum;
  }
};

}  // namespace cnnkern::gpu
