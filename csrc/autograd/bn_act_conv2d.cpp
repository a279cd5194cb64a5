// bn_act_conv2d: its schema, its derivative, and its parts where no kernel fuses them.
//
// Only the CPU has kernels, in the compiled extension, so the schemas are not in ops.cpp, whose operators every backend has. Deferred
// results (deferred/prologue.h) call it. The gradient operator ends at what the convolution reads: bn_act_backward goes on from there.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"
#include "autograd/strides.h"
#include "check.h"
#include "kernels.h"

namespace cnnkern {
namespace {

using at::IntArrayRef;
using torch::autograd::variable_list;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
const auto& forward_op() {
  static const auto op = operator_named<signature::bn_act_conv2d>("cnnkern::bn_act_conv2d");
  return op;
}
const auto& backward_op() {
  static const auto op = operator_named<signature::bn_act_conv2d_backward>("cnnkern::bn_act_conv2d_backward");
  return op;
}
const auto& norm_op() {
  static const auto op = operator_named<signature::bn_act>("cnnkern::bn_act");
  return op;
}
const auto& norm_backward_op() {
  static const auto op = operator_named<signature::bn_act_backward>("cnnkern::bn_act_backward");
  return op;
}
const auto& given_statistics_op() {
  static const auto op = operator_named<signature::sync_bn>("cnnkern::sync_bn");
  return op;
}
const auto& convolution_op() {
  static const auto op = operator_named<signature::grouped_conv2d>("cnnkern::grouped_conv2d");
  return op;
}
const auto& convolution_backward_op() {
  static const auto op = operator_named<signature::grouped_conv2d_backward>("cnnkern::grouped_conv2d_backward");
  return op;
}

// The two operators one after the other, whatever key they then meet.
Three by_parts(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
               const OptionalTensor& running_var, bool training, double momentum, double eps, c10::string_view act,
               std::optional<double> act_param, const Tensor& kernel, const OptionalTensor& kernel_bias, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const auto [a, mean, rstd] =
      norm_op().call(x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param);
  return {convolution_op().call(a, kernel, kernel_bias, stride, padding, dilation, groups), mean, rstd};
}

Three backward_by_parts(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                        const Tensor& rstd, bool /*training*/, c10::string_view act, std::optional<double> act_param,
                        const Tensor& kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, Mask mask) {
  const Tensor a = std::get<0>(given_statistics_op().call(x, std::nullopt, weight, bias, mean, rstd, act, act_param));
  return convolution_backward_op().call(dy, a, kernel, stride, padding, dilation, groups, mask);
}

struct BnActConv2d {
  static constexpr const char* kName = "BnActConv2d";
  static constexpr size_t kInputs = 5;  // x, weight, bias, kernel, kernel_bias
  bool training;
  std::string act;
  std::optional<double> act_param;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 5>& needs) const {
    const Tensor &x = saved[0], &kernel = saved[3], mean = saved[4].contiguous(), rstd = saved[5].contiguous();
    const auto weight = optional_of(saved[1]), bias = optional_of(saved[2]);
    const bool of_norm = needs[0] || needs[1] || needs[2];
    auto [da, dkernel, dkernel_bias] = backward_op().call(dy, x, weight, bias, mean, rstd, training, act, act_param, kernel, stride,
                                                          padding, dilation, groups, {of_norm, needs[3], needs[4]});
    variable_list found = {Tensor(), Tensor(), Tensor(), needs[3] ? dkernel : Tensor(), needs[4] ? dkernel_bias : Tensor()};
    if (!of_norm) return found;
    auto [dx, dweight, dbias] =
        norm_backward_op().call(da, x, weight, bias, mean, rstd, training, act, {needs[0], needs[1], needs[2]}, act_param);
    if (needs[0]) found[0] = dx;
    if (needs[1]) found[1] = dweight;
    if (needs[2]) found[2] = dbias;
    return found;
  }
};

Three bn_act_conv2d_autograd(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
                             double eps, c10::string_view act, std::optional<double> act_param, const Tensor& kernel,
                             const OptionalTensor& kernel_bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                             int64_t groups) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias), &kb = tensor_or_undefined(kernel_bias);
  const variable_list inputs = {x, w, b, kernel, kb};
  if (std::any_of(inputs.begin(), inputs.end(), has_tangent))
    return by_parts(x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param, kernel, kernel_bias, stride,
                    padding, dilation, groups);
  check_statistics_want_no_gradient("cnnkern::bn_act_conv2d", running_mean, running_var);
  const bool records = at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad);
  const RunningStatistics statistics(training, running_mean, running_var, records);
  const auto forward = [&] {
    return forward_op().call(x, weight, bias, statistics.mean(), statistics.var(), training, momentum, eps, act, act_param, kernel,
                             kernel_bias, stride, padding, dilation, groups);
  };
  if (records) {
    const auto describe = [&](const Three& results) {
      return std::pair(BnActConv2d{training, std::string(act), act_param, stride.vec(), padding.vec(), dilation.vec(), groups},
                       variable_list{std::get<1>(results), std::get<2>(results)});
    };
    return recorded<BnActConv2d>(inputs, {x, w, b, kernel}, forward, describe, [&] { statistics.settle(); });
  }
  at::AutoDispatchBelowADInplaceOrView below;
  auto results = forward();
  statistics.settle();
  return results;
}

Three bn_act_conv2d_backward_autograd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const Tensor& mean, const Tensor& rstd, bool training, c10::string_view act,
                                      std::optional<double> act_param, const Tensor& kernel, IntArrayRef stride, IntArrayRef padding,
                                      IntArrayRef dilation, int64_t groups, Mask mask) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  const variable_list inputs = {dy, x, w, b, kernel};
  if (at::GradMode::is_enabled() && std::any_of(inputs.begin(), inputs.end(), requires_grad)) {
    const Tensor a = bn_act_composite(x, w, b, mean, rstd, training, {act, act_param});
    return convolution_backward_op().call(dy, a, kernel, stride, padding, dilation, groups, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, weight, bias, mean, rstd, training, act, act_param, kernel, stride, padding, dilation, groups, mask);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_FRAGMENT(cnnkern, m) {
  const std::vector<at::Tag> kAnyLayout{at::Tag::flexible_layout};
  // y = conv2d(act(batch_norm(x)), kernel, kernel_bias), of any number of groups. mean and rstd are those of bn_act.
  m.def(
      "bn_act_conv2d(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, "
      "float momentum, float eps, str act, float? act_param, Tensor kernel, Tensor? kernel_bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> (Tensor y, Tensor mean, Tensor rstd)",
      kAnyLayout);
  // The gradients of act(batch_norm(x)), of the kernel and of its bias.
  m.def(
      "bn_act_conv2d_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool training, str act, "
      "float? act_param, Tensor kernel, int[2] stride, int[2] padding, int[2] dilation, int groups, bool[3] output_mask) -> "
      "(Tensor da, Tensor dkernel, Tensor dkernel_bias)",
      kAnyLayout);
}

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("bn_act_conv2d", &cnnkern::bn_act_conv2d_autograd);
  m.impl("bn_act_conv2d_backward", &cnnkern::bn_act_conv2d_backward_autograd);
}

// Each part does what it does by itself.
TORCH_LIBRARY_IMPL(cnnkern, CompositeExplicitAutograd, m) {
  m.impl("bn_act_conv2d", &cnnkern::by_parts);
  m.impl("bn_act_conv2d_backward", &cnnkern::backward_by_parts);
}
TORCH_LIBRARY_IMPL(cnnkern, AutocastCPU, m) { m.impl("bn_act_conv2d", &cnnkern::by_parts); }
TORCH_LIBRARY_IMPL(cnnkern, AutocastCUDA, m) { m.impl("bn_act_conv2d", &cnnkern::by_parts); }
TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("bn_act_conv2d", &cnnkern::by_parts); }
