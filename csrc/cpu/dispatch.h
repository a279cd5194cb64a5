// Every file of csrc/cpu is compiled once for each instruction set, with CPU_CAPABILITY defined to DEFAULT, AVX2 or
// AVX512, its code in `namespace cnnkern::CPU_CAPABILITY`. The DEFAULT copy registers the operators, each with the
// kernel of the instruction set that torch.backends.cpu.get_cpu_capability() names (ATEN_CPU_CAPABILITY selects it).
#pragma once

#include <ATen/Version.h>
#if defined(CPU_CAPABILITY_DEFAULT)  // its copies alone register anything, and this header takes seconds to read
#include <torch/library.h>
#endif

namespace cnnkern {

template <typename Kernel>
Kernel* kernel_for_this_cpu(Kernel* baseline, [[maybe_unused]] Kernel* avx2, [[maybe_unused]] Kernel* avx512) {
#if CNNKERN_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
#endif
  return baseline;
}

}  // namespace cnnkern

#if !defined(CPU_CAPABILITY_DEFAULT)
#define CNNKERN_REGISTER_CPU(op, kernel)
#elif CNNKERN_X86
#define CNNKERN_REGISTER_CPU(op, kernel)                                                                   \
  namespace cnnkern {                                                                                      \
  namespace AVX2 { decltype(DEFAULT::kernel) kernel; }                                                     \
  namespace AVX512 { decltype(DEFAULT::kernel) kernel; }                                                   \
  TORCH_LIBRARY_IMPL(cnnkern, CPU, m) {                                                                    \
    m.impl(#op, kernel_for_this_cpu(&DEFAULT::kernel, &AVX2::kernel, &AVX512::kernel));                    \
  }                                                                                                        \
  }
#else
#define CNNKERN_REGISTER_CPU(op, kernel) \
  TORCH_LIBRARY_IMPL(cnnkern, CPU, m) { m.impl(#op, &cnnkern::DEFAULT::kernel); }
#endif
