// Asynchronous copies. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

using cnnkern::gpu::async_commit;
using cnnkern::gpu::async_copy;
using cnnkern::gpu::async_wait;

constexpr int kStages = 3, kChunks = 7;

enum class Slip { none, late_wait, one_too_many, no_last_wait, no_commit, no_barrier, early_refill, overrun };

// Chunks of a vector a thread go through a ring of three; the last thread's in the last chunk do not exist.
template <Slip kSlip>
void pipeline(const uint4* in, float* out, int size) {
  GPU_DYN_SHARED(uint4, ring);
  const auto request = [&](int chunk) {
    const int i = chunk * kThreads + static_cast<int>(threadIdx.x);
    const bool exists = i < size || (kSlip == Slip::overrun && chunk < kChunks);
    async_copy(ring + chunk % kStages * kThreads + threadIdx.x, in + (exists ? i : 0), exists);
    if (kSlip != Slip::no_commit) async_commit();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) request(chunk);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (kSlip != Slip::late_wait) async_wait<kSlip == Slip::one_too_many ? kStages - 1 : kStages - 2>();
    if (kSlip == Slip::early_refill) request(chunk + kStages - 1);
    if (kSlip != Slip::no_barrier) __syncthreads();
    const uint4 v = ring[chunk % kStages * kThreads + (threadIdx.x + 1) % kThreads];
    memcpy(out + chunk * kThreads + threadIdx.x, &v.w, sizeof(float));
    if (kSlip == Slip::late_wait) async_wait<kStages - 2>();
    if (kSlip != Slip::early_refill) request(chunk + kStages - 1);
  }
  if (kSlip != Slip::no_last_wait) async_wait<0>();
}
template <Slip kSlip>
void pipelines() {
  const int size = kChunks * kThreads - 3;
  Global<uint4> in(size);
  Global<float> out(kChunks * kThreads);
  std::vector<float> wanted(out.size);
  for (int i = 0; i < size; ++i) {
    const float v = static_cast<float>(i + 1);
    memcpy(&in.data[i].w, &v, sizeof(v));
    wanted[i % kThreads == 0 ? i + kThreads - 1 : i - 1] = v;
  }
  launch(pipeline<kSlip>, 1, kThreads, sizeof(uint4) * kStages * kThreads, in.data, out.data, size);
  expect(out, wanted);
}

#define SLIP(name, slip)                        \
  template <bool kFault>                        \
  void name() {                                 \
    pipelines<kFault ? slip : Slip::none>();    \
  }
SLIP(copy_never_waited_for, Slip::no_last_wait)
SLIP(copy_read_before_the_wait, Slip::late_wait)
SLIP(wait_that_leaves_one_too_many, Slip::one_too_many)
SLIP(copy_not_committed, Slip::no_commit)
SLIP(missing_barrier_after_a_copy, Slip::no_barrier)
SLIP(copy_over_what_others_read, Slip::early_refill)
SLIP(copy_from_beyond_a_tensor, Slip::overrun)

enum class Misuse { none, destination_off, source_off, destination_beyond, source_shared, source_written, destination_written };

template <Misuse kMisuse>
void copy_one(float* in, float* out) {
  GPU_SHARED(uint4, s, 8);
  constexpr int kOff = kMisuse == Misuse::destination_off ? 4 : kMisuse == Misuse::destination_beyond ? 8 * 16 : 0;
  const void* const from = kMisuse == Misuse::source_off ? in + 1 : kMisuse == Misuse::source_shared ? static_cast<void*>(s + 1) : in;
  async_copy(reinterpret_cast<char*>(s) + kOff, from);
  async_commit();
  if (kMisuse == Misuse::source_written) in[2] = 3;
  if (kMisuse == Misuse::destination_written) s[0] = {};
  async_wait<0>();
  memcpy(out, s, 16);
}
template <Misuse kMisuse>
void copies_one() {
  Global<float> in(8, 1.0f), out(4);
  launch(copy_one<kMisuse>, 1, 1, 0, in.data, out.data);
  expect(out, std::vector<float>(4, 1.0f));
}

#define MISUSE(name, misuse)                       \
  template <bool kFault>                           \
  void name() {                                    \
    copies_one<kFault ? misuse : Misuse::none>();  \
  }
MISUSE(copy_to_a_misaligned_address, Misuse::destination_off)
MISUSE(copy_from_a_misaligned_address, Misuse::source_off)
MISUSE(copy_beyond_shared_memory, Misuse::destination_beyond)
MISUSE(copy_from_shared_memory, Misuse::source_shared)
MISUSE(source_written_under_a_copy, Misuse::source_written)
MISUSE(destination_written_under_a_copy, Misuse::destination_written)

}  // namespace
