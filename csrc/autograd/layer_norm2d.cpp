// The derivative of layer_norm2d: of first order by the gradient operator's kernel; of second order, in forward mode
// and under torch.func transforms by PyTorch's own operators.
#include <torch/library.h>

#include "autograd/layer_norm.h"
#include "autograd/node.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::layer_norm2d", "")
                             .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                                       const OptionalTensor&, double, bool)>();
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
    ctx->saved_data["dbias"] = output_mask[2];
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list inputs = {saved[0], saved[1], saved[2], saved[3]};  // dy, x, weight, bias
    const auto needs = needs_grad(ctx, inputs);
    inputs[3] = bias_or_zeros(saved[3], ctx->saved_data["dbias"].toBool(), saved[4], saved[1].sym_sizes().slice(1, 1));
    variable_list out = second_order(inputs, needs, grads, [&](const variable_list& v) {
      return layer_norm_composite(v[0], v[1], over_channels(v[2]), over_channels(v[3]), saved[4], saved[5], {1});
    });
    out.resize(7);
    return out;
  }
};

struct LayerNorm2d {
  static constexpr const char* kName = "LayerNorm2d";
  static constexpr size_t kInputs = 3;  // x, weight, bias
  double eps;
  bool wide;

  RecipePointer recipe(const variable_list& inputs, const variable_list&) const {
    const auto forward = [op = *this](const Tensor& x, const auto& w, const auto& b) {
      return std::get<0>(forward_op().call(x, w, b, op.eps, op.wide));
    };
    return recipe_of_layer_norm(inputs[0], inputs[1], inputs[2], forward);
  }

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 3>& needs) const {
    auto [dx, dweight, dbias] =
        backward_op().call(dy, saved[0], optional_of(saved[1]), std::nullopt, saved[2].contiguous(), saved[3].contiguous(), needs);
    return {needs[0] ? dx : Tensor(), needs[1] ? dweight : Tensor(), needs[2] ? dbias : Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_by_pytorch(const Tensor& x, const OptionalTensor& weight,
                                                           const OptionalTensor& bias, double eps, bool wide) {
  const Tensor in = wide ? x.to(wide_type(x)) : x;
  const Tensor y = at::layer_norm_symint(in.permute({0, 2, 3, 1}), {x.sym_size(1)}, weight, bias, eps);
  return without_statistics(y.permute({0, 3, 1, 2}), x);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_autograd(const Tensor& x, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, double eps, bool wide) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (has_tangent(x) || has_tangent(w) || has_tangent(b))
    return layer_norm2d_by_pytorch(x, weight, bias, eps, wide);
  const auto forward = [&] { return forward_op().call(x, weight, bias, eps, wide); };
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b)))
    return recorded<LayerNorm2d>({x, w, b}, {x, w}, forward, [&](const auto& results) {
      return std::pair(LayerNorm2d{eps, wide}, variable_list{std::get<1>(results), std::get<2>(results)});
    });
  at::AutoDispatchBelowADInplaceOrView below;
  return forward();
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

std::tuple<Tensor, Tensor, Tensor> layer_norm2d_autocast(const Tensor& x, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, double eps, bool wide) {
  return under_autocast(x, weight, bias, wide, [&](const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, bool wide) {
    return forward_op().call(x, weight, bias, eps, wide);
  });
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, AutocastCUDA, m) { m.impl("layer_norm2d", &cnnkern::layer_norm2d_autocast); }
TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("layer_norm2d", &cnnkern::layer_norm2d_autograd);
  m.impl("layer_norm2d_backward", &cnnkern::layer_norm2d_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("layer_norm2d", &cnnkern::layer_norm2d_by_pytorch); }
