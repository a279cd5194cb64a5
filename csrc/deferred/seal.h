// Tells whether tensors are what they were when something was computed from them once and for all, a folded weight.
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

}  // namespace cnnkern
