// layer_norm2d and layer_norm2d_backward on CUDA tensors. The kernels are in layer_norm2d.cuh.
#include "cuda/layer_norm/layer_norm2d.cuh"

#include "cuda/layer_norm/layer_norm.h"

namespace cnnkern {

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_cuda(const Tensor& x, const OptionalTensor& weight,
                                                     const OptionalTensor& bias, double eps, bool wide) {
  check_layer_norm2d("cnnkern::layer_norm2d", x, weight, bias, wide);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_layout(x), y = empty_result(x_, wide), w = dense(weight), b = dense(bias);
  const auto [mean, rstd] = empty_statistics(x_, 1, 2);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  const gpu::Layout layout = layout_of(x_);
  if (layout.rows) {
    launch_layer_norm_rows(x_, layout.C, w, b, eps, y, mean, rstd);
    return {y, mean, rstd};
  }
  with_layer_norm_types(x, y, [&](auto types) {
    gpu::layer_norm2d_forward(layer_norm_forward(types, x_, w, b, eps, y, mean, rstd), layout,
                              c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_backward_cuda(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, const Tensor& mean,
                                                              const Tensor& rstd, std::array<bool, 3> output_mask) {
  const char* op = "cnnkern::layer_norm2d_backward";
  check_layer_norm2d(op, x, weight, bias, is_wide(dy, x));
  check_layer_norm_saved(op, dy, x, statistics_shape(x, 1, 2), weight, bias, mean, rstd, output_mask);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_layout(x), dy_ = in_layout_of(dy, x_), w = dense(weight);
  const LayerNormGradients gradients(x_, x.sizes().slice(1, 1), weight, bias, output_mask);
  if (x.numel() == 0) return gradients.zeros(x);
  const gpu::Layout layout = layout_of(x_);
  if (layout.rows) {
    launch_layer_norm_rows_backward(dy_, x_, layout.C, w, mean, rstd, gradients);
    return gradients.tuple(x);
  }
  with_layer_norm_types(x, dy, [&](auto types) {
    const auto backward = layer_norm_backward(types, dy_, x_, w, mean, rstd, gradients.dx);
    const auto cut = gpu::layer_norm2d_backward_cut(backward, layout);
    const bool sums = gradients.of_parameters();
    const Tensor workspace = aten::empty({sums ? 2 * layout.C * cut.parts() : 0}, mean.options());
    gpu::layer_norm2d_backward(backward, parameter_gradients(types, gradients), cut,
                               sums ? workspace.mutable_data_ptr<typename decltype(backward)::S>() : nullptr,
                               c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return gradients.tuple(x);
}

}  // namespace cnnkern
