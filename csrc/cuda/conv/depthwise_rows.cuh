// Depthwise convolution of rows of channels (NHWC): a thread has kChannels channels of kRun neighbouring outputs, so that a
// pixel of the input is read once for each row of taps. A block has a tile of channels, whose filters are in shared
// memory, and a part of the runs, whose pixels share the first-level cache.
#pragma once

#include "cuda/conv/conv_geometry.cuh"

namespace cnnkern::gpu {

constexpr int kChannels = 4;  // of a thread

// How runs are counted: rows of a band, runs of a row, bands of an image, images.
struct RunOrder {
  Divisor rows, runs, bands;
  unsigned count;
  RunOrder(int64_t images, int64_t height, int64_t runs_of_row)
      : rows(band(height)), runs(runs_of_row), bands(divup(height, band(height))),
        count(static_cast<unsigned>(images * bands.by * rows.by * runs_of_row)) {}

  // Rows of a band: at most eight, so that a block's are a piece of the image, and few that do not exist.
  static int64_t band(int64_t height) {
    int64_t best = smaller(height, 8);
    for (int64_t rows = best; rows >= 4; --rows)
      if (divup(height, rows) * rows < divup(height, best) * best) best = rows;
    return best;
  }

  // Run `at`: its image, its row, which may not exist, and its number in the row.
  __device__ __forceinline__ void place(unsigned at, int64_t& image, int& row, int& run) const {
    row = rows.split(at);
    run = runs.split(at);
    row += bands.split(at) * static_cast<int>(rows.by);
    image = at;
  }
};

struct RowWork {
  RunOrder order;
  Divisor tiles;          // of channels
  unsigned part;          // runs of a block
  int lanes;              // threads along channels
  int64_t C, H, W, OH, OW;  // of the tensors that are read and written
  int ph, pw;
  bool flipped;
};

// The filters of a tile of channels, a row of channels per tap.
template <typename T, int K>
__device__ __forceinline__ void share_filters(const RowWork& work, const T* weight, int64_t first, compute_t<T>* filters, int pitch) {
  const int channels = static_cast<int>(smaller(work.lanes * kChannels, work.C - first));
  for (int i = threadIdx.x; i < channels * K * K; i += kConvThreads) {
    const int channel = i / (K * K), tap = i % (K * K);
    filters[(work.flipped ? K * K - 1 - tap : tap) * pitch + channel] = static_cast<compute_t<T>>(weight[first * (K * K) + i]);
  }
  __syncthreads();
}

template <int K, typename S>
__device__ __forceinline__ void read_taps(const S* filters, int pitch, S (&filter)[K][kChannels]) {
#pragma unroll
  for (int kx = 0; kx < K; ++kx) read<kChannels>(filters + kx * pitch, true, filter[kx]);
}

// Outputs of a thread in a row: fewer where a row of them and of the filter need most registers.
template <int K, int kStride>
constexpr int kRowRun = K == 7 && kStride == 2 ? 4 : kRun;

template <typename T, int K, int kStride>
__global__ void __launch_bounds__(kConvThreads, 2)
    depthwise_rows_kernel(RowWork work, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                          T* __restrict__ y) {
  using S = compute_t<T>;
  constexpr int kOutputs = kRowRun<K, kStride>;
  GPU_DYN_SHARED(S, filters);
  unsigned part = blockIdx.x;
  const int lane = threadIdx.x % work.lanes, slots = kConvThreads / work.lanes, pitch = (work.lanes + 1) * kChannels;
  const int64_t first = static_cast<int64_t>(work.tiles.split(part)) * work.lanes * kChannels, channel = first + lane * kChannels;
  share_filters<T, K>(work, weight, first, filters, pitch);
  if (channel >= work.C) return;
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
    ow *= kOutputs;
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    const T* const p = x + ((image * work.H + row) * work.W + column) * work.C + channel;
    S sum[kOutputs][kChannels];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
#pragma unroll
      for (int k = 0; k < kChannels; ++k) sum[o][k] = start[k];
    const int top = row < 0 ? -row : 0, bottom = row + K > H ? H - row : K;
#pragma unroll 1
    for (int ky = top; ky < bottom; ++ky) {
      S filter[K][kChannels];
      read_taps<K>(filters + ky * K * pitch + lane * kChannels, pitch, filter);
      const T* const from = p + ky * work.W * work.C;
#pragma unroll
      for (int i = 0; i < (kOutputs - 1) * kStride + K; ++i) {
        S v[kChannels];
        read<kChannels>(from + i * work.C, column + i >= 0 && column + i < W, v);
#pragma unroll
        for (int kx = 0; kx < K; ++kx)
          if (i >= kx && (i - kx) % kStride == 0 && (i - kx) / kStride < kOutputs)
#pragma unroll
            for (int k = 0; k < kChannels; ++k) sum[(i - kx) / kStride][k] = fma(v[k], filter[kx][k], sum[(i - kx) / kStride][k]);
      }
    }
    T* const out = y + ((image * work.OH + oh) * work.OW + ow) * work.C + channel;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
      if (ow + o < work.OW) write<kChannels>(out + o * work.C, sum[o]);
  }
}

constexpr int kPairs = 4;  // of neighbouring pixels of a thread

// The gradient of the input at stride 2: columns in pairs, which meet the same pixels of dy; rows one by one, each with
// every other row of taps. Runs are of kPairs pairs.
template <typename T, int K>
__global__ void __launch_bounds__(kConvThreads, 2)
    depthwise_rows_gradient_kernel(RowWork work, const T* __restrict__ dy, const T* __restrict__ weight, T* __restrict__ dx) {
  using S = compute_t<T>;
  constexpr int kTaps = (K + 1) / 2;
  GPU_DYN_SHARED(S, filters);
  unsigned part = blockIdx.x;
  const int lane = threadIdx.x % work.lanes, slots = kConvThreads / work.lanes, pitch = (work.lanes + 1) * kChannels;
  const int64_t first = static_cast<int64_t>(work.tiles.split(part)) * work.lanes * kChannels, channel = first + lane * kChannels;
  share_filters<T, K>(work, weight, first, filters, pitch);
  if (channel >= work.C) return;
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  const unsigned end = static_cast<unsigned>(smaller(work.order.count, (part + int64_t{1}) * work.part));
#pragma unroll 1
  for (unsigned at = part * work.part + threadIdx.x / work.lanes; at < end; at += slots) {
    int64_t image;
    int h, pair;
    work.order.place(at, image, h, pair);
    if (h >= work.OH) continue;
    pair = pair * kPairs + work.pw / 2;
    const int row = (h + work.ph) / 2, column = pair - (kTaps - 1);
    S sum[kPairs][2][kChannels] = {};
#pragma unroll 1
    for (int j = 0; 2 * j + (h + work.ph) % 2 < K; ++j) {
      if (row - j < 0 || row - j >= H) continue;
      S filter[K][kChannels];
      read_taps<K>(filters + (2 * j + (h + work.ph) % 2) * K * pitch + lane * kChannels, pitch, filter);
      const T* const from = dy + ((image * work.H + row - j) * work.W + column) * work.C + channel;
#pragma unroll
      for (int i = 0; i < kPairs + kTaps - 1; ++i) {
        S v[kChannels];
        read<kChannels>(from + i * work.C, column + i >= 0 && column + i < W, v);
#pragma unroll
        for (int q = 0; q < 2 * kPairs; ++q) {
          const int kx = 2 * (q / 2 + kTaps - 1 - i) + q % 2;
          if (kx >= 0 && kx < K)
#pragma unroll
            for (int k = 0; k < kChannels; ++k)
              sum[q / 2][q % 2][k] = fma(v[k], filter[kx >= 0 && kx < K ? kx : 0][k], sum[q / 2][q % 2][k]);
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

// Channels of a thread in the gradient of the weight, all of whose sums it holds.
template <typename T, int K>
constexpr int kSumChannels = sizeof(T) == 2 && K < 7 ? 2 : 1;

// The gradient of the weight. The lanes of a warp are channels; its warps have runs of their own.
template <typename T, int K, int kStride>
__global__ void __launch_bounds__(kConvThreads, 2)
    depthwise_rows_sums_kernel(RowWork work, const T* __restrict__ dy, const T* __restrict__ x, PartialSums<compute_t<T>> sums) {
  using S = compute_t<T>;
  constexpr int V = kSumChannels<T, K>, M = K * K + 1, kWarps = kConvThreads / kWarp;
  GPU_SHARED(S, scratch, kWarps * kWarps * kWarp * V);
  unsigned part = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channel = (static_cast<int64_t>(work.tiles.split(part)) * kWarp + lane) * V;
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
    ow *= kRun;
    S gradient[kRun][V];
    const T* const g = dy + ((image * work.OH + oh) * work.OW + ow) * work.C + channel;
#pragma unroll
    for (int o = 0; o < kRun; ++o) read<V>(g + o * work.C, ow + o < work.OW, gradient[o]);
#pragma unroll
    for (int o = 0; o < kRun; ++o)
#pragma unroll
      for (int k = 0; k < V; ++k) sum[K * K][k] += gradient[o][k];
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    const T* p = x + ((image * work.H + row) * work.W + column) * work.C + channel;
#pragma unroll
    for (int ky = 0; ky < K; ++ky, p += work.W * work.C) {
      if (row + ky < 0 || row + ky >= H) continue;
#pragma unroll
      for (int i = 0; i < (kRun - 1) * kStride + K; ++i) {
        S v[V];
        read<V>(p + i * work.C, column + i >= 0 && column + i < W, v);
#pragma unroll
        for (int kx = 0; kx < K; ++kx)
          if (i >= kx && (i - kx) % kStride == 0 && (i - kx) / kStride < kRun)
#pragma unroll
            for (int k = 0; k < V; ++k) sum[ky * K + kx][k] = fma(v[k], gradient[(i - kx) / kStride][k], sum[ky * K + kx][k]);
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < M; tap += kWarps) {  // as many at a time as there are warps
#pragma unroll
    for (int j = 0; j < kWarps; ++j)
      if (tap + j < M)
#pragma unroll
        for (int k = 0; k < V; ++k) scratch[((j * kWarps + warp) * kWarp + lane) * V + k] = sum[tap + j < M ? tap + j : 0][k];
    __syncthreads();
    if (exists && tap + warp < M)
#pragma unroll
      for (int k = 0; k < V; ++k) {
        S total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += scratch[((warp * kWarps + w) * kWarp + lane) * V + k];
        sums.at(part, channel + k, tap + warp) = total;
      }
    __syncthreads();
  }
}

// ---- launches ----

// Threads along channels: those of 128 bytes, or of 64 where fewer are left over.
template <typename T>
int row_lanes(int64_t C) {
  const int most = 128 / (kChannels * static_cast<int>(sizeof(T)));
  const auto covered = [&](int lanes) { return divup(C, lanes * kChannels) * lanes; };
  return covered(most / 2) < covered(most) ? most / 2 : most;
}

inline int64_t runs_of_part(int64_t count, int64_t tiles, int64_t slots, int64_t rounds) {
  return slots * larger(1, smaller(rounds, count * tiles / (kConvBlocks * slots)));
}

template <typename T, int K, typename Kernel, typename... Arguments>
void launch_rows(Kernel kernel, const RunOrder& order, const ConvGeometry& g, int64_t H, int64_t W, int64_t OH, int64_t OW, int ph, int pw,
                 bool flipped, Stream stream, const Arguments&... arguments) {
  const int lanes = row_lanes<T>(g.C);
  const int64_t tiles = divup(g.C, lanes * kChannels), part = runs_of_part(order.count, tiles, kConvThreads / lanes, 16);
  const RowWork work = {order, Divisor(tiles), static_cast<unsigned>(part), lanes, g.C, H, W, OH, OW, ph, pw, flipped};
  const size_t shared = sizeof(compute_t<T>) * K * K * (lanes + 1) * kChannels;
  launch(kernel, dim3(static_cast<unsigned>(tiles * divup(order.count, part))), dim3(kConvThreads), shared, stream, work, arguments...);
}

template <typename T, int K, int kStride>
void convolve_depthwise_rows(const ConvGeometry& g, const T* x, const T* weight, const T* bias, T* y, bool gradient, Stream stream) {
  const auto kernel = depthwise_rows_kernel<T, K, kStride>;
  if (gradient)
    launch_rows<T, K>(kernel, RunOrder(g.N, g.H, divup(g.W, kRowRun<K, kStride>)), g, g.OH, g.OW, g.H, g.W, K - 1 - g.ph, K - 1 - g.pw, true, stream, x,
                      weight, bias, y);
  else
    launch_rows<T, K>(kernel, RunOrder(g.N, g.OH, divup(g.OW, kRowRun<K, kStride>)), g, g.H, g.W, g.OH, g.OW, g.ph, g.pw, false, stream, x, weight, bias, y);
}

template <typename T, int K>
void depthwise_rows_gradient_stride_2(const ConvGeometry& g, const T* dy, const T* weight, T* dx, Stream stream) {
  const int64_t pairs = (g.W - 1 + g.pw) / 2 - g.pw / 2 + 1;
  launch_rows<T, K>(depthwise_rows_gradient_kernel<T, K>, RunOrder(g.N, g.H, divup(pairs, kPairs)), g, g.OH, g.OW, g.H, g.W, g.ph, g.pw,
                    false, stream, dy, weight, dx);
}

struct RowSumCut {
  RunOrder order;
  int64_t tiles, part, parts;
  RowSumCut(const ConvGeometry& g, int channels)
      : order(g.N, g.OH, divup(g.OW, kRun)),
        tiles(divup(g.C, kWarp * channels)),
        part(runs_of_part(order.count, tiles, kConvThreads / kWarp, 16)),
        parts(divup(order.count, part)) {}
};

template <typename T, int K, int kStride>
void sum_depthwise_rows(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums, Stream stream) {
  const RowSumCut cut(g, kSumChannels<T, K>);
  const RowWork work = {cut.order, Divisor(cut.tiles), static_cast<unsigned>(cut.part), kWarp, g.C, g.H, g.W, g.OH, g.OW, g.ph, g.pw, false};
  launch(depthwise_rows_sums_kernel<T, K, kStride>, dim3(static_cast<unsigned>(cut.tiles * cut.parts)), dim3(kConvThreads), 0, stream, work,
         dy, x, sums);
}

}  // namespace cnnkern::gpu
