// bn_prelu and bn_prelu_backward on CUDA tensors. The kernels are in bn_prelu.cuh.
#include "aten.h"
#include "cuda/batch_norm/batch_norm.h"
#include "cuda/batch_norm/bn_prelu.cuh"

namespace cnnkern {
namespace {

// A slope per channel; a single one is read with a stride of 0.
template <typename T>
gpu::ChannelVector<T> slopes_of(const Tensor& slope, int64_t channels) {
  return channel_vector<T>(slope.expand({channels}));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_prelu_cuda(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& slope, const OptionalTensor& running_mean,
                                                 const OptionalTensor& running_var, bool training, double momentum, double eps) {
  const char* op = "cnnkern::bn_prelu";
  check_batch_norm(op, x, weight, bias, running_mean, running_var, training, eps);
  check_slope(op, slope, x);
  const bool adds = tensor_or_undefined(residual).defined();
  if (adds) check_same_shape(op, "residual", *residual, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_batch_norm_layout(x), residual_ = adds ? in_layout_of(*residual, x_) : Tensor(), y = aten::empty_like(x_);
  const Tensor mean = aten::empty({x.size(1)}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean);
  const auto result = [&] { return adds ? in_strides_of_sum(y, x_, *residual, "prelu") : y; };
  if (x.numel() == 0) return {result(), mean.zero_(), rstd.fill_(1)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "bn_prelu", [&] {
    const gpu::BnPReluForward<scalar_t> forward{
        batch_norm_forward<scalar_t>(x_, weight, bias, running_mean, running_var, training, momentum, eps, y, mean, rstd),
        adds ? residual_.const_data_ptr<scalar_t>() : nullptr, slopes_of<scalar_t>(slope, x.size(1))};
    launch_forward<scalar_t>(forward, x_, forward.x, forward.residual, forward.y);
  });
  return {result(), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_prelu_backward_cuda(
    const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& slope, const Tensor& mean, const Tensor& rstd, bool channels_last, bool training,
    std::array<bool, 5> output_mask) {
  check_bn_prelu_backward("cnnkern::bn_prelu_backward", dy, x, residual, weight, bias, slope, mean, rstd, channels_last, output_mask);
  const bool adds = tensor_or_undefined(residual).defined();
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = laid_out(x, channels_last), dy_ = in_layout_of(dy, x_), residual_ = adds ? in_layout_of(*residual, x_) : Tensor();
  const BatchNormGradients gradients = {gradient_like(output_mask[0], x_), gradient_like(output_mask[1], x_),
                                        parameter_gradient(output_mask[2], weight, x_), parameter_gradient(output_mask[3], bias, x_)};
  Tensor dslope = output_mask[4] ? aten::empty_like(slope) : Tensor();
  if (x.numel() == 0) {
    zero(gradients);
    if (dslope.defined()) dslope.zero_();
  } else {
    const bool single = dslope.defined() && slope.numel() != x.size(1);
    const Tensor sums = single ? aten::empty({x.size(1)}, mean.options()) : Tensor();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "bn_prelu_backward", [&] {
      const gpu::ThroughPRelu<scalar_t> gate{adds ? residual_.const_data_ptr<scalar_t>() : nullptr,
                                             slopes_of<scalar_t>(slope, x.size(1)),
                                             channel_vector<scalar_t>(dslope.defined() && !single ? dslope.view({-1}) : Tensor()),
                                             single ? sums.mutable_data_ptr<double>() : nullptr};
      launch_backward<scalar_t>(gate, dy_, x_, weight, bias, mean, rstd, training, gradients);
    });
    if (single) dslope.view({-1}).copy_(aten::sum(sums, {0}));
  }
  return {or_empty(gradients.dx, x), or_empty(gradients.dresidual, x), or_empty(gradients.dweight, x),
          or_empty(gradients.dbias, x), or_empty(dslope, x)};
}

}  // namespace cnnkern
