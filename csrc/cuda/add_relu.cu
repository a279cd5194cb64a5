// add_relu and add_relu_backward on CUDA tensors. The kernels are in add_relu.cuh.
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <tuple>

#include "aten.h"
#include "check.h"
#include "cuda/add_relu.cuh"
#include "cuda/mask.h"
#include "memory_layout.h"

namespace cnnkern {

std::tuple<Tensor, Tensor> add_relu_cuda(const Tensor& x, const Tensor& residual) {
  check_floating("cnnkern::add_relu", x);
  check_same_shape("cnnkern::add_relu", "residual", residual, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Strides strides = strides_of_sum(x, residual, "relu");  // in which memory is read from end to end
  const Tensor x_ = densely(x, strides), residual_ = densely(residual, strides);
  const Tensor y = aten::empty_strided(x.sizes(), strides, x.options());
  const Tensor mask = words_of_mask(x, [](int64_t n, const auto& options) { return aten::empty({n}, options); });
  if (x.numel() == 0) return {y, mask.zero_()};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "add_relu", [&] {
    gpu::add_relu_forward(x_.const_data_ptr<scalar_t>(), residual_.const_data_ptr<scalar_t>(),
                          y.mutable_data_ptr<scalar_t>(), words(mask), x.numel(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, mask};
}

Tensor add_relu_backward_cuda(const Tensor& dy, const Tensor& mask, at::IntArrayRef order) {
  const char* op = "cnnkern::add_relu_backward";
  check_floating(op, dy);
  check_mask(op, mask, mask_bytes(dy.numel()), dy);
  check_order(op, order, dy);
  const c10::cuda::CUDAGuard guard(dy.device());
  const Strides strides = strides_in_order(dy.sizes(), order);
  const Tensor dy_ = densely(dy, strides), dx = aten::empty_strided(dy.sizes(), strides, dy.options());
  if (dy.numel() == 0) return dx;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dy.scalar_type(), "add_relu_backward", [&] {
    gpu::add_relu_backward(dy_.const_data_ptr<scalar_t>(), gpu::BitReader{mask.const_data_ptr<uint8_t>()},
                           dx.mutable_data_ptr<scalar_t>(), dy.numel(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dx;
}

}  // namespace cnnkern
