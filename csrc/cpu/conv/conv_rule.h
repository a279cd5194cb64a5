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
  if (x.dim() != 4 || weight.dim() != 4 || stride.size() != 2 || padding.size() != 2 || dilation.size() != 2) return false;
  const auto type = x.scalar_type();
  if ((type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) || weight.scalar_type() != type) return false;
  const int64_t C = x.size(1), width = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  if (groups < 2 || x.numel() == 0 || weight.size(0) != C || width * groups != C || !weight.device().is_cpu()) return false;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != C || bias.scalar_type() != type || !bias.device().is_cpu())) return false;
  if (width != 1 && width != 2 && (width % 4 != 0 || width > 64)) return false;
  if (width * kh * kw > 8192) return false;  // an output is one sum in float: longer ones are not as accurate as the library's
  if (stride[0] != stride[1] || stride[0] < 1 || stride[0] > 2 || dilation[0] != 1 || dilation[1] != 1) return false;
  if (std::min(kh, kw) < 1 || std::max(kh, kw) > 31 || padding[0] < 0 || padding[1] < 0) return false;
  return x.size(2) + 2 * padding[0] >= kh && x.size(3) + 2 * padding[1] >= kw;
}

// Where the library is faster (docs/grouped_conv.md has what was measured), in float32: on small planes, on single images, where
// packing a wide group's weight takes long beside what it is packed for, and in gradients that are wanted alone, which it reads
// in place in channels_last.
enum class Pass { forward, input_gradient, weight_gradient, both_gradients };
inline bool left_to_library(const Geometry& g, at::ScalarType type, bool channels_last, Pass pass) {
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
  const int64_t kh = weight.size(2), kw = weight.size(3);
  return {.N = x.size(0),
          .C = x.size(1),
          .H = x.size(2),
          .W = x.size(3),
          .OH = (x.size(2) + 2 * padding[0] - kh) / stride[0] + 1,
          .OW = (x.size(3) + 2 * padding[1] - kw) / stride[0] + 1,
          .kh = kh,
          .kw = kw,
          .stride = stride[0],
          .ph = padding[0],
          .pw = padding[1],
          .width = weight.size(1)};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
