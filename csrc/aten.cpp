#include "aten.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

namespace cnnkern::aten {

at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options) { return at::empty(size, options); }
at::Tensor empty_like(const at::Tensor& t) { return at::empty_like(t); }
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef strides, const at::TensorOptions& options) {
  return at::empty_strided(size, strides, options);
}
at::Tensor zeros(at::IntArrayRef size, const at::TensorOptions& options) { return at::zeros(size, options); }
at::Tensor sum(const at::Tensor& t, at::IntArrayRef dims) { return at::sum(t, dims); }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return at::convolution(x, weight, bias, stride, padding, dilation, /*transposed=*/false, /*output_padding=*/{0, 0}, groups);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> output_mask) {
  return at::convolution_backward(dy, x, weight, /*bias_sizes=*/at::IntArrayRef{weight.size(0)}, stride, padding, dilation,
                                  /*transposed=*/false, /*output_padding=*/{0, 0}, groups, output_mask);
}

}  // namespace cnnkern::aten
