// Depthwise convolution of rows of channels (NHWC) from a ring of input rows in shared memory. A thread has a lane (a few
// neighbouring channels, whose filters are in its registers) and a strip (a few neighbouring columns of the output). A block
// walks down the rows of the input: each is copied to the ring while earlier ones are used, with zeros beyond the image.
// A row is added to the sums of every output row that it belongs to. A thread has the sums of all output rows that are not
// complete. So an element is read from memory once, from the ring a few times, and multiplied by the whole filter.
// A block has the strips of a whole row of the output, of several images if rows are short, or of a tile of columns.
#pragma once

#include "cuda/conv/ring.cuh"

namespace cnnkern::gpu {

// A convolution of stride kStride: a thread's sums of kRun_ outputs in each of the incomplete rows. The sums of row j need j more
// steps of kStride rows.
template <typename T, int K, int kStride, int kRun_>
struct RingConvolution {
  using Scalar = T;
  using S = compute_t<T>;
  static constexpr int V = kLane<T>, kSize = K, kStep = kStride, kOutputs = kRun_, kSpan = K, kLag = (K - 1) / kStride;
  S filter[K][K][V], start[V], sum[kLag + 1][kOutputs][V];

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int j = 0; j <= kLag; ++j)
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[j][o][k] = start[k];
  }

  // A step down over rows of zeros.
  __device__ __forceinline__ void skip() {
#pragma unroll
    for (int j = 0; j <= kLag; ++j)
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[j][o][k] = j < kLag ? sum[j < kLag ? j + 1 : j][o][k] : start[k];
  }

  // Adds a row, whose even and odd pixels begin at p[0] and p[1]. kPhase: 0 for the last row of a step, which shifts the sums.
  template <int kPhase>
  __device__ __forceinline__ void add(const T* (&p)[2], int width) {
#pragma unroll
    for (int i = 0; i < (kOutputs - 1) * kStride + K; ++i) {
      S v[V];
      read_lane(p[i % kStride], v);
      p[i % kStride] += width;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int kx = i - o * kStride;
        if (kx < 0 || kx >= K) continue;
#pragma unroll
        for (int j = 0; j <= kLag; ++j) {
          const int ky = (kLag - j) * kStride + kPhase;
          if (ky >= K) continue;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const S before = kPhase > 0 || kx > 0 ? sum[j][o][k] : j < kLag ? sum[j < kLag ? j + 1 : j][o][k] : start[k];
            sum[j][o][k] = fma(v[k], filter[ky][kx][k], before);
          }
        }
      }
    }
  }

  // image: of the output, at the thread's channel; row, column: of its first sum that is complete.
  __device__ __forceinline__ void store(const RingWork& work, T* image, int row, int column) const {
    T* p = image + (row * work.OW + column) * work.C;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o, p += work.C)
      if (column + o < work.OW) write<V>(p, sum[0][o]);
  }
};

// The gradient of the input at stride 2. A step reads a row of dy and completes two rows of dx. Columns of dx are in pairs, of
// which a thread has kPairs_. Tap (2 i, 2 j), and those right and below of it, meet dy i rows up and j columns left of a pair.
template <typename T, int K, int kPairs_>
struct RingGradient {
  using Scalar = T;
  using S = compute_t<T>;
  static constexpr int V = kLane<T>, kSize = K, kStep = 1, kOutputs = kPairs_, kLag = (K - 1) / 2, kSpan = kLag + 1;
  S filter[K][K][V], start[V], sum[K][2 * kOutputs][V];

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
      for (int o = 0; o < 2 * kOutputs; ++o)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[j][o][k] = 0;
  }

  __device__ __forceinline__ void skip() {
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
      for (int o = 0; o < 2 * kOutputs; ++o)
#pragma unroll
        for (int k = 0; k < V; ++k) sum[j][o][k] = j + 2 < K ? sum[j + 2 < K ? j + 2 : j][o][k] : S(0);
  }

  template <int>
  __device__ __forceinline__ void add(const T* (&p)[2], int width) {
#pragma unroll
    for (int i = 0; i < kOutputs + kLag; ++i) {
      S v[V];
      read_lane(p[0], v);
      p[0] += width;
#pragma unroll
      for (int o = 0; o < 2 * kOutputs; ++o) {
        const int kx = 2 * (o / 2 + kLag - i) + o % 2;
        if (kx < 0 || kx >= K) continue;
#pragma unroll
        for (int ky = 0; ky < K; ++ky)
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const S before = kx + 2 < K ? sum[ky][o][k] : ky + 2 < K ? sum[ky + 2 < K ? ky + 2 : ky][o][k] : S(0);
            sum[ky][o][k] = fma(v[k], filter[ky][kx][k], before);
          }
      }
    }
  }

  // row, column: numbers of pairs. The first pair lacks its first one where the padding is odd.
  __device__ __forceinline__ void store(const RingWork& work, T* image, int row, int column) const {
    const int h = 2 * row - work.odd_h, w = 2 * column - work.odd_w;
    T* p = image + (h * work.OW + w) * work.C;
    const bool rows[2] = {h >= 0, h + 1 < work.OH};
#pragma unroll
    for (int o = 0; o < 2 * kOutputs; ++o, p += work.C) {
      if (w + o < 0 || w + o >= work.OW) continue;
      if (rows[0]) write<V>(p, sum[0][o]);
      if (rows[1]) write<V>(p + work.OW * work.C, sum[1][o]);
    }
  }
};

// Copies filters to shared memory: in memory those of a block are neighbours, and those of a tap are not. They are visible after
// async_wait and a barrier. `count` is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void copy_filters(const T* from, int count, T* to) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0)
    for (int i = threadIdx.x * kVector<T>; i < count; i += blockDim.x * kVector<T>) async_copy(to + i, from + i);
  else
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// The filters of a thread's channels, from the block's. flipped: flipped.
template <typename M, typename T>
__device__ __forceinline__ void read_filters(const T* filters, bool flipped, M& m) {
  constexpr int K = M::kSize;
#pragma unroll
  for (int k = 0; k < M::V; ++k)
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap)
      m.filter[tap / K][tap % K][k] = static_cast<compute_t<T>>(filters[k * K * K + (flipped ? K * K - 1 - tap : tap)]);
}

// M: one of the above. kDepth: rows of the ring.
template <typename M, int kDepth, int kBlocks>
__global__ void __launch_bounds__(kRingThreads, kBlocks)
    depthwise_ring_kernel(RingWork work, const typename M::Scalar* __restrict__ x, const typename M::Scalar* __restrict__ weight,
                          const typename M::Scalar* __restrict__ bias, typename M::Scalar* __restrict__ y) {
  using T = typename M::Scalar;
  constexpr int K = M::kSize, V = M::V;
  GPU_DYN_SHARED(T, ring);
  const RingThread<T> me(work);
  unsigned part = blockIdx.x;
  const int first = work.tiles.split(part) * me.width, channel = first + me.lane;
  const bool exists = channel < work.C;
  M m;
#pragma unroll
  for (int k = 0; k < V; ++k) m.start[k] = bias != nullptr && exists ? static_cast<compute_t<T>>(bias[channel + k]) : compute_t<T>(0);
  const int pixels = (work.strips * M::kOutputs - 1) * M::kStep + M::kSpan, stage = work.images * pixels * me.width;
  const T* const mine = ring + (me.image * pixels + me.strip * M::kOutputs) * me.width + me.lane;
  const int odd = (pixels + 1) / 2 * me.width;  // from the even pixels of a row to the odd ones
  T* const filters = ring + kDepth * stage;
  copy_filters(weight + first * (K * K), static_cast<int>(smaller(me.width, work.C - first)) * (K * K), filters);
  const unsigned end = static_cast<unsigned>(smaller(work.items, (part + int64_t{1}) * work.part));
  bool begins = true;
  for (unsigned at = part * work.part; at < end; begins = false) {
    unsigned unit = at;
    const int row = work.rows.split(unit), count = static_cast<int>(smaller(end - at, work.rows.by - row));
    const int column = work.columns.split(unit) * work.strips * M::kOutputs;
    const int image = static_cast<int>(unit) * work.images + me.image;
    at += count;
    const T* const from = x + static_cast<int64_t>(image) * work.H * work.W * work.C + first;
    T* const to = y + static_cast<int64_t>(image) * work.OH * work.OW * work.C + channel;
    const int steps = count + M::kLag, top = row * M::kStep - work.ph, left = column * M::kStep - work.pw;
    // At stride 2 the last row of the image may not complete a step: then a row of zeros does.
    const int height = work.H + (M::kStep == 2 && (work.H - top) % 2 == 0);
    const int bottom = static_cast<int>(smaller(height, top + (steps - 1) * M::kStep + 1));
    const bool copies = image < work.N && first + me.chunk < work.C, stores = exists && image < work.N;
    const int begin = top < 0 ? 0 : top;
    int next = begin, filled = 0, used = 0;
    const auto copy_next = [&] {
      if (next < bottom) {
        me.template copy<M::kStep>(work, from + next * work.W * work.C, copies && next < work.H, left, work.W, pixels, ring + filled * stage);
        ++next;
        filled = filled + 1 == kDepth ? 0 : filled + 1;
      }
      async_commit();
    };
    const auto add_row = [&](auto phase) {
      async_wait<kDepth - 2>();
      __syncthreads();
      copy_next();
      const T* p[2] = {mine + used * stage, mine + used * stage + odd};
      m.template add<decltype(phase)::value>(p, me.width);
      used = used + 1 == kDepth ? 0 : used + 1;
    };
    const auto store = [&](int t) {
      if (t >= M::kLag && stores) m.store(work, to, row + t - M::kLag, column + me.strip * M::kOutputs);
    };
    __syncthreads();  // all threads are done with the rows of the previous part
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) copy_next();
    if (begins) {  // the filters came with the first row
      async_wait<kDepth - 2>();
      __syncthreads();
      read_filters(filters + me.lane * (K * K), work.flipped, m);
    }
    m.begin();
    int t = 0;
#pragma unroll 1
    for (; t < steps && top + t * M::kStep < 0; ++t) store(t);
#pragma unroll 1
    for (; t < steps && top + t * M::kStep < bottom; ++t) {
      if (M::kStep == 2 && top + t * 2 - 1 >= begin) add_row(std::integral_constant<int, M::kStep - 1>{});
      add_row(std::integral_constant<int, 0>{});
      store(t);
    }
#pragma unroll 1
    for (; t < steps; ++t) {
      m.skip();
      store(t);
    }
  }
}

// ---- launches ----

// Rows of a ring, and blocks of a multiprocessor, as registers allow.
constexpr int kRingDepth = 4;
template <typename T, int K>
constexpr int kRingBlocks = (K == 3 ? 4 : K == 5 ? 3 : 2) + (sizeof(T) == 4 ? 1 : 0);

template <typename M, int kDepth, int kBlocks, typename T>
void launch_ring(const ConvGeometry& g, const RingShape& s, const T* x, const T* weight, const T* bias, T* y, Stream stream) {
  const RingCut cut(g.N, divup(g.C, M::V), s.rows, s.columns, M::kOutputs, M::kLag, kBlocks);
  const int64_t pixels = (cut.strips * M::kOutputs - 1) * M::kStep + M::kSpan, filters = M::kSize * M::kSize;
  const int64_t shared = cut.lanes * M::V * (kDepth * cut.images * pixels + filters) * static_cast<int64_t>(sizeof(T));
  launch(depthwise_ring_kernel<M, kDepth, kBlocks>, dim3(cut.blocks()), dim3(cut.threads()), static_cast<size_t>(shared), stream, cut.work(g, s), x,
         weight, bias, y);
}

template <typename T, int K, int kStride>
void convolve_depthwise_ring(const ConvGeometry& g, const T* x, const T* weight, const T* bias, T* y, bool gradient, Stream stream) {
  using M = RingConvolution<T, K, kStride, kRun>;
  const RingShape forward = {g.H, g.W, g.OH, g.OW, g.OH, g.OW, g.ph, g.pw};
  const RingShape backward = {g.OH, g.OW, g.H, g.W, g.H, g.W, K - 1 - g.ph, K - 1 - g.pw, true};
  launch_ring<M, kRingDepth, kRingBlocks<T, K>>(g, gradient ? backward : forward, x, weight, bias, y, stream);
}

// Pairs of columns of a thread, as registers allow.
template <int K>
constexpr int kRingPairs = K == 3 ? 5 : K == 5 ? 3 : 2;

template <typename T, int K>
void depthwise_ring_gradient_stride_2(const ConvGeometry& g, const T* dy, const T* weight, T* dx, Stream stream) {
  using M = RingGradient<T, K, kRingPairs<K>>;
  const auto pairs = [](int64_t size, int padding) { return (size - 1 + padding) / 2 - padding / 2 + 1; };
  const RingShape shape = {g.OH, g.OW, g.H, g.W, pairs(g.H, g.ph), pairs(g.W, g.pw), M::kLag - g.ph / 2, M::kLag - g.pw / 2, false,
                           g.ph % 2, g.pw % 2};
  launch_ring<M, kRingDepth, kRingBlocks<T, K>>(g, shape, dy, weight, static_cast<const T*>(nullptr), dx, stream);
}

}  // namespace cnnkern::gpu
