// Grouped convolution of any kernel, stride, dilation and group: one output per thread. It is not optimised, but it copies
// no layout, and its gradients are as exact as those of the other kernels.
#pragma once

#include "cuda/conv/conv_geometry.cuh"

namespace cnnkern::gpu {

struct AnyWork {
  unsigned total;
  Divisor inner, middle, outer;  // of what is counted: channels, columns, rows or columns, rows, channels
  Divisor columns, lines;        // of y
  int64_t C, H, W, O, OH, OW;
  int inputs, outputs, kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t weight[4], x[4], y[4];  // strides
  bool rows;

  AnyWork(const ConvGeometry& g, const int64_t* weight_strides, bool gradient)
      : total(static_cast<unsigned>(gradient ? g.N * g.C * g.H * g.W : g.N * g.O * g.OH * g.OW)),
        inner(g.rows ? (gradient ? g.C : g.O) : (gradient ? g.W : g.OW)),
        middle(g.rows ? (gradient ? g.W : g.OW) : (gradient ? g.H : g.OH)),
        outer(g.rows ? (gradient ? g.H : g.OH) : (gradient ? g.C : g.O)),
        columns(g.OW), lines(g.OH), C(g.C), H(g.H), W(g.W), O(g.O), OH(g.OH), OW(g.OW),
        inputs(static_cast<int>(g.inputs())), outputs(static_cast<int>(g.outputs())),
        kh(g.kh), kw(g.kw), sh(g.sh), sw(g.sw), ph(g.ph), pw(g.pw), dh(g.dh), dw(g.dw),
        weight{weight_strides[0], weight_strides[1], weight_strides[2], weight_strides[3]}, rows(g.rows) {
    const auto strides = [&](int64_t (&s)[4], int64_t c, int64_t h, int64_t w) {
      s[0] = c * h * w, s[1] = g.rows ? 1 : h * w, s[2] = g.rows ? w * c : w, s[3] = g.rows ? c : 1;
    };
    strides(x, g.C, g.H, g.W), strides(y, g.O, g.OH, g.OW);
  }

  __device__ __forceinline__ void place(unsigned at, int64_t& n, int& c, int& h, int& w) const {
    const int first = inner.split(at), second = middle.split(at), third = outer.split(at);
    n = at;
    c = rows ? first : third, w = rows ? second : first, h = rows ? third : second;
  }
  __device__ __forceinline__ int64_t in_x(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return n * x[0] + c * x[1] + h * x[2] + w * x[3];
  }
  __device__ __forceinline__ int64_t in_y(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return n * y[0] + c * y[1] + h * y[2] + w * y[3];
  }
};

template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    any_conv_kernel(AnyWork work, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y) {
  using S = compute_t<T>;
  const unsigned at = blockIdx.x * kConvThreads + threadIdx.x;
  if (at >= work.total) return;
  int64_t n;
  int o, oh, ow;
  work.place(at, n, o, oh, ow);
  S sum = bias != nullptr ? static_cast<S>(bias[o]) : S(0);
  const int64_t first = o / work.outputs * work.inputs;
  for (int i = 0; i < work.inputs; ++i)
    for (int ky = 0; ky < work.kh; ++ky) {
      const int h = oh * work.sh - work.ph + ky * work.dh;
      const bool there = h >= 0 && h < work.H;
      for (int kx = 0; kx < work.kw; ++kx) {
        const int w = ow * work.sw - work.pw + kx * work.dw;
        const T tap = weight[o * work.weight[0] + i * work.weight[1] + ky * work.weight[2] + kx * work.weight[3]];
        sum = fma(read_one(x + work.in_x(n, first + i, h, w), there && w >= 0 && w < work.W), static_cast<S>(tap), sum);
      }
    }
  y[work.in_y(n, o, oh, ow)] = static_cast<T>(sum);
}

template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    any_conv_gradient_kernel(AnyWork work, const T* __restrict__ dy, const T* __restrict__ weight, T* __restrict__ dx) {
  using S = compute_t<T>;
  const unsigned at = blockIdx.x * kConvThreads + threadIdx.x;
  if (at >= work.total) return;
  int64_t n;
  int c, h, w;
  work.place(at, n, c, h, w);
  S sum = 0;
  const int64_t first = c / work.inputs * work.outputs;
  const int i = c % work.inputs;
  for (int64_t o = first; o < first + work.outputs; ++o)
    for (int ky = 0; ky < work.kh; ++ky) {
      const int from = h + work.ph - ky * work.dh, oh = from / work.sh;
      const bool there = from >= 0 && oh * work.sh == from && oh < work.OH;
      for (int kx = 0; kx < work.kw; ++kx) {
        const int beside = w + work.pw - kx * work.dw, ow = beside / work.sw;
        const bool inside = there && beside >= 0 && ow * work.sw == beside && ow < work.OW;
        const T tap = weight[o * work.weight[0] + i * work.weight[1] + ky * work.weight[2] + kx * work.weight[3]];
        sum = fma(read_one(dy + work.in_y(n, o, oh, ow), inside), static_cast<S>(tap), sum);
      }
    }
  dx[work.in_x(n, c, h, w)] = static_cast<T>(sum);
}

// Pixels of y of a part of the gradient of the weight, and how many of them a thread sums before it continues in double.
constexpr int64_t kAnyPart = 16384;
constexpr int kAnyFlush = 32;

// A block has one tap, dy's own sum being the last, of one output channel, and a part of the pixels of y.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    any_conv_sums_kernel(AnyWork work, int64_t pixels, const T* __restrict__ dy, const T* __restrict__ x, PartialSums<compute_t<T>> sums) {
  using S = compute_t<T>;
  const unsigned taps = sums.taps + 1, O = static_cast<unsigned>(work.O);
  const int tap = static_cast<int>(blockIdx.x % taps);
  const int64_t part = blockIdx.x / taps / O;
  const int o = static_cast<int>(blockIdx.x / taps % O);
  const bool own = tap == sums.taps;
  const int kernel = work.kh * work.kw, ky = tap % kernel / work.kw, kx = tap % work.kw;
  const int64_t c = o / work.outputs * work.inputs + (own ? 0 : tap / kernel), end = smaller(pixels, (part + 1) * kAnyPart);
  double sum[1] = {0};
  S some = 0;
  int count = 0;
  for (int64_t pixel = part * kAnyPart + threadIdx.x; pixel < end; pixel += kConvThreads) {
    unsigned n = static_cast<unsigned>(pixel);
    const int ow = work.columns.split(n), oh = work.lines.split(n);
    const S g = static_cast<S>(dy[work.in_y(n, o, oh, ow)]);
    const int h = oh * work.sh - work.ph + ky * work.dh, w = ow * work.sw - work.pw + kx * work.dw;
    const S v = read_one(x + work.in_x(n, c, h, w), h >= 0 && h < work.H && w >= 0 && w < work.W);
    some = own ? some + g : fma(v, g, some);
    if (++count == kAnyFlush) sum[0] += some, some = 0, count = 0;
  }
  sum[0] += some;
  block_sum(sum);
  if (threadIdx.x == 0) sums.at(part, o, tap) = static_cast<S>(sum[0]);
}

template <typename T>
void convolve_any(const ConvGeometry& g, const T* x, const T* weight, const int64_t* strides, const T* bias, T* y, Stream stream) {
  const AnyWork work(g, strides, false);
  launch(any_conv_kernel<T>, dim3(static_cast<unsigned>(divup(work.total, kConvThreads))), dim3(kConvThreads), 0, stream, work, x, weight, bias, y);
}

template <typename T>
void any_gradient(const ConvGeometry& g, const T* dy, const T* weight, const int64_t* strides, T* dx, Stream stream) {
  const AnyWork work(g, strides, true);
  launch(any_conv_gradient_kernel<T>, dim3(static_cast<unsigned>(divup(work.total, kConvThreads))), dim3(kConvThreads), 0, stream, work, dy, weight,
         dx);
}

template <typename T>
void sum_any(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<compute_t<T>>& sums, Stream stream) {
  const int64_t none[4] = {};
  launch(any_conv_sums_kernel<T>, dim3(static_cast<unsigned>(sums.parts * g.O * (sums.taps + 1))), dim3(kConvThreads), 0, stream,
         AnyWork(g, none, false), g.N * g.OH * g.OW, dy, x, sums);
}

}  // namespace cnnkern::gpu
