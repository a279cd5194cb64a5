// grouped_conv2d and grouped_conv2d_backward on CUDA tensors. The kernels are in grouped_conv2d.cuh.
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <tuple>

#include "aten.h"
#include "check.h"
#include "compat.h"
#include "cuda/conv/grouped_conv2d.cuh"
#include "memory_layout.h"
#include "own_convolutions.h"

namespace cnnkern {
namespace {

using gpu::ConvGeometry;

constexpr int64_t kLongest = 31;  // rows or columns of a kernel

// What the kernels support. ATen computes everything else, and raises its own errors.
bool covered(const Tensor& x, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
             at::IntArrayRef dilation, int64_t groups) {
  if (x.dim() != 4 || weight.dim() != 4 || stride.size() != 2 || padding.size() != 2 || dilation.size() != 2) return false;
  const auto type = x.scalar_type();
  if ((type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) || weight.scalar_type() != type) return false;
  const int64_t C = x.size(1), O = weight.size(0), width = weight.size(1);
  if (groups < 2 || x.numel() == 0 || weight.numel() == 0 || width * groups != C || O % groups != 0 || weight.device() != x.device()) return false;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != O || bias.scalar_type() != type || bias.device() != x.device())) return false;
  const int64_t widest = type == at::kBFloat16 || type == at::kHalf ? gpu::kWidest : gpu::kMostWide;  // channels per group
  if (width > widest || O / groups > widest) return false;
  int64_t y = x.size(0) * O, sums = O * width;
  for (int d = 0; d < 2; ++d) {
    const int64_t size = x.size(2 + d), kernel = weight.size(2 + d), span = dilation[d] * (kernel - 1) + 1;
    constexpr int64_t kMost = 1 << 16;
    if (kernel > kLongest || stride[d] < 1 || dilation[d] < 1 || padding[d] < 0 || std::max({stride[d], dilation[d], padding[d]}) > kMost) return false;
    if (size + 2 * padding[d] < span) return false;
    y *= (size + 2 * padding[d] - span) / stride[d] + 1, sums *= kernel;
  }
  // Kernels count blocks and outputs in 31 bits, and address in 64.
  constexpr int64_t kMost = int64_t{1} << 30;
  return std::max({x.numel(), y, (sums + O) * (y / O / gpu::kAnyPart + 1)}) < kMost;
}

enum class Pass { forward, input_gradient, weight_gradient };

// Whether cuDNN is faster in a pass of what grouped_rows.cuh computes. In 16 bits cuDNN has fast kernels for widths that are powers
// of two: for 16 in the forward pass at stride 2, for 32 in that and in the gradients but dx at stride 2, for 64 in all but dx. For
// 24, 40, 48, 56, 72 and 112 it takes 1.8 to 12 times as long. In TF32 it is faster in the forward pass at stride 2, up to 16.
// Measured on an H100, and up to width 32 on an H200, at batch 128 (docs/results.md). Assumed: width 2 as 4, 120 as 112. Widths that
// were not measured are cuDNN's.
bool library_is_faster(const ConvGeometry& g, Pass pass, bool float32) {
  const int64_t width = g.inputs();
  const bool forward = pass == Pass::forward, dx = pass == Pass::input_gradient, strided = g.sh == 2;
  if (float32) return forward && strided && width <= 16;
  if (width == 16) return forward && strided;
  if (width == 32) return strided ? !dx : !forward;
  if (width == 64) return !dx;
  return width > 72 && width != 112 && width != 120;
}

// The dispatch rule for what is covered. Depthwise kernels compute every pass: one row of the measured ones was slower than cuDNN
// (docs/grouped_conv.md). In planes of 16 bits the kernels of wider groups are faster up to 4 channels, except for the weight's
// gradient. Assumed, not measured: in fp32 planes they reach half of the 67 TFLOP/s of the fp32 units, and are faster. Without TF32
// convolutions in rows are left to cuDNN, also by a table, which does not say under which setting it was measured.
// `own`: the table of `cnnkern tune`, which overrides what was measured here.
bool left_to_library(const ConvGeometry& g, Pass pass, std::initializer_list<Tensor> read, bool own) {
  const auto type = read.begin()->scalar_type();
  if (type == at::kDouble || (g.inputs() == 1 && g.outputs() == 1)) return false;
  const bool float32 = type == at::kFloat;
  if (gpu::grouped_rows_take(g, float32)) {
    const bool apart = !std::all_of(read.begin(), read.end(), [](const Tensor& t) { return gpu::aligned_to_vectors(t.const_data_ptr()); });
    return (float32 && !g.tf32) || apart || (!own && library_is_faster(g, pass, float32));
  }
  if (g.inputs() > gpu::kMostWide || g.outputs() > gpu::kMostWide) return true;
  if (own) return false;
  if (!gpu::grouped_planes_take(g)) return true;
  return !float32 && (g.inputs() > 4 || pass == Pass::weight_gradient);
}

ConvGeometry geometry(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups, bool rows) {
  const auto size = [&](int d) { return (x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(2 + d) - 1) - 1) / stride[d] + 1; };
  const auto small = [](int64_t n) { return static_cast<int>(n); };
  return {.rows = rows,
          .N = x.size(0),
          .C = x.size(1),
          .H = x.size(2),
          .W = x.size(3),
          .O = weight.size(0),
          .OH = size(0),
          .OW = size(1),
          .groups = groups,
          .kh = small(weight.size(2)),
          .kw = small(weight.size(3)),
          .sh = small(stride[0]),
          .sw = small(stride[1]),
          .ph = small(padding[0]),
          .pw = small(padding[1]),
          .dh = small(dilation[0]),
          .dw = small(dilation[1]),
          .tf32 = convolutions_in_tf32()};
}

// The memory format of results, chosen as ATen's convolutions choose it.
at::MemoryFormat result_format(const Tensor& x, const Tensor& weight) {
  for (const auto format : {at::MemoryFormat::ChannelsLast, at::MemoryFormat::ChannelsLast3d})
    if (x.suggest_memory_format() == format || weight.suggest_memory_format() == format) return format;
  return at::MemoryFormat::Contiguous;
}

}  // namespace

Tensor grouped_conv2d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Tensor& b = tensor_or_undefined(bias);
  const auto by_library = [&] {
    return aten::convolution(x, weight, bias, stride, padding, dilation, groups);
  };
  if (!covered(x, weight, b, stride, padding, dilation, groups)) return by_library();
  const auto format = result_format(x, weight);
  const ConvGeometry g = geometry(x, weight, stride, padding, dilation, groups, format == at::MemoryFormat::ChannelsLast);
  if (left_to_library(g, Pass::forward, {x}, is_own_convolution(x, weight, stride, padding, dilation, false))) return by_library();
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = x.contiguous(format), weight_ = in_layout(weight), bias_ = b.defined() ? b.contiguous() : b;
  const Tensor y = aten::empty({g.N, g.O, g.OH, g.OW}, x.options().memory_format(format));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "grouped_conv2d", [&] {
    gpu::grouped_conv2d_forward(g, x_.const_data_ptr<scalar_t>(), weight_.const_data_ptr<scalar_t>(), weight_.strides().data(),
                                b.defined() ? bias_.const_data_ptr<scalar_t>() : nullptr, y.mutable_data_ptr<scalar_t>(),
                                c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> grouped_conv2d_backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                                at::IntArrayRef stride, at::IntArrayRef padding,
                                                                at::IntArrayRef dilation, int64_t groups,
                                                                std::array<bool, 3> output_mask) {
  const auto format = result_format(x, weight);
  const Tensor none = aten::empty({0}, x.options());
  const auto by_library = [&](std::array<bool, 3> wanted) {
    // A bias's gradient is summed in the order of dy's memory, which differs between autograd and torch.compile.
    const bool alike = dy.dim() == x.dim() && weight.dim() == x.dim();
    const auto grads = aten::convolution_backward(alike ? dy.contiguous(format) : dy, x, weight, stride, padding, dilation,
                                                  groups, wanted);
    const auto asked = [&](int i, const Tensor& t) { return wanted[i] ? t : none; };
    return std::tuple(asked(0, std::get<0>(grads)), asked(1, std::get<1>(grads)), asked(2, std::get<2>(grads)));
  };
  if (!covered(x, weight, {}, stride, padding, dilation, groups)) return by_library(output_mask);
  const ConvGeometry g = geometry(x, weight, stride, padding, dilation, groups, format == at::MemoryFormat::ChannelsLast);
  TORCH_CHECK(dy.sizes() == at::IntArrayRef({g.N, g.O, g.OH, g.OW}) && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
              "cnnkern::grouped_conv2d_backward: dy must be ", x.scalar_type(), " ", at::IntArrayRef({g.N, g.O, g.OH, g.OW}), " on ",
              x.device(), " like the forward pass's output; got ", dy.scalar_type(), " ", dy.sizes(), " on ", dy.device());
  const bool own = is_own_convolution(x, weight, stride, padding, dilation, true);
  const bool left_weight = left_to_library(g, Pass::weight_gradient, {x, dy}, own);
  const std::array<bool, 3> left = {output_mask[0] && left_to_library(g, Pass::input_gradient, {x, dy}, own), output_mask[1] && left_weight,
                                    output_mask[2] && left_weight};
  if (left == output_mask) return by_library(output_mask);
  Tensor dx = none, dweight = none, dbias = none;
  if (left[0] || left[1] || left[2]) std::tie(dx, dweight, dbias) = by_library(left);
  for (int i = 0; i < 3; ++i) output_mask[i] = output_mask[i] && !left[i];
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dy_ = dy.contiguous(format), weight_ = in_layout(weight);
  if (output_mask[0]) dx = aten::empty(x.sizes(), x.options().memory_format(format));
  if (output_mask[1]) dweight = aten::empty(weight.sizes(), weight.options().memory_format(format));
  if (output_mask[2] && output_mask[1]) dbias = aten::empty({g.O}, weight.options());
  if (output_mask[2] && !output_mask[1]) dbias = aten::sum(dy_, at::IntArrayRef{0, 2, 3});
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "grouped_conv2d_backward", [&] {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const scalar_t* const dy_data = dy_.const_data_ptr<scalar_t>();
    if (output_mask[0]) {
      gpu::grouped_conv2d_input_gradient(g, dy_data, weight_.const_data_ptr<scalar_t>(), weight_.strides().data(),
                                         dx.mutable_data_ptr<scalar_t>(), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (output_mask[1]) {
      using S = gpu::compute_t<scalar_t>;
      const Tensor x_ = x.contiguous(format);
      const scalar_t* const x_data = x_.const_data_ptr<scalar_t>();
      auto sums = gpu::partial_sums(g, dy_data, x_data);
      const Tensor workspace = aten::empty({sums.parts * sums.values()}, x.options().dtype(c10::CppTypeToScalarType<S>::value));
      sums.data = workspace.mutable_data_ptr<S>();
      gpu::WeightGradient<scalar_t> gradient = {dweight.mutable_data_ptr<scalar_t>(), output_mask[2] ? dbias.mutable_data_ptr<scalar_t>() : nullptr,
                                                {}, g.kh, g.kw};
      std::copy_n(dweight.strides().data(), 4, gradient.strides);
      gpu::grouped_conv2d_weight_gradient(g, dy_data, x_data, sums, gradient, stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {dx, dweight, dbias};
}

}  // namespace cnnkern
