// Which copy of a kernel of csrc/cpu answers: every file there is compiled once for each instruction set, with CPU_CAPABILITY
// defined to DEFAULT, AVX2 or AVX512, its code in `namespace cnnkern::CPU_CAPABILITY`. That of the instruction set that
// torch.backends.cpu.get_cpu_capability() names is taken (ATEN_CPU_CAPABILITY selects it). CNNKERN_CPU=native builds one alone.
#pragma once

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

namespace cnnkern {

template <typename Kernel>
struct Copy {
  const char* capability;
  Kernel* kernel;
};
template <typename Kernel>
Copy(const char*, Kernel*) -> Copy<Kernel>;

// The last copy that this process can run. cnnkern/extension.py does not load an extension without one.
template <typename Kernel, size_t kCopies>
Kernel* for_this_cpu(const Copy<Kernel> (&copies)[kCopies]) {
  const std::string capability = at::get_cpu_capability();
  Kernel* found = nullptr;
  for (const auto& copy : copies)
    if (copy.capability == capability || std::string("DEFAULT") == copy.capability) found = copy.kernel;
  TORCH_INTERNAL_ASSERT(found != nullptr, "no kernels for ", capability);
  return found;
}

}  // namespace cnnkern

// Their arguments in a build for this instruction set, nothing in others: tools/build_extension.py defines CNNKERN_CPU_*.
#if CNNKERN_CPU_DEFAULT
#define CNNKERN_IF_DEFAULT(...) __VA_ARGS__
#else
#define CNNKERN_IF_DEFAULT(...)
#endif
#if CNNKERN_CPU_AVX2
#define CNNKERN_IF_AVX2(...) __VA_ARGS__
#else
#define CNNKERN_IF_AVX2(...)
#endif
#if CNNKERN_CPU_AVX512
#define CNNKERN_IF_AVX512(...) __VA_ARGS__
#else
#define CNNKERN_IF_AVX512(...)
#endif

// Declares name_cpu for each name of a list f(name), with the signature of that name in a namespace; in `namespace cnnkern`.
#define CNNKERN_DECLARE_FOR_EACH_CPU(list, declare)       \
  CNNKERN_IF_DEFAULT(namespace DEFAULT { list(declare) }) \
  CNNKERN_IF_AVX2(namespace AVX2 { list(declare) })       \
  CNNKERN_IF_AVX512(namespace AVX512 { list(declare) })
#define CNNKERN_FOR_THIS_CPU(name)                               \
  for_this_cpu({CNNKERN_IF_DEFAULT(Copy{"DEFAULT", &DEFAULT::name##_cpu}, ) \
                CNNKERN_IF_AVX2(Copy{"AVX2", &AVX2::name##_cpu}, ) \
                CNNKERN_IF_AVX512(Copy{"AVX512", &AVX512::name##_cpu}, )})
