// The innermost loops of grouped convolution, on the planes of conv_tile.h. Two families:
//
// narrow, groups of 1, 2 or 4 channels, or of 8 in vectors of 16: a lane is an output channel. A pixel meets the weights
// of one channel of each group after the other, spread over the lanes of its group (Spread). So a tap of the kernel and
// a channel of the group are alike: one product of two vectors.
// wide: all lanes are output channels of one group, and each input channel is broadcast from memory.
//
// An output row is cut into runs of up to kRun pixels, whose sums stay in registers while the taps pass by.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/conv/conv_tile.h"
#include "cpu/passes.h"

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
  void put(float* p, bool) const { store(p); }
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
  void put(float* p, bool stream) const { stream ? _mm256_stream_ps(p, v) : store(p); }
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
  void put(float* p, bool stream) const { stream ? _mm512_stream_ps(p, v) : store(p); }
  static Simd fma(const Simd& a, const Simd& b, const Simd& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};
#endif

constexpr int kNarrow = kPlane == 16 ? 8 : 4;  // channels of the widest narrow group

// Reads a vector of channels, and puts channel `channel` of each group of kWidth into all lanes of its group.
template <int kWidth>
class Spread {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  explicit Spread(int channel) : lanes_(_mm512_or_si512(_mm512_and_si512(kLane, _mm512_set1_epi32(-kWidth)), _mm512_set1_epi32(channel))) {}
  Simd<kPlane> operator()(const float* p) const {
    const __m512 v = _mm512_loadu_ps(p);
    if constexpr (kWidth == 1) return {v};
    if constexpr (kWidth <= 4) return {_mm512_permutevar_ps(v, lanes_)};  // lanes count within quarters, modulo 4
    return {_mm512_permutexvar_ps(lanes_, v)};
  }

 private:
  inline static const __m512i kLane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i lanes_;
#elif defined(CPU_CAPABILITY_AVX2)
  explicit Spread(int channel) : lanes_(_mm256_or_si256(_mm256_setr_epi32(at(0), at(1), at(2), at(3), at(0), at(1), at(2), at(3)), _mm256_set1_epi32(channel))) {}
  Simd<kPlane> operator()(const float* p) const {
    const __m256 v = _mm256_loadu_ps(p);
    if constexpr (kWidth == 1) return {v};
    return {_mm256_permutevar_ps(v, lanes_)};
  }

 private:
  static constexpr int at(int lane) { return lane / kWidth * kWidth; }
  __m256i lanes_;
#else
  explicit Spread(int channel) : channel_(channel) {}
  Simd<kPlane> operator()(const float* p) const {
    Simd<kPlane> v;
    for (int i = 0; i < kPlane; ++i) v.lanes[i] = p[i / kWidth * kWidth + channel_];
    return v;
  }

 private:
  int channel_;
#endif
};

// Sums stay in registers only where everything between them and the loop is inlined.
#define CNNKERN_INLINED __attribute__((always_inline))
#define CNNKERN_INLINE inline CNNKERN_INLINED

constexpr bool kManyRegisters = kPlane == 16;
#if defined(CPU_CAPABILITY_DEFAULT)
constexpr bool kKeepsTaps = false;  // registers of four floats are too few for the taps of a row, or pixels of a run
#else
constexpr bool kKeepsTaps = true;
#endif

constexpr int kRun = kManyRegisters ? 14 : 8;  // pixels whose sums are kept in registers

// Calls f with each run of `columns` pixels as a constant, f(integral_constant<int, J>, first): the longest that fit of
// those of at most kMost pixels. Planes are multiples of 7 wide more often than not.
template <int kMost, typename F>
CNNKERN_INLINE void over_runs(int64_t columns, const F& f) {
  const auto cut = [&](auto run, int64_t first) CNNKERN_INLINED {
    constexpr int64_t J = decltype(run)::value;
    if constexpr (J <= kMost)
      for (; first + J <= columns; first += J) f(run, first);
    return first;
  };
  int64_t first = cut(std::integral_constant<int, 14>{}, 0);
  first = cut(std::integral_constant<int, 8>{}, first);
  first = cut(std::integral_constant<int, 7>{}, first);
  first = cut(std::integral_constant<int, 4>{}, first);
  cut(std::integral_constant<int, 1>{}, first);
}

// Calls f with 0, 1 ... N - 1, each a constant.
template <int N, typename F>
CNNKERN_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) CNNKERN_INLINED {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Adds to J outputs what the taps of one kernel row give, `value(i)` being the plane's pixel i from the first output's
// first tap on. Each pixel is read once and meets every tap, which registers hold: as many reads as multiplications
// would keep the multipliers waiting.
template <int J, int kStep, int kTaps, typename V, typename Value>
CNNKERN_INLINE void add_row(V (&sum)[J], const V (&tap)[kTaps], const Value& value) {
  unrolled<(J - 1) * kStep + kTaps>([&](auto pixel) CNNKERN_INLINED {
    constexpr int i = decltype(pixel)::value;
    const V v = value(i);
    unrolled<kTaps>([&](auto k) CNNKERN_INLINED {
      constexpr int t = decltype(k)::value, j = (i - t) / kStep;
      if constexpr (i >= t && (i - t) % kStep == 0 && j < J) sum[j] = V::fma(v, tap[t], sum[j]);
    });
  });
}

// Where the runs of a plane of outputs read and write; strides in floats.
struct OutputPlane {
  const float* in;        // first tap of the first output
  int64_t in_row;         // from an output row to the next
  int64_t in_pitch;       // from a kernel row to the next
  const float* weight;    // (kernel_rows, taps, channels of a group, L)
  int64_t kernel_rows, taps;  // taps of a kernel row
  const float* bias;      // L floats, that each output begins with
  float* out;
  int64_t out_row, out_column;
  int64_t rows, columns;
  // Rows of the plane that lie in the image, counted from the first output's first kernel row; the others are zero. An
  // output row begins `row_step` rows below the one before.
  int64_t first_row, last_row, row_step;
  bool stream;  // whether the outputs go past the caches
  const float* sums = nullptr;  // what each output begins with instead: sums over earlier frames
  int64_t sums_row = 0, sums_column = 0;

  // Adds to what was written.
  void add() { sums = out, sums_row = out_row, sums_column = out_column; }

  // Writes somewhere else.
  void store(float* to, int64_t row, int64_t column, bool past_caches) {
    out = to, out_row = row, out_column = column, stream = past_caches;
  }

  template <typename V, size_t J>
  CNNKERN_INLINED void begin(V (&sum)[J], int64_t row, int64_t first) const {
    const float* const p = sums == nullptr ? nullptr : sums + row * sums_row + first * sums_column;
    for (size_t j = 0; j < J; ++j) sum[j] = V::load(p == nullptr ? bias : p + j * sums_column);
  }
  // Kernel rows that meet the image from this output row.
  std::pair<int64_t, int64_t> kernel_rows_at(int64_t row) const {
    const int64_t begin = std::clamp<int64_t>(first_row - row * row_step, 0, kernel_rows);
    return {begin, std::clamp<int64_t>(last_row - row * row_step, begin, kernel_rows)};
  }
};

// Groups of kWidth channels; kStep pixels of the plane lie between the first taps of two neighbouring outputs, and
// kTaps in a kernel row, or any number of them with 0.
template <int kWidth, int kStep, int kTaps>
void narrow_sums(const OutputPlane& s) {
  using V = Simd<kPlane>;
  constexpr int64_t tap_weights = kWidth * kPlane;
  over_runs<kTaps == 0 ? 7 : kRun>(s.columns, [&](auto run, int64_t first) CNNKERN_INLINED {
    constexpr int J = decltype(run)::value;
    for (int64_t row = 0; row < s.rows; ++row) {
      V sum[J];
      s.begin(sum, row, first);
      const auto [begin, end] = s.kernel_rows_at(row);
      for (int64_t r = begin; r < end; ++r) {
        const float* const p = s.in + row * s.in_row + r * s.in_pitch + first * kStep * kPlane;
        const float* w = s.weight + r * s.taps * tap_weights;
        for (int c = 0; c < kWidth; ++c, w += kPlane) {
          const Spread<kWidth> read(c);
          if constexpr (kTaps > 0) {
            V tap[kTaps];
            for (int t = 0; t < kTaps; ++t) tap[t] = V::load(w + t * tap_weights);
            add_row<J, kStep>(sum, tap, [&](int i) CNNKERN_INLINED { return read(p + i * kPlane); });
          } else {
            for (int64_t t = 0; t < s.taps; ++t) {
              const V tap = V::load(w + t * tap_weights);
              for (int j = 0; j < J; ++j) sum[j] = V::fma(read(p + (j * kStep + t) * kPlane), tap, sum[j]);
            }
          }
        }
      }
      float* out = s.out + row * s.out_row + first * s.out_column;
      for (int j = 0; j < J; ++j) sum[j].put(out + j * s.out_column, s.stream);
    }
  });
}

// As narrow_sums, where a tap is the `width` channels of a group from `in` on, in planes that are `plane` apart.
template <int L, int kStep, int kTaps>
void wide_sums(const OutputPlane& s, int64_t width, int64_t plane) {
  using V = Simd<L>;
  over_runs<kTaps == 0 ? 7 : kRun>(s.columns, [&](auto run, int64_t first) CNNKERN_INLINED {
    constexpr int J = decltype(run)::value;
    const auto rows = [&](auto together, int64_t row) CNNKERN_INLINED {
      constexpr int R = decltype(together)::value;
      V sum[R][J];
      unrolled<R>([&](auto at) CNNKERN_INLINED { s.begin(sum[at], row + at, first); });
      // Kernel rows that meet the image from one of the rows; what the others read of them is zero.
      const int64_t begin = s.kernel_rows_at(row + R - 1).first, end = s.kernel_rows_at(row).second;
      for (int64_t r = begin; r < end; ++r) {
        const float* p = s.in + row * s.in_row + r * s.in_pitch + first * kStep * kPlane;
        const float* w = s.weight + r * s.taps * width * L;
        for (int64_t c = 0; c < width; c += kPlane, p += plane) {
          for (int64_t i = 0; i < std::min<int64_t>(kPlane, width - c); ++i, w += L) {
            if constexpr (kTaps > 0) {
              V tap[kTaps];
              for (int t = 0; t < kTaps; ++t) tap[t] = V::load(w + t * width * L);
              unrolled<R>([&](auto at) CNNKERN_INLINED {
                const float* const q = p + at * s.in_row + i;
                add_row<J, kStep>(sum[at], tap, [&](int pixel) CNNKERN_INLINED { return V::all(q[pixel * kPlane]); });
              });
            } else {
              for (int64_t t = 0; t < s.taps; ++t) {
                const V tap = V::load(w + t * width * L);
                for (int j = 0; j < J; ++j) sum[0][j] = V::fma(V::all(p[(j * kStep + t) * kPlane + i]), tap, sum[0][j]);
              }
            }
          }
        }
      }
      unrolled<R * J>([&](auto i) CNNKERN_INLINED { sum[i / J][i % J].put(s.out + (row + i / J) * s.out_row + (first + i % J) * s.out_column, s.stream); });
    };
    // Each sum waits for the one before it: seven are too few to keep the multipliers busy.
    constexpr int kTogether = kManyRegisters && kTaps > 0 && J == 7 ? 2 : 1;
    int64_t row = 0;
    for (; row + kTogether <= s.rows; row += kTogether) rows(std::integral_constant<int, kTogether>{}, row);
    for (; row < s.rows; ++row) rows(std::integral_constant<int, 1>{}, row);
  });
}

// The same pixels, for the gradient of the weight: what meets tap k is added to sum[k].
template <int J, int kStep, int kTaps, typename V, typename Value>
CNNKERN_INLINE void add_products(V (&sum)[kTaps], const V (&gradient)[J], const Value& value) {
  unrolled<(J - 1) * kStep + kTaps>([&](auto pixel) CNNKERN_INLINED {
    constexpr int i = decltype(pixel)::value;
    const V v = value(i);
    unrolled<kTaps>([&](auto k) CNNKERN_INLINED {
      constexpr int t = decltype(k)::value, j = (i - t) / kStep;
      if constexpr (i >= t && (i - t) % kStep == 0 && j < J) sum[t] = V::fma(v, gradient[j], sum[t]);
    });
  });
}

// Where the gradient of the weight reads; strides in floats.
struct Products {
  const float* dy;
  int64_t dy_row;
  const float* in;  // the input at the kernel's first tap
  int64_t in_row, in_pixel, in_pitch;  // from an output row, from an output pixel, from a kernel row to the next
  int64_t rows, columns;
  int64_t first_row, last_row, row_step;  // as of an OutputPlane

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

// Adds v to the L floats at p.
template <typename V>
inline void add_to(float* p, const V& v) {
  V::fma(V::all(1), V::load(p), v).store(p);
}

// Adds the sums over all pixels of dy * in for R kernel rows of kTaps taps, of output channel c of the groups, to vector c of
// each of `out` (R, kTaps, kWidth, kPlane): a lane is an input channel here, as dy has fewer vectors to be spread than the input.
template <int R, int kWidth, int kStep, int kTaps>
void narrow_products(const Products& s, int c, float* out) {
  using V = Simd<kPlane>;
  const Spread<kWidth> spread(c);
  V sum[R][kTaps];
  unrolled<R * kTaps>([&](auto i) CNNKERN_INLINED { sum[i / kTaps][i % kTaps] = V::all(0); });
  constexpr int kRegisters = (kManyRegisters ? 32 : 16) - R * kTaps;  // left for a run of dy
  for (int64_t row = 0; row < s.rows; ++row) {
    over_runs<(kRegisters > 7 ? 7 : 4)>(s.columns, [&](auto run, int64_t first) CNNKERN_INLINED {
      constexpr int J = decltype(run)::value;
      const float *d = s.dy + row * s.dy_row + first * kPlane, *p = s.in + row * s.in_row + first * s.in_pixel;
      V gradient[J];
      unrolled<J>([&](auto j) CNNKERN_INLINED { gradient[j] = spread(d + j * kPlane); });
      unrolled<R>([&](auto kernel_row) CNNKERN_INLINED {
        constexpr int r = decltype(kernel_row)::value;
        add_products<J, kStep>(sum[r], gradient, [&](int i) CNNKERN_INLINED { return V::load(p + r * s.in_pitch + i * kPlane); });
      });
    });
  }
  unrolled<R * kTaps>([&](auto i) CNNKERN_INLINED { add_to(out + (i * kWidth + c) * kPlane, sum[i / kTaps][i % kTaps]); });
}

// The same for K taps of a kernel row of any number of them.
template <int K, int kWidth>
void some_products(const Products& s, int c, float* out) {
  using V = Simd<kPlane>;
  const Spread<kWidth> spread(c);
  V sum[K];
  for (int k = 0; k < K; ++k) sum[k] = V::all(0);
  for (int64_t row = 0; row < s.rows; ++row) {
    const float *d = s.dy + row * s.dy_row, *p = s.in + row * s.in_row;
    for (int64_t j = 0; j < s.columns; ++j, d += kPlane, p += s.in_pixel) {
      const V gradient = spread(d);
      for (int k = 0; k < K; ++k) sum[k] = V::fma(V::load(p + k * kPlane), gradient, sum[k]);
    }
  }
  for (int k = 0; k < K; ++k) add_to(out + (k * kWidth + c) * kPlane, sum[k]);
}

// The same for kTaps taps of I channels each of a wide group: `out` has I vectors of L floats a tap, taps `tap` floats apart.
template <int L, int kStep, int kTaps, int I>
void wide_products(const Products& s, float* out, int64_t tap) {
  using V = Simd<L>;
  V sum[I][kTaps];
  unrolled<I * kTaps>([&](auto i) CNNKERN_INLINED { sum[i / kTaps][i % kTaps] = V::all(0); });
  for (int64_t row = 0; row < s.rows; ++row) {
    over_runs<(kTaps > 1 ? 7 : 1)>(s.columns, [&](auto run, int64_t first) CNNKERN_INLINED {
      constexpr int J = decltype(run)::value;
      const float *d = s.dy + row * s.dy_row + first * kPlane, *p = s.in + row * s.in_row + first * s.in_pixel;
      V gradient[J];
      unrolled<J>([&](auto j) CNNKERN_INLINED { gradient[j] = V::load(d + j * kPlane); });
      unrolled<I>([&](auto channel) CNNKERN_INLINED {
        constexpr int i = decltype(channel)::value;
        add_products<J, kStep>(sum[i], gradient, [&](int q) CNNKERN_INLINED { return V::all(p[q * kPlane + i]); });
      });
    });
  }
  unrolled<I * kTaps>([&](auto i) CNNKERN_INLINED { add_to(out + i % kTaps * tap + i / kTaps * L, sum[i / kTaps][i % kTaps]); });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
