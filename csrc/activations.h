// Activations that a fused kernel applies, as compile-time parameters: `value` of the pre-activation and `grad`,
// the incoming gradient times the derivative. Shared by host and device: V is a scalar or a vector of them, T is
// the tensor's element type (to which the result is rounded afterwards).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string_view>
#include <type_traits>

#ifdef __CUDACC__
#define CNNKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CNNKERN_HOST_DEVICE inline
#endif

namespace cnnkern {

// The largest pre-activation that rounds to zero in T: where T is narrower than the arithmetic, a positive value
// may still become 0, and the gradient has to see the same zero as the output.
template <typename T>
CNNKERN_HOST_DEVICE constexpr float rounds_to_zero() {
  if constexpr (std::is_same_v<T, c10::Half>) return 0x1p-25f;  // half of the smallest subnormal; ties go to even
  if constexpr (std::is_same_v<T, c10::BFloat16>) return 0x1p-134f;
  return 0.0f;
}

// What activations are written with. csrc/cpu/vec.h specialises it for vectors.
template <typename V>
struct Lanewise {
  // max(v, 0) that passes NaN on.
  static CNNKERN_HOST_DEVICE V relu(V v) { return v <= V(0) ? V(0) : v; }
  // v where !(x <= bound), else 0.
  static CNNKERN_HOST_DEVICE V zero_where_le(V v, V x, V bound) { return x <= bound ? V(0) : v; }
};

struct Identity {
  template <typename T, typename V>
  static CNNKERN_HOST_DEVICE V value(V pre) { return pre; }
  template <typename T, typename V>
  static CNNKERN_HOST_DEVICE V grad(V dy, V) { return dy; }
};

struct Relu {
  template <typename T, typename V>
  static CNNKERN_HOST_DEVICE V value(V pre) { return Lanewise<V>::relu(pre); }
  template <typename T, typename V>
  static CNNKERN_HOST_DEVICE V grad(V dy, V pre) {
    return Lanewise<V>::zero_where_le(dy, pre, V(rounds_to_zero<T>()));
  }
};

}  // namespace cnnkern
