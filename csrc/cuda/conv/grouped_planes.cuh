// Convolution 3x3 of planes (NCHW) by groups of several channels: a thread has a column of outputs of four channels of
// one group. A block keeps to these channels, whose filters lie in shared memory.
#pragma once

#include "cuda/conv/depthwise_planes.cuh"

namespace cnnkern::gpu {

// Outputs of a thread in a row: at stride 2 fewer, as twice as many pixels have to be held for them.
template <int kStride>
constexpr int kGroupRun = kStride == 1 ? kRun : 4;

constexpr int kQuad = 4;      // output channels of a thread
constexpr int kSquare = 9;    // taps of a kernel of 3x3
constexpr int kMostWide = 32;  // channels of a group

// What the kernels below compute.
inline bool grouped_planes_take(const ConvGeometry& g) {
  return !g.rows && g.square() && g.kh == 3 && g.inputs() == g.outputs() && g.inputs() > 1 && g.inputs() <= kMostWide;
}

// Filters as the kernels read them: of output channel `o` (of dx, if `transposed`) and the j-th channel that it sums over.
template <typename T>
struct Filters {
  const T* data;
  int64_t strides[4];
  int width;  // of a group
  bool transposed, flipped;
  __device__ __forceinline__ compute_t<T> get(int64_t o, int j, int tap) const {
    if (flipped) tap = kSquare - 1 - tap;
    const int64_t group = o / width * width, a = transposed ? group + j : o, b = transposed ? o - group : j;
    return static_cast<compute_t<T>>(data[a * strides[0] + b * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3]]);
  }
};

struct QuadWork {
  Divisor columns, runs, parts;
  unsigned count, part;  // threads of a quad, and of a block
  int64_t C, H, W, OH, OW;
  int ph, pw, quads;     // quads of a group
};

// Shared: filters (j, tap, kQuad). Channels beyond the group have none.
template <typename T>
__device__ __forceinline__ void share_quad(const Filters<T>& filters, int64_t first, int channels, compute_t<T>* shared) {
  for (int k = threadIdx.x; k < filters.width * kSquare * kQuad; k += kPlaneThreads) {
    const int channel = k % kQuad, tap = k / kQuad % kSquare, j = k / kQuad / kSquare;
    shared[k] = channel < channels ? filters.get(first + channel, j, tap) : compute_t<T>(0);
  }
  __syncthreads();
}

template <typename T, int kStride>
__global__ void __launch_bounds__(kPlaneThreads, 4)
    grouped_planes_kernel(QuadWork work, const T* __restrict__ x, Filters<T> filters, const T* __restrict__ bias, T* __restrict__ y) {
  using S = compute_t<T>;
  GPU_SHARED(S, shared, kMostWide* kSquare* kQuad);
  unsigned quad = blockIdx.x;
  const unsigned part = static_cast<unsigned>(work.parts.split(quad));
  const int64_t group = quad / work.quads * static_cast<int64_t>(filters.width), first = group + quad % work.quads * kQuad;
  const int channels = static_cast<int>(smaller(kQuad, group + filters.width - first));
  share_quad(filters, first, channels, shared);
  S start[kQuad] = {};
  if (bias != nullptr)
#pragma unroll
    for (int k = 0; k < kQuad; ++k) start[k] = k < channels ? static_cast<S>(bias[first + k]) : S(0);
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  const unsigned end = static_cast<unsigned>(smaller(work.count, (part + int64_t{1}) * work.part));
#pragma unroll 1
  for (unsigned at = part * work.part + threadIdx.x; at < end; at += kPlaneThreads) {
    unsigned image = at;
    const int ow = work.columns.split(image), oh = work.runs.split(image) * kGroupRun<kStride>;
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    S sum[kGroupRun<kStride>][kQuad];
#pragma unroll
    for (int o = 0; o < kGroupRun<kStride>; ++o)
#pragma unroll
      for (int k = 0; k < kQuad; ++k) sum[o][k] = start[k];
    bool inside[3];
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) inside[kx] = column + kx >= 0 && column + kx < W;
    const T* plane = x + ((image * work.C + group) * work.H + row) * work.W + column;
#pragma unroll 1
    for (int j = 0; j < filters.width; ++j, plane += work.H * work.W) {
      S filter[kSquare][kQuad];
#pragma unroll
      for (int tap = 0; tap < kSquare; ++tap) read<kQuad>(shared + (j * kSquare + tap) * kQuad, true, filter[tap]);
#pragma unroll
      for (int r = 0; r < (kGroupRun<kStride> - 1) * kStride + 3; ++r) {
        const bool there = row + r >= 0 && row + r < H;
        S v[3];
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) v[kx] = read_one(plane + (r * W + kx), there && inside[kx]);
#pragma unroll
        for (int ky = 0; ky < 3; ++ky)
          if (r >= ky && (r - ky) % kStride == 0 && (r - ky) / kStride < kGroupRun<kStride>)
#pragma unroll
            for (int kx = 0; kx < 3; ++kx)
#pragma unroll
              for (int k = 0; k < kQuad; ++k)
                sum[(r - ky) / kStride][k] = fma(v[kx], filter[ky * 3 + kx][k], sum[(r - ky) / kStride][k]);
      }
    }
    T* const out = y + ((image * work.C + first) * work.OH + oh) * work.OW + ow;
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
#pragma unroll
      for (int o = 0; o < kGroupRun<kStride>; ++o)
        if (k < channels && oh + o < work.OH) out[(k * work.OH + o) * work.OW] = static_cast<T>(sum[o][k]);
  }
}

constexpr int kQuadCells = 2;  // of a thread

// The gradient of the input at stride 2, by cells as in depthwise_planes_gradient_kernel.
template <typename T>
__global__ void __launch_bounds__(kPlaneThreads)
    grouped_planes_gradient_kernel(QuadWork work, const T* __restrict__ dy, Filters<T> filters, T* __restrict__ dx) {
  using S = compute_t<T>;
  GPU_SHARED(S, shared, kMostWide* kSquare* kQuad);
  unsigned quad = blockIdx.x;
  const unsigned part = static_cast<unsigned>(work.parts.split(quad));
  const int64_t group = quad / work.quads * static_cast<int64_t>(filters.width), first = group + quad % work.quads * kQuad;
  const int channels = static_cast<int>(smaller(kQuad, group + filters.width - first));
  share_quad(filters, first, channels, shared);
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W);
  const unsigned end = static_cast<unsigned>(smaller(work.count, (part + int64_t{1}) * work.part));
#pragma unroll 1
  for (unsigned at = part * work.part + threadIdx.x; at < end; at += kPlaneThreads) {
    unsigned image = at;
    const int column = work.columns.split(image) + work.pw / 2, row = work.runs.split(image) * kQuadCells + work.ph / 2;
    S sum[kQuadCells][4][kQuad] = {};
    const bool here = column >= 0 && column < W, before = column >= 1 && column - 1 < W;
    const T* plane = dy + ((image * work.C + group) * work.H + row - 1) * work.W + column;
#pragma unroll 1
    for (int j = 0; j < filters.width; ++j, plane += work.H * work.W) {
      S filter[kSquare][kQuad];
#pragma unroll
      for (int tap = 0; tap < kSquare; ++tap) read<kQuad>(shared + (j * kSquare + tap) * kQuad, true, filter[tap]);
      const T* p = plane;
#pragma unroll
      for (int r = 0; r < kQuadCells + 1; ++r, p += W) {
        const bool there = row - 1 + r >= 0 && row - 1 + r < H;
        const S v[2] = {read_one(p, there && here), read_one(p - 1, there && before)};
#pragma unroll
        for (int cell = 0; cell < kQuadCells; ++cell) {
          const int i = cell + 1 - r;  // rows of dy before the cell's
#pragma unroll
          for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int b = 0; b < 2; ++b)
              if (i >= 0 && i < 2 && 2 * i + q / 2 < 3 && 2 * b + q % 2 < 3)
#pragma unroll
                for (int k = 0; k < kQuad; ++k)
                  sum[cell][q][k] = fma(v[b], filter[(2 * i + q / 2) * 3 + 2 * b + q % 2][k], sum[cell][q][k]);
        }
      }
    }
    const int h = 2 * row - work.ph, w = 2 * column - work.pw;
    T* const out = dx + ((image * work.C + first) * work.OH + h) * work.OW + w;
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
#pragma unroll
      for (int cell = 0; cell < kQuadCells; ++cell)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int at_row = 2 * cell + q / 2;
          if (k < channels && h + at_row >= 0 && h + at_row < work.OH && w + q % 2 >= 0 && w + q % 2 < work.OW)
            out[(k * work.OH + at_row) * work.OW + q % 2] = static_cast<T>(sum[cell][q][k]);
        }
  }
}

// The gradient of the weight. A warp has four output channels, an input channel of their group and a part of the columns of
// rows; the warps of a block have input channels that follow one another, and read the same of dy.
struct QuadSumWork {
  Divisor columns, runs, parts;
  unsigned count, part, warps;  // columns; of a part; warps of a part
  int64_t C, H, W, OH, OW;
  int ph, pw, quads, width;
};

template <typename T, int kStride>
__global__ void __launch_bounds__(kPlaneThreads)
    grouped_planes_sums_kernel(QuadSumWork work, const T* __restrict__ dy, const T* __restrict__ x, PartialSums<compute_t<T>> sums) {
  using S = compute_t<T>;
  constexpr int M = (kSquare + 1) * kQuad;  // the last four are the sums of dy
  unsigned block = blockIdx.x;
  const unsigned part = static_cast<unsigned>(work.parts.split(block));
  const int lane = threadIdx.x % kWarp;
  const unsigned number = block * (kPlaneThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= work.warps) return;
  const int j = static_cast<int>(number % work.width), quad = static_cast<int>(number / work.width);
  const int64_t group = quad / work.quads * static_cast<int64_t>(work.width), first = group + quad % work.quads * kQuad;
  const int channels = static_cast<int>(smaller(kQuad, group + work.width - first));
  const unsigned end = static_cast<unsigned>(smaller(work.count, (part + int64_t{1}) * work.part));
  const int H = static_cast<int>(work.H), W = static_cast<int>(work.W), OH = static_cast<int>(work.OH), OW = static_cast<int>(work.OW);
  S sum[M] = {};
#pragma unroll 1
  for (unsigned at = part * work.part + lane; at < end; at += kWarp) {
    unsigned image = at;
    const int ow = work.columns.split(image), oh = work.runs.split(image) * kGroupRun<kStride>;
    S gradient[kGroupRun<kStride>][kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const T* g = dy + ((image * work.C + first + k) * work.OH + oh) * work.OW + ow;
#pragma unroll
      for (int o = 0; o < kGroupRun<kStride>; ++o, g += OW) {
        gradient[o][k] = read_one(g, k < channels && oh + o < OH);
        sum[kSquare * kQuad + k] += gradient[o][k];
      }
    }
    const int row = oh * kStride - work.ph, column = ow * kStride - work.pw;
    bool inside[3];
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) inside[kx] = column + kx >= 0 && column + kx < W;
    const T* p = x + ((image * work.C + group + j) * work.H + row) * work.W + column;
#pragma unroll
    for (int r = 0; r < (kGroupRun<kStride> - 1) * kStride + 3; ++r, p += W) {
      const bool there = row + r >= 0 && row + r < H;
      S v[3];
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) v[kx] = read_one(p + kx, there && inside[kx]);
#pragma unroll
      for (int ky = 0; ky < 3; ++ky)
        if (r >= ky && (r - ky) % kStride == 0 && (r - ky) / kStride < kGroupRun<kStride>)
#pragma unroll
          for (int kx = 0; kx < 3; ++kx)
#pragma unroll
            for (int k = 0; k < kQuad; ++k) {
              S& total = sum[(ky * 3 + kx) * kQuad + k];
              total = fma(v[kx], gradient[(r - ky) / kStride][k], total);
            }
    }
  }
  int begin = 0, count = M;
  spread_sums<M, kWarp / 2>(sum, lane, begin, count);
#pragma unroll
  for (int k = 0; k < (M + kWarp - 1) / kWarp; ++k) {
    const int tap = (begin + k) / kQuad, channel = (begin + k) % kQuad;
    if (k < count && channel < channels && (tap < kSquare || j == 0))
      sums.at(part, first + channel, tap < kSquare ? j * kSquare + tap : sums.taps) = sum[k];
  }
}

// ---- launches ----

inline int64_t quads_of_group(const ConvGeometry& g) { return divup(g.inputs(), kQuad); }

template <typename T, typename Kernel, typename... Arguments>
void launch_quads(Kernel kernel, const ConvGeometry& g, int64_t columns, int64_t runs, int64_t H, int64_t W, int64_t OH, int64_t OW, int ph,
                  int pw, Stream stream, const Arguments&... arguments) {
  const int64_t quads = quads_of_group(g), count = g.N * runs * columns;
  const int64_t rounds = larger(1, smaller(8, g.groups * quads * count / (2 * kConvBlocks * kPlaneThreads)));
  const int64_t part = rounds * kPlaneThreads, parts = divup(count, part);
  const QuadWork work = {Divisor(columns), Divisor(runs), Divisor(parts), static_cast<unsigned>(count), static_cast<unsigned>(part),
                         g.C, H, W, OH, OW, ph, pw, static_cast<int>(quads)};
  launch(kernel, dim3(static_cast<unsigned>(g.groups * quads * parts)), dim3(kPlaneThreads), 0, stream, work, arguments...);
}

template <typename T, int kStride>
void convolve_grouped_planes(const ConvGeometry& g, const T* x, const Filters<T>& filters, const T* bias, T* y, Stream stream) {
  if (filters.transposed)
    launch_quads<T>(grouped_planes_kernel<T, kStride>, g, g.W, divup(g.H, kGroupRun<kStride>), g.OH, g.OW, g.H, g.W, 2 - g.ph, 2 - g.pw, stream, x, filters,
                    bias, y);
  else
    launch_quads<T>(grouped_planes_kernel<T, kStride>, g, g.OW, divup(g.OH, kGroupRun<kStride>), g.H, g.W, g.OH, g.OW, g.ph, g.pw, stream, x, filters, bias, y);
}

template <typename T>
void grouped_planes_gradient_stride_2(const ConvGeometry& g, const T* dy, const Filters<T>& filters, T* dx, Stream stream) {
  const auto cells = [](int64_t size, int padding) { return (size - 1 + padding) / 2 - padding / 2 + 1; };
  launch_quads<T>(grouped_planes_gradient_kernel<T>, g, cells(g.W, g.pw), divup(cells(g.H, g.ph), kQuadCells), g.OH, g.OW, g.H, g.W, g.ph,
                  g.pw, stream, dy, filters, dx);
}

inline int64_t grouped_planes_parts(const ConvGeometry& g) {
  const int64_t count = g.N * divup(g.OH, g.sh == 1 ? kGroupRun<1> : kGroupRun<2>) * g.OW, warps = g.groups * quads_of_group(g) * g.inputs();
  return divup(count, kWarp * larger(1, smaller(16, warps * count / (8 * kConvBlocks * kWarp))));
}

template <typename T, int kStride>
void sum_grouped_planes(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums, Stream stream) {
  const int64_t runs = divup(g.OH, kGroupRun<kStride>), count = g.N * runs * g.OW, quads = quads_of_group(g), warps = g.groups * quads * g.inputs();
  const QuadSumWork work = {Divisor(g.OW), Divisor(runs), Divisor(sums.parts), static_cast<unsigned>(count),
                            static_cast<unsigned>(divup(count, sums.parts)), static_cast<unsigned>(warps), g.C, g.H, g.W, g.OH, g.OW, g.ph, g.pw,
                            static_cast<int>(quads), static_cast<int>(g.inputs())};
  launch(grouped_planes_sums_kernel<T, kStride>, dim3(static_cast<unsigned>(divup(warps, kPlaneThreads / kWarp) * sums.parts)),
         dim3(kPlaneThreads), 0, stream, work, dy, x, sums);
}

}  // namespace cnnkern::gpu
