// Layer norm over rows that fit into the registers of their threads: 4 to 512 of them, lanes of a warp or a block.
// Forward: a block reads its rows, all of it before the first sum. Backward: a block owns a strip of rows, one per group of
// threads at a time; the next row is read while this one is summed. A thread keeps to its columns, whose part of dweight
// and dbias stays in registers until the strip ends.
// Memory traffic, in tensors read or written: 2 forward, 3 backward.
// Accumulators: the arithmetic type for at most 32 elements of a row, or 128 rows, then double.
#pragma once

#include "cuda/layer_norm/layer_norm_terms.cuh"

namespace cnnkern::gpu {

constexpr int kLeastGroup = 4, kMostGroup = 512;  // threads of a row, a power of two
constexpr int kWarpsBlock = 128;                  // threads of a block whose rows have no more than a warp each
constexpr int kStripRows = 128;                   // of a group, whose sums stay in the arithmetic type

// Vectors of a row that a thread keeps: forward 64 bytes of it, backward 8 elements (4 of float64) of each tensor.
template <typename T, int V>
constexpr int kForwardVectors = V > 1 ? 4 : 64 / sizeof(compute_t<T>);
template <typename T, int V>
constexpr int kBackwardVectors = 32 / sizeof(compute_t<T>) / V;

struct RowGroups {
  int64_t rows, strip, strips;  // rows of a strip, which backward has
  int cols, threads, block;     // threads of a row, of a block
  bool vector;                  // whole aligned vectors
  double per_column;            // 1 / cols

  int groups() const { return block / threads; }
  bool held() const { return cols > 0; }

  // kVectors: those of a row that a thread keeps, where it is cut into vectors and where not. Not held if it is too long.
  template <typename T, typename... Pointers>
  static RowGroups cut(int64_t rows, int64_t cols, int vectors, int elements, const Pointers*... pointers) {
    RowGroups c{.rows = rows, .threads = kLeastGroup};
    c.vector = cols % kVector<T> == 0 && (aligned_to_vectors(pointers) && ...);
    const int64_t kept = c.vector ? vectors * kVector<T> : elements;
    while (c.threads < kMostGroup && c.threads * kept < cols) c.threads *= 2;
    if (c.threads * kept < cols) return c;
    c.cols = static_cast<int>(cols), c.per_column = 1.0 / cols;
    c.block = c.threads > kWarp ? c.threads : kWarpsBlock;
    const int64_t blocks = kResidentThreads / c.block, steps = divup(rows, c.groups());
    c.strip = divup(steps, smaller(steps, blocks * divup(steps, blocks * kStripRows))) * c.groups();
    c.strips = divup(rows, c.strip);
    return c;
  }

  size_t scratch_bytes(int elements) const { return sizeof(double) * 2 * elements * (groups() / 2) * threads; }
};

// Sums over the `threads` of a group; every one of them gets them.
template <int N>
__device__ __forceinline__ void group_sum(double (&v)[N], int threads) {
  if (threads > kWarp) return block_sum(v);
  for (int distance = threads / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] += __shfl_xor_sync(kAllLanes, v[k], distance);
}

// A thread's vectors of a row, a group's stretch apart.
template <typename T, int V, int U>
struct HeldRow {
  using S = compute_t<T>;
  Packed<T, V> held[U];

  __device__ __forceinline__ void read(const T* row, int first, int step, int cols) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * step < cols) held[u].read(row + first + u * step);
  }
  // f(column, values) for each vector.
  template <typename F>
  __device__ __forceinline__ void each(int first, int step, int cols, const F& f) const {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * step < cols) {
        S in[V];
        held[u].values(in);
        f(first + u * step, in);
      }
  }

  // Of the row, for all threads of its group.
  __device__ __forceinline__ Moments row_moments(int first, int step, int cols, double per_column, int threads) const {
    S s1 = 0, s2 = 0;
    each(first, step, cols, [&](int, const S (&in)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) s1 += in[k];
    });
    double sum[1] = {s1};
    group_sum(sum, threads);
    const S center = static_cast<S>(sum[0] * per_column);
    s1 = 0;
    each(first, step, cols, [&](int, const S (&in)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const S d = in[k] - center;
        s1 += d, s2 = fma(d, d, s2);
      }
    });
    double sums[2] = {s1, s2};
    group_sum(sums, threads);
    const bool trusted = sound<S>(sums[0], sums[1], per_column);
    Moments result = moments(center, sums[0], sums[1], per_column);
    // The lanes of a warp continue together, also with different rows.
    if (__ballot_sync(kAllLanes, !trusted) != 0) {
      double exact[1] = {0};
      each(first, step, cols, [&](int, const S (&in)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) exact[0] += in[k];
      });
      group_sum(exact, threads);
      const double mean = exact[0] * per_column;
      exact[0] = 0;
      each(first, step, cols, [&](int, const S (&in)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const double d = in[k] - mean;
          exact[0] = fma(d, d, exact[0]);
        }
      });
      group_sum(exact, threads);
      if (!trusted) result = {mean, exact[0]};
    }
    return result;
  }
};

template <typename X, typename T, int V>
__global__ void __launch_bounds__(kMostGroup) ln_rows_fwd_kernel(LayerNormForward<X, T> p, RowGroups cut) {
  using S = compute_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (cut.block / cut.threads) + threadIdx.x / cut.threads;
  const int lane = threadIdx.x % cut.threads, first = lane * V, step = cut.threads * V;
  const int cols = row < cut.rows ? cut.cols : 0;
  HeldRow<X, V, kForwardVectors<T, V>> x;
  x.read(p.x + row * cut.cols, first, step, cols);
  if (blockIdx.x == 0)
    for (int at = first; at < cols; at += step) p.weight.prefetch(at), p.bias.prefetch(at);
  const Moments m = x.row_moments(first, step, cols, cut.per_column, cut.threads);
  const Normalizer<S> normalize = normalizer<S>(m, cut.per_column, p.eps);
  if (lane == 0 && row < cut.rows) p.mean[row] = static_cast<S>(m.mean), p.rstd[row] = normalize.rstd;
  T* const y = p.y + row * cut.cols;
  x.each(first, step, cols, [&](int at, const S (&in)[V]) {
    S weight[V], bias[V], out[V];
    p.weight.load(at, S(1), weight), p.bias.load(at, S(0), bias);
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = fma(normalize(in[k]), weight[k], bias[k]);
    store<false>(y + at, Lanes{}, out);
  });
}

// partial: (strips, 2, cols), null if no parameter needs a gradient.
template <typename X, typename T, int V>
__global__ void __launch_bounds__(kMostGroup)
    ln_rows_bwd_kernel(LayerNormBackward<X, T> p, LayerNormParameterGradients<T> gradients, RowGroups cut, compute_t<T>* partial) {
  using S = compute_t<T>;
  constexpr int U = kBackwardVectors<T, V>;
  GPU_DYN_SHARED(double, scratch);
  const int group = threadIdx.x / cut.threads, groups = blockDim.x / cut.threads;
  const int lane = threadIdx.x % cut.threads, first = lane * V, step = cut.threads * V;
  const int64_t begin = blockIdx.x * cut.strip, end = smaller(cut.rows, begin + cut.strip);

  S weight[U][V], sum_dy[U][V] = {}, sum_dy_xhat[U][V] = {};
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (first + u * step < cut.cols) p.weight.load(first + u * step, S(1), weight[u]);

  struct Row {
    HeldRow<T, V, U> dy;
    HeldRow<X, V, U> x;
    S mean, rstd;
  } next{};
  const auto read = [&](int64_t row) {
    if (row >= end) return;
    next.dy.read(p.dy + row * cut.cols, first, step, cut.cols);
    next.x.read(p.x + row * cut.cols, first, step, cut.cols);
    next.mean = p.mean[row], next.rstd = p.rstd[row];
  };
  read(begin + group);
  for (int64_t start = begin; start < end; start += groups) {
    const Row now = next;
    const int64_t row = start + group;
    read(row + groups);
    S dy[U][V], xhat[U][V];
    const int cols = row < end ? cut.cols : 0;
    double sums[2] = {0, 0};
    S s1 = 0, s2 = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * step >= cols) continue;
      now.dy.held[u].values(dy[u]), now.x.held[u].values(xhat[u]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const S d = xhat[u][k] - now.mean, g = dy[u][k] * weight[u][k];
        s1 += g, s2 = fma(g, d, s2);
        xhat[u][k] = d * now.rstd;
        sum_dy[u][k] += dy[u][k], sum_dy_xhat[u][k] = fma(dy[u][k], xhat[u][k], sum_dy_xhat[u][k]);
      }
    }
    if (p.dx == nullptr) continue;
    sums[0] = s1, sums[1] = s2;
    group_sum(sums, cut.threads);
    const S level = static_cast<S>(sums[0] * cut.per_column), slope = static_cast<S>(sums[1] * cut.per_column * now.rstd);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * step >= cols) continue;
      S out[V];
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = fma(-xhat[u][k], slope, dy[u][k] * weight[u][k] - level) * now.rstd;
      store<false>(p.dx + row * cut.cols + first + u * step, Lanes{}, out);
    }
  }

  if (partial == nullptr) return;
#pragma unroll
  for (int u = 0; u < U; ++u) {  // a vector's columns at a time, for the sake of shared memory
    double sums[2 * V];
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] = sum_dy[u][k], sums[V + k] = sum_dy_xhat[u][k];
    column_sum(sums, group, groups, lane, cut.threads, scratch);
    const int c = first + u * step;
    if (group != 0 || c >= cut.cols) continue;
    if (gridDim.x == 1) {
#pragma unroll
      for (int k = 0; k < V; ++k) gradients.set(c + k, sums[k], sums[V + k]);
    } else {
      S out[V];
      S* const part = partial + 2 * cut.cols * static_cast<int64_t>(blockIdx.x) + c;
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = static_cast<S>(sums[k]);
      store_values(part, out);
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = static_cast<S>(sums[V + k]);
      store_values(part + cut.cols, out);
    }
  }
}

}  // namespace cnnkern::gpu
