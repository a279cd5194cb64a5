// All that device code includes of CUDA. nvcc gets CUDA itself; any other compiler gets "gpu_emulator.h" from its
// include path, which has to supply the same names for the host: __global__, __device__, __host__, __forceinline__,
// __launch_bounds__; dim3, threadIdx, blockIdx, blockDim, gridDim; __syncthreads, __syncwarp, __shfl_xor_sync,
// __threadfence, atomicAdd, uint4; and what stands in the first branch below. A kernel is started by gpu::launch, never by
// <<<>>>, and never waits for another block.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__

#include <cuda_runtime.h>

// T name[count] in the block's shared memory; T has no constructor.
#define GPU_SHARED(T, name, count) __shared__ T name[count]
// T* name: the shared memory whose size the launch gives.
#define GPU_DYN_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char gpu_dynamic_shared[];   \
  T* const name = reinterpret_cast<T*>(gpu_dynamic_shared)

namespace cnnkern::gpu {

using Stream = cudaStream_t;

// Errors of the launch are left for cudaGetLastError. shared is at most the 48 KB that need no opt-in.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  kernel<<<grid, block, shared, stream>>>(arguments...);
}

}  // namespace cnnkern::gpu

#else
#include "gpu_emulator.h"
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace cnnkern::gpu {

// What elements of type T are computed in.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of the widest access that a thread makes: 16 bytes.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

inline bool aligned_to_vectors(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Elements [first, last) of a vector exist; `aligned` if a vector that exists as a whole may be accessed as one.
struct Lanes {
  int first, last;
  bool aligned;
};

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T lane[N];
};

// One access of 16 or 8 bytes, or of one element.
template <typename V>
using access_t = std::conditional_t<sizeof(V) == 16, uint4, std::conditional_t<sizeof(V) == 8, uint2, V>>;

// Has what will be read at p fetched into L2, and waits for nothing.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

template <typename V>
__device__ __forceinline__ void store_access(V* p, V v) {
#ifdef __CUDA_ARCH__
  // A plain store of a uint4 is split in four where nvcc cannot tell that several of them do not overlap; a uint2 in two.
  if constexpr (sizeof(V) == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  else if constexpr (sizeof(V) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
  else
#endif
    *p = v;
}

// The elements of a vector at p, widened. In a ragged place those that do not exist become fill(lane), and are not read.
template <bool kRagged, typename T, int N, typename Fill>
__device__ __forceinline__ void load(const T* p, Lanes lanes, const Fill& fill, compute_t<T> (&out)[N]) {
  if (!kRagged || (lanes.aligned && lanes.first == 0 && lanes.last == N)) {
    Vector<T, N> vector;
    const auto raw = *reinterpret_cast<const access_t<Vector<T, N>>*>(p);
    memcpy(&vector, &raw, sizeof(vector));
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = static_cast<compute_t<T>>(vector.lane[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      out[k] = k >= lanes.first && k < lanes.last ? static_cast<compute_t<T>>(p[k]) : fill(k);
  }
}

// The counterpart of load: rounds to nearest even, writes the elements that exist.
template <bool kRagged, typename T, int N>
__device__ __forceinline__ void store(T* p, Lanes lanes, const compute_t<T> (&in)[N]) {
  if (!kRagged || (lanes.aligned && lanes.first == 0 && lanes.last == N)) {
    Vector<T, N> vector;
#pragma unroll
    for (int k = 0; k < N; ++k) vector.lane[k] = static_cast<T>(in[k]);
    access_t<Vector<T, N>> raw;
    memcpy(&raw, &vector, sizeof(vector));
    store_access(reinterpret_cast<access_t<Vector<T, N>>*>(p), raw);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k >= lanes.first && k < lanes.last) p[k] = static_cast<T>(in[k]);
  }
}

__device__ __forceinline__ float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ __forceinline__ double fma(double a, double b, double c) { return ::fma(a, b, c); }

}  // namespace cnnkern::gpu
