#include "aten.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "block_pool.h"

namespace cnnkern::aten {
namespace {

bool is_plain_cpu(const at::TensorOptions& options) {
  return options.device().is_cpu() && options.layout() == at::kStrided && !options.pinned_memory();
}

// A new tensor with memory from block_pool.h; filled if PyTorch is set to fill uninitialised memory.
at::Tensor filled(at::TensorBase made) {
  at::Tensor t(std::move(made));
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) at::native::fill_empty_deterministic_(t);
  return t;
}

}  // namespace

at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options) {
  if (!is_plain_cpu(options)) return at::empty(size, options);
  const auto type = options.dtype().toScalarType();
  const size_t bytes = at::detail::computeStorageNbytesContiguous(size, c10::elementSize(type));
  return filled(at::detail::empty_generic(size, block_pool::allocator(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), type,
                                          options.memory_format_opt()));
}

at::Tensor empty_like(const at::Tensor& t) {
  return t.is_non_overlapping_and_dense() ? empty_strided(t.sizes(), t.strides(), t.options()) : at::empty_like(t);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef strides, const at::TensorOptions& options) {
  if (!is_plain_cpu(options)) return at::empty_strided(size, strides, options);
  const auto type = options.dtype().toScalarType();
  const size_t bytes = at::detail::computeStorageNbytes(size, strides, c10::elementSize(type));
  return filled(at::detail::empty_strided_generic(size, strides, block_pool::allocator(bytes),
                                                  c10::DispatchKeySet(c10::DispatchKey::CPU), type));
}

at::Tensor zeros(at::IntArrayRef size, const at::TensorOptions& options) { return at::zeros(size, options); }
at::Tensor sum(const at::Tensor& t, at::IntArrayRef dims) { return at::sum(t, dims); }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return at::convolution(x, weight, bias, stride, padding, dilation, /*transposed=*/false, /*output_padding=*/{0}, groups);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> output_mask) {
  return at::convolution_backward(dy, x, weight, /*bias_sizes=*/at::IntArrayRef{weight.size(0)}, stride, padding, dilation,
                                  /*transposed=*/false, /*output_padding=*/{0}, groups, output_mask);
}

}  // namespace cnnkern::aten
