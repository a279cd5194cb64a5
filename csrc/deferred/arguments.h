// What happens before an operator has its tensors.
#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

#include "deferred/deferred.h"
#include "deferred/seal.h"

namespace cnnkern {

using at::Tensor;

// A result that nothing has asked for in so many operators is not worth waiting with.
inline constexpr int kPatience = 200;

// Prepares the tensors of one operator, which is named in the report.
class Arguments {
 public:
  explicit Arguments(std::string name) : name_(std::move(name)), waiting_(Waiting::of_this_thread()->results()) {}

  // Before the operator has t: a deferred result becomes real, and so do those that it would conflict with.
  void visit(const Tensor& t, bool writes) {
    if (!t.defined()) return;
    if (Deferred* deferred = Deferred::of(t))
      deferred->make_real_for(name_ + " follows");
    if (writes) Seal::break_those_of(memory_of(t)), Values::copy_those_of(memory_of(t));
    for (const auto& result : waiting_) {
      if (result.get() == t.unsafeGetTensorImpl()) continue;
      // What is no plain memory may have some inside.
      if (!is_plain(t) || result->conflicts_with(memory_of(t), writes)) result->make_real_for(name_ + " changes what it is made of");
    }
  }

  // The same of whatever an argument holds: a collective's may be lists of lists.
  void visit_all(const c10::IValue& value, bool writes) {
    if (value.isTensor()) {
      visit(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) visit(t, writes);
    } else if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
      for (const c10::IValue& item : value.toList()) visit_all(item, writes);
    }
  }

  // Before something may change t's memory that comes here no more.
  void expose(const Tensor& t) {
    for (const auto& result : waiting_)
      if (result->conflicts_with(memory_of(t), /*writes=*/true)) result->make_real_for(name_ + " exposes what it is made of");
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
      result.make_real_for("nothing follows for long");
    } catch (const std::exception&) {
      // Whoever uses it will be told.
    }
  }

  std::string name_;
  std::vector<c10::intrusive_ptr<Deferred>> waiting_;
};

}  // namespace cnnkern
