// The dispatch rule of grouped_conv2d on the CPU: which convolutions cnnkern's kernels compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "aten.h"
#include "cpu/conv/conv_blocks.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// What cnnkern's kernels support. ATen computes everything else, and raises the errors.
inline bool covered(const Tensor& x, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const auto dims = static_cast<size_t>(x.dim() - 2);
  if ((dims != 2 && dims != 3) || weight.dim() != x.dim() || stride.size() != dims || padding.size() != dims || dilation.size() != dims)
    return false;
  const auto type = x.scalar_type();
  if ((type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) || weight.scalar_type() != type) return false;
  const int64_t C = x.size(1), width = weight.size(1), kh = weight.size(-2), kw = weight.size(-1);
  const int64_t kt = dims == 3 ? weight.size(2) : 1;
  if (groups < 2 || x.numel() == 0 || weight.size(0) != C || width * groups != C || !weight.device().is_cpu()) return false;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != C || bias.scalar_type() != type || !bias.device().is_cpu())) return false;
  if (width != 1 && width != 2 && (width % 4 != 0 || width > 64)) return false;
  if (std::min({kt, kh, kw}) < 1 || std::max({kt, kh, kw}) > 31) return false;
  if (width * kt * kh * kw > 8192) return false;  // an output is one sum in float: longer ones are not as accurate as the library's
  if (stride[dims - 1] != stride[dims - 2] || *std::min_element(stride.begin(), stride.end()) < 1 || stride.back() > 2) return false;
  for (size_t d = 0; d < dims; ++d)
    if (dilation[d] != 1 || padding[d] < 0 || x.size(2 + d) + 2 * padding[d] < weight.size(2 + d)) return false;
  return dims == 2 || padding[0] < kt;  // each output frame then has an input frame
}

// Where the library is faster (docs/grouped_conv.md has what was measured), in float32: on small planes, on single images, where
// packing a wide group's weight takes long beside what it is packed for, and in gradients that are wanted alone, which it reads
// in place in channels_last.
enum class Pass { forward, input_gradient, weight_gradient, both_gradients };

// The same for volumes, of every type: wide groups, and the forward pass in channels_last, in which it copies nothing.
inline bool volume_left_to_library(const Geometry& g, bool in_float, bool channels_last, Pass pass) {
  if (g.width > (in_float ? 16 : 8)) return true;
  if (pass != Pass::forward || !channels_last) return false;
  if (g.width > 1) return !in_float && g.width == 8;
  return g.kt > 1 && (!in_float || g.frame_taps() > 1);
}

inline bool left_to_library(const Geometry& g, at::ScalarType type, bool channels_last, Pass pass) {
  if (!g.is_image()) return volume_left_to_library(g, type == at::kFloat, channels_last, pass);
  if (type != at::kFloat) return false;
  const int64_t outputs = g.OH * g.OW;
  const bool small = outputs <= 49, one = g.N == 1, medium = outputs <= 784;
  const bool gradient_of_input = pass == Pass::input_gradient || pass == Pass::both_gradients;
  const bool of_weight_alone = pass == Pass::weight_gradient, of_input_alone = pass == Pass::input_gradient;
  if (g.width > 16) {
    if (channels_last && g.width % kLanes<float> != 0 && (g.stride == 1 || pass == Pass::forward)) return true;
    if (!small) return false;
    if (channels_last) return one || of_weight_alone;
    return one && (of_weight_alone || (gradient_of_input && g.stride == 1));
  }
  if (!channels_last) return false;
  if (g.width == 16) {
    if (of_input_alone && (one || g.stride == 2)) return true;
    if (of_weight_alone && medium && g.stride == 1) return true;
    return small && (g.stride == 1 || !gradient_of_input);
  }
  if (g.width >= 8) return one && of_input_alone && g.stride == 2;
  if (g.width > 1) return false;
  if (g.taps() <= 9) return of_weight_alone && medium;
  return g.kh == 5 && g.kw == 5 && g.stride == 2 && small && pass == Pass::forward;
}

inline Geometry geometry(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding) {
  const int64_t H = x.size(-2), W = x.size(-1), kh = weight.size(-2), kw = weight.size(-1), step = stride.back();
  const int64_t ph = padding[padding.size() - 2], pw = padding.back();
  Geometry g{.N = x.size(0),
             .C = x.size(1),
             .H = H,
             .W = W,
             .OH = (H + 2 * ph - kh) / step + 1,
             .OW = (W + 2 * pw - kw) / step + 1,
             .kh = kh,
             .kw = kw,
             .stride = step,
             .ph = ph,
             .pw = pw,
             .width = weight.size(1)};
  if (x.dim() == 4) return g;
  g.T = x.size(2), g.kt = weight.size(2), g.stride_t = stride[0], g.pt = padding[0];
  g.OT = (g.T + 2 * g.pt - g.kt) / g.stride_t + 1;
  return g;
}

// The same convolution of images, where that reads the same memory: frames are images, if channels are innermost and the kernel
// has one frame; and rows of an image whose columns are a frame's pixels, if the kernel has one pixel.
inline Geometry as_images(Geometry g, bool channels_last) {
  if (g.stride_t != 1) return g;
  if (g.kt == 1 && channels_last) {
    g.N *= g.T, g.T = g.OT = 1;
  } else if (g.frame_taps() == 1 && g.stride == 1 && g.ph == 0 && g.pw == 0) {
    g.W *= g.H, g.OW = g.W, g.H = g.T, g.OH = g.OT, g.kh = g.kt, g.ph = g.pt;
    g.T = g.OT = g.kt = 1, g.pt = 0;
  }
  return g;
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
