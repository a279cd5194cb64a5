// grouped_conv2d: y = conv2d(x, weight, bias). Backward: dx, dweight, dbias.
// Depthwise with a kernel of 3x3, 5x5 or 7x7 and stride 1 or 2: depthwise_planes.cuh, depthwise_ring.cuh and
// depthwise_ring_sums.cuh, and depthwise_rows.cuh where pixels are not whole 16-byte pieces. Groups of up
// to kMostWide channels with a kernel of 3x3, in planes: grouped_planes.cuh; in rows, of 16 bits or in TF32:
// grouped_rows.cuh and grouped_rows_sums.cuh. Anything else: conv_any.cuh. At stride 1 the gradient of the input is the same
// convolution of dy, with filters flipped.
// The gradient of the weight is summed by blocks over parts of the outputs, whose sums a second kernel adds in their
// order. How work is cut into parts depends only on the shape, so results repeat bit for bit.
// Memory traffic, in tensors read or written: 2 forward, 4 backward, while the caches hold what neighbouring threads share.
#pragma once

#include "cuda/conv/conv_any.cuh"
#include "cuda/conv/depthwise_planes.cuh"
#include "cuda/conv/depthwise_ring_sums.cuh"
#include "cuda/conv/depthwise_rows.cuh"
#include "cuda/conv/grouped_planes.cuh"
#include "cuda/conv/grouped_rows_sums.cuh"

namespace cnnkern::gpu {

// Which kernels take a convolution.
enum class ConvPath { any, depthwise_planes, depthwise_ring, depthwise_rows, grouped_planes, grouped_rows };

constexpr bool is_depthwise(ConvPath path) {
  return path == ConvPath::depthwise_planes || path == ConvPath::depthwise_ring || path == ConvPath::depthwise_rows;
}

// a, b: the two tensors that are accessed. conv_any.cuh computes fp64. In rows of channels the ring needs copies of 16 bytes;
// depthwise_rows.cuh computes 16-bit tensors that are only multiples of kChannels.
template <typename T>
ConvPath conv_path(const ConvGeometry& g, const T* a, const T* b) {
  const auto in_pieces = [&](int channels) {
    const auto aligned = [&](const T* p) { return reinterpret_cast<uintptr_t>(p) % (channels * sizeof(T)) == 0; };
    return g.C % channels == 0 && aligned(a) && aligned(b);
  };
  if (std::is_same_v<T, double> || !g.square() || g.inputs() != g.outputs()) return ConvPath::any;
  if ((sizeof(T) == 2 || g.tf32) && grouped_rows_take(g, sizeof(T) == 4) && aligned_to_vectors(a) && aligned_to_vectors(b))
    return ConvPath::grouped_rows;
  if (g.inputs() > 1) return grouped_planes_take(g) ? ConvPath::grouped_planes : ConvPath::any;
  if (g.kh != 3 && g.kh != 5 && g.kh != 7) return ConvPath::any;
  if (!g.rows) return ConvPath::depthwise_planes;
  if (in_pieces(kVector<T>)) return ConvPath::depthwise_ring;
  return sizeof(T) == 2 && in_pieces(kChannels) ? ConvPath::depthwise_rows : ConvPath::any;
}

// Calls f with the stride as a constant, and with the kernel's size.
template <typename F>
void with_stride(const ConvGeometry& g, const F& f) {
  g.sh == 1 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 2>{});
}
template <typename F>
void with_kernel(const ConvGeometry& g, const F& f) {
  with_stride(g, [&](auto stride) {
    if (g.kh == 3) return f(std::integral_constant<int, 3>{}, stride);
    if (g.kh == 5) return f(std::integral_constant<int, 5>{}, stride);
    f(std::integral_constant<int, 7>{}, stride);
  });
}

template <typename T>
Filters<T> filters_of(const ConvGeometry& g, const T* weight, const int64_t* strides, bool transposed, bool flipped) {
  return {weight, {strides[0], strides[1], strides[2], strides[3]}, static_cast<int>(g.inputs()), transposed, flipped};
}

// y from x; bias may be null. strides: of the weight.
template <typename T>
void grouped_conv2d_forward(const ConvGeometry& g, const T* x, const T* weight, const int64_t* strides, const T* bias, T* y,
                            Stream stream) {
  const ConvPath path = conv_path<T>(g, x, y);
  if (path == ConvPath::any) return convolve_any(g, x, weight, strides, bias, y, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (is_depthwise(path))
      return with_kernel(g, [&](auto size, auto stride) {
        if (path == ConvPath::depthwise_planes)
          return convolve_depthwise_planes<T, size(), stride()>(g, x, weight, bias, y, false, stream);
        if (path == ConvPath::depthwise_ring) return convolve_depthwise_ring<T, size(), stride()>(g, x, weight, bias, y, false, stream);
        if constexpr (sizeof(T) == 2) convolve_depthwise_rows<T, size(), stride()>(g, x, weight, bias, y, false, stream);
      });
    const auto filters = filters_of(g, weight, strides, false, false);
    if (path == ConvPath::grouped_rows)
      return with_stride(g, [&](auto stride) { convolve_grouped_rows<T, stride()>(g, x, filters, bias, y, stream); });
    with_stride(g, [&](auto stride) { convolve_grouped_planes<T, stride()>(g, x, filters, bias, y, stream); });
  }
}

template <typename T>
void grouped_conv2d_input_gradient(const ConvGeometry& g, const T* dy, const T* weight, const int64_t* strides, T* dx, Stream stream) {
  const ConvPath path = conv_path<T>(g, dy, dx);
  if (path == ConvPath::any) return any_gradient(g, dy, weight, strides, dx, stream);
  if constexpr (!std::is_same_v<T, double>) {
    constexpr const T* kNoBias = nullptr;
    if (is_depthwise(path))
      return with_kernel(g, [&](auto size, auto stride) {
        constexpr int K = size();
        if constexpr (stride() == 1) {
          if (path == ConvPath::depthwise_planes) return convolve_depthwise_planes<T, K, 1>(g, dy, weight, kNoBias, dx, true, stream);
          if (path == ConvPath::depthwise_ring) return convolve_depthwise_ring<T, K, 1>(g, dy, weight, kNoBias, dx, true, stream);
          if constexpr (sizeof(T) == 2) convolve_depthwise_rows<T, K, 1>(g, dy, weight, kNoBias, dx, true, stream);
        } else {
          if (path == ConvPath::depthwise_planes) return depthwise_planes_gradient_stride_2<T, K>(g, dy, weight, dx, stream);
          if (path == ConvPath::depthwise_ring) return depthwise_ring_gradient_stride_2<T, K>(g, dy, weight, dx, stream);
          if constexpr (sizeof(T) == 2) depthwise_rows_gradient_stride_2<T, K>(g, dy, weight, dx, stream);
        }
      });
    const auto filters = filters_of(g, weight, strides, true, g.sh == 1);
    if (path == ConvPath::grouped_rows)
      return with_stride(g, [&](auto stride) { grouped_rows_gradient<T, stride()>(g, dy, filters, dx, stream); });
    g.sh == 1 ? convolve_grouped_planes<T, 1>(g, dy, filters, kNoBias, dx, stream)
              : grouped_planes_gradient_stride_2(g, dy, filters, dx, stream);
  }
}

// The partial sums of the weight's gradient: sums.parts * sums.values() numbers, for which the caller has to set `data`.
template <typename T>
PartialSums<compute_t<T>> partial_sums(const ConvGeometry& g, const T* dy, const T* x) {
  const ConvPath path = conv_path<T>(g, dy, x);
  int64_t parts = divup(g.N * g.OH * g.OW, kAnyPart);
  if (path == ConvPath::grouped_planes) parts = grouped_planes_parts(g);
  if constexpr (!std::is_same_v<T, double>)
    if (path == ConvPath::grouped_rows) parts = grouped_rows_parts<T>(g);
  if (path == ConvPath::depthwise_planes) parts = depthwise_planes_parts(g);
  if (path == ConvPath::depthwise_ring || path == ConvPath::depthwise_rows)
    with_kernel(g, [&](auto size, auto stride) {
      parts = path == ConvPath::depthwise_ring ? ring_sum_cut<T, size(), stride()>(g).parts() : RowSumCut(g, kSumChannels<T, size()>).parts;
    });
  return {nullptr, parts, g.O, static_cast<int>(g.inputs() * g.taps()), g.rows && path != ConvPath::any};
}

template <typename T>
void grouped_conv2d_weight_gradient(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums,
                                    const WeightGradient<T>& gradient, Stream stream) {
  const ConvPath path = conv_path<T>(g, dy, x);
  if (path == ConvPath::any) sum_any(g, dy, x, sums, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (is_depthwise(path))
      with_kernel(g, [&](auto size, auto stride) {
        if (path == ConvPath::depthwise_planes) return sum_depthwise_planes<T, size(), stride()>(g, dy, x, sums, stream);
        if (path == ConvPath::depthwise_ring) return sum_depthwise_ring<T, size(), stride()>(g, dy, x, sums, stream);
        if constexpr (sizeof(T) == 2) sum_depthwise_rows<T, size(), stride()>(g, dy, x, sums, stream);
      });
    if (path == ConvPath::grouped_planes)
      with_stride(g, [&](auto stride) { sum_grouped_planes<T, stride()>(g, dy, x, sums, stream); });
    if (path == ConvPath::grouped_rows)
      with_stride(g, [&](auto stride) { sum_grouped_rows<T, stride()>(g, dy, x, sums, stream); });
  }
  sum_parts(sums, gradient, stream);
}

}  // namespace cnnkern::gpu
