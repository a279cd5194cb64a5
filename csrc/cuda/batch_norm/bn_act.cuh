// bn_act: y = act(pre), pre = (x - mean) * weight * rstd + bias.
// Backward, with g = dy * act'(pre), n elements per channel: dbias = sum(g), dweight = sum(g * (x - mean)) * rstd,
//   dx = weight * rstd * (g - dbias / n - (x - mean) * rstd * dweight / n)   training
//   dx = weight * rstd * g                                                   eval
// act'(pre) is recomputed from x by the same subtraction and fma as in the forward pass, so it is that of the
// output bit for bit.
// Traffic in tensors read or written, where a channel (planes) or the tensor (rows) stays in L2: 2 forward, 3
// backward (1 and 2 of them reads); else 3 and 5. Eval: 2 and 3.
#pragma once

#include "cuda/batch_norm/batch_norm.cuh"
#include "cuda/launch.cuh"

namespace cnnkern::gpu {

template <typename T, typename Act>
struct BnActForward : BatchNormForward<T> {
  using S = compute_t<T>;
  template <int V>
  using Input = typename Statistics<T>::template Input<V>;

  Act act;

  template <bool kRagged, int V, int K>
  __device__ __forceinline__ void store(const Input<V>& in, int64_t at, Lanes lanes, const Affine<S> (&constants)[K]) const {
    S out[V];
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = act.template value<T>(constants[K == 1 ? 0 : k].pre(in.x[k]));
    gpu::store<kRagged>(this->y + at, lanes, out);
  }
};

template <typename T, typename Act, bool kTraining>
using BnActBackward = BatchNormBackward<T, ThroughActivation<T, Act>, kTraining>;

}  // namespace cnnkern::gpu
