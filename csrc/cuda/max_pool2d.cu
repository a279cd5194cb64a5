// max_pool2d and max_pool2d_backward on CUDA tensors. The kernels are in max_pool2d.cuh.
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <tuple>

#include "aten.h"
#include "cuda/max_pool2d.cuh"
#include "pooling.h"

namespace cnnkern {

std::tuple<Tensor, Tensor> max_pool2d_cuda(const Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                           bool ceil_mode) {
  const bool rows = pooled_in_rows(x);
  const PoolGeometry g = check_max_pool2d("cnnkern::max_pool2d", x, kernel_size, stride, padding, ceil_mode, rows);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto format = pool_format(rows);
  const Tensor x_ = x.contiguous(format);
  const Tensor y = aten::empty({x.size(0), x.size(1), g.OH, g.OW}, x.options().memory_format(format));
  const Tensor positions = aten::empty(y.sizes(), x.options().dtype(at::kByte).memory_format(format));
  if (y.numel() == 0) return {y, positions};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "max_pool2d", [&] {
    gpu::max_pool2d_forward(g, x_.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), positions.mutable_data_ptr<uint8_t>(),
                            c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, positions};
}

Tensor max_pool2d_backward_cuda(const Tensor& dy, const Tensor& positions, at::IntArrayRef size, at::IntArrayRef kernel_size,
                                at::IntArrayRef stride, at::IntArrayRef padding, bool channels_last) {
  const char* op = "cnnkern::max_pool2d_backward";
  const PoolGeometry g = check_max_pool2d_backward(op, dy, positions, size, kernel_size, stride, padding, channels_last);
  const c10::cuda::CUDAGuard guard(dy.device());
  const auto format = pool_format(channels_last);
  const Tensor dy_ = dy.contiguous(format), positions_ = positions.contiguous(format);
  const Tensor dx = aten::empty({dy.size(0), dy.size(1), g.H, g.W}, dy.options().memory_format(format));
  if (dx.numel() == 0) return dx;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dy.scalar_type(), "max_pool2d_backward", [&] {
    gpu::max_pool2d_backward(g, dy_.const_data_ptr<scalar_t>(), positions_.const_data_ptr<uint8_t>(), dx.mutable_data_ptr<scalar_t>(),
                             c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dx;
}

}  // namespace cnnkern
