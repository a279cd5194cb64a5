// layer_norm and layer_norm_backward on CUDA tensors. The kernels are in layer_norm.cuh.
#include "cuda/layer_norm/layer_norm.cuh"

#include "cuda/layer_norm/layer_norm.h"

namespace cnnkern {

void launch_layer_norm_rows(const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
                            const Tensor& mean, const Tensor& rstd) {
  with_layer_norm_types(x, y, [&](auto types) {
    const auto forward = layer_norm_forward(types, x, weight, bias, eps, y, mean, rstd);
    const gpu::LayerNormForwardCut cut(forward, x.numel() / cols, cols);
    const Tensor workspace = workspace_of(cut.doubles(), x);
    gpu::layer_norm_forward(forward, cut, workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void launch_layer_norm_rows_backward(const Tensor& dy, const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& mean,
                                     const Tensor& rstd, const LayerNormGradients& gradients) {
  with_layer_norm_types(x, dy, [&](auto types) {
    const auto backward = layer_norm_backward(types, dy, x, weight, mean, rstd, gradients.dx);
    const gpu::LayerNormBackwardCut cut(backward, gradients.of_parameters(), x.numel() / cols, cols);
    const Tensor workspace = workspace_of(cut.doubles(), x);
    gpu::layer_norm_backward(backward, parameter_gradients(types, gradients), cut, workspace.mutable_data_ptr<double>(),
                             c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, at::IntArrayRef normalized_shape,
                                                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                   bool wide) {
  check_layer_norm("cnnkern::layer_norm", x, normalized_shape, weight, bias, wide);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = with_plain_strides(x.contiguous()), y = empty_result(x_, wide);
  const auto [mean, rstd] = empty_statistics(x_, x.dim() - static_cast<int64_t>(normalized_shape.size()), x.dim());
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  launch_layer_norm_rows(x_, c10::multiply_integers(normalized_shape), dense(weight), dense(bias), eps, y, mean, rstd);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(const Tensor& dy, const Tensor& x,
                                                            at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& mean,
                                                            const Tensor& rstd, std::array<bool, 3> output_mask) {
  const char* op = "cnnkern::layer_norm_backward";
  check_layer_norm(op, x, normalized_shape, weight, bias, is_wide(dy, x));
  const int64_t first = x.dim() - static_cast<int64_t>(normalized_shape.size());
  check_layer_norm_saved(op, dy, x, statistics_shape(x, first, x.dim()), weight, bias, mean, rstd, output_mask);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = with_plain_strides(x.contiguous()), dy_ = dy.contiguous();
  const LayerNormGradients gradients(x_, normalized_shape, weight, bias, output_mask);
  if (x.numel() == 0) return gradients.zeros(x);
  launch_layer_norm_rows_backward(dy_, x_, c10::multiply_integers(normalized_shape), dense(weight), mean, rstd, gradients);
  return gradients.tuple(x);
}

}  // namespace cnnkern
