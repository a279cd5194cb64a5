// Activations of a deferred result.
#include "autograd/composite.h"
#include "autograd/strides.h"
#include "deferred/deferred.h"
#include "deferred/prologue.h"

namespace cnnkern {

std::optional<Tensor> Deferred::activate(const Tensor& self, const Activation& act, bool in_place) {
  const Lock lock(mutex_);
  if (!takes(self) || adds_zero_ || (in_place && is_observed(self))) return std::nullopt;
  if (act.slope.defined() && !norm_ && grad_mode_ && act.slope.requires_grad()) return std::nullopt;
  const bool sum = residual_.defined();
  if (sum && !where_.site->activates_sums(where_.mode)) return std::nullopt;
  if (const auto norm = std::dynamic_pointer_cast<BatchNorm>(source_);
      norm && !sum && (norm_ || !grad_mode_) && where_.site->defers_activations(where_.mode) && ActivatedNorm::may_be(*norm, act))
    return defer_activation(self, norm, act, in_place);
  if (auto source = norm_ || sum ? nullptr : source_->followed_by(act)) return activate_later(self, std::move(source), act, in_place);
  const Result result = compute(act);
  const bool of_result = !in_place && (!sum || reads_result(act.name));
  const Strides strides = of_result ? strides_of(result.value) : Strides(this->strides().begin(), this->strides().end());
  decltype(torch::autograd::Edge::function) node;
  const auto put_in_graph = [&, source = source_, residual = residual_](const Tensor& y) {
    if (!node) return y;
    torch::autograd::set_history(y, node);
    keep_recipe(y, *source->norm(), residual, result, act);
    return y;
  };
  if (norm_ && act.slope.defined()) {
    auto made = make_node<PReluNode>();
    made->slope = torch::autograd::SavedVariable(act.slope, /*is_output=*/false);
    made->sum = sum;
    if (sum) made->residual.keep(residual_);
    made->channels_last = batch_norm_in_rows(source_->norm()->x);
    made->strides = strides;
    node = made;
  } else if (norm_ && sum) {
    auto made = make_node<ActOfSumNode>();
    made->act = act;
    made->mask = torch::autograd::SavedVariable(result.mask, /*is_output=*/false);
    if (recomputes_sum(act.name)) made->residual.keep(residual_);
    made->channels_last = batch_norm_in_rows(source_->norm()->x);
    made->strides = strides;
    node = made;
  } else if (norm_) {
    auto made = make_node<ActNode>();
    made->act = act, made->strides = strides;
    node = made;
  }
  if (node) node->add_next_edge(torch::autograd::impl::gradient_edge(self));
  if (node && act.slope.defined()) node->add_next_edge(torch::autograd::impl::gradient_edge(act.slope));
  fused_with_ = sum ? "add + " + act.name : act.name;
  where_.site->fused(where_.mode, fused_with_);
  const bool any_strides = source_->has_any_strides();
  if (!in_place) {
    state_ = kSpent;
    if (any_strides) return laid(result.value, elementwise_strides(sizes(), this->strides(), this->strides()));
    return put_in_graph(result.value);
  }
  if (node && !sum) norm_->result.reset();
  any_strides ? keep_laid(result.value) : become(result.value);
  if (!inference_) bump_version();
  return put_in_graph(self);
}

// The activation's result, deferred again.
Tensor Deferred::activate_later(const Tensor& self, std::shared_ptr<Source> source, const Activation& act, bool in_place) {
  where_.site->fused(where_.mode, fused_with_ = act.name);
  if (in_place) {
    source_ = std::move(source);
    uncounted_ = true;
    if (!inference_) bump_version();
    return self;
  }
  state_ = kSpent;
  return uncounted(std::move(source), self.options(), sizes(), elementwise_strides(sizes(), strides(), strides()));
}

}  // namespace cnnkern
