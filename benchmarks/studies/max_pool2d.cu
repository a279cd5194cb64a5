// Max pooling by itself: the kernels of csrc/cuda/max_pool2d.cuh in bfloat16 on the images of a ResNet's stem, batch 128.
//   nvcc -std=c++20 -O3 --fmad=false -gencode=arch=compute_90a,code=sm_90a --cudart static -Icsrc -I<torch>/include benchmarks/studies/max_pool2d.cu
// Checks small shapes against loops on the host, then prints the median of 15 calls, each on tensors that are not in the
// second-level cache. TB/s are those of the least bytes: x, y and a byte per output, or dy, that byte and dx.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda/max_pool2d.cuh"

namespace {

using namespace cnnkern::gpu;
using cnnkern::PoolGeometry;
using T = c10::BFloat16;

constexpr size_t kCold = size_t{512} << 20;  // bytes between a tensor's uses, ten times the second-level cache
constexpr int kRounds = 15;

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Device {
  char* data = nullptr;
  explicit Device(size_t bytes) { must(cudaMalloc(&data, bytes), "cudaMalloc"); }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
};

struct Layer {
  int64_t N, C, H, W;
  int kernel, stride, padding;
  bool rows;
  PoolGeometry geometry() const {
    const auto size = [&](int64_t n) { return (n + 2 * padding - kernel) / stride + 1; };
    return {rows ? N : N * C, rows ? C : 1, H, W, size(H), size(W), kernel, kernel, stride, stride, padding, padding};
  }
  void print() const {
    std::printf("%4ldx%3ldx%3ldx%3ld k%d s%d p%d %-13s", long(N), long(C), long(H), long(W), kernel, stride, padding, rows ? "channels_last" : "contiguous");
  }
};

struct Tensors {  // x and dx, y and dy
  T *x, *y;
  uint8_t* positions;
};

size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

Tensors tensors_at(const PoolGeometry& g, char* p) {
  const size_t x = round_up(g.N * g.C * g.H * g.W * sizeof(T)), y = round_up(g.N * g.C * g.OH * g.OW * sizeof(T));
  return {reinterpret_cast<T*>(p), reinterpret_cast<T*>(p + x), reinterpret_cast<uint8_t*>(p + x + y)};
}

size_t bytes_of(const PoolGeometry& g) {
  const size_t y = g.N * g.C * g.OH * g.OW;
  return round_up(g.N * g.C * g.H * g.W * sizeof(T)) + round_up(y * sizeof(T)) + round_up(y);
}

__global__ void fill_kernel(T* p, size_t count, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, h ^= h >> 16;
    p[i] = static_cast<T>(static_cast<float>(h >> 26) / 32 - 1);  // of 64 values, so that many are equal
  }
}

// ---- correctness ----

template <typename V>
std::vector<V> from_device(const V* p, size_t count) {
  std::vector<V> values(count);
  must(cudaMemcpy(values.data(), p, count * sizeof(V), cudaMemcpyDeviceToHost), "copy");
  return values;
}

void check(const Device& memory, const Layer& layer) {
  const PoolGeometry g = layer.geometry();
  const size_t nx = g.N * g.C * g.H * g.W, ny = g.N * g.C * g.OH * g.OW;
  const Tensors t = tensors_at(g, memory.data), grads = tensors_at(g, memory.data + round_up(bytes_of(g)));
  fill_kernel<<<64, 256>>>(t.x, nx, 1);
  fill_kernel<<<64, 256>>>(grads.y, ny, 2);
  max_pool2d_forward(g, t.x, t.y, t.positions, nullptr);
  max_pool2d_backward(g, grads.y, t.positions, grads.x, nullptr);
  must(cudaDeviceSynchronize(), "kernel");
  must(cudaGetLastError(), "launch");
  const auto x = from_device(t.x, nx), y = from_device(t.y, ny), dy = from_device(grads.y, ny), dx = from_device(grads.x, nx);
  const auto positions = from_device(t.positions, ny);
  std::vector<float> gradient(nx);
  size_t wrong_y = 0, wrong_position = 0, wrong_dx = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(ny); ++i) {
    const int64_t c = i % g.C, ow = i / g.C % g.OW, oh = i / g.C / g.OW % g.OH, n = i / g.C / g.OW / g.OH;
    float largest = -INFINITY;
    int64_t place = -1, from = -1;
    for (int tap = 0; tap < g.kh * g.kw; ++tap) {
      const int64_t h = oh * g.sh - g.ph + tap / g.kw, w = ow * g.sw - g.pw + tap % g.kw;
      if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
      const int64_t at = ((n * g.H + h) * g.W + w) * g.C + c;
      if (place < 0 || static_cast<float>(x[at]) > largest) largest = x[at], place = tap, from = at;
    }
    wrong_y += static_cast<float>(y[i]) != largest, wrong_position += positions[i] != place, gradient[from] += dy[i];
  }
  for (size_t i = 0; i < nx; ++i) wrong_dx += static_cast<float>(dx[i]) != static_cast<float>(static_cast<T>(gradient[i]));
  std::printf("%s  ", wrong_y + wrong_position + wrong_dx == 0 ? "right" : "WRONG");
  layer.print();
  std::printf(": %zu y, %zu positions and %zu dx differ\n", wrong_y, wrong_position, wrong_dx);
}

// ---- clocks ----

// Microseconds of a call, median and least; `call` gets the number of the tensors to use.
template <typename Call>
std::pair<float, float> timed(int copies, const Call& call) {
  cudaEvent_t events[2 * kRounds];
  for (auto& event : events) must(cudaEventCreate(&event), "event");
  for (int i = 0; i < 3; ++i) call(i % copies);
  for (int i = 0; i < kRounds; ++i) {
    cudaEventRecord(events[2 * i]);
    call((i + 3) % copies);
    cudaEventRecord(events[2 * i + 1]);
  }
  must(cudaDeviceSynchronize(), "kernel");
  must(cudaGetLastError(), "launch");
  std::vector<float> us(kRounds);
  for (int i = 0; i < kRounds; ++i) cudaEventElapsedTime(&us[i], events[2 * i], events[2 * i + 1]), us[i] *= 1000;
  for (auto& event : events) cudaEventDestroy(event);
  std::sort(us.begin(), us.end());
  return {us[kRounds / 2], us[0]};
}

void time(const Device& memory, const Layer& layer) {
  const PoolGeometry g = layer.geometry();
  const size_t nx = g.N * g.C * g.H * g.W, ny = g.N * g.C * g.OH * g.OW, each = round_up(bytes_of(g));
  const int copies = static_cast<int>(kCold / each + 1);
  const auto tensors = [&](int i) { return tensors_at(g, memory.data + i * each); };
  for (int i = 0; i < copies; ++i) fill_kernel<<<1024, 256>>>(tensors(i).x, nx, i);
  const auto report = [&](const char* what, std::pair<float, float> us) {
    layer.print();
    std::printf("  %-8s %8.1f us (least %7.1f) %5.2f TB/s\n", what, us.first, us.second, (nx * sizeof(T) + ny * (sizeof(T) + 1)) / us.first / 1e6);
    std::fflush(stdout);
  };
  report("forward", timed(copies, [&](int i) { max_pool2d_forward(g, tensors(i).x, tensors(i).y, tensors(i).positions, nullptr); }));
  report("backward", timed(copies, [&](int i) { max_pool2d_backward(g, tensors(i).y, tensors(i).positions, tensors(i).x, nullptr); }));
}

}  // namespace

int main() {
  const Device memory(kCold + (size_t{700} << 20));
  for (const bool rows : {true, false}) {
    check(memory, {3, 64, 17, 22, 3, 2, 1, rows});
    check(memory, {3, 64, 16, 30, 3, 2, 1, rows});
    check(memory, {2, 64, 23, 40, 3, 2, 0, rows});
    check(memory, {2, 24, 14, 14, 2, 2, 0, rows});
    check(memory, {2, 24, 15, 14, 2, 2, 1, rows});
    check(memory, {2, 5, 9, 11, 3, 2, 1, rows});
    check(memory, {2, 16, 13, 12, 5, 1, 2, rows});
    check(memory, {2, 16, 13, 12, 3, 1, 1, rows});
  }
  for (const bool rows : {true, false}) {
    time(memory, {128, 64, 112, 112, 3, 2, 1, rows});
    time(memory, {128, 64, 112, 112, 2, 2, 0, rows});
    time(memory, {128, 256, 28, 28, 3, 1, 1, rows});
  }
}
