// Stands in for PyTorch's header: the emulator's tensors are on the CPU. It refuses launches while there is no guard, and an
// operator that returns without having checked them.
#pragma once
#include <c10/core/Device.h>

#include <exception>

#include "gpu_emulator.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device device) {
    TORCH_CHECK(device.is_cpu(), "the emulator takes CPU tensors, got ", device);
    emulator::guard_begins();
  }
  CUDAGuard(const CUDAGuard&) = delete;
  ~CUDAGuard() noexcept(false) { emulator::guard_ends(std::uncaught_exceptions() > exceptions_); }

 private:
  int exceptions_ = std::uncaught_exceptions();
};

}  // namespace c10::cuda
