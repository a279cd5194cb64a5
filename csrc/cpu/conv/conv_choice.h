// Which kernel of conv_kernels.h computes a part of a block: by its width, stride and taps.
#pragma once

#include <type_traits>

#include "cpu/conv/conv_blocks.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// Calls f with the number of taps of a kernel row as a constant if it is one of kTaps, else with 0: any number.
template <int... kTaps, typename F>
void with_taps(int64_t taps, const F& f) {
  const bool found = ((kKeepsTaps && taps == kTaps && (f(std::integral_constant<int, kKeepsTaps ? kTaps : 0>{}), true)) || ...);
  if (!found) f(std::integral_constant<int, 0>{});
}

// One part's sums over its taps; `step` pixels of the plane lie between the first taps of two neighbouring outputs.
inline void sums(const Geometry& g, const OutputPlane& s, int64_t step, int64_t plane) {
  const auto narrow = [&](auto taps) {
    constexpr int K = decltype(taps)::value, strided = K >= 3 ? K : 0, few = K <= 3 ? K : 0, few_strided = K == 3 ? 3 : 0;
    if (g.width == 1) return step == 1 ? narrow_sums<1, 1, K>(s) : narrow_sums<1, 2, strided>(s);
    if (g.width == 2) return step == 1 ? narrow_sums<2, 1, 0>(s) : narrow_sums<2, 2, 0>(s);
    if (g.width == 4) return step == 1 ? narrow_sums<4, 1, few>(s) : narrow_sums<4, 2, few_strided>(s);
    if constexpr (kNarrow == 8) step == 1 ? narrow_sums<8, 1, few>(s) : narrow_sums<8, 2, few_strided>(s);
  };
  const auto wide = [&](auto taps) {
    constexpr int K = decltype(taps)::value, strided = K >= 3 ? K : 0;
    if (g.lanes() == kPlane)
      return step == 1 ? wide_sums<kPlane, 1, K>(s, g.width, plane) : wide_sums<kPlane, 2, strided>(s, g.width, plane);
    if constexpr (kPlane != 8)
      step == 1 ? wide_sums<8, 1, K>(s, g.width, plane) : wide_sums<8, 2, strided>(s, g.width, plane);
  };
  g.narrow() ? with_taps<1, 2, 3, 5, 7>(s.taps, narrow) : with_taps<1, 2, 3>(s.taps, wide);
}

// The gradient of a narrow part, into (kernel rows, taps, channels of a group, kPlane).
inline void narrow_gradient(const Geometry& g, const Products& s, float* out) {
  const int64_t pitch = g.kw * g.width * kPlane;
  const auto rows = [&](auto width, auto step, auto taps, auto most) {  // as many kernel rows at once as registers hold
    constexpr int kWidth = decltype(width)::value, kStep = decltype(step)::value, K = decltype(taps)::value;
    constexpr int R = decltype(most)::value;
    for (int c = 0; c < kWidth; ++c) {
      int64_t row = 0;
      for (; row + R <= g.kh; row += R) narrow_products<R, kWidth, kStep, K>(s.of_kernel_rows(row, R), c, out + row * pitch);
      for (; row < g.kh; ++row) narrow_products<1, kWidth, kStep, K>(s.of_kernel_rows(row, 1), c, out + row * pitch);
    }
  };
  using std::integral_constant;
  constexpr integral_constant<int, 1> one;
  constexpr integral_constant<int, 4> four;
  constexpr integral_constant<int, 8> eight;
  const auto with_step = [&](auto width, auto taps, auto most) {
    g.stride == 1 ? rows(width, one, taps, most) : rows(width, integral_constant<int, 2>{}, taps, most);
  };
  if constexpr (kKeepsTaps) {
    constexpr integral_constant<int, 3> three;
    if (g.width == 1 && g.kw == 3) return with_step(one, three, three);
    if (g.width == 1 && g.kw == 5) return with_step(one, integral_constant<int, 5>{}, integral_constant<int, kManyRegisters ? 5 : 1>{});
    if (g.width == 1 && g.kw == 7) return with_step(one, integral_constant<int, 7>{}, integral_constant<int, kManyRegisters ? 2 : 1>{});
    if (g.width == 4 && g.kw == 3) return with_step(four, three, three);
    if constexpr (kNarrow == 8)
      if (g.width == 8 && g.kw == 3) return with_step(eight, three, three);
  }
  const auto any_taps = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t row = 0; row < g.kh; ++row)
      for (int c = 0; c < kWidth; ++c) {
        int64_t k = 0;
        const auto some = [&](auto taps) {
          constexpr int K = decltype(taps)::value;
          for (; k + K <= g.kw; k += K) {
            Products part = s.of_kernel_rows(row, 1);
            part.in += k * kPlane;
            some_products<K, kWidth>(part, c, out + row * pitch + k * kWidth * kPlane);
          }
        };
        some(eight);
        some(four);
        some(one);
      }
  };
  if (g.width == 1) return any_taps(one);
  if (g.width == 2) return any_taps(integral_constant<int, 2>{});
  if (g.width == 4) return any_taps(four);
  if constexpr (kNarrow == 8) any_taps(eight);
}

// The gradient of a wide part, whose group's channels begin at `s.in`.
template <int L>
void wide_gradient(const Geometry& g, const Products& s, int64_t plane, float* out) {
  const auto taps = [&](auto step, auto k, int64_t ky, int64_t kx) {
    constexpr int kStep = decltype(step)::value, K = decltype(k)::value;
    constexpr int I = K > 1 && !kManyRegisters ? 2 : 4;  // channels whose sums fit into registers
    const Products row = s.of_kernel_rows(ky, 1);
    float* o = out + (ky * g.kw + kx) * g.width * L;
    for (int64_t i = 0; i < g.width; i += I) {
      Products part = row;
      part.in += kx * kPlane + i / kPlane * plane + i % kPlane;
      wide_products<L, kStep, K, I>(part, o + i * L, g.width * L);
    }
  };
  using std::integral_constant;
  for (int64_t ky = 0; ky < g.kh; ++ky) {
    int64_t kx = 0;
    for (; kKeepsTaps && kx + 3 <= g.kw; kx += 3)
      g.stride == 1 ? taps(integral_constant<int, 1>{}, integral_constant<int, 3>{}, ky, kx)
                    : taps(integral_constant<int, 2>{}, integral_constant<int, 3>{}, ky, kx);
    for (; kx < g.kw; ++kx) taps(integral_constant<int, 1>{}, integral_constant<int, 1>{}, ky, kx);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
