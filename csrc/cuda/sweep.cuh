// What both memory layouts share of the two sweeps over a tensor: the first adds up kSums sums per channel, the second maps.
//
// A policy says what is computed. `Reduction` is its part in the first sweep: `before(c)`, the constants of a channel,
// with a `center` that stands in for elements that do not exist; `Input` and `load`, what is read; `term`, an element's
// part in the sums; `finish`, called by a whole block, which turns a channel's sums, and the center that they were taken
// around, into what `after` reads. The
// second sweep has `after(c)`, its constants, an `Input` and `load` of its own, and `store`, which writes results.
// With kWritesWhileReducing there is no second sweep: the first one stores, from the constants of `before`. kCostly:
// `term` takes many registers.
// Accumulators: the arithmetic type (float, double for double) for at most 128 elements, then double.
#pragma once

#include "cuda/channels.cuh"
#include "cuda/reduce.cuh"

namespace cnnkern::gpu {

constexpr int kThreads = 256;  // of a block that shares its channel
constexpr int kFinishThreads = 128;
constexpr int kUnroll = 4;  // vectors that a thread has under way
constexpr int kFlush = 4;   // batches whose sums stay in the arithmetic type

// The constants of a thread are one for all lanes of its vectors (planes) or one per lane (rows): K is 1 or V.

// A batch is the U vectors that a thread has under way. In ragged planes that is one, of which only `lanes` may exist.

template <bool kRagged, int V, typename P, typename Constants, int K, int U>
__device__ __forceinline__ void load_batch(const P& p, typename P::template Input<V> (&in)[U], const int64_t (&at)[U], Lanes lanes,
                                           const Constants (&constants)[K]) {
#pragma unroll
  for (int u = 0; u < U; ++u)
    p.template load<kRagged>(in[u], at[u], lanes, [&](int k) { return constants[K == 1 ? 0 : k].center; });
}

template <bool kRagged, int V, typename P, typename Constants, int K, int U>
__device__ __forceinline__ void store_batch(const P& p, const typename P::template Input<V> (&in)[U], const int64_t (&at)[U],
                                            Lanes lanes, const Constants (&constants)[K]) {
#pragma unroll
  for (int u = 0; u < U; ++u) p.template store<kRagged>(in[u], at[u], lanes, constants);
}

template <bool kRagged, int V, typename P, int K, int U>
__device__ __forceinline__ void map_batch(const P& p, const int64_t (&at)[U], Lanes lanes, const typename P::After (&constants)[K]) {
  typename P::template Input<V> in[U];
  load_batch<kRagged, V>(p, in, at, lanes, constants);
  store_batch<kRagged, V>(p, in, at, lanes, constants);
}

// Loads a batch for the first sweep; term(input, k) is called for each lane of each vector.
template <bool kRagged, int V, typename P, int K, int U, typename F>
__device__ __forceinline__ void add_batch(const P& p, const int64_t (&at)[U], Lanes lanes, const typename P::Before (&constants)[K],
                                          const F& term) {
  typename P::template Input<V> in[U];
  load_batch<kRagged, V>(p, in, at, lanes, constants);
#pragma unroll
  for (int u = 0; u < U; ++u)
#pragma unroll
    for (int k = 0; k < V; ++k) term(in[u], k);
  if constexpr (P::kWritesWhileReducing)
    if (p.writes()) store_batch<kRagged, V>(p, in, at, lanes, constants);
}

// A thread's sums over the vectors of a channel: kept in the arithmetic type for kFlush batches.
template <typename P, int V>
struct ThreadSums {
  using S = typename P::S;
  static constexpr int kSums = P::kSums;
  double wide[kSums] = {};
  S sums[kSums] = {};
  int pending = 0;

  template <bool kRagged, int U>
  __device__ __forceinline__ void add(const P& p, const int64_t (&at)[U], Lanes lanes, const typename P::Before (&constants)[1]) {
    add_batch<kRagged, V>(p, at, lanes, constants, [&](const auto& in, int k) { p.term(in, k, constants[0], sums); });
    if (++pending == kFlush) flush();
  }

  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) wide[i] += sums[i], sums[i] = 0;
    pending = 0;
  }
};

// The sums of a channel's slices or strips, in memory: (C, slices, kSums), and behind them the channels' centers.
template <int kSums>
struct Partial {
  double* memory;
  int64_t C, slices;
  static constexpr int64_t doubles(int64_t C, int64_t slices) { return C * (kSums * slices + 1); }
  __device__ void keep(int64_t c, int64_t slice, int which, double sum) const { memory[kSums * (c * slices + slice) + which] = sum; }
  // The same of a block, of which each has a slice, in their order.
  __device__ void keep_of_block(int64_t block, const double (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) memory[kSums * block + i] = sums[i];
  }
  __device__ double sum(int64_t c, int64_t slice, int which) const { return memory[kSums * (c * slices + slice) + which]; }
  __device__ void keep_center(int64_t c, double center) const { memory[kSums * C * slices + c] = center; }
  __device__ double center(int64_t c) const { return memory[kSums * C * slices + c]; }
};

// The constants of `channels` channels, computed by a thread each, then read by all.
template <typename Constants, typename F>
__device__ __forceinline__ void share(Constants* shared, int channels, const F& compute) {
  __syncthreads();  // the block may still read what it shared before
  if (static_cast<int>(threadIdx.x) < channels) shared[threadIdx.x] = compute(static_cast<int>(threadIdx.x));
  __syncthreads();
}

}  // namespace cnnkern::gpu
