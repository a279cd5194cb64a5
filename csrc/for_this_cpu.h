// Which copy of a kernel of csrc/cpu answers: every file there is compiled once for each instruction set, with CPU_CAPABILITY
// defined to DEFAULT, AVX2 or AVX512, its code in `namespace cnnkern::CPU_CAPABILITY`. That of the instruction set that
// torch.backends.cpu.get_cpu_capability() names is taken (ATEN_CPU_CAPABILITY selects it).
#pragma once

#include <ATen/Version.h>

#include <string>

namespace cnnkern {

template <typename Kernel>
Kernel* for_this_cpu(Kernel* baseline, [[maybe_unused]] Kernel* avx2, [[maybe_unused]] Kernel* avx512) {
#if CNNKERN_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
#endif
  return baseline;
}

}  // namespace cnnkern

// Declares name_cpu for each name of a list f(name), with the signature of that name in a namespace; in `namespace cnnkern`.
#if CNNKERN_X86
#define CNNKERN_DECLARE_FOR_EACH_CPU(list, declare) \
  namespace DEFAULT { list(declare) }               \
  namespace AVX2 { list(declare) }                  \
  namespace AVX512 { list(declare) }
#define CNNKERN_FOR_THIS_CPU(name) for_this_cpu(&DEFAULT::name##_cpu, &AVX2::name##_cpu, &AVX512::name##_cpu)
#else
#define CNNKERN_DECLARE_FOR_EACH_CPU(list, declare) namespace DEFAULT { list(declare) }
#define CNNKERN_FOR_THIS_CPU(name) for_this_cpu(&DEFAULT::name##_cpu, &DEFAULT::name##_cpu, &DEFAULT::name##_cpu)
#endif
