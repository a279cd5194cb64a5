// A tensor whose values are computed when they are first used, together with the operation that uses them.
//
// To Python it is an ordinary torch.Tensor: its TensorImpl has sizes, strides and a place in the autograd graph, but no memory
// yet. While it is deferred, its thread has a dispatch key above autograd in its thread-local set, so dispatch.cpp is called first
// for all operators of that thread. If one kernel computes an activation or addition together with the result, it is called. Any
// other operator, and any access to the tensor's memory, also from another thread, first materialises the result ("make_real"): it
// becomes an ordinary tensor.
//
// dispatch.cpp also materialises the result before an operator that would write to the result's inputs, or read or write its running
// statistics. So nothing that PyTorch can observe happens later than without deferring.
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
struct ConvolutionArguments;

class Deferred final : public c10::TensorImpl {
 public:
  // The site to which is reported how the result was computed, and the site's mode.
  struct For {
    std::shared_ptr<Site> site;
    int mode;
  };
  static c10::intrusive_ptr<Deferred> make(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes,
                                           const Strides& strides, const NormPointer& norm, const For& where,
                                           const at::Tensor& residual = {});
  // A result that is computed, but in other strides than it reports.
  static at::Tensor laid(const at::Tensor& value, const Strides& strides);
  // A result that no site counts.
  static at::Tensor uncounted(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes, const Strides& strides);
  // The result, computed immediately; for inference.
  static at::Tensor compute_at_once(Source& source, const Strides& strides);
  Deferred(std::shared_ptr<Source> source, const at::TensorOptions& like, at::IntArrayRef sizes, const Strides& strides,
           const NormPointer& norm, const For& where, const at::Tensor& residual);
  ~Deferred() override { drop(); }
  static Deferred* of(const at::Tensor& t);

  void make_real();
  // The same, with the reason for the report: the operator that needed the result.
  void make_real_for(const std::string& reason);
  // What computes the result, if it is deferred and no sum.
  std::shared_ptr<Source> waiting_source();
  bool has_any_strides() const { return state_ == kLaid || (state_ == kOpen && source_->has_any_strides()); }
  // Marks the result as fused into another computation. It is computed only if it is used again.
  void take_over(const std::string& by);
  // Its values in the strides in which they were computed, for an operator that accepts any strides. Undefined if it has to be
  // materialised.
  at::Tensor as_computed(const std::string& reason);

  enum Term { kFirst, kSecond };
  // The result of an activation or addition fused with this; nothing if PyTorch's operator has to compute it.
  std::optional<at::Tensor> activate(const at::Tensor& self, const Activation& act, bool in_place);
  std::optional<at::Tensor> add(const at::Tensor& self, const at::Tensor& other, Term term, bool in_place);
  // The convolution of a deferred activation's result; nothing if that has to be materialised for it.
  std::optional<at::Tensor> convolve(const at::Tensor& self, const ConvolutionArguments& convolution);
  // The same for the number 0, as in `out = 0; out += y`: a new deferred result, for the next addition.
  std::optional<at::Tensor> add_zero(const at::Tensor& self, bool in_place);
  // r += self in one kernel; false if PyTorch's operator has to compute it. r is an ordinary tensor, which is written immediately, or
  // a deferred sum, which stays deferred.
  bool add_into(const at::Tensor& self, const at::Tensor& r);
  bool add_onto(const at::Tensor& self, const at::Tensor& r);

  // Whether this has to be materialised before an operator that reads (or `writes`) this memory.
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
    kOpen,   // deferred: nothing is computed
    kSpent,  // fused with what used it; the plain result can still be computed
    kLaid,   // computed, in other strides than it reports
    kReal,   // materialised: an ordinary tensor
  };

  bool is_open_to(const at::Tensor& self) const;
  bool takes(const at::Tensor& self) const { return is_open_to(self) && source_->takes_more(); }
  at::Tensor defer_activation(const at::Tensor& self, std::shared_ptr<BatchNorm> norm, const Activation& act, bool in_place);
  bool is_where_it_was_put(const at::Tensor& self) const;
  bool is_observed(const at::Tensor& self) const;
  // Whether one kernel can add `other`: shape, dtype, device and strides.
  bool may_add(const at::Tensor& self, const at::Tensor& other) const;
  bool is_sum() const { return residual_.defined() || adds_zero_; }
  at::Tensor activate_later(const at::Tensor& self, std::shared_ptr<Source> source, const Activation& act, bool in_place);
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
  c10::weak_intrusive_ptr<c10::TensorImpl> heir_{c10::intrusive_ptr<c10::TensorImpl>()};  // the deferred result of its activation
  NormPointer norm_;  // the batch norm's node; null where no gradients are recorded
  const torch::autograd::Node* put_ = nullptr;  // the result's own node, if it has one
  For where_;
  bool grad_mode_, inference_;
  c10::Stream stream_;
  uint64_t capture_;  // the CUDA graph capture in which the layer was called; 0: none
  std::shared_ptr<Waiting> waiting_;
  State state_ = kOpen;
  bool again_ = false;  // it was computed before: the running statistics already contain this batch
  bool adds_zero_ = false;  // a sum with the number 0
  bool uncounted_ = false;  // its source computes an activation too, and the site knows
  std::string fused_with_;
  Remembered residual_was_;
  int passed_ = 0;
  std::recursive_mutex mutex_;
};

// The values of t in the strides in which they were computed, for a layer that accepts any strides.
at::Tensor as_computed(const at::Tensor& t, const char* layer);

// Records how to recompute y, if its node supports that. PReLU's does not: its results are saved.
void keep_recipe(const at::Tensor& y, const NormArguments& norm, const at::Tensor& residual, const Result& result, const Activation& act);

// Creates the tensor as PyTorch does, without the accesses to its memory that would materialise it.
at::Tensor tensor_of(const c10::intrusive_ptr<Deferred>& impl);

// The deferred results of a thread: few, because most are used in the next line of the forward pass.
class Waiting {
 public:
  static const std::shared_ptr<Waiting>& of_this_thread();
  void enter(const c10::intrusive_ptr<Deferred>& result);
  void leave(const Deferred* result);
  std::vector<c10::intrusive_ptr<Deferred>> results();
  // Whether all operators go through dispatch.cpp even if nothing is deferred.
  void watch(bool on);
  bool rests();

 private:
  bool watched_ = false;
  std::mutex mutex_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> results_;
};

// Materialises what is deferred in this thread, results that were fused but are still held included.
void materialise_waiting();

// Whether only PyTorch's operators, autograd, autocast and cnnkern's own hooks can see this thread's operators. A TorchFunctionMode
// (torch.set_default_device sets one) does not matter: it is called before the operators, and sees what it would see anyway.
bool is_undisturbed();

}  // namespace cnnkern
