// Whether all that happens to a tensor's memory is PyTorch's operators'.
#pragma once

#include <ATen/MapAllocator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>

#include "compat.h"

namespace cnnkern {

// What lets go of a part of a storage: a function of PyTorch's that has no name. It is given the whole storage.
inline std::atomic<c10::DeleterFnPtr> part_deleter = nullptr;

// Shows what parts look like, from a tensor on each: safetensors puts the weights of a file on such parts.
inline void learn_parts(const at::Tensor& whole, const at::Tensor& part) {
  const auto& memory = part.storage().data_ptr();
  if (memory.get_context() == whole.storage().unsafeGetStorageImpl()) part_deleter = memory.get_deleter();
}

// Whether PyTorch allocated the memory, or mapped a file to it; and no array or other library did.
inline bool is_pytorchs(const c10::DataPtr& memory) {
  const auto deleter = memory.get_deleter();
  if (deleter != nullptr && deleter == part_deleter) return is_pytorchs(static_cast<c10::StorageImpl*>(memory.get_context())->data_ptr());
  return deleter == c10::GetDefaultCPUAllocator()->raw_deleter() || at::MapAllocator::fromDataPtr(memory) != nullptr;
}

// How often something is held that one holds, and its own object in Python where nobody else has that.
template <typename Held>
size_t held_by_one(const Held* held) {
  return 1 + is_kept_by_cpp_alone(held->pyobj_slot());
}

// Whether no other tensor has t's memory, but the one that it is a view of where nobody else has that.
inline bool is_alone_in_memory(const at::Tensor& t) {
  const auto& storage = t.storage();
  size_t known = held_by_one(storage.unsafeGetStorageImpl());
  if (t.is_view()) {
    const at::TensorBase& base = t._base();
    known += base.use_count() == held_by_one(base.unsafeGetTensorImpl()) && base.has_storage() && base.storage().is_alias_of(storage);
  }
  return storage.use_count() == known;
}

// Whether no NumPy array has t's memory, nor anybody else who writes and reads past PyTorch's operators. PyTorch marks memory that an
// array was made of as not resizable, and memory that it did not allocate itself, as that of weights from a file. Such memory counts
// while it is PyTorch's own and t is alone in it: an array that was made of it holds a tensor of its own.
inline bool is_seen(const at::Tensor& t) {
  return t.has_storage() && (t.storage().resizable() || (is_pytorchs(t.storage().data_ptr()) && is_alone_in_memory(t)));
}

}  // namespace cnnkern
