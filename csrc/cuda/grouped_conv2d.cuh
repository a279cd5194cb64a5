// grouped_conv2d: y = conv2d(x, weight, bias). Backward: dx, dweight, dbias.
// Depthwise with a kernel of 3x3, 5x5 or 7x7 and stride 1 or 2: depthwise_planes.cuh and depthwise_rows.cuh. Anything else:
// conv_any.cuh. At stride 1 the gradient of the input is the same convolution of dy, with filters turned round.
// The gradient of the weight is summed by blocks over parts of the outputs, whose sums a second kernel adds in their
// order. How work is cut into parts depends on the shape alone, so results repeat bit for bit.
// Traffic in tensors read or written: 2 forward, 4 backward, while the caches hold what neighbouring threads share.
#pragma once

#include "cuda/conv_any.cuh"
#include "cuda/depthwise_planes.cuh"
#include "cuda/depthwise_rows.cuh"

namespace cnnkern::gpu {

// Of 16- and 32-bit types; fp64 is left to the kernels for anything.
template <typename T>
constexpr bool kHasFast = !std::is_same_v<T, double>;

inline bool is_fast_depthwise(const ConvGeometry& g) {
  return g.inputs() == 1 && g.outputs() == 1 && g.kh == g.kw && (g.kh == 3 || g.kh == 5 || g.kh == 7) && g.sh == g.sw && g.sh <= 2 &&
         g.dh == 1 && g.dw == 1;
}

template <typename T>
bool may_read_channels(const ConvGeometry& g, const T* a, const T* b) {
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % (kChannels * sizeof(T)) == 0; };
  return g.C % kChannels == 0 && aligned(a) && aligned(b);
}

// Whether the fast kernels take these tensors.
template <typename T>
bool takes_fast(const ConvGeometry& g, const T* a, const T* b) {
  return kHasFast<T> && is_fast_depthwise(g) && (!g.rows || may_read_channels(g, a, b));
}

// Calls f with the kernel's size and the stride as constants.
template <typename F>
void with_kernel(const ConvGeometry& g, const F& f) {
  const auto with_stride = [&](auto size) {
    g.sh == 1 ? f(size, std::integral_constant<int, 1>{}) : f(size, std::integral_constant<int, 2>{});
  };
  if (g.kh == 3) return with_stride(std::integral_constant<int, 3>{});
  if (g.kh == 5) return with_stride(std::integral_constant<int, 5>{});
  with_stride(std::integral_constant<int, 7>{});
}

// y from x; bias may be null. strides: of the weight.
template <typename T>
void grouped_conv2d_forward(const ConvGeometry& g, const T* x, const T* weight, const int64_t* strides, const T* bias, T* y,
                            Stream stream) {
  if constexpr (kHasFast<T>)
    if (takes_fast(g, x, static_cast<const T*>(y)))
      return with_kernel(g, [&](auto size, auto stride) {
        g.rows ? convolve_depthwise_rows<T, size(), stride()>(g, x, weight, bias, y, false, stream)
               : convolve_depthwise_planes<T, size(), stride()>(g, x, weight, bias, y, false, stream);
      });
  convolve_any(g, x, weight, strides, bias, y, stream);
}

template <typename T>
void grouped_conv2d_input_gradient(const ConvGeometry& g, const T* dy, const T* weight, const int64_t* strides, T* dx, Stream stream) {
  if constexpr (kHasFast<T>)
    if (takes_fast(g, dy, static_cast<const T*>(dx)))
      return with_kernel(g, [&](auto size, auto stride) {
        if constexpr (stride() == 1)
          g.rows ? convolve_depthwise_rows<T, size(), 1>(g, dy, weight, static_cast<const T*>(nullptr), dx, true, stream)
                 : convolve_depthwise_planes<T, size(), 1>(g, dy, weight, static_cast<const T*>(nullptr), dx, true, stream);
        else
          g.rows ? depthwise_rows_gradient_stride_2<T, size()>(g, dy, weight, dx, stream)
                 : depthwise_planes_gradient_stride_2<T, size()>(g, dy, weight, dx, stream);
      });
  any_gradient(g, dy, weight, strides, dx, stream);
}

// Where the sums of the gradient of the weight go to: sums.parts * sums.values() numbers, which `data` is still to be given.
template <typename T>
PartialSums<compute_t<T>> partial_sums(const ConvGeometry& g, const T* dy, const T* x) {
  int64_t parts = divup(g.N * g.OH * g.OW, kAnyPart);
  bool rows = false;
  if constexpr (kHasFast<T>)
    if (takes_fast(g, dy, x)) {
      rows = g.rows;
      parts = depthwise_planes_parts(g);
      if (g.rows) with_kernel(g, [&](auto size, auto) { parts = RowSumCut(g, kSumChannels<T, size()>).parts; });
    }
  return {nullptr, parts, g.O, static_cast<int>(g.inputs() * g.taps()), rows};
}

template <typename T>
void grouped_conv2d_weight_gradient(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums,
                                    const WeightGradient<T>& gradient, Stream stream) {
  bool done = false;
  if constexpr (kHasFast<T>)
    if ((done = takes_fast(g, dy, x)))
      with_kernel(g, [&](auto size, auto stride) {
        g.rows ? sum_depthwise_rows<T, size(), stride()>(g, dy, x, sums, stream)
               : sum_depthwise_planes<T, size(), stride()>(g, dy, x, sums, stream);
      });
  if (!done) sum_any(g, dy, x, sums, stream);
  sum_parts(sums, gradient, stream);
}

}  // namespace cnnkern::gpu
