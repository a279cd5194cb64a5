// What a launch may ask for. Part of faults.cpp.
#pragma once

#include <optional>

#include "common.h"

namespace {

template <bool kFault>
void too_many_threads() {
  launch(nothing, 1, dim3(kFault ? 1056 : 1024), 0);
}
template <bool kFault>
void empty_grid() {
  launch(nothing, kFault ? 0 : 1, 32, 0);
}
template <bool kFault>
void grid_too_tall() {
  launch(nothing, dim3(1, kFault ? 65536 : 2), 32, 0);
}
template <bool kFault>
void too_much_shared() {
  launch(nothing, 1, 32, (227 << 10) + (kFault ? 1 : 0));
}
template <bool kFault>
void fill_arrays(float* out) {
  GPU_SHARED(double, large, kFault ? 6145 : 6000);
  large[threadIdx.x] = 1;
  out[threadIdx.x] = static_cast<float>(large[threadIdx.x]);
}
template <bool kFault>
void too_much_static_shared() {
  Global<float> out(32);
  launch(fill_arrays<kFault>, 1, 32, 0, out.data);
}
// A kernel opts in by its dynamic memory alone.
template <bool kFault>
void too_much_shared_together() {
  Global<float> out(32);
  launch(fill_arrays<false>, 1, 32, 1152, out.data);
  launch(fill_arrays<false>, 1, 32, kFault ? 1153 : (227 << 10) - 48000, out.data);
}

template <bool kFault>
void half_waits() {
  if (!kFault || threadIdx.x < 16) cnnkern::gpu::wait_for_previous();
}
template <bool kFault>
void threads_that_do_not_wait() {
  const c10::cuda::CUDAGuard guard(kDevice);
  cnnkern::gpu::launch_next(half_waits<kFault>, 2, 32, 0, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <bool kFault>
void another_stream() {
  const c10::cuda::CUDAGuard guard(kDevice);
  cnnkern::gpu::launch(nothing, 1, 32, 0, kFault ? nullptr : c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
template <bool kFault>
void missing_guard() {
  std::optional<c10::cuda::CUDAGuard> guard;
  if (!kFault) guard.emplace(kDevice);
  cnnkern::gpu::launch(nothing, 1, 32, 0, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
template <bool kFault>
void missing_launch_check() {
  const c10::cuda::CUDAGuard guard(kDevice);
  for (int i = 0; i < 2; ++i) {
    cnnkern::gpu::launch(nothing, 1, 32, 0, c10::cuda::getCurrentCUDAStream());
    if (!kFault || i == 0) C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace
