// sync_bn: batch norm over processes, in parts, between which statistics and sums travel from process to process.
//   sync_bn_stats     moments = mean and biased variance of every channel of x, elements per channel
//   sync_bn           y = act(pre + residual), pre = (x - mean) * weight * rstd + bias, from given mean and rstd
//   sync_bn_sums      sum(g) and sum(g * (x - mean)) * rstd, g = dy * act'(pre), pre with the residual, or dy * [y > 0]
//   sync_bn_backward  dx = weight * rstd * (g - sum(g) / n - (x - mean) * rstd * sum(g * (x - mean) * rstd) / n), with
//                     sums and n over all processes, read where they are: nothing waits for the GPU; dresidual = g
// The sweeps are those of bn_act and bn_add_act, one per part. Traffic in tensors read or written: 1 and 2 (3 with a
// residual) forward, 2 and 3 (4) backward.
#pragma once

#include "cuda/batch_norm/batch_norm.cuh"
#include "cuda/launch.cuh"

namespace cnnkern::gpu {

// moments: (2 C + 1), means and variances and the number of elements.
template <typename T>
struct SyncMoments : Statistics<T> {
  using Reduction = SyncMoments;
  double* elements;

  __device__ void finish(int64_t c, const double (&s)[2], double center) const {
    Statistics<T>::finish(c, s, center);
    if (c == 0 && threadIdx.x == 0) *elements = static_cast<double>(this->view.count());
  }
};

template <typename T, typename Act, bool kAdds>
struct SyncForward {
  using Scalar = T;
  using S = compute_t<T>;
  using After = Affine<S>;
  template <int V>
  struct Input {
    S x[V], residual[V];
  };
  static constexpr bool kMasks = kAdds && std::is_same_v<Act, Relu>;

  const T *x, *residual;
  T* y;
  const double *mean, *rstd;
  Parameters<T> parameters;
  Act act;
  BitWriter mask;

  __device__ After after(int64_t c, bool) const { return affine(parameters, c, mean[c], rstd[c]); }

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(x + at, lanes, fill, in.x);
    if constexpr (kAdds) gpu::load<kRagged>(residual + at, lanes, [](int) { return S(0); }, in.residual);
  }

  template <bool kRagged, int V, int K>
  __device__ __forceinline__ void store(const Input<V>& in, int64_t at, Lanes lanes, const Affine<S> (&constants)[K]) const {
    S out[V];
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      S pre = constants[K == 1 ? 0 : k].pre(in.x[k]);
      if constexpr (kAdds) pre += in.residual[k];
      out[k] = act.template value<T>(pre);
      if constexpr (kMasks) bits |= static_cast<unsigned>(pre > S(rounds_to_zero<T>())) << k;
    }
    gpu::store<kRagged>(y + at, lanes, out);
    if constexpr (kMasks) mask.template set<kRagged, V>(at, lanes, bits);
  }
};

// The sums: those of batch norm's backward pass, in fp64 for who adds them up over processes.
template <typename T, typename Gate>
struct SyncSums : BatchNormBackward<T, Gate, true> {
  using Base = BatchNormBackward<T, Gate, true>;
  using Reduction = SyncSums;
  double* sums;  // (2, C)
  int64_t channels;

  __device__ void finish(int64_t c, const double (&s)[2], double) const {
    if (threadIdx.x != 0) return;
    sums[c] = s[0];
    sums[channels + c] = (s[1] - lost_by_rounding<typename Base::S>(this->mean[c]) * s[0]) * this->rstd[c];
  }
};

// The second sweep, from the sums and the number of elements of all processes.
template <typename T, typename Gate>
struct SyncBackward : BatchNormBackward<T, Gate, true> {
  using Base = BatchNormBackward<T, Gate, true>;
  using S = typename Base::S;
  using After = typename Base::After;
  const double *sums, *elements;
  int64_t channels;

  __device__ After after(int64_t c, bool) const {
    const double n = *elements, slope = -this->rstd[c] * sums[channels + c] / n;
    const double constant = -sums[c] / n - slope * lost_by_rounding<S>(this->mean[c]);
    return {this->before(c), static_cast<S>(slope), static_cast<S>(constant)};
  }
};

}  // namespace cnnkern::gpu
