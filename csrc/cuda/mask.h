// The tensor that a mask of one bit per element is kept in.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"

namespace cnnkern {

// mask_bytes(numel) bytes of storage for whole 32-bit words, which is what kernels write. `allocate`: aten::zeros or aten::empty.
template <typename F>
Tensor words_of_mask(const Tensor& x, const F& allocate) {
  const int64_t bytes = mask_bytes(x.numel());
  return allocate((bytes + 3) / 4 * 4, x.options().dtype(at::kByte)).narrow(0, 0, bytes);
}

inline unsigned* words(const Tensor& mask) { return reinterpret_cast<unsigned*>(mask.mutable_data_ptr<uint8_t>()); }

}  // namespace cnnkern
