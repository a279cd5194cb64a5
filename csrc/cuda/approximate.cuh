// Activations whose result is rounded to 16 bits, by approximations that are single GPU instructions. Their errors are a few
// units in the last of float's 24 bits; the result keeps 11 or 8. The exact functions take several times as many instructions,
// which made activations with an exponential slower than the memory traffic.
#pragma once

#include "activations.h"
#include "cuda/gpu_compat.cuh"

namespace cnnkern {

struct Approximate : Lanewise<float> {
  static CNNKERN_HOST_DEVICE float exp(float v) { return gpu::approximate_exp(v); }
  // 0 where |b| is beyond 2^126.
  static CNNKERN_HOST_DEVICE float divide(float a, float b) { return gpu::approximate_quotient(a, b); }
  static CNNKERN_HOST_DEVICE float erfc(float v) { return short_erfc<Approximate>(v); }
};
template <>
struct Rounded<c10::BFloat16, float> : Approximate {};
template <>
struct Rounded<c10::Half, float> : Approximate {};

}  // namespace cnnkern
