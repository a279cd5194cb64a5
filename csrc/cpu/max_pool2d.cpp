// max_pool2d: y is the maximum of each window of x; a byte per output has its position in the window, counted row by row.
// Backward: dx of a pixel is the sum of dy over the windows whose position is this pixel, in the order of the windows.
// Traffic: x, y and a byte per output forward; dy, that byte and dx backward. Threads own rows of y forward, and images of dx
// (of one channel where planes are contiguous) or their rows backward, so sums do not depend on their number.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "aten.h"
#include "cpu/passes.h"
#include "pooling.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

// The windows, or rows or columns of a window, that lie inside the image along one dimension.
struct Range {
  int64_t begin, end;
};

// Of a window that begins at `from`, those within `size`.
Range inside(int64_t from, int64_t kernel, int64_t size) { return {std::max<int64_t>(0, -from), std::min(kernel, size - from)}; }

// The windows that a pixel is in; u: counted from where the first window begins.
Range around(int64_t u, int64_t kernel, int64_t stride, int64_t windows) {
  return {u < kernel ? 0 : (u - kernel) / stride + 1, std::min(u / stride + 1, windows)};
}

// The maxima so far and their positions: the first of equal ones, or the last NaN, as PyTorch has it.
template <typename T>
struct Largest {
  Vec<T> value, position;
  void take(Vec<T> v, int64_t at) {
    const Vec<T> there(static_cast<compute_t<T>>(at));
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, double>) {
      const __mmask8 larger = _mm512_cmp_pd_mask(v, value, _CMP_GT_OQ) | _mm512_cmp_pd_mask(v, v, _CMP_UNORD_Q);
      value = _mm512_mask_mov_pd(value, larger, v), position = _mm512_mask_mov_pd(position, larger, there);
    } else {
      const __mmask16 larger = _mm512_cmp_ps_mask(v, value, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      value = _mm512_mask_mov_ps(value, larger, v), position = _mm512_mask_mov_ps(position, larger, there);
    }
#else
    const Vec<T> larger = (v > value) | v.isnan();
    value = Vec<T>::blendv(value, v, larger), position = Vec<T>::blendv(position, there, larger);
#endif
  }
};

template <typename T>
Largest<T> nothing_yet(int64_t first) {
  return {Vec<T>(-std::numeric_limits<compute_t<T>>::infinity()), Vec<T>(static_cast<compute_t<T>>(first))};
}

template <typename T>
void store_positions(uint8_t* p, Vec<T> positions, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, double>)
    return _mm_mask_storeu_epi8(p, (1u << n) - 1, _mm256_cvtepi32_epi8(_mm512_cvttpd_epi32(positions)));
  else
    return _mm_mask_storeu_epi8(p, (1u << n) - 1, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(positions)));
#endif
  compute_t<T> lanes[kLanes<T>];
  positions.store(lanes);
  if (n == kLanes<T>) {  // a length that the compiler knows
    for (int64_t j = 0; j < kLanes<T>; ++j) p[j] = static_cast<uint8_t>(static_cast<int>(lanes[j]));
  } else {
    for (int64_t j = 0; j < n; ++j) p[j] = static_cast<uint8_t>(lanes[j]);
  }
}

// A row of y where channels are innermost.
template <typename T>
void forward_row(const PoolGeometry& g, const T* image, int64_t oh, T* y, uint8_t* positions) {
  constexpr int64_t L = kLanes<T>;
  const int64_t top = oh * g.sh - g.ph;
  const Range down = inside(top, g.kh, g.H);
  for (int64_t ow = 0; ow < g.OW; ++ow, y += g.C, positions += g.C) {
    const int64_t left = ow * g.sw - g.pw;
    const Range across = inside(left, g.kw, g.W);
    const T* const window = image + (top * g.W + left) * g.C;
    const auto largest = [&](const auto& load) {
      Largest<T> found = nothing_yet<T>(down.begin * g.kw + across.begin);
      for (int64_t ky = down.begin; ky < down.end; ++ky)
        for (int64_t kx = across.begin; kx < across.end; ++kx) found.take(load(window + (ky * g.W + kx) * g.C), ky * g.kw + kx);
      return found;
    };
    int64_t c = 0;
    for (; c + L <= g.C; c += L) {
      const Largest<T> found = largest([&](const T* p) { return vload(p + c); });
      vstore(y + c, found.value);
      store_positions<T>(positions + c, found.position, L);
    }
    if (c == g.C) continue;
    const Largest<T> found = largest([&](const T* p) { return vload(p + c, g.C - c, Vec<T>(0)); });
    vstore(y + c, found.value, g.C - c);
    store_positions<T>(positions + c, found.position, g.C - c);
  }
}

// Outputs [begin, end) of a row of a plane, one by one.
template <typename T>
void forward_ones(const PoolGeometry& g, const T* plane, int64_t top, Range down, Range outputs, T* y, uint8_t* positions) {
  using S = compute_t<T>;
  for (int64_t ow = outputs.begin; ow < outputs.end; ++ow) {
    const int64_t left = ow * g.sw - g.pw;
    const Range across = inside(left, g.kw, g.W);
    S largest = -std::numeric_limits<S>::infinity();
    int64_t position = down.begin * g.kw + across.begin;
    for (int64_t ky = down.begin; ky < down.end; ++ky)
      for (int64_t kx = across.begin; kx < across.end; ++kx) {
        const S v = plane[(top + ky) * g.W + left + kx];
        if (v > largest || v != v) largest = v, position = ky * g.kw + kx;
      }
    y[ow] = static_cast<T>(largest), positions[ow] = static_cast<uint8_t>(position);
  }
}

// A row of y in a plane: in vectors where windows are whole, at strides 1 and 2.
template <typename T>
void forward_row_of_plane(const PoolGeometry& g, const T* plane, int64_t oh, T* y, uint8_t* positions) {
  constexpr int64_t L = kLanes<T>;
  const int64_t top = oh * g.sh - g.ph, reach = g.sw == 2 ? divup(g.kw, 2) * 2 : g.kw;  // columns that a window's loads touch
  const Range down = inside(top, g.kh, g.H);
  const int64_t first = divup(g.pw, g.sw), room = g.W - reach + g.pw;
  const int64_t last = room < 0 ? 0 : std::min<int64_t>(g.OW, room / g.sw + 1);
  if (g.sw > 2 || last - first < L) return forward_ones(g, plane, top, down, {0, g.OW}, y, positions);
  forward_ones(g, plane, top, down, {0, first}, y, positions);
  forward_ones(g, plane, top, down, {last, g.OW}, y, positions);
  for (int64_t ow = first;; ow = std::min(ow + L, last - L)) {  // the last vector may begin within the one before
    Largest<T> found = nothing_yet<T>(down.begin * g.kw);
    for (int64_t ky = down.begin; ky < down.end; ++ky) {
      const T* const row = plane + (top + ky) * g.W + ow * g.sw - g.pw;
      if (g.sw == 1) {
        for (int64_t kx = 0; kx < g.kw; ++kx) found.take(vload(row + kx), ky * g.kw + kx);
      } else {
        for (int64_t kx = 0; kx < g.kw; kx += 2) {
          const auto [even, odd] = at::vec::deinterleave2(vload(row + kx), vload(row + kx + L));
          found.take(even, ky * g.kw + kx);
          if (kx + 1 < g.kw) found.take(odd, ky * g.kw + kx + 1);
        }
      }
    }
    vstore(y + ow, found.value);
    store_positions<T>(positions + ow, found.position, L);
    if (ow == last - L) break;
  }
}

template <typename T>
void forward(const PoolGeometry& g, const T* x, T* y, uint8_t* positions) {
  const int64_t row = g.OW * g.C, grain = std::max<int64_t>(1, kSerial / (row * g.kh * g.kw));
  at::parallel_for(0, g.N * g.OH, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const image = x + i / g.OH * g.H * g.W * g.C;
      if (g.C == 1)
        forward_row_of_plane(g, image, i % g.OH, y + i * row, positions + i * row);
      else
        forward_row(g, image, i % g.OH, y + i * row, positions + i * row);
    }
  });
}

// sum + v in the lanes whose byte is `position`.
template <typename T>
Vec<T> add_where(Vec<T> sum, Vec<T> v, const uint8_t* positions, int64_t position) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, double>) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(positions));
    const __mmask8 here = static_cast<__mmask8>(_mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(position))));
    return _mm512_mask_add_pd(sum, here, sum, v);
  } else {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(positions));
    const __mmask16 here = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(position)));
    return _mm512_mask_add_ps(sum, here, sum, v);
  }
#else
  compute_t<T> lanes[kLanes<T>];
  for (int64_t j = 0; j < kLanes<T>; ++j) lanes[j] = static_cast<compute_t<T>>(static_cast<int>(positions[j]));
  const Vec<T> here = Vec<T>::loadu(lanes) == Vec<T>(static_cast<compute_t<T>>(position));
  return sum + Vec<T>::blendv(Vec<T>(0), v, here);
#endif
}

// A row of dx where channels are innermost.
template <typename T>
void backward_row(const PoolGeometry& g, const T* dy, const uint8_t* positions, int64_t h, T* dx) {
  constexpr int64_t L = kLanes<T>;
  const Range down = around(h + g.ph, g.kh, g.sh, g.OH);
  for (int64_t w = 0; w < g.W; ++w, dx += g.C) {
    const Range across = around(w + g.pw, g.kw, g.sw, g.OW);
    const auto sum = [&](const auto& add) {
      Vec<T> total(0);
      for (int64_t oh = down.begin; oh < down.end; ++oh)
        for (int64_t ow = across.begin; ow < across.end; ++ow)
          total = add(total, (oh * g.OW + ow) * g.C, (h + g.ph - oh * g.sh) * g.kw + w + g.pw - ow * g.sw);
      return total;
    };
    int64_t c = 0;
    for (; c + L <= g.C; c += L)
      vstore(dx + c, sum([&](Vec<T> total, int64_t at, int64_t position) {
        return add_where<T>(total, vload(dy + at + c), positions + at + c, position);
      }));
    if (c == g.C) continue;
    const int64_t n = g.C - c;
    vstore(dx + c, sum([&](Vec<T> total, int64_t at, int64_t position) {
      uint8_t bytes[kLanes<T>] = {};
      std::copy_n(positions + at + c, n, bytes);
      return add_where<T>(total, vload(dy + at + c, n, Vec<T>(0)), bytes, position);
    }), n);
  }
}

template <typename T>
void backward_in_rows(const PoolGeometry& g, const T* dy, const uint8_t* positions, T* dx) {
  const int64_t row = g.W * g.C, image = g.OH * g.OW * g.C;
  at::parallel_for(0, g.N * g.H, std::max<int64_t>(1, kSerial / row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      backward_row(g, dy + i / g.H * image, positions + i / g.H * image, i % g.H, dx + i * row);
  });
}

// Planes: each window adds its dy to one pixel. 16-bit sums are taken in float.
template <typename T>
void backward_in_planes(const PoolGeometry& g, const T* dy, const uint8_t* positions, T* dx) {
  using S = compute_t<T>;
  int64_t places[kWindow];
  for (int64_t i = 0; i < g.kh * g.kw; ++i) places[i] = i / g.kw * g.W + i % g.kw;
  const int64_t pixels = g.H * g.W, windows = g.OH * g.OW;
  at::parallel_for(0, g.N, std::max<int64_t>(1, kSerial / pixels), [&](int64_t begin, int64_t end) {
    std::vector<S> wide(std::is_same_v<T, S> ? 0 : pixels);
    for (int64_t n = begin; n < end; ++n) {
      T* const plane = dx + n * pixels;
      S* sums = wide.data();
      if constexpr (std::is_same_v<T, S>) sums = plane;
      std::fill_n(sums, pixels, S(0));
      const T* g_row = dy + n * windows;
      const uint8_t* at = positions + n * windows;
      for (int64_t oh = 0; oh < g.OH; ++oh, g_row += g.OW, at += g.OW) {
        S* const row = sums + (oh * g.sh - g.ph) * g.W - g.pw;
        for (int64_t ow = 0; ow < g.OW; ++ow) row[ow * g.sw + places[at[ow]]] += static_cast<S>(g_row[ow]);
      }
      if constexpr (!std::is_same_v<T, S>) {
        constexpr int64_t L = kLanes<T>;
        int64_t i = 0;
        for (; i + L <= pixels; i += L) vstore(plane + i, Vec<T>::loadu(sums + i));
        if (i < pixels) vstore(plane + i, Vec<T>::loadu(sums + i, pixels - i), pixels - i);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool2d_cpu(const Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                          bool ceil_mode) {
  const bool rows = pooled_in_rows(x);
  const PoolGeometry g = check_max_pool2d("cnnkern::max_pool2d", x, kernel_size, stride, padding, ceil_mode, rows);
  const auto format = pool_format(rows);
  const Tensor x_ = x.contiguous(format), y = aten::empty({x.size(0), x.size(1), g.OH, g.OW}, x.options().memory_format(format));
  const Tensor positions = aten::empty(y.sizes(), x.options().dtype(at::kByte).memory_format(format));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "max_pool2d", [&] {
    forward(g, x_.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), positions.mutable_data_ptr<uint8_t>());
  });
  return {y, positions};
}

Tensor max_pool2d_backward_cpu(const Tensor& dy, const Tensor& positions, at::IntArrayRef size, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding, bool channels_last) {
  const char* op = "cnnkern::max_pool2d_backward";
  const PoolGeometry g = check_max_pool2d_backward(op, dy, positions, size, kernel_size, stride, padding, channels_last);
  const auto format = pool_format(channels_last);
  const Tensor dy_ = dy.contiguous(format), positions_ = positions.contiguous(format);
  const Tensor dx = aten::empty({dy.size(0), dy.size(1), g.H, g.W}, dy.options().memory_format(format));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dy.scalar_type(), "max_pool2d_backward", [&] {
    const auto dispatch = g.C == 1 ? &backward_in_planes<scalar_t> : &backward_in_rows<scalar_t>;
    dispatch(g, dy_.const_data_ptr<scalar_t>(), positions_.const_data_ptr<uint8_t>(), dx.mutable_data_ptr<scalar_t>());
  });
  return dx;
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
