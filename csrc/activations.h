// Activations that a fused kernel applies, as compile-time parameters: `value` of the pre-activation and `grad`,
// the incoming gradient times the derivative. Shared by host and device: V is a scalar or a vector of them, T is
// the tensor's element type (to which the result is rounded afterwards).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
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
  static CNNKERN_HOST_DEVICE V exp(V v) { return ::exp(v); }
  // x <= bound ? a : b, lane by lane, and x < bound ? a : b; b where x is NaN.
  static CNNKERN_HOST_DEVICE V where_le(V x, V bound, V a, V b) { return x <= bound ? a : b; }
  static CNNKERN_HOST_DEVICE V where_lt(V x, V bound, V a, V b) { return x < bound ? a : b; }
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
    return Lanewise<V>::where_le(pre, V(rounds_to_zero<T>()), V(0), dy);
  }
};

// The others, chosen at run time: their share is small, and a jump that always goes the same way costs nothing
// beside the memory, while each type of its own would be one more copy of every kernel.
struct OtherActivation {
  enum Kind { kRelu6, kLeakyRelu, kSigmoid, kSilu, kHardswish };
  Kind kind;
  static constexpr double kSlope = 0.01;  // of leaky_relu below 0, torch.nn.LeakyReLU's default

  template <typename T, typename V>
  CNNKERN_HOST_DEVICE V value(V pre) const {
    using W = Lanewise<V>;
    switch (kind) {
      case kRelu6: return clamp6(W::relu(pre));
      case kLeakyRelu: return W::where_le(pre, V(0), pre * V(kSlope), pre);
      case kSigmoid: return sigmoid(pre);
      case kSilu: return pre / (V(1) + W::exp(V(0) - pre));
      default: return pre * clamp6(W::relu(pre + V(3))) * V(1.0 / 6);
    }
  }

  template <typename T, typename V>
  CNNKERN_HOST_DEVICE V grad(V dy, V pre) const {
    using W = Lanewise<V>;
    switch (kind) {
      // NaN has the gradient that PyTorch gives it: here 0, and below the slope.
      case kRelu6: return W::where_lt(V(rounds_to_zero<T>()), pre, W::where_lt(pre, V(6), dy, V(0)), V(0));
      case kLeakyRelu: return W::where_lt(V(0), pre, dy, dy * V(kSlope));
      case kSigmoid: {
        const V s = sigmoid(pre);
        return dy * (V(1) - s) * s;
      }
      case kSilu: {
        const V s = sigmoid(pre);
        return dy * s * (V(1) + pre * (V(1) - s));
      }
      default:
        return W::where_le(pre, V(-3), V(0), W::where_le(V(3), pre, dy, dy * (pre * V(1.0 / 3) + V(0.5))));
    }
  }

 private:
  template <typename V>
  static CNNKERN_HOST_DEVICE V clamp6(V v) { return Lanewise<V>::where_le(V(6), v, V(6), v); }
  template <typename V>
  static CNNKERN_HOST_DEVICE V sigmoid(V v) { return V(1) / (V(1) + Lanewise<V>::exp(V(0) - v)); }
};

}  // namespace cnnkern
