// Puts the kernels of csrc/cpu on the CPU key. Every file there is compiled once for each instruction set, with
// CPU_CAPABILITY defined to DEFAULT, AVX2 or AVX512, its code in `namespace cnnkern::CPU_CAPABILITY`; those of the
// instruction set that torch.backends.cpu.get_cpu_capability() names answer (ATEN_CPU_CAPABILITY selects it).
#include <ATen/Version.h>
#include <torch/library.h>

#include "kernels.h"

namespace cnnkern {

#define DECLARE(op) signature::op op##_cpu;
namespace DEFAULT {
CNNKERN_OPERATORS(DECLARE)
DECLARE(bn_add_into)
}
#if CNNKERN_X86
namespace AVX2 {
CNNKERN_OPERATORS(DECLARE)
DECLARE(bn_add_into)
}
namespace AVX512 {
CNNKERN_OPERATORS(DECLARE)
DECLARE(bn_add_into)
}
#endif

namespace {

template <typename Kernel>
Kernel* for_this_cpu(Kernel* baseline, [[maybe_unused]] Kernel* avx2, [[maybe_unused]] Kernel* avx512) {
#if CNNKERN_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
#endif
  return baseline;
}

}  // namespace
}  // namespace cnnkern

#if CNNKERN_X86
#define FOR_THIS_CPU(op) for_this_cpu(&DEFAULT::op##_cpu, &AVX2::op##_cpu, &AVX512::op##_cpu)
#else
#define FOR_THIS_CPU(op) for_this_cpu(&DEFAULT::op##_cpu, &DEFAULT::op##_cpu, &DEFAULT::op##_cpu)
#endif

namespace cnnkern {

std::tuple<Tensor, Tensor> bn_add_into(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                       double momentum, double eps) {
  static const auto kernel = FOR_THIS_CPU(bn_add_into);
  return kernel(x, residual, weight, bias, running_mean, running_var, training, momentum, eps);
}

}  // namespace cnnkern

#define REGISTER(op) m.impl(#op, FOR_THIS_CPU(op));
TORCH_LIBRARY_IMPL(cnnkern, CPU, m) {
  using namespace cnnkern;
  CNNKERN_OPERATORS(REGISTER)
}
