#include "deferred/nodes.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <torch/csrc/autograd/graph_task.h>

#include "autograd/composite.h"
#include "autograd/strides.h"
#include "kernels.h"

namespace cnnkern {

using torch::autograd::Node;
using torch::autograd::variable_list;

namespace {

using NormBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                        const Tensor&, const Tensor&, bool, c10::string_view, std::array<bool, 3>,
                                                        std::optional<double>);
using AddBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                               const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                                               bool, bool, c10::string_view, std::array<bool, 4>, const OptionalTensor&,
                                                               std::optional<double>);

const auto& norm_backward() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_act_backward", "").typed<NormBackward>();
  return op;
}
const auto& add_backward() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_add_act_backward", "").typed<AddBackward>();
  return op;
}
const auto& prelu_backward() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_prelu_backward", "").typed<signature::bn_prelu_backward>();
  return op;
}

// The batch norm's result, recomputed differentiably from what its node saved.
Tensor batch_norm_again(const variable_list& saved, bool training) {
  return bn_act_composite(saved[0], saved[1], saved[2], saved[3], saved[4], training, {"none", {}});
}

}  // namespace

Tensor activated(const Tensor& pre, const Activation& act) {
  return act.slope.defined() ? prelu_by_pytorch(pre, act.slope) : activation_by_pytorch(pre, act);
}

Lock::Lock(std::recursive_mutex& mutex) : lock_(mutex, std::try_to_lock) {
  if (lock_.owns_lock()) return;
  if (Py_IsInitialized() && PyGILState_Check()) {
    PyThreadState* state = PyEval_SaveThread();
    lock_.lock();
    PyEval_RestoreThread(state);
  } else {
    lock_.lock();
  }
}

bool has_hooks(Node& node) {
  return !(node.tensor_pre_hooks().empty() && node.retains_grad_hooks().empty() && node.pre_hooks().empty() &&
           node.post_hooks().empty());
}

void NormNode::release_variables() {
  Lock lock(mutex);
  for (auto& variable : saved_) variable.reset_data();
  bias_.reset();
  known = {};
  release_recipe();
}

void NormNode::fill(const NormArguments& norm, const Tensor& mean, const Tensor& rstd, bool reads_bias) {
  Lock lock(mutex);
  if (filled_) return;
  for (const Tensor& t : {norm.x, norm.weight, reads_bias ? norm.bias : Tensor(), mean, rstd})
    saved_.push_back(saved_with_recipe(t));
  if (reads_bias && norm.bias.defined()) bias_ = copy_of(norm.bias);
  training_ = norm.training;
  filled_ = true;
}

bool NormNode::is_filled() {
  Lock lock(mutex);
  return filled_;
}

variable_list NormNode::unpack() {
  Lock lock(mutex);
  variable_list found;
  const bool by_value = bias_.defined() && !at::GradMode::is_enabled();
  for (size_t i = 0; i < saved_.size(); ++i) found.push_back(i == 2 && by_value ? bias_ : saved_[i].unpack());
  return found;
}

bool NormNode::unobserved(size_t uses) const {
  // If nodes are called directly, each has to return its own gradient.
  const bool called_by_the_engine = torch::autograd::get_current_graph_task_id() != -1;
  if (!called_by_the_engine || used_again || has_hooks(const_cast<NormNode&>(*this))) return false;
  const auto* info = torch::autograd::get_current_graph_task_exec_info();
  if (info != nullptr) {
    const auto found = info->find(const_cast<NormNode*>(this));
    if (found != info->end() && found->second.captures_ && !found->second.captures_->empty()) return false;
  }
  return uses <= (result.expired() ? 1u : 3u);  // the activation's node; the result, twice
}

variable_list NormNode::apply(variable_list&& grads) {
  Lock lock(mutex);
  if (!filled_) {
    const auto tensor = result.lock();
    TORCH_CHECK(tensor, "cnnkern: the gradient of a batch norm that was not computed");
    make_real(tensor.get());
  }
  const Known before = std::exchange(known, {});
  const Tensor& dy = grads[0];
  if (!dy.defined()) return variable_list(3);
  const bool same = before.dy.defined() && before.dy.is_same(dy);
  if (same && before.gradients) return *before.gradients;
  TORCH_CHECK(same || before.act.name == "none", "cnnkern: a gradient was replaced on its way from an activation to the batch norm "
              "before it, which computes both in one; please report this");
  const auto saved = unpack();
  std::array<bool, 3> needs;
  for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
  auto [dx, dweight, dbias] = norm_backward().call(dy, saved[0], optional_of(saved[1]), optional_of(saved[2]), saved[3].contiguous(),
                                                   saved[4].contiguous(), training_, before.act.name, needs, before.act.param);
  if (needs[0]) dx = in_strides_of_batch_norm_gradient(dx, saved[0], dy, before.strides, before.act.name);
  return {needs[0] ? dx : Tensor(), needs[1] ? dweight : Tensor(), needs[2] ? dbias : Tensor()};
}

variable_list ActNode::apply(variable_list&& grads) {
  const Tensor& dz = grads[0];
  if (!dz.defined()) return {Tensor()};
  auto& norm = static_cast<NormNode&>(*next_edge(0).function);
  if (!norm.is_filled())
    if (const auto tensor = result.lock()) make_real(tensor.get());
  Lock lock(norm.mutex);
  if (post_hooks().empty() && norm.unobserved(next_edge(0).function.use_count())) {
    norm.known = {dz, act, strides, std::nullopt};
    return {dz};
  }
  const bool create_graph = at::GradMode::is_enabled();
  const auto saved = norm.unpack();  // a first derivative reads the copy of the bias
  at::AutoGradMode enable(true);
  Tensor y = batch_norm_again(saved, norm.training());
  if (!create_graph) y = y.detach();
  if (!y.requires_grad()) y.requires_grad_();
  return torch::autograd::grad({activation_by_pytorch(y, act)}, {y}, {dz}, /*retain_graph=*/create_graph, create_graph);
}

variable_list PReluNode::apply(variable_list&& grads) {
  const Tensor& dz = grads[0];
  if (!dz.defined()) return variable_list(2);
  Node& before = *next_edge(0).function;
  auto& norm = static_cast<NormNode&>(sum ? *before.next_edge(0).function : before);
  Lock lock(norm.mutex);
  const auto saved = norm.unpack();
  const Tensor slopes = slope.unpack(), added = residual.unpack();
  const bool wants_slope = next_edge(1).is_valid();
  if (!sum && !(post_hooks().empty() && norm.unobserved(next_edge(0).function.use_count()))) {
    const bool create_graph = at::GradMode::is_enabled();
    at::AutoGradMode enable(true);
    Tensor y = batch_norm_again(saved, norm.training()), s = create_graph && slopes.requires_grad() ? slopes : slopes.detach();
    if (!create_graph) y = y.detach();
    for (Tensor* t : {&y, &s})
      if (!t->requires_grad()) t->requires_grad_();
    auto found = torch::autograd::grad({prelu_by_pytorch(y, s)}, {y, s}, {dz}, /*retain_graph=*/create_graph, create_graph);
    return {found[0], wants_slope ? found[1] : Tensor()};
  }
  const bool goes_on = task_should_compute_output(0);  // else only the slope's gradient is needed
  const std::array<bool, 5> needs = {goes_on && norm.next_edge(0).is_valid(), goes_on && sum, goes_on && norm.next_edge(1).is_valid(),
                                     goes_on && norm.next_edge(2).is_valid(), wants_slope};
  auto [dx, dresidual, dweight, dbias, dslope] =
      prelu_backward().call(dz, saved[0], optional_of(added), optional_of(saved[1]), optional_of(saved[2]), slopes,
                            saved[3].contiguous(), saved[4].contiguous(), channels_last, norm.training(), needs);
  if (!goes_on) return {Tensor(), wants_slope ? dslope : Tensor()};
  if (needs[0]) dx = in_strides_of_batch_norm_gradient(dx, saved[0], dz, strides, "prelu");
  // Without a residual only a placeholder is passed on: the batch norm's node has all gradients already (`act` says so).
  const Tensor handed_on = sum ? restrided(dresidual, strides_of_gradient(dz, strides, "prelu")) : dz;
  norm.known = {handed_on, sum ? Activation() : Activation{"prelu"}, strides,
                variable_list{needs[0] ? dx : Tensor(), needs[2] ? dweight : Tensor(), needs[3] ? dbias : Tensor()}};
  return {handed_on, wants_slope ? dslope : Tensor()};
}

variable_list SumNode::apply(variable_list&& grads) {
  if (const auto tensor = result.lock()) make_real(tensor.get());
  return {grads[0], grads[0]};
}

variable_list ActOfSumNode::apply(variable_list&& grads) {
  const Tensor& dz = grads[0];
  if (!dz.defined()) return {Tensor()};
  auto& norm = static_cast<NormNode&>(*next_edge(0).function->next_edge(0).function);
  Lock lock(norm.mutex);
  const auto saved = norm.unpack();
  const Tensor bits = mask.unpack(), added = residual.unpack();
  const bool recomputes = recomputes_sum(act.name);
  const std::array<bool, 4> needs = {norm.next_edge(0).is_valid(), true, norm.next_edge(1).is_valid(), norm.next_edge(2).is_valid()};
  auto [dx, dresidual, dweight, dbias] =
      add_backward().call(dz, saved[0], optional_of(saved[1]), recomputes ? optional_of(saved[2]) : std::nullopt, saved[3].contiguous(),
                          saved[4].contiguous(), bits, channels_last, norm.training(), act.name, needs, optional_of(added), act.param);
  if (needs[0]) dx = in_strides_of_batch_norm_gradient(dx, saved[0], dz, strides, act.name);
  dresidual = restrided(dresidual, strides_of_gradient(dz, strides, act.name));
  norm.known = {dresidual, {}, strides,
                variable_list{needs[0] ? dx : Tensor(), needs[2] ? dweight : Tensor(), needs[3] ? dbias : Tensor()}};
  return {dresidual};
}

}  // namespace cnnkern
