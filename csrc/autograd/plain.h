// Whether a tensor is an ordinary one.
#pragma once

#include "autograd/strides.h"

namespace cnnkern {

// Whether cnnkern's kernels can read a tensor's memory: no subclass, no transform's tensor, no conjugate or negative view.
inline bool is_plain(const Tensor& t) {
  static const auto strange =
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Conjugate,
                           c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor, c10::DispatchKey::Functionalize,
                           c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched,
                           c10::DispatchKey::BatchedNestedTensor, c10::DispatchKey::NestedTensor});
  return (t.is_cpu() || t.is_cuda()) && t.layout() == at::kStrided && !t.is_quantized() && !t.key_set().has_any(strange) &&
         has_numbers(t);
}

// Asks no deferred result to be real.
inline const c10::StorageImpl* memory_of(const Tensor& t) {
  return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

}  // namespace cnnkern
