// What blocks do to one another. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

// The last block to finish adds up what the others wrote.
template <bool kFault>
void last_block_adds(float* partial, unsigned* counter, float* out) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = static_cast<float>(blockIdx.x);
  if (!kFault) __threadfence();
  if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
  __threadfence();
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  out[0] = sum;
}
template <bool kFault>
void missing_threadfence() {
  Global<float> partial(8), out(1);
  Global<unsigned> counter(1, 0u);
  launch(last_block_adds<kFault>, 8, kThreads, 0, partial.data, counter.data, out.data);
  expect(out, {28.0f});
}

// In memory, where a block's local variables are not another block's, whatever the emulator reuses.
__attribute__((noinline)) void set(float* p) { *p = 1; }

template <bool kFault>
void write_own_or_shared(float* out) {
  float local;
  set(&local);
  if (threadIdx.x == 0) out[kFault ? blockIdx.x / 2 : blockIdx.x] = local;
}
template <bool kFault>
void cross_block_race() {
  Global<float> out(4);
  launch(write_own_or_shared<kFault>, 4, kThreads, 0, out.data);
}

// A barrier that one block has passed after its access and the other before its own does not order the two.
template <bool kFault>
void write_around_a_barrier(float* out) {
  const auto write = [&] { out[kFault ? blockIdx.x / 2 : blockIdx.x] = 1; };
  if (threadIdx.x == 0 && blockIdx.x % 2 == 0) write();
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x % 2 == 1) write();
}
template <bool kFault>
void cross_block_race_around_a_barrier() {
  Global<float> out(4);
  launch(write_around_a_barrier<kFault>, 4, kThreads, 0, out.data);
}

// A block that reads what another has written in the same launch.
template <bool kFault>
void read_neighbour(const float* in, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = 1;
  if (threadIdx.x == 1 && blockIdx.x > 0) out[4 + blockIdx.x] = (kFault ? out : in)[blockIdx.x - 1];
}
template <bool kFault>
void block_reads_another() {
  Global<float> in(4, 1.0f), out(8);
  launch(read_neighbour<kFault>, 4, kThreads, 0, in.data, out.data);
}

}  // namespace
