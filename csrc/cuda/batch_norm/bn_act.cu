// bn_act and bn_act_backward on CUDA tensors. The kernels stand in bn_act.cuh.
#include "cuda/batch_norm/batch_norm.h"
#include "cuda/batch_norm/bn_act.cuh"

namespace cnnkern {

std::tuple<Tensor, Tensor, Tensor> bn_act_cuda(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                               bool training, double momentum, double eps, c10::string_view act,
                                               std::optional<double> act_param) {
  check_batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps);
  check_activation("cnnkern::bn_act", {act, act_param});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_batch_norm_layout(x), y = batch_norm_result(x_, act);
  const Tensor mean = aten::empty({x.size(1)}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "bn_act", [&] {
    with_device_activation("cnnkern::bn_act", {act, act_param}, [&](auto activation) {
      const gpu::BnActForward<scalar_t, decltype(activation)> forward{
          batch_norm_forward<scalar_t>(x_, weight, bias, running_mean, running_var, training, momentum, eps, y, mean, rstd),
          activation};
      launch_forward<scalar_t>(forward, x_, forward.x, forward.y);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_cuda(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const Tensor& mean,
                                                        const Tensor& rstd, bool training, c10::string_view act,
                                                        std::array<bool, 3> output_mask, std::optional<double> act_param) {
  check_batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, /*reads_bias=*/act != "none", mean, rstd, output_mask);
  check_activation("cnnkern::bn_act_backward", {act, act_param});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_batch_norm_layout(x), dy_ = in_layout_of(dy, x_);
  const BatchNormGradients gradients = {gradient_like(output_mask[0], x_), Tensor(), parameter_gradient(output_mask[1], weight, x_),
                                        parameter_gradient(output_mask[2], bias, x_)};
  if (x.numel() == 0) {
    zero(gradients);
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "bn_act_backward", [&] {
      with_device_activation("cnnkern::bn_act_backward", {act, act_param}, [&](auto activation) {
        const gpu::ThroughActivation<scalar_t, decltype(activation)> gate{{}, activation};
        launch_backward<scalar_t>(gate, dy_, x_, weight, bias, mean, rstd, training, gradients);
      });
    });
  }
  return {or_empty(gradients.dx, x), or_empty(gradients.dweight, x), or_empty(gradients.dbias, x)};
}

}  // namespace cnnkern
