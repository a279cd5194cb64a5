// Depthwise convolution of channels_last images in place: the channels of a pixel follow one another in memory, so that
// vectors of them need neither planes nor padding written out. A row is cut into runs of pixels; a run is convolved for
// one vector of channels after the other, which goes through memory in its order. Only the pixels at either end of a
// row, whose taps lie partly outside, are treated one by one.
#pragma once

#include <memory>

#include "cpu/conv/conv_blocks.h"
#include "cpu/conv/prologue.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// Channels that are worked on together, at most: their taps stay in the first-level cache, with the sums of their gradient.
constexpr int64_t kChannelsInPlace = 192;
constexpr int kRunInPlace = 8;
constexpr int kRowsInPlace = 5;  // that a kernel has, at most
constexpr int64_t kPixelsOfPart = 64;  // outputs whose sums are kept apart, at least
constexpr int64_t kPixelsOfSum = 256;  // that are added to one float, about; sums of so many are then added to those of a part

// Channels cut into pieces of about the same number of whole vectors.
struct Pieces {
  int64_t C, count, channels;
  explicit Pieces(int64_t C_) : C(C_), count(divup(C, kChannelsInPlace)), channels(divup(divup(C, count), kPlane) * kPlane) {
    count = divup(C, channels);
  }
  int64_t first(int64_t piece) const { return piece * channels; }
  int64_t size(int64_t piece) const { return std::min(channels, C - first(piece)); }
};

inline Simd<kPlane> simd(const Vec<float>& v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return {v};
#else
  Simd<kPlane> lanes;
  v.store(lanes.lanes);
  return lanes;
#endif
}

inline Vec<float> vec(const Simd<kPlane>& v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return v.v;
#else
  return Vec<float>::loadu(v.lanes);
#endif
}

// Calls f(c, load, store) for vectors of channels: load(p) reads that of a pixel whose channel c is at p, store(p, v) writes it.
template <typename T, typename F>
CNNKERN_INLINE void over_channels(int64_t channels, bool stream, const F& f) {
  using V = Simd<kPlane>;
  int64_t c = 0;
  for (; c + kPlane <= channels; c += kPlane)
    f(c, [](const T* p) CNNKERN_INLINED { return simd(vload(p)); },
      [&](T* p, const V& v) CNNKERN_INLINED { vput(p, vec(v), stream); });
  if (c == channels) return;
  const int64_t count = channels - c;
  f(c, [&](const T* p) CNNKERN_INLINED { return simd(vload(p, count, Vec<T>(0))); },
    [&](T* p, const V& v) CNNKERN_INLINED { vstore(p, vec(v), count); });
}

// The outputs of a row, and the kernel rows of theirs that meet the image. Strides in elements. kBounded: they are clamped.
template <typename T, bool kBounded = false>
struct RowInPlace {
  const T* in[kRowsInPlace];  // pixel 0 of those rows of the input
  int64_t in_pixel;
  int64_t first;      // pixel of the first output's first tap
  int64_t width;      // pixels of the row
  const float* weight;  // of the first such kernel row, its first tap; a vector of channels per tap
  int64_t weight_row, weight_tap;
  int64_t kernel_rows;
  const float* bias;  // null for none
  T* out;
  int64_t out_pixel, columns;
  int64_t channels;
  bool stream;
  float low = 0, high = 0;
  Simd<kPlane> bounded(const Simd<kPlane>& v) const {
    if constexpr (!kBounded) return v;
    return simd(at::vec::clamp(vec(v), Vec<float>(low), Vec<float>(high)));
  }
};

// J outputs from the j-th on, all of whose taps lie in the image.
template <int J, int kStep, int kTaps, typename T, bool kBounded>
void run_in_place(const RowInPlace<T, kBounded>& s, int64_t j) {
  using V = Simd<kPlane>;
  const int64_t from = (s.first + j * kStep) * s.in_pixel;
  T* const out = s.out + j * s.out_pixel;
  over_channels<T>(s.channels, s.stream, [&](int64_t c, const auto& load, const auto& store) CNNKERN_INLINED {
    V sum[J];
    const V start = s.bias != nullptr ? V::load(s.bias + c) : V::all(0);
    unrolled<J>([&](auto i) CNNKERN_INLINED { sum[i] = start; });
    for (int64_t r = 0; r < s.kernel_rows; ++r) {
      const T* const p = s.in[r] + from + c;
      if (r + kStep >= s.kernel_rows)  // rows that are not in a cache yet
        unrolled<J * kStep>([&](auto i) CNNKERN_INLINED { __builtin_prefetch(p + (J * kStep + i) * s.in_pixel, 0, 3); });
      V tap[kTaps];
      unrolled<kTaps>([&](auto t) CNNKERN_INLINED { tap[t] = V::load(s.weight + r * s.weight_row + t * s.weight_tap + c); });
      add_row<J, kStep>(sum, tap, [&](int i) CNNKERN_INLINED { return load(p + i * s.in_pixel); });
    }
    unrolled<J>([&](auto i) CNNKERN_INLINED { store(out + i * s.out_pixel + c, s.bounded(sum[i])); });
  });
}

// The j-th output, whatever of its `taps` lies in the image.
template <int kStep, typename T, bool kBounded>
void pixel_in_place(const RowInPlace<T, kBounded>& s, int64_t j, int64_t taps) {
  using V = Simd<kPlane>;
  const int64_t first = s.first + j * kStep;
  const int64_t begin = std::clamp<int64_t>(-first, 0, taps), end = std::clamp<int64_t>(s.width - first, begin, taps);
  over_channels<T>(s.channels, s.stream, [&](int64_t c, const auto& load, const auto& store) CNNKERN_INLINED {
    V sum = s.bias != nullptr ? V::load(s.bias + c) : V::all(0);
    for (int64_t r = 0; r < s.kernel_rows; ++r)
      for (int64_t t = begin; t < end; ++t)
        sum = V::fma(load(s.in[r] + (first + t) * s.in_pixel + c), V::load(s.weight + r * s.weight_row + t * s.weight_tap + c), sum);
    store(s.out + j * s.out_pixel + c, s.bounded(sum));
  });
}

// Outputs [begin, end) of a row of `columns` whose taps all lie among the `width` pixels.
inline std::pair<int64_t, int64_t> columns_inside(int64_t first, int64_t step, int64_t taps, int64_t width, int64_t columns) {
  const int64_t begin = std::clamp<int64_t>(first < 0 ? divup(-first, step) : 0, 0, columns);
  const int64_t last = width - taps - first;  // the largest distance of an output's first tap from `first`
  return {begin, std::clamp<int64_t>(last < 0 ? 0 : last / step + 1, begin, columns)};
}

template <int kStep, int kTaps, typename T, bool kBounded>
void row_in_place(const RowInPlace<T, kBounded>& s) {
  const auto [begin, end] = columns_inside(s.first, kStep, kTaps, s.width, s.columns);
  for (int64_t j = 0; j < begin; ++j) pixel_in_place<kStep>(s, j, kTaps);
  over_runs<kRunInPlace>(end - begin, [&, begin = begin](auto run, int64_t first) CNNKERN_INLINED {
    run_in_place<decltype(run)::value, kStep, kTaps>(s, begin + first);
  });
  for (int64_t j = end; j < s.columns; ++j) pixel_in_place<kStep>(s, j, kTaps);
}

// Adds to sums (kernel rows, taps, channels) what a row of dy gives, and to bias its own sum if that is not null.
template <typename T>
struct ProductsInPlace {
  const T* dy;
  const T* in[kRowsInPlace];  // pixel 0 of the rows of the input that the kernel rows inside meet
  int64_t dy_pixel, in_pixel;
  int64_t first, width, columns;
  int64_t kernel_rows;
  float* sums;  // of that kernel row
  int64_t sums_tap;
  float* bias;
  int64_t channels;
};

// Of J outputs from the j-th on, and the taps [begin, end) of each kernel row; those are all where J > 1.
template <int J, int kStep, int kTaps, typename T>
void products_of_run(const ProductsInPlace<T>& s, int64_t j, int64_t begin, int64_t end) {
  using V = Simd<kPlane>;
  const int64_t from = (s.first + j * kStep) * s.in_pixel;
  const T* const dy = s.dy + j * s.dy_pixel;
  over_channels<T>(s.channels, false, [&](int64_t c, const auto& load, const auto&) CNNKERN_INLINED {
    V gradient[J];
    unrolled<J>([&](auto i) CNNKERN_INLINED {
      gradient[i] = load(dy + i * s.dy_pixel + c);
      __builtin_prefetch(dy + (J + i) * s.dy_pixel + c, 0, 3);
    });
    const auto kernel_row = [&](int64_t r) CNNKERN_INLINED {
      float* const to = s.sums + r * kTaps * s.sums_tap + c;
      const T* const p = s.in[r] + from + c;
      if (r + kStep >= s.kernel_rows)  // rows that are not in a cache yet
        unrolled<J * kStep>([&](auto i) CNNKERN_INLINED { __builtin_prefetch(p + (J * kStep + i) * s.in_pixel, 0, 3); });
      if constexpr (J > 1) {
        V sum[kTaps];
        unrolled<kTaps>([&](auto t) CNNKERN_INLINED { sum[t] = V::load(to + t * s.sums_tap); });
        add_products<J, kStep>(sum, gradient, [&](int i) CNNKERN_INLINED { return load(p + i * s.in_pixel); });
        unrolled<kTaps>([&](auto t) CNNKERN_INLINED { sum[t].store(to + t * s.sums_tap); });
      } else {
        for (int64_t t = begin; t < end; ++t)
          V::fma(load(p + t * s.in_pixel), gradient[0], V::load(to + t * s.sums_tap)).store(to + t * s.sums_tap);
      }
    };
    if (s.kernel_rows == kTaps)  // side by side: a sum waits for the one before it
      unrolled<kTaps>(kernel_row);
    else
      for (int64_t r = 0; r < s.kernel_rows; ++r) kernel_row(r);
    if (s.bias == nullptr) return;
    V sum = gradient[0];
    for (int i = 1; i < J; ++i) sum = V::fma(gradient[i], V::all(1), sum);
    add_to(s.bias + c, sum);
  });
}

template <int kStep, int kTaps, typename T>
void products_in_place(const ProductsInPlace<T>& s) {
  const auto [begin, end] = columns_inside(s.first, kStep, kTaps, s.width, s.columns);
  const auto pixel = [&](int64_t j) {
    const int64_t first = s.first + j * kStep, t = std::clamp<int64_t>(-first, 0, kTaps);
    products_of_run<1, kStep, kTaps>(s, j, t, std::clamp<int64_t>(s.width - first, t, kTaps));
  };
  for (int64_t j = 0; j < begin; ++j) pixel(j);
  over_runs<kRunInPlace>(end - begin, [&, begin = begin](auto run, int64_t first) CNNKERN_INLINED {
    products_of_run<decltype(run)::value, kStep, kTaps>(s, begin + first, 0, kTaps);
  });
  for (int64_t j = end; j < s.columns; ++j) pixel(j);
}

// A depthwise weight (C, 1, kh, kw) as (taps, channels rounded up to vectors), then the bias, if any.
struct TapsInPlace {
  int64_t pitch;
  std::unique_ptr<float[]> data;
  const float* bias;
  template <typename T>
  TapsInPlace(const Geometry& g, const T* weight, const T* bias_of_output)
      : pitch(divup(g.C, kPlane) * kPlane), data(new float[(g.taps() + 1) * pitch]), bias(nullptr) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      float* const to = &data[tap * pitch];
      for (int64_t c = 0; c < g.C; ++c) to[c] = static_cast<float>(weight[c * g.taps() + tap]);
      std::fill(to + g.C, to + pitch, 0.0f);
    }
    if (bias_of_output == nullptr) return;
    float* const to = &data[g.taps() * pitch];
    for (int64_t c = 0; c < pitch; ++c) to[c] = c < g.C ? static_cast<float>(bias_of_output[c]) : 0.0f;
    bias = to;
  }
};

// Kernel rows of an output row whose first is at row `first` of an image of H rows.
inline std::pair<int64_t, int64_t> rows_inside(int64_t first, int64_t count, int64_t H) {
  const int64_t begin = std::clamp<int64_t>(-first, 0, count);
  return {begin, std::clamp<int64_t>(H - first, begin, count)};
}

// What the kernels of this header compute. Others multiply too much for packing to matter.
inline bool forward_is_in_place(const Geometry& g, bool channels_last) {
  return kKeepsTaps && channels_last && g.is_image() && g.width == 1 && g.kh == g.kw && (g.kw == 3 || (g.kw == 5 && g.stride == 2));
}
inline bool backward_is_in_place(const Geometry& g, bool channels_last) {
  return kKeepsTaps && channels_last && g.is_image() && g.width == 1 && g.kh == 3 && g.kw == 3;
}

template <typename T>
bool may_stream(const Image<T>& y, bool beyond) {
  return beyond && y.C % kPlane == 0 && short_of_alignment(y.data) == 0;
}

template <typename T>
void forward_in_place(const Image<const T>& x, const Prologue<T>* prologue, const T* weight, const T* bias, const Image<T>& y,
                      const Geometry& g) {
  const TapsInPlace taps(g, weight, bias);
  const Pieces pieces(g.C);
  const bool stream = may_stream(y, beyond_cache(y.data, g.N * g.C * g.OH * g.OW * sizeof(T)));
  at::parallel_for(0, g.N * g.OH, divup(8192, g.OW * g.C), [&](int64_t begin, int64_t end) {
    RowsThrough<T> in(prologue, x, 0, g.C, g.kh, scratch(RowsThrough<T>::floats(prologue, g.W, g.C, g.kh)));
    for (int64_t row = begin; row < end; ++row)
      for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t c = pieces.first(piece), n = row / g.OH, oh = row % g.OH, top = oh * g.stride - g.ph;
        const auto [first, last] = rows_inside(top, g.kh, g.H);
        RowInPlace<T> s{.in = {},
                        .in_pixel = g.C,
                        .first = -g.pw,
                        .width = g.W,
                        .weight = taps.data.get() + first * g.kw * taps.pitch + c,
                        .weight_row = g.kw * taps.pitch,
                        .weight_tap = taps.pitch,
                        .kernel_rows = last - first,
                        .bias = taps.bias == nullptr ? nullptr : taps.bias + c,
                        .out = y.at(n, c, oh),
                        .out_pixel = g.C,
                        .columns = g.OW,
                        .channels = pieces.size(piece),
                        .stream = stream};
        for (int64_t r = first; r < last; ++r) s.in[r - first] = in.at(n, top + r) + c;
        g.kw == 5 ? row_in_place<2, 5>(s) : g.stride == 2 ? row_in_place<2, 3>(s) : row_in_place<1, 3>(s);
      }
    stream_fence();
  });
}

// Row h of dx: an input pixel meets the taps of its residue class, which follow one another in dy backwards.
template <typename T>
void input_gradient_row(const Image<const T>& dy, const TapsInPlace& taps, const Image<T>& dx, const Geometry& g, int64_t row, int64_t c,
                        int64_t channels, bool stream) {
  const int64_t s = g.stride, n = row / g.H, h = row % g.H;
  const Residue rows((h + g.ph) % s, s, g.kh);
  const int64_t top = (h + g.ph) / s - rows.count + 1;
  const auto [first, last] = rows_inside(top, rows.count, g.OH);
  for (int64_t mx = 0; mx < s; ++mx) {
    const Residue columns(mx, s, g.kw);
    const int64_t w = columns.first(0, g.pw);
    if (w >= g.W) continue;
    RowInPlace<T> part{.in = {},
                       .in_pixel = g.C,
                       .first = (w + g.pw) / s - columns.count + 1,
                       .width = g.OW,
                       .weight = taps.data.get() + (rows.tap(first) * g.kw + columns.tap(0)) * taps.pitch + c,
                       .weight_row = -s * g.kw * taps.pitch,
                       .weight_tap = -s * taps.pitch,
                       .kernel_rows = last - first,
                       .bias = nullptr,
                       .out = dx.at(n, c, h) + w * g.C,
                       .out_pixel = s * g.C,
                       .columns = divup(g.W - w, s),
                       .channels = channels,
                       .stream = stream};
    for (int64_t r = first; r < last; ++r) part.in[r - first] = dy.at(n, c, top + r);
    if (columns.count == 1) row_in_place<1, 1>(part);
    if (columns.count == 2) row_in_place<1, 2>(part);
    if (columns.count == 3) row_in_place<1, 3>(part);
  }
}

// dx, dweight and dbias in one pass over the rows of dy; undefined, or null, where one is not wanted. Sums are kept for
// parts of the rows, in float, and added in double in their order: parts depend on the shape alone.
template <typename T>
void backward_in_place(const Image<const T>& dy, const Image<const T>& x, const Prologue<T>* prologue, const T* weight,
                       const Gradients<T>& grads, const Geometry& g) {
  const auto& [dx, dweight, dbias] = grads;
  constexpr const T* kNoBias = nullptr;
  const TapsInPlace taps(g, weight, kNoBias);
  const bool wants_dx = dx.data != nullptr, wants_sums = dweight.defined() || dbias.defined();
  const bool stream = wants_dx && may_stream(dx, beyond_cache(dx.data, g.N * g.C * g.H * g.W * sizeof(T)));
  const Pieces pieces(g.C);
  const int64_t rows = g.N * g.OH, dx_rows = g.N * g.H, rows_of_sum = divup(kPixelsOfSum, g.OW);
  const int64_t parts = std::clamp<int64_t>(wants_sums ? rows * g.OW / kPixelsOfPart : rows, 1, std::min(rows, divup(kUnits, pieces.count)));
  const int64_t pitch = pieces.channels, values = (g.taps() + 1) * pitch;  // of a part: sums (taps, channels), and those of dy
  std::unique_ptr<float[]> sums(new float[wants_sums ? parts * pieces.count * values : 0]);
  at::parallel_for(0, parts * pieces.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t part = u / pieces.count, c = pieces.first(u % pieces.count), channels = pieces.size(u % pieces.count);
      const auto [row, last_row] = tile_rows(rows, parts, part);
      const auto [dx_row, last_dx_row] = tile_rows(dx_rows, parts, part);
      float* const total = sums.get() + u * values;
      float* const to = wants_sums ? scratch(values + RowsThrough<T>::floats(prologue, g.W, channels, g.kh)) : nullptr;
      RowsThrough<T> in(prologue, x, c, channels, g.kh, wants_sums ? to + values : nullptr);
      if (wants_sums) std::fill_n(total, values, 0.0f), std::fill_n(to, values, 0.0f);
      int64_t h = dx_row;
      for (int64_t i = row; i < last_row; ++i) {
        if (wants_sums) {
          const int64_t n = i / g.OH, top = i % g.OH * g.stride - g.ph;
          const auto [first, last] = rows_inside(top, dweight.defined() ? g.kh : 0, g.H);
          ProductsInPlace<T> s{.dy = dy.at(n, c, i % g.OH),
                               .in = {},
                               .dy_pixel = g.C,
                               .in_pixel = in.pixel(),
                               .first = -g.pw,
                               .width = g.W,
                               .columns = g.OW,
                               .kernel_rows = last - first,
                               .sums = to + first * g.kw * pitch,
                               .sums_tap = pitch,
                               .bias = dbias.defined() ? to + g.taps() * pitch : nullptr,
                               .channels = channels};
          for (int64_t r = first; r < last; ++r) s.in[r - first] = in.at(n, top + r);
          g.stride == 2 ? products_in_place<2, 3>(s) : products_in_place<1, 3>(s);
          if ((i + 1 - row) % rows_of_sum == 0 || i + 1 == last_row)
            for (int64_t j = 0; j < values; ++j) total[j] += to[j], to[j] = 0.0f;
        }
        // As many rows of dx as belong to those of dy so far, which are in the caches.
        const int64_t until = dx_row + (last_dx_row - dx_row) * (i + 1 - row) / (last_row - row);
        for (; wants_dx && h < until; ++h) input_gradient_row(dy, taps, dx, g, h, c, channels, stream);
      }
    }
    stream_fence();
  });
  if (!wants_sums) return;
  T* const dw = dweight.defined() ? dweight.template mutable_data_ptr<T>() : nullptr;
  T* const db = dbias.defined() ? dbias.template mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, pieces.count, divup(16384, parts * values), [&](int64_t begin, int64_t end) {
    double total[kChannelsInPlace];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t c = pieces.first(piece), channels = pieces.size(piece);
      for (int64_t value = dw != nullptr ? 0 : g.taps(); value < g.taps() + (db != nullptr); ++value) {
        std::fill_n(total, channels, 0.0);
        for (int64_t part = 0; part < parts; ++part) {
          const float* const from = &sums[(part * pieces.count + piece) * values + value * pitch];
          for (int64_t j = 0; j < channels; ++j) total[j] += from[j];
        }
        for (int64_t j = 0; j < channels; ++j) {
          if (value == g.taps())
            db[c + j] = static_cast<T>(total[j]);
          else
            dw[(c + j) * dweight.strides()[0] + value / g.kw * dweight.strides()[2] + value % g.kw * dweight.strides()[3]] = static_cast<T>(total[j]);
        }
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
