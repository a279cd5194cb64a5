// Additions to a deferred result, and of one to another tensor in place.
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "autograd/composite.h"
#include "deferred/deferred.h"
#include "deferred/memory.h"

namespace cnnkern {

using torch::autograd::impl::gradient_edge;

bool Deferred::may_add(const Tensor& self, const Tensor& other) const {
  return takes(self) && !is_sum() && !other.is_same(self) && is_plain(other) && other.sizes() == sizes() && other.dtype() == dtype() &&
         other.device() == device() && !has_tangent(other) && other.is_inference() == inference_;
}

// Sets the node of `sum`, a deferred result whose first term is `self`. If `other` is undefined, a number is added.
void Deferred::put_sum(const Tensor& self, const Tensor& sum, const Tensor& other) {
  if (!norm_) return;
  const auto node = make_node<SumNode>();
  node->set_next_edges({gradient_edge(self), other.defined() ? gradient_edge(other) : torch::autograd::Edge()});
  of(sum)->put(sum, node);
  node->result = c10::weak_intrusive_ptr<c10::TensorImpl>(sum.getIntrusivePtr());
}

std::optional<Tensor> Deferred::add(const Tensor& self, const Tensor& other, Term term, bool in_place) {
  const Lock lock(mutex_);
  if (!may_add(self, other)) return std::nullopt;
  if (!norm_ && grad_mode_ && other.requires_grad()) return std::nullopt;
  const Strides strides = elementwise_strides(sizes(), this->strides(), other.strides());
  // An activation after the sum computes it with the batch norm as the first term, which decides the strides.
  if (term == kSecond && strides != elementwise_strides(sizes(), other.strides(), this->strides())) return std::nullopt;
  if (in_place && is_observed(self)) return std::nullopt;
  Tensor residual = other;
  if (Deferred* second = of(other)) {
    if (source_->has_any_strides()) residual = second->as_computed("the sum with another follows");
    if (!residual.defined() || residual.is_same(other)) second->make_real_for("the sum with another follows"), residual = other;
  }
  if (!is_seen(residual)) return std::nullopt;
  // The sum is deferred too, until an activation follows.
  if (in_place) {
    residual_ = residual;
    residual_was_.remember(residual);
    if (!inference_) bump_version();
    if (norm_) norm_->result.reset();
    put_sum(self, self, other);
    return self;
  }
  const Tensor sum = tensor_of(make(source_, self.options(), sizes(), strides, norm_, where_, residual));
  state_ = kSpent;
  again_ = true;  // the sum's computation updates the statistics
  put_sum(self, sum, other);
  return sum;
}

std::optional<Tensor> Deferred::add_zero(const Tensor& self, bool in_place) {
  const Lock lock(mutex_);
  if (!takes(self) || (in_place ? is_observed(self) : is_sum())) return std::nullopt;
  if (in_place) {
    if (!inference_) bump_version();
    return self;
  }
  const auto impl = make(source_, self.options(), sizes(), Strides(strides().begin(), strides().end()), norm_, where_);
  impl->adds_zero_ = true;
  const Tensor sum = tensor_of(impl);
  state_ = kSpent;
  again_ = true;
  put_sum(self, sum, Tensor());
  return sum;
}

bool Deferred::add_into(const Tensor& self, const Tensor& r) {
  const Lock lock(mutex_);
  if (!may_add(self, r) || !source_->adds_into(r)) return false;
  const bool records = grad_mode_ && (norm_ || r.requires_grad());
  torch::autograd::check_inplace(r, records);
  decltype(make_node<SumNode>()) node{};
  if (records) {
    node = make_node<SumNode>();
    node->set_next_edges({gradient_edge(r), norm_ ? gradient_edge(self) : torch::autograd::Edge()});
  }
  compute_by([&](bool again) { return source_->add_into(r, again); }, /*reads_bias=*/false);
  where_.site->fused(where_.mode, fused_with_ = "add");
  state_ = kSpent;
  if (!inference_) torch::autograd::impl::bump_version(r);
  if (node) rebase(r, node);
  return true;
}

bool Deferred::add_onto(const Tensor& self, const Tensor& r) {
  Deferred* sum = of(r);
  if (sum == nullptr || sum == this) return false;
  const Lock lock(mutex_), of_sum(sum->mutex_);
  if (!may_add(self, r) || !sum->takes(r) || !sum->is_sum() || sum->is_observed(r) || strides() != sum->strides()) return false;
  if (!norm_ && grad_mode_ && r.requires_grad()) return false;
  const Tensor before = sum->moved_out(r);
  std::tie(sum->source_, sum->norm_, sum->where_, sum->residual_) = std::tie(source_, norm_, where_, before);
  sum->residual_was_.remember(before);
  sum->again_ = sum->adds_zero_ = false;
  state_ = kSpent;
  again_ = true;
  if (!inference_) sum->bump_version();
  put_sum(self, r, before);
  return true;
}

}  // namespace cnnkern
