// The derivative of bn_act: of first order by the gradient operator's kernel; of second order, in forward mode and
// under torch.func transforms by PyTorch's own batch norm, which has formulas for all of them.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/dense_block.h"
#include "autograd/node.h"
#include "autograd/strides.h"
#include "check.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::bn_act", "")
                             .typed<std::tuple<Tensor, Tensor, Tensor>(
                                 const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, bool, double, double, c10::string_view, std::optional<double>)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::bn_act_backward", "")
                             .typed<std::tuple<Tensor, Tensor, Tensor>(
                                 const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                 const Tensor&, const Tensor&, bool, c10::string_view, std::array<bool, 3>,
                                 std::optional<double>)>();
  return op;
}

// Second order: differentiates PyTorch's batch norm twice.
struct BnActBackward : torch::autograd::Function<BnActBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, bool training,
                               std::string act, std::array<bool, 3> output_mask, std::optional<double> act_param) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias] = backward_op().call(dy, x, weight, bias, mean, rstd, training, act, output_mask, act_param);
    ctx->save_for_backward({dy, x, tensor_or_undefined(weight), tensor_or_undefined(bias), mean, rstd});
    ctx->saved_data["dbias"] = output_mask[2];
    ctx->saved_data["training"] = training;
    ctx->saved_data["act"] = std::move(act);
    ctx->saved_data["act_param"] = act_param;
    return {dx, dweight, dbias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list inputs = {saved[0], saved[1], saved[2], saved[3]};  // dy, x, weight, bias
    const auto needs = needs_grad(ctx, inputs);
    inputs[3] = bias_or_zeros(saved[3], ctx->saved_data["dbias"].toBool(), saved[4], saved[4].sym_sizes());
    variable_list out = second_order(
        inputs, needs, grads,
        [&](const variable_list& v) {
          return bn_act_composite(v[1], v[2], v[3], saved[4], saved[5], ctx->saved_data["training"].toBool(),
                                  {ctx->saved_data["act"].toStringView(), ctx->saved_data["act_param"].toOptional<double>()});
        });
    out.resize(10);
    return out;
  }
};

struct BnAct {
  static constexpr const char* kName = "BnAct";
  static constexpr size_t kInputs = 3;  // x, weight, bias
  bool training;
  std::string act;
  std::optional<double> act_param;
  Strides strides;  // of y

  RecipePointer recipe(const variable_list& inputs, const variable_list& statistics) const {
    return recipe_of_batch_norm(inputs[0], Tensor(), inputs[1], inputs[2], statistics[0], statistics[1], act, act_param);
  }

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 3>& needs) const {
    const Tensor& x = saved[0];
    auto [dx, dweight, dbias] = backward_op().call(dy, x, optional_of(saved[1]), optional_of(saved[2]), saved[3].contiguous(),
                                                   saved[4].contiguous(), training, act, needs, act_param);
    if (needs[0]) dx = in_strides_of_batch_norm_gradient(dx, x, dy, strides, act);
    return {needs[0] ? dx : Tensor(), needs[1] ? dweight : Tensor(), needs[2] ? dbias : Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> bn_act_by_pytorch(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                                     bool training, double momentum, double eps, c10::string_view act,
                                                     std::optional<double> act_param) {
  return batch_norm_by_pytorch("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, momentum, eps,
                               {act, act_param});
}

std::tuple<Tensor, Tensor, Tensor> bn_act_autograd(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var, bool training, double momentum,
                                                   double eps, c10::string_view act, std::optional<double> act_param) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (has_tangent(x) || has_tangent(w) || has_tangent(b))
    return bn_act_by_pytorch(x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param);
  check_statistics_want_no_gradient("cnnkern::bn_act", running_mean, running_var);
  const bool records = at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b));
  if (records && training && act == "relu")
    if (auto found = bn_relu_of_features(x, weight, bias, running_mean, running_var, momentum, eps)) return *std::move(found);
  const RunningStatistics statistics(training, running_mean, running_var, records);
  const auto forward = [&] {
    return forward_op().call(x, weight, bias, statistics.mean(), statistics.var(), training, momentum, eps, act, act_param);
  };
  if (records) {
    const Tensor read = act == "none" ? Tensor() : b;  // by the gradient
    const auto describe = [&](const auto& results) {
      const auto& [y, mean, rstd] = results;
      return std::pair(BnAct{training, std::string(act), act_param, strides_of(y)}, variable_list{mean, rstd});
    };
    return recorded<BnAct>({x, w, b}, {x, w, read}, forward, describe, [&] { statistics.settle(); });
  }
  at::AutoDispatchBelowADInplaceOrView below;
  auto results = forward();
  statistics.settle();
  return results;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_autograd(const Tensor& dy, const Tensor& x,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const Tensor& mean, const Tensor& rstd, bool training,
                                                            c10::string_view act, std::array<bool, 3> output_mask,
                                                            std::optional<double> act_param) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  if (at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    auto out = BnActBackward::apply(dy, x, weight, bias, mean, rstd, training, std::string(act), output_mask, act_param);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, weight, bias, mean, rstd, training, act, output_mask, act_param);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("bn_act", &cnnkern::bn_act_autograd);
  m.impl("bn_act_backward", &cnnkern::bn_act_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("bn_act", &cnnkern::bn_act_by_pytorch); }
