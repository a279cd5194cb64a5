// The derivative of bn_prelu: of first order by the gradient operator's kernel; of second order, in forward mode and under
// torch.func transforms by PyTorch's own operators, which have formulas for all of them.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"
#include "autograd/strides.h"
#include "kernels.h"
#include "memory_layout.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using signature::Five;
using signature::Three;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_prelu", "").typed<signature::bn_prelu>();
  return op;
}
const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_prelu_backward", "").typed<signature::bn_prelu_backward>();
  return op;
}

// Second order: differentiates PyTorch's batch norm and PReLU twice.
struct BnPReluBackward : torch::autograd::Function<BnPReluBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& slope, const Tensor& mean,
                               const Tensor& rstd, bool channels_last, bool training, std::array<bool, 5> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dresidual, dweight, dbias, dslope] =
        backward_op().call(dy, x, residual, weight, bias, slope, mean, rstd, channels_last, training, output_mask);
    ctx->save_for_backward({dy, x, tensor_or_undefined(residual), tensor_or_undefined(weight), tensor_or_undefined(bias), slope, mean,
                            rstd});
    ctx->saved_data["training"] = training;
    return {dx, dresidual, dweight, dbias, dslope};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const variable_list inputs(saved.begin(), saved.begin() + 6);  // dy, x, residual, weight, bias, slope
    const auto needs = needs_grad(ctx, inputs);
    variable_list out = second_order(inputs, needs, grads, [&](const variable_list& v) {
      const Tensor pre = bn_act_composite(v[1], v[3], v[4], saved[6], saved[7], ctx->saved_data["training"].toBool(), {"none", {}});
      return prelu_by_pytorch(v[2].defined() ? pre + v[2] : pre, v[5]);
    });
    out.resize(11);
    return out;
  }
};

struct BnPRelu {
  static constexpr const char* kName = "BnPRelu";
  static constexpr size_t kInputs = 5;  // x, residual, weight, bias, slope
  bool training, channels_last;         // of x as the forward pass saw it
  Strides strides;                      // of what PyTorch's gradient of the activation reads

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 5>& needs) const {
    const Tensor &x = saved[0], &residual = saved[1], &weight = saved[2], &bias = saved[3], &slope = saved[4];
    auto [dx, dresidual, dweight, dbias, dslope] =
        backward_op().call(dy, x, optional_of(residual), optional_of(weight), optional_of(bias), slope, saved[5].contiguous(),
                           saved[6].contiguous(), channels_last, training, needs);
    if (needs[0]) dx = in_strides_of_batch_norm_gradient(dx, x, dy, strides, "prelu");
    if (needs[1] && !strides.empty()) dresidual = restrided(dresidual, strides_of_gradient(dy, strides, "prelu"));
    variable_list out = {dx, dresidual, dweight, dbias, dslope};
    for (size_t i = 0; i < out.size(); ++i)
      if (!needs[i]) out[i] = Tensor();
    return out;
  }
};

Three bn_prelu_by_pytorch(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Tensor& slope, const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                          double momentum, double eps) {
  constexpr const char* op = "cnnkern::bn_prelu";
  const Tensor& added = tensor_or_undefined(residual);
  if (has_numbers(x)) {
    check_slope(op, slope, x);
    if (added.defined() && has_numbers(added)) check_same_shape(op, "residual", added, x);
  }
  auto [pre, mean, rstd] =
      batch_norm_by_pytorch(op, x, weight, bias, running_mean, running_var, training, momentum, eps, {"none", {}});
  return {prelu_by_pytorch(added.defined() ? pre + added : pre, slope), mean, rstd};
}

Three bn_prelu_autograd(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& slope, const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                        double momentum, double eps) {
  const Tensor &r = tensor_or_undefined(residual), &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  const variable_list inputs = {x, r, w, b, slope};
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent))
    return bn_prelu_by_pytorch(x, residual, weight, bias, slope, running_mean, running_var, training, momentum, eps);
  check_statistics_want_no_gradient("cnnkern::bn_prelu", running_mean, running_var);
  const bool records = at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad);
  const RunningStatistics statistics(training, running_mean, running_var, records);
  const auto forward = [&] {
    return forward_op().call(x, residual, weight, bias, slope, statistics.mean(), statistics.var(), training, momentum, eps);
  };
  if (records) {
    const auto describe = [&](const Three& results) {
      const auto& [y, mean, rstd] = results;
      return std::pair(BnPRelu{training, batch_norm_in_rows(x), r.defined() ? strides_of_plain_sum(x, r) : strides_of(y)},
                       variable_list{mean, rstd});
    };
    return recorded<BnPRelu>(inputs, inputs, forward, describe, [&] { statistics.settle(); });
  }
  at::AutoDispatchBelowADInplaceOrView below;
  auto results = forward();
  statistics.settle();
  return results;
}

Five bn_prelu_backward_autograd(const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const Tensor& slope, const Tensor& mean, const Tensor& rstd,
                                bool channels_last, bool training, std::array<bool, 5> output_mask) {
  const variable_list inputs = {dy, x, tensor_or_undefined(residual), tensor_or_undefined(weight), tensor_or_undefined(bias), slope};
  if (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad)) {
    auto out = BnPReluBackward::apply(dy, x, residual, weight, bias, slope, mean, rstd, channels_last, training, output_mask);
    return {out[0], out[1], out[2], out[3], out[4]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, residual, weight, bias, slope, mean, rstd, channels_last, training, output_mask);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("bn_prelu", &cnnkern::bn_prelu_autograd);
  m.impl("bn_prelu_backward", &cnnkern::bn_prelu_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("bn_prelu", &cnnkern::bn_prelu_by_pytorch); }
