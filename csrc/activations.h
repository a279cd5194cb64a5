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

// The functions that activations are written with. csrc/cpu/vec.h specialises it for vectors.
template <typename V>
struct Lanewise {
  // max(v, 0); NaN stays NaN.
  static CNNKERN_HOST_DEVICE V relu(V v) { return v <= V(0) ? V(0) : v; }
  static CNNKERN_HOST_DEVICE V exp(V v) { return ::exp(v); }
  static CNNKERN_HOST_DEVICE V expm1(V v) { return ::expm1(v); }
  static CNNKERN_HOST_DEVICE V erfc(V v) { return ::erfc(v); }
  static CNNKERN_HOST_DEVICE V divide(V a, V b) { return a / b; }
  // x <= bound ? a : b, lane by lane, and x < bound ? a : b; b where x is NaN.
  static CNNKERN_HOST_DEVICE V where_le(V x, V bound, V a, V b) { return x <= bound ? a : b; }
  static CNNKERN_HOST_DEVICE V where_lt(V x, V bound, V a, V b) { return x < bound ? a : b; }
};

// The same, for a result that is rounded to T. csrc/cuda/approximate.cuh specialises it for T of 16 bits.
template <typename T, typename V>
struct Rounded : Lanewise<V> {};

// erfc within 1.5e-7, by the exponential and the quotient of W: Abramowitz and Stegun, Handbook of Mathematical Functions,
// 7.1.26, which PyTorch has for its vectors of float too.
template <typename W, typename V>
CNNKERN_HOST_DEVICE V short_erfc(V v) {
  const V t = W::divide(V(1), V(1) + V(0.3275911) * W::where_lt(v, V(0), V(0) - v, v));
  const V p = V(0.254829592) + t * (V(-0.284496736) + t * (V(1.421413741) + t * (V(-1.453152027) + t * V(1.061405429))));
  const V tail = p * t * W::exp(V(0) - v * v);
  return W::where_lt(v, V(0), V(2) - tail, tail);
}

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

// The others, selected at run time: they take little of the time, and a branch that always goes the same way takes none
// in a memory-bound kernel, while a type for each would be one more copy of every kernel.
struct OtherActivation {
  enum Kind { kRelu6, kLeakyRelu, kSigmoid, kSilu, kHardswish, kElu, kGelu, kGeluTanh, kMish, kHardsigmoid };
  Kind kind;
  double param = 0;  // the slope of leaky_relu below 0, or alpha of elu

  template <typename T, typename V>
  CNNKERN_HOST_DEVICE V value(V pre) const {
    using W = Rounded<T, V>;
    switch (kind) {
      case kRelu6: return clamp6(W::relu(pre));
      case kLeakyRelu: return W::where_le(pre, V(0), pre * V(param), pre);
      case kSigmoid: return sigmoid<W>(pre);
      case kSilu: return W::divide(pre, V(1) + W::exp(V(0) - pre));
      case kHardswish: return pre * clamp6(W::relu(pre + V(3))) * V(1.0 / 6);
      case kElu: return W::where_lt(V(0), pre, pre, V(param) * W::expm1(pre));
      case kGelu: return pre * (V(0.5) * W::erfc(pre * V(-kSqrtHalf)));  // 1 + erf(...) would cancel below 0
      // 1 + tanh(u) is 2 / (1 + exp(-2 u)), in which nothing cancels.
      case kGeluTanh: return W::divide(pre, V(1) + W::exp(V(0) - twice_inner(pre)));
      case kMish: return pre * Softplus<W, V>(pre).tanh();
      default: return clamp6(W::relu(pre + V(3))) * V(1.0 / 6);
    }
  }

  template <typename T, typename V>
  CNNKERN_HOST_DEVICE V grad(V dy, V pre) const {
    using W = Rounded<T, V>;
    switch (kind) {
      // NaN has the gradient that PyTorch gives it: here 0, and below the slope.
      case kRelu6: return W::where_lt(V(rounds_to_zero<T>()), pre, W::where_lt(pre, V(6), dy, V(0)), V(0));
      case kLeakyRelu: return W::where_lt(V(0), pre, dy, dy * V(param));
      case kSigmoid: {
        const V s = sigmoid<W>(pre);
        return dy * (V(1) - s) * s;
      }
      case kSilu: {
        const V s = sigmoid<W>(pre);
        return dy * s * (V(1) + pre * (V(1) - s));
      }
      case kHardswish:
        return W::where_le(pre, V(-3), V(0), W::where_le(V(3), pre, dy, dy * (pre * V(1.0 / 3) + V(0.5))));
      case kElu: return W::where_lt(V(0), pre, dy, dy * V(param) * W::exp(pre));
      case kGelu: {
        const V z = pre * V(-kSqrtHalf);  // so that erfc's exponential is the same
        return dy * (V(0.5) * W::erfc(z) + pre * (V(kInverseSqrtTwoPi) * W::exp(V(0) - z * z)));
      }
      case kGeluTanh: {
        // s = sigmoid(v) and s (1 - s), by the exponential of a negative number.
        const V v = twice_inner(pre), e = W::exp(W::where_lt(v, V(0), v, V(0) - v)), r = W::divide(V(1), V(1) + e);
        const V s = W::where_lt(v, V(0), e * r, r);
        return dy * (s + pre * (e * r * r) * (V(2 * kSqrtTwoOverPi) + V(6 * kSqrtTwoOverPi * kCubic) * pre * pre));
      }
      case kMish: {
        const Softplus<W, V> softplus(pre);
        return dy * (softplus.tanh() + pre * softplus.tanh_slope(pre));
      }
      // In float64 too PyTorch has a sixth in single precision here.
      default: return W::where_lt(V(-3), pre, W::where_lt(pre, V(3), dy * V(1.0f / 6), V(0)), V(0));
    }
  }

 private:
  static constexpr double kSqrtHalf = 0.70710678118654752440, kInverseSqrtTwoPi = 0.39894228040143267794;
  static constexpr double kSqrtTwoOverPi = 0.79788456080286535588, kCubic = 0.044715;  // of gelu's tanh form

  template <typename V>
  static CNNKERN_HOST_DEVICE V clamp6(V v) { return Lanewise<V>::where_le(V(6), v, V(6), v); }
  template <typename W, typename V>
  static CNNKERN_HOST_DEVICE V sigmoid(V v) { return W::divide(V(1), V(1) + W::exp(V(0) - v)); }
  template <typename V>
  static CNNKERN_HOST_DEVICE V twice_inner(V v) { return v * (V(2 * kSqrtTwoOverPi) + V(2 * kSqrtTwoOverPi * kCubic) * v * v); }

  // tanh(log(1 + e)), e = exp(v), is n / (n + 2) with n = e (e + 2). Beyond v = 20 it is 1, and e would overflow.
  template <typename W, typename V>
  struct Softplus {
    V e, n, r;
    explicit CNNKERN_HOST_DEVICE Softplus(V v)
        : e(W::exp(W::where_lt(V(20), v, V(20), v))), n(e * (e + V(2))), r(W::divide(V(1), n + V(2))) {}
    CNNKERN_HOST_DEVICE V tanh() const { return n * r; }
    // Its derivative by v.
    CNNKERN_HOST_DEVICE V tanh_slope(V v) const { return W::where_lt(V(20), v, V(0), V(4) * (e * (V(1) + e) * r) * r); }
  };
};

// Two of them as types, for CUDA: there the branch, and the registers of the others, take time.
template <OtherActivation::Kind kKind>
struct ChosenActivation {
  template <typename T, typename V>
  static CNNKERN_HOST_DEVICE V value(V pre) { return OtherActivation{kKind}.value<T>(pre); }
  template <typename T, typename V>
  static CNNKERN_HOST_DEVICE V grad(V dy, V pre) { return OtherActivation{kKind}.grad<T>(dy, pre); }
};
struct Relu6 : ChosenActivation<OtherActivation::kRelu6> {};
struct Silu : ChosenActivation<OtherActivation::kSilu> {};

}  // namespace cnnkern
