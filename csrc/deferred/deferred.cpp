#include "deferred/deferred.h"

#include <ATen/TracerMode.h>
#include <ATen/record_function.h>
#include <c10/core/Event.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>

#include "autograd/below.h"
#include "autograd/composite.h"
#include "autograd/strides.h"
#include "deferred/capture.h"
#include "deferred/memory.h"
#include "deferred/prologue.h"

namespace cnnkern {

namespace {

// Computes on the stream on which the layer was called; the current stream waits for it.
class OnStream {
 public:
  explicit OnStream(c10::Stream stream) : stream_(stream), present_(stream_of(stream.device())) {
    if (stream_ != present_) c10::impl::VirtualGuardImpl(stream_.device_type()).exchangeStream(stream_);
  }
  ~OnStream() {
    if (stream_ == present_) return;
    c10::Event done(stream_.device_type());
    done.record(stream_);
    c10::impl::VirtualGuardImpl(stream_.device_type()).exchangeStream(present_);
    done.block(present_);
  }

 private:
  c10::Stream stream_, present_;
};

// Whether something refers to a tensor's node, which an in-place operation would replace.
bool is_held(const Tensor& t, size_t own) {
  const auto node = torch::autograd::impl::gradient_edge(t).function;
  return node && (has_hooks(*node) || static_cast<size_t>(node.use_count()) > own + 1);  // `node` here is one
}

// A profiler that records shapes accesses the memory of each argument before the operator is called.
bool are_inputs_observed() {
  const auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
  return callbacks && callbacks->needs_inputs_;
}

}  // namespace

void keep_recipe(const Tensor& y, const NormArguments& norm, const Tensor& residual, const Result& result, const Activation& act) {
  const auto node = torch::autograd::impl::gradient_edge(y).function;
  if (auto* has_recipe = dynamic_cast<HasRecipe*>(&*node))
    has_recipe->keep_recipe(y, [&] {
      return recipe_of_batch_norm(norm.x, residual, norm.weight, norm.bias, result.mean, result.rstd, act.name, act.param);
    });
}

bool is_undisturbed() {
  return !are_inputs_observed() && !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::tracer::impl::is_dispatch_enabled() &&
         saved_tensor_hooks() != SavedTensorHooks::kOthers &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::tls_is_dispatch_key_excluded(kDeferredKey);
}

const std::shared_ptr<Waiting>& Waiting::of_this_thread() {
  thread_local const auto waiting = std::make_shared<Waiting>();
  return waiting;
}

void Waiting::enter(const c10::intrusive_ptr<Deferred>& result) {
  std::lock_guard<std::mutex> lock(mutex_);
  results_.emplace_back(c10::intrusive_ptr<c10::TensorImpl>(result));
  c10::impl::tls_set_dispatch_key_included(kDeferredKey, true);
}

void Waiting::leave(const Deferred* result) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(results_, [&](const auto& waiting) { return waiting._unsafe_get_target() == result; });
}

std::vector<c10::intrusive_ptr<Deferred>> Waiting::results() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<c10::intrusive_ptr<Deferred>> found;
  for (const auto& waiting : results_)
    if (const auto result = waiting.lock()) found.push_back(c10::static_intrusive_pointer_cast<Deferred>(result));
  return found;
}

void Waiting::watch(bool on) {
  watched_ = on;
  c10::impl::tls_set_dispatch_key_included(kDeferredKey, on || !rests());
}

bool Waiting::rests() {
  std::lock_guard<std::mutex> lock(mutex_);
  return results_.empty() && !watched_;
}

void materialise_waiting() {
  // The last one first: it may compute those before it, which are then gone if nothing else holds them.
  const auto last = [] {
    const auto results = Waiting::of_this_thread()->results();
    return results.empty() ? c10::intrusive_ptr<Deferred>() : results.back();
  };
  while (const auto result = last()) result->make_real_for("the model returns it");
}

Tensor tensor_of(const c10::intrusive_ptr<Deferred>& impl) {
  return Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim(c10::intrusive_ptr<Deferred>(impl).release()));
}

Deferred::Deferred(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes, const Strides& strides,
                   const NormPointer& norm, const For& where, const Tensor& residual)
    : TensorImpl(c10::DispatchKeySet(like.device().is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU), like.dtype(), like.device()),
      source_(std::move(source)), residual_(residual), norm_(norm), where_(where), grad_mode_(at::GradMode::is_enabled()),
      inference_(c10::InferenceMode::is_enabled()), stream_(stream_of(like.device())), capture_(capture_of(stream_)),
      waiting_(Waiting::of_this_thread()) {
  set_sizes_and_strides(sizes, strides);
  if (residual.defined()) residual_was_.remember(residual);
}

c10::intrusive_ptr<Deferred> Deferred::make(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes,
                                            const Strides& strides, const NormPointer& norm, const For& where, const Tensor& residual) {
  auto made = c10::make_intrusive<Deferred>(std::move(source), like, sizes, strides, norm, where, residual);
  made->waiting_->enter(made);
  return made;
}

Tensor Deferred::laid(const Tensor& value, const Strides& strides) {
  if (value.strides() == at::IntArrayRef(strides)) return value;
  const auto made = c10::make_intrusive<Deferred>(nullptr, value.options(), value.sizes(), strides, NormPointer{}, For{}, Tensor());
  made->keep_laid(value);
  return tensor_of(made);
}

Tensor Deferred::uncounted(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes, const Strides& strides) {
  const auto made = make(std::move(source), like, sizes, strides, {}, For{});
  made->uncounted_ = true;
  return tensor_of(made);
}

Tensor Deferred::compute_at_once(Source& source, const Strides& strides) {
  const Below below(c10::InferenceMode::is_enabled());
  return laid(source.compute(Tensor(), Activation(), /*again=*/false).value, strides);
}

Deferred* Deferred::of(const Tensor& t) {
  if (!t.defined()) return nullptr;
  c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (typeid(impl) != typeid(Deferred)) return nullptr;
  auto* const result = static_cast<Deferred*>(&impl);
  return result->state_ == kReal ? nullptr : result;
}

bool Deferred::has_storage() const {
  const_cast<Deferred*>(this)->make_real();
  return TensorImpl::has_storage();
}
const c10::Storage& Deferred::storage() const {
  const_cast<Deferred*>(this)->make_real();
  return TensorImpl::storage();
}
c10::intrusive_ptr<c10::TensorImpl> Deferred::shallow_copy_and_detach(const c10::VariableVersion& version, bool change) const {
  const_cast<Deferred*>(this)->make_real();
  return TensorImpl::shallow_copy_and_detach(version, change);
}
c10::intrusive_ptr<c10::TensorImpl> Deferred::shallow_copy_and_detach(c10::VariableVersion&& version, bool change) const {
  const_cast<Deferred*>(this)->make_real();
  return TensorImpl::shallow_copy_and_detach(std::move(version), change);
}
void Deferred::shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& impl) {
  make_real();
  TensorImpl::shallow_copy_from(impl);
}
void Deferred::release_resources() {
  drop();
  TensorImpl::release_resources();
}

std::shared_ptr<Source> Deferred::waiting_source() {
  const Lock lock(mutex_);
  return state_ == kOpen && !is_sum() ? source_ : nullptr;
}

bool Deferred::conflicts_with(const c10::StorageImpl* memory, bool writes) {
  const Lock lock(mutex_);
  if (state_ == kReal || state_ == kLaid) return false;
  if (source_->keeps_statistic(memory)) return true;
  if (!writes) return false;
  if (residual_.defined() && memory_of(residual_) == memory) return true;
  const auto reads = source_->reads();
  return std::any_of(reads.begin(), reads.end(), [&](const Tensor& t) { return memory_of(t) == memory; });
}

Result Deferred::compute_by(const std::function<Result(bool again)>& kernel, bool reads_bias) {
  TORCH_CHECK(capture_of(stream_) == capture_ && capture_of(stream_of(device())) == capture_, "cnnkern: a batch norm was called ",
              capture_ == 0 ? "before" : "in", " the capture of a CUDA graph, and its output is used for the first time ",
              capture_ == 0 ? "in it" : "behind its end", ". Use it on the same side, or leave this batch norm unconverted.");
  const bool again = std::exchange(again_, true);
  Result result = [&] {
    const OnStream on(stream_);
    const Below below(inference_);
    return kernel(again);
  }();
  if (norm_) norm_->fill(*source_->norm(), result.mean, result.rstd, reads_bias);
  return result;
}

Result Deferred::compute(const Activation& act) {
  TORCH_CHECK(!residual_.defined() || residual_was_.holds(residual_), "cnnkern: what was added to a batch norm's output was changed "
              "by other means than PyTorch's operators, or by another thread, before the sum was used");
  return compute_by([&](bool again) { return source_->compute(residual_, act, again); },
                    residual_.defined() ? recomputes_sum(act.name) : act.name != "none" || source_->activation() != nullptr);
}

Tensor Deferred::in_own_strides(const Tensor& value) const {
  const Strides own(strides().begin(), strides().end());
  if (value.strides() == at::IntArrayRef(own)) return value;
  const OnStream on(stream_);
  const Below below(inference_);
  return restrided(value, own);
}

// Materialises this as `value`, in the strides that it reports.
void Deferred::become(const Tensor& value) {
  const Tensor laid = in_own_strides(value);
  state_ = kReal;
  forget();
  TensorImpl::shallow_copy_from(laid.getIntrusivePtr());
}

// Its values are computed: `value`, in other strides than it reports. Operators that accept any strides use it.
void Deferred::keep_laid(const Tensor& value) {
  if (value.strides() == strides()) return become(value);
  forget();
  value_ = value;
  state_ = kLaid;
  key_set_ = key_set_.add(kDeferredKey);  // it may stay so when nothing of its thread waits
}

Tensor Deferred::as_computed(const std::string& reason) {
  const Lock lock(mutex_);
  if (state_ == kOpen && source_->has_any_strides()) {
    report(reason);
    keep_laid(compute(Activation()).value);
  }
  return state_ == kLaid ? value_ : Tensor();
}

Tensor as_computed(const Tensor& t, const char* layer) {
  Deferred* deferred = Deferred::of(t);
  if (deferred == nullptr) return t;
  const std::string reason = std::string("a ") + layer + " follows";
  const Tensor value = deferred->as_computed(reason);
  if (value.defined()) return value;
  deferred->make_real_for(reason);
  return t;
}

void Deferred::forget() {
  waiting_->leave(this);
  source_ = nullptr;
  residual_ = value_ = Tensor();
  norm_ = {};
}

void Deferred::make_real() { make_real_for("its memory is read"); }

void Deferred::report(const std::string& reason) {
  if (uncounted_) return;
  if (source_->activation() != nullptr) return where_.site->not_convolved(where_.mode, /*again=*/state_ == kSpent);
  if (state_ == kOpen && is_sum())
    where_.site->fused(where_.mode, adds_zero_ ? "0" : "add");
  else if (state_ == kOpen)
    where_.site->missed(where_.mode, reason);
  else if (!fused_with_.empty())
    where_.site->used_again(where_.mode, fused_with_);
}

void Deferred::make_real_for(const std::string& reason) {
  if (state_ == kReal) return;
  const Lock lock(mutex_);
  if (state_ == kReal) return;
  if (state_ == kLaid) return become(value_);
  if (const auto heir = heir_.lock()) static_cast<Deferred&>(*heir).make_real_for(reason);
  report(reason);
  const Activation* const activation = source_->activation();
  if (state_ == kSpent && norm_ && activation == nullptr) norm_->used_again = true;
  const auto [source, residual, has_node] = std::tuple(source_, residual_, norm_ || (activation != nullptr && put_ != nullptr));
  const Result result = compute(Activation());
  become(result.value);
  const Tensor self = tensor_of(c10::intrusive_ptr<Deferred>::reclaim_copy(this));
  if (has_node && is_where_it_was_put(self)) keep_recipe(self, *source->norm(), residual, result, activation == nullptr ? Activation() : *activation);
}

// The value of the sum `self` as a new tensor, which takes its place in the graph, because `self` becomes another sum.
Tensor Deferred::moved_out(const Tensor& self) {
  report("another addition follows");
  const Result result = compute(Activation());
  const Tensor value = source_->has_any_strides() ? result.value : in_own_strides(result.value);
  if (put_ == nullptr) return value;
  const auto edge = torch::autograd::impl::gradient_edge(self);
  static_cast<SumNode&>(*edge.function).result.reset();
  torch::autograd::impl::set_gradient_edge(value, edge);
  keep_recipe(value, *source_->norm(), residual_, result, Activation());
  return value;
}

void Deferred::drop() noexcept {
  if (state_ == kReal) return;
  try {
    if (state_ == kOpen) {
      if (source_->updates_statistics() || (norm_ && norm_.use_count() > 1)) compute(Activation());
      if (source_->activation() != nullptr)
        where_.site->not_convolved(where_.mode, /*again=*/false);
      else if (!uncounted_)
        where_.site->missed(where_.mode, "its output is not used");
    }
  } catch (const std::exception& error) {
    TORCH_WARN("cnnkern: a batch norm whose output was dropped did not update its statistics: ", error.what());
  }
  state_ = kReal;
  forget();
}

void Deferred::take_over(const std::string& by) {
  const Lock lock(mutex_);
  if (state_ != kOpen) return;
  where_.site->fused(where_.mode, fused_with_ = by);
  state_ = kSpent;
}

void Deferred::put(const Tensor& self, const decltype(torch::autograd::Edge::function)& node) {
  put_ = node.get();
  torch::autograd::set_history(self, node);
}

// A tensor's node may change without an operator: requires_grad_(), a Function that marks the tensor dirty.
bool Deferred::is_where_it_was_put(const Tensor& self) const {
  return put_ == nullptr ? !self.requires_grad() : self.grad_fn().get() == put_;
}

bool Deferred::is_open_to(const Tensor& self) const {
  return state_ == kOpen && is_where_it_was_put(self) && at::GradMode::is_enabled() == grad_mode_ &&
         c10::InferenceMode::is_enabled() == inference_ && is_undisturbed() && stream_of(device()) == stream_ &&
         capture_of(stream_) == capture_;
}

bool Deferred::is_observed(const Tensor& self) const {
  const bool own = norm_ && torch::autograd::impl::gradient_edge(self).function.get() == static_cast<torch::autograd::Node*>(norm_.get());
  return is_held(self, own ? 2 : 1);
}

void make_real(c10::TensorImpl* result) { static_cast<Deferred*>(result)->make_real(); }

}  // namespace cnnkern
