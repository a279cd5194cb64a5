// layer_norm, over rows of n elements: y = xhat * weight + bias, xhat = (x - mean) * rstd.
// Backward, with g = dy * weight: dbias = sum of dy over rows, dweight = sum of dy * xhat over rows,
//   dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n).
// A row belongs to a group of threads: lanes of a warp, or a block where it is long. They keep its beginning in registers;
// what a longer row has beyond is read again, from L2. The sums over rows are taken by blocks that own strips of rows,
// then added in the order of the strips.
// Traffic in tensors read or written: 2 forward; 3 for dx and 2 for dweight and dbias.
// Accumulators: the arithmetic type for at most 16 elements, then double.
#pragma once

#include "cuda/launch.cuh"

namespace cnnkern::gpu {

constexpr int kHeldBytes = 64;  // of rows that a thread keeps, in the arithmetic type
constexpr int kLeastGroup = 8, kMostGroup = 512;  // threads of a row, a power of two
constexpr int kWarpsBlock = 128;  // threads of a block whose rows have no more than a warp each

// A parameter, dense, of type T or float; not there if data is null.
template <typename T>
struct ParameterVector {
  const void* data;
  bool is_float;

  template <int V>
  __device__ __forceinline__ void load(int64_t at, compute_t<T> otherwise, compute_t<T> (&out)[V]) const {
    const auto nothing = [](int) { return compute_t<T>(0); };
    if (data == nullptr) {
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = otherwise;
    } else if (std::is_same_v<T, float> || !is_float) {
      gpu::load<false>(static_cast<const T*>(data) + at, Lanes{}, nothing, out);
    } else {
      constexpr int N = V < 4 ? V : 4;
#pragma unroll
      for (int k = 0; k < V; k += N) {
        float part[N];
        gpu::load<false>(static_cast<const float*>(data) + at + k, Lanes{}, [](int) { return 0.0f; }, part);
#pragma unroll
        for (int j = 0; j < N; ++j) out[k + j] = static_cast<compute_t<T>>(part[j]);
      }
    }
  }
};

template <typename T>
struct LayerNormForward {
  using S = compute_t<T>;
  const T* x;
  T* y;
  S *mean, *rstd;
  ParameterVector<T> weight, bias;
  double eps;
};

template <typename T>
struct LayerNormBackward {
  using S = compute_t<T>;
  const T *dy, *x;
  T* dx;  // null where not wanted
  const S *mean, *rstd;
  ParameterVector<T> weight;
};

// The last of the sums over rows, or pixels: see finish_kernel.
template <typename T>
struct LayerNormParameterGradients {
  ChannelVector<T> dweight, dbias;
  __device__ bool wanted() const { return dweight.data != nullptr || dbias.data != nullptr; }
  __device__ void finish(int64_t c, double dy, double dy_xhat) const {
    if (threadIdx.x != 0) return;
    if (dbias.data != nullptr) dbias.set(c, dy);
    if (dweight.data != nullptr) dweight.set(c, dy_xhat);
  }
};

// xhat = (x - center) * rstd + offset. What rounding the mean to the arithmetic type loses is put into the offset.
template <typename S>
struct Normalizer {
  S center, mean, rstd, offset;
  __device__ __forceinline__ S operator()(S x) const { return fma(x - center, rstd, offset); }
};

// Whether sums of d = x - center and of d * d over n elements tell the variance: squares may have left the range of the
// arithmetic type.
template <typename S>
__device__ __forceinline__ bool sound(double sum, double squares, int64_t n) {
  return std::isfinite(static_cast<S>(squares)) && (squares > 1e-28 * n || (squares == 0 && sum == 0));
}

template <typename S>
__device__ __forceinline__ Normalizer<S> normalizer(S center, double sum, double squares, int64_t n, double eps) {
  const double delta = sum / n, var = squares / n - delta * delta;
  const S rstd = S(1) / ::sqrt(static_cast<S>((var > 0 ? var : 0.0) + eps));
  return {center, static_cast<S>(center + delta), rstd, static_cast<S>(-delta * rstd)};
}

// Of the n elements at x, `step` apart, in double. For data of a kind that hardly occurs: every thread works for itself.
template <typename T, typename S = compute_t<T>>
__device__ __forceinline__ Normalizer<S> exact_normalizer(const T* x, int64_t n, int64_t step, double eps) {
  double mean = 0, squares = 0;
#pragma unroll 1
  for (int64_t j = 0; j < n; ++j) mean += static_cast<double>(static_cast<S>(x[j * step]));
  mean /= n;
#pragma unroll 1
  for (int64_t j = 0; j < n; ++j) {
    const double d = static_cast<double>(static_cast<S>(x[j * step])) - mean;
    squares = fma(d, d, squares);
  }
  const double rstd = 1.0 / ::sqrt(squares / n + eps);
  return {static_cast<S>(mean), static_cast<S>(mean), static_cast<S>(rstd), static_cast<S>(-lost_by_rounding<S>(mean) * rstd)};
}

// ---- rows and their groups --------------------------------------------------------------------------------------

// Elements of a row that a thread keeps, of each of kTensors tensors.
template <typename T, int kTensors>
constexpr int kHeld = kHeldBytes / sizeof(compute_t<T>) / kTensors;

struct RowGroups {
  int64_t rows, cols;
  int threads, block;  // of a row; of a block
  bool vector;         // whole aligned vectors

  // pointers: what is accessed, or null.
  template <typename T, int kTensors, typename... Pointers>
  static RowGroups cut(int64_t rows, int64_t cols, const Pointers*... pointers) {
    RowGroups c{.rows = rows, .cols = cols, .threads = kLeastGroup};
    c.vector = cols % kVector<T> == 0 && (aligned_to_vectors(pointers) && ...);
    while (c.threads < kMostGroup && int64_t{c.threads} * kHeld<T, kTensors> < cols) c.threads *= 2;
    c.block = c.threads > kWarp ? c.threads : kWarpsBlock;
    return c;
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(divup(rows, block / threads))); }
};

// Sums over the `threads` of a group; every one of them gets them.
template <int N>
__device__ __forceinline__ void group_sum(double (&v)[N], int threads) {
  if (threads > kWarp) return block_sum(v);
  for (int distance = threads / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] += __shfl_xor_sync(kAllLanes, v[k], distance);
}

// A thread's part of a row of kTensors tensors: vectors of V elements, a group's stretch apart.
template <typename T, int V, int kTensors>
struct RowPart {
  using S = compute_t<T>;
  static constexpr int kVectors = kHeld<T, kTensors> / V;
  using Values = S[kVectors][kTensors][V];

  const T* (&tensors)[kTensors];
  int64_t row, cols, offset;  // of the row's first element
  int first, step;
  bool active;
  Values held;

  __device__ RowPart(const RowGroups& cut, const T* (&tensors)[kTensors]) : tensors(tensors), cols(cut.cols) {
    row = static_cast<int64_t>(blockIdx.x) * (cut.block / cut.threads) + threadIdx.x / cut.threads;
    offset = row * cols;
    first = threadIdx.x % cut.threads * V, step = cut.threads * V;
    active = row < cut.rows;
    if (!active) cols = 0;
    read(first, held);
  }

  __device__ __forceinline__ void read(int64_t begin, Values& values) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (begin + u * step < cols)
#pragma unroll
        for (int t = 0; t < kTensors; ++t)
          gpu::load<false>(tensors[t] + offset + begin + u * step, Lanes{}, [](int) { return S(0); }, values[u][t]);
  }

  // f(column, values of a vector) for every vector; done() after those that a thread keeps, and as many each.
  template <typename F, typename Done>
  __device__ __forceinline__ void each(const F& f, const Done& done) const {
    const auto some = [&](int64_t begin, const Values& values) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u)
        if (begin + u * step < cols) f(begin + u * step, values[u]);
      done();
    };
    some(first, held);
    for (int64_t begin = first + kVectors * step; begin < cols; begin += kVectors * step) {
      Values values;
      read(begin, values);
      some(begin, values);
    }
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kMostGroup) ln_rows_fwd_kernel(LayerNormForward<T> p, RowGroups cut) {
  using S = compute_t<T>;
  const T* tensors[1] = {p.x};
  const RowPart<T, V, 1> mine(cut, tensors);
  double sum[1] = {0}, sums[2] = {0, 0};
  S s1 = 0, s2 = 0;
  mine.each(
      [&](int64_t, const S (&in)[1][V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) s1 += in[0][k];
      },
      [&] { sum[0] += s1, s1 = 0; });
  group_sum(sum, cut.threads);
  const S center = static_cast<S>(sum[0] / cut.cols);
  mine.each(
      [&](int64_t, const S (&in)[1][V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const S d = in[0][k] - center;
          s1 += d, s2 = fma(d, d, s2);
        }
      },
      [&] { sums[0] += s1, sums[1] += s2, s1 = s2 = 0; });
  group_sum(sums, cut.threads);
  if (!mine.active) return;
  const Normalizer<S> normalize = sound<S>(sums[0], sums[1], cut.cols)
                                      ? normalizer(center, sums[0], sums[1], cut.cols, p.eps)
                                      : exact_normalizer(p.x + mine.offset, cut.cols, 1, p.eps);
  if (mine.first == 0) p.mean[mine.row] = normalize.mean, p.rstd[mine.row] = normalize.rstd;
  mine.each(
      [&](int64_t at, const S (&in)[1][V]) {
        S weight[V], bias[V], out[V];
        p.weight.load(at, S(1), weight), p.bias.load(at, S(0), bias);
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = fma(normalize(in[0][k]), weight[k], bias[k]);
        store<false>(p.y + mine.offset + at, Lanes{}, out);
      },
      [] {});
}

// dx alone.
template <typename T, int V>
__global__ void __launch_bounds__(kMostGroup) ln_rows_bwd_kernel(LayerNormBackward<T> p, RowGroups cut) {
  using S = compute_t<T>;
  const T* tensors[2] = {p.dy, p.x};
  const RowPart<T, V, 2> mine(cut, tensors);
  const S mean = mine.active ? p.mean[mine.row] : S(0), rstd = mine.active ? p.rstd[mine.row] : S(0);
  double sums[2] = {0, 0};
  S s1 = 0, s2 = 0;
  mine.each(
      [&](int64_t at, const S (&in)[2][V]) {
        S weight[V];
        p.weight.load(at, S(1), weight);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const S g = in[0][k] * weight[k];
          s1 += g, s2 = fma(g, in[1][k] - mean, s2);
        }
      },
      [&] { sums[0] += s1, sums[1] += s2, s1 = s2 = 0; });
  group_sum(sums, cut.threads);
  const S level = static_cast<S>(sums[0] / cut.cols), slope = static_cast<S>(sums[1] / cut.cols * rstd);
  mine.each(
      [&](int64_t at, const S (&in)[2][V]) {
        S weight[V], out[V];
        p.weight.load(at, S(1), weight);
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = fma(-(in[1][k] - mean) * rstd, slope, fma(in[0][k], weight[k], -level)) * rstd;
        store<false>(p.dx + mine.offset + at, Lanes{}, out);
      },
      [] {});
}

// Sums of dy and dy * xhat over the rows of a strip. partial: (C, strips, 2).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) ln_columns_kernel(LayerNormBackward<T> p, RowCut cut, double* partial) {
  using S = compute_t<T>;
  GPU_DYN_SHARED(double, scratch);
  const RowPlace<V> place(cut, blockIdx.x);
  double wide[2 * V] = {};
  if (place.active) {
    S s1[V] = {}, s2[V] = {};
    int pending = 0;
    const auto flush = [&] {
#pragma unroll
      for (int k = 0; k < V; ++k) wide[k] += s1[k], wide[V + k] += s2[k], s1[k] = s2[k] = 0;
      pending = 0;
    };
    for_rows<V, kUnroll>(cut, place, [&](const auto& at, int64_t row) {
      constexpr int U = sizeof(at) / sizeof(at[0]);
      S dy[U][V], x[U][V], mean[U], rstd[U];
      const auto zero = [](int) { return S(0); };
#pragma unroll
      for (int u = 0; u < U; ++u) {
        load<false>(p.dy + at[u], Lanes{}, zero, dy[u]), load<false>(p.x + at[u], Lanes{}, zero, x[u]);
        mean[u] = p.mean[row + u * cut.thread_rows], rstd[u] = p.rstd[row + u * cut.thread_rows];
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int k = 0; k < V; ++k) s1[k] += dy[u][k], s2[k] = fma(dy[u][k], (x[u][k] - mean[u]) * rstd[u], s2[k]);
      if (++pending == kFlush) flush();
    });
    flush();
  }
  write_column_sums<V>(wide, cut, place, scratch, partial);
}

// ---- launches ---------------------------------------------------------------------------------------------------

template <typename T>
void layer_norm_forward(const LayerNormForward<T>& p, int64_t rows, int64_t cols, Stream stream) {
  const auto cut = RowGroups::cut<T, 1>(rows, cols, p.x, p.y, p.weight.data, p.bias.data);
  launch(cut.vector ? ln_rows_fwd_kernel<T, kVector<T>> : ln_rows_fwd_kernel<T, 1>, cut.grid(), dim3(cut.block), 0, stream, p, cut);
}

template <typename T>
Cut<T> layer_norm_columns(const LayerNormBackward<T>& p, int64_t rows, int64_t cols) {
  return Cut<T>(Layout{.rows = true, .N = rows, .C = cols, .HW = 1}, false, p.dy, p.x);
}

// workspace: layer_norm_columns(...).workspace() doubles, where gradients of parameters are wanted.
template <typename T>
void layer_norm_backward(const LayerNormBackward<T>& p, const LayerNormParameterGradients<T>& gradients, int64_t rows,
                         int64_t cols, double* workspace, Stream stream) {
  constexpr int V = kVector<T>;
  if (p.dx != nullptr) {
    const auto cut = RowGroups::cut<T, 2>(rows, cols, p.dy, p.x, p.dx, p.weight.data);
    launch(cut.vector ? ln_rows_bwd_kernel<T, V> : ln_rows_bwd_kernel<T, 1>, cut.grid(), dim3(cut.block), 0, stream, p, cut);
  }
  if (workspace == nullptr) return;
  const RowCut cut = layer_norm_columns(p, rows, cols).rows;
  launch(cut.vector ? ln_columns_kernel<T, V> : ln_columns_kernel<T, 1>, dim3(static_cast<unsigned>(cut.tiles * cut.strips)),
         dim3(kThreads), cut.scratch_bytes(cut.vector ? V : 1), stream, p, cut, workspace);
  launch(finish_kernel<LayerNormParameterGradients<T>>, dim3(static_cast<unsigned>(cols)), dim3(kFinishThreads), 0, stream,
         gradients, cut.strips, workspace);
}

}  // namespace cnnkern::gpu
