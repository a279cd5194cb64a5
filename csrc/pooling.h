// The requirements on max pooling's inputs, its sizes, and the memory format of its results, for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "check.h"
#include "pool_geometry.h"

namespace cnnkern {

constexpr int64_t kWindow = 256;  // most elements of a window: their positions fit a byte

inline void check_window(const char* op, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
              ": kernel_size, stride and padding must be two numbers each; got ", kernel, ", ", stride, " and ", padding);
  TORCH_CHECK(kernel[0] >= 1 && kernel[1] >= 1 && kernel[0] <= kWindow && kernel[1] <= kWindow && kernel[0] * kernel[1] <= kWindow, op,
              ": kernel_size must be greater than zero, and a window have at most ", kWindow, " elements; got kernel_size ", kernel);
  constexpr int64_t kMost = 1 << 30;
  for (size_t d = 0; d < 2; ++d) {
    TORCH_CHECK(stride[d] >= 1 && stride[d] <= kMost, op, ": stride must be from 1 to 2^30; got stride ", stride);
    TORCH_CHECK(padding[d] >= 0 && padding[d] <= kernel[d] / 2, op,
                ": padding must be from 0 to half of the kernel; got padding ", padding, " and kernel_size ", kernel);
  }
}

// Windows along one dimension. The last begins within the input or the padding before it.
inline int64_t pool_windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t room = size + 2 * padding - kernel;
  if (room < 0 && (!ceil_mode || room + stride - 1 < 0)) return 0;
  const int64_t windows = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (windows - 1) * stride >= size + padding ? windows - 1 : windows;
}

inline PoolGeometry pool_geometry(at::IntArrayRef x, int64_t OH, int64_t OW, at::IntArrayRef kernel, at::IntArrayRef stride,
                                  at::IntArrayRef padding, bool rows) {
  const auto small = [](int64_t n) { return static_cast<int>(n); };
  return {rows ? x[0] : x[0] * x[1], rows ? x[1] : 1, x[2], x[3], OH, OW, small(kernel[0]), small(kernel[1]),
          small(stride[0]), small(stride[1]), small(padding[0]), small(padding[1])};
}

inline void check_pool_sizes(const char* op, at::IntArrayRef x) {
  const bool fits = x.size() == 4 && x[1] > 0 && x[2] > 0 && x[3] > 0;
  TORCH_CHECK(fits, op, ": expected an input of 4 dimensions (N, C, H, W), of which only the first may be 0; got ", x);
  TORCH_CHECK(x[1] * x[2] * x[3] < (int64_t{1} << 31), op, ": expected images of fewer than 2^31 elements; got ", x);
}

// Of the forward pass, and of y; `rows`: of channels, as channels_last has them.
inline PoolGeometry check_max_pool2d(const char* op, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                                     at::IntArrayRef padding, bool ceil_mode, bool rows) {
  check_floating(op, x);
  check_pool_sizes(op, x.sizes());
  check_window(op, kernel, stride, padding);
  const auto windows = [&](int d) { return pool_windows(x.size(2 + d), kernel[d], stride[d], padding[d], ceil_mode); };
  const int64_t OH = windows(0), OW = windows(1);
  TORCH_CHECK(OH > 0 && OW > 0, op, ": output size is too small: an input of ", x.sizes(), " with kernel_size ", kernel, ", stride ", stride,
              " and padding ", padding, " has no window; the padded input must have room for one");
  return pool_geometry(x.sizes(), OH, OW, kernel, stride, padding, rows);
}

// size: height and width of x.
inline PoolGeometry check_max_pool2d_backward(const char* op, const Tensor& dy, const Tensor& positions, at::IntArrayRef size,
                                              at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, bool rows) {
  check_floating(op, dy);
  check_window(op, kernel, stride, padding);
  TORCH_CHECK(dy.dim() == 4 && size.size() == 2, op, ": expected dy of 4 dimensions (N, C, H, W), and of x two sizes; got ", dy.sizes(),
              " and ", size);
  const std::array<int64_t, 4> x = {dy.size(0), dy.size(1), size[0], size[1]};
  check_pool_sizes(op, x);
  for (int d = 0; d < 2; ++d) {
    const int64_t least = pool_windows(size[d], kernel[d], stride[d], padding[d], false);
    const int64_t most = pool_windows(size[d], kernel[d], stride[d], padding[d], true);
    TORCH_CHECK(dy.size(2 + d) == least || dy.size(2 + d) == most, op, ": dy must have the output's shape for an input of ", size,
                ", kernel_size ", kernel, ", stride ", stride, " and padding ", padding, "; got ", dy.sizes());
  }
  TORCH_CHECK(positions.sizes() == dy.sizes() && positions.scalar_type() == at::kByte && positions.device() == dy.device(), op,
              ": positions must be those that the forward operator returned: uint8 ", dy.sizes(), " on ", dy.device(), "; got ",
              positions.scalar_type(), " ", positions.sizes(), " on ", positions.device());
  return pool_geometry(x, dy.size(2), dy.size(3), kernel, stride, padding, rows);
}

inline at::MemoryFormat pool_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Whether PyTorch's own max pooling returns a channels_last result for x.
inline bool pooled_in_rows(const Tensor& x) {
  return x.dim() == 4 && x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

}  // namespace cnnkern
