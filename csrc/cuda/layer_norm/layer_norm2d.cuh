// layer_norm2d: layer norm of (N, C, H, W) over C, with the formulas of layer_norm.cuh. channels_last is its rows;
// layer_norm_images.cuh has small images, and this file all other planes.
// A block owns tiles of vectors of pixels by all of C: its threads are (slices, columns), a slice takes every slices-th
// channel. They keep their part of a tile in registers; channels that do not fit come in chunks, which are read again,
// from L2, for each of a pixel's sums and for the result. Backward goes through a strip of tiles, and keeps the sums for
// dweight and dbias in registers until it ends; with chunks a strip is a tile.
// Memory traffic, in tensors read or written: 2 forward, 3 backward.
// Accumulators: the arithmetic type for at most 32 elements of a pixel, or 128 pixels, then double.
#pragma once

#include "cuda/layer_norm/layer_norm_images.cuh"

namespace cnnkern::gpu {

constexpr int kPixelThreads = 256, kMostPixelThreads = 512;
constexpr int kMostColumns = 32;  // of threads
constexpr int kStripPixels = 128;

// A plane of 16-bit elements may be a multiple of half a vector only, as 14x14 is.
template <typename T>
constexpr int kHalfVector = sizeof(T) == 2 ? kVector<T> / 2 : 1;

// Vectors that a thread keeps of each tensor: as many as registers allow. The address of each takes some too.
template <typename T, int V, int kTensors>
constexpr int kPixelVectors = V == kVector<T>            ? (kTensors == 1 ? 6 : 4)
                              : V > 1                    ? (kTensors == 1 ? 8 : 6)
                              : sizeof(compute_t<T>) == 8 ? 4 / kTensors
                                                         : 16 / kTensors;

struct PixelCut {
  int64_t C, HW, vectors, tiles, strip, strips;  // vectors of pixels in all images; tiles of a strip
  int64_t chunks, chunk;                         // chunk: channels
  int64_t step_images, step_pixels;              // from tile to tile
  int lanes, columns, slices, block;             // lanes: pixels of a vector
  double per_channel;

  template <typename T, int kTensors, typename... Pointers>
  static PixelCut cut(const Layout& s, const Pointers*... pointers) {
    PixelCut c{.C = s.C, .HW = s.HW, .block = kPixelThreads, .per_channel = 1.0 / s.C};
    const bool aligned = (aligned_to_vectors(pointers) && ...);
    const auto fits = [&](int lanes) { return aligned && s.HW % lanes == 0; };
    const int lanes = c.lanes = fits(kVector<T>) ? kVector<T> : fits(kHalfVector<T>) ? kHalfVector<T> : 1;
    const int held = lanes == kVector<T> ? kPixelVectors<T, kVector<T>, kTensors>
                     : lanes > 1         ? kPixelVectors<T, kHalfVector<T>, kTensors>
                                         : kPixelVectors<T, 1, kTensors>;
    c.vectors = s.N * s.HW / lanes;
    // As wide as holds all channels and leaves every multiprocessor tiles, but no less than two sectors, or one.
    const int least = (lanes > 1 ? 64 : 32) / static_cast<int>(lanes * sizeof(T));
    const auto holds_all = [&] { return int64_t{c.block} / c.columns * held >= s.C; };
    c.columns = kMostColumns;
    while (c.columns > least && !(holds_all() && divup(c.vectors, c.columns) >= kResidentThreads / c.block)) c.columns /= 2;
    if (!holds_all()) c.block = kMostPixelThreads;
    c.slices = c.block / c.columns;
    c.tiles = divup(c.vectors, c.columns);
    c.chunk = int64_t{c.slices} * held, c.chunks = divup(s.C, c.chunk);
    c.step_images = c.columns * lanes / s.HW, c.step_pixels = c.columns * lanes % s.HW;
    const int64_t blocks = kResidentThreads / c.block;
    const int64_t wanted = c.chunks > 1 ? c.tiles : smaller(c.tiles, blocks * divup(c.tiles * lanes, blocks * kStripPixels));
    c.strip = divup(c.tiles, wanted), c.strips = divup(c.tiles, c.strip);
    return c;
  }
  size_t scratch_bytes(int sums) const { return sizeof(double) * sums * columns * (block / kWarp); }
};

template <int V>
struct PixelPlace {
  int slice, column;
  int64_t vector, image, pixel;  // pixel: of the image
  __device__ PixelPlace(const PixelCut& cut, int64_t tile, int thread) {
    slice = thread / cut.columns, column = thread % cut.columns;
    vector = tile * cut.columns + column;
    const int64_t first = vector * V;
    if (((first | cut.HW) >> 32) == 0)
      image = static_cast<unsigned>(first) / static_cast<unsigned>(cut.HW);
    else
      image = first / cut.HW;
    pixel = first - image * cut.HW;
  }
  __device__ __forceinline__ void next(const PixelCut& cut) {
    vector += cut.columns, image += cut.step_images, pixel += cut.step_pixels;
    if (pixel >= cut.HW) pixel -= cut.HW, ++image;
  }
  __device__ __forceinline__ int64_t offset(const PixelCut& cut) const { return image * cut.C * cut.HW + pixel; }  // in channel 0
};

// What a thread holds of a tile in a chunk of channels.
template <typename T, int V, int U>
struct HeldPixels {
  using S = compute_t<T>;
  Packed<T, V> held[U];

  // tensor: at the thread's pixels, in channel 0.
  __device__ __forceinline__ void read(const T* tensor, const PixelCut& cut, int64_t first, bool active) {
    const T* at = tensor + first * cut.HW;
#pragma unroll
    for (int u = 0; u < U; ++u, at += cut.slices * cut.HW)
      if (active && first + u * cut.slices < cut.C) held[u].read(at);
  }
};

// Sums over the slices: each thread adds its M sums of V pixels to those of its warp, `first` of a tile or to what is there;
// after a barrier f(pixel of the tile, M sums) is called for each pixel, by one thread. Pixel k * columns + column is
// lane k of a column's vector. scratch: M * V * columns doubles per warp.
template <typename S, int M, int V>
__device__ __forceinline__ void add_slices(const S (&sums)[M][V], const PixelCut& cut, double* scratch, bool first) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    double v[V];
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = sums[m][k];
    for (int distance = kWarp / 2; distance >= cut.columns; distance /= 2)
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] += __shfl_xor_sync(kAllLanes, v[k], distance);
    if (lane < cut.columns)
#pragma unroll
      for (int k = 0; k < V; ++k) {
        double* const cell = scratch + ((warp * M + m) * V + k) * cut.columns + lane;
        *cell = first ? v[k] : *cell + v[k];
      }
  }
}

template <int M, int V, typename F>
__device__ __forceinline__ void for_pixels(const PixelCut& cut, const double* scratch, const F& f) {
  const int pixels = V * cut.columns, warps = blockDim.x / kWarp;
  __syncthreads();
  for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
    double sums[M] = {};
    for (int w = 0; w < warps; ++w)
#pragma unroll
      for (int m = 0; m < M; ++m) sums[m] += scratch[(w * M + m) * pixels + i];
    f(i, sums);
  }
  __syncthreads();
}

// With four lanes a thread needs few enough registers for three blocks of 256 on a multiprocessor.
template <typename X, typename T, int V>
__global__ void __launch_bounds__(V == 4 ? 3 * kPixelThreads : kMostPixelThreads)
    ln_planes_fwd_kernel(LayerNormForward<X, T> p, PixelCut cut) {
  using S = compute_t<T>;
  constexpr int U = kPixelVectors<T, V, 1>;
  GPU_DYN_SHARED(double, scratch);
  GPU_SHARED(S, centers, kMostColumns * V);
  GPU_SHARED(Normalizer<S>, normalizers, kMostColumns * V);
  const PixelPlace<V> place(cut, blockIdx.x, threadIdx.x);
  const bool active = place.vector < cut.vectors;
  const int64_t offset = active ? place.offset(cut) : 0;
  HeldPixels<X, V, U> x;
  if (blockIdx.x == 0)
    for (int64_t c = threadIdx.x * 8; c < cut.C; c += blockDim.x * 8) p.weight.prefetch(c), p.bias.prefetch(c);

  // f(channel, values)
  const auto each = [&](int64_t first, const auto& f) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (active && first + u * cut.slices < cut.C) {
        S in[V];
        x.held[u].values(in);
        f(first + u * cut.slices, in);
      }
  };
  // f(first channel) for each chunk, which is in registers then.
  const auto chunks = [&](bool there, const auto& f) {
    for (int64_t first = place.slice; first < cut.C + place.slice; first += cut.chunk) {
      if (!there || cut.chunks > 1) x.read(p.x + offset, cut, first, active);
      f(first);
    }
  };

  chunks(false, [&](int64_t first) {
    S sum[1][V] = {};
    each(first, [&](int64_t, const S (&in)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) sum[0][k] += in[k];
    });
    add_slices(sum, cut, scratch, first == place.slice);
  });
  for_pixels<1, V>(cut, scratch, [&](int i, const double (&sum)[1]) { centers[i] = static_cast<S>(sum[0] * cut.per_channel); });

  S center[V];
#pragma unroll
  for (int k = 0; k < V; ++k) center[k] = centers[k * cut.columns + place.column];
  chunks(true, [&](int64_t first) {
    S sums[2][V] = {};
    each(first, [&](int64_t, const S (&in)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const S d = in[k] - center[k];
        sums[0][k] += d, sums[1][k] = fma(d, d, sums[1][k]);
      }
    });
    add_slices(sums, cut, scratch, first == place.slice);
  });
  for_pixels<2, V>(cut, scratch, [&](int i, const double (&sums)[2]) {
    const PixelPlace<V> of(cut, blockIdx.x, i % cut.columns);
    if (of.vector >= cut.vectors) return;
    const int k = i / cut.columns;
    const S center = centers[i];
    const Moments m = sound<S>(sums[0], sums[1], cut.per_channel) || std::isnan(center)
                          ? moments(center, sums[0], sums[1], cut.per_channel)
                          : exact_moments(p.x + of.offset(cut) + k, cut.C, cut.HW);
    normalizers[i] = normalizer<S>(m, cut.per_channel, p.eps);
    p.mean[of.vector * V + k] = static_cast<S>(m.mean), p.rstd[of.vector * V + k] = normalizers[i].rstd;
  });

  Normalizer<S> normalize[V];
#pragma unroll
  for (int k = 0; k < V; ++k) normalize[k] = normalizers[k * cut.columns + place.column];
  chunks(true, [&](int64_t first) {
    each(first, [&](int64_t c, const S (&in)[V]) {
      S weight[1], bias[1], out[V];
      p.weight.load(c, S(1), weight), p.bias.load(c, S(0), bias);
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = fma(normalize[k](in[k]), weight[0], bias[0]);
      store<false>(p.y + offset + c * cut.HW, Lanes{}, out);
    });
  });
}

// partial: (strips, 2, C), null if no parameter needs a gradient.
template <typename X, typename T, int V>
__global__ void __launch_bounds__(kMostPixelThreads)
    ln_planes_bwd_kernel(LayerNormBackward<X, T> p, PixelCut cut, compute_t<T>* partial) {
  using S = compute_t<T>;
  constexpr int U = kPixelVectors<T, V, 2>;
  GPU_DYN_SHARED(double, scratch);
  GPU_SHARED(Means<S>, shared, kMostColumns * V);
  const int64_t begin = blockIdx.x * cut.strip, end = smaller(cut.tiles, begin + cut.strip);
  PixelPlace<V> place(cut, begin, threadIdx.x);
  HeldPixels<T, V, U> dy;
  HeldPixels<X, V, U> x;
  S sum_dy[U] = {}, sum_dy_xhat[U] = {};

  // Adds the columns' sums of a chunk's channels, and stores them.
  const auto finish_chunk = [&](int64_t first) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      double sums[2] = {sum_dy[u], sum_dy_xhat[u]};
      sum_dy[u] = sum_dy_xhat[u] = 0;
      for (int distance = cut.columns / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int j = 0; j < 2; ++j) sums[j] += __shfl_xor_sync(kAllLanes, sums[j], distance);
      const int64_t c = first + u * cut.slices;
      if (place.column != 0 || c >= cut.C) continue;
      S* const out = partial + 2 * cut.C * static_cast<int64_t>(blockIdx.x) + c;
      out[0] = static_cast<S>(sums[0]), out[cut.C] = static_cast<S>(sums[1]);
    }
  };

#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile, place.next(cut)) {
    const bool active = place.vector < cut.vectors;
    const int64_t offset = active ? place.offset(cut) : 0, at = active ? place.vector * V : 0;
    const auto read = [&](int64_t first) {
      dy.read(p.dy + offset, cut, first, active), x.read(p.x + offset, cut, first, active);
    };
    S mean[V], rstd[V], level[V] = {}, slope[V] = {};
    load_values(p.mean + at, mean), load_values(p.rstd + at, rstd);
    if (p.dx != nullptr) {
      for (int64_t first = place.slice; first < cut.C + place.slice; first += cut.chunk) {
        read(first);
        S sums[2][V] = {};
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int64_t c = first + u * cut.slices;
          if (!active || c >= cut.C) continue;
          S weight[1], in_dy[V], in_x[V];
          p.weight.load(c, S(1), weight), dy.held[u].values(in_dy), x.held[u].values(in_x);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const S g = in_dy[k] * weight[0];
            sums[0][k] += g, sums[1][k] = fma(g, in_x[k] - mean[k], sums[1][k]);
          }
        }
        add_slices(sums, cut, scratch, first == place.slice);
      }
      for_pixels<2, V>(cut, scratch, [&](int i, const double (&sums)[2]) {
        shared[i] = {static_cast<S>(sums[0] * cut.per_channel), static_cast<S>(sums[1] * cut.per_channel)};
      });
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const Means<S> means = shared[k * cut.columns + place.column];
        level[k] = means.level, slope[k] = means.slope * rstd[k];
      }
    }
    for (int64_t first = place.slice; first < cut.C + place.slice; first += cut.chunk) {
      if (p.dx == nullptr || cut.chunks > 1) read(first);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t c = first + u * cut.slices;
        if (!active || c >= cut.C) continue;
        S weight[1], in_dy[V], in_x[V], out[V];
        p.weight.load(c, S(1), weight), dy.held[u].values(in_dy), x.held[u].values(in_x);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const S xhat = (in_x[k] - mean[k]) * rstd[k];
          sum_dy[u] += in_dy[k], sum_dy_xhat[u] = fma(in_dy[k], xhat, sum_dy_xhat[u]);
          out[k] = fma(-xhat, slope[k], in_dy[k] * weight[0] - level[k]) * rstd[k];
        }
        if (p.dx != nullptr) store<false>(p.dx + offset + c * cut.HW, Lanes{}, out);
      }
      if (partial != nullptr && cut.chunks > 1) finish_chunk(first);
    }
  }
  if (partial != nullptr && cut.chunks == 1) finish_chunk(place.slice);
}

// ---- launches ---------------------------------------------------------------------------------------------------

template <typename X, typename T>
void layer_norm2d_forward(const LayerNormForward<X, T>& p, const Layout& s, Stream stream) {
  constexpr int V = kVector<T>;
  if (const auto images = ImageCut::cut<T>(s, p.x, p.y)) return layer_norm_images_forward(p, *images, stream);
  const auto cut = PixelCut::cut<T, 1>(s, p.x, p.y);
  const auto kernel = cut.lanes == V  ? ln_planes_fwd_kernel<X, T, V>
                      : cut.lanes > 1 ? ln_planes_fwd_kernel<X, T, kHalfVector<T>>
                                      : ln_planes_fwd_kernel<X, T, 1>;
  launch(kernel, dim3(static_cast<unsigned>(cut.tiles)), dim3(cut.block), cut.scratch_bytes(2 * cut.lanes), stream, p, cut);
}

// How planes are cut in the backward pass: as small images, or else as pixels.
struct PlanesBackwardCut {
  std::optional<ImageCut> images;
  PixelCut pixels;
  int64_t parts() const { return images ? images->N : pixels.strips; }  // of the sums for the parameters' gradients
};

template <typename X, typename T>
PlanesBackwardCut layer_norm2d_backward_cut(const LayerNormBackward<X, T>& p, const Layout& s) {
  return {ImageCut::cut<T>(s, p.dy, p.x, p.dx), PixelCut::cut<T, 2>(s, p.dy, p.x, p.dx, p.mean, p.rstd)};
}

// partial: 2 * C * cut.parts() elements, null if no parameter needs a gradient.
template <typename X, typename T>
void layer_norm2d_backward(const LayerNormBackward<X, T>& p, const LayerNormParameterGradients<T>& gradients,
                           const PlanesBackwardCut& planes, compute_t<T>* partial, Stream stream) {
  constexpr int V = kVector<T>;
  const PixelCut& cut = planes.pixels;
  if (planes.images) {
    layer_norm_images_backward(p, *planes.images, partial, stream);
  } else {
    const auto kernel = cut.lanes == V  ? ln_planes_bwd_kernel<X, T, V>
                        : cut.lanes > 1 ? ln_planes_bwd_kernel<X, T, kHalfVector<T>>
                                        : ln_planes_bwd_kernel<X, T, 1>;
    launch(kernel, dim3(static_cast<unsigned>(cut.strips)), dim3(cut.block), cut.scratch_bytes(2 * cut.lanes), stream, p, cut, partial);
  }
  if (partial != nullptr) layer_norm_finish(gradients, partial, planes.parts(), cut.C, stream);
}

}  // namespace cnnkern::gpu
