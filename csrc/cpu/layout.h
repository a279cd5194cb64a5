// A tensor as the CPU kernels see it: its layout's shape, and per-channel vectors of any type.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/sweep.h"
#include "memory_layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

inline Layout layout_of(const at::Tensor& x) {  // x from in_layout
  const int64_t N = x.size(0), C = x.size(1);
  const int64_t HW = x.numel() / std::max<int64_t>(N * C, 1);
  return {HW == 1 || !x.is_contiguous(), N, C, HW};
}

// A vector of one value a channel in whatever floating type, read and written as double.
class ChannelVector {
 public:
  ChannelVector(const at::Tensor& t)
      : data_(t.defined() ? t.data_ptr() : nullptr),
        type_(t.defined() ? t.scalar_type() : at::kFloat),
        stride_(t.defined() ? t.stride(0) : 0) {}
  explicit operator bool() const { return data_ != nullptr; }
  double get(int64_t c) const {
    switch (type_) {
      case at::kFloat: return static_cast<const float*>(data_)[c * stride_];
      case at::kDouble: return static_cast<const double*>(data_)[c * stride_];
      case at::kBFloat16: return static_cast<const c10::BFloat16*>(data_)[c * stride_];
      default: return static_cast<const c10::Half*>(data_)[c * stride_];
    }
  }
  void set(int64_t c, double value) const {
    switch (type_) {
      case at::kFloat: static_cast<float*>(data_)[c * stride_] = static_cast<float>(value); break;
      case at::kDouble: static_cast<double*>(data_)[c * stride_] = value; break;
      case at::kBFloat16: static_cast<c10::BFloat16*>(data_)[c * stride_] = static_cast<float>(value); break;
      default: static_cast<c10::Half*>(data_)[c * stride_] = static_cast<float>(value);
    }
  }

 private:
  void* data_;
  at::ScalarType type_;
  int64_t stride_;
};

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
