// A tensor as the CPU kernels see it: its layout's shape, and per-channel vectors of any type.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/passes.h"
#include "memory_layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

inline Layout layout_of(const at::Tensor& x) {  // x from in_layout
  const int64_t N = x.size(0), C = x.size(1);
  const int64_t HW = x.numel() / std::max<int64_t>(N * C, 1);
  return {HW == 1 || !x.is_contiguous(), N, C, HW};
}

// A vector of one value per channel in whatever floating type, read and written as double.
class ChannelVector {
 public:
  ChannelVector(const at::Tensor& t)
      : data_(t.defined() ? t.data_ptr() : nullptr),
        type_(t.defined() ? t.scalar_type() : at::kFloat),
        stride_(t.defined() ? t.stride(0) : 0) {}
  explicit operator bool() const { return data_ != nullptr; }
  // n channels from c.
  void read(int64_t c, int64_t n, double* values) const {
    with_data([&](const auto* data) {
      for (int64_t j = 0; j < n; ++j) values[j] = data[(c + j) * stride_];
    });
  }
  void write(int64_t c, int64_t n, const double* values) const {
    with_data([&]<typename E>(E* data) {
      for (int64_t j = 0; j < n; ++j) data[(c + j) * stride_] = static_cast<compute_t<E>>(values[j]);
    });
  }

 private:
  template <typename F>
  void with_data(const F& f) const {
    switch (type_) {
      case at::kFloat: return f(static_cast<float*>(data_));
      case at::kDouble: return f(static_cast<double*>(data_));
      case at::kBFloat16: return f(static_cast<c10::BFloat16*>(data_));
      default: return f(static_cast<c10::Half*>(data_));
    }
  }

  void* data_;
  at::ScalarType type_;
  int64_t stride_;
};

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
