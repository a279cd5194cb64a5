// Puts CPU kernels that the tests have built on the CPU key of the operators, over the extension's own, and takes them away
// again.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <memory>

#include "aten.cpp"
#include "kernels.h"
#ifdef OPERATORS_BUILT  // native.py: not all of them
#undef CNNKERN_OPERATORS
#define CNNKERN_OPERATORS(f) OPERATORS_BUILT(f)
#endif

// Memory of its own for each result: a sanitizer sees what is written beyond it.
c10::Allocator* cnnkern::block_pool::allocator(size_t) { return c10::GetCPUAllocator(); }

namespace cnnkern {
inline namespace CPU_CAPABILITY {
#define DECLARE(op) signature::op op##_cpu;
CNNKERN_OPERATORS(DECLARE)
}  // namespace CPU_CAPABILITY
}  // namespace cnnkern

static std::unique_ptr<torch::Library> library;

extern "C" __attribute__((visibility("default"))) void cpu_kernels_install() {
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "cnnkern", c10::DispatchKey::CPU, __FILE__, __LINE__);
#define REGISTER(op) library->impl(#op, &cnnkern::CPU_CAPABILITY::op##_cpu);
  CNNKERN_OPERATORS(REGISTER)
}

extern "C" __attribute__((visibility("default"))) void cpu_kernels_uninstall() { library.reset(); }
