// bn_act and bn_act_backward on CUDA tensors. The kernels stand in bn_act.cuh.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "autograd/activation.h"
#include "check.h"
#include "cuda/bn_act.cuh"
#include "memory_layout.h"

namespace cnnkern {
namespace {

gpu::Layout layout_of(const Tensor& x) {  // x from in_layout
  const int64_t N = x.size(0), C = x.size(1), HW = x.numel() / (N * C);
  return {HW == 1 || !x.is_contiguous(), N, C, HW};
}

template <typename T>
gpu::ChannelVector<T> channel_vector(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, false};
  return {t.data_ptr(), t.stride(0), t.scalar_type() == at::kFloat};
}

template <typename T>
gpu::Parameters<T> parameters(const OptionalTensor& weight, const OptionalTensor& bias) {
  return {channel_vector<T>(tensor_or_undefined(weight)), channel_vector<T>(tensor_or_undefined(bias))};
}

template <typename F>
void with_types(const char* op, const Tensor& x, std::string_view act, F&& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    with_relu_or_none(op, act, [&](auto activation) { f(scalar_t{}, activation); });
  });
}

template <typename P>
void reduce_and_map(const P& p, const gpu::Cut<typename P::Scalar>& cut, const Tensor& x) {
  const Tensor workspace = at::empty({cut.workspace()}, x.options().dtype(at::kDouble));
  gpu::reduce_and_map(p, cut, workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_cuda(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                               bool training, double momentum, double eps, c10::string_view act) {
  check_batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps);
  check_activation("cnnkern::bn_act", act);
  if (act != "relu" && act != "none") {
    auto [pre, mean, rstd] = bn_act_cuda(x, weight, bias, running_mean, running_var, training, momentum, eps, "none");
    return {activation_by_pytorch(pre, act), mean, rstd};
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_layout(x);
  Tensor y = at::empty_like(x_);
  Tensor mean = at::empty({x.size(1)}, x.options().dtype(at::kDouble)), rstd = at::empty_like(mean);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  const gpu::Layout layout = layout_of(x_);
  with_types("cnnkern::bn_act", x_, act, [&](auto scalar, auto activation) {
    using T = decltype(scalar);
    const gpu::BnActForward<T, decltype(activation)> forward{
        {.x = x_.const_data_ptr<T>(),
         .mean = mean.mutable_data_ptr<double>(),
         .rstd = rstd.mutable_data_ptr<double>(),
         .view = gpu::ChannelView(layout),
         .running_mean = channel_vector<T>(tensor_or_undefined(running_mean)),
         .running_var = channel_vector<T>(tensor_or_undefined(running_var)),
         .momentum = momentum,
         .eps = eps},
        y.mutable_data_ptr<T>(),
        parameters<T>(weight, bias),
        training};
    const gpu::Cut<T> cut(layout, training, forward.x, forward.y);
    if (training)
      reduce_and_map(forward, cut, x);
    else
      gpu::map(forward, cut, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_cuda(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const Tensor& mean,
                                                        const Tensor& rstd, bool training, c10::string_view act,
                                                        std::array<bool, 3> output_mask) {
  check_batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, mean, rstd, output_mask);
  check_relu_or_none("cnnkern::bn_act_backward", act);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_layout(x), dy_ = in_layout_of(dy, x_);
  const auto like = [&](bool wanted, const Tensor& t) { return wanted ? at::empty_like(t) : at::empty({0}, t.options()); };
  Tensor dx = like(output_mask[0], x_);
  Tensor dweight = like(output_mask[1], output_mask[1] ? *weight : x_);
  Tensor dbias = like(output_mask[2], output_mask[2] ? *bias : x_);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_()};
  const gpu::Layout layout = layout_of(x_);
  with_types("cnnkern::bn_act_backward", x_, act, [&](auto scalar, auto activation) {
    using T = decltype(scalar);
    using S = gpu::compute_t<T>;
    const Tensor coefficients = at::empty({layout.C, 2}, x.options().dtype(c10::CppTypeToScalarType<S>::value));
    const auto run = [&](auto is_training) {
      const gpu::BnActBackward<T, decltype(activation), decltype(is_training)::value> backward{
          .dy = dy_.const_data_ptr<T>(),
          .x = x_.const_data_ptr<T>(),
          .dx = output_mask[0] ? dx.mutable_data_ptr<T>() : nullptr,
          .mean = mean.const_data_ptr<double>(),
          .rstd = rstd.const_data_ptr<double>(),
          .count = layout.N * layout.HW,
          .parameters = parameters<T>(weight, bias),
          .dweight = channel_vector<T>(output_mask[1] ? dweight : Tensor()),
          .dbias = channel_vector<T>(output_mask[2] ? dbias : Tensor()),
          .coefficients = coefficients.mutable_data_ptr<S>()};
      reduce_and_map(backward, gpu::Cut<T>(layout, training, backward.dy, backward.x, backward.dx), x);
    };
    if (training)
      run(std::true_type{});
    else
      run(std::false_type{});
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dx, dweight, dbias};
}

}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, CUDA, m) {
  m.impl("bn_act", &cnnkern::bn_act_cuda);
  m.impl("bn_act_backward", &cnnkern::bn_act_backward_cuda);
}
