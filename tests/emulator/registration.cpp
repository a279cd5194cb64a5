// Puts the emulated kernels on the CPU key of the operators, over the CPU's own, and takes them away again.
#include "registration.h"

#include "aten.cpp"
#include "kernels.h"
#include "own_convolutions.h"
#ifdef OPERATORS_BUILT  // native.py: not all of them
#undef CNNKERN_OPERATORS
#define CNNKERN_OPERATORS(f) OPERATORS_BUILT(f)
#endif
#define CNNKERN_CUDA
#define CNNKERN_CUDA_ARCHITECTURES "the emulator"
#include "register_cuda.cpp"

#include <c10/core/CPUAllocator.h>

#include <memory>
#include <string>
#include <vector>

// Memory of its own for each result: a sanitizer sees what is written beyond it.
c10::Allocator* cnnkern::block_pool::allocator(size_t) { return c10::GetCPUAllocator(); }

namespace {

std::vector<void (*)(torch::Library&)>& registrations() {
  static std::vector<void (*)(torch::Library&)> all;
  return all;
}

std::unique_ptr<torch::Library> library;
std::vector<cnnkern::OwnConvolution> own;

}  // namespace

emulator::Registration::Registration(void (*registers)(torch::Library&)) { registrations().push_back(registers); }

extern "C" __attribute__((visibility("default"))) void emulator_install() {
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "cnnkern", c10::DispatchKey::CPU, __FILE__, __LINE__);
  for (const auto registers : registrations()) registers(*library);
}

// The table of `cnnkern tune` that these kernels see has one convolution more: the dtype and the numbers of a pass of a call.
extern "C" __attribute__((visibility("default"))) void emulator_own_convolution(const char* dtype, const int64_t* numbers, size_t count) {
  const std::string name = dtype;
  const auto type = name == "bfloat16" ? at::kBFloat16 : name == "float16" ? at::kHalf : at::kFloat;
  own.emplace_back(false, type, std::vector<int64_t>(numbers, numbers + count));
  cnnkern::set_own_convolutions(own);
}

extern "C" __attribute__((visibility("default"))) void emulator_uninstall() {
  library.reset();
  own.clear();
  cnnkern::set_own_convolutions(own);
}
