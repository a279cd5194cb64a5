// The gradient of the weight of a depthwise convolution in rows of channels, from rings of rows of x and of dy in shared memory
// (depthwise_ring.cuh). A thread has the sums of all taps of its lane, over its strip of columns in the rows of its block: few
// enough to be added in float. A row of x is multiplied by the rows of dy whose outputs it belongs to.
#pragma once

#include "cuda/conv/depthwise_ring.cuh"

namespace cnnkern::gpu {

// Rows of the ring of dy, where that of x has kDepth: those that a row of x meets, and those that come with the next kDepth - 1.
template <int K, int kStride, int kDepth>
constexpr int kGradientRows = (K - 1) / kStride + 1 + (kDepth - 1 + kStride - 1) / kStride;

// The sums of a thread: the taps of its lane, and the sum of dy.
template <typename T, int K, int kStride>
struct RingSums {
  using S = compute_t<T>;
  static constexpr int V = kLane<T>, kPixels = (kRun - 1) * kStride + K;
  S sum[K * K + 1][V];

  __device__ __forceinline__ static void read_row(const T* p, int width, S (&gradient)[kRun][V]) {
#pragma unroll
    for (int o = 0; o < kRun; ++o) read_lane(p + o * width, gradient[o]);
  }
  __device__ __forceinline__ void add_gradient(const S (&gradient)[kRun][V]) {
#pragma unroll
    for (int o = 0; o < kRun; ++o)
#pragma unroll
      for (int k = 0; k < V; ++k) sum[K * K][k] += gradient[o][k];
  }
  // A row of x, whose even and odd pixels begin at p[0] and p[1]. Its row ky of taps, if there is (ky / kStride), meets a row of dy.
  template <int kPhase, typename There, typename Row>
  __device__ __forceinline__ void add(const T* (&p)[2], int width, const There& there, const Row& dy) {
    S v[kPixels][V];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      read_lane(p[i % kStride] + i / kStride * width, v[i]);
#pragma unroll
      for (int k = 0; k < V; ++k) hold(v[i][k]);
    }
#pragma unroll
    for (int ky = kPhase; ky < K; ky += kStride) {
      if (!there(ky / kStride)) continue;
      S gradient[kRun][V];
      read_row(dy(ky / kStride), width, gradient);
      if (ky == 0) add_gradient(gradient);
#pragma unroll
      for (int kx = 0; kx < K; ++kx)
#pragma unroll
        for (int o = 0; o < kRun; ++o)
#pragma unroll
          for (int k = 0; k < V; ++k) sum[ky * K + kx][k] = fma(v[o * kStride + kx][k], gradient[o][k], sum[ky * K + kx][k]);
    }
  }
};

constexpr int kMergedTaps = 8;  // at a time

template <typename T, int K, int kStride, int kDepth, int kBlocks>
__global__ void __launch_bounds__(kRingThreads, kBlocks)
    depthwise_ring_sums_kernel(RingWork work, const T* __restrict__ dy, const T* __restrict__ x, PartialSums<compute_t<T>> sums) {
  using S = compute_t<T>;
  constexpr int V = kLane<T>, M = K * K + 1, kRows = kGradientRows<K, kStride, kDepth>;
  GPU_DYN_SHARED(T, ring);
  const RingThread<T> me(work);
  unsigned part = blockIdx.x;
  const int first = work.tiles.split(part) * me.width, channel = first + me.lane;
  const int outputs = work.strips * kRun, pixels = (outputs - 1) * kStride + K;
  const int stage = work.images * pixels * me.width, dy_stage = work.images * outputs * me.width;
  const int odd = (pixels + 1) / 2 * me.width;
  T* const dy_ring = ring + kDepth * stage;
  const T* const mine = ring + (me.image * pixels + me.strip * kRun) * me.width + me.lane;
  const T* const my_dy = dy_ring + (me.image * outputs + me.strip * kRun) * me.width + me.lane;
  RingSums<T, K, kStride> m = {};
  const unsigned end = static_cast<unsigned>(smaller(work.items, (part + int64_t{1}) * work.part));
  for (unsigned at = part * work.part; at < end;) {
    unsigned unit = at;
    const int row = work.rows.split(unit), count = static_cast<int>(smaller(end - at, work.rows.by - row));
    const int column = work.columns.split(unit) * outputs, image = static_cast<int>(unit) * work.images + me.image;
    at += count;
    const T* const from = x + static_cast<int64_t>(image) * work.H * work.W * work.C + first;
    const T* const from_dy = dy + (static_cast<int64_t>(image) * work.OH + row) * work.OW * work.C + first;
    const bool copies = image < work.N && first + me.chunk < work.C;
    const int top = row * kStride - work.ph, left = column * kStride - work.pw, steps = (count - 1) * kStride + K;
    int next = 0, filled = 0, used = 0, dy_filled = 0, newest = -1;
    const auto copy_next = [&] {  // what step `next` brings
      const int h = top + next, oh = next / kStride;
      if (next < steps && h >= 0 && h < work.H)
        me.template copy<kStride>(work, from + h * work.W * work.C, copies, left, work.W, pixels, ring + filled * stage);
      if (next % kStride == 0 && oh < count) {
        me.template copy<1>(work, from_dy + oh * work.OW * work.C, copies, column, work.OW, outputs, dy_ring + dy_filled * dy_stage);
        dy_filled = dy_filled + 1 == kRows ? 0 : dy_filled + 1;
      }
      filled = filled + 1 == kDepth ? 0 : filled + 1;
      ++next;
      async_commit();
    };
    const auto add_row = [&](int step, auto phase) {
      async_wait<kDepth - 2>();
      __syncthreads();
      copy_next();
      if (decltype(phase)::value == 0) newest = newest + 1 == kRows ? 0 : newest + 1;
      const int last = step / kStride;
      const auto there = [&](int age) { return last >= age && last - age < count; };
      const auto dy_row = [&](int age) { return my_dy + (newest < age ? newest - age + kRows : newest - age) * dy_stage; };
      if (top + step >= 0 && top + step < work.H) {
        const T* p[2] = {mine + used * stage, mine + used * stage + odd};
        m.template add<decltype(phase)::value>(p, me.width, there, dy_row);
      } else if (decltype(phase)::value == 0 && there(0)) {
        S gradient[kRun][V];
        m.read_row(dy_row(0), me.width, gradient);
        m.add_gradient(gradient);
      }
      used = used + 1 == kDepth ? 0 : used + 1;
    };
    __syncthreads();  // all are done with the rows before
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) copy_next();
#pragma unroll 1
    for (int step = 0; step < steps; step += kStride) {
      add_row(step, std::integral_constant<int, 0>{});
      if constexpr (kStride == 2)
        if (step + 1 < steps) add_row(step + 1, std::integral_constant<int, 1>{});
    }
  }
  // The sums of the block's slots, one after the other.
  S* const scratch = reinterpret_cast<S*>(ring);
  const int slots = work.images * work.strips, slot = threadIdx.x / work.lanes;
#pragma unroll
  for (int tap = 0; tap < M; tap += kMergedTaps) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kMergedTaps; ++j)
      if (tap + j < M)
#pragma unroll
        for (int k = 0; k < V; ++k) scratch[(j * slots + slot) * me.width + me.lane + k] = m.sum[tap + j < M ? tap + j : 0][k];
    __syncthreads();
    for (int j = slot; j < kMergedTaps && tap + j < M; j += slots) {
      if (channel >= work.C) continue;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        S total = 0;
        for (int s = 0; s < slots; ++s) total += scratch[(j * slots + s) * me.width + me.lane + k];
        sums.at(part, channel + k, tap + j) = total;
      }
    }
  }
}

// ---- launches ----

constexpr int kRowsInFloat = 32;  // of kRun columns each, that a thread adds in float

// Rows of x in its ring, and blocks of a multiprocessor, as registers and shared memory allow.
template <int K>
constexpr int kSumDepth = K == 7 ? 3 : 4;
template <typename T, int K, int kStride>
constexpr int kSumBlocks = K == 3 ? 5 : sizeof(T) == 4 || (K == 5 && kStride == 1) ? 4 : K == 5 ? 3 : 4 - kStride;

template <typename T, int K, int kStride, int kBlocks = kSumBlocks<T, K, kStride>>
RingCut ring_sum_cut(const ConvGeometry& g) {
  return RingCut(g.N, divup(g.C, kLane<T>), g.OH, g.OW, kRun, (K - 1) / kStride, kBlocks, kRowsInFloat);
}

template <typename T, int K, int kStride, int kDepth = kSumDepth<K>, int kBlocks = kSumBlocks<T, K, kStride>>
void sum_depthwise_ring(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums, Stream stream) {
  const RingCut cut = ring_sum_cut<T, K, kStride, kBlocks>(g);
  const int64_t outputs = cut.strips * kRun, pixels = (outputs - 1) * kStride + K, width = cut.lanes * kLane<T>;
  const int64_t rings = cut.images * (kDepth * pixels + kGradientRows<K, kStride, kDepth> * outputs) * width * sizeof(T);
  const int64_t scratch = kMergedTaps * cut.images * cut.strips * width * sizeof(compute_t<T>);
  launch(depthwise_ring_sums_kernel<T, K, kStride, kDepth, kBlocks>, dim3(cut.blocks()), dim3(cut.threads()),
         static_cast<size_t>(larger(rings, scratch)), stream, cut.work(g, {g.H, g.W, g.OH, g.OW, g.OH, g.OW, g.ph, g.pw}), dy, x, sums);
}

}  // namespace cnnkern::gpu
