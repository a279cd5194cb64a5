// Whether only PyTorch's operators can read and write a tensor's memory.
#pragma once

#include <ATen/MapAllocator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>

#include "compat.h"

namespace cnnkern {

// The deleter of a part of a storage, a function of PyTorch's without a name. Its context is the whole storage.
inline std::atomic<c10::DeleterFnPtr> part_deleter = nullptr;

// Shows what parts look like, from a tensor on each: safetensors puts the weights of a file on such parts.
inline void learn_parts(const at::Tensor& whole, const at::Tensor& part) {
  const auto& memory = part.storage().data_ptr();
  if (memory.get_context() == whole.storage().unsafeGetStorageImpl()) part_deleter = memory.get_deleter();
}

// Whether PyTorch allocated the memory, or mapped a file to it, and not NumPy or another library.
inline bool is_pytorchs(const c10::DataPtr& memory) {
  const auto deleter = memory.get_deleter();
  if (deleter != nullptr && deleter == part_deleter) return is_pytorchs(static_cast<c10::StorageImpl*>(memory.get_context())->data_ptr());
  return deleter == c10::GetDefaultCPUAllocator()->raw_deleter() || at::MapAllocator::fromDataPtr(memory) != nullptr;
}

// The references that one holder accounts for: its own, and that of the Python object if only C++ keeps that alive.
template <typename Held>
size_t held_by_one(const Held* held) {
  return 1 + is_kept_by_cpp_alone(held->pyobj_slot());
}

// Whether no other tensor shares t's memory, except the one that t is a view of, if nothing else refers to that one.
inline bool is_alone_in_memory(const at::Tensor& t) {
  const auto& storage = t.storage();
  size_t known = held_by_one(storage.unsafeGetStorageImpl());
  if (t.is_view()) {
    const at::TensorBase& base = t._base();
    known += base.use_count() == held_by_one(base.unsafeGetTensorImpl()) && base.has_storage() && base.storage().is_alias_of(storage);
  }
  return storage.use_count() == known;
}

// Whether no NumPy array, and no other library, shares t's memory. PyTorch marks memory as not resizable if an array was made of it or
// if PyTorch did not allocate it, as with weights from a file. Such memory is accepted if PyTorch allocated or mapped it and only t
// uses it: an array would hold another tensor of it.
inline bool is_seen(const at::Tensor& t) {
  return t.has_storage() && (t.storage().resizable() || (is_pytorchs(t.storage().data_ptr()) && is_alone_in_memory(t)));
}

}  // namespace cnnkern
