// What a GPU takes for the parts of a batch norm that keeps a slab of its input in shared memory between its sums and its map:
// a barrier of a group of blocks, and all that is moved (load a slab, sum it, meet, store it), over the bytes of a slab's
// row, blocks and threads. docs/kernels.md has what came of it.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 --cudart static -Icsrc -I$TORCH/include -I$CUDA_HOME/include/cccl benchmarks/studies/slabs.cu -o slabs
#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>
#include "cuda/gpu_compat.cuh"
using namespace cnnkern::gpu;
#define CHECK(call) do { cudaError_t e = (call); if (e != cudaSuccess) { printf("%s: %s line %d\n", #call, cudaGetErrorString(e), __LINE__); exit(1); } } while (0)

__global__ void barriers(unsigned* counter, int turns, int group) {
  for (int t = 0; t < turns; ++t) group_barrier(counter + 64 * (blockIdx.x / group), group, t);
}

struct Slabs { int64_t rows; int row_bytes, width; int group; };  // width: bytes of a slab's row

__device__ float sum8(uint4 v) {
  float s = 0;
  const unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) { const float a = __uint_as_float(w[i] << 16), b = __uint_as_float(w[i] & 0xffff0000u); s += a * a + b * b + a + b; }
  return s;
}

// Each group takes slabs g, g + groups, ...; a block has its rows of it.
template <int kThreads, bool kSum>
__global__ void __launch_bounds__(kThreads) slab(const unsigned char* x, unsigned char* y, float* partial, unsigned* counters, Slabs s, int64_t block_rows) {
  GPU_DYN_SHARED(unsigned char, held);
  const int groups = gridDim.x / s.group, g = blockIdx.x / s.group, member = blockIdx.x % s.group, slabs = s.row_bytes / s.width;
  const int lanes = s.width / 16, row0 = threadIdx.x / lanes, lane = threadIdx.x % lanes, step = kThreads / lanes;
  const int64_t first = member * block_rows, end = min(s.rows, first + block_rows);
  unsigned turn = 0;
  for (int k = g; k < slabs; k += groups) {
    const unsigned char* from = x + static_cast<int64_t>(k) * s.width + lane * 16;
    unsigned char* to = y + static_cast<int64_t>(k) * s.width + lane * 16;
    const int64_t n = end - first;
    // four commit groups
    const int64_t quarter = (n + 4 * step - 1) / (4 * step) * step;
    for (int q = 0; q < 4; ++q) {
      for (int64_t r = q * quarter + row0; r < min(n, (q + 1) * quarter); r += step)
        async_copy(held + r * s.width + lane * 16, from + (first + r) * s.row_bytes);
      async_commit();
    }
    float total = 0;
    auto add = [&](int q) {
      if (kSum) for (int64_t r = q * quarter + row0; r < min(n, (q + 1) * quarter); r += step)
        total += sum8(*reinterpret_cast<const uint4*>(held + r * s.width + lane * 16));
    };
    async_wait<3>(); add(0); async_wait<2>(); add(1); async_wait<1>(); add(2); async_wait<0>(); add(3);
    if (threadIdx.x < 64) partial[(k * s.group + member) * 64 + threadIdx.x] = total;
    if (s.group > 1) group_barrier(counters + 64 * g, s.group, turn++);
    float shift = 0;
    for (int i = threadIdx.x / 32; i < s.group; i += kThreads / 32) shift += __ldcg(partial + (k * s.group + i) * 64 + threadIdx.x % 32);
    const unsigned bits = shift > 1e30f;
    for (int64_t r = row0; r < n; r += step) {
      uint4 v = *reinterpret_cast<const uint4*>(held + r * s.width + lane * 16);
      v.x ^= bits;
      store_access(reinterpret_cast<uint4*>(to + (first + r) * s.row_bytes), v);
    }
    __syncthreads();
  }
}

// today's way: read all, then read all and write
__global__ void __launch_bounds__(256) copy_kernel(const uint4* x, uint4* y, int64_t n) {
  for (int64_t i = blockIdx.x * 1024 + threadIdx.x; i < n; i += gridDim.x * 1024ll) {
    uint4 v[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) if (i + u * 256 < n) v[u] = x[i + u * 256];
#pragma unroll
    for (int u = 0; u < 4; ++u) if (i + u * 256 < n) store_access(y + i + u * 256, v[u]);
  }
}

float median_us(const std::function<void(int)>& f, int repeats = 9) {
  cudaEvent_t a, b; cudaEventCreate(&a); cudaEventCreate(&b);
  std::vector<float> t;
  for (int i = 0; i < repeats + 2; ++i) {
    cudaEventRecord(a); f(i); cudaEventRecord(b); cudaEventSynchronize(b);
    float ms; cudaEventElapsedTime(&ms, a, b); if (i >= 2) t.push_back(ms * 1e3f);
  }
  std::sort(t.begin(), t.end()); return t[t.size() / 2];
}

unsigned char *x, *y; float* partial; unsigned* counters; int64_t bytes = int64_t(1) << 31;

template <int kThreads, bool kSum>
void run(const char* name, int64_t rows, int row_bytes, int per_sm, int held_bytes, int sms) {
  for (int width : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
    if (width > row_bytes || width / 16 > kThreads) continue;
    const int64_t slab_bytes = rows * width;
    const int64_t at_least = (slab_bytes + held_bytes - 1) / held_bytes;
    if (at_least > int64_t(per_sm) * sms) continue;
    int group = std::max<int64_t>(1, at_least);
    const int fit = resident_blocks(slab<kThreads, kSum>, kThreads, held_bytes);
    if (group > fit) { printf("%s w%d group %d fit %d\n", name, width, group, fit); continue; }
    int groups = std::min(fit / group, row_bytes / width);
    if (groups < 1) continue;
    int64_t block_rows = (rows + group - 1) / group;
    Slabs s{rows, row_bytes, width, group};
    const int64_t tensor = rows * row_bytes, slots = std::max<int64_t>(1, bytes / tensor);
    const float us = median_us([&](int i) {
      cudaMemsetAsync(counters, 0, 64 * 4 * 1024);
      launch_together(slab<kThreads, kSum>, dim3(groups * group), dim3(kThreads), size_t(held_bytes), 0, (const unsigned char*)(x + (i % slots) * tensor), y + (i % slots) * tensor, partial, counters, s, block_rows);
    });
    CHECK(cudaGetLastError());
    printf("%-14s rows %7lld row %4d B width %4d group %3d x %3d thr %d held %3dK x%d sum %d: %7.1f us %5.0f GB/s\n", name, (long long)rows, row_bytes, width, group, groups, kThreads, held_bytes >> 10, per_sm, kSum, us, 2.0 * tensor / us / 1e3);
  }
}

int main() {
  cudaDeviceProp p; CHECK(cudaGetDeviceProperties(&p, 0));
  printf("%s, %d SMs, L2 %d MB\n", p.name, p.multiProcessorCount, p.l2CacheSize >> 20);
  CHECK(cudaMalloc(&x, bytes)); CHECK(cudaMalloc(&y, bytes)); CHECK(cudaMalloc(&partial, 64 << 20)); CHECK(cudaMalloc(&counters, 64 * 4 * 1024));
  CHECK(cudaMemset(x, 0x3c, bytes)); CHECK(cudaMemset(y, 0, bytes));
  const int sms = p.multiProcessorCount;
  for (int64_t n : {int64_t(25) << 20, int64_t(100) << 20, int64_t(400) << 20}) {
    const int64_t slots = bytes / n;
    const float us = median_us([&](int i) { copy_kernel<<<sms * 8, 256>>>((const uint4*)(x + (i % slots) * n), (uint4*)(y + (i % slots) * n), n / 16); });
    printf("copy %lld MB: %.1f us %.0f GB/s\n", (long long)(n >> 20), us, 2.0 * n / us / 1e3);
  }
  {
    const float us = median_us([&](int) { cudaMemsetAsync(counters, 0, 64 * 4 * 1024); }); printf("memset alone %.1f us\n", us);
    const float e = median_us([&](int) { launch(barriers, dim3(sms), dim3(256), 0, 0, counters, 0, 1); }); printf("empty kernel %.1f us\n", e);
    const float c = median_us([&](int) { launch_together(barriers, dim3(sms), dim3(256), 0, 0, counters, 0, 1); }); printf("empty cooperative kernel %.1f us\n", c);
  }
  for (int group : {2, 8, 33, 66, 132, 264}) for (int per : {1, 2}) {
    if (group > per * sms) continue;
    float us[2];
    for (int k = 0; k < 2; ++k) us[k] = median_us([&](int) { cudaMemsetAsync(counters, 0, 64 * 4 * 1024); launch_together(barriers, dim3(per * sms / group * group), dim3(256), 0, 0, counters, k ? 110 : 10, group); });
    CHECK(cudaGetLastError());
    printf("barrier of %d blocks, %d a multiprocessor: %.2f us\n", group, per, (us[1] - us[0]) / 100);
  }
  struct { const char* name; int64_t rows; int C; } shapes[] = {{"256x56 b64", 64 * 3136, 256}, {"256x56 b256", 256 * 3136, 256}, {"512x28 b256", 256 * 784, 512}, {"128x28 b64", 64 * 784, 128}, {"1024x14 b256", 256 * 196, 1024}, {"2048x7 b64", 64 * 49, 2048}, {"2048x7 b256", 256 * 49, 2048}, {"512x28 b128", 128 * 784, 512}};
  for (auto& s : shapes) {
    run<256, true>(s.name, s.rows, 2 * s.C, 2, 96 << 10, sms);
    run<512, true>(s.name, s.rows, 2 * s.C, 2, 96 << 10, sms);
    run<512, true>(s.name, s.rows, 2 * s.C, 2, 112 << 10, sms);
    run<1024, true>(s.name, s.rows, 2 * s.C, 1, 208 << 10, sms);
    run<256, true>(s.name, s.rows, 2 * s.C, 3, 72 << 10, sms);
    run<512, false>(s.name, s.rows, 2 * s.C, 2, 96 << 10, sms);
  }
  return 0;
}
