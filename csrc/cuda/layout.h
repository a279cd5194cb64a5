// Tensors as the CUDA kernels see them: their layout's shape, and vectors of one value per channel.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"
#include "cuda/channels.cuh"
#include "memory_layout.h"

namespace cnnkern {

inline gpu::Layout layout_of(const Tensor& x) {  // x from in_layout
  const int64_t N = x.size(0), C = x.size(1), HW = x.numel() / (N * C);
  return {HW == 1 || !x.is_contiguous(), N, C, HW};
}

template <typename T>
gpu::ChannelVector<T> channel_vector(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, false};
  return {t.data_ptr(), t.stride(0), t.scalar_type() == at::kFloat};
}

template <typename T>
gpu::ChannelVector<T> channel_vector(const OptionalTensor& t) {
  return channel_vector<T>(tensor_or_undefined(t));
}

}  // namespace cnnkern
