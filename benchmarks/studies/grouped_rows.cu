// The grouped convolutions of csrc/cuda/conv/grouped_rows.cuh and grouped_rows_sums.cuh by themselves: each pass of small shapes
// against sums in double, then the time of each pass of ResNeXt-50's layers. Needs PyTorch's headers and no library of it:
//
//   nvcc -std=c++20 -O3 -arch=sm_90a --cudart static -Icsrc -I$TORCH/include benchmarks/studies/grouped_rows.cu -o grouped_rows
//   ./grouped_rows [BATCH]
//
// Times are medians over launches on tensors that take turns and are more than the caches hold. GB/s are those of the least
// bytes: every tensor once.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/conv/grouped_rows_sums.cuh"

namespace {

using namespace cnnkern::gpu;

#ifdef __CUDACC__
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}
const Stream kStream = nullptr;
void* allocate(size_t bytes) {
  void* p;
  check(cudaMallocManaged(&p, bytes));
  return p;
}
void fill(void* p, size_t bytes) { check(cudaMemset(p, 0xff, bytes)); }
void release(void* p) { check(cudaFree(p)); }
void finish() { check(cudaGetLastError()), check(cudaDeviceSynchronize()); }
#else
const Stream kStream = emulator::current_stream();
void* allocate(size_t bytes) { return std::aligned_alloc(16, (bytes + 15) / 16 * 16); }
void fill(void* p, size_t bytes) { memset(p, 0xff, bytes); }
void release(void* p) { std::free(p); }
void finish() {}
#endif

constexpr int kFillBlocks = 264;

template <typename T>
__global__ void randomise_kernel(T* data, size_t size, unsigned seed) {  // between -1 and 1; float32 that TF32 has too
  constexpr int kBits = std::is_same_v<T, float> ? 11 : 24;
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < size; i += size_t{256} * kFillBlocks) {
    unsigned bits = static_cast<unsigned>(i) * 2654435761u + seed * 2246822519u;
    for (int round = 0; round < 2; ++round) bits = (bits ^ bits >> 15) * 2246822519u;
    data[i] = static_cast<T>(static_cast<float>(bits >> (32 - kBits)) / (1 << (kBits - 1)) - 1.0f);
  }
}

// Memory that host and device see. Begins as NaN.
template <typename T>
struct Memory {
  T* data;
  size_t size;
  explicit Memory(size_t size) : data(static_cast<T*>(allocate(size * sizeof(T)))), size(size) { fill(data, size * sizeof(T)); }
  Memory(const Memory&) = delete;
  ~Memory() { release(data); }
  void randomise() {
    static unsigned seed = 0;
    launch(randomise_kernel<T>, dim3(kFillBlocks), dim3(256), 0, kStream, data, size, ++seed);
    finish();
  }
};

ConvGeometry geometry(int64_t N, int64_t C, int64_t H, int64_t W, int64_t width, int stride, int ph, int pw) {
  return {.rows = true, .N = N, .C = C, .H = H, .W = W, .O = C, .OH = (H + 2 * ph - 3) / stride + 1, .OW = (W + 2 * pw - 3) / stride + 1,
          .groups = C / width, .kh = 3, .kw = 3, .sh = stride, .sw = stride, .ph = ph, .pw = pw, .dh = 1, .dw = 1};
}

// The tensors of a convolution; the filters are (O, inputs, 3, 3).
template <typename T>
struct Tensors {
  ConvGeometry g;
  Memory<T> x, y, dx, weight, bias, dweight, dbias;
  Memory<float> parts;
  explicit Tensors(const ConvGeometry& g)
      : g(g), x(g.N * g.C * g.H * g.W), y(g.N * g.O * g.OH * g.OW), dx(x.size), weight(g.O * g.inputs() * 9), bias(g.O), dweight(weight.size),
        dbias(g.O), parts(grouped_rows_parts<T>(g) * g.O * (g.inputs() * 9 + 1)) {
    x.randomise(), weight.randomise(), bias.randomise();
  }
  Filters<T> filters(bool transposed, bool flipped) const {
    return {weight.data, {g.inputs() * 9, 9, 3, 1}, static_cast<int>(g.inputs()), transposed, flipped};
  }
  void forward() {
    if (g.sh == 1) convolve_grouped_rows<T, 1>(g, x.data, filters(false, false), bias.data, y.data, kStream);
    else convolve_grouped_rows<T, 2>(g, x.data, filters(false, false), bias.data, y.data, kStream);
  }
  void input_gradient() {  // y as dy
    if (g.sh == 1) grouped_rows_gradient<T, 1>(g, y.data, filters(true, true), dx.data, kStream);
    else grouped_rows_gradient<T, 2>(g, y.data, filters(true, false), dx.data, kStream);
  }
  void weight_gradient() {
    const PartialSums<float> sums = {parts.data, grouped_rows_parts<T>(g), g.O, static_cast<int>(g.inputs() * 9), true};
    if (g.sh == 1) sum_grouped_rows<T, 1>(g, y.data, x.data, sums, kStream);
    else sum_grouped_rows<T, 2>(g, y.data, x.data, sums, kStream);
    sum_parts<T>(sums, {dweight.data, dbias.data, {g.inputs() * 9, 9, 3, 1}, 3, 3}, kStream);
  }
};

// Sums in double, and of absolute values.
struct Exact {
  std::vector<double> sum, size;
  explicit Exact(size_t n) : sum(n), size(n) {}
  void add(size_t at, double a, double b) { sum[at] += a * b, size[at] += std::fabs(a * b); }
};

template <typename T>
constexpr const char* kName = std::is_same_v<T, float> ? "tf32" : std::is_same_v<T, c10::Half> ? "fp16" : "bf16";

// Calls f(x's element, y's, the filter's) for every product of a convolution.
template <typename F>
void for_each_product(const ConvGeometry& g, const F& f) {
  const int64_t width = g.inputs();
  for (int64_t n = 0; n < g.N; ++n)
    for (int64_t oh = 0; oh < g.OH; ++oh)
      for (int64_t ow = 0; ow < g.OW; ++ow)
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t h = oh * g.sh + tap / 3 - g.ph, w = ow * g.sw + tap % 3 - g.pw;
          if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
          for (int64_t o = 0; o < g.O; ++o)
            for (int64_t j = 0; j < width; ++j)
              f(((n * g.H + h) * g.W + w) * g.C + o / width * width + j, ((n * g.OH + oh) * g.OW + ow) * g.O + o, (o * width + j) * 9 + tap);
        }
}

// A rounding of the result, and of the sums in float. Prints the worst.
template <typename T>
bool close(const char* what, const Memory<T>& ours, const Exact& exact) {
  const double rounding = sizeof(T) == 4 ? 0 : std::is_same_v<T, c10::Half> ? 1.0 / 2048 : 1.0 / 256;
  double worst = 0;
  for (size_t i = 0; i < ours.size; ++i) {
    const double error = std::fabs(static_cast<double>(static_cast<float>(ours.data[i])) - exact.sum[i]);
    const double allowed = std::fabs(exact.sum[i]) * rounding + exact.size[i] * 4e-6 + 1e-7;
    if (!(error <= allowed)) worst = std::isnan(error) ? INFINITY : std::max(worst, error / allowed);
  }
  if (worst > 0) std::printf("  %s: wrong, %.3g times what is allowed\n", what, worst);
  return worst == 0;
}

template <typename T>
bool correct(const ConvGeometry& g) {
  Tensors<T> t(g);
  Exact y(t.y.size), dx(t.x.size), dweight(t.weight.size), dbias(g.O);
  for (size_t i = 0; i < y.sum.size(); ++i) y.add(i, static_cast<float>(t.bias.data[i % g.O]), 1);
  for_each_product(g, [&](size_t x, size_t out, size_t w) {
    y.add(out, static_cast<float>(t.x.data[x]), static_cast<float>(t.weight.data[w]));
  });
  t.forward(), finish();
  bool all = close("forward", t.y, y);
  t.y.randomise();
  for_each_product(g, [&](size_t x, size_t out, size_t w) {
    dx.add(x, static_cast<float>(t.y.data[out]), static_cast<float>(t.weight.data[w]));
    dweight.add(w, static_cast<float>(t.y.data[out]), static_cast<float>(t.x.data[x]));
  });
  for (size_t i = 0; i < t.y.size; ++i) dbias.add(i % g.O, static_cast<float>(t.y.data[i]), 1);
  t.input_gradient(), finish();
  all = close("input gradient", t.dx, dx) && all;
  t.weight_gradient(), finish();
  all = close("weight gradient", t.dweight, dweight) && all;
  all = close("bias gradient", t.dbias, dbias) && all;
  std::printf("%s %ldx%ldx%ldx%ld width %ld stride %d padding %d %d: %s\n", kName<T>,
              long(g.N), long(g.C), long(g.H), long(g.W), long(g.inputs()), g.sh, g.ph, g.pw, all ? "right" : "WRONG");
  return all;
}

bool all_correct() {
  bool all = true;
  for (const int width : {4, 8, 16, 24, 32})
    for (const int stride : {1, 2})
      for (const auto& [C, N, H, W] : {std::array{1, 2, 7, 7}, {1, 3, 5, 9}, {2, 1, 12, 20}, {9, 2, 3, 14}, {3, 5, 6, 33}, {1, 1, 40, 3}}) {
        const int padding = (C + N + H + W + width) % 3, channels = std::max(8, width) * C;
        if (H + 2 * padding < 3) continue;
        const ConvGeometry g = geometry(N, channels, H, W, width, stride, padding, (padding + H) % 3);
        all = correct<c10::BFloat16>(g) && all;
        if (grouped_rows_take(g, true)) all = correct<float>(g) && all;
      }
  all = correct<c10::Half>(geometry(2, 96, 11, 13, 4, 1, 1, 1)) && correct<c10::Half>(geometry(2, 96, 11, 13, 16, 2, 1, 1)) && all;
  return all;
}

#ifdef __CUDACC__
// Microseconds of a launch: the median.
template <typename F>
double microseconds(const F& f) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
  for (int i = 0; i < 24; ++i) {
    check(cudaEventRecord(begin));
    f(i);
    check(cudaEventRecord(end)), check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 4) times.push_back(ms * 1000);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

template <typename T>
void time_layer(const ConvGeometry& g) {
  const double bytes = static_cast<double>(sizeof(T)) * (g.N * g.C * g.H * g.W + g.N * g.O * g.OH * g.OW);
  const int copies = std::max(2, static_cast<int>(256e6 / bytes) + 1);
  std::vector<std::unique_ptr<Tensors<T>>> all;
  for (int i = 0; i < copies; ++i) all.push_back(std::make_unique<Tensors<T>>(g));
  for (auto& t : all) t->forward(), t->input_gradient(), t->weight_gradient();
  finish();
  const auto show = [&](const char* pass, double us) {
    std::printf("%s %4ldx%4ldx%3ldx%3ld w%-2ld s%d %-8s %8.1f us %7.0f GB/s\n", kName<T>, long(g.N), long(g.C), long(g.H), long(g.W), long(g.inputs()), g.sh,
                pass, us, bytes / us / 1e3);
    std::fflush(stdout);
  };
  show("forward", microseconds([&](int i) { all[i % copies]->forward(); }));
  show("dx", microseconds([&](int i) { all[i % copies]->input_gradient(); }));
  show("dweight", microseconds([&](int i) { all[i % copies]->weight_gradient(); }));
}
#endif

}  // namespace

int main([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
  if (!all_correct()) return 1;
#ifdef __CUDACC__
  const int64_t batch = argc > 1 ? std::atoi(argv[1]) : 128;
  const struct { int64_t C, side, width; int stride; } layers[] = {{128, 56, 4, 1}, {256, 56, 8, 2}, {256, 28, 8, 1}, {512, 28, 16, 2},
                                                                   {512, 14, 16, 1}, {1024, 14, 32, 2}, {1024, 7, 32, 1}, {192, 28, 24, 1}};
  for (const auto& l : layers) {
    const ConvGeometry g = geometry(batch, l.C, l.side, l.side, l.width, l.stride, 1, 1);
    time_layer<c10::BFloat16>(g);
    if (grouped_rows_take(g, true)) time_layer<float>(g);
  }
#endif
}
