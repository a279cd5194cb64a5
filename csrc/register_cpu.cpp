// Puts the kernels of csrc/cpu on the CPU key.
#include <torch/library.h>

#include "for_this_cpu.h"
#include "kernels.h"

namespace cnnkern {

#define DECLARE(op) signature::op op##_cpu;
#define KERNELS(f) CNNKERN_OPERATORS(f) f(bn_add_into)
CNNKERN_DECLARE_FOR_EACH_CPU(KERNELS, DECLARE)

std::tuple<Tensor, Tensor> bn_add_into(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                       double momentum, double eps) {
  static const auto kernel = CNNKERN_FOR_THIS_CPU(bn_add_into);
  return kernel(x, residual, weight, bias, running_mean, running_var, training, momentum, eps);
}

}  // namespace cnnkern

#define REGISTER(op) m.impl(#op, CNNKERN_FOR_THIS_CPU(op));

TORCH_LIBRARY_IMPL(cnnkern, CPU, m) {
  using namespace cnnkern;
  CNNKERN_OPERATORS(REGISTER)
}
