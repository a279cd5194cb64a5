// bn_add_act: y = act(pre + residual), pre = (x - mean) * weight * rstd + bias.
// Backward, with g = dy * act'(pre + residual): dresidual = g, and dx, dweight, dbias as those of bn_act. Of relu act' is
// [y > 0], saved as one bit per element, in the order of memory, and nothing is saved of the residual. Of other activations
// it is computed again from x and the residual, which are saved. Nothing is saved of y.
// Traffic in tensors read or written, where a channel (planes) or the tensor (rows) stays in L2: 3 forward, 4 backward; else
// 4 and 6. Eval: 3 and 4. Where the residual is read backward: 5, else 8; eval 5.
#pragma once

#include "cuda/batch_norm/batch_norm.cuh"
#include "cuda/launch.cuh"

namespace cnnkern::gpu {

template <typename T, typename Act>
struct BnAddActForward : BatchNormForward<T> {
  using S = compute_t<T>;
  template <int V>
  struct Input {
    S x[V], residual[V];
  };
  static constexpr bool kMasks = std::is_same_v<Act, Relu>;

  const T* residual;
  Act act;
  BitWriter mask;

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(this->x + at, lanes, fill, in.x);
    gpu::load<kRagged>(residual + at, lanes, [](int) { return S(0); }, in.residual);
  }

  template <bool kRagged, int V, int K>
  __device__ __forceinline__ void store(const Input<V>& in, int64_t at, Lanes lanes, const Affine<S> (&constants)[K]) const {
    S out[V];
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const S pre = constants[K == 1 ? 0 : k].pre(in.x[k]) + in.residual[k];
      out[k] = act.template value<T>(pre);
      bits |= static_cast<unsigned>(pre > S(rounds_to_zero<T>())) << k;
    }
    gpu::store<kRagged>(this->y + at, lanes, out);
    if constexpr (kMasks) mask.template set<kRagged, V>(at, lanes, bits);
  }
};

template <typename T, typename Gate, bool kTraining>
using BnAddActBackward = BatchNormBackward<T, Gate, kTraining>;

}  // namespace cnnkern::gpu
