// The derivative of layer_norm: of first order by the gradient operator's kernel; of second order, in forward mode and
// under torch.func transforms by PyTorch's own operators.
#include <torch/library.h>

#include "autograd/layer_norm.h"
#include "autograd/node.h"

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
                                                    const OptionalTensor&, double, bool)>();
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
    ctx->saved_data["dbias"] = output_mask[2];
    ctx->saved_data["dims"] = static_cast<int64_t>(normalized_shape.size());
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    std::vector<int64_t> dims;
    for (int64_t d = ctx->saved_data["dims"].toInt(); d > 0; --d) dims.push_back(-d);
    variable_list inputs = {saved[0], saved[1], saved[2], saved[3]};  // dy, x, weight, bias
    const auto needs = needs_grad(ctx, inputs);
    const auto shape = saved[1].sym_sizes().slice(saved[1].dim() - dims.size());
    inputs[3] = bias_or_zeros(saved[3], ctx->saved_data["dbias"].toBool(), saved[4], shape);
    const variable_list found = second_order(inputs, needs, grads, [&](const variable_list& v) {
      return layer_norm_composite(v[0], v[1], v[2], v[3], saved[4], saved[5], dims);
    });
    variable_list out(8);
    out[0] = found[0], out[1] = found[1], out[3] = found[2], out[4] = found[3];
    return out;
  }
};

struct LayerNorm {
  static constexpr const char* kName = "LayerNorm";
  static constexpr size_t kInputs = 3;  // x, weight, bias
  int64_t dims;
  double eps;
  bool wide;

  RecipePointer recipe(const variable_list& inputs, const variable_list&) const {
    const auto forward = [op = *this](const Tensor& x, const auto& w, const auto& b) {
      return std::get<0>(forward_op().call(x, x.sym_sizes().slice(x.dim() - op.dims), w, b, op.eps, op.wide));
    };
    return recipe_of_layer_norm(inputs[0], inputs[1], inputs[2], forward);
  }

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 3>& needs) const {
    const Tensor& x = saved[0];
    auto [dx, dweight, dbias] = backward_op().call(dy, x, x.sym_sizes().slice(x.dim() - dims), optional_of(saved[1]),
                                                   std::nullopt, saved[2].contiguous(), saved[3].contiguous(), needs);
    return {needs[0] ? dx : Tensor(), needs[1] ? dweight : Tensor(), needs[2] ? dbias : Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_by_pytorch(const Tensor& x, c10::SymIntArrayRef normalized_shape,
                                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                                         double eps, bool wide) {
  const Tensor in = wide ? x.to(wide_type(x)) : x;
  return without_statistics(at::layer_norm_symint(in, normalized_shape, weight, bias, eps), x);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_autograd(const Tensor& x, c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       double eps, bool wide) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (has_tangent(x) || has_tangent(w) || has_tangent(b))
    return layer_norm_by_pytorch(x, normalized_shape, weight, bias, eps, wide);
  const auto forward = [&] { return forward_op().call(x, normalized_shape, weight, bias, eps, wide); };
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b)))
    return recorded<LayerNorm>({x, w, b}, {x, w}, forward, [&](const auto& results) {
      return std::pair(LayerNorm{static_cast<int64_t>(normalized_shape.size()), eps, wide},
                       variable_list{std::get<1>(results), std::get<2>(results)});
    });
  at::AutoDispatchBelowADInplaceOrView below;
  return forward();
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

std::tuple<Tensor, Tensor, Tensor> layer_norm_autocast(const Tensor& x, c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       double eps, bool wide) {
  return under_autocast(x, weight, bias, wide, [&](const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, bool wide) {
    return forward_op().call(x, normalized_shape, weight, bias, eps, wide);
  });
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, AutocastCUDA, m) { m.impl("layer_norm", &cnnkern::layer_norm_autocast); }
TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("layer_norm", &cnnkern::layer_norm_autograd);
  m.impl("layer_norm_backward", &cnnkern::layer_norm_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("layer_norm", &cnnkern::layer_norm_by_pytorch); }
