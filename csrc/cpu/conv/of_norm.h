// The convolutions of grouped_conv2d.cpp of act(batch_norm(x)), which is computed as x is read and never stored.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "check.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

struct Norm {
  const OptionalTensor &weight, &bias;
  const Tensor &mean, &rstd;  // fp64 vectors of C
  ActivationName act;
};

// Whether conv2d_of_norm computes it.
bool reads_through_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups);

// Nothing, where the rule of grouped_conv2d leaves the convolution to the library, or x has to be copied first.
std::optional<Tensor> conv2d_of_norm(const Norm& norm, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);
// The gradients of act(batch_norm(x)), of the weight and of the bias.
std::optional<std::tuple<Tensor, Tensor, Tensor>> conv2d_of_norm_backward(const Norm& norm, const Tensor& dy, const Tensor& x,
                                                                          const Tensor& weight, at::IntArrayRef stride,
                                                                          at::IntArrayRef padding, at::IntArrayRef dilation,
                                                                          int64_t groups, std::array<bool, 3> output_mask);

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
