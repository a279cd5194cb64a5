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

// A tensor that a gradient reads, and that PyTorch's own layers would not have kept: the residual. Whoever changes it in place in the
// meantime comes to dispatch.cpp first, in the same way, and a copy is made of what it was.
class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() { reset(); }
  void keep(const at::Tensor& t);
  void reset();
  at::Tensor unpack() const;  // as it was; undefined where nothing is kept
  static void copy_those_of(const c10::StorageImpl* memory);

 private:
  at::Tensor tensor_, copy_;
  int64_t version_ = 0;
};

}  // namespace cnnkern
