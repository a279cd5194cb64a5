// Blocks that run together and wait for one another. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

using cnnkern::gpu::group_barrier;
using cnnkern::gpu::resident_blocks;

constexpr unsigned kGroup = 3, kGroups = 2;  // blocks; groups

enum class Stray { none, too_many, too_few, same_turn, leaves, no_barrier, other_group, overwrites };

// Twice, each block adds what the blocks of its group have written.
template <Stray kStray>
void sum_of_group(float* partial, unsigned* counters, float* out) {
  const unsigned group = blockIdx.x / kGroup, asked = kStray == Stray::other_group ? (group + 1) % kGroups : group;
  constexpr unsigned kBlocks = kStray == Stray::too_many ? kGroup + 1 : kStray == Stray::too_few ? kGroup - 1 : kGroup;
  const auto meet = [&](unsigned turn) {
    if (kStray == Stray::no_barrier)
      __syncthreads();
    else
      group_barrier(counters + group, kBlocks, turn);
  };
  if (kStray == Stray::leaves && blockIdx.x == 4) return;
  float* const mine = partial + blockIdx.x * kThreads + threadIdx.x;
  *mine = static_cast<float>(blockIdx.x);
  unsigned turn = 0;
  for (int time = 0; time < 2; ++time) {
    meet(kStray == Stray::same_turn ? 0 : turn++);
    float sum = 0;
    for (unsigned b = 0; b < kGroup; ++b) sum += partial[(asked * kGroup + b) * kThreads + (threadIdx.x + 1) % kThreads];
    if (kStray != Stray::overwrites) meet(turn++);
    *mine = sum;
  }
  out[blockIdx.x * kThreads + threadIdx.x] = *mine;
}
template <Stray kStray>
void sums_of_groups(bool at_once = true, unsigned counted = 0) {
  Global<float> partial(kGroup * kGroups * kThreads), out(kGroup * kGroups * kThreads);
  Global<unsigned> counters(kGroups, counted);
  if (at_once)
    launch_together(sum_of_group<kStray>, kGroup * kGroups, kThreads, 0, partial.data, counters.data, out.data);
  else
    launch(sum_of_group<kStray>, kGroup * kGroups, kThreads, 0, partial.data, counters.data, out.data);
  std::vector<float> wanted(kGroup * kThreads, 3.0f * (0 + 1 + 2));
  wanted.insert(wanted.end(), kGroup * kThreads, 3.0f * (3 + 4 + 5));
  if (kStray == Stray::none) expect(out, wanted);
}

#define STRAY(name, stray)                            \
  template <bool kFault>                              \
  void name() {                                       \
    sums_of_groups<kFault ? stray : Stray::none>();   \
  }
STRAY(group_barrier_of_too_many, Stray::too_many)
STRAY(group_barrier_of_too_few, Stray::too_few)
STRAY(group_barrier_in_a_turn_that_was, Stray::same_turn)
STRAY(block_that_leaves_its_group, Stray::leaves)
STRAY(missing_group_barrier, Stray::no_barrier)
STRAY(partial_of_another_group, Stray::other_group)
STRAY(partial_overwritten_before_all_read_it, Stray::overwrites)

template <bool kFault>
void group_barrier_of_a_launch_apart() {
  sums_of_groups<Stray::none>(!kFault);
}
template <bool kFault>
void counter_that_is_not_zero() {
  sums_of_groups<Stray::none>(true, kFault ? 1 : 0);
}

template <bool kFault>
void too_many_to_be_resident() {
  const c10::cuda::CUDAGuard guard(kDevice);
  const auto kernel = sum_of_group<Stray::leaves>;
  if (resident_blocks(kernel, kThreads, 228 << 10) != 0) throw std::runtime_error("a block that is too large is resident");
  const unsigned most = static_cast<unsigned>(resident_blocks(kernel, kThreads, 0));
  launch_together(nothing, most + (kFault ? 1 : 0), kThreads, 0);
}

}  // namespace
