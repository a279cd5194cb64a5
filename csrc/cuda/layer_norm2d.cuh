// layer_norm2d: layer norm of (N, C, H, W) over C, with the formulas of layer_norm.cuh. channels_last is its rows; this
// file has the planes.
// A block owns a tile of vectors of pixels, by all of C: its threads are (slices, columns), a slice takes every
// slices-th channel. x, and dy, are read again for the result, from L1 or L2. For dweight and dbias the columns of a
// tile are added by shuffles, the tiles by finish_kernel in their order.
// Traffic in tensors read or written: 2 forward, 3 backward.
// Accumulators: the arithmetic type for at most 16 elements, then double.
#pragma once

#include "cuda/layer_norm.cuh"

namespace cnnkern::gpu {

constexpr int kMostColumns = 32, kLeastColumns = 8;  // vectors of pixels of a tile: whole sectors, and enough blocks
constexpr int64_t kEnoughTiles = 128;

struct PixelCut {
  int64_t C, HW, vectors, tiles;  // vectors of pixels in all images
  int columns, slices;
  bool vector;

  template <typename T, typename... Pointers>
  static PixelCut cut(const Layout& s, const Pointers*... pointers) {
    PixelCut c{.C = s.C, .HW = s.HW};
    c.vector = s.HW % kVector<T> == 0 && (aligned_to_vectors(pointers) && ...);
    c.vectors = s.N * s.HW / (c.vector ? kVector<T> : 1);
    c.columns = c.vectors >= kEnoughTiles * kMostColumns ? kMostColumns : kLeastColumns;
    c.slices = kThreads / c.columns;
    c.tiles = divup(c.vectors, c.columns);
    return c;
  }
  size_t scratch_bytes(int sums) const { return sizeof(double) * sums * (slices / 2) * columns; }
  dim3 grid() const { return dim3(static_cast<unsigned>(tiles)); }
};

template <int V>
struct PixelPlace {
  int slice, column;
  bool active;
  int64_t pixel, offset;  // of the vector: among all pixels; in memory, in channel 0
  __device__ explicit PixelPlace(const PixelCut& cut) {
    slice = threadIdx.x / cut.columns, column = threadIdx.x % cut.columns;
    const int64_t vector = static_cast<int64_t>(blockIdx.x) * cut.columns + column;
    active = vector < cut.vectors;
    pixel = active ? vector * V : 0;
    offset = pixel / cut.HW * cut.C * cut.HW + pixel % cut.HW;
  }
};

// f(channel, whether it and the pixels exist, values) for the channels of a slice, in step with the other slices;
// done() after at most kUnroll * kFlush of them.
template <int V, typename T, int kTensors, typename F, typename Done>
__device__ __forceinline__ void for_channels(const PixelCut& cut, const PixelPlace<V>& place, const T* const (&tensors)[kTensors],
                                             const F& f, const Done& done) {
  using S = compute_t<T>;
  constexpr int U = V * kTensors <= 8 ? kUnroll : 32 / (V * kTensors);  // 32 values under way
  int pending = 0;
  for (int64_t begin = 0; begin < cut.C; begin += U * cut.slices) {
    S in[U][kTensors][V];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t c = begin + u * cut.slices + place.slice;
#pragma unroll
      for (int t = 0; t < kTensors; ++t)
        if (place.active && c < cut.C)
          load<false>(tensors[t] + place.offset + c * cut.HW, Lanes{}, [](int) { return S(0); }, in[u][t]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t c = begin + u * cut.slices + place.slice;
      f(c, place.active && c < cut.C, in[u]);
    }
    if (++pending == kFlush) done(), pending = 0;
  }
  done();
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) ln_planes_fwd_kernel(LayerNormForward<T> p, PixelCut cut) {
  using S = compute_t<T>;
  GPU_DYN_SHARED(double, scratch);
  GPU_SHARED(Normalizer<S>, shared, kMostColumns * V);
  const PixelPlace<V> place(cut);
  Normalizer<S>* const pixels = shared + place.column * V;
  const T* const tensors[1] = {p.x};
  double sum[V] = {}, sums[2 * V] = {};
  S s1[V] = {}, s2[V] = {}, center[V];

  for_channels<V>(
      cut, place, tensors,
      [&](int64_t, bool exists, const S (&in)[1][V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) s1[k] += exists ? in[0][k] : S(0);
      },
      [&] {
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += s1[k], s1[k] = 0;
      });
  column_sum(sum, place.slice, cut.slices, place.column, cut.columns, scratch);
  if (place.slice == 0)
    for (int k = 0; k < V; ++k) pixels[k].center = static_cast<S>(sum[k] / cut.C);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < V; ++k) center[k] = pixels[k].center;

  for_channels<V>(
      cut, place, tensors,
      [&](int64_t, bool exists, const S (&in)[1][V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const S d = exists ? in[0][k] - center[k] : S(0);
          s1[k] += d, s2[k] = fma(d, d, s2[k]);
        }
      },
      [&] {
#pragma unroll
        for (int k = 0; k < V; ++k) sums[k] += s1[k], sums[V + k] += s2[k], s1[k] = s2[k] = 0;
      });
  column_sum(sums, place.slice, cut.slices, place.column, cut.columns, scratch);
  if (place.slice == 0 && place.active) {
    unsigned unsound = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      pixels[k] = normalizer(center[k], sums[k], sums[V + k], cut.C, p.eps);
      unsound |= static_cast<unsigned>(!sound<S>(sums[k], sums[V + k], cut.C)) << k;
    }
#pragma unroll 1
    for (int k = 0; unsound >> k != 0; ++k)
      if (unsound >> k & 1) pixels[k] = exact_normalizer(p.x + place.offset + k, cut.C, cut.HW, p.eps);
    for (int k = 0; k < V; ++k) p.mean[place.pixel + k] = pixels[k].mean, p.rstd[place.pixel + k] = pixels[k].rstd;
  }
  __syncthreads();
  Normalizer<S> normalize[V];
#pragma unroll
  for (int k = 0; k < V; ++k) normalize[k] = pixels[k];

  for_channels<V>(
      cut, place, tensors,
      [&](int64_t c, bool exists, const S (&in)[1][V]) {
        if (!exists) return;
        S weight[1], bias[1], out[V];
        p.weight.load(c, S(1), weight), p.bias.load(c, S(0), bias);
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = fma(normalize[k](in[0][k]), weight[0], bias[0]);
        store<false>(p.y + place.offset + c * cut.HW, Lanes{}, out);
      },
      [] {});
}

// partial: (C, tiles, 2), null where no gradient of a parameter is wanted.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) ln_planes_bwd_kernel(LayerNormBackward<T> p, PixelCut cut, double* partial) {
  using S = compute_t<T>;
  struct Terms {
    S level, slope;
  };
  GPU_DYN_SHARED(double, scratch);
  GPU_SHARED(Terms, shared, kMostColumns * V);
  const PixelPlace<V> place(cut);
  Terms* const pixels = shared + place.column * V;
  const T* const tensors[2] = {p.dy, p.x};
  S mean[V], rstd[V], level[V] = {}, slope[V] = {};
#pragma unroll
  for (int k = 0; k < V; ++k) mean[k] = p.mean[place.pixel + k], rstd[k] = p.rstd[place.pixel + k];

  if (p.dx != nullptr) {
    double sums[2 * V] = {};
    S s1[V] = {}, s2[V] = {};
    for_channels<V>(
        cut, place, tensors,
        [&](int64_t c, bool exists, const S (&in)[2][V]) {
          if (!exists) return;
          S weight[1];
          p.weight.load(c, S(1), weight);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const S g = in[0][k] * weight[0];
            s1[k] += g, s2[k] = fma(g, in[1][k] - mean[k], s2[k]);
          }
        },
        [&] {
#pragma unroll
          for (int k = 0; k < V; ++k) sums[k] += s1[k], sums[V + k] += s2[k], s1[k] = s2[k] = 0;
        });
    column_sum(sums, place.slice, cut.slices, place.column, cut.columns, scratch);
    if (place.slice == 0)
      for (int k = 0; k < V; ++k)
        pixels[k] = {static_cast<S>(sums[k] / cut.C), static_cast<S>(sums[V + k] / cut.C * rstd[k])};
    __syncthreads();
#pragma unroll
    for (int k = 0; k < V; ++k) level[k] = pixels[k].level, slope[k] = pixels[k].slope;
  }

  for_channels<V>(
      cut, place, tensors,
      [&](int64_t c, bool exists, const S (&in)[2][V]) {
        S sums[2] = {0, 0};  // of dy, of dy * xhat
        if (exists) {
          S weight[1], out[V];
          p.weight.load(c, S(1), weight);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const S xhat = (in[1][k] - mean[k]) * rstd[k];
            sums[0] += in[0][k], sums[1] = fma(in[0][k], xhat, sums[1]);
            out[k] = fma(-xhat, slope[k], fma(in[0][k], weight[0], -level[k])) * rstd[k];
          }
          if (p.dx != nullptr) store<false>(p.dx + place.offset + c * cut.HW, Lanes{}, out);
        }
        if (partial == nullptr) return;
#pragma unroll
        for (int distance = kMostColumns / 2; distance > 0; distance /= 2)
          if (distance < cut.columns)
            for (int j = 0; j < 2; ++j) sums[j] += __shfl_xor_sync(kAllLanes, sums[j], distance);
        if (place.column == 0 && c < cut.C) {
          double* const out = partial + 2 * (c * cut.tiles + blockIdx.x);
          out[0] = sums[0], out[1] = sums[1];
        }
      },
      [] {});
}

// ---- launches ---------------------------------------------------------------------------------------------------

template <typename T>
void layer_norm2d_forward(const LayerNormForward<T>& p, const Layout& s, Stream stream) {
  constexpr int V = kVector<T>;
  const auto cut = PixelCut::cut<T>(s, p.x, p.y);
  const int lanes = cut.vector ? V : 1;
  launch(cut.vector ? ln_planes_fwd_kernel<T, V> : ln_planes_fwd_kernel<T, 1>, cut.grid(), dim3(kThreads),
         cut.scratch_bytes(2 * lanes), stream, p, cut);
}

template <typename T>
PixelCut layer_norm2d_pixels(const LayerNormBackward<T>& p, const Layout& s) {
  return PixelCut::cut<T>(s, p.dy, p.x, p.dx);
}

// workspace: 2 * C * layer_norm2d_pixels(...).tiles doubles, where gradients of parameters are wanted.
template <typename T>
void layer_norm2d_backward(const LayerNormBackward<T>& p, const LayerNormParameterGradients<T>& gradients, const Layout& s,
                           double* workspace, Stream stream) {
  constexpr int V = kVector<T>;
  const PixelCut cut = layer_norm2d_pixels(p, s);
  const int lanes = cut.vector ? V : 1;
  launch(cut.vector ? ln_planes_bwd_kernel<T, V> : ln_planes_bwd_kernel<T, 1>, cut.grid(), dim3(kThreads),
         cut.scratch_bytes(2 * lanes), stream, p, cut, workspace);
  if (workspace == nullptr) return;
  launch(finish_kernel<LayerNormParameterGradients<T>>, dim3(static_cast<unsigned>(cut.C)), dim3(kFinishThreads), 0, stream,
         gradients, cut.tiles, workspace);
}

}  // namespace cnnkern::gpu
