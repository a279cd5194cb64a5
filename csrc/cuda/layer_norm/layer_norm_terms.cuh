// What the layer-norm kernels share: their arguments, the statistics of a row or a pixel, and the last step of the
// gradients of parameters.
#pragma once

#include "cuda/channels.cuh"
#include "cuda/reduce.cuh"

namespace cnnkern::gpu {

// Threads that run at once where 132 multiprocessors hold 512 each. How a tensor is cut depends only on its shape, so
// that results do not depend on the GPU.
constexpr int64_t kResidentThreads = 132 * 512;

// A parameter, dense, of type T or float; absent if data is null.
template <typename T>
struct ParameterVector {
  const void* data;
  bool is_float;

  __device__ __forceinline__ void prefetch(int64_t at) const {
    if (data != nullptr) gpu::prefetch(static_cast<const char*>(data) + at * static_cast<int>(is_float ? sizeof(float) : sizeof(T)));
  }

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

// X, here and below: the type of x and dx, which has 16 bits where y and dy are float32, and is T else. Then x is cut as if it
// were float32 and widened as it is read, so that the arithmetic is that of float32, bit for bit.
template <typename X, typename T>
struct LayerNormForward {
  using S = compute_t<T>;
  const X* x;
  T* y;
  S *mean, *rstd;
  ParameterVector<T> weight, bias;
  double eps;
};

template <typename X, typename T>
struct LayerNormBackward {
  using S = compute_t<T>;
  const T* dy;
  const X* x;
  X* dx;  // null if not needed
  const S *mean, *rstd;
  ParameterVector<T> weight;
};

template <typename T>
struct LayerNormParameterGradients {
  ChannelVector<T> dweight, dbias;
  __device__ __forceinline__ void set(int64_t c, double dy, double dy_xhat) const {
    if (dbias.data != nullptr) dbias.set(c, dy);
    if (dweight.data != nullptr) dweight.set(c, dy_xhat);
  }
};

// ---- statistics -------------------------------------------------------------------------------------------------

// Moments of a set of elements: their mean, and the sum of squared differences from it.
struct Moments {
  double mean, squares;
};

// From the sums of d = x - center and of d * d over n elements.
template <typename S>
__device__ __forceinline__ Moments moments(S center, double sum, double squares, double per_element) {
  const double delta = sum * per_element, rest = squares - sum * delta;
  return {center + delta, rest < 0 ? 0.0 : rest};
}

// Whether those sums are valid: squares may have overflowed or underflowed the arithmetic type.
template <typename S>
__device__ __forceinline__ bool sound(double sum, double squares, double per_element) {
  return std::isfinite(static_cast<S>(squares)) && (squares * per_element > 1e-28 || (squares == 0 && sum == 0));
}

// xhat = (x - center) * rstd + offset. What rounding the mean to the arithmetic type loses is put into the offset.
template <typename S>
struct Normalizer {
  S center, rstd, offset;
  __device__ __forceinline__ S operator()(S x) const { return fma(x - center, rstd, offset); }
};

template <typename S>
__device__ __forceinline__ Normalizer<S> normalizer(const Moments& m, double per_element, double eps) {
  const double var = fma(m.squares, per_element, eps);
  const S narrow = static_cast<S>(var);
  S rstd = S(1) / ::sqrt(narrow);
  if (!(narrow > S(1e-30) && std::isfinite(narrow))) rstd = static_cast<S>(1.0 / ::sqrt(var));
  return {static_cast<S>(m.mean), rstd, static_cast<S>(-lost_by_rounding<S>(m.mean) * rstd)};
}

// Statistics of n elements, `step` apart, in double, by one thread: for data that hardly ever occurs.
template <typename T, typename S = compute_t<T>>
__device__ __forceinline__ Moments exact_moments(const T* x, int64_t n, int64_t step) {
  Moments m{0, 0};
#pragma unroll 1
  for (int64_t j = 0; j < n; ++j) m.mean += static_cast<double>(static_cast<S>(x[j * step]));
  m.mean /= n;
#pragma unroll 1
  for (int64_t j = 0; j < n; ++j) {
    const double d = static_cast<double>(static_cast<S>(x[j * step])) - m.mean;
    m.squares = fma(d, d, m.squares);
  }
  return m;
}

// The terms of backward that are common to a row or pixel: dx = rstd * (g - level - xhat * slope).
template <typename S>
struct Means {
  S level, slope;
};

// ---- vectors in registers ---------------------------------------------------------------------------------------

// A vector as it is in memory: 16-bit types take half the registers of their values.
template <typename T, int V>
struct Packed {
  access_t<Vector<T, V>> raw;

  __device__ __forceinline__ void read(const T* p) { raw = *reinterpret_cast<const access_t<Vector<T, V>>*>(p); }
  __device__ __forceinline__ void values(compute_t<T> (&out)[V]) const {
    Vector<T, V> vector;
    memcpy(&vector, &raw, sizeof(vector));
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = static_cast<compute_t<T>>(vector.lane[k]);
  }
};

// V values of the arithmetic type, in accesses of at most 16 bytes.
template <int V, typename S>
__device__ __forceinline__ void load_values(const S* p, S (&out)[V]) {
  constexpr int N = V < kVector<S> ? V : kVector<S>;
#pragma unroll
  for (int k = 0; k < V; k += N) {
    S part[N];
    load<false>(p + k, Lanes{}, [](int) { return S(0); }, part);
#pragma unroll
    for (int j = 0; j < N; ++j) out[k + j] = part[j];
  }
}

template <int V, typename S>
__device__ __forceinline__ void store_values(S* p, const S (&in)[V]) {
  constexpr int N = V < kVector<S> ? V : kVector<S>;
#pragma unroll
  for (int k = 0; k < V; k += N) {
    S part[N];
#pragma unroll
    for (int j = 0; j < N; ++j) part[j] = in[k + j];
    store<false>(p + k, Lanes{}, part);
  }
}

// ---- gradients of parameters ------------------------------------------------------------------------------------

constexpr int kFinishBlock = 1024;

// Adds the partial sums of dy and of dy * xhat; a block has those of `columns` columns, the threads of one add side by
// side. partial: (parts, 2, cols).
template <typename T>
__global__ void __launch_bounds__(kFinishBlock) ln_finish_kernel(LayerNormParameterGradients<T> gradients,
                                                                const compute_t<T>* partial, int64_t parts, int64_t cols,
                                                                int columns) {
  GPU_SHARED(double, scratch, 2 * (kFinishBlock / 2));
  const int column = threadIdx.x % columns, row = threadIdx.x / columns, rows = blockDim.x / columns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * columns + column;
  double sums[2] = {0, 0};
  if (c < cols) {
    const compute_t<T>* at = partial + 2 * cols * row + c;
#pragma unroll 4
    for (int64_t i = row; i < parts; i += rows, at += 2 * cols * rows) sums[0] += at[0], sums[1] += at[cols];
  }
  column_sum(sums, row, rows, column, columns, scratch);
  if (row == 0 && c < cols) gradients.set(c, sums[0], sums[1]);
}

template <typename T>
void layer_norm_finish(const LayerNormParameterGradients<T>& gradients, const compute_t<T>* partial, int64_t parts, int64_t cols,
                       Stream stream) {
  const int columns = cols >= 132 * kWarp ? kWarp : 8;  // 8 are a sector of floats
  int rows = 1;
  while (rows * columns < kFinishBlock && rows < parts) rows *= 2;
  launch(ln_finish_kernel<T>, dim3(static_cast<unsigned>(divup(cols, columns))), dim3(rows * columns), 0, stream, gradients, partial,
         parts, cols, columns);
}

}  // namespace cnnkern::gpu
