// What the kernels with planted faults have in common. Part of faults.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/gpu_compat.cuh"

namespace {

const c10::Device kDevice(c10::kCPU);

// As an operator launches.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  const c10::cuda::CUDAGuard guard(kDevice);
  cnnkern::gpu::launch(kernel, grid, block, shared, c10::cuda::getCurrentCUDAStream(), arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
template <typename... Parameters, typename... Arguments>
void launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  const c10::cuda::CUDAGuard guard(kDevice);
  cnnkern::gpu::launch_together(kernel, grid, block, shared, c10::cuda::getCurrentCUDAStream(), arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void nothing() {}

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// Global memory of exactly the size it is given, filled with NaN.
template <typename T>
struct Global {
  T* data;
  int size;
  explicit Global(int size) : data(static_cast<T*>(std::malloc(size * sizeof(T)))), size(size) {
    std::memset(data, 0xff, size * sizeof(T));
  }
  Global(int size, T value) : Global(size) { std::fill(data, data + size, value); }
  Global(const Global&) = delete;
  ~Global() { std::free(data); }
};

template <typename T>
void expect(const Global<T>& got, const std::vector<T>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!(got.data[i] == wanted[i]))
      throw std::runtime_error("wrong result: element " + std::to_string(i) + " is " + std::to_string(got.data[i]) +
                               " and not " + std::to_string(wanted[i]));
}

std::vector<float> rotated(int n) {  // 1, 2, ..., n - 1, 0
  std::vector<float> v(n);
  for (int i = 0; i < n; ++i) v[i] = static_cast<float>((i + 1) % n);
  return v;
}

}  // namespace
