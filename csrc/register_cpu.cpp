// Puts the kernels of csrc/cpu on the CPU key.
#include <torch/library.h>

#include "for_this_cpu.h"
#include "kernels.h"

namespace cnnkern {

#define DECLARE(op) signature::op op##_cpu;
#define CPU_OPERATORS(f) CNNKERN_OPERATORS(f) f(bn_act_conv2d) f(bn_act_conv2d_backward)  // the latter: autograd/bn_act_conv2d.cpp
#define KERNELS(f) \
  CPU_OPERATORS(f) f(bn_add_into) f(prefix_bn_relu) f(prefix_bn_relu_backward) f(fuses_bn_act_conv2d)
CNNKERN_DECLARE_FOR_EACH_CPU(KERNELS, DECLARE)

std::tuple<Tensor, Tensor> bn_add_into(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                       double momentum, double eps) {
  static const auto kernel = CNNKERN_FOR_THIS_CPU(bn_add_into);
  return kernel(x, residual, weight, bias, running_mean, running_var, training, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor> prefix_bn_relu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                                  const Tensor& mean, const Tensor& var, double momentum, double eps, bool rows) {
  static const auto kernel = CNNKERN_FOR_THIS_CPU(prefix_bn_relu);
  return kernel(x, weight, bias, running_mean, running_var, mean, var, momentum, eps, rows);
}

std::tuple<Tensor, Tensor> prefix_bn_relu_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& dx,
                                                   bool rows, std::array<bool, 2> output_mask) {
  static const auto kernel = CNNKERN_FOR_THIS_CPU(prefix_bn_relu_backward);
  return kernel(dy, x, weight, bias, mean, rstd, dx, rows, output_mask);
}

bool fuses_bn_act_conv2d(const Tensor& x, const Tensor& kernel, const Tensor& kernel_bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  static const auto own = CNNKERN_FOR_THIS_CPU(fuses_bn_act_conv2d);
  return own(x, kernel, kernel_bias, stride, padding, dilation, groups);
}

}  // namespace cnnkern

#define REGISTER(op) m.impl(#op, CNNKERN_FOR_THIS_CPU(op));

TORCH_LIBRARY_IMPL(cnnkern, CPU, m) {
  using namespace cnnkern;
  CPU_OPERATORS(REGISTER)
}
