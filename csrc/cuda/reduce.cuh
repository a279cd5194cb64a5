// Sums over the threads of a warp or a block. The order of additions is fixed, so results repeat bit for bit.
#pragma once

#include "cuda/gpu_compat.cuh"

namespace cnnkern::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the sum: two lanes that exchange values add the same two numbers, and addition commutes.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}

// N sums over a block of whole warps; every thread gets them.
template <int N>
__device__ __forceinline__ void block_sum(double (&v)[N]) {
  GPU_SHARED(double, scratch, N * kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = warp_sum(v[k]);
  if (lane == 0)
    for (int k = 0; k < N; ++k) scratch[k * kWarp + warp] = v[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = warp_sum(lane < warps ? scratch[k * kWarp + lane] : 0.0);
  __syncthreads();  // the caller may call again immediately, and write scratch
}

// N sums down the columns of a block that is seen as (rows, columns) of threads; row 0 gets them. Threads of rows
// beyond `rows` only take part in barriers. scratch: N * (rows / 2) * columns doubles of shared memory.
template <int N>
__device__ __forceinline__ void column_sum(double (&v)[N], int row, int rows, int column, int columns, double* scratch) {
  while (rows > 1) {
    const int kept = (rows + 1) / 2, given = rows - kept;
    double* const cell = scratch + (row < kept ? row : row - kept) * columns + column;
    if (row >= kept && row < rows)
      for (int k = 0; k < N; ++k) cell[k * given * columns] = v[k];
    __syncthreads();
    if (row < given)
      for (int k = 0; k < N; ++k) v[k] += cell[k * given * columns];
    __syncthreads();
    rows = kept;
  }
}

}  // namespace cnnkern::gpu
