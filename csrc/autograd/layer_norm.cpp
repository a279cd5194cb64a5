// The derivative of layer_norm: of first order by the gradient operator's kernel; of second order, in forward mode and
// under torch.func transforms by PyTorch's own operators.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd/layer_norm.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Shape = std::vector<c10::SymInt>;

const auto& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::layer_norm", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, c10::SymIntArrayRef, const OptionalTensor&,
                                                    const OptionalTensor&, double)>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::layer_norm_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, c10::SymIntArrayRef,
                                                    const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                                    const Tensor&, std::array<bool, 3>)>();
  return op;
}

// Second order: differentiates a composite of PyTorch's operators twice.
struct LayerNormBackward : torch::autograd::Function<LayerNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Shape& normalized_shape,
                               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                               const Tensor& rstd, std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias] = backward_op().call(dy, x, normalized_shape, weight, bias, mean, rstd, output_mask);
    ctx->save_for_backward({dy, x, tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd});
    ctx->saved_data["dims"] = static_cast<int64_t>(normalized_shape.size());
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    std::vector<int64_t> dims;
    for (int64_t d = ctx->saved_data["dims"].toInt(); d > 0; --d) dims.push_back(-d);
    const variable_list inputs = {saved[0], saved[1], saved[2], saved[3]};  // dy, x, weight, bias
    const variable_list found = second_order(inputs, needs_grad(ctx, inputs), grads, [&](const variable_list& v) {
      return layer_norm_composite(v[1], v[2], v[3], saved[4], saved[5], dims);
    });
    variable_list out(8);
    out[0] = found[0], out[1] = found[1], out[3] = found[2], out[4] = found[3];
    return out;
  }
};

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Shape& normalized_shape,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd] = forward_op().call(x, normalized_shape, weight, bias, eps);
    ctx->save_for_backward({x, tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd});
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);  // those of mean and rstd are never read
    ctx->saved_data["normalized_shape"] = c10::SymIntArrayRef(normalized_shape);
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(5);
    const auto saved = ctx->get_saved_variables();
    const Tensor &weight = saved[1], &bias = saved[2];
    const auto needs = needs_grad(ctx, {saved[0], weight, bias});
    auto [dx, dweight, dbias] =
        backward_op().call(grads[0], saved[0], ctx->saved_data["normalized_shape"].toSymIntVector(), optional_of(weight),
                           optional_of(bias), saved[3], saved[4], {needs[0], needs[1], needs[2]});
    variable_list out(5);
    if (needs[0]) out[0] = dx;
    if (needs[1]) out[2] = dweight;
    if (needs[2]) out[3] = dbias;
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_by_pytorch(const Tensor& x, c10::SymIntArrayRef normalized_shape,
                                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                                         double eps) {
  return without_statistics(at::layer_norm_symint(x, normalized_shape, weight, bias, eps), x);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_autograd(const Tensor& x, c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       double eps) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (left_to_pytorch(x, kBuiltWithCuda) || has_tangent(x) || has_tangent(w) || has_tangent(b))
    return layer_norm_by_pytorch(x, normalized_shape, weight, bias, eps);
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    auto out = LayerNorm::apply(x, normalized_shape.vec(), weight, bias, eps);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return forward_op().call(x, normalized_shape, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_autograd(const Tensor& dy, const Tensor& x,
                                                                c10::SymIntArrayRef normalized_shape,
                                                                const OptionalTensor& weight, const OptionalTensor& bias,
                                                                const Tensor& mean, const Tensor& rstd,
                                                                std::array<bool, 3> output_mask) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    auto out = LayerNormBackward::apply(dy, x, normalized_shape.vec(), weight, bias, mean, rstd, output_mask);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, normalized_shape, weight, bias, mean, rstd, output_mask);
}

// On a GPU autocast runs layer norm in float32, as PyTorch's own; on a CPU it leaves both alone.
std::tuple<Tensor, Tensor, Tensor> layer_norm_autocast_cuda(const Tensor& x, c10::SymIntArrayRef normalized_shape,
                                                                const OptionalTensor& weight, const OptionalTensor& bias,
                                                                double eps) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, c10::DeviceType::CUDA); };
  return forward_op().call(cast(x), normalized_shape, cast(weight), cast(bias), eps);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("layer_norm", &cnnkern::layer_norm_autograd);
  m.impl("layer_norm_backward", &cnnkern::layer_norm_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, AutocastCUDA, m) { m.impl("layer_norm", &cnnkern::layer_norm_autocast_cuda); }
TORCH_LIBRARY_IMPL(cnnkern, FuncTorchBatched, m) { m.impl("layer_norm", &cnnkern::layer_norm_by_pytorch); }
#ifndef CNNKERN_CUDA
TORCH_LIBRARY_IMPL(cnnkern, CUDA, m) { m.impl("layer_norm", &cnnkern::layer_norm_by_pytorch); }
#endif
