// The functions of ATen that kernels call. The compiler takes several seconds to read ATen's own headers, longer than for
// many a kernel, and would read them for each of some thirty objects: only aten.cpp includes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace cnnkern::aten {

at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& t);
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef strides, const at::TensorOptions& options);
at::Tensor zeros(at::IntArrayRef size, const at::TensorOptions& options);
at::Tensor sum(const at::Tensor& t, at::IntArrayRef dims);

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> output_mask);

}  // namespace cnnkern::aten
