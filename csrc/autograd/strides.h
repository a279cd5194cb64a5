// The strides of gradients, which are those that PyTorch's own operators give theirs.
#pragma once

#include <ATen/Functions.h>

#include "check.h"
#include "memory_layout.h"

namespace cnnkern {

// Sizes that torch.compile traces have no numbers to be checked.
inline bool has_numbers(const Tensor& x) { return !x.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }

// The strides of a tensor, to be kept: none where it has no numbers.
inline Strides strides_of(const Tensor& t) {
  return has_numbers(t) ? Strides(t.strides().begin(), t.strides().end()) : Strides();
}

// Whether PyTorch's gradient of an activation reads its result; else it reads what the activation was given.
inline bool reads_result(c10::string_view act) { return act == "relu" || act == "sigmoid"; }

// The strides that PyTorch's gradient of an activation has when dy arrives: what it reads had `strides`.
inline Strides strides_of_gradient(const Tensor& dy, const Strides& strides, c10::string_view act) {
  if (act == "none") return strides_of(dy);
  const at::IntArrayRef saved = strides, arrived = dy.strides();
  const bool saved_first = act == "relu" || act == "leaky_relu" || act == "prelu";  // in the operator's list of inputs
  return saved_first ? elementwise_strides(dy.sizes(), saved, arrived) : elementwise_strides(dy.sizes(), arrived, saved);
}

// The strides of PyTorch's batch_norm(x) + residual.
inline Strides strides_of_plain_sum(const Tensor& x, const Tensor& residual) {
  if (!has_numbers(x) || !has_numbers(residual)) return {};
  return elementwise_strides(x.sizes(), plain_strides(x.sizes(), batch_norm_in_rows(x)), residual.strides());
}

// t with these strides, differentiably; as it is where there are none: tensors that are traced may have no numbers.
inline Tensor restrided(const Tensor& t, const Strides& strides) {
  if (strides.empty() || t.strides() == at::IntArrayRef(strides)) return t;
  if (lie_alike(t.sizes(), t.strides(), strides)) return t.as_strided(t.sizes(), strides);
  return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

// dx of a batch norm with the strides of PyTorch's. They are those of x's memory format, and x may seem to have two: (N, C, 1, 1)
// is contiguous and channels_last, and strides may suggest yet another. PyTorch decides by the gradient that arrives.
// read: the strides of the tensor that the gradient of `act`, the activation after the batch norm, reads.
inline Tensor in_strides_of_batch_norm_gradient(const Tensor& dx, const Tensor& x, const Tensor& dy, const Strides& read,
                                                c10::string_view act) {
  using at::MemoryFormat;
  if (!x.is_cpu() || !has_numbers(x)) return dx;
  const auto is_dense = [](const Tensor& t) { return t.is_contiguous() || (t.dim() >= 4 && is_rows(t)); };
  const MemoryFormat rows = x.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
  const MemoryFormat format = x.is_contiguous() ? MemoryFormat::Contiguous : rows, suggested = x.suggest_memory_format();
  if (format == suggested || !is_dense(x)) return dx;
  const auto meta = at::TensorOptions(x.scalar_type()).device(at::kMeta);
  const Tensor g = at::empty_strided(x.sizes(), strides_of_gradient(dy, read, act), meta);
  const bool agree = is_dense(g) && g.suggest_memory_format() == suggested;
  return restrided(dx, strides_of(at::empty(x.sizes(), meta, agree ? format : suggested)));
}

}  // namespace cnnkern
