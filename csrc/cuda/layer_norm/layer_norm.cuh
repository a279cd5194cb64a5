// layer_norm, over rows of n elements: y = xhat * weight + bias, xhat = (x - mean) * rstd.
// Backward, with g = dy * weight: dbias = sum of dy over rows, dweight = sum of dy * xhat over rows,
//   dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n).
// This file selects the kernels: layer_norm_rows.cuh if a row fits into the registers of a block, layer_norm_slices.cuh if it
// does not. Sums over rows are partial sums of strips of rows, which one more kernel adds in their order.
#pragma once

#include "cuda/layer_norm/layer_norm_slices.cuh"

namespace cnnkern::gpu {

// How rows are cut, and the scratch memory that it takes. What is held is not sliced.
template <typename X, typename T>
struct LayerNormForwardCut {
  static constexpr int kVectors = kForwardVectors<T, kVector<T>>, kElements = kForwardVectors<T, 1>;
  RowGroups held;
  RowSlices sliced;

  LayerNormForwardCut(const LayerNormForward<X, T>& p, int64_t rows, int64_t cols)
      : held(RowGroups::cut<T>(rows, cols, kVectors, kElements, p.x, p.y, p.weight.data, p.bias.data)),
        sliced(RowSlices::cut<T>(rows, cols, kVectors, kElements, p.x, p.y, p.weight.data, p.bias.data)) {}

  int64_t doubles() const { return held.held() || sliced.slices == 1 ? 0 : 2 * sliced.rows * sliced.slices; }
};

// workspace: as many doubles as the cut says.
template <typename X, typename T>
void layer_norm_forward(const LayerNormForward<X, T>& p, const LayerNormForwardCut<X, T>& cut, double* workspace, Stream stream) {
  constexpr int V = kVector<T>;
  if (const RowGroups& held = cut.held; held.held())
    return launch(held.vector ? ln_rows_fwd_kernel<X, T, V> : ln_rows_fwd_kernel<X, T, 1>,
                  dim3(static_cast<unsigned>(divup(held.rows, held.groups()))), dim3(held.block), 0, stream, p, held);
  const RowSlices& sliced = cut.sliced;
  Moments* const partial = reinterpret_cast<Moments*>(workspace);
  launch(sliced.vector ? ln_slices_fwd_kernel<X, T, V> : ln_slices_fwd_kernel<X, T, 1>, sliced.grid(), dim3(kSliceThreads), 0, stream, p,
         sliced, partial);
  if (sliced.slices > 1)
    launch(sliced.vector ? ln_slices_join_kernel<X, T, V> : ln_slices_join_kernel<X, T, 1>, sliced.grid(), dim3(kSliceThreads), 0, stream,
           p, sliced, partial);
}

template <typename X, typename T>
struct LayerNormBackwardCut {
  using S = compute_t<T>;
  static constexpr int V = kVector<T>, kSliceVectors = kForwardVectors<T, V> / 2, kSliceElements = kForwardVectors<T, 1> / 2;
  bool dx, parameters;
  RowGroups held;
  RowSlices sliced;
  RowTiles tiled;

  LayerNormBackwardCut(const LayerNormBackward<X, T>& p, bool parameters, int64_t rows, int64_t cols)
      : dx(p.dx != nullptr),
        parameters(parameters),
        held(RowGroups::cut<T>(rows, cols, kBackwardVectors<T, V>, kBackwardVectors<T, 1>, p.dy, p.x, p.dx, p.weight.data)),
        sliced(RowSlices::cut<T>(rows, cols, kSliceVectors, kSliceElements, p.dy, p.x, p.dx, p.weight.data)),
        tiled(RowTiles::cut(rows, cols, sliced.vector ? V : 1)) {}

  // Of each kind; all that is not doubles is of the arithmetic type.
  int64_t slice_sums() const { return held.held() || !dx ? 0 : 2 * sliced.rows * sliced.slices; }
  int64_t means() const { return held.held() || !dx ? 0 : 2 * sliced.rows; }
  int64_t parts() const { return !parameters ? 0 : held.held() ? held.strips : tiled.strips; }
  int64_t doubles() const { return slice_sums() + means() + 2 * parts() * sliced.cols; }
};

template <typename X, typename T>
void layer_norm_backward(const LayerNormBackward<X, T>& p, const LayerNormParameterGradients<T>& gradients,
                         const LayerNormBackwardCut<X, T>& cut, double* workspace, Stream stream) {
  using S = compute_t<T>;
  constexpr int V = kVector<T>;
  S* const partial = cut.parameters ? reinterpret_cast<S*>(workspace + cut.slice_sums() + cut.means()) : nullptr;
  if (const RowGroups& held = cut.held; held.held()) {
    launch(held.vector ? ln_rows_bwd_kernel<X, T, V> : ln_rows_bwd_kernel<X, T, 1>, dim3(static_cast<unsigned>(held.strips)),
           dim3(held.block), held.scratch_bytes(held.vector ? V : 1), stream, p, gradients, held, partial);
    if (held.strips == 1) return;
  } else {
    const RowSlices& sliced = cut.sliced;
    Means<S>* const means = reinterpret_cast<Means<S>*>(workspace + cut.slice_sums());
    if (cut.dx) {
      launch(sliced.vector ? ln_slices_bwd_kernel<X, T, V> : ln_slices_bwd_kernel<X, T, 1>, sliced.grid(), dim3(kSliceThreads), 0, stream,
             p, sliced, workspace);
      launch(ln_slices_means_kernel<S>, dim3(static_cast<unsigned>(divup(sliced.rows, kSliceThreads / kWarp))), dim3(kSliceThreads),
             0, stream, p.rstd, workspace, means, sliced);
    }
    launch(sliced.vector ? ln_tiles_bwd_kernel<X, T, V> : ln_tiles_bwd_kernel<X, T, 1>, cut.tiled.grid(), dim3(kTileVectors * kTileRows), 0,
           stream, p, cut.tiled, means, partial);
  }
  if (cut.parameters) layer_norm_finish(gradients, partial, cut.parts(), cut.sliced.cols, stream);
}

}  // namespace cnnkern::gpu
