#include "deferred/prologue.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "autograd/below.h"
#include "autograd/composite.h"
#include "autograd/strides.h"
#include "deferred/arguments.h"
#include "deferred/memory.h"
#include "kernels.h"

namespace cnnkern {

using torch::autograd::variable_list;

namespace {

const auto& convolution_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::grouped_conv2d", "").typed<signature::grouped_conv2d>();
  return op;
}
const auto& fused_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_act_conv2d", "").typed<signature::bn_act_conv2d>();
  return op;
}
const auto& fused_backward() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_act_conv2d_backward", "").typed<signature::bn_act_conv2d_backward>();
  return op;
}

}  // namespace

bool ActivatedNorm::may_be(const BatchNorm& norm, const Activation& act) {
  const Tensor& x = norm.norm()->x;
  const auto type = x.scalar_type();
  return !act.slope.defined() && !norm.has_any_strides() && x.is_cpu() && x.dim() == 4 &&
         (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf);
}

Strides ActivatedNorm::strides() const {
  const Tensor& x = norm()->x;
  const Strides own = plain_strides(x.sizes(), batch_norm_in_rows(x));
  return keeps_strides(act_.name) ? own : elementwise_strides(x.sizes(), own, own);
}

bool ActivatedNorm::fuses_with(const ConvolutionArguments& convolution, at::MemoryFormat format, bool records) const {
  constexpr size_t kInCaches = 2 << 20;  // bytes of an input that is read again as fast as it is computed again
  const Tensor &x = norm()->x, &weight = convolution.weight;
  if (format != at::MemoryFormat::ChannelsLast || x.suggest_memory_format() != format || weight.dim() != 4) return false;
  if (weight.size(2) != 3 || weight.size(3) != 3) return false;
  const bool would_be_saved = records && saved_tensor_hooks() != SavedTensorHooks::kOurs;
  if (would_be_saved && (x.nbytes() < kInCaches || (weight.size(1) > 1 && x.scalar_type() != at::kFloat))) return false;
  return fuses_bn_act_conv2d(x, convolution.weight, convolution.bias, convolution.stride, convolution.padding, convolution.dilation,
                             convolution.groups);
}

Result ActivatedNorm::compute(const Tensor& residual, const Activation& act, bool again) {
  TORCH_INTERNAL_ASSERT(!residual.defined() && act.name == "none");
  return norm_->compute(residual, act_, again);
}

Result BatchNorm::convolve(const Activation& act, const ConvolutionArguments& convolution, bool again) {
  const auto& [x, weight, bias, training] = arguments_;
  const auto [mean, var] = statistics(again);
  const auto& [kernel, kernel_bias, stride, padding, dilation, groups] = convolution;
  Result result;
  std::tie(result.value, result.mean, result.rstd) =
      fused_operator().call(x, optional_of(weight), optional_of(bias), mean, var, training, momentum_, eps_, act.name, act.param, kernel,
                            optional_of(kernel_bias), stride, padding, dilation, groups);
  if (training) updated_statistic(mean), updated_statistic(var);
  return result;
}

Tensor Deferred::defer_activation(const Tensor& self, std::shared_ptr<BatchNorm> norm, const Activation& act, bool in_place) {
  const auto activated = std::make_shared<ActivatedNorm>(std::move(norm), act);
  const Strides own(strides().begin(), strides().end()), strides = in_place ? own : activated->strides();
  decltype(make_node<ActNode>()) node{};
  if (norm_) {
    node = make_node<ActNode>();
    node->act = act, node->strides = strides;
    node->add_next_edge(torch::autograd::impl::gradient_edge(self));
  }
  const auto put_in_graph = [&](Deferred& result, const Tensor& y) {
    if (!node) return;
    node->result = c10::weak_intrusive_ptr<c10::TensorImpl>(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(&result));
    result.put(y, node);
  };
  where_.site->fused(where_.mode, act.name);
  if (in_place) {
    if (norm_) norm_->result.reset();
    source_ = activated;
    if (!inference_) bump_version();
    put_in_graph(*this, self);
    return self;
  }
  fused_with_ = act.name;
  state_ = kSpent;
  again_ = true;  // what computes the new result updates the statistics
  const auto made = make(activated, self.options(), sizes(), strides, norm_, where_);
  heir_ = c10::weak_intrusive_ptr<c10::TensorImpl>(c10::intrusive_ptr<c10::TensorImpl>(made));
  const Tensor y = tensor_of(made);
  put_in_graph(*made, y);
  return y;
}

std::optional<Tensor> Deferred::convolve(const Tensor& self, const ConvolutionArguments& convolution) {
  const Lock lock(mutex_);
  const auto source = std::dynamic_pointer_cast<ActivatedNorm>(source_);
  if (!source || !is_open_to(self)) return std::nullopt;
  const auto& [weight, bias, stride, padding, dilation, groups] = convolution;
  for (const Tensor* t : {&weight, &bias})
    if (t->defined() && (!is_plain(*t) || has_tangent(*t) || Deferred::of(*t) != nullptr)) return std::nullopt;
  // Autocast would convert tensors first.
  if (at::autocast::is_autocast_enabled(at::kCPU)) return std::nullopt;
  const bool records = grad_mode_ && (self.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad()));
  if (records && !norm_) return std::nullopt;  // nothing else saves the batch norm's input
  if (!source->fuses_with(convolution, self.suggest_memory_format(), records)) return std::nullopt;
  const Result result = compute_by([&](bool again) { return source->convolve(convolution, again); }, /*reads_bias=*/true);
  state_ = kSpent;
  where_.site->convolved(where_.mode);
  if (!records) return result.value;
  auto node = make_node<ConvolutionNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(self, weight, bias));
  node->act = *source->activation();
  node->training = source->norm()->training;
  node->stride = stride.vec(), node->padding = padding.vec(), node->dilation = dilation.vec(), node->groups = groups;
  node->save(*source->norm(), result, weight);
  torch::autograd::set_history(result.value, node);
  announce(node);
  norm_ = {};  // its node has what it needs, and counts the references to it
  return result.value;
}

void ConvolutionNode::save(const NormArguments& norm, const Result& statistics, const Tensor& kernel) {
  for (const Tensor& t : {norm.x, norm.weight, norm.bias, statistics.mean, statistics.rstd, kernel})
    saved_.push_back(saved_with_recipe(t));
  if (norm.weight.defined()) weight_ = copy_of(norm.weight);
  if (norm.bias.defined()) bias_ = copy_of(norm.bias);
}

void ConvolutionNode::release_variables() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& variable : saved_) variable.reset_data();
  weight_ = bias_ = Tensor();
}

variable_list ConvolutionNode::apply(variable_list&& grads) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Tensor& dy = grads[0];
  if (!dy.defined()) return variable_list(3);
  const bool differentiably = at::GradMode::is_enabled();
  variable_list v;
  for (size_t i = 0; i < saved_.size(); ++i)
    v.push_back(differentiably || i == 0 || i > 2 ? saved_[i].unpack() : i == 1 ? weight_ : bias_);
  std::array<bool, 3> needs;
  for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
  const auto [da, dkernel, dbias] =
      fused_backward().call(dy, v[0], optional_of(v[1]), optional_of(v[2]), v[3].contiguous(), v[4].contiguous(), training, act.name,
                            act.param, v[5], stride, padding, dilation, groups, needs);
  return {needs[0] ? da : Tensor(), needs[1] ? dkernel : Tensor(), needs[2] ? dbias : Tensor()};
}

namespace {

Tensor grouped_conv2d(c10::DispatchKeySet keys, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Tensor& b = tensor_or_undefined(bias);
  if (Deferred* deferred = Deferred::of(x))
    if (auto y = deferred->convolve(x, {weight, b, stride, padding, dilation, groups})) return *std::move(y);
  Arguments visited("GroupedConv2d");
  for (const Tensor* t : {&x, &weight, &b}) visited.visit(*t, /*writes=*/false);
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(kDeferredKey)};
  return convolution_operator().redispatch(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kDeferredKey), x, weight, bias,
                                           stride, padding, dilation, groups);
}

}  // namespace

}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, DeferredInit, m) { m.impl("grouped_conv2d", &cnnkern::grouped_conv2d); }
