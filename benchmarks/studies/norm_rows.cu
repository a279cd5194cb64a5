// What the parts of a batch norm + ReLU take on a GPU, in channels_last and bfloat16: sums, their end, the map; and all of a
// pass, as an operator launches it. Captured as a CUDA graph of 24 calls on memory that no cache holds; medians of seven.
//
//   nvcc -std=c++20 -O3 --fmad=false -arch=sm_90 --cudart static -Icsrc -I$TORCH/include -I$CUDA_HOME/include/cccl
//     benchmarks/studies/norm_rows.cu -o norm_rows
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/batch_norm/bn_act.cuh"

namespace {

using namespace cnnkern;
using namespace cnnkern::gpu;
using T = c10::BFloat16;

#define CHECK(call)                                                                              \
  do {                                                                                           \
    if (const cudaError_t error = (call); error != cudaSuccess) {                                \
      std::printf("%s: %s, line %d\n", #call, cudaGetErrorString(error), __LINE__);              \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

constexpr int64_t kBytes = int64_t{3} << 30;  // of each tensor of tensors
constexpr int kCalls = 24;

__global__ void draw(unsigned short* p, int64_t n, unsigned seed) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
    p[i] = __float_as_uint(((h & 0xffff) + (h >> 16)) / 32768.f - 1.7f) >> 16;
  }
}

// Microseconds of call(k, stream).
template <typename F>
float microseconds(const F& call) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int k = 0; k < kCalls; ++k) call(k, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&ready, graph, 0ull));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 8; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(ready, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) times.push_back(ms * 1e3f / kCalls);
  }
  CHECK(cudaGraphExecDestroy(ready));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename A>
A* allocate(int64_t bytes) {
  void* p;
  CHECK(cudaMalloc(&p, bytes));
  CHECK(cudaMemset(p, 0, bytes));
  return static_cast<A*>(p);
}

}  // namespace

int main() {
  T *x = allocate<T>(kBytes), *y = allocate<T>(kBytes), *dy = allocate<T>(kBytes);
  double *mean = allocate<double>(1 << 16), *rstd = allocate<double>(1 << 16), *work = allocate<double>(64 << 20);
  float* vectors[7];
  for (float*& v : vectors) v = allocate<float>(1 << 16);
  auto [weight, bias, running_mean, running_var, dweight, dbias, coefficients] = vectors;
  draw<<<2048, 256>>>(reinterpret_cast<unsigned short*>(x), kBytes / 2, 1);
  draw<<<2048, 256>>>(reinterpret_cast<unsigned short*>(dy), kBytes / 2, 77);
  CHECK(cudaDeviceSynchronize());
  const struct {
    int64_t N, C, HW;
  } shapes[] = {{256, 64, 12544}, {256, 256, 3136}, {256, 512, 784}, {256, 128, 784}, {128, 512, 784}, {128, 1024, 196},
                {128, 256, 196},  {128, 128, 196},  {128, 2048, 49}, {128, 512, 49},  {128, 144, 3136}, {128, 24, 3136}};
  std::printf("us (TB/s)               MB | sums  end  map  forward | sums  end  map  backward\n");
  for (const auto& s : shapes) {
    const Layout layout{true, s.N, s.C, s.HW};
    const int64_t n = s.N * s.C * s.HW, slots = kBytes / 2 / n;
    const Cut<T> cut(layout, true, x, y);
    const Partial partial{work, cut.sums.C, cut.sums.strips};
    const auto forward = [&](int k) {
      const int64_t at = k % slots * n;
      return BnActForward<T, Relu>{{{.x = x + at, .mean = mean, .rstd = rstd, .view = ChannelView(layout), .running_mean = {running_mean, 1, true},
                                     .running_var = {running_var, 1, true}, .momentum = 0.1, .eps = 1e-5},
                                    y + at, {{weight, 1, true}, {bias, 1, true}}, true}, {}};
    };
    const auto backward = [&](int k) {
      const int64_t at = k % slots * n;
      return BatchNormBackward<T, ThroughActivation<T, Relu>, true>{
          .dy = dy + at, .x = x + at, .dx = y + at, .dresidual = nullptr, .mean = mean, .rstd = rstd, .count = s.N * s.HW,
          .parameters = {{weight, 1, true}, {bias, 1, true}}, .dweight = {dweight, 1, true}, .dbias = {dbias, 1, true},
          .coefficients = coefficients, .gate = {}};
    };
    const double mb = 2e-6 * n;
    std::printf("%3lldx%4lldx%5lld %8.0f", static_cast<long long>(s.N), static_cast<long long>(s.C), static_cast<long long>(s.HW), mb);
    const auto parts = [&](const auto& policy, int reads, int mapped) {
      using P = decltype(policy(0));
      using R = typename P::Reduction;
      const size_t shared = sizeof(float) * 2 * cut.sums.columns * kVector<T> * cut.sums.thread_rows;
      const float sums = microseconds([&](int k, cudaStream_t stream) {
        launch(reduce_rows_kernel<R, kVector<T>>, dim3(cut.sums.tiles * cut.sums.strips), dim3(kThreads), shared, stream,
               static_cast<const R&>(policy(k)), cut.sums, partial);
      });
      const float end = microseconds([&](int k, cudaStream_t stream) {
        launch(finish_kernel<R>, dim3(s.C), dim3(kFinishThreads), 0, stream, static_cast<const R&>(policy(k)), partial);
      });
      const float map = microseconds([&](int k, cudaStream_t stream) { gpu::map(policy(k), cut, stream); });
      const float all = microseconds([&](int k, cudaStream_t stream) { reduce_and_map(policy(k), cut, work, stream); });
      std::printf(" | %6.1f (%.2f) %4.1f %6.1f (%.2f) %6.1f", sums, reads * mb / sums, end, map, mapped * mb / map, all);
    };
    parts(forward, 1, 2);
    parts(backward, 2, 3);
    std::printf("\n");
    std::fflush(stdout);
  }
  return 0;
}
