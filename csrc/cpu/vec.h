// Vectors of the arithmetic type (float, or double for double) over at::vec: loads that widen, stores that round to
// nearest even, both with a partial form for the ends of a run, and streaming stores.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <type_traits>

#include "activations.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
using Vec = at::vec::Vectorized<compute_t<T>>;
template <typename T>
constexpr int64_t kLanes = Vec<T>::size();

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// A vector of float rounded to the 16-bit type T, in half a register.
template <typename T>
inline auto narrow(Vec<T> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return at::vec::cvtfp32_bf16(v);
  else
    return at::vec::cvtfp32_fp16(v);
}
#endif

template <typename T>
inline Vec<T> vload(const T* p) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return Vec<T>::loadu(p);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    __m512 v;
    at::vec::cvt_to_fp32<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), v);
    return v;
#elif defined(CPU_CAPABILITY_AVX2)
    __m256 v;
    at::vec::cvt_to_fp32<T>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), v);
    return v;
#else
    float wide[kLanes<T>];
    for (int64_t j = 0; j < kLanes<T>; ++j) wide[j] = p[j];
    return Vec<T>::loadu(wide);
#endif
  }
}

// The first n lanes of a, the others of b.
template <typename S>
inline at::vec::Vectorized<S> first_lanes(const at::vec::Vectorized<S>& a, int64_t n, const at::vec::Vectorized<S>& b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<S, float>)
    return _mm512_mask_blend_ps((1u << n) - 1, b, a);
  else
    return _mm512_mask_blend_pd((1u << n) - 1, b, a);
#else
  using V = at::vec::Vectorized<S>;
  return V::blendv(b, a, V::arange(0, 1) < V(static_cast<S>(n)));
#endif
}

// The first n lanes from p, the others from `rest`; reads no further than p[n - 1].
template <typename T>
inline Vec<T> vload(const T* p, int64_t n, Vec<T> rest) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_loadu_ps(rest, (1u << n) - 1, p);
  if constexpr (std::is_same_v<T, double>) return _mm512_mask_loadu_pd(rest, (1u << n) - 1, p);
  if constexpr (sizeof(T) == 2) {
    __m512 v;
    at::vec::cvt_to_fp32<T>(_mm256_maskz_loadu_epi16((1u << n) - 1, p), v);
    return _mm512_mask_blend_ps((1u << n) - 1, rest, v);
  }
#endif
  T narrow[kLanes<T>] = {};
  std::memcpy(static_cast<void*>(narrow), p, n * sizeof(T));
  return Vec<T>::set(rest, vload(narrow), n);
}

template <typename T>
inline void vstore(T* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    v.store(p);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow<T>(v));
#elif defined(CPU_CAPABILITY_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow<T>(v));
#else
    float wide[kLanes<T>];
    v.store(wide);
    for (int64_t j = 0; j < kLanes<T>; ++j) p[j] = wide[j];
#endif
  }
}

template <typename T>
inline void vstore(T* p, Vec<T> v, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
  if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, (1u << n) - 1, narrow<T>(v));
#endif
  T narrow[kLanes<T>];
  vstore(narrow, v);
  std::memcpy(static_cast<void*>(p), narrow, n * sizeof(T));
}

// A store that goes past the caches; p is aligned to a whole vector.
template <typename T>
inline void vstream(T* p, Vec<T> v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, v);
  if constexpr (std::is_same_v<T, double>) return _mm512_stream_pd(p, v);
  if constexpr (sizeof(T) == 2)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow<T>(v));
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_stream_ps(p, v);
  if constexpr (std::is_same_v<T, double>) return _mm256_stream_pd(p, v);
  if constexpr (sizeof(T) == 2)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow<T>(v));
#endif
  vstore(p, v);
}

// `stream` is constant for a whole kernel: the branch is always predicted, and there is half the code to compile.
template <typename T>
inline void vput(T* p, Vec<T> v, bool stream) {
  stream ? vstream(p, v) : vstore(p, v);
}

// One bit per lane: where !(x <= bound), NaN included.
template <typename S>
inline uint32_t bits_above(const at::vec::Vectorized<S>& x, const at::vec::Vectorized<S>& bound) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<S, float>)
    return _mm512_cmp_ps_mask(x, bound, _CMP_NLE_UQ);
  else
    return _mm512_cmp_pd_mask(x, bound, _CMP_NLE_UQ);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<S, float>)
    return _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_NLE_UQ));
  else
    return _mm256_movemask_pd(_mm256_cmp_pd(x, bound, _CMP_NLE_UQ));
#else
  constexpr int n = at::vec::Vectorized<S>::size();
  S lanes[n], bounds[n];
  x.store(lanes), bound.store(bounds);
  uint32_t bits = 0;
  for (int j = 0; j < n; ++j) bits |= static_cast<uint32_t>(!(lanes[j] <= bounds[j])) << j;
  return bits;
#endif
}

// v where its lane's bit is set, else 0.
template <typename S>
inline at::vec::Vectorized<S> zero_unless(const at::vec::Vectorized<S>& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<S, float>)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
  else
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<S, float>) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(set));
  } else {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane);
    return _mm256_and_pd(v, _mm256_castsi256_pd(set));
  }
#else
  constexpr int n = at::vec::Vectorized<S>::size();
  S lanes[n];
  v.store(lanes);
  for (int j = 0; j < n; ++j) lanes[j] = (bits >> j & 1) != 0 ? lanes[j] : S(0);
  return at::vec::Vectorized<S>::loadu(lanes);
#endif
}

// Orders this thread's streaming stores before what another thread does next.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Adds the lanes of v to wide[0 .. lanes), in double.
template <typename S>
inline void add_lanes(double* wide, const at::vec::Vectorized<S>& v) {
  constexpr int n = at::vec::Vectorized<S>::size();
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(wide, _mm512_add_pd(_mm512_loadu_pd(wide), low));
    _mm512_storeu_pd(wide + 8, _mm512_add_pd(_mm512_loadu_pd(wide + 8), high));
    return;
  }
#endif
  alignas(64) S lanes[n];
  v.store(lanes);
  for (int j = 0; j < n; ++j) wide[j] += static_cast<double>(lanes[j]);
}

// The sum of `n` doubles, a power of two: in pairs, as each addition would otherwise wait for the one before.
template <int n>
inline double sum_pairwise(const double* p) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (n == 16) return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)));
  if constexpr (n == 8) return _mm512_reduce_add_pd(_mm512_loadu_pd(p));
#endif
  if constexpr (n == 1)
    return *p;
  else
    return sum_pairwise<n / 2>(p) + sum_pairwise<n / 2>(p + n / 2);
}

#if defined(CPU_CAPABILITY_AVX512)
inline __m256 fold(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline __m256d fold(__m512d v) { return _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)); }
#elif defined(CPU_CAPABILITY_AVX2)
inline __m256 fold(__m256 v) { return v; }
inline __m256d fold(__m256d v) { return v; }
#endif

// The sums of the lanes of four vectors, in double.
template <typename S>
inline void sum_lanes(const at::vec::Vectorized<S> (&v)[4], double* sums) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<S, float>) {
    const __m256 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm256_storeu_pd(sums, _mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1))));
  } else {
    const __m256d ab = _mm256_hadd_pd(fold(v[0]), fold(v[1])), cd = _mm256_hadd_pd(fold(v[2]), fold(v[3]));
    const __m256d low = _mm256_permute2f128_pd(ab, cd, 0x20), high = _mm256_permute2f128_pd(ab, cd, 0x31);
    _mm256_storeu_pd(sums, _mm256_add_pd(low, high));
  }
#else
  constexpr int n = at::vec::Vectorized<S>::size();
  for (int i = 0; i < 4; ++i) {
    S lanes[n];
    v[i].store(lanes);
    for (int half = n / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    sums[i] = lanes[0];
  }
#endif
}

// exp, within two units in the last place. at::vec's own is a call into another library, around which every register
// is saved; this one is inlined. exp(x) = 2^n * exp(r) with |r| <= log(2) / 2, and exp(r) by its series.
template <typename S>
inline at::vec::Vectorized<S> inline_exp(const at::vec::Vectorized<S>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    // Beyond these the result is infinite or zero; NaN is the second operand, and stays.
    const __m512 v = _mm512_max_ps(_mm512_set1_ps(-105.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), v);  // log(2) in two parts, the first exact times n
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(p, n);
  }
#endif
  return x.exp();
}

}  // namespace CPU_CAPABILITY

// The immediate operands of AVX's compare instructions, ordered: false for NaN.
constexpr int kLess = 0x11, kLessOrEqual = 0x12;

template <typename S>
struct Lanewise<at::vec::Vectorized<S>> {
  using V = at::vec::Vectorized<S>;
  static V relu(const V& v) { return at::vec::clamp_min(v, V(0)); }
  static V exp(const V& v) { return inline_exp(v); }
  // Of v <= 0. at::vec's are ten times slower in float.
  static V expm1(const V& v) {
    if constexpr (std::is_same_v<S, double>) return v.expm1();
    V p = V(1.0 / 5040);
    for (const double coefficient : {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0}) p = at::vec::fmadd(p, v, V(coefficient));
    return where_lt(V(-0.25), v, p * v, exp(v) - V(1));  // near 0, where the difference cancels, by its series
  }
  static V erfc(const V& v) {
    if constexpr (std::is_same_v<S, double>) return v.erfc();
    return short_erfc<Lanewise>(v);
  }
  static V divide(const V& a, const V& b) { return a / b; }
  static V where_le(const V& x, const V& bound, const V& a, const V& b) { return where<kLessOrEqual>(x, bound, a, b); }
  static V where_lt(const V& x, const V& bound, const V& a, const V& b) { return where<kLess>(x, bound, a, b); }

 private:
  template <int kCompare>
  static V where(const V& x, const V& bound, const V& a, const V& b) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<S, float>)
      return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, kCompare), b, a);
    else
      return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, bound, kCompare), b, a);
#else
    return V::blendv(b, a, kCompare == kLessOrEqual ? x <= bound : x < bound);
#endif
  }
};

}  // namespace cnnkern
