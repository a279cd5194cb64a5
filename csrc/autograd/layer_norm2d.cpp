// The derivative of layer_norm2d: of first order by the gradient operator's kernel; of second order, in forward mode
// and under torch.func transforms by PyTorch's own operators.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd/layer_norm.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::layer_norm2d", "")
                             .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                                       const OptionalTensor&, double)>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::layer_norm2d_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                    const OptionalTensor&, const Tensor&, const Tensor&,
                                                    std::array<bool, 3>)>();
  return op;
}

// A vector of C as it is broadcast against (N, C, H, W).
Tensor over_channels(const Tensor& t) { return t.defined() ? t.unsqueeze(-1).unsqueeze(-1) : t; }

// Second order: differentiates a composite of PyTorch's operators twice.
struct LayerNorm2dBackward : torch::autograd::Function<LayerNorm2dBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                               std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias] = backward_op().call(dy, x, weight, bias, mean, rstd, output_mask);
    ctx->save_for_backward({dy, x, tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd});
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs = {saved[0], saved[1], saved[2], saved[3]};  // dy, x, weight, bias
    variable_list out = second_order(inputs, needs_grad(ctx, inputs), grads, [&](const variable_list& v) {
      return layer_norm_composite(v[1], over_channels(v[2]), over_channels(v[3]), saved[4], saved[5], {1});
    });
    out.resize(7);
    return out;
  }
};

struct LayerNorm2d : torch::autograd::Function<LayerNorm2d> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd] = forward_op().call(x, weight, bias, eps);
    ctx->save_for_backward({x, tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd});
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);  // those of mean and rstd are never read
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const Tensor &weight = saved[1], &bias = saved[2];
    const auto needs = needs_grad(ctx, {saved[0], weight, bias});
    auto [dx, dweight, dbias] = backward_op().call(grads[0], saved[0], optional_of(weight), optional_of(bias), saved[3],
                                                   saved[4], {needs[0], needs[1], needs[2]});
    variable_list out(4);
    if (needs[0]) out[0] = dx;
    if (needs[1]) out[1] = dweight;
    if (needs[2]) out[2] = dbias;
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_by_pytorch(const Tensor& x, const OptionalTensor& weight,
                                                           const OptionalTensor& bias, double eps) {
  const Tensor y = at::layer_norm_symint(x.permute({0, 2, 3, 1}), {x.sym_size(1)}, weight, bias, eps);
  return without_statistics(y.permute({0, 3, 1, 2}), x);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_autograd(const Tensor& x, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, double eps) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (left_to_pytorch(x, kBuiltWithCuda) || has_tangent(x) || has_tangent(w) || has_tangent(b))
    return layer_norm2d_by_pytorch(x, weight, bias, eps);
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    auto out = LayerNorm2d::apply(x, weight, bias, eps);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return forward_op().call(x, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_backward_autograd(const Tensor& dy, const Tensor& x,
                                                                  const OptionalTensor& weight,
                                                                  const OptionalTensor& bias, const Tensor& mean,
                                                                  const Tensor& rstd, std::array<bool, 3> output_mask) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    auto out = LayerNorm2dBackward::apply(dy, x, weight, bias, mean, rstd, output_mask);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, weight, bias, mean, rstd, output_mask);
}

// On a GPU autocast runs layer norm in float32, as PyTorch's own; on a CPU it leaves both alone.
std::tuple<Tensor, Tensor, Tensor> layer_norm2d_autocast_cuda(const Tensor& x, const OptionalTensor& weight,
                                                                  const OptionalTensor& bias, double eps) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, c10::DeviceType::CUDA); };
  return forward_op().call(cast(x), cast(weight), cast(bias), eps);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("layer_norm2d", &cnnkern::layer_norm2d_autograd);
  m.impl("layer_norm2d_backward", &cnnkern::layer_norm2d_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, AutocastCUDA, m) { m.impl("layer_norm2d", &cnnkern::layer_norm2d_autocast_cuda); }
TORCH_LIBRARY_IMPL(cnnkern, FuncTorchBatched, m) { m.impl("layer_norm2d", &cnnkern::layer_norm2d_by_pytorch); }
#ifndef CNNKERN_CUDA
TORCH_LIBRARY_IMPL(cnnkern, CUDA, m) { m.impl("layer_norm2d", &cnnkern::layer_norm2d_by_pytorch); }
#endif
