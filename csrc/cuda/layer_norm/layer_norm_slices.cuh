// Layer norm over rows too long for the registers of a block: blocks share a row in slices, and read a slice in stretches
// that do fit. If there are many rows, a slice is a row.
// Forward: each block computes the moments of its slice. If that is the row, it then writes the result, and reads the row
// once more from L2. Otherwise a second kernel combines the slices' moments, in their order, and writes the result.
// Backward: sums of g and g * xhat of each slice, added up in their order; then tiles of columns by strips of rows write dx
// and take the sums over rows for dweight and dbias.
// Memory traffic, in tensors read or written: 2 to 3 forward, 5 backward.
// Accumulators: the arithmetic type for at most 32 elements, then double.
#pragma once

#include "cuda/layer_norm/layer_norm_rows.cuh"

namespace cnnkern::gpu {

constexpr int kSliceThreads = 256;
constexpr int kTileVectors = 32;    // columns of threads of a tile
constexpr int kTileRows = 8;        // rows of threads
constexpr int kTileUnroll = 2;      // rows that a thread has under way

struct RowSlices {
  int64_t rows, cols, slices, slice;  // slice: columns, a multiple of a stretch
  bool vector;
  double per_column;

  template <typename T, typename... Pointers>
  static RowSlices cut(int64_t rows, int64_t cols, int vectors, int elements, const Pointers*... pointers) {
    RowSlices c{.rows = rows, .cols = cols};
    c.vector = cols % kVector<T> == 0 && (aligned_to_vectors(pointers) && ...);
    c.per_column = 1.0 / cols;
    const int64_t stretch = static_cast<int64_t>(c.vector ? vectors * kVector<T> : elements) * kSliceThreads;
    const int64_t stretches = divup(cols, stretch), blocks = kResidentThreads / kSliceThreads;
    const int64_t wanted = smaller(smaller(divup(blocks, rows), stretches), kSliceThreads);
    c.slice = divup(stretches, wanted) * stretch;
    c.slices = divup(cols, c.slice);
    return c;
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(rows * slices)); }
};

// The columns [begin, end) of a row that are a block's, in stretches of `step` that its threads hold at once.
struct SlicePlace {
  int64_t row, slice, begin, end;
  int first, step, stretch;
  __device__ SlicePlace(const RowSlices& cut, int vector, int vectors) {
    row = blockIdx.x / cut.slices, slice = blockIdx.x % cut.slices;
    begin = slice * cut.slice, end = smaller(cut.cols, begin + cut.slice);
    first = threadIdx.x * vector, step = blockDim.x * vector, stretch = step * vectors;
  }
  __device__ __forceinline__ int columns(int64_t at) const { return static_cast<int>(smaller(end - at, stretch)); }
};

// The moments of two sets of elements together.
__device__ __forceinline__ Moments joined(const Moments& a, double na, const Moments& b, double nb) {
  const double share = nb / (na + nb), d = b.mean - a.mean;
  return {fma(d, share, a.mean), a.squares + b.squares + d * d * na * share};
}

template <typename X, typename T, int V>
__device__ __forceinline__ void write_slice(const LayerNormForward<X, T>& p, const RowSlices& cut, const SlicePlace& place,
                                            const Moments& m) {
  using S = compute_t<T>;
  const Normalizer<S> normalize = normalizer<S>(m, cut.per_column, p.eps);
  if (place.slice == 0 && threadIdx.x == 0) p.mean[place.row] = static_cast<S>(m.mean), p.rstd[place.row] = normalize.rstd;
  HeldRow<X, V, kForwardVectors<T, V>> x;
#pragma unroll 1
  for (int64_t at = place.begin; at < place.end; at += place.stretch) {
    const int64_t offset = place.row * cut.cols + at;
    x.read(p.x + offset, place.first, place.step, place.columns(at));
    x.each(place.first, place.step, place.columns(at), [&](int j, const S (&in)[V]) {
      S weight[V], bias[V], out[V];
      p.weight.load(at + j, S(1), weight), p.bias.load(at + j, S(0), bias);
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = fma(normalize(in[k]), weight[k], bias[k]);
      store<false>(p.y + offset + j, Lanes{}, out);
    });
  }
}

// partial: (rows, slices).
template <typename X, typename T, int V>
__global__ void __launch_bounds__(kSliceThreads, 2)
    ln_slices_fwd_kernel(LayerNormForward<X, T> p, RowSlices cut, Moments* partial) {
  constexpr int U = kForwardVectors<T, V>;
  const SlicePlace place(cut, V, U);
  Moments m{0, 0};
#pragma unroll 1
  for (int64_t at = place.begin; at < place.end; at += place.stretch) {
    HeldRow<X, V, U> x;
    const int columns = place.columns(at);
    x.read(p.x + place.row * cut.cols + at, place.first, place.step, columns);
    const Moments of_stretch = x.row_moments(place.first, place.step, columns, 1.0 / columns, kSliceThreads);
    m = at == place.begin ? of_stretch : joined(m, static_cast<double>(at - place.begin), of_stretch, columns);
  }
  if (cut.slices == 1)
    write_slice<X, T, V>(p, cut, place, m);
  else if (threadIdx.x == 0)
    partial[blockIdx.x] = m;
}

template <typename X, typename T, int V>
__global__ void __launch_bounds__(kSliceThreads, 2)
    ln_slices_join_kernel(LayerNormForward<X, T> p, RowSlices cut, const Moments* partial) {
  const SlicePlace place(cut, V, kForwardVectors<T, V>);
  const bool exists = threadIdx.x < cut.slices;
  const Moments mine = exists ? partial[place.row * cut.slices + threadIdx.x] : Moments{0, 0};
  const double n = exists ? static_cast<double>(smaller(cut.slice, cut.cols - threadIdx.x * cut.slice)) : 0.0;
  double sum[1] = {n * mine.mean};
  block_sum(sum);
  Moments m{sum[0] * cut.per_column, 0};
  const double d = exists ? mine.mean - m.mean : 0.0;
  double squares[1] = {fma(n * d, d, mine.squares)};
  block_sum(squares);
  m.squares = squares[0];
  write_slice<X, T, V>(p, cut, place, m);
}

// ---- backward ---------------------------------------------------------------------------------------------------

// partial: (rows, slices, 2).
template <typename X, typename T, int V>
__global__ void __launch_bounds__(kSliceThreads) ln_slices_bwd_kernel(LayerNormBackward<X, T> p, RowSlices cut, double* partial) {
  using S = compute_t<T>;
  constexpr int U = kForwardVectors<T, V> / 2;
  const SlicePlace place(cut, V, U);
  const S mean = p.mean[place.row];
  double sums[2] = {0, 0};
#pragma unroll 1
  for (int64_t at = place.begin; at < place.end; at += place.stretch) {
    HeldRow<T, V, U> dy;
    HeldRow<X, V, U> x;
    const int64_t offset = place.row * cut.cols + at;
    const int columns = place.columns(at);
    dy.read(p.dy + offset, place.first, place.step, columns), x.read(p.x + offset, place.first, place.step, columns);
    S s1 = 0, s2 = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = place.first + u * place.step;
      if (j >= columns) continue;
      S weight[V], in_dy[V], in_x[V];
      p.weight.load(at + j, S(1), weight), dy.held[u].values(in_dy), x.held[u].values(in_x);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const S g = in_dy[k] * weight[k];
        s1 += g, s2 = fma(g, in_x[k] - mean, s2);
      }
    }
    sums[0] += s1, sums[1] += s2;
  }
  block_sum(sums);
  if (threadIdx.x == 0) partial[2 * static_cast<int64_t>(blockIdx.x)] = sums[0], partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = sums[1];
}

// A warp per row.
template <typename S>
__global__ void __launch_bounds__(kSliceThreads)
    ln_slices_means_kernel(const S* rstd, const double* partial, Means<S>* means, RowSlices cut) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kSliceThreads / kWarp) + threadIdx.x / kWarp;
  double sums[2] = {0, 0};
  if (row < cut.rows)
    for (int64_t i = threadIdx.x % kWarp; i < cut.slices; i += kWarp) {
      const double* const at = partial + 2 * (row * cut.slices + i);
      sums[0] += at[0], sums[1] += at[1];
    }
  group_sum(sums, kWarp);
  if (row < cut.rows && threadIdx.x % kWarp == 0)
    means[row] = {static_cast<S>(sums[0] * cut.per_column), static_cast<S>(sums[1] * cut.per_column * rstd[row])};
}

struct RowTiles {
  int64_t rows, cols, strip, strips, tiles;

  static RowTiles cut(int64_t rows, int64_t cols, int vector) {
    RowTiles c{.rows = rows, .cols = cols};
    c.tiles = divup(cols, vector * kTileVectors);
    const int64_t steps = divup(rows, kTileRows * kTileUnroll);
    const int64_t blocks = kResidentThreads / (kTileVectors * kTileRows);
    // At most 128 additions in the arithmetic type.
    const int64_t wanted = larger(divup(blocks, c.tiles), divup(steps * kTileUnroll, kStripRows));
    c.strip = divup(steps, smaller(steps, wanted)) * kTileRows * kTileUnroll;
    c.strips = divup(rows, c.strip);
    return c;
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(tiles * strips)); }
};

// partial: (strips, 2, cols), null if no parameter needs a gradient.
template <typename X, typename T, int V>
__global__ void __launch_bounds__(kTileVectors* kTileRows)
    ln_tiles_bwd_kernel(LayerNormBackward<X, T> p, RowTiles cut, const Means<compute_t<T>>* means, compute_t<T>* partial) {
  using S = compute_t<T>;
  constexpr int U = kTileUnroll;
  GPU_SHARED(double, scratch, 2 * V * (kTileRows / 2) * kTileVectors);
  const int column = threadIdx.x % kTileVectors, thread_row = threadIdx.x / kTileVectors;
  const int64_t strip = blockIdx.x / cut.tiles, c = (blockIdx.x % cut.tiles * kTileVectors + column) * V;
  const int64_t begin = strip * cut.strip, end = smaller(cut.rows, begin + cut.strip);
  const bool active = c < cut.cols;
  S weight[V], sum_dy[V] = {}, sum_dy_xhat[V] = {};
  if (active) p.weight.load(c, S(1), weight);
  for (int64_t row = begin + thread_row; active && row < end; row += U * kTileRows) {
    Packed<T, V> dy[U];
    Packed<X, V> x[U];
    S mean[U], rstd[U];
    Means<S> mine[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = row + u * kTileRows;
      if (r >= end) continue;
      dy[u].read(p.dy + r * cut.cols + c), x[u].read(p.x + r * cut.cols + c);
      mean[u] = p.mean[r], rstd[u] = p.rstd[r];
      if (p.dx != nullptr) mine[u] = means[r];
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = row + u * kTileRows;
      if (r >= end) continue;
      S in_dy[V], in_x[V], out[V];
      dy[u].values(in_dy), x[u].values(in_x);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const S xhat = (in_x[k] - mean[u]) * rstd[u];
        sum_dy[k] += in_dy[k], sum_dy_xhat[k] = fma(in_dy[k], xhat, sum_dy_xhat[k]);
        out[k] = fma(-xhat, mine[u].slope, in_dy[k] * weight[k] - mine[u].level) * rstd[u];
      }
      if (p.dx != nullptr) store<false>(p.dx + r * cut.cols + c, Lanes{}, out);
    }
  }
  if (partial == nullptr) return;
  double sums[2 * V];
#pragma unroll
  for (int k = 0; k < V; ++k) sums[k] = sum_dy[k], sums[V + k] = sum_dy_xhat[k];
  column_sum(sums, thread_row, kTileRows, column, kTileVectors, scratch);
  if (!active || thread_row != 0) return;
  S out[V];
  S* const part = partial + 2 * cut.cols * strip + c;
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = static_cast<S>(sums[k]);
  store_values(part, out);
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = static_cast<S>(sums[V + k]);
  store_values(part + cut.cols, out);
}

}  // namespace cnnkern::gpu
