// Stands in for PyTorch's header: the emulator's tensors are on the CPU.
#pragma once
#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device device) { TORCH_CHECK(device.is_cpu(), "the emulator takes CPU tensors, got ", device); }
  CUDAGuard(const CUDAGuard&) = delete;
  ~CUDAGuard() {}
};

}  // namespace c10::cuda
