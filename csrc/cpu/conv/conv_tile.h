// Tiles of images on their way to and from the convolution kernels: planes of pixels, each pixel a vector of
// kPlane channels in float, with the zero padding written out. Both memory layouts and all dtypes become the same tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/passes.h"
#include "cpu/vec.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

constexpr int kPlane = static_cast<int>(kLanes<float>);  // channels of a plane

constexpr int64_t kPixelsAhead = 24;    // that are fetched while one is copied, in channels_last
constexpr int64_t kPlanePixelsAhead = 48;  // of each of kPlane channels, in contiguous images of short planes:
constexpr int64_t kForeseenPlane = 1024;   // pixels of a plane from which on the hardware's own prefetching keeps up

template <typename T>
struct Image {  // (N, C, H, W) or, a volume of T frames, (N, C, T, H, W); contiguous or channels_last
  T* data;
  int64_t N, C, H, W;
  bool channels_last;
  int64_t frames = 1;
  T* at(int64_t n, int64_t c, int64_t h, int64_t frame = 0) const {
    const int64_t row = frame * H + h;
    return data + (channels_last ? (n * frames * H + row) * W * C + c : (n * C + c) * channel() + row * W);
  }
  int64_t channel() const { return frames * H * W; }  // elements from a channel to the next, if contiguous
};

// Turns a square of vectors: lane j of v[i] becomes lane i of v[j].
inline void transpose(Vec<float> (&v)[kPlane]) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 t[16], r[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  const auto high = [](__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  for (int i = 0; i < 16; i += 4) {  // lane l of r[i + k] has column 4 * l + k of rows i ... i + 3
    r[i] = low(t[i], t[i + 2]), r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]), r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    const __m512 a = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x44), b = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x44), d = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xee);
    v[k] = _mm512_shuffle_f32x4(a, c, 0x88), v[4 + k] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[8 + k] = _mm512_shuffle_f32x4(b, d, 0x88), v[12 + k] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 t[8], r[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  const auto low = [](__m256 a, __m256 b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); };
  const auto high = [](__m256 a, __m256 b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); };
  for (int i = 0; i < 8; i += 4) {
    r[i] = low(t[i], t[i + 2]), r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]), r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    v[k] = _mm256_permute2f128_ps(r[k], r[4 + k], 0x20);
    v[4 + k] = _mm256_permute2f128_ps(r[k], r[4 + k], 0x31);
  }
#else
  float square[kPlane][kPlane], column[kPlane];
  for (int i = 0; i < kPlane; ++i) v[i].store(square[i]);
  for (int j = 0; j < kPlane; ++j) {
    for (int i = 0; i < kPlane; ++i) column[i] = square[i][j];
    v[j] = Vec<float>::loadu(column);
  }
#endif
}

// The part of an image that a tile holds: rows [row, row + rows) by columns [col, col + cols), which may lie outside.
struct Window {
  int64_t row, rows, col, cols;
};

// Channels [c, c + count) of a frame of image n, count at most kPlane, into a plane of (rows, cols, kPlane); what lies
// outside the image or beyond count is zero.
template <typename T>
void pack(const Image<const T>& x, int64_t n, int64_t frame, int64_t c, int64_t count, const Window& window, float* plane) {
  using V = Vec<T>;
  const int64_t first = std::clamp<int64_t>(-window.col, 0, window.cols);  // columns of the window inside the image
  const int64_t last = std::clamp<int64_t>(x.W - window.col, first, window.cols);
  const int64_t top = std::clamp<int64_t>(-window.row, 0, window.rows);
  const int64_t bottom = std::clamp<int64_t>(x.H - window.row, top, window.rows);
  const int64_t pitch = window.cols * kPlane;
  std::fill(plane, plane + top * pitch, 0.0f);
  std::fill(plane + bottom * pitch, plane + window.rows * pitch, 0.0f);
  for (int64_t r = top; r < bottom; ++r) {
    std::fill(plane + r * pitch, plane + r * pitch + first * kPlane, 0.0f);
    std::fill(plane + r * pitch + last * kPlane, plane + (r + 1) * pitch, 0.0f);
  }
  if (top == bottom || first == last) return;
  if (x.channels_last) {
    for (int64_t r = top; r < bottom; ++r) {
      const T* p = x.at(n, c, window.row + r, frame) + (window.col + first) * x.C;
      float* out = plane + r * pitch + first * kPlane;
      if (count == kPlane)
        for (int64_t j = first; j < last; ++j, p += x.C, out += kPlane) {
          __builtin_prefetch(p + kPixelsAhead * x.C, 0, 2);  // so far from one another, none is foreseen
          vload(p).store(out);
        }
      else
        for (int64_t j = first; j < last; ++j, p += x.C, out += kPlane) vload(p, count, V(0)).store(out);
    }
    return;
  }
  // Rows follow one another in memory, so squares of kPlane pixels are turned without regard to where a row ends.
  const T* p = x.at(n, c, window.row + top, frame);
  const int64_t pixels = (bottom - top) * x.W, channel = x.channel(), left = channel - (frame * x.H + window.row + top) * x.W;
  int64_t column = -window.col;  // of the window, of the next pixel
  int64_t row = top;
  for (int64_t i = 0; i < pixels; i += kPlane) {
    const int64_t width = std::min<int64_t>(kPlane, pixels - i);
    // Behind a block's planes lie those of the next block.
    int64_t ahead = i + kPlanePixelsAhead;
    if (ahead >= left) ahead += kPlane * channel - left;
    if (channel < kForeseenPlane)
      for (int j = 0; j < kPlane; ++j) __builtin_prefetch(p + j * channel + ahead, 0, 2);
    V v[kPlane];
    if (width == kPlane && count == kPlane) {
      for (int j = 0; j < kPlane; ++j) v[j] = vload(p + j * channel + i);
    } else {
      for (int j = 0; j < kPlane; ++j) v[j] = j < count ? vload(p + j * channel + i, width, V(0)) : V(0);
    }
    transpose(v);
    for (int64_t j = 0; j < width; ++j) {
      if (column >= 0 && column < window.cols) v[j].store(plane + row * pitch + column * kPlane);
      if (++column == x.W - window.col) column = -window.col, ++row;
    }
  }
}

// Copies n elements past the caches, but for the parts of cache lines at either end.
template <typename T>
void stream_copy(T* to, const T* from, int64_t n) {
  const int64_t head = std::min(n, short_of_alignment(to));
  std::memcpy(to, from, head * sizeof(T));
  int64_t i = head;
  for (; i + kPlane <= n; i += kPlane) vstream(to + i, vload(from + i));
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}

// A plane of (rows, W, kPlane) into channels [c, c + count) of rows [row, row + rows) of a frame of image n; with `stream` past
// the caches. `spare` has room for as many floats as the plane.
template <typename T>
void unpack(const float* plane, const Image<T>& y, int64_t n, int64_t frame, int64_t c, int64_t count, int64_t row, int64_t rows,
            bool stream, float* spare) {
  const int64_t pixels = rows * y.W, channel = y.channel();
  T* p = y.at(n, c, row, frame);
  const int64_t distance = y.channels_last ? y.C : channel;  // between vectors
  const bool aligned = count == kPlane && short_of_alignment(p) == 0 && distance % kPlane == 0;
  if (y.channels_last) {
    if (stream && aligned)
      for (int64_t i = 0; i < pixels; ++i) vstream(p + i * y.C, Vec<T>::loadu(plane + i * kPlane));
    else if (count == kPlane)
      for (int64_t i = 0; i < pixels; ++i) vstore(p + i * y.C, Vec<T>::loadu(plane + i * kPlane));
    else
      for (int64_t i = 0; i < pixels; ++i) vstore(p + i * y.C, Vec<T>::loadu(plane + i * kPlane), count);
    return;
  }
  // Planes that begin within cache lines, which can only be streamed whole: first into `spare`, then in long runs.
  const bool spared = stream && !aligned;
  T* const to = spared ? reinterpret_cast<T*>(spare) : p;
  const int64_t step = spared ? pixels : channel;
  for (int64_t i = 0; i < pixels; i += kPlane) {
    const int64_t width = std::min<int64_t>(kPlane, pixels - i);
    Vec<T> v[kPlane];
    for (int64_t j = 0; j < kPlane; ++j) v[j] = j < width ? Vec<T>::loadu(plane + (i + j) * kPlane) : Vec<T>(0);
    transpose(v);
    if (width < kPlane)
      for (int64_t j = 0; j < count; ++j) vstore(to + j * step + i, v[j], width);
    else if (stream && aligned)
      for (int64_t j = 0; j < kPlane; ++j) vstream(to + j * step + i, v[j]);
    else
      for (int64_t j = 0; j < count; ++j) vstore(to + j * step + i, v[j]);
  }
  if (!spared) return;
  if (pixels == channel) return stream_copy(p, to, count * pixels);
  for (int64_t j = 0; j < count; ++j) stream_copy(p + j * channel, to + j * pixels, pixels);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
