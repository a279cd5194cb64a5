// A tensor whose values are computed when something asks for them, together with what asks.
//
// To Python it is an ordinary torch.Tensor: its TensorImpl has sizes, strides and a place in the autograd graph, but no memory
// yet. It carries a dispatch key above autograd (dispatch.cpp), so whatever operator it is given to comes here first. An
// activation or an addition that one kernel computes with it is computed by that kernel. Any other operator, and any question
// about the tensor's memory, first makes it an ordinary one.
//
// While a result waits, the thread that made it has the key in its thread-local set, so that all of its operators come here
// first. One that would write to what the result is to be computed from, or touch running statistics that it keeps, makes the
// result before. Nothing that PyTorch can observe happens later than it would have.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "autograd/below.h"
#include "deferred/nodes.h"
#include "deferred/site.h"
#include "deferred/source.h"

namespace cnnkern {

class Waiting;

class Deferred final : public c10::TensorImpl {
 public:
  // The site that is told what becomes of it; `mode` is one of its.
  struct For {
    std::shared_ptr<Site> site;
    int mode;
  };
  static c10::intrusive_ptr<Deferred> make(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes,
                                           const Strides& strides, const NormPointer& norm, const For& where,
                                           const at::Tensor& residual = {});
  // A value that is there, in other strides than those it is to have.
  static at::Tensor laid(const at::Tensor& value, const Strides& strides);
  // The result without waiting, for inference.
  static at::Tensor compute_at_once(Source& source, const Strides& strides);
  Deferred(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes, const Strides& strides,
           const NormPointer& norm, const For& where, const at::Tensor& residual);
  ~Deferred() override { drop(); }
  static Deferred* of(const at::Tensor& t);

  void make_real();
  // Before this operator: the report names it as what the result was needed for.
  void make_real_for(const std::string& reason);
  // What it is to be computed by, of one that waits for what uses it.
  const Source* waiting_source() const { return state_ == kOpen && !is_sum() ? source_.get() : nullptr; }
  bool has_any_strides() const { return state_ == kLaid || (state_ == kOpen && source_->has_any_strides()); }
  // Something else computes what this was to be part of: it is computed only if somebody asks for it after all.
  void take_over(const std::string& by);
  // Its values in the strides that they were computed in, for an operator that takes any; undefined where it has to be real.
  at::Tensor as_computed(const std::string& reason);

  enum Term { kFirst, kSecond };
  // What an activation, an addition of this, gives in one kernel; nothing where it has to be the plain operator.
  std::optional<at::Tensor> activate(const at::Tensor& self, const Activation& act, bool in_place);
  std::optional<at::Tensor> add(const at::Tensor& self, const at::Tensor& other, Term term, bool in_place);
  // The same of the number 0. As `out = 0; out += y` begins in Python, a tensor of its own, which waits for the next addition.
  std::optional<at::Tensor> add_zero(const at::Tensor& self, bool in_place);
  // r += self in one kernel, which is false where it has to be the plain operator. r is a tensor like any other, whose memory is
  // written to at once; or a sum that waits, which goes on waiting.
  bool add_into(const at::Tensor& self, const at::Tensor& r);
  bool add_onto(const at::Tensor& self, const at::Tensor& r);

  // Whether an operator that is given this memory, and writes to it or not, has to wait until this is real.
  bool conflicts_with(const c10::StorageImpl* memory, bool writes);
  // Makes this the node of the result, which is `self`.
  void put(const at::Tensor& self, const decltype(torch::autograd::Edge::function)& node);
  // Counts the operators that went past it.
  int passed() { return ++passed_; }

  // Of c10::TensorImpl.
  bool has_storage() const override;
  const c10::Storage& storage() const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(const c10::VariableVersion& version, bool change) const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(c10::VariableVersion&& version, bool change) const override;
  void shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& impl) override;
  void release_resources() override;
  const char* tensorimpl_type_name() const override { return "cnnkern::Deferred"; }

 private:
  enum State {
    kOpen,   // nothing is computed
    kSpent,  // fused with what used it; the plain result can still be computed
    kLaid,   // computed, in other strides than it is to have
    kReal,   // a tensor like any other
  };

  bool takes(const at::Tensor& self) const;
  bool is_where_it_was_put(const at::Tensor& self) const;
  bool is_observed(const at::Tensor& self) const;
  // Whether other, or what may be added to it, is like this as an addition in one kernel needs it.
  bool may_add(const at::Tensor& self, const at::Tensor& other) const;
  bool is_sum() const { return residual_.defined() || adds_zero_; }
  void put_sum(const at::Tensor& self, const at::Tensor& sum, const at::Tensor& other);
  at::Tensor moved_out(const at::Tensor& self);
  Result compute(const Activation& act);
  Result compute_by(const std::function<Result(bool again)>& kernel, bool reads_bias);
  at::Tensor in_own_strides(const at::Tensor& value) const;
  void become(const at::Tensor& value);
  void report(const std::string& reason);
  void keep_laid(const at::Tensor& value);
  void forget();
  void drop() noexcept;

  std::shared_ptr<Source> source_;
  at::Tensor residual_, value_;  // the value of kLaid
  NormPointer norm_;  // the batch norm's node; null where no gradients are recorded
  const torch::autograd::Node* put_ = nullptr;  // the result's own node, where it has one
  For where_;
  bool grad_mode_, inference_;
  c10::Stream stream_;
  uint64_t capture_;  // of a CUDA graph, in which the layer was called; 0: none
  std::shared_ptr<Waiting> waiting_;
  State state_ = kOpen;
  bool again_ = false;  // it was computed before: the statistics have had this batch
  bool adds_zero_ = false;  // a sum with the number 0, which changes no value
  std::string fused_with_;
  Remembered residual_was_;
  int passed_ = 0;
  std::recursive_mutex mutex_;
};

// The values of t in the strides that they were computed in, for what takes any.
at::Tensor as_computed(const at::Tensor& t);

// As an ordinary tensor is made, without the questions about its memory that make it real.
at::Tensor tensor_of(const c10::intrusive_ptr<Deferred>& impl);

// The results that a thread has not computed yet: few, most live from one line of a forward pass to the next.
class Waiting {
 public:
  static const std::shared_ptr<Waiting>& of_this_thread();
  void enter(const c10::intrusive_ptr<Deferred>& result);
  void leave(const Deferred* result);
  std::vector<c10::intrusive_ptr<Deferred>> results();
  // Whether all operators come to dispatch.cpp even if nothing waits.
  void watch(bool on);
  bool rests();

 private:
  bool watched_ = false;
  std::mutex mutex_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> results_;
};

// Whether what happens to tensors in this thread is PyTorch's operators, autograd and autocast alone, or our own hooks. A
// TorchFunctionMode, as torch.set_default_device sets one, is called before any operator: it sees what it would see.
bool is_undisturbed();

}  // namespace cnnkern
