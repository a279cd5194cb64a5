#include "deferred/batch_norm.h"

#include "autograd/composite.h"
#include "deferred/arguments.h"
#include "deferred/capture.h"

namespace cnnkern {

Tensor defer_batch_norm(const std::shared_ptr<Site>& site, const Tensor& given, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                        bool training, double momentum, double eps) {
  const Tensor &mean = tensor_or_undefined(running_mean), &var = tensor_or_undefined(running_var);
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  const auto at_once = [&](const Tensor& x) {
    return std::get<0>(norm_operator().call(x, weight, bias, running_mean, running_var, training, momentum, eps, "none", std::nullopt));
  };
  const int mode = 2 * training + at::GradMode::is_enabled();
  const bool seen = site->defers(mode);
  if (!is_undisturbed()) {  // a transform's tensors have no memory and no strides
    if (seen) site->at_once("hooks on saved tensors, a mode, a transform or a profiler that records shapes see every operator");
    return at_once(given);
  }
  // A folded convolution's result in channels_last is not copied.
  const bool infers = !training && !(at::GradMode::is_enabled() && (requires_grad(w) || requires_grad(b)));
  Tensor x = given;
  if (Deferred* deferred = Deferred::of(given); deferred != nullptr && infers && !given.requires_grad() && deferred->has_any_strides()) {
    const Tensor value = deferred->as_computed("another batch norm follows");
    if (value.defined()) x = value;
  }
  {
    Arguments visited("another batch norm");
    for (const Tensor* t : {static_cast<const Tensor*>(&x), &w, &b}) visited.visit(*t, /*writes=*/false);
    for (const Tensor* t : {&mean, &var}) visited.visit(*t, training);
  }
  const bool any_strides = !x.is_same(given);
  const Strides strides = plain_strides(x.sizes(), batch_norm_in_rows(given));
  const auto norm = std::make_shared<BatchNorm>(x, w, b, mean, var, training, momentum, eps, any_strides);
  // A capture may end before the result is used. So whether it is deferred depends on the steps before the capture.
  const bool captured = capture_of(stream_of(x.device())) != 0 && !site->always_fuses(mode);
  if (!seen || captured || !norm->can_wait()) {
    if (seen)
      site->at_once(captured ? "a CUDA graph was captured, and it had not always been fused before" : "its arguments are unusual");
    const Tensor y = at_once(x);
    return any_strides ? Deferred::laid(y, strides) : y;
  }
  NormPointer node{};
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    node = make_node<NormNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, w, b));
  }
  const auto impl = Deferred::make(norm, x.options(), x.sizes(), strides, node, {site, mode});
  const Tensor y = tensor_of(impl);
  if (node) {
    node->result = c10::weak_intrusive_ptr<c10::TensorImpl>(impl);
    impl->put(y, node);
    announce(node);
  }
  return y;
}

}  // namespace cnnkern
