// All that device code includes of CUDA. nvcc gets CUDA itself; any other compiler gets "gpu_emulator.h" from its
// include path, which has to supply the same names for the host: __global__, __device__, __host__, __forceinline__,
// __launch_bounds__; dim3, threadIdx, blockIdx, blockDim, gridDim; __syncthreads, __syncwarp, __shfl_xor_sync,
// __threadfence, atomicAdd, uint4; and what stands in the first branch below. A kernel is started by gpu::launch, never by
// <<<>>>; it waits for other blocks in group_barrier alone, and only if launch_together has started it.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

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

constexpr size_t kSharedWithoutAsking = 48 << 10;  // bytes of dynamic shared memory; beyond it a kernel has to opt in

template <typename... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t shared) {
  if (shared > kSharedWithoutAsking) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

// cudaGetLastError returns errors of the launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  allow_shared(kernel, shared);
  kernel<<<grid, block, shared, stream>>>(arguments...);
}

// Whether wait_for_previous is in what the current device runs of a kernel: it was compiled for sm_90 or later. All kernels of
// a file are compiled for the same GPUs, so one answers for those that take the same arguments.
template <typename... Parameters>
bool can_wait_for_previous(void (*kernel)(Parameters...)) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not yet
  int device = 0;
  cudaGetDevice(&device);
  signed char answer = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (answer == 0) {
    cudaFuncAttributes attributes;
    answer = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 ? 1 : -1;
    if (device < kDevices) known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

// As launch, of a kernel that reads what the one before it on this stream writes: it may be started while that one ends, which
// takes some microseconds off. It begins with wait_for_previous.
template <typename... Parameters, typename... Arguments>
void launch_next(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  if (!can_wait_for_previous(kernel)) return launch(kernel, grid, block, shared, stream, arguments...);
  allow_shared(kernel, shared);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// After it, everything that the previous kernel has written is visible. The first statement of a kernel that launch_next starts.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel, if launch_next starts it, may be started once all blocks have come here.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Blocks of a kernel that the current device runs at once; 0 where it cannot run one, or cannot start them together.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared) {
  int device = 0, processors = 0, most = 0, together = 0, each = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device);
  if (together == 0 || shared > static_cast<size_t>(most)) return 0;
  allow_shared(kernel, shared);
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared) != cudaSuccess) return 0;
  return each * processors;
}

// As launch, with all blocks on the device at once, so that they may wait for one another. The caller has seen to it
// that they fit (resident_blocks); else the launch is an error.
template <typename... Parameters, typename... Arguments>
void launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  allow_shared(kernel, shared);
  std::tuple<Parameters...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared, stream);
      },
      values);
}

// Copies 16 bytes to shared memory while the thread goes on; zeros where `exists` is false, and global is not read then.
// Both addresses are multiples of 16. Who copied sees them after async_wait, the block after a barrier after that.
__device__ __forceinline__ void async_copy(void* shared, const void* global, bool exists = true) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
}
// The copies that a thread has started since the last commit become a group.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kLeft youngest groups of the thread are under way.
template <int kLeft>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// A barrier for the blocks of a group: after it all see what each wrote before it. counter: only of this group, zero when the
// kernel begins; turn: the number of earlier barriers of this counter. Every thread of each block calls it.
__device__ __forceinline__ void group_barrier(unsigned* counter, unsigned blocks, unsigned turn) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned seen;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(__cvta_generic_to_global(counter)) : "memory");
    } while (seen < blocks * (turn + 1));
  }
  __syncthreads();
}

// Operands of tensor cores, in registers as PTX lays them out over a warp (mma.m16n8k8, mma.m16n8k16, ldmatrix).
// All lanes of the warp call these together.

// kMatrices 8x8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i, multiples of
// 16 in shared memory (with fewer than four matrices the other lanes' are ignored). kTransposed: each is transposed.
template <int kMatrices, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(unsigned (&r)[kMatrices], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else if constexpr (kMatrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else if constexpr (kMatrices == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  else if constexpr (kMatrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  else if constexpr (!kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

// d += a b, in float: a is 16 x 8 (two registers) or 16 x 16 (four), b 8 or 16 by 8. T: c10::BFloat16 or c10::Half. Or float, in
// TF32: a 16 x 8 (four registers), b 8 x 8 (two), as to_tf32 gives them.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, float>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ unsigned to_tf32(float v) {  // to nearest, ties away from zero
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

}  // namespace cnnkern::gpu

#else
#include "gpu_emulator.h"
#endif

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

// Prefetches the line at p into L2, without waiting.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

// Keeps v in a register, where nvcc would compute it again at each use.
__device__ __forceinline__ void hold([[maybe_unused]] float& v) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(v));
#endif
}

// exp(v), and a / b, by the device's approximations.
__host__ __device__ __forceinline__ float approximate_exp(float v) {
#ifdef __CUDA_ARCH__
  return __expf(v);
#else
  return ::expf(v);
#endif
}
__host__ __device__ __forceinline__ float approximate_quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
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
