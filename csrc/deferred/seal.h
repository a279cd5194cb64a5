// Two ways to notice that tensors change. Seal tells whether they still have the values from which a folded weight was computed.
// Values keeps the old values.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

namespace cnnkern {

struct Sealed;

// Sealed tensors and their views carry the dispatch key of deferred results. So dispatch.cpp is called before an operator writes to
// one, and breaks the seal.
class Seal {
 public:
  explicit Seal(const std::vector<at::Tensor>& tensors);
  Seal(const Seal&) = delete;
  Seal& operator=(const Seal&) = delete;
  ~Seal();
  bool holds(const std::vector<at::Tensor>& tensors) const;
  static void break_those_of(const c10::StorageImpl* memory);

 private:
  std::unique_ptr<Sealed> sealed_;
};

// The values that a tensor has now, for a gradient that reads them later. PyTorch's layers would not have saved this tensor, so the
// model may change it in place. dispatch.cpp is called before an operator does that, in the same way, and copies the values.
class Values : public std::enable_shared_from_this<Values> {
 public:
  // Nodes that keep the same tensor share its Values.
  static std::shared_ptr<Values> of(const at::Tensor& t);
  explicit Values(const at::Tensor& t);
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;
  ~Values();
  // Detached. An error if they were changed without dispatch.cpp.
  at::Tensor tensor() const;
  bool are_copied() const;
  static void copy_those_of(const c10::StorageImpl* memory);

 private:
  bool are_those_of(const at::Tensor& t) const;

  at::Tensor tensor_;  // the tensor's memory, or a copy
  int64_t version_;
  bool copied_ = false;
};

// The residual of a sum: the tensor itself while it is unchanged, else a copy of its values.
class Kept {
 public:
  void keep(const at::Tensor& t) { tensor_ = t, values_ = Values::of(t); }
  void reset() { tensor_ = at::Tensor(), values_ = nullptr; }
  at::Tensor unpack() const;  // with its old values; undefined if nothing is kept

 private:
  at::Tensor tensor_;
  std::shared_ptr<Values> values_;
};

}  // namespace cnnkern
