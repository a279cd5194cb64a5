// bn_add_act and bn_add_act_backward on CUDA tensors. The kernels stand in bn_add_act.cuh.
#include "aten.h"
#include "cuda/batch_norm/batch_norm.h"
#include "cuda/batch_norm/bn_add_act.cuh"
#include "cuda/mask.h"

namespace cnnkern {

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_cuda(const Tensor& x, const Tensor& residual,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const OptionalTensor& running_mean,
                                                           const OptionalTensor& running_var, bool training,
                                                           double momentum, double eps, c10::string_view act,
                                                           std::optional<double> act_param) {
  const char* op = "cnnkern::bn_add_act";
  check_batch_norm(op, x, weight, bias, running_mean, running_var, training, eps);
  check_same_shape(op, "residual", residual, x);
  check_activation(op, {act, act_param});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_batch_norm_layout(x), residual_ = in_layout_of(residual, x_), y = aten::empty_like(x_);
  const Tensor mean = aten::empty({x.size(1)}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean);
  // Zeros: vectors that share a byte add their bits to it.
  const Tensor mask = act == "relu" ? words_of_mask(x, [](int64_t n, const auto& options) { return aten::zeros({n}, options); })
                                    : aten::empty({0}, x.options().dtype(at::kByte));
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1), mask};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "bn_add_act", [&] {
    with_activation(op, {act, act_param}, [&](auto activation) {
      const gpu::BnAddActForward<scalar_t, decltype(activation)> forward{
          batch_norm_forward<scalar_t>(x_, weight, bias, running_mean, running_var, training, momentum, eps, y, mean, rstd),
          residual_.const_data_ptr<scalar_t>(),
          activation,
          {words(mask)}};
      launch_forward<scalar_t>(forward, x_, forward.x, forward.residual, forward.y);
    });
  });
  return {in_strides_of_sum(y, x_, residual, act), mean, rstd, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_backward_cuda(const Tensor& dy, const Tensor& x,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& bias, const Tensor& mean,
                                                                    const Tensor& rstd, const Tensor& mask, bool channels_last,
                                                                    bool training, c10::string_view act,
                                                                    std::array<bool, 4> output_mask,
                                                                    const OptionalTensor& residual,
                                                                    std::optional<double> act_param) {
  const char* op = "cnnkern::bn_add_act_backward";
  check_batch_norm_backward(op, dy, x, weight, bias, /*reads_bias=*/recomputes_sum(act), mean, rstd,
                            {output_mask[0], output_mask[2], output_mask[3]});
  check_activation(op, {act, act_param});
  check_saved_residual(op, act, residual, x);
  check_channels_last(op, x, channels_last);
  check_mask(op, mask, act == "relu" ? mask_bytes(x.numel()) : 0, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = laid_out(x, channels_last), dy_ = in_layout_of(dy, x_);
  const Tensor residual_ = recomputes_sum(act) ? in_layout_of(*residual, x_) : Tensor();
  const BatchNormGradients gradients = {gradient_like(output_mask[0], x_), gradient_like(output_mask[1], x_),
                                        parameter_gradient(output_mask[2], weight, x_), parameter_gradient(output_mask[3], bias, x_)};
  if (x.numel() == 0) {
    zero(gradients);
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "bn_add_act_backward", [&] {
      const auto through = [&](const auto& gate) {
        launch_backward<scalar_t>(gate, dy_, x_, weight, bias, mean, rstd, training, gradients);
      };
      if (act == "relu")
        through(gpu::ThroughMask{{}, {mask.const_data_ptr<uint8_t>()}});
      else if (act == "none")
        through(gpu::ThroughNothing{});
      else
        through(gpu::ThroughActivationOfSum<scalar_t, OtherActivation>{{}, other_activation(op, {act, act_param}),
                                                                       residual_.const_data_ptr<scalar_t>()});
    });
  }
  return {or_empty(gradients.dx, x), or_empty(gradients.dresidual, x), or_empty(gradients.dweight, x),
          or_empty(gradients.dbias, x)};
}

}  // namespace cnnkern
