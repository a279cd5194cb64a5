// The innermost loops of grouped convolution, on the planes of conv_tile.h. Two families:
//
// narrow, groups of 1, 2 or 4 channels: a lane is an output channel, and the plane holds each pixel once for every
// channel of a group, that channel in all lanes of its group (store_copies). So a tap of the kernel and a channel of
// the group are alike: one product of two vectors.
// wide: all lanes are output channels of one group, and each input channel is broadcast from memory.
//
// An output row is cut into runs of up to kRun pixels, whose sums stay in registers while the taps pass by.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/conv_tile.h"
#include "cpu/sweep.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// L floats in a register; half a register where a group has no more channels than that.
template <int L>
struct Simd {
  float lanes[L];
  static Simd load(const float* p) {
    Simd v;
    std::memcpy(v.lanes, p, sizeof v.lanes);
    return v;
  }
  static Simd all(float value) {
    Simd v;
    std::fill_n(v.lanes, L, value);
    return v;
  }
  void store(float* p) const { std::memcpy(p, lanes, sizeof lanes); }
  static Simd fma(const Simd& a, const Simd& b, Simd c) {
    for (int i = 0; i < L; ++i) c.lanes[i] += a.lanes[i] * b.lanes[i];
    return c;
  }
};
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <>
struct Simd<8> {
  __m256 v;
  static Simd load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Simd all(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Simd fma(const Simd& a, const Simd& b, const Simd& c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};
#endif
#if defined(CPU_CAPABILITY_AVX512)
template <>
struct Simd<16> {
  __m512 v;
  static Simd load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Simd all(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Simd fma(const Simd& a, const Simd& b, const Simd& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};
#endif

// Calls f with each run of `columns` pixels as a constant: f(integral_constant<int, J>, first).
template <typename F>
void over_runs(int64_t columns, const F& f) {
  const auto cut = [&](auto run, int64_t first) {
    constexpr int64_t J = decltype(run)::value;
    for (; first + J <= columns; first += J) f(run, first);
    return first;
  };
  int64_t first = cut(std::integral_constant<int, 14>{}, 0);  // planes are multiples of 7 wide more often than not
  first = cut(std::integral_constant<int, 8>{}, first);
  first = cut(std::integral_constant<int, 7>{}, first);
  first = cut(std::integral_constant<int, 4>{}, first);
  cut(std::integral_constant<int, 1>{}, first);
}

// Where the runs of a plane of outputs read and write; strides in floats.
struct Sweep {
  const float* in;        // first tap of the first output
  int64_t in_row;         // from an output row to the next
  int64_t in_pitch;       // from a kernel row to the next
  const float* weight;    // (kernel_rows, taps, L)
  int64_t kernel_rows, taps;  // taps of a kernel row; narrow: times the channels of a group
  const float* bias;      // L floats
  float* out;
  int64_t out_row, out_column;
  int64_t rows, columns;
  // Rows of the plane that lie in the image, counted from the first output's first kernel row; the others are zero. An
  // output row begins `row_step` rows below the one before.
  int64_t first_row, last_row, row_step;

  // Kernel rows that meet the image from this output row.
  std::pair<int64_t, int64_t> kernel_rows_at(int64_t row) const {
    const int64_t begin = std::clamp<int64_t>(first_row - row * row_step, 0, kernel_rows);
    return {begin, std::clamp<int64_t>(last_row - row * row_step, begin, kernel_rows)};
  }
};

// kStep: vectors in the plane from one output pixel's first tap to the next one's.
template <int kStep>
void narrow_sums(const Sweep& s) {
  using V = Simd<kPlane>;
  over_runs(s.columns, [&](auto run, int64_t first) {
    constexpr int J = decltype(run)::value;
    for (int64_t row = 0; row < s.rows; ++row) {
      V sum[J];
      for (int j = 0; j < J; ++j) sum[j] = V::load(s.bias);
      const auto [begin, end] = s.kernel_rows_at(row);
      const float* w = s.weight + begin * s.taps * kPlane;
      for (int64_t r = begin; r < end; ++r) {
        const float* p = s.in + row * s.in_row + r * s.in_pitch + first * kStep * kPlane;
        for (int64_t t = 0; t < s.taps; ++t, p += kPlane, w += kPlane) {
          const V tap = V::load(w);
          for (int j = 0; j < J; ++j) sum[j] = V::fma(V::load(p + j * kStep * kPlane), tap, sum[j]);
        }
      }
      float* out = s.out + row * s.out_row + first * s.out_column;
      for (int j = 0; j < J; ++j) sum[j].store(out + j * s.out_column);
    }
  });
}

// As narrow_sums, where a tap is the `width` channels of a group from `in` on, in planes that are `plane` apart.
template <int L, int kStep>
void wide_sums(const Sweep& s, int64_t width, int64_t plane) {
  using V = Simd<L>;
  over_runs(s.columns, [&](auto run, int64_t first) {
    constexpr int J = decltype(run)::value;
    for (int64_t row = 0; row < s.rows; ++row) {
      V sum[J];
      for (int j = 0; j < J; ++j) sum[j] = V::load(s.bias);
      const auto [begin, end] = s.kernel_rows_at(row);
      const float* w = s.weight + begin * s.taps * width * L;
      for (int64_t r = begin; r < end; ++r) {
        const float* p = s.in + row * s.in_row + r * s.in_pitch + first * kStep * kPlane;
        for (int64_t t = 0; t < s.taps; ++t, p += kPlane) {
          const float* q = p;
          for (int64_t c = 0; c < width; c += kPlane, q += plane) {
            const int64_t channels = std::min<int64_t>(kPlane, width - c);
            for (int64_t i = 0; i < channels; ++i, w += L) {
              const V tap = V::load(w);
              for (int j = 0; j < J; ++j) sum[j] = V::fma(V::all(q[j * kStep * kPlane + i]), tap, sum[j]);
            }
          }
        }
      }
      float* out = s.out + row * s.out_row + first * s.out_column;
      for (int j = 0; j < J; ++j) sum[j].store(out + j * s.out_column);
    }
  });
}

// Where the gradient of the weight reads; strides in floats.
struct Products {
  const float* dy;
  int64_t dy_row;
  const float* in;  // the input at the kernel's first tap
  int64_t in_row, in_pixel, in_pitch;  // from an output row, from an output pixel, from a kernel row to the next
  int64_t rows, columns;
  int64_t first_row, last_row, row_step;  // as of a Sweep

  // From kernel row `row` on; only output rows from which one of `count` kernel rows meets the image.
  Products of_kernel_rows(int64_t row, int64_t count) const {
    Products part = *this;
    part.in += row * in_pitch;
    const int64_t begin = std::clamp<int64_t>(divup(std::max<int64_t>(first_row - row - count + 1, 0), row_step), 0, rows);
    const int64_t end = last_row > row ? std::clamp<int64_t>((last_row - row - 1) / row_step + 1, begin, rows) : begin;
    part.dy += begin * dy_row;
    part.in += begin * in_row;
    part.rows = end - begin;
    return part;
  }
};

// Adds the sums over all pixels of dy * in to R rows of K vectors, `pitch` floats apart.
template <int R, int K>
void narrow_products(const Products& s, float* out, int64_t pitch) {
  using V = Simd<kPlane>;
  V sum[R][K];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) sum[r][k] = V::all(0);
  for (int64_t row = 0; row < s.rows; ++row) {
    const float *d = s.dy + row * s.dy_row, *p = s.in + row * s.in_row;
    for (int64_t j = 0; j < s.columns; ++j, d += kPlane, p += s.in_pixel) {
      const V gradient = V::load(d);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < K; ++k) sum[r][k] = V::fma(V::load(p + r * s.in_pitch + k * kPlane), gradient, sum[r][k]);
    }
  }
  const V one = V::all(1);
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) V::fma(one, V::load(out + r * pitch + k * kPlane), sum[r][k]).store(out + r * pitch + k * kPlane);
}

// The same for K taps of I channels each: `out` has I vectors of L floats a tap, taps `tap` floats apart.
template <int L, int K, int I>
void wide_products(const Products& s, float* out, int64_t tap) {
  using V = Simd<L>;
  V sum[K][I];
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < I; ++i) sum[k][i] = V::all(0);
  for (int64_t row = 0; row < s.rows; ++row) {
    const float *d = s.dy + row * s.dy_row, *p = s.in + row * s.in_row;
    for (int64_t j = 0; j < s.columns; ++j, d += kPlane, p += s.in_pixel) {
      const V gradient = V::load(d);
      for (int k = 0; k < K; ++k)
        for (int i = 0; i < I; ++i) sum[k][i] = V::fma(V::all(p[k * kPlane + i]), gradient, sum[k][i]);
    }
  }
  const V one = V::all(1);
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < I; ++i) V::fma(one, V::load(out + k * tap + i * L), sum[k][i]).store(out + k * tap + i * L);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
