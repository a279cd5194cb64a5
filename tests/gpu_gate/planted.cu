// A kernel that keeps every threshold, and others that break one each. tests/test_gpu_gate.py demands that they are found.
#include <cstdint>

constexpr int kUnroll = 4;

template <typename F>
__device__ __forceinline__ void rounds(const uint4* x, uint4* y, int64_t n, const F& f) {
  const int64_t step = gridDim.x * static_cast<int64_t>(blockDim.x);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i + (kUnroll - 1) * step < n; i += kUnroll * step) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = x[i + u * step];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      v[u].x = f(v[u].x, i + u * step);
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(y + i + u * step), "r"(v[u].x), "r"(v[u].y), "r"(v[u].z), "r"(v[u].w)
                   : "memory");
    }
  }
}

__global__ void __launch_bounds__(256) sound_kernel(const uint4* x, uint4* y, int64_t n) {
  rounds(x, y, n, [](unsigned v, int64_t) { return v + 1; });
}

__global__ void __launch_bounds__(256) narrow_kernel(const float* x, float* y, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += 256) y[i] = x[i] + 1;
}

__global__ void __launch_bounds__(256) half_narrow_kernel(const uint4* x, uint4* y, const float* weight, int64_t n) {
  rounds(x, y, n, [=](unsigned v, int64_t i) { return v + static_cast<unsigned>(weight[i]); });
}

__global__ void __launch_bounds__(256) integer_division_kernel(const uint4* x, uint4* y, int64_t n, int64_t width) {
  rounds(x, y, n, [=](unsigned v, int64_t i) { return v + static_cast<unsigned>(i / width); });
}

__global__ void __launch_bounds__(256) division_kernel(const uint4* x, uint4* y, int64_t n, float by) {
  rounds(x, y, n, [=](unsigned v, int64_t i) { return __float_as_uint(by / __uint_as_float(v)); });
}

__global__ void __launch_bounds__(256) exponential_kernel(const uint4* x, uint4* y, int64_t n) {
  rounds(x, y, n, [](unsigned v, int64_t) { return __float_as_uint(__expf(__uint_as_float(v))); });
}

__global__ void __launch_bounds__(256) double_kernel(const uint4* x, uint4* y, int64_t n, double by) {
  rounds(x, y, n, [=](unsigned v, int64_t) { return __float_as_uint(static_cast<float>(__uint_as_float(v) * by)); });
}

__global__ void __launch_bounds__(256) atomic_kernel(const uint4* x, uint4* y, int64_t n, unsigned* count) {
  rounds(x, y, n, [=](unsigned v, int64_t i) { return atomicAdd(count + i % 64, v); });
}

__global__ void __launch_bounds__(256) spilling_kernel(const uint4* x, uint4* y, int64_t n, int places) {
  unsigned kept[64];
  for (int j = 0; j < 64; ++j) kept[j] = static_cast<unsigned>(j * n);
  rounds(x, y, n, [&](unsigned v, int64_t i) { return kept[v % 64] += static_cast<unsigned>(i); });
}

__global__ void __launch_bounds__(256) greedy_kernel(const uint4* x, uint4* y) {
  uint4 v[48];
#pragma unroll
  for (int u = 0; u < 48; ++u) v[u] = x[threadIdx.x + u * 256];
  __syncthreads();
#pragma unroll
  for (int u = 0; u < 48; ++u) y[threadIdx.x + u * 256] = v[u];
}

__global__ void __launch_bounds__(64) crowded_kernel(const uint4* x, uint4* y, int64_t n) {
  __shared__ unsigned kept[10 << 10];
  for (int j = threadIdx.x; j < 10 << 10; j += 64) kept[j] = j;
  __syncthreads();
  rounds(x, y, n, [&](unsigned v, int64_t) { return kept[v % (10 << 10)]; });
}
