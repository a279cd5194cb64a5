// act(batch_norm(x)) as a convolution reads x, so that it is never stored: where a tile of x is packed, or row by row before a
// kernel that reads rows where they lie. The arithmetic is that of bn_act, its rounding to the tensor's type included, so
// results are bit-equal to those of the two operators one after the other.
#pragma once

#include <memory>
#include <type_traits>

#include "cpu/batch_norm/batch_norm.h"
#include "cpu/conv/conv_tile.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

template <typename T>
class Prologue {
 public:
  template <typename Act>
  Prologue(const Parameters& parameters, const double* mean, const double* rstd, int64_t C, Act act)
      : other_(), pitch_(divup(C, kPlane) * kPlane + kPlane), table_(new float[3 * pitch_]()), plane_(plane<Act>), row_(row<Act>) {
    if constexpr (std::is_same_v<Act, OtherActivation>) other_ = act;
    float *const center = table_.get(), *const scale = center + pitch_, *const offset = scale + pitch_;
    for (int64_t c = 0; c < C; c += kLot)
      parameters.affine(c, std::min(kLot, C - c), mean + c, rstd + c, center + c, scale + c, offset + c);
  }

  // Pixels of a plane (conv_tile.h), in place; their first channel is c.
  void over_plane(float* pixels, int64_t count, int64_t c) const { plane_(*this, pixels, count, c); }
  // Pixels of an image with channels innermost, `from_pixel` elements apart, into others.
  void over_row(const T* from, int64_t from_pixel, T* to, int64_t to_pixel, int64_t pixels, int64_t c, int64_t channels) const {
    row_(*this, from, from_pixel, to, to_pixel, pixels, c, channels);
  }

 private:
  using V = Vec<T>;

  template <typename Act>
  Act activation() const {
    if constexpr (std::is_same_v<Act, OtherActivation>)
      return other_;
    else
      return {};
  }

  template <typename Act>
  static void plane(const Prologue& p, float* pixels, int64_t count, int64_t c) {
    const Act act = p.activation<Act>();
    const V center = V::loadu(&p.table_[c]), scale = V::loadu(&p.table_[p.pitch_ + c]), offset = V::loadu(&p.table_[2 * p.pitch_ + c]);
    for (int64_t i = 0; i < count; ++i) {
      float* const at = pixels + i * kPlane;
      rounded(act.template value<T>(at::vec::fmadd(V::loadu(at) - center, scale, offset))).store(at);
    }
  }

  template <typename Act>
  static void row(const Prologue& p, const T* from, int64_t from_pixel, T* to, int64_t to_pixel, int64_t pixels, int64_t c,
                  int64_t channels) {
    const Act act = p.activation<Act>();
    const float *const center = &p.table_[c], *const scale = center + p.pitch_, *const offset = scale + p.pitch_;
    const auto value = [&](V v, int64_t j) {
      return act.template value<T>(at::vec::fmadd(v - V::loadu(center + j), V::loadu(scale + j), V::loadu(offset + j)));
    };
    for (int64_t i = 0; i < pixels; ++i, from += from_pixel, to += to_pixel) {
      int64_t j = 0;
      for (; j + kPlane <= channels; j += kPlane) {
        __builtin_prefetch(from + j + kAhead / static_cast<int64_t>(sizeof(T)), 0, 2);
        vstore(to + j, value(vload(from + j), j));
      }
      if (j < channels) vstore(to + j, value(vload(from + j, channels - j, V(0)), j), channels - j);
    }
  }

  // What is left of v in the tensor's type.
  static V rounded(const V& v) {
    if constexpr (std::is_same_v<T, float>) {
      return v;
    } else {
      alignas(64) T narrow[kPlane];
      vstore(narrow, v);
      return vload(narrow);
    }
  }

  OtherActivation other_;
  int64_t pitch_;
  std::unique_ptr<float[]> table_;  // (center, scale, offset; channels)
  void (*plane_)(const Prologue&, float*, int64_t, int64_t);
  void (*row_)(const Prologue&, const T*, int64_t, T*, int64_t, int64_t, int64_t, int64_t);
};

// pack(), and what is inside the image through the prologue, if there is one.
template <typename T>
void pack_through(const Prologue<T>* prologue, const Image<const T>& x, int64_t n, int64_t frame, int64_t c, int64_t count,
                  const Window& window, float* plane) {
  pack(x, n, frame, c, count, window, plane);
  if (prologue == nullptr) return;
  const int64_t first = std::clamp<int64_t>(-window.col, 0, window.cols), last = std::clamp<int64_t>(x.W - window.col, first, window.cols);
  const int64_t top = std::clamp<int64_t>(-window.row, 0, window.rows), bottom = std::clamp<int64_t>(x.H - window.row, top, window.rows);
  for (int64_t r = top; r < bottom; ++r) prologue->over_plane(plane + (r * window.cols + first) * kPlane, last - first, c);
}

// Rows of channels_last images, or, with a prologue, of what it makes of them: each is computed when it is first asked for, and
// kept until `slots` rows further down are. Rows are asked for in their order.
template <typename T>
class RowsThrough {
 public:
  // Of channels [c, c + channels). `ring` has room for floats() floats.
  RowsThrough(const Prologue<T>* prologue, const Image<const T>& x, int64_t c, int64_t channels, int64_t slots, float* ring)
      : prologue_(prologue), x_(x), c_(c), channels_(channels), slots_(slots), ring_(reinterpret_cast<T*>(ring)) {}
  static int64_t floats(const Prologue<T>* prologue, int64_t W, int64_t channels, int64_t slots) {
    return prologue == nullptr ? 0 : divup(slots * W * channels * static_cast<int64_t>(sizeof(T)), 4);
  }
  // Elements from a pixel to the next.
  int64_t pixel() const { return prologue_ == nullptr ? x_.C : channels_; }
  const T* at(int64_t n, int64_t h) {
    if (prologue_ == nullptr) return x_.at(n, c_, h);
    T* const row = ring_ + h % slots_ * x_.W * channels_;
    if (n != n_ || h >= next_) {
      prologue_->over_row(x_.at(n, c_, h), x_.C, row, channels_, x_.W, c_, channels_);
      n_ = n, next_ = h + 1;
    }
    return row;
  }

 private:
  const Prologue<T>* prologue_;
  const Image<const T>& x_;
  int64_t c_, channels_, slots_;
  T* ring_;
  int64_t n_ = -1, next_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
