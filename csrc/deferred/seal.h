// Tells whether tensors are what they were when something was computed from them once and for all, a folded weight, or keeps
// what they were.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

namespace cnnkern {

struct Sealed;

// The tensors carry the deferred results' dispatch key while they are sealed, and so do their views: any operator that writes to
// one comes to dispatch.cpp first, which breaks the seal.
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

// The values that a tensor has now, for a gradient that reads them later: PyTorch's own layers would not have kept this tensor, so
// that it may be changed in place. Whoever does that comes to dispatch.cpp first, in the same way, and a copy is made of them.
class Values : public std::enable_shared_from_this<Values> {
 public:
  // Several who keep one tensor share its values.
  static std::shared_ptr<Values> of(const at::Tensor& t);
  explicit Values(const at::Tensor& t);
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;
  ~Values();
  // Without a place in the graph. An error where they were changed past dispatch.cpp.
  at::Tensor tensor() const;
  bool are_copied() const;
  static void copy_those_of(const c10::StorageImpl* memory);

 private:
  bool are_those_of(const at::Tensor& t) const;

  at::Tensor tensor_;  // the tensor's memory, or a copy
  int64_t version_;
  bool copied_ = false;
};

// The residual of a sum, by its values, or where they are still its own by itself.
class Kept {
 public:
  void keep(const at::Tensor& t) { tensor_ = t, values_ = Values::of(t); }
  void reset() { tensor_ = at::Tensor(), values_ = nullptr; }
  at::Tensor unpack() const;  // as it was; undefined where nothing is kept

 private:
  at::Tensor tensor_;
  std::shared_ptr<Values> values_;
};

}  // namespace cnnkern
