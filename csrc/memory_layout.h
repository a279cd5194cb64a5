// The memory layout of a tensor (contiguous or channels_last), copies of tensors with neither, and the strides of PyTorch's
// results. For every backend.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <numeric>
#include <string_view>
#include <vector>

#include "aten.h"

namespace cnnkern {

// Channels innermost and dense, as channels_last has it; (N, L, C) transposed to (N, C, L) counts too.
inline bool is_rows(const at::Tensor& x) {
  if (x.dim() == 4) return x.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (x.dim() == 5) return x.is_contiguous(at::MemoryFormat::ChannelsLast3d);
  return x.dim() == 3 && x.transpose(1, 2).is_contiguous();
}

using Strides = c10::SmallVector<int64_t, 6>;

// The strides of a new tensor with the dimensions in that order, from the outermost to the innermost.
inline Strides strides_in_order(at::IntArrayRef sizes, at::IntArrayRef order) {
  Strides strides(sizes.begin(), sizes.end());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return strides;
}

// The strides of a contiguous tensor or, with `rows`, of one with channels innermost.
inline Strides plain_strides(at::IntArrayRef sizes, bool rows) {
  Strides strides(sizes.begin(), sizes.end());
  int64_t stride = 1;
  const auto next = [&](size_t d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  };
  if (rows) next(1);
  for (size_t d = sizes.size(); d-- > (rows ? 2 : 0);) next(d);
  if (rows) next(0);
  return strides;
}

// The dimensions from the outermost to the innermost in the memory of a dense tensor.
template <typename Stride>
std::vector<int64_t> memory_order(c10::ArrayRef<Stride> strides) {
  std::vector<int64_t> order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// Whether elements have the same offsets: the strides of dimensions of one element do not matter.
inline bool lie_alike(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

// x, with the strides of a new tensor of its layout. In x the strides of dimensions of one element may be anything, and a
// tensor that is allocated like x would keep them.
inline at::Tensor with_plain_strides(const at::Tensor& x) {
  const Strides strides = plain_strides(x.sizes(), /*rows=*/!x.is_contiguous());
  return x.strides() == at::IntArrayRef(strides) ? x : x.as_strided(x.sizes(), strides);
}

// The strides of PyTorch's elementwise operators on two tensors, by the rule of its TensorIterator: those of both tensors if
// equal, else the dimensions sorted by the strides of the first tensor in which two of them differ.
inline Strides elementwise_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  const bool empty = c10::multiply_integers(sizes) == 0;
  for (const bool rows : {false, true}) {
    if (rows && sizes.size() != 4) break;
    const Strides plain = plain_strides(sizes, rows);
    if (empty || (lie_alike(sizes, a, plain) && lie_alike(sizes, b, plain))) return plain;
  }
  const Strides own(a.begin(), a.end());
  if (a == b && lie_alike(sizes, a, strides_in_order(sizes, memory_order(a)))) return own;
  // Negative if the first dimension is further in than the second, positive if it is further out, or unknown.
  const auto compare = [&](int64_t d, int64_t e) {
    for (const at::IntArrayRef strides : {a, b}) {
      if (strides[d] == 0 || strides[e] == 0) continue;
      if (strides[d] != strides[e]) return strides[d] < strides[e] ? -1 : 1;
      if (sizes[d] > sizes[e]) return 1;
    }
    return 0;
  };
  std::vector<int64_t> order(sizes.size());  // from the innermost
  std::iota(order.rbegin(), order.rend(), 0);
  for (size_t i = 1; i < order.size(); ++i) {
    for (size_t at = i, before = i; before-- > 0;) {
      const int found = compare(order[before], order[at]);
      if (found < 0) break;
      if (found > 0) std::swap(order[before], order[at]), at = before;
    }
  }
  std::reverse(order.begin(), order.end());
  return strides_in_order(sizes, order);
}

// x itself if it has one of the two layouts, otherwise a copy in the one that is closer to its strides.
inline at::Tensor in_layout(const at::Tensor& x) {
  return x.is_contiguous() || is_rows(x) ? with_plain_strides(x) : x.contiguous(x.suggest_memory_format());
}

// Whether batch norms compute x with channels innermost. Three-dimensional results are contiguous on a CPU, as PyTorch's.
inline bool batch_norm_in_rows(const at::Tensor& x) {
  if (x.is_contiguous() || (x.dim() == 3 && x.is_cpu())) return false;
  return is_rows(x) || x.suggest_memory_format() != at::MemoryFormat::Contiguous;
}

// t, or a copy of it, whose elements have the offsets of these strides.
inline at::Tensor densely(const at::Tensor& t, at::IntArrayRef strides) {
  return lie_alike(t.sizes(), t.strides(), strides) ? t : aten::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

// ... those of x.
inline at::Tensor in_layout_of(const at::Tensor& t, const at::Tensor& x) { return densely(t, x.strides()); }

// t, or a copy of it, with channels innermost or, without `rows`, contiguous.
inline at::Tensor laid_out(const at::Tensor& t, bool rows) {
  if (rows ? is_rows(t) : t.is_contiguous()) return with_plain_strides(t);
  return rows ? t.movedim(1, -1).contiguous().movedim(-1, 1) : t.contiguous();
}

inline at::Tensor in_batch_norm_layout(const at::Tensor& x) { return laid_out(x, batch_norm_in_rows(x)); }

// Whether PyTorch's activation has the strides of its input.
inline bool keeps_strides(std::string_view act) { return act == "none" || act == "relu6" || act == "prelu"; }

// The result of a batch norm of x, from in_batch_norm_layout, with the strides of PyTorch's activation after its batch norm.
inline at::Tensor batch_norm_result(const at::Tensor& x, std::string_view act) {
  if (keeps_strides(act)) return aten::empty_like(x);
  return aten::empty_strided(x.sizes(), elementwise_strides(x.sizes(), x.strides(), x.strides()), x.options());
}

// t, or a copy of it, with these strides.
inline at::Tensor with_strides(const at::Tensor& t, at::IntArrayRef strides) {
  return t.strides() == strides ? t : aten::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

// The strides of PyTorch's act(a + b).
inline Strides strides_of_sum(const at::Tensor& a, const at::Tensor& b, std::string_view act) {
  const Strides sum = elementwise_strides(a.sizes(), a.strides(), b.strides());
  return keeps_strides(act) ? sum : elementwise_strides(a.sizes(), sum, sum);
}

// y, computed from a and b, with these strides.
inline at::Tensor in_strides_of_sum(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, std::string_view act) {
  return with_strides(y, strides_of_sum(a, b, act));
}

}  // namespace cnnkern
