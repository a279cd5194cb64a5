// The sweeps over rows of channels (N * HW, C): a block owns a strip of rows of up to 128 channels.
#pragma once

#include "cuda/sweep.cuh"

namespace cnnkern::gpu {

constexpr int kTileChannels = 128;
constexpr int kSumsPerProcessor = 3;  // blocks that sum, at once, where registers allow it

// A block is thread_rows by `columns` threads (what is left over of its kThreads is idle), a thread keeps to the V
// channels of its column.

struct RowCut {
  int64_t rows, C;
  int64_t tiles, strips, strip;  // tiles of channels; strips of rows; rows of a strip
  int columns, thread_rows;
  bool vector;                   // whole aligned vectors of channels
};

template <int V>
struct RowPlace {
  int64_t strip, first, channel;  // first: channel of the tile
  int row, column, channels;      // channels of the tile
  bool active;
  __device__ RowPlace(const RowCut& cut, int64_t block) {
    strip = block / cut.tiles;
    first = block % cut.tiles * cut.columns * V;
    channels = static_cast<int>(smaller(cut.C - first, cut.columns * V));
    row = threadIdx.x / cut.columns;
    column = threadIdx.x % cut.columns;
    channel = first + column * V;
    active = row < cut.thread_rows && column * V < channels;
  }
};

// f(offsets of vectors in rows r, r + thread_rows, ...; r)
template <int V, int kVectors, typename F>
__device__ __forceinline__ void for_rows(const RowCut& cut, const RowPlace<V>& place, const F& f) {
  const int64_t end = smaller(cut.rows, (place.strip + 1) * cut.strip);
  int64_t r = place.strip * cut.strip + place.row;
  const auto batch = [&](auto count) {
    constexpr int U = decltype(count)::value;
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) at[u] = (r + u * cut.thread_rows) * cut.C + place.channel;
    f(at, r);
    r += U * cut.thread_rows;
  };
  while (r + (kVectors - 1) * cut.thread_rows < end) batch(std::integral_constant<int, kVectors>{});
  if constexpr (kVectors > kUnroll)
    if (r + (kUnroll - 1) * cut.thread_rows < end) batch(std::integral_constant<int, kUnroll>{});
  while (r < end) batch(std::integral_constant<int, 1>{});
}

template <typename P, int V>
__global__ void __launch_bounds__(kThreads, P::kCostly || P::kWritesWhileReducing ? 2 : kSumsPerProcessor)
reduce_rows_kernel(P p, RowCut cut, Partial<P::kSums> partial) {
  let_next_start();
  using S = typename P::S;
  constexpr int kSums = P::kSums;
  GPU_DYN_SHARED(S, rows);  // (thread_rows, kSums, width)
  GPU_SHARED(typename P::Before, shared, kTileChannels);
  const RowPlace<V> place(cut, blockIdx.x);
  const int width = cut.columns * V;
  share(shared, place.channels, [&](int j) { return p.before(place.first + j); });
  if (place.strip == 0 && static_cast<int>(threadIdx.x) < place.channels)
    partial.keep_center(place.first + threadIdx.x, shared[threadIdx.x].center);
  if (place.active) {
    typename P::Before constants[V];
#pragma unroll
    for (int k = 0; k < V; ++k) constants[k] = shared[place.column * V + k];
    // Of eight lanes fewer vectors, if results are under way too, or much arithmetic: the blocks have to fit. Of three tensors
    // two are few already.
    constexpr int kReads = sizeof(typename P::template Input<V>) / (V * sizeof(S)), kMost = 2 * kUnroll / kReads;
    constexpr int kFewer = kMost >> (int{P::kWritesWhileReducing} + int{P::kCostly}), kLeast = kReads > 2 ? 2 : 1;
    constexpr int kVectors = V < 8 ? kMost : kFewer < kLeast ? kLeast : kFewer;
    S sums[V][kSums] = {};  // of a strip's rows, which are few
    for_rows<V, kVectors>(cut, place, [&](const auto& at, int64_t) {
      add_batch<false, V>(p, at, Lanes{}, constants, [&](const auto& in, int k) { p.term(in, k, constants[k], sums[k]); });
    });
    S* const mine = rows + place.row * kSums * width + place.column * V;
#pragma unroll
    for (int k = 0; k < V; ++k)
#pragma unroll
      for (int i = 0; i < kSums; ++i) mine[i * width + k] = sums[k][i];
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < divup(kSums * kTileChannels, kThreads); ++turn) {
    const unsigned cell = turn * kThreads + threadIdx.x;
    const int which = cell / width, j = cell % width;
    if (which >= kSums || j >= place.channels) continue;
    double sum = 0;
#pragma unroll 8
    for (int row = 0; row < cut.thread_rows; ++row) sum += static_cast<double>(rows[(row * kSums + which) * width + j]);
    partial.keep(place.first + j, place.strip, which, sum);
  }
}

template <typename P, int V>
__global__ void __launch_bounds__(kThreads) map_rows_kernel(P p, RowCut cut) {
  wait_for_previous();
  GPU_SHARED(typename P::After, shared, kTileChannels);
  const RowPlace<V> place(cut, gridDim.x - 1 - blockIdx.x);  // backwards, as in planes
  share(shared, place.channels, [&](int j) { return p.after(place.first + j, place.strip == 0); });
  if (!place.active) return;
  typename P::After constants[V];
#pragma unroll
  for (int k = 0; k < V; ++k) constants[k] = shared[place.column * V + k];
  for_rows<V, kUnroll>(cut, place, [&](const auto& at, int64_t) { map_batch<false, V>(p, at, Lanes{}, constants); });
}

}  // namespace cnnkern::gpu
