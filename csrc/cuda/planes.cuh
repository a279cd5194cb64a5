// The sweeps over planes (N, C, HW): a block owns a channel and both sweeps, or a slice of one channel and one of them.
#pragma once

#include "cuda/sweep.cuh"

namespace cnnkern::gpu {

constexpr int kOwnerThreads = 512;  // of a block that owns its channel

// The vectors of a channel are counted through its N planes. If `kRagged`, planes do not begin or end with whole
// aligned vectors: a plane's vectors are then the aligned ones that contain an element of it, and both ends of it may
// have elements of other planes, which do not exist for this channel.

// A policy in half as long vectors, for planes of 16-bit elements that end with half a vector, as 14x14 do.
template <typename P>
struct InHalves : P {
  explicit InHalves(const P& p) : P(p) {}
};
template <typename P>
constexpr int kLanes = kVector<typename P::Scalar>;
template <typename P>
constexpr int kLanes<InHalves<P>> = kLanes<P> / 2;

struct PlaneCut {
  int64_t C, HW;
  int64_t vectors;                  // of a plane
  int64_t total, slices, slice;     // vectors of a channel; slices of a channel; vectors of a slice
  int64_t step_planes, step_vectors;  // from a thread's vector to its next
  int misaligned;                   // elements by which the pointers exceed a multiple of 16 bytes
  bool aligned;                     // it is the same for all of them
  bool ragged, halves, owned;
};

template <bool kRagged, int V, typename F>
__device__ __forceinline__ void for_planes(const PlaneCut& cut, int64_t c, int64_t slice, const F& f) {
  const int64_t begin = slice * cut.slice + threadIdx.x, end = smaller(cut.total, (slice + 1) * cut.slice);
  const int64_t image = cut.C * cut.HW;
  int64_t start = begin / cut.vectors * image + c * cut.HW, vector = begin % cut.vectors, j = begin;
  const auto batch = [&](auto count) {
    constexpr int U = decltype(count)::value;
    int64_t at[U];
    Lanes lanes = {0, V, cut.aligned};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at[u] = start + vector * V;
      if constexpr (kRagged) {
        at[u] -= (start + cut.misaligned) & (V - 1);
        lanes.first = static_cast<int>(larger(0, start - at[u]));
        lanes.last = static_cast<int>(smaller(V, start + cut.HW - at[u]));
      }
      start += cut.step_planes * image;
      vector += cut.step_vectors;
      if (vector >= cut.vectors) vector -= cut.vectors, start += image;
    }
    f(at, lanes);
    j += U * static_cast<int64_t>(blockDim.x);
  };
  if constexpr (!kRagged)
    while (j + (kUnroll - 1) * static_cast<int64_t>(blockDim.x) < end) batch(std::integral_constant<int, kUnroll>{});
  while (j < end) batch(std::integral_constant<int, 1>{});
}

// keep(center) is called by one thread before the sweep, so that no register holds it through that.
template <bool kRagged, int V, typename P, typename Keep>
__device__ __forceinline__ void reduce_planes(const P& p, const PlaneCut& cut, int64_t c, int64_t slice, double (&sums)[P::kSums],
                                              const Keep& keep) {
  GPU_SHARED(typename P::Before, shared, 1);
  share(shared, 1, [&](int) {
    const typename P::Before before = p.before(c);
    keep(before.center);
    return before;
  });
  const typename P::Before constants[1] = {shared[0]};
  ThreadSums<P, V> mine;
  for_planes<kRagged, V>(cut, c, slice,
                         [&](const auto& at, Lanes lanes) { mine.template add<kRagged>(p, at, lanes, constants); });
  mine.flush();
#pragma unroll
  for (int i = 0; i < P::kSums; ++i) sums[i] = mine.wide[i];
  block_sum(sums);
}

template <bool kRagged, int V, typename P>
__device__ __forceinline__ void map_planes(const P& p, const PlaneCut& cut, int64_t c, int64_t slice) {
  GPU_SHARED(typename P::After, shared, 1);
  share(shared, 1, [&](int) { return p.after(c, slice == 0); });
  const typename P::After constants[1] = {shared[0]};
  for_planes<kRagged, V>(cut, c, slice, [&](const auto& at, Lanes lanes) { map_batch<kRagged, V>(p, at, lanes, constants); });
}

// What writes results in this sweep may have as many registers as it takes; of the others nvcc chooses the number.
template <typename P, bool kRagged>
__global__ void __launch_bounds__(kThreads, P::kWritesWhileReducing ? 1 : 0)
reduce_planes_kernel(P p, PlaneCut cut, Partial<P::kSums> partial) {
  let_next_start();
  const int64_t c = blockIdx.x / cut.slices, slice = blockIdx.x % cut.slices;
  double sums[P::kSums];
  reduce_planes<kRagged, kLanes<P>>(p, cut, c, slice, sums, [&](double center) {
    if (blockIdx.x == c * cut.slices) partial.keep_center(c, center);
  });
  if (threadIdx.x == 0) partial.keep_of_block(blockIdx.x, sums);
}

// Blocks go backwards through memory: what the first sweep read last is still in L2.
template <typename P, bool kRagged>
__global__ void __launch_bounds__(kThreads) map_planes_kernel(P p, PlaneCut cut) {
  wait_for_previous();
  const int64_t b = gridDim.x - 1 - blockIdx.x;
  map_planes<kRagged, kLanes<P>>(p, cut, b / cut.slices, b % cut.slices);
}

// The first sweep of a channel.
template <typename P, bool kRagged>
__global__ void __launch_bounds__(kOwnerThreads, 1) own_sums_kernel(P p, PlaneCut cut) {
  double sums[P::kSums];
  GPU_SHARED(double, center, 1);
  reduce_planes<kRagged, kLanes<P>>(p, cut, blockIdx.x, 0, sums, [&](double of_channel) {
    center[0] = of_channel;
  });
  p.finish(blockIdx.x, sums, center[0]);
}

// Both sweeps of a channel.
template <typename P, bool kRagged>
__global__ void __launch_bounds__(kOwnerThreads, 1) own_planes_kernel(P p, PlaneCut cut, bool maps) {
  const typename P::Reduction& reduction = p;
  double sums[P::Reduction::kSums];
  GPU_SHARED(double, center, 1);
  reduce_planes<kRagged, kLanes<P>>(reduction, cut, blockIdx.x, 0, sums, [&](double of_channel) {
    center[0] = of_channel;
  });
  p.finish(blockIdx.x, sums, center[0]);
  if (maps) map_planes<kRagged, kLanes<P>>(p, cut, blockIdx.x, 0);
}

}  // namespace cnnkern::gpu
