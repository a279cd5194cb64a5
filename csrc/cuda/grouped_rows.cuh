// Convolution 3x3 of rows of channels (NHWC) by groups of a multiple of four channels: a thread has four channels of kRun
// neighbouring outputs. A block keeps to a tile of channels, whose filters lie in shared memory.
#pragma once

#include "cuda/depthwise_rows.cuh"
#include "cuda/grouped_planes.cuh"

namespace cnnkern::gpu {

// Shared: filters (tap, j, channel), `pitch` a row.
template <typename T>
__device__ __forceinline__ void share_groups(const RowWork& work, const Filters<T>& filters, int64_t first, compute_t<T>* shared, int pitch) {
  const int channels = static_cast<int>(smaller(work.lanes * kChannels, work.C - first));
  for (int k = threadIdx.x; k < channels * kSquare * filters.width; k += kConvThreads) {
    const int tap = k % kSquare, j = k / kSquare % filters.width, channel = k / kSquare / filters.width;
    shared[(tap * filters.width + j) * pitch + channel] = filters.get(first + channel, j, tap);
  }
  __syncthreads();
}

template <typename T, int kStride>
__global__ void __launch_bounds__(kConvThreads, 2)
    grouped_rows_kernel(RowWork work, const T* __restrict__ x, Filters<T> filters, const T* __restrict__ bias, T* __restrict__ y) {
  using S = compute_t<T>;
  GPU_DYN_SHARED(S, shared);
  unsigned part = blockIdx.x;
  const int lane = threadIdx.x % work.lanes, slots = kConvThreads / work.lanes, pitch = (work.lanes + 1) * kChannels;
  const int64_t first = static_cast<int64_t>(work.tiles.split(part)) * work.lanes * kChannels, channel = first + lane * kChannels;
  share_groups(work, filters, first, shared, pitch);
  if (channel >= work.C) return;
  const int width = filters.width;
  const int64_t group = channel / width * width;
  S start[kChannels] = {};
  if (bias != nullptr)
#pragma unroll
    for (int k = 0; k < kChannels; ++k) start[k] = static_cast<S>(bias[channel + k]);
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  const unsigned end = static_cast<unsigned>(smaller(work.order.count, (part + int64_t{1}) * work.part));
#pragma unroll 1
  for (unsigned at = part * work.part + threadIdx.x / work.lanes; at < end; at += slots) {
    int64_t image;
    int oh, ow;
    work.order.place(at, image, oh, ow);
    if (oh >= work.OH) continue;
    ow *= kGroupRun<kStride>;
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    const T* const p = x + ((image * work.H + row) * work.W + column) * work.C + group;
    S sum[kGroupRun<kStride>][kChannels];
#pragma unroll
    for (int o = 0; o < kGroupRun<kStride>; ++o)
#pragma unroll
      for (int k = 0; k < kChannels; ++k) sum[o][k] = start[k];
    const int top = row < 0 ? -row : 0, bottom = row + 3 > H ? H - row : 3;
#pragma unroll 1
    for (int ky = top; ky < bottom; ++ky)
#pragma unroll 1
      for (int j = 0; j < width; j += kChannels) {
        constexpr int kPixels = (kGroupRun<kStride> - 1) * kStride + 3;
        const T* const from = p + ky * work.W * work.C + j;
        S v[kPixels][kChannels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) read<kChannels>(from + i * work.C, column + i >= 0 && column + i < W, v[i]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {
            S filter[kChannels];
            read<kChannels>(shared + ((ky * 3 + kx) * width + j + c) * pitch + lane * kChannels, true, filter);
#pragma unroll
            for (int o = 0; o < kGroupRun<kStride>; ++o)
#pragma unroll
              for (int k = 0; k < kChannels; ++k) sum[o][k] = fma(v[o * kStride + kx][c], filter[k], sum[o][k]);
          }
      }
    T* const out = y + ((image * work.OH + oh) * work.OW + ow) * work.C + channel;
#pragma unroll
    for (int o = 0; o < kGroupRun<kStride>; ++o)
      if (ow + o < work.OW) write<kChannels>(out + o * work.C, sum[o]);
  }
}

// The gradient of the input at stride 2, by pairs as in depthwise_rows_gradient_kernel.
template <typename T>
__global__ void __launch_bounds__(kConvThreads, 2)
    grouped_rows_gradient_kernel(RowWork work, const T* __restrict__ dy, Filters<T> filters, T* __restrict__ dx) {
  using S = compute_t<T>;
  GPU_DYN_SHARED(S, shared);
  unsigned part = blockIdx.x;
  const int lane = threadIdx.x % work.lanes, slots = kConvThreads / work.lanes, pitch = (work.lanes + 1) * kChannels;
  const int64_t first = static_cast<int64_t>(work.tiles.split(part)) * work.lanes * kChannels, channel = first + lane * kChannels;
  share_groups(work, filters, first, shared, pitch);
  if (channel >= work.C) return;
  const int width = filters.width;
  const int64_t group = channel / width * width;
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  const unsigned end = static_cast<unsigned>(smaller(work.order.count, (part + int64_t{1}) * work.part));
#pragma unroll 1
  for (unsigned at = part * work.part + threadIdx.x / work.lanes; at < end; at += slots) {
    int64_t image;
    int h, pair;
    work.order.place(at, image, h, pair);
    if (h >= work.OH) continue;
    pair = pair * kPairs + work.pw / 2;
    const int row = (h + work.ph) / 2, odd = (h + work.ph) % 2, column = pair - 1;
    S sum[kPairs][2][kChannels] = {};
#pragma unroll 1
    for (int a = 0; 2 * a + odd < 3; ++a) {
      if (row - a < 0 || row - a >= H) continue;
#pragma unroll 1
      for (int j = 0; j < width; j += kChannels) {
        const T* const from = dy + ((image * work.H + row - a) * work.W + column) * work.C + group + j;
        S v[kPairs + 1][kChannels];
#pragma unroll
        for (int i = 0; i < kPairs + 1; ++i) read<kChannels>(from + i * work.C, column + i >= 0 && column + i < W, v[i]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {
            S filter[kChannels];
            read<kChannels>(shared + (((2 * a + odd) * 3 + kx) * width + j + c) * pitch + lane * kChannels, true, filter);
#pragma unroll
            for (int q = 0; q < kPairs; ++q)
#pragma unroll
              for (int k = 0; k < kChannels; ++k)
                sum[q][kx % 2][k] = fma(v[q + 1 - kx / 2][c], filter[k], sum[q][kx % 2][k]);
          }
      }
    }
    const int w = 2 * pair - work.pw;
    T* const out = dx + ((image * work.OH + h) * work.OW + w) * work.C + channel;
#pragma unroll
    for (int q = 0; q < 2 * kPairs; ++q)
      if (w + q >= 0 && w + q < work.OW) write<kChannels>(out + q * work.C, sum[q / 2][q % 2]);
  }
}

// The gradient of the weight. A lane has four output channels and an input channel of their group; the warps of a block
// have runs of their own. Lanes are counted: input channels, quads of output channels.
template <typename T, int kStride>
__global__ void __launch_bounds__(kConvThreads, 2)
    grouped_rows_sums_kernel(RowWork work, int width, const T* __restrict__ dy, const T* __restrict__ x, PartialSums<compute_t<T>> sums) {
  using S = compute_t<T>;
  constexpr int V = kChannels, M = kSquare + 1, kWarps = kConvThreads / kWarp, kRows = 2;
  GPU_SHARED(S, scratch, kRows* kWarps* kWarp* V);
  unsigned part = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t number = static_cast<int64_t>(work.tiles.split(part)) * kWarp + lane;
  const int j = static_cast<int>(number % width);
  const int64_t channel = number / width * V, from = channel / width * width + j;
  const bool exists = channel < work.C;
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  const unsigned end = exists ? static_cast<unsigned>(smaller(work.order.count, (part + int64_t{1}) * work.part)) : 0;
  S sum[M][V] = {};
#pragma unroll 1
  for (unsigned at = part * work.part + warp; at < end; at += kWarps) {
    int64_t image;
    int oh, ow;
    work.order.place(at, image, oh, ow);
    if (oh >= work.OH) continue;
    ow *= kGroupRun<kStride>;
    S gradient[kGroupRun<kStride>][V];
    const T* const g = dy + ((image * work.OH + oh) * work.OW + ow) * work.C + channel;
#pragma unroll
    for (int o = 0; o < kGroupRun<kStride>; ++o) read<V>(g + o * work.C, ow + o < work.OW, gradient[o]);
#pragma unroll
    for (int o = 0; o < kGroupRun<kStride>; ++o)
#pragma unroll
      for (int k = 0; k < V; ++k) sum[kSquare][k] += gradient[o][k];
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    const T* p = x + ((image * work.H + row) * work.W + column) * work.C + from;
#pragma unroll
    for (int ky = 0; ky < 3; ++ky, p += work.W * work.C) {
      const bool there = row + ky >= 0 && row + ky < H;
#pragma unroll
      for (int i = 0; i < (kGroupRun<kStride> - 1) * kStride + 3; ++i) {
        const S v = read_one(p + i * work.C, there && column + i >= 0 && column + i < W);
#pragma unroll
        for (int kx = 0; kx < 3; ++kx)
          if (i >= kx && (i - kx) % kStride == 0 && (i - kx) / kStride < kGroupRun<kStride>)
#pragma unroll
            for (int k = 0; k < V; ++k) sum[ky * 3 + kx][k] = fma(v, gradient[(i - kx) / kStride][k], sum[ky * 3 + kx][k]);
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < M; tap += kRows) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) write<V>(scratch + ((r * kWarps + warp) * kWarp + lane) * V, sum[tap + r]);
    __syncthreads();
    // Of kRows * kWarp * V sums each thread takes one: of tap `tap + r`, lane `l`, channel `k`.
    const int r = threadIdx.x / (kWarp * V), l = threadIdx.x / V % kWarp, k = threadIdx.x % V;
    S total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[((r * kWarps + w) * kWarp + l) * V + k];
    const int64_t other = number - lane + l, output = other / width * V + k;
    const int input = static_cast<int>(other % width);
    if (output < work.C && (tap + r < kSquare || input == 0))
      sums.at(part, output, tap + r < kSquare ? input * kSquare + tap + r : sums.taps) = total;
    __syncthreads();
  }
}

// ---- launches ----

constexpr int kGroupLanes = 8;

template <typename T, typename Kernel, typename... Arguments>
void launch_groups(Kernel kernel, const RunOrder& order, const ConvGeometry& g, int64_t H, int64_t W, int64_t OH, int64_t OW, int ph, int pw,
                   Stream stream, const Arguments&... arguments) {
  const int64_t tiles = divup(g.C, kGroupLanes * kChannels), part = runs_of_part(order.count, tiles, kConvThreads / kGroupLanes, 16);
  const RowWork work = {order, Divisor(tiles), static_cast<unsigned>(part), kGroupLanes, g.C, H, W, OH, OW, ph, pw, false};
  const size_t shared = sizeof(compute_t<T>) * kSquare * g.inputs() * (kGroupLanes + 1) * kChannels;
  launch(kernel, dim3(static_cast<unsigned>(tiles * divup(order.count, part))), dim3(kConvThreads), shared, stream, work, arguments...);
}

template <typename T, int kStride>
void convolve_grouped_rows(const ConvGeometry& g, const T* x, const Filters<T>& filters, const T* bias, T* y, Stream stream) {
  const auto kernel = grouped_rows_kernel<T, kStride>;
  if (filters.transposed)
    launch_groups<T>(kernel, RunOrder(g.N, g.H, divup(g.W, kGroupRun<kStride>)), g, g.OH, g.OW, g.H, g.W, 2 - g.ph, 2 - g.pw, stream, x, filters, bias, y);
  else
    launch_groups<T>(kernel, RunOrder(g.N, g.OH, divup(g.OW, kGroupRun<kStride>)), g, g.H, g.W, g.OH, g.OW, g.ph, g.pw, stream, x, filters, bias, y);
}

template <typename T>
void grouped_rows_gradient_stride_2(const ConvGeometry& g, const T* dy, const Filters<T>& filters, T* dx, Stream stream) {
  const int64_t pairs = (g.W - 1 + g.pw) / 2 - g.pw / 2 + 1;
  launch_groups<T>(grouped_rows_gradient_kernel<T>, RunOrder(g.N, g.H, divup(pairs, kPairs)), g, g.OH, g.OW, g.H, g.W, g.ph, g.pw, stream,
                   dy, filters, dx);
}

struct GroupSumCut {
  RunOrder order;
  int64_t tiles, part, parts;
  explicit GroupSumCut(const ConvGeometry& g)
      : order(g.N, g.OH, divup(g.OW, g.sh == 1 ? kGroupRun<1> : kGroupRun<2>)),
        tiles(divup(g.C / kChannels * g.inputs(), kWarp)),
        part(runs_of_part(order.count, tiles, kConvThreads / kWarp, 16)),
        parts(divup(order.count, part)) {}
};

template <typename T, int kStride>
void sum_grouped_rows(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums, Stream stream) {
  const GroupSumCut cut(g);
  const RowWork work = {cut.order, Divisor(cut.tiles), static_cast<unsigned>(cut.part), kWarp, g.C, g.H, g.W, g.OH, g.OW, g.ph, g.pw, false};
  launch(grouped_rows_sums_kernel<T, kStride>, dim3(static_cast<unsigned>(cut.tiles * cut.parts)), dim3(kConvThreads), 0, stream, work,
         static_cast<int>(g.inputs()), dy, x, sums);
}

}  // namespace cnnkern::gpu
