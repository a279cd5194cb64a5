// Preparation of an operator's arguments: deferred results that it reads or conflicts with are materialised.
#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <utility>
#include <vector>

#include "deferred/deferred.h"
#include "deferred/seal.h"

namespace cnnkern {

using at::Tensor;

// A result that is still unused after this many operators is materialised: deferring it would gain nothing.
inline constexpr int kPatience = 200;

// While an operator calls the others that it consists of: the report names the operator that the model called.
class Called {
 public:
  explicit Called(const std::string& name) : outer_(std::exchange(name_, name_ == nullptr ? &name : name_)) {}
  ~Called() { name_ = outer_; }
  Called(const Called&) = delete;
  static const std::string* name() { return name_; }

 private:
  inline static thread_local const std::string* name_ = nullptr;
  const std::string* outer_;
};

// Prepares the tensors of one operator, whose name the report uses.
class Arguments {
 public:
  explicit Arguments(std::string name)
      : name_(Called::name() == nullptr ? std::move(name) : *Called::name()), waiting_(Waiting::of_this_thread()->results()) {}

  // Called before the operator gets t: materialises t if it is deferred, and the results that the operator would conflict with.
  void visit(const Tensor& t, bool writes) {
    if (!t.defined()) return;
    if (Deferred* deferred = Deferred::of(t))
      deferred->make_real_for(name_ + " follows");
    const bool plain = is_plain(t);
    if (writes && plain) Seal::break_those_of(memory_of(t)), Values::copy_those_of(memory_of(t));
    for (const auto& result : waiting_) {
      if (result.get() == t.unsafeGetTensorImpl()) continue;
      // A tensor without plain memory (a subclass, a nested tensor, one of a transform) may hold tensors that have some.
      if (!plain || result->conflicts_with(memory_of(t), writes)) result->make_real_for(name_ + " changes its inputs");
    }
  }

  // The same for all tensors in an argument: those of a collective may be lists of lists.
  void visit_all(const c10::IValue& value, bool writes) {
    if (value.isTensor()) {
      visit(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) visit(t, writes);
    } else if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
      for (const c10::IValue& item : value.toList()) visit_all(item, writes);
    }
  }

  // Called before something that does not come through the dispatcher may change t's memory.
  void expose(const Tensor& t) {
    for (const auto& result : waiting_)
      if (result->conflicts_with(memory_of(t), /*writes=*/true)) result->make_real_for(name_ + " exposes the memory of its inputs");
    Values::copy_those_of(memory_of(t));
  }

  ~Arguments() {
    for (const auto& result : waiting_)
      if (result->passed() > kPatience) settle(*result);
    waiting_.clear();
    if (Waiting::of_this_thread()->rests()) c10::impl::tls_set_dispatch_key_included(kDeferredKey, false);
  }

 private:
  static void settle(Deferred& result) noexcept {
    try {
      result.make_real_for("the next 200 operators do not use it");
    } catch (const std::exception&) {
      // The error is raised where the result is used.
    }
  }

  std::string name_;
  std::vector<c10::intrusive_ptr<Deferred>> waiting_;
};

}  // namespace cnnkern
