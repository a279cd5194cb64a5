#include "deferred/batch_norm.h"

#include "autograd/composite.h"
#include "deferred/arguments.h"
#include "deferred/capture.h"

namespace cnnkern {

namespace {

// The deferred result of `norm`, a batch norm of `given`; nothing if it cannot be deferred.
std::optional<Tensor> deferred(const std::shared_ptr<BatchNorm>& norm, const Tensor& given, const std::shared_ptr<Site>& site, int mode) {
  const Tensor &x = norm->norm()->x, &w = norm->norm()->weight, &b = norm->norm()->bias;
  const bool seen = site->defers(mode), disturbed = !is_undisturbed();
  // A capture may end before the result is used. So whether it is deferred depends on the steps before the capture.
  const bool captured = capture_of(stream_of(x.device())) != 0 && !site->always_fuses(mode);
  if (!seen || disturbed || captured || !norm->can_wait()) {
    if (seen)
      site->at_once(disturbed  ? "hooks on saved tensors, a mode, a transform or a profiler that records shapes see every operator"
                    : captured ? "a CUDA graph was captured, and it had not always been fused before"
                               : "its arguments are unusual");
    return std::nullopt;
  }
  NormPointer node{};
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(w) || requires_grad(b))) {
    node = make_node<NormNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, w, b));
  }
  const auto impl = Deferred::make(norm, x.options(), x.sizes(), plain_strides(x.sizes(), batch_norm_in_rows(given)), node, {site, mode});
  const Tensor y = tensor_of(impl);
  if (node) {
    node->result = c10::weak_intrusive_ptr<c10::TensorImpl>(impl);
    impl->put(y, node);
    announce(node);
  }
  return y;
}

int mode_of(bool training) { return 2 * training + at::GradMode::is_enabled(); }

}  // namespace

Tensor defer_batch_norm(const std::shared_ptr<Site>& site, const Tensor& given, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                        bool training, double momentum, double eps) {
  const Tensor &mean = tensor_or_undefined(running_mean), &var = tensor_or_undefined(running_var);
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
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
  const auto norm = std::make_shared<BatchNorm>(x, w, b, mean, var, training, momentum, eps, any_strides);
  if (const auto y = deferred(norm, given, site, mode_of(training))) return *y;
  const Tensor y = std::get<0>(norm_operator().call(x, weight, bias, running_mean, running_var, training, momentum, eps, "none", std::nullopt));
  return any_strides ? Deferred::laid(y, plain_strides(x.sizes(), batch_norm_in_rows(given))) : y;
}

std::optional<Tensor> defer_over_processes(const std::shared_ptr<Site>& site, const Tensor& x, const Tensor& mean, const Tensor& var,
                                           const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                           const OverProcesses& over) {
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias);
  {
    Arguments visited("another batch norm");
    for (const Tensor* t : {&x, &w, &b}) visited.visit(*t, /*writes=*/false);
  }
  const auto norm = std::make_shared<BatchNorm>(x, w, b, mean, var, /*training=*/false, /*momentum=*/0.0, eps, /*any_strides=*/false);
  norm->take_gradients(std::make_shared<const OverProcesses>(over));
  return deferred(norm, x, site, mode_of(/*training=*/true));
}

}  // namespace cnnkern
