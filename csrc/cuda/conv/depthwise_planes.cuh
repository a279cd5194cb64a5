// Depthwise convolution of planes (NCHW): a thread has a column of outputs, neighbouring threads have neighbouring
// columns. The filter stays in registers. Each row of the input is read once for all outputs that it belongs to. Elements that
// neighbouring threads share come from the first-level cache.
#pragma once

#include "cuda/conv/conv_geometry.cuh"

namespace cnnkern::gpu {

constexpr int kPlaneThreads = 128;

// How outputs are counted: columns, then runs of rows, then planes.
struct PlaneWork {
  unsigned total;
  Divisor columns, runs, channels;
  int64_t H, W, OH, OW;  // of the tensors that are read and written
  int C, ph, pw;
  bool flipped;  // the filter is flipped: the gradient of the input
};

template <typename T, int K>
__device__ __forceinline__ void read_filter(const T* weight, int64_t channel, bool flipped, compute_t<T> (&filter)[K * K]) {
  const T* const p = weight + channel * (K * K) + (flipped ? K * K - 1 : 0);
  const int step = flipped ? -1 : 1;
#pragma unroll
  for (int k = 0; k < K * K; ++k) filter[k] = static_cast<compute_t<T>>(p[k * step]);
}

// Outputs of a thread in a row: fewer where the 49 taps of a filter leave few registers, and in 16 bits at stride 2 eight, as
// nvcc spills a register at seven.
template <typename T, int K, int kStride>
constexpr int kPlaneRun = K == 7 && (kStride == 2 || sizeof(T) == 2) ? 4 : K == 3 && kStride == 2 && sizeof(T) == 2 ? 8 : kRun;

template <typename T, int K, int kStride>
__global__ void __launch_bounds__(kPlaneThreads)
    depthwise_planes_kernel(PlaneWork work, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                            T* __restrict__ y) {
  using S = compute_t<T>;
  constexpr int kOutputs = kPlaneRun<T, K, kStride>;
  unsigned plane = blockIdx.x * kPlaneThreads + threadIdx.x;
  if (plane >= work.total) return;
  const int ow = work.columns.split(plane), oh = work.runs.split(plane) * kOutputs;
  const int64_t channel = plane - work.channels.quotient(plane) * work.channels.by;
  S filter[K * K], sum[kOutputs];
  read_filter<T, K>(weight, channel, work.flipped, filter);
  const S start = bias != nullptr ? static_cast<S>(bias[channel]) : S(0);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) sum[o] = start;
  const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  bool inside[K];
#pragma unroll
  for (int kx = 0; kx < K; ++kx) inside[kx] = column + kx >= 0 && column + kx < W;
  const T* const p = x + (plane * work.H + row) * work.W + column;
#pragma unroll
  for (int r = 0; r < (kOutputs - 1) * kStride + K; ++r) {
    const bool there = row + r >= 0 && row + r < H;
    S v[K];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) v[kx] = read_one(p + (r * W + kx), there && inside[kx]);
#pragma unroll
    for (int ky = 0; ky < K; ++ky)
      if (r >= ky && (r - ky) % kStride == 0 && (r - ky) / kStride < kOutputs)
#pragma unroll
        for (int kx = 0; kx < K; ++kx) sum[(r - ky) / kStride] = fma(v[kx], filter[ky * K + kx], sum[(r - ky) / kStride]);
  }
  const int OH = static_cast<int>(work.OH), OW = static_cast<int>(work.OW);
  T* out = y + (plane * work.OH + oh) * work.OW + ow;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o, out += OW)
    if (oh + o < OH) *out = static_cast<T>(sum[o]);
}

constexpr int kCells = 4;  // of a thread

// The gradient of the input at stride 2. Padded, x is made of cells of two by two pixels; a cell of x meets the pixels of dy
// at its own place and before it, each of the four with taps of its own. Counted: columns of cells, runs of kCells rows.
template <typename T, int K>
__global__ void __launch_bounds__(kPlaneThreads)
    depthwise_planes_gradient_kernel(PlaneWork work, const T* __restrict__ dy, const T* __restrict__ weight, T* __restrict__ dx) {
  using S = compute_t<T>;
  constexpr int kTaps = (K + 1) / 2;  // at most, of a pixel, each way
  unsigned plane = blockIdx.x * kPlaneThreads + threadIdx.x;
  if (plane >= work.total) return;
  const int column = work.columns.split(plane) + work.pw / 2, row = work.runs.split(plane) * kCells + work.ph / 2;
  S filter[K * K], sum[kCells][2][2] = {};
  read_filter<T, K>(weight, plane - work.channels.quotient(plane) * work.channels.by, false, filter);
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  bool inside[kTaps];
#pragma unroll
  for (int j = 0; j < kTaps; ++j) inside[j] = column - j >= 0 && column - j < W;
  const T* p = dy + (plane * work.H + row - (kTaps - 1)) * work.W + column;
#pragma unroll
  for (int r = 0; r < kCells + kTaps - 1; ++r, p += W) {
    const int from = row - (kTaps - 1) + r;
    const bool there = from >= 0 && from < H;
    S v[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) v[j] = read_one(p - j, there && inside[j]);
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
      const int i = cell + kTaps - 1 - r;  // rows of dy before the cell's
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int j = 0; j < kTaps; ++j)
          if (i >= 0 && i < kTaps && 2 * i + q / 2 < K && 2 * j + q % 2 < K)
            sum[cell][q / 2][q % 2] = fma(v[j], filter[(2 * i + q / 2) * K + 2 * j + q % 2], sum[cell][q / 2][q % 2]);
    }
  }
  const int h = 2 * row - work.ph, w = 2 * column - work.pw;
  T* const out = dx + (plane * work.OH + h) * work.OW + w;
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int at = 2 * cell + q / 2;
      if (h + at >= 0 && h + at < work.OH && w + q % 2 >= 0 && w + q % 2 < work.OW)
        out[at * work.OW + q % 2] = static_cast<T>(sum[cell][q / 2][q % 2]);
    }
}

// Sums M values over the lanes of a warp, and distributes the sums over the lanes: in the end v has the sums of `first` and the
// next `count`. Each step exchanges half of the remaining values instead of all.
template <int M, int kDistance, typename S, int N>
__device__ __forceinline__ void spread_sums(S (&v)[N], int lane, int& first, int& count) {
  if constexpr (kDistance > 0) {
    constexpr int kHalf = (M + 1) / 2;
    const bool upper = (lane & kDistance) != 0;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const S low = v[k], high = kHalf + k < M ? v[kHalf + k < M ? kHalf + k : 0] : S(0);
      v[k] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kDistance);
    }
    if (upper) first += kHalf;
    count = static_cast<int>(upper ? larger(0, count - kHalf) : smaller(count, kHalf));
    spread_sums<kHalf, kDistance / 2>(v, lane, first, count);
  }
}

// The gradient of the weight. A block has a channel and a part of its columns of kRun rows, which are counted: columns,
// runs, images.
struct PlaneSumWork {
  Divisor columns, runs, parts;
  unsigned count, part;  // of a channel; of a block
  int64_t C, H, W, OH, OW;
  int ph, pw;
};

template <typename T, int K, int kStride>
__global__ void __launch_bounds__(kPlaneThreads)
    depthwise_planes_sums_kernel(PlaneSumWork work, const T* __restrict__ dy, const T* __restrict__ x, PartialSums<compute_t<T>> sums) {
  using S = compute_t<T>;
  constexpr int M = K * K + 1, kWarps = kPlaneThreads / kWarp;
  GPU_SHARED(S, scratch, kWarps * M);
  unsigned channel = blockIdx.x;
  const unsigned part = static_cast<unsigned>(work.parts.split(channel));
  const unsigned end = static_cast<unsigned>(smaller(work.count, (part + 1) * work.part));
  S sum[M] = {};
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W), OH = static_cast<int>(work.OH), OW = static_cast<int>(work.OW);
#pragma unroll 1
  for (unsigned at = part * work.part + threadIdx.x; at < end; at += kPlaneThreads) {
    unsigned image = at;
    const int ow = work.columns.split(image), oh = work.runs.split(image) * kRun;
    const int64_t plane = image * work.C + channel;
    const T* g = dy + (plane * work.OH + oh) * work.OW + ow;
    S gradient[kRun];
#pragma unroll
    for (int o = 0; o < kRun; ++o, g += OW) gradient[o] = read_one(g, oh + o < OH);
#pragma unroll
    for (int o = 0; o < kRun; ++o) sum[K * K] += gradient[o];
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    bool inside[K];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) inside[kx] = column + kx >= 0 && column + kx < W;
    const T* p = x + (plane * work.H + row) * work.W + column;
#pragma unroll
    for (int r = 0; r < (kRun - 1) * kStride + K; ++r, p += W) {
      const bool there = row + r >= 0 && row + r < H;
      S v[K];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) v[kx] = read_one(p + kx, there && inside[kx]);
#pragma unroll
      for (int ky = 0; ky < K; ++ky)
        if (r >= ky && (r - ky) % kStride == 0 && (r - ky) / kStride < kRun)
#pragma unroll
          for (int kx = 0; kx < K; ++kx) sum[ky * K + kx] = fma(v[kx], gradient[(r - ky) / kStride], sum[ky * K + kx]);
    }
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kKept = (M + kWarp - 1) / kWarp;
  int first = 0, count = M;
  spread_sums<M, kWarp / 2>(sum, lane, first, count);
#pragma unroll
  for (int k = 0; k < kKept; ++k)
    if (k < count) scratch[warp * M + first + k] = sum[k];
  __syncthreads();
  for (int k = threadIdx.x; k < M; k += kPlaneThreads) {
    S total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += scratch[w * M + k];
    sums.at(part, channel, k) = total;
  }
}

// ---- launches ----

// x is read, y written; for the gradient of the input, dy and dx.
template <typename T, int K, int kStride>
void convolve_depthwise_planes(const ConvGeometry& g, const T* x, const T* weight, const T* bias, T* y, bool gradient, Stream stream) {
  const int64_t OH = gradient ? g.H : g.OH, OW = gradient ? g.W : g.OW, runs = divup(OH, kPlaneRun<T, K, kStride>);
  const int ph = gradient ? K - 1 - g.ph : g.ph, pw = gradient ? K - 1 - g.pw : g.pw;
  const unsigned total = static_cast<unsigned>(g.N * g.C * runs * OW);
  const PlaneWork work = {total, Divisor(OW),           Divisor(runs),       Divisor(g.C), gradient ? g.OH : g.H, gradient ? g.OW : g.W,
                          OH,    OW, static_cast<int>(g.C), ph, pw, gradient};
  launch(depthwise_planes_kernel<T, K, kStride>, dim3(static_cast<unsigned>(divup(total, kPlaneThreads))), dim3(kPlaneThreads), 0, stream,
         work, x, weight, bias, y);
}

template <typename T, int K>
void depthwise_planes_gradient_stride_2(const ConvGeometry& g, const T* dy, const T* weight, T* dx, Stream stream) {
  const auto cells = [](int64_t size, int padding) { return (size - 1 + padding) / 2 - padding / 2 + 1; };
  const int64_t columns = cells(g.W, g.pw), runs = divup(cells(g.H, g.ph), kCells);
  const unsigned total = static_cast<unsigned>(g.N * g.C * runs * columns);
  const PlaneWork work = {total, Divisor(columns), Divisor(runs), Divisor(g.C), g.OH, g.OW, g.H, g.W, static_cast<int>(g.C), g.ph, g.pw, false};
  launch(depthwise_planes_gradient_kernel<T, K>, dim3(static_cast<unsigned>(divup(total, kPlaneThreads))), dim3(kPlaneThreads), 0, stream,
         work, dy, weight, dx);
}

inline int64_t depthwise_planes_parts(const ConvGeometry& g) {
  const int64_t count = g.N * divup(g.OH, kRun) * g.OW;
  const int64_t rounds = larger(1, smaller(16, g.C * count / (2 * kConvBlocks * kPlaneThreads)));  // of a thread
  return divup(count, rounds * kPlaneThreads);
}

template <typename T, int K, int kStride>
void sum_depthwise_planes(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums, Stream stream) {
  const int64_t runs = divup(g.OH, kRun), count = g.N * runs * g.OW;
  const PlaneSumWork work = {Divisor(g.OW), Divisor(runs), Divisor(sums.parts), static_cast<unsigned>(count),
                             static_cast<unsigned>(divup(count, sums.parts)), g.C, g.H, g.W, g.OH, g.OW, g.ph, g.pw};
  launch(depthwise_planes_sums_kernel<T, K, kStride>, dim3(static_cast<unsigned>(g.C * sums.parts)), dim3(kPlaneThreads), 0, stream, work,
         dy, x, sums);
}

}  // namespace cnnkern::gpu
