// The derivative of bn_add_act: of first order by the gradient operator's kernel; of second order, in forward mode
// and under torch.func transforms by PyTorch's own operators, which have formulas for all of them.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"
#include "autograd/strides.h"
#include "memory_layout.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

const auto& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::bn_add_act", "")
          .typed<Four(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, bool, double, double, c10::string_view)>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::bn_add_act_backward", "")
          .typed<Four(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                      const Tensor&, const Tensor&, bool, bool, c10::string_view, std::array<bool, 4>)>();
  return op;
}

// A mask as 0 and 1 in the shape and dtype of x.
Tensor unpacked(const Tensor& mask, const Tensor& x, bool channels_last) {
  const Tensor shifts = at::arange(8, mask.options());
  const Tensor flat = mask.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and(1).flatten().narrow_symint(0, 0, x.sym_numel());
  if (!channels_last) return flat.view_symint(x.sym_sizes()).to(x.scalar_type());
  std::vector<c10::SymInt> rows = x.sym_sizes().vec();
  rows.erase(rows.begin() + 1);
  rows.push_back(x.sym_size(1));
  return flat.view_symint(rows).movedim(-1, 1).to(x.scalar_type());
}

// Second order: differentiates PyTorch's batch norm twice. The mask does not change, and nothing depends on the
// residual but through it.
struct BnAddActBackward : torch::autograd::Function<BnAddActBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& mask,
                               bool channels_last, bool training, std::string act, std::array<bool, 4> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dresidual, dweight, dbias] =
        backward_op().call(dy, x, weight, bias, mean, rstd, mask, channels_last, training, act, output_mask);
    ctx->save_for_backward({dy, x, tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd, mask});
    ctx->saved_data["dbias"] = output_mask[3];
    ctx->saved_data["channels_last"] = channels_last;
    ctx->saved_data["training"] = training;
    ctx->saved_data["relu"] = act == "relu";
    return {dx, dresidual, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs = {saved[0], saved[1], saved[2], saved[3]};  // dy, x, weight, bias
    const auto needs = needs_grad(ctx, inputs);
    const Tensor bias = bias_or_zeros(saved[3], ctx->saved_data["dbias"].toBool(), saved[4], saved[4].sym_sizes());
    const variable_list out = second_order(
        {inputs[0], inputs[1], at::zeros_like(inputs[1]), inputs[2], bias},
        {needs[0], needs[1], false, needs[2], needs[3]}, grads, [&](const variable_list& v) {
          const Tensor y =
              v[2] + bn_act_composite(v[1], v[3], v[4], saved[4], saved[5], ctx->saved_data["training"].toBool(), "none");
          return ctx->saved_data["relu"].toBool() ? y * unpacked(saved[6], v[1], ctx->saved_data["channels_last"].toBool()) : y;
        });
    variable_list result = {out[0], out[1], out[3], out[4]};
    result.resize(11);
    return result;
  }
};

struct BnAddAct {
  static constexpr const char* kName = "BnAddAct";
  static constexpr size_t kInputs = 4;  // x, residual, weight, bias
  bool training;
  std::string act;
  bool channels_last;  // the order of the mask
  Strides strides;     // of y

  RecipePointer recipe(const variable_list& inputs, const variable_list& of_results) const {
    return recipe_of_batch_norm(inputs[0], inputs[1], inputs[2], inputs[3], of_results[1], of_results[2], act);
  }

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 4>& needs) const {
    // Without an activation the residual's gradient is dy itself.
    const std::array<bool, 4> mask = {needs[0], needs[1] && act != "none", needs[2], needs[3]};
    variable_list out(4);
    if (mask[0] || mask[1] || mask[2] || mask[3]) {
      const Tensor& x = saved[0];
      auto [dx, dresidual, dweight, dbias] =
          backward_op().call(dy, x, optional_of(saved[1]), std::nullopt, saved[3].contiguous(), saved[4].contiguous(),
                             saved[2].contiguous(), channels_last, training, act, mask);
      if (mask[0]) out[0] = in_strides_of_batch_norm_gradient(dx, x, dy, strides, act);
      if (mask[1]) out[1] = strides.empty() ? dresidual : restrided(dresidual, strides_of_gradient(dy, strides, act));
      out[2] = mask[2] ? dweight : Tensor(), out[3] = mask[3] ? dbias : Tensor();
    }
    if (needs[1] && !mask[1]) out[1] = dy;
    return out;
  }
};

Four bn_add_act_by_pytorch(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, bool training, double momentum, double eps,
                           c10::string_view act) {
  constexpr const char* op = "cnnkern::bn_add_act";
  check_relu_or_none(op, act);
  if (has_numbers(x) && has_numbers(residual)) check_same_shape(op, "residual", residual, x);
  auto [pre, mean, rstd] =
      batch_norm_by_pytorch(op, x, weight, bias, running_mean, running_var, training, momentum, eps, "none");
  return {activation_by_pytorch(pre + residual, act), mean, rstd, at::empty({0}, x.options().dtype(at::kByte))};
}

Four bn_add_act_autograd(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, bool training, double momentum, double eps,
                         c10::string_view act) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (has_tangent(x) || has_tangent(residual) || has_tangent(w) || has_tangent(b))
    return bn_add_act_by_pytorch(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, act);
  check_statistics_want_no_gradient("cnnkern::bn_add_act", running_mean, running_var);
  const bool records =
      at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(residual) || requires_grad(w) || requires_grad(b));
  const RunningStatistics statistics(training, running_mean, running_var, records);
  const auto forward = [&] {
    return forward_op().call(x, residual, weight, bias, statistics.mean(), statistics.var(), training, momentum, eps, act);
  };
  if (records) {
    const auto describe = [&](const Four& results) {
      const auto& [y, mean, rstd, mask] = results;
      return std::pair(BnAddAct{training, std::string(act), batch_norm_in_rows(x), strides_of(y)},
                       variable_list{mask, mean, rstd});
    };
    return recorded<BnAddAct>({x, residual, w, b}, {x, w}, forward, describe, [&] { statistics.settle(); });
  }
  at::AutoDispatchBelowADInplaceOrView below;
  auto results = forward();
  statistics.settle();
  return results;
}

Four bn_add_act_backward_autograd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                  const Tensor& mask, bool channels_last, bool training,
                                  c10::string_view act, std::array<bool, 4> output_mask) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    auto out = BnAddActBackward::apply(dy, x, weight, bias, mean, rstd, mask, channels_last, training, std::string(act), output_mask);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, weight, bias, mean, rstd, mask, channels_last, training, act, output_mask);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("bn_add_act", &cnnkern::bn_add_act_autograd);
  m.impl("bn_add_act_backward", &cnnkern::bn_add_act_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("bn_add_act", &cnnkern::bn_add_act_by_pytorch); }
