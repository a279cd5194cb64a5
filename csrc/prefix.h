// The first channels of a wider tensor, (N, C, H, W) of (N, width, H, W), as a dense block's layers read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "memory_layout.h"

namespace cnnkern {

inline Strides prefix_strides(at::IntArrayRef sizes, int64_t width, bool rows) {
  Strides whole(sizes.begin(), sizes.end());
  whole[1] = width;
  return plain_strides(whole, rows);
}

// The channels of the tensor that t, with channels innermost or (without `rows`) contiguous in each image, is a prefix of; 0 where
// its strides are of no such tensor.
inline int64_t width_of_prefix(const at::Tensor& t, bool rows) {
  if (t.dim() != 4) return 0;
  const int64_t pixels = t.size(2) * t.size(3);
  const int64_t width = rows ? t.stride(3) : pixels == 0 ? 0 : t.stride(0) / pixels;
  return width >= t.size(1) && t.strides() == at::IntArrayRef(prefix_strides(t.sizes(), width, rows)) ? width : 0;
}

}  // namespace cnnkern
