// Depthwise convolution in rows of channels: the kernels of csrc/cuda/conv/depthwise_ring.cuh beside those of depthwise_rows.cuh.
//   nvcc -std=c++20 -O3 --fmad=false -arch=sm_90a --cudart static -Icsrc -I<torch>/include benchmarks/studies/depthwise_ring.cu
// Checks both against sums in double, then times them in bfloat16 at batch 128: the median of 15 calls, each on tensors that
// are not in the second-level cache. GB/s are those of the least bytes; the percentage is of 3 TB/s.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "cuda/conv/depthwise_ring_sums.cuh"
#include "cuda/conv/depthwise_rows.cuh"

namespace {

using namespace cnnkern::gpu;
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
  int N, C, H, W, K, stride;
  ConvGeometry geometry() const {
    const int p = K / 2, OH = (H + 2 * p - K) / stride + 1, OW = (W + 2 * p - K) / stride + 1;
    return {.rows = true, .N = N, .C = C, .H = H, .W = W, .O = C, .OH = OH, .OW = OW, .groups = C, .kh = K, .kw = K,
            .sh = stride, .sw = stride, .ph = p, .pw = p, .dh = 1, .dw = 1};
  }
};

constexpr const T* kNoBias = nullptr;

struct Tensors {  // of a layer: x and dx, y and dy, and what the weight's gradient needs
  T *x, *y, *weight;
  float* partial;
  T* dweight;
};

// ---- what is timed: a name and a call ----

template <int K, int S, int kOutputs, int kDepth, int kBlocks>
void ring_forward(const ConvGeometry& g, const Tensors& t, bool gradient) {
  using M = RingConvolution<T, K, S, kOutputs>;
  if (gradient)
    launch_ring<M, kDepth, kBlocks>(g, {g.OH, g.OW, g.H, g.W, g.H, g.W, K - 1 - g.ph, K - 1 - g.pw, true}, t.y, t.weight, kNoBias, t.x, nullptr);
  else
    launch_ring<M, kDepth, kBlocks>(g, {g.H, g.W, g.OH, g.OW, g.OH, g.OW, g.ph, g.pw}, t.x, t.weight, kNoBias, t.y, nullptr);
}

template <int K, int kPairs, int kDepth, int kBlocks>
void ring_gradient(const ConvGeometry& g, const Tensors& t) {
  using M = RingGradient<T, K, kPairs>;
  const auto pairs = [](int64_t size, int p) { return (size - 1 + p) / 2 - p / 2 + 1; };
  launch_ring<M, kDepth, kBlocks>(g, {g.OH, g.OW, g.H, g.W, pairs(g.H, g.ph), pairs(g.W, g.pw), M::kLag - g.ph / 2, M::kLag - g.pw / 2, false,
                                      g.ph % 2, g.pw % 2}, t.y, t.weight, kNoBias, t.x, nullptr);
}

// kDepth 0: the kernel of rows.
template <int K, int S, int kDepth, int kBlocks>
void weight_gradient(const ConvGeometry& g, const Tensors& t) {
  const int64_t parts = kDepth > 0 ? ring_sum_cut<T, K, S, kBlocks>(g).parts() : RowSumCut(g, kSumChannels<T, K>).parts;
  const PartialSums<float> sums = {t.partial, parts, g.C, K * K, true};
  if constexpr (kDepth > 0)
    sum_depthwise_ring<T, K, S, kDepth, kBlocks>(g, t.y, t.x, sums, nullptr);
  else
    sum_depthwise_rows<T, K, S>(g, t.y, t.x, sums, nullptr);
  sum_parts(sums, WeightGradient<T>{t.dweight, nullptr, {K * K, K * K, K, 1}, K, K}, nullptr);
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

__global__ void fill_kernel(T* p, size_t count, unsigned seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, h ^= h >> 16;
    p[i] = static_cast<T>((static_cast<float>(h >> 8) / (1 << 23) - 1) * scale);
  }
}

class Bench {
 public:
  Bench() : memory_(kCold + (size_t{640} << 20)), weights_(1 << 20), partial_(size_t{256} << 20), dweight_(1 << 20) {
    fill(reinterpret_cast<T*>(memory_.data), (kCold + (size_t{640} << 20)) / sizeof(T), 1, 2);
    fill(reinterpret_cast<T*>(weights_.data), (1 << 20) / sizeof(T), 2, 0.3f);
  }

  template <typename Call>  // call(tensors)
  void time(const Layer& layer, const char* what, double passes_x, double passes_y, const Call& call) {
    const ConvGeometry g = layer.geometry();
    const size_t x = round(g.N * g.C * g.H * g.W * sizeof(T)), y = round(g.N * g.C * g.OH * g.OW * sizeof(T));
    const int copies = static_cast<int>(std::max<size_t>(2, (kCold + x + y - 1) / (x + y)));
    const auto tensors = [&](int i) { return at(i * (x + y), x); };
    const auto [median, least] = timed(copies, [&](int i) { call(g, tensors(i)); });
    const double bytes = passes_x * x + passes_y * y;
    std::printf("%4dx%3dx%3dx%3d k%d s%d  %-34s %8.1f us (least %7.1f) %7.0f GB/s %5.1f %%\n", layer.N, layer.C, layer.H, layer.W, layer.K,
                layer.stride, what, median, least, bytes / median / 1e3, bytes / median / 1e3 / 30);
    std::fflush(stdout);
  }

  Tensors at(size_t offset, size_t x) const {
    return {reinterpret_cast<T*>(memory_.data + offset), reinterpret_cast<T*>(memory_.data + offset + x), reinterpret_cast<T*>(weights_.data),
            reinterpret_cast<float*>(partial_.data), reinterpret_cast<T*>(dweight_.data)};
  }
  static size_t round(size_t bytes) { return (bytes + 255) / 256 * 256; }

 private:
  static void fill(T* p, size_t count, unsigned seed, float scale) { fill_kernel<<<1024, 256>>>(p, count, seed, scale); }
  Device memory_, weights_, partial_, dweight_;
};

// ---- correctness ----

// The largest error over 1 + the sum of magnitudes, of y, dx.
template <int K, int S>
void check(Bench& bench, const Layer& layer) {
  const ConvGeometry g = layer.geometry();
  const size_t nx = g.N * g.C * g.H * g.W, ny = g.N * g.C * g.OH * g.OW;
  const Tensors t = bench.at(0, Bench::round(nx * sizeof(T)));
  std::vector<T> x(nx), dy(ny), weight(g.C * K * K), y(ny), dx(nx);
  const auto get = [](std::vector<T>& to, const T* from) {
    must(cudaMemcpy(to.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy");
  };
  get(x, t.x), get(dy, t.y), get(weight, t.weight);
  const Tensors out = bench.at(Bench::round(nx * sizeof(T)) + Bench::round(ny * sizeof(T)), Bench::round(nx * sizeof(T)));
  convolve_depthwise_ring<T, K, S>(g, t.x, t.weight, kNoBias, out.y, false, nullptr);
  if constexpr (S == 1)
    convolve_depthwise_ring<T, K, 1>(g, t.y, t.weight, kNoBias, out.x, true, nullptr);
  else
    depthwise_ring_gradient_stride_2<T, K>(g, t.y, t.weight, out.x, nullptr);
  must(cudaDeviceSynchronize(), "kernel");
  must(cudaGetLastError(), "launch");
  get(y, out.y), get(dx, out.x);
  weight_gradient<K, S, kSumDepth<K>, kSumBlocks<T, K, S>>(g, t);
  std::vector<T> dweight(g.C * K * K);
  get(dweight, t.dweight);
  must(cudaGetLastError(), "launch");
  std::vector<double> gradient(nx), magnitude(nx), sums(g.C * K * K), sizes(g.C * K * K, 1);
  double worst_y = 0, worst_dx = 0, worst_dw = 0;
  const auto keep = [](double& worst, double error) { worst = error <= worst ? worst : error; };  // NaN too
  for (int64_t i = 0; i < static_cast<int64_t>(ny); ++i) {
    const int64_t c = i % g.C, ow = i / g.C % g.OW, oh = i / g.C / g.OW % g.OH, n = i / g.C / g.OW / g.OH;
    double sum = 0, size = 1;
    for (int tap = 0; tap < K * K; ++tap) {
      const int64_t h = oh * S - g.ph + tap / K, w = ow * S - g.pw + tap % K;
      if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
      const int64_t at = ((n * g.H + h) * g.W + w) * g.C + c;
      const double f = weight[c * K * K + tap], product = f * x[at];
      sum += product, size += std::fabs(product), gradient[at] += f * dy[i], magnitude[at] += std::fabs(f * dy[i]);
      const double of_tap = static_cast<double>(dy[i]) * x[at];
      sums[c * K * K + tap] += of_tap, sizes[c * K * K + tap] += std::fabs(of_tap);
    }
    keep(worst_y, std::fabs(y[i] - sum) / size);
  }
  for (size_t i = 0; i < nx; ++i) keep(worst_dx, std::fabs(dx[i] - gradient[i]) / (1 + magnitude[i]));
  for (size_t i = 0; i < dweight.size(); ++i) keep(worst_dw, std::fabs(dweight[i] - sums[i]) / sizes[i]);
  const bool right = worst_y < 0.004 && worst_dx < 0.004 && worst_dw < 0.004;
  std::printf("%s  %dx%dx%dx%d k%d s%d: y %.1e, dx %.1e, dweight %.1e\n", right ? "right" : "WRONG", layer.N, layer.C, layer.H, layer.W, K, S,
              worst_y, worst_dx, worst_dw);
}

// ---- the layers ----

template <int K, int S>
void rows_passes(Bench& bench, const Layer& layer) {
  bench.time(layer, "forward  rows (before)", 1, 1, [](const ConvGeometry& g, const Tensors& t) { convolve_depthwise_rows<T, K, S>(g, t.x, t.weight, kNoBias, t.y, false, nullptr); });
  bench.time(layer, "dx       rows (before)", 1, 1, [](const ConvGeometry& g, const Tensors& t) {
    if constexpr (S == 1)
      convolve_depthwise_rows<T, K, 1>(g, t.y, t.weight, kNoBias, t.x, true, nullptr);
    else
      depthwise_rows_gradient_stride_2<T, K>(g, t.y, t.weight, t.x, nullptr);
  });
  bench.time(layer, "dweight  rows (before)", 1, 1, weight_gradient<K, S, 0, 1>);
}

template <int K, int S, int kDepth, int kBlocks>
void sums_variant(Bench& bench, const Layer& layer) {
  char name[64];
  std::snprintf(name, sizeof(name), "dweight  ring %d rows x%d", kDepth, kBlocks);
  bench.time(layer, name, 1, 1, weight_gradient<K, S, kDepth, kBlocks>);
}

template <int K, int S, int kOutputs, int kDepth, int kBlocks>
void forward_variant(Bench& bench, const Layer& layer) {
  char name[64];
  std::snprintf(name, sizeof(name), "forward  ring %d columns %d rows x%d", kOutputs, kDepth, kBlocks);
  bench.time(layer, name, 1, 1, [](const ConvGeometry& g, const Tensors& t) { ring_forward<K, S, kOutputs, kDepth, kBlocks>(g, t, false); });
}

template <int K, int kPairs, int kDepth, int kBlocks>
void gradient_variant(Bench& bench, const Layer& layer) {
  char name[64];
  std::snprintf(name, sizeof(name), "dx       ring %d pairs %d rows x%d", kPairs, kDepth, kBlocks);
  bench.time(layer, name, 1, 1, [](const ConvGeometry& g, const Tensors& t) { ring_gradient<K, kPairs, kDepth, kBlocks>(g, t); });
}

template <int K, int S>
void passes(Bench& bench, const Layer& layer) {
  rows_passes<K, S>(bench, layer);
  if constexpr (K == 3) {
    forward_variant<K, S, 7, 3, 4>(bench, layer);
    forward_variant<K, S, 7, 4, 4>(bench, layer);
    forward_variant<K, S, 7, 6, 4>(bench, layer);
    forward_variant<K, S, 7, 4, 5>(bench, layer);
    forward_variant<K, S, 4, 4, 6>(bench, layer);
  } else if constexpr (K == 5) {
    forward_variant<K, S, 7, 3, 3>(bench, layer);
    forward_variant<K, S, 7, 4, 3>(bench, layer);
    forward_variant<K, S, 7, 6, 3>(bench, layer);
    forward_variant<K, S, 4, 4, 4>(bench, layer);
  } else {
    forward_variant<K, S, 7, 3, 2>(bench, layer);
    forward_variant<K, S, 7, 4, 2>(bench, layer);
    forward_variant<K, S, 7, 6, 2>(bench, layer);
    forward_variant<K, S, 4, 4, 2>(bench, layer);
    forward_variant<K, S, 2, 4, 3>(bench, layer);
  }
  constexpr int kBlocks = kSumBlocks<T, K, S>;
  sums_variant<K, S, 3, kBlocks>(bench, layer);
  sums_variant<K, S, 4, kBlocks>(bench, layer);
  sums_variant<K, S, 3, kBlocks == 2 ? 2 : kBlocks - 1>(bench, layer);
  if constexpr (S == 1)
    bench.time(layer, "dx       ring", 1, 1, [](const ConvGeometry& g, const Tensors& t) { convolve_depthwise_ring<T, K, 1>(g, t.y, t.weight, kNoBias, t.x, true, nullptr); });
  else if constexpr (K == 3) {
    gradient_variant<K, 3, 4, 5>(bench, layer);
    gradient_variant<K, 5, 4, 4>(bench, layer);
    gradient_variant<K, 7, 4, 3>(bench, layer);
  } else {
    gradient_variant<K, 2, 4, 3>(bench, layer);
    gradient_variant<K, 3, 4, 3>(bench, layer);
    gradient_variant<K, 4, 4, 2>(bench, layer);
  }
}

}  // namespace

int main() {
  Bench bench;
  check<3, 1>(bench, {3, 144, 15, 30, 3, 1});
  check<3, 2>(bench, {3, 96, 57, 33, 3, 2});
  check<5, 1>(bench, {5, 240, 14, 14, 5, 1});
  check<5, 2>(bench, {2, 72, 28, 29, 5, 2});
  check<7, 1>(bench, {9, 384, 7, 7, 7, 1});
  check<7, 1>(bench, {2, 96, 56, 56, 7, 1});
  check<7, 2>(bench, {2, 40, 30, 31, 7, 2});
  passes<3, 1>(bench, {128, 144, 56, 56, 3, 1});
  passes<7, 1>(bench, {128, 96, 56, 56, 7, 1});
  passes<3, 2>(bench, {128, 96, 112, 112, 3, 2});
  passes<5, 1>(bench, {128, 240, 28, 28, 5, 1});
  passes<5, 2>(bench, {128, 672, 14, 14, 5, 2});
  passes<3, 1>(bench, {128, 384, 14, 14, 3, 1});
  passes<7, 1>(bench, {128, 384, 14, 14, 7, 1});
  passes<7, 1>(bench, {128, 768, 7, 7, 7, 1});
}
