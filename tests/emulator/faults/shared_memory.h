// Shared memory, barriers and who comes to them. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

template <bool kFault>
void rotate(float* out) {
  GPU_SHARED(float, s, kThreads);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kFault) __syncthreads();
  const float v = s[(threadIdx.x + 1) % kThreads];
  __syncthreads();
  out[threadIdx.x] = v;
}
template <bool kFault>
void missing_barrier() {
  Global<float> out(kThreads);
  launch(rotate<kFault>, 1, kThreads, 0, out.data);
  if (!kFault) expect(out, rotated(kThreads));
}

// Right in the order of the threads, and wrong in any other.
template <bool kFault>
void broadcast(float* out) {
  GPU_SHARED(float, s, 1);
  if (threadIdx.x == 0) s[0] = 3;
  if (!kFault) __syncthreads();
  out[threadIdx.x] = s[0];
}
template <bool kFault>
void order_of_threads() {
  Global<float> out(kThreads);
  launch(broadcast<kFault>, 1, kThreads, 0, out.data);
  expect(out, std::vector<float>(kThreads, 3.0f));
}

template <bool kFault>
void rotate_in_warps(float* out) {
  GPU_SHARED(float, s, kThreads);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  s[threadIdx.x] = static_cast<float>(lane);
  if (!kFault) __syncwarp();
  const float v = s[first + (lane + 1) % 32];
  __syncwarp();
  out[threadIdx.x] = v;
}
template <bool kFault>
void missing_syncwarp() {
  Global<float> out(kThreads);
  launch(rotate_in_warps<kFault>, 1, kThreads, 0, out.data);
  if (!kFault) expect(out, rotated(32));
}

// A shuffle exchanges registers, and orders no memory.
template <bool kFault>
void shuffle_for_a_barrier(float* out) {
  GPU_SHARED(float, s, 32);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kFault) __syncwarp();
  __shfl_xor_sync(kAll, 0, 1);
  out[threadIdx.x] = s[(threadIdx.x + 1) % 32];
}
template <bool kFault>
void shuffle_as_barrier() {
  Global<float> out(32);
  launch(shuffle_for_a_barrier<kFault>, 1, 32, 0, out.data);
  expect(out, rotated(32));
}

template <bool kFault>
void overrun_shared(float* out) {
  GPU_SHARED(float, s, kThreads);
  s[threadIdx.x + (kFault ? 1 : 0)] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
template <bool kFault>
void shared_overrun() {
  Global<float> out(kThreads);
  launch(overrun_shared<kFault>, 1, kThreads, 0, out.data);
}

template <bool kFault>
void overrun_dynamic(float* out) {
  GPU_DYN_SHARED(float, s);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
template <bool kFault>
void dynamic_shared_overrun() {
  Global<float> out(kThreads);
  launch(overrun_dynamic<kFault>, 1, kThreads, sizeof(float) * (kThreads - (kFault ? 1 : 0)), out.data);
}

template <bool kFault>
void overrun_global(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + (kFault ? 1 : 0)) out[i] = 1;
}
template <bool kFault>
void global_overrun() {
  Global<float> out(100);
  launch(overrun_global<kFault>, 2, kThreads, 0, out.data, out.size);
  expect(out, std::vector<float>(100, 1.0f));
}

template <bool kFault>
void sum_of_all(float* out) {
  GPU_SHARED(float, s, kThreads);
  if (!kFault || threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += s[i];
  out[threadIdx.x] = sum;
}
template <bool kFault>
void uninitialised_shared() {
  Global<float> out(kThreads);
  launch(sum_of_all<kFault>, 1, kThreads, 0, out.data);
  expect(out, std::vector<float>(kThreads, static_cast<float>(kThreads)));
}

template <bool kFault>
void diverge(float* out) {
  if (kFault && threadIdx.x % 2 == 0) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}
template <bool kFault>
void divergent_barrier() {
  Global<float> out(kThreads);
  launch(diverge<kFault>, 1, kThreads, 0, out.data);
}

template <bool kFault>
void leave_early(float* out) {
  if (kFault && threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
template <bool kFault>
void early_exit() {
  Global<float> out(kThreads);
  launch(leave_early<kFault>, 1, kThreads, 0, out.data);
}

// The other half of the warps never comes: a barrier is for all threads of a block.
template <bool kFault>
void wait_in_one_warp(float* out) {
  if (!kFault || threadIdx.x < 32) __syncthreads();
  if (kFault && threadIdx.x == 32) __syncwarp();
  if (kFault && threadIdx.x > 32) __syncthreads();
  out[threadIdx.x] = 1;
}
template <bool kFault>
void threads_that_hang() {
  Global<float> out(kThreads);
  launch(wait_in_one_warp<kFault>, 1, kThreads, 0, out.data);
}

}  // namespace
