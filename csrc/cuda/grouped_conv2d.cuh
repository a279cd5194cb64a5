// grouped_conv2d: y = conv2d(x, weight, bias). Backward: dx, dweight, dbias.
// Depthwise with a kernel of 3x3, 5x5 or 7x7 and stride 1 or 2: depthwise_planes.cuh and depthwise_rows.cuh. Groups of up
// to kMostWide channels with a kernel of 3x3, in planes: grouped_planes.cuh. Anything else: conv_any.cuh. At stride 1 the
// gradient of the input is the same convolution of dy, with filters turned round.
// The gradient of the weight is summed by blocks over parts of the outputs, whose sums a second kernel adds in their
// order. How work is cut into parts depends on the shape alone, so results repeat bit for bit.
// Traffic in tensors read or written: 2 forward, 4 backward, while the caches hold what neighbouring threads share.
#pragma once

#include "cuda/conv_any.cuh"
#include "cuda/depthwise_planes.cuh"
#include "cuda/depthwise_ring_sums.cuh"
#include "cuda/depthwise_rows.cuh"
#include "cuda/grouped_planes.cuh"

namespace cnnkern::gpu {

// Which kernels take a convolution.
enum class ConvPath { any, depthwise, grouped };

// a, b: the two tensors that are accessed. fp64 is left to the kernels for anything.
template <typename T>
ConvPath conv_path(const ConvGeometry& g, const T* a, const T* b) {
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % (kChannels * sizeof(T)) == 0; };
  if (std::is_same_v<T, double> || !g.square() || g.inputs() != g.outputs()) return ConvPath::any;
  if (g.inputs() > 1) return grouped_planes_take(g) ? ConvPath::grouped : ConvPath::any;
  if (g.rows && (g.C % kChannels != 0 || !aligned(a) || !aligned(b))) return ConvPath::any;
  return g.kh == 3 || g.kh == 5 || g.kh == 7 ? ConvPath::depthwise : ConvPath::any;
}

// Which rows of channels the ring takes: those of whole 16-byte copies. depthwise_rows.cuh takes 16-bit ones that are not.
template <typename T>
bool ring_takes(const ConvGeometry& g, const T* a, const T* b) {
  return g.rows && g.C % kVector<T> == 0 && aligned_to_vectors(a) && aligned_to_vectors(b);
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
    if (path == ConvPath::depthwise)
      return with_kernel(g, [&](auto size, auto stride) {
        if (ring_takes(g, x, y)) return convolve_depthwise_ring<T, size(), stride()>(g, x, weight, bias, y, false, stream);
        g.rows ? convolve_depthwise_rows<T, size(), stride()>(g, x, weight, bias, y, false, stream)
               : convolve_depthwise_planes<T, size(), stride()>(g, x, weight, bias, y, false, stream);
      });
    const auto filters = filters_of(g, weight, strides, false, false);
    with_stride(g, [&](auto stride) { convolve_grouped_planes<T, stride()>(g, x, filters, bias, y, stream); });
  }
}

template <typename T>
void grouped_conv2d_input_gradient(const ConvGeometry& g, const T* dy, const T* weight, const int64_t* strides, T* dx, Stream stream) {
  const ConvPath path = conv_path<T>(g, dy, dx);
  if (path == ConvPath::any) return any_gradient(g, dy, weight, strides, dx, stream);
  if constexpr (!std::is_same_v<T, double>) {
    constexpr const T* kNoBias = nullptr;
    if (path == ConvPath::depthwise)
      return with_kernel(g, [&](auto size, auto stride) {
        if (ring_takes(g, dy, dx)) {
          if constexpr (stride() == 1)
            return convolve_depthwise_ring<T, size(), 1>(g, dy, weight, kNoBias, dx, true, stream);
          else
            return depthwise_ring_gradient_stride_2<T, size()>(g, dy, weight, dx, stream);
        }
        if constexpr (stride() == 1)
          g.rows ? convolve_depthwise_rows<T, size(), 1>(g, dy, weight, kNoBias, dx, true, stream)
                 : convolve_depthwise_planes<T, size(), 1>(g, dy, weight, kNoBias, dx, true, stream);
        else
          g.rows ? depthwise_rows_gradient_stride_2<T, size()>(g, dy, weight, dx, stream)
                 : depthwise_planes_gradient_stride_2<T, size()>(g, dy, weight, dx, stream);
      });
    const auto filters = filters_of(g, weight, strides, true, g.sh == 1);
    g.sh == 1 ? convolve_grouped_planes<T, 1>(g, dy, filters, kNoBias, dx, stream)
              : grouped_planes_gradient_stride_2(g, dy, filters, dx, stream);
  }
}

// Where the sums of the gradient of the weight go to: sums.parts * sums.values() numbers, which `data` is still to be given.
template <typename T>
PartialSums<compute_t<T>> partial_sums(const ConvGeometry& g, const T* dy, const T* x) {
  const ConvPath path = conv_path<T>(g, dy, x);
  int64_t parts = divup(g.N * g.OH * g.OW, kAnyPart);
  if (path == ConvPath::grouped) parts = grouped_planes_parts(g);
  if (path == ConvPath::depthwise)
    with_kernel(g, [&](auto size, auto stride) {
      if (ring_takes(g, dy, x))
        parts = ring_sum_cut<T, size(), stride()>(g).parts();
      else
        parts = g.rows ? RowSumCut(g, kSumChannels<T, size()>).parts : depthwise_planes_parts(g);
    });
  return {nullptr, parts, g.O, static_cast<int>(g.inputs() * g.taps()), g.rows && path == ConvPath::depthwise};
}

template <typename T>
void grouped_conv2d_weight_gradient(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums,
                                    const WeightGradient<T>& gradient, Stream stream) {
  const ConvPath path = conv_path<T>(g, dy, x);
  if (path == ConvPath::any) sum_any(g, dy, x, sums, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (path == ConvPath::depthwise)
      with_kernel(g, [&](auto size, auto stride) {
        if (ring_takes(g, dy, x)) return sum_depthwise_ring<T, size(), stride()>(g, dy, x, sums, stream);
        g.rows ? sum_depthwise_rows<T, size(), stride()>(g, dy, x, sums, stream)
               : sum_depthwise_planes<T, size(), stride()>(g, dy, x, sums, stream);
      });
    if (path == ConvPath::grouped)
      with_stride(g, [&](auto stride) { sum_grouped_planes<T, stride()>(g, dy, x, sums, stream); });
  }
  sum_parts(sums, gradient, stream);
}

}  // namespace cnnkern::gpu
