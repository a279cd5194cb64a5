// Which of the two memory layouts a tensor has, and copies for those that have neither. For every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include "aten.h"


namespace cnnkern {

inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Channels innermost and dense, as channels_last has it; (N, L, C) transposed to (N, C, L) counts too.
inline bool is_rows(const at::Tensor& x) {
  if (x.dim() == 4) return x.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (x.dim() == 5) return x.is_contiguous(at::MemoryFormat::ChannelsLast3d);
  return x.dim() == 3 && x.transpose(1, 2).is_contiguous();
}

// x itself where it has one of the two layouts, else a copy in the one that its strides suggest.
inline at::Tensor in_layout(const at::Tensor& x) {
  return x.is_contiguous() || is_rows(x) ? x : x.contiguous(x.suggest_memory_format());
}

// t, or a copy of it, with the strides of x.
inline at::Tensor in_layout_of(const at::Tensor& t, const at::Tensor& x) {
  return same_strides(t, x) ? t : aten::empty_like(x).copy_(t);
}

// t, or a copy of it, with channels innermost.
inline at::Tensor in_rows(const at::Tensor& t) {
  return is_rows(t) ? t : t.movedim(1, -1).contiguous().movedim(-1, 1);
}

}  // namespace cnnkern
