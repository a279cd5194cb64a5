// add_relu: y = relu(x + residual). Backward: dx = dresidual = dy * [y > 0].
// [y > 0] is saved as one bit per element, in the order of memory, and nothing else.
// Memory traffic, in tensors read or written: 3 forward, 2 backward. A thread owns four vectors, a block's width apart. The lanes
// whose bits make up a word of the mask combine them by shuffles, and one of them writes the word.
#pragma once

#include "activations.h"
#include "cuda/bits.cuh"
#include "cuda/channels.cuh"
#include "cuda/reduce.cuh"

namespace cnnkern::gpu {

constexpr int kAddThreads = 256;
constexpr int kAddVectors = 4;  // of a thread

// The word of the mask that `bits`, V of them per lane, are part of; in every lane.
template <int V>
__device__ __forceinline__ unsigned joined_bits(unsigned bits, int lane) {
  constexpr int kLanes = 32 / V;
  unsigned word = bits << V * (lane % kLanes);
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) word |= __shfl_xor_sync(kAllLanes, word, distance);
  return word;
}

// Elements of a vector at `at` of a tensor of `numel`.
template <int V>
__device__ __forceinline__ Lanes lanes_of(int64_t at, int64_t numel) {
  return {0, static_cast<int>(larger(0, smaller(V, numel - at))), true};
}

template <bool kRagged, int V, typename T>
__device__ __forceinline__ void add_relu_block(const T* x, const T* residual, T* y, unsigned* mask, int64_t first, int64_t numel) {
  using S = compute_t<T>;
  constexpr int64_t kStep = kAddThreads * V;
  S a[kAddVectors][V], b[kAddVectors][V];
  const auto zero = [](int) { return S(0); };
#pragma unroll
  for (int u = 0; u < kAddVectors; ++u) {
    const int64_t at = first + u * kStep;
    load<kRagged>(x + at, lanes_of<V>(at, numel), zero, a[u]);
    load<kRagged>(residual + at, lanes_of<V>(at, numel), zero, b[u]);
  }
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int u = 0; u < kAddVectors; ++u) {
    const int64_t at = first + u * kStep;
    S out[V];
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const S sum = a[u][k] + b[u][k];
      out[k] = Relu::value<T>(sum);
      bits |= static_cast<unsigned>(sum > S(rounds_to_zero<T>())) << k;
    }
    store<kRagged>(y + at, lanes_of<V>(at, numel), out);
    const unsigned word = joined_bits<V>(bits, lane);
    if (lane % (32 / V) == 0 && (!kRagged || at < numel)) mask[at / 32] = word;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kAddThreads)
    add_relu_fwd_kernel(const T* x, const T* residual, T* y, unsigned* mask, int64_t numel) {
  constexpr int64_t kBlock = int64_t{kAddThreads} * V * kAddVectors;
  const int64_t first = blockIdx.x * kBlock + threadIdx.x * V;
  if ((blockIdx.x + 1) * kBlock <= numel)
    add_relu_block<false, V>(x, residual, y, mask, first, numel);
  else
    add_relu_block<true, V>(x, residual, y, mask, first, numel);
}

template <bool kRagged, int V, typename T>
__device__ __forceinline__ void add_relu_backward_block(const T* dy, BitReader mask, T* dx, int64_t first, int64_t numel) {
  using S = compute_t<T>;
  constexpr int64_t kStep = kAddThreads * V;
  S g[kAddVectors][V];
  unsigned bits[kAddVectors];
#pragma unroll
  for (int u = 0; u < kAddVectors; ++u) {
    const int64_t at = first + u * kStep;
    load<kRagged>(dy + at, lanes_of<V>(at, numel), [](int) { return S(0); }, g[u]);
    bits[u] = mask.get<kRagged, V>(at, lanes_of<V>(at, numel));
  }
#pragma unroll
  for (int u = 0; u < kAddVectors; ++u) {
    const int64_t at = first + u * kStep;
#pragma unroll
    for (int k = 0; k < V; ++k) g[u][k] = bits[u] >> k & 1 ? g[u][k] : S(0);
    store<kRagged>(dx + at, lanes_of<V>(at, numel), g[u]);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kAddThreads) add_relu_bwd_kernel(const T* dy, BitReader mask, T* dx, int64_t numel) {
  constexpr int64_t kBlock = int64_t{kAddThreads} * V * kAddVectors;
  const int64_t first = blockIdx.x * kBlock + threadIdx.x * V;
  if ((blockIdx.x + 1) * kBlock <= numel)
    add_relu_backward_block<false, V>(dy, mask, dx, first, numel);
  else
    add_relu_backward_block<true, V>(dy, mask, dx, first, numel);
}

inline dim3 add_relu_grid(int64_t numel, int vector) {
  return dim3(static_cast<unsigned>(divup(numel, int64_t{kAddThreads} * vector * kAddVectors)));
}

// numel > 0; mask: a word for each 32 elements and for what is left over.
template <typename T>
void add_relu_forward(const T* x, const T* residual, T* y, unsigned* mask, int64_t numel, Stream stream) {
  constexpr int V = kVector<T>;
  const bool vectors = aligned_to_vectors(x) && aligned_to_vectors(residual) && aligned_to_vectors(y);
  launch(vectors ? add_relu_fwd_kernel<T, V> : add_relu_fwd_kernel<T, 1>, add_relu_grid(numel, vectors ? V : 1),
         dim3(kAddThreads), 0, stream, x, residual, y, mask, numel);
}

template <typename T>
void add_relu_backward(const T* dy, BitReader mask, T* dx, int64_t numel, Stream stream) {
  constexpr int V = kVector<T>;
  const bool vectors = aligned_to_vectors(dy) && aligned_to_vectors(dx);
  launch(vectors ? add_relu_bwd_kernel<T, V> : add_relu_bwd_kernel<T, 1>, add_relu_grid(numel, vectors ? V : 1),
         dim3(kAddThreads), 0, stream, dy, mask, dx, numel);
}

}  // namespace cnnkern::gpu
