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
                      const OptionalTensor&, bool, double, double, c10::string_view, std::optional<double>)>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::bn_add_act_backward", "")
          .typed<Four(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                      const Tensor&, const Tensor&, bool, bool, c10::string_view, std::array<bool, 4>, const OptionalTensor&,
                      std::optional<double>)>();
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

// Second order: differentiates PyTorch's batch norm twice. The mask of a ReLU is constant, and only it depends on the residual.
// For other activations `residual` is an input too, after x.
struct BnAddActBackward : torch::autograd::Function<BnAddActBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                               const Tensor& mask, bool channels_last, bool training, std::string act,
                               std::array<bool, 4> output_mask, std::optional<double> act_param) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dresidual, dweight, dbias] = backward_op().call(dy, x, weight, bias, mean, rstd, mask, channels_last, training, act,
                                                              output_mask, residual, act_param);
    ctx->save_for_backward({dy, x, tensor_or_undefined(residual), tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd,
                            mask});
    ctx->saved_data["dbias"] = output_mask[3];
    ctx->saved_data["channels_last"] = channels_last;
    ctx->saved_data["training"] = training;
    ctx->saved_data["act"] = std::move(act);
    ctx->saved_data["act_param"] = act_param;
    return {dx, dresidual, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &mean = saved[5], &rstd = saved[6], &mask = saved[7];
    variable_list inputs(saved.begin(), saved.begin() + 5);  // dy, x, residual, weight, bias
    const auto needs = needs_grad(ctx, inputs);
    if (!inputs[2].defined()) inputs[2] = at::zeros_like(inputs[1]);
    inputs[4] = bias_or_zeros(inputs[4], ctx->saved_data["dbias"].toBool(), mean, mean.sym_sizes());
    const ActivationName act = {ctx->saved_data["act"].toStringView(), ctx->saved_data["act_param"].toOptional<double>()};
    variable_list out = second_order(inputs, needs, grads, [&](const variable_list& v) {
      const Tensor y = v[2] + bn_act_composite(v[1], v[3], v[4], mean, rstd, ctx->saved_data["training"].toBool(), {"none", {}});
      if (act.name == "relu") return y * unpacked(mask, v[1], ctx->saved_data["channels_last"].toBool());
      return activation_by_pytorch(y, act);
    });
    out.resize(13);
    return out;
  }
};

struct BnAddAct {
  static constexpr const char* kName = "BnAddAct";
  static constexpr size_t kInputs = 4;  // x, residual, weight, bias
  bool training;
  std::string act;
  std::optional<double> act_param;
  bool channels_last;  // the order of the mask
  Strides strides;     // of what PyTorch's gradient of the activation reads

  RecipePointer recipe(const variable_list& inputs, const variable_list& of_results) const {
    return recipe_of_batch_norm(inputs[0], inputs[1], inputs[2], inputs[3], of_results[1], of_results[2], act, act_param);
  }

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 4>& needs) const {
    // Without an activation the residual's gradient is dy itself.
    const std::array<bool, 4> wanted = {needs[0], needs[1] && act != "none", needs[2], needs[3]};
    variable_list out(4);
    if (wanted[0] || wanted[1] || wanted[2] || wanted[3]) {
      const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &residual = saved[3];
      auto [dx, dresidual, dweight, dbias] = backward_op().call(
          dy, x, optional_of(weight), optional_of(bias), saved[5].contiguous(), saved[6].contiguous(), saved[4].contiguous(),
          channels_last, training, act, wanted, optional_of(residual), act_param);
      if (wanted[0]) out[0] = in_strides_of_batch_norm_gradient(dx, x, dy, strides, act);
      if (wanted[1]) out[1] = strides.empty() ? dresidual : restrided(dresidual, strides_of_gradient(dy, strides, act));
      out[2] = wanted[2] ? dweight : Tensor(), out[3] = wanted[3] ? dbias : Tensor();
    }
    if (needs[1] && !wanted[1]) out[1] = dy;
    return out;
  }
};

Four bn_add_act_by_pytorch(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, bool training, double momentum, double eps,
                           c10::string_view act, std::optional<double> act_param) {
  constexpr const char* op = "cnnkern::bn_add_act";
  check_activation(op, {act, act_param});
  if (has_numbers(x) && has_numbers(residual)) check_same_shape(op, "residual", residual, x);
  auto [pre, mean, rstd] =
      batch_norm_by_pytorch(op, x, weight, bias, running_mean, running_var, training, momentum, eps, {"none", {}});
  return {activation_by_pytorch(pre + residual, {act, act_param}), mean, rstd, at::empty({0}, x.options().dtype(at::kByte))};
}

Four bn_add_act_autograd(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, bool training, double momentum, double eps,
                         c10::string_view act, std::optional<double> act_param) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (has_tangent(x) || has_tangent(residual) || has_tangent(w) || has_tangent(b))
    return bn_add_act_by_pytorch(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param);
  check_statistics_want_no_gradient("cnnkern::bn_add_act", running_mean, running_var);
  const bool records =
      at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(residual) || requires_grad(w) || requires_grad(b));
  const RunningStatistics statistics(training, running_mean, running_var, records);
  const auto forward = [&] {
    return forward_op().call(x, residual, weight, bias, statistics.mean(), statistics.var(), training, momentum, eps, act,
                             act_param);
  };
  if (records) {
    const auto describe = [&](const Four& results) {
      const auto& [y, mean, rstd, mask] = results;
      return std::pair(BnAddAct{training, std::string(act), act_param, batch_norm_in_rows(x),
                                reads_result(act) ? strides_of(y) : strides_of_plain_sum(x, residual)},
                       variable_list{mask, mean, rstd});
    };
    const bool recomputes = recomputes_sum(act);
    return recorded<BnAddAct>({x, residual, w, b}, {x, w, recomputes ? b : Tensor(), recomputes ? residual : Tensor()}, forward, describe, [&] { statistics.settle(); });
  }
  at::AutoDispatchBelowADInplaceOrView below;
  auto results = forward();
  statistics.settle();
  return results;
}

Four bn_add_act_backward_autograd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                  const Tensor& mask, bool channels_last, bool training,
                                  c10::string_view act, std::array<bool, 4> output_mask, const OptionalTensor& residual,
                                  std::optional<double> act_param) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias), &r = tensor_or_undefined(residual);
  if (at::GradMode::is_enabled() &&
      (requires_grad(dy) || requires_grad(x) || requires_grad(r) || requires_grad(w) || requires_grad(b))) {
    auto out = BnAddActBackward::apply(dy, x, residual, weight, bias, mean, rstd, mask, channels_last, training, std::string(act),
                                       output_mask, act_param);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, weight, bias, mean, rstd, mask, channels_last, training, act, output_mask, residual, act_param);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("bn_add_act", &cnnkern::bn_add_act_autograd);
  m.impl("bn_add_act_backward", &cnnkern::bn_add_act_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("bn_add_act", &cnnkern::bn_add_act_by_pytorch); }
