// Tensors as the layer-norm kernels take them.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "check.h"
#include "cuda/layer_norm/layer_norm_terms.cuh"
#include "cuda/layout.h"
#include "layer_norm_tensors.h"

namespace cnnkern {

// Over dense rows of `cols` elements; parameters are dense or undefined.
void launch_layer_norm_rows(const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y,
                            const Tensor& mean, const Tensor& rstd);
void launch_layer_norm_rows_backward(const Tensor& dy, const Tensor& x, int64_t cols, const Tensor& weight, const Tensor& mean,
                                     const Tensor& rstd, const LayerNormGradients& gradients);

inline Tensor dense(const OptionalTensor& t) {
  return tensor_or_undefined(t).defined() ? t->contiguous() : Tensor();
}

// The type of x, and that of the result: the same, or float for 16-bit x.
template <typename X, typename T>
struct LayerNormTypes {
  using Input = X;
  using Result = T;
};

// Calls f with them.
template <typename F>
void with_layer_norm_types(const Tensor& x, const Tensor& result, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "layer_norm", [&] {
    if constexpr (sizeof(scalar_t) == 2)
      if (result.scalar_type() == at::kFloat) return f(LayerNormTypes<scalar_t, float>{});
    f(LayerNormTypes<scalar_t, scalar_t>{});
  });
}

template <typename T>
gpu::ParameterVector<T> parameter_vector(const Tensor& t) {
  if (!t.defined()) return {nullptr, false};
  return {t.const_data_ptr(), t.scalar_type() == at::kFloat};
}

template <typename X, typename T>
gpu::LayerNormForward<X, T> layer_norm_forward(LayerNormTypes<X, T>, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                               double eps, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  using S = gpu::compute_t<T>;
  return {.x = x.const_data_ptr<X>(),
          .y = y.mutable_data_ptr<T>(),
          .mean = mean.mutable_data_ptr<S>(),
          .rstd = rstd.mutable_data_ptr<S>(),
          .weight = parameter_vector<T>(weight),
          .bias = parameter_vector<T>(bias),
          .eps = eps};
}

template <typename X, typename T>
gpu::LayerNormBackward<X, T> layer_norm_backward(LayerNormTypes<X, T>, const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                 const Tensor& mean, const Tensor& rstd, const Tensor& dx) {
  using S = gpu::compute_t<T>;
  return {.dy = dy.const_data_ptr<T>(),
          .x = x.const_data_ptr<X>(),
          .dx = dx.defined() ? dx.mutable_data_ptr<X>() : nullptr,
          .mean = mean.const_data_ptr<S>(),
          .rstd = rstd.const_data_ptr<S>(),
          .weight = parameter_vector<T>(weight)};
}

template <typename X, typename T>
gpu::LayerNormParameterGradients<T> parameter_gradients(LayerNormTypes<X, T>, const LayerNormGradients& gradients) {
  const auto flat = [](const Tensor& t) { return t.defined() ? t.view({-1}) : t; };
  return {channel_vector<T>(flat(gradients.dweight)), channel_vector<T>(flat(gradients.dbias))};
}

inline Tensor workspace_of(int64_t doubles, const Tensor& x) {
  return aten::empty({doubles}, x.options().dtype(at::kDouble));
}

}  // namespace cnnkern
