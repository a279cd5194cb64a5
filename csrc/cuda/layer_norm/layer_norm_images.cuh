// layer_norm2d of small images whose planes are no whole number of vectors, as those of 7x7 are. A whole image is one.
// A block owns an image, and its threads are a multiple of HW. So lane k of each of a thread's vectors is the same pixel,
// whose sums are registers, and the thread's next vector is a fixed number of channels further on. At most two channels
// share a vector. What does not fit into registers is read again, from L2, for each of a pixel's sums and for the result.
// Memory traffic, in tensors read or written: 2 forward, 3 backward.
// Accumulators: the arithmetic type for at most 32 elements of a pixel, or a vector of a channel, then double.
#pragma once

#include <optional>

#include "cuda/layer_norm/layer_norm_terms.cuh"

namespace cnnkern::gpu {

constexpr int kImageThreads = 512;
constexpr int kImageRounds = 32;  // vectors of a thread at most

struct ImageCut {
  int64_t N, C;
  int HW, vectors, threads, rounds, step;  // vectors of an image; rounds: vectors of a thread; step: channels from one to the next
  double per_channel;

  // nullopt where images are not such. pointers: what is accessed in vectors, or null.
  template <typename T, typename... Pointers>
  static std::optional<ImageCut> cut(const Layout& s, const Pointers*... pointers) {
    constexpr int V = kVector<T>;
    const bool ragged = s.HW % (sizeof(T) == 2 ? V / 2 : V) != 0;
    const int64_t vectors = s.C * s.HW / V;
    if (!ragged || s.HW < V || s.HW > kImageThreads || s.C * s.HW % V != 0 || !(aligned_to_vectors(pointers) && ...))
      return std::nullopt;
    const int64_t per_pixel = smaller(kImageThreads / s.HW, divup(vectors, s.HW)), threads = s.HW * per_pixel;
    const int64_t rounds = divup(vectors, threads);
    if (rounds > kImageRounds) return std::nullopt;
    return ImageCut{s.N, s.C, static_cast<int>(s.HW), static_cast<int>(vectors), static_cast<int>(threads), static_cast<int>(rounds),
                    static_cast<int>(V * per_pixel), 1.0 / s.C};
  }
  int64_t elements() const { return C * HW; }
  unsigned block() const { return static_cast<unsigned>(divup(threads, kWarp) * kWarp); }
};

// Where a thread's vectors are. Lanes before `split` belong to its channel and to pixels from `first` on, the others to the next
// channel and to pixels from 0 on.
template <int V>
struct ImagePlace {
  int channel, first, split;
  __device__ explicit ImagePlace(const ImageCut& cut) {
    const int element = static_cast<int>(threadIdx.x) * V;
    channel = element / cut.HW, first = element - channel * cut.HW;
    split = cut.HW - first < V ? cut.HW - first : V;
  }
  __device__ __forceinline__ int pixel(int lane) const { return lane < split ? first + lane : lane - split; }
};

// A thread's vectors of a tensor in U rounds.
template <typename T, int V, int U>
struct HeldImage {
  Packed<T, V> held[U];
  __device__ __forceinline__ void read(const T* image, const ImageCut& cut, int round) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (const int v = vector_of(cut, round + u); v < cut.vectors) held[u].read(image + v * V);
  }
  // Past the image for threads that have no pixel.
  static __device__ __forceinline__ int vector_of(const ImageCut& cut, int round) {
    return static_cast<int>(threadIdx.x) < cut.threads ? static_cast<int>(threadIdx.x) + round * cut.threads : cut.vectors;
  }
};

// Sums over the channels: each thread gives M sums of each of its lanes; f(pixel, M sums) is called by one thread a pixel.
// cells: M * V * threads elements. parts: M * threads doubles.
template <typename S, int M, int V, typename F>
__device__ __forceinline__ void for_image_pixels(const S (&sums)[M][V], const ImageCut& cut, S* cells, double* parts, const F& f) {
  const int thread = threadIdx.x, pixel = thread % cut.HW, group = thread / cut.HW, groups = cut.threads / cut.HW;
  const bool active = thread < cut.threads;
  if (active) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < V; ++k) cells[(m * cut.threads + thread) * V + k] = sums[m][k];
  }
  __syncthreads();
  if (active) {  // of the V * groups cells of a pixel, V
    double sum[M] = {};
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int m = 0; m < M; ++m) sum[m] += cells[m * cut.threads * V + pixel + cut.HW * (group * V + i)];
#pragma unroll
    for (int m = 0; m < M; ++m) parts[m * cut.threads + thread] = sum[m];
  }
  __syncthreads();
  if (thread < cut.HW) {
    double sum[M] = {};
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int m = 0; m < M; ++m) sum[m] += parts[m * cut.threads + pixel + cut.HW * g];
    f(pixel, sum);
  }
  __syncthreads();
}

template <typename T, int V>
__device__ __forceinline__ void of_both_channels(const ParameterVector<T>& p, int64_t channel, bool both, compute_t<T> otherwise,
                                                 compute_t<T> (&out)[2]) {
  compute_t<T> value[1];
  p.load(channel, otherwise, value), out[0] = out[1] = value[0];
  if (both) p.load(channel + 1, otherwise, value), out[1] = value[0];
}

template <typename X, typename T>
__global__ void __launch_bounds__(kImageThreads) ln_images_fwd_kernel(LayerNormForward<X, T> p, ImageCut cut) {
  using S = compute_t<T>;
  constexpr int V = kVector<T>, U = V == 8 ? 6 : 8;  // as registers allow
  GPU_DYN_SHARED(S, cells);
  GPU_SHARED(double, parts, 2 * kImageThreads);
  GPU_SHARED(Normalizer<S>, normalizers, kImageThreads);
  const ImagePlace<V> place(cut);
  const int64_t image = blockIdx.x, start = image * cut.C * cut.HW;
  HeldImage<X, V, U> x;

  // f(round, values) for each of the thread's vectors, which are in registers `again` if they all fit.
  const auto each = [&](bool again, const auto& f) {
#pragma unroll 1
    for (int round = 0; round < cut.rounds; round += U) {
      if (!again || cut.rounds > U) x.read(p.x + start, cut, round);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (x.vector_of(cut, round + u) >= cut.vectors) continue;
        S in[V];
        x.held[u].values(in);
        f(round + u, in);
      }
    }
  };

  S sum[1][V] = {};
  each(false, [&](int, const S (&in)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum[0][k] += in[k];
  });
  for_image_pixels(sum, cut, cells, parts, [&](int pixel, const double (&total)[1]) {
    normalizers[pixel].center = static_cast<S>(total[0] * cut.per_channel);
  });

  S center[V], sums[2][V] = {};
#pragma unroll
  for (int k = 0; k < V; ++k) center[k] = normalizers[place.pixel(k)].center;
  each(true, [&](int, const S (&in)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const S d = in[k] - center[k];
      sums[0][k] += d, sums[1][k] = fma(d, d, sums[1][k]);
    }
  });
  for_image_pixels(sums, cut, cells, parts, [&](int pixel, const double (&total)[2]) {
    const S center = normalizers[pixel].center;
    const Moments m = sound<S>(total[0], total[1], cut.per_channel) || std::isnan(center)
                          ? moments(center, total[0], total[1], cut.per_channel)
                          : exact_moments(p.x + start + pixel, cut.C, cut.HW);
    normalizers[pixel] = normalizer<S>(m, cut.per_channel, p.eps);
    const int64_t at = image * cut.HW + pixel;
    p.mean[at] = static_cast<S>(m.mean), p.rstd[at] = normalizers[pixel].rstd;
  });

  Normalizer<S> normalize[V];
#pragma unroll
  for (int k = 0; k < V; ++k) normalize[k] = normalizers[place.pixel(k)];
  each(true, [&](int round, const S (&in)[V]) {
    const int64_t channel = place.channel + static_cast<int64_t>(round) * cut.step;
    S weight[2], bias[2], out[V];
    of_both_channels<T, V>(p.weight, channel, place.split < V, S(1), weight);
    of_both_channels<T, V>(p.bias, channel, place.split < V, S(0), bias);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool next = k >= place.split;
      out[k] = fma(normalize[k](in[k]), next ? weight[1] : weight[0], next ? bias[1] : bias[0]);
    }
    store<false>(p.y + start + static_cast<int64_t>(x.vector_of(cut, round)) * V, Lanes{}, out);
  });
}

template <typename S>
constexpr int kImageBackwardVectors = sizeof(S) == 8 ? 1 : 4;  // of each tensor in registers

// partial: (N, 2, C), null if no parameter needs a gradient.
template <typename X, typename T>
__global__ void __launch_bounds__(kImageThreads)
    ln_images_bwd_kernel(LayerNormBackward<X, T> p, ImageCut cut, compute_t<T>* partial) {
  using S = compute_t<T>;
  constexpr int V = kVector<T>, U = kImageBackwardVectors<S>;
  GPU_DYN_SHARED(S, cells);
  GPU_SHARED(double, parts, 2 * kImageThreads);
  GPU_SHARED(Means<S>, means, kImageThreads);
  const ImagePlace<V> place(cut);
  const int64_t image = blockIdx.x, start = image * cut.C * cut.HW;
  const bool active = static_cast<int>(threadIdx.x) < cut.threads;
  HeldImage<T, V, U> dy;
  HeldImage<X, V, U> x;
  S mean[V] = {}, rstd[V] = {}, level[V] = {}, slope[V] = {};
#pragma unroll
  for (int k = 0; k < V; ++k)
    if (active) {
      const int64_t at = image * cut.HW + place.pixel(k);
      mean[k] = p.mean[at], rstd[k] = p.rstd[at];
    }
  const auto read = [&](int round) { dy.read(p.dy + start, cut, round), x.read(p.x + start, cut, round); };
  // f(u, weights of both channels, values of dy and x) for the thread's vectors of these rounds
  const auto each = [&](int round, const auto& f) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (x.vector_of(cut, round + u) >= cut.vectors) continue;
      S weight[2], in_dy[V], in_x[V];
      of_both_channels<T, V>(p.weight, place.channel + static_cast<int64_t>(round + u) * cut.step, place.split < V, S(1), weight);
      dy.held[u].values(in_dy), x.held[u].values(in_x);
      f(u, weight, in_dy, in_x);
    }
  };

  if (p.dx != nullptr) {
    S sums[2][V] = {};
#pragma unroll 1
    for (int round = 0; round < cut.rounds; round += U) {
      read(round);
      each(round, [&](int, const S (&weight)[2], const S (&in_dy)[V], const S (&in_x)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const S g = in_dy[k] * (k < place.split ? weight[0] : weight[1]);
          sums[0][k] += g, sums[1][k] = fma(g, in_x[k] - mean[k], sums[1][k]);
        }
      });
    }
    for_image_pixels(sums, cut, cells, parts, [&](int pixel, const double (&total)[2]) {
      means[pixel] = {static_cast<S>(total[0] * cut.per_channel), static_cast<S>(total[1] * cut.per_channel)};
    });
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Means<S> of = means[place.pixel(k)];
      level[k] = of.level, slope[k] = of.slope * rstd[k];
    }
  }

#pragma unroll 1
  for (int round = 0; round < cut.rounds; round += U) {
    if (p.dx == nullptr || cut.rounds > U) read(round);
    each(round, [&](int u, const S (&weight)[2], const S (&in_dy)[V], const S (&in_x)[V]) {
      S out[V], sums[2][2] = {};  // of both channels: dy, dy * xhat
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int h = k < place.split ? 0 : 1;
        const S xhat = (in_x[k] - mean[k]) * rstd[k];
#pragma unroll
        for (int i = 0; i < 2; ++i)  // chosen, and not multiplied by zero, since xhat may be infinite
          if (i == h) sums[i][0] += in_dy[k], sums[i][1] = fma(in_dy[k], xhat, sums[i][1]);
        out[k] = fma(-xhat, slope[k], in_dy[k] * (h == 0 ? weight[0] : weight[1]) - level[k]) * rstd[k];
      }
      const int64_t vector = x.vector_of(cut, round + u);
      if (p.dx != nullptr) store<false>(p.dx + start + vector * V, Lanes{}, out);
      if (partial != nullptr) {
        S* const cell = cells + 4 * (threadIdx.x + u * cut.threads);
#pragma unroll
        for (int i = 0; i < 4; ++i) cell[i] = sums[i / 2][i % 2];
      }
    });
    if (partial == nullptr) continue;
    __syncthreads();
    // Rounds end where channels do.
    const int first = round * cut.step, channels = static_cast<int>(smaller(int64_t{U} * cut.step, cut.C - first));
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      const int begin = c * cut.HW / V, end = static_cast<int>(divup((c + 1) * cut.HW, V));  // vectors that have some of it
      double total[2] = {};
      for (int v = begin; v < end; ++v) {
        const S* const cell = cells + 4 * v + (v * V / cut.HW == c ? 0 : 2);
        total[0] += cell[0], total[1] += cell[1];
      }
      S* const out = partial + 2 * cut.C * image + first + c;
      out[0] = static_cast<S>(total[0]), out[cut.C] = static_cast<S>(total[1]);
    }
    __syncthreads();
  }
}

template <typename X, typename T>
void layer_norm_images_forward(const LayerNormForward<X, T>& p, const ImageCut& cut, Stream stream) {
  const size_t bytes = sizeof(compute_t<T>) * 2 * kVector<T> * cut.threads;
  launch(ln_images_fwd_kernel<X, T>, dim3(static_cast<unsigned>(cut.N)), dim3(cut.block()), bytes, stream, p, cut);
}

template <typename X, typename T>
void layer_norm_images_backward(const LayerNormBackward<X, T>& p, const ImageCut& cut, compute_t<T>* partial, Stream stream) {
  using S = compute_t<T>;
  const int sums = 2 * kVector<T>, channels = 4 * kImageBackwardVectors<S>;
  const size_t bytes = sizeof(S) * cut.threads * (sums > channels ? sums : channels);
  launch(ln_images_bwd_kernel<X, T>, dim3(static_cast<unsigned>(cut.N)), dim3(cut.block()), bytes, stream, p, cut, partial);
}

}  // namespace cnnkern::gpu
