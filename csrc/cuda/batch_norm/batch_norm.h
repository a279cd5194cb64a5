// Tensors as the batch-norm kernels take them.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <tuple>

#include "aten.h"
#include "check.h"
#include "cuda/batch_norm/batch_norm.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout.h"

namespace cnnkern {

// The forward pass of any batch-norm operator, without what is its own. y and the others were allocated for x.
template <typename T>
gpu::BatchNormForward<T> batch_norm_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                            bool training, double momentum, double eps, const Tensor& y,
                                            const Tensor& mean, const Tensor& rstd) {
  return {{.x = x.const_data_ptr<T>(),
           .mean = mean.mutable_data_ptr<double>(),
           .rstd = rstd.mutable_data_ptr<double>(),
           .view = gpu::ChannelView(layout_of(x)),
           .running_mean = channel_vector<T>(running_mean),
           .running_var = channel_vector<T>(running_var),
           .momentum = momentum,
           .eps = eps},
          y.mutable_data_ptr<T>(),
          {channel_vector<T>(weight), channel_vector<T>(bias)},
          training};
}

template <typename T, typename P>
void reduce_and_map(const P& p, const gpu::Cut<T>& cut, const Tensor& x) {
  const Tensor workspace = aten::empty({cut.template workspace<typename P::Reduction>()}, x.options().dtype(at::kDouble));
  gpu::reduce_and_map(p, cut, workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
}

// Calls f with any activation. Those of mobile networks are types of their own, the others chosen in the kernel.
template <typename F>
void with_device_activation(const char* op, const ActivationName& act, const F& f) {
  with_activation(op, act, [&](auto activation) {
    if constexpr (std::is_same_v<decltype(activation), OtherActivation>) {
      if (activation.kind == OtherActivation::kRelu6) return f(Relu6{});
      if (activation.kind == OtherActivation::kSilu) return f(Silu{});
    }
    f(activation);
  });
}

// Launches a forward pass; pointers: what it reads and writes of x's shape.
template <typename T, typename P, typename... Pointers>
void launch_forward(const P& p, const Tensor& x, const Pointers*... pointers) {
  const gpu::Cut<T> cut(layout_of(x), p.training, pointers...);
  if (p.training)
    reduce_and_map(p, cut, x);
  else
    gpu::map(p, cut, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct BatchNormGradients {
  Tensor dx, dresidual, dweight, dbias;  // undefined where not wanted
};

// Launches the backward pass behind `gate`.
template <typename T, typename Gate>
void launch_backward(const Gate& gate, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, bool training,
                     const BatchNormGradients& gradients) {
  using S = gpu::compute_t<T>;
  const gpu::Layout layout = layout_of(x);
  const Tensor coefficients = aten::empty({layout.C, 2}, x.options().dtype(c10::CppTypeToScalarType<S>::value));
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
  const auto run = [&](auto is_training) {
    const gpu::BatchNormBackward<T, Gate, decltype(is_training)::value> backward{
        .dy = dy.const_data_ptr<T>(),
        .x = x.const_data_ptr<T>(),
        .dx = pointer(gradients.dx),
        .dresidual = pointer(gradients.dresidual),
        .mean = mean.const_data_ptr<double>(),
        .rstd = rstd.const_data_ptr<double>(),
        .count = layout.N * layout.HW,
        .parameters = {channel_vector<T>(weight), channel_vector<T>(bias)},
        .dweight = channel_vector<T>(gradients.dweight),
        .dbias = channel_vector<T>(gradients.dbias),
        .coefficients = coefficients.mutable_data_ptr<S>(),
        .gate = gate};
    const gpu::Cut<T> cut(layout, training, gate.template reads<T>(), backward.dy, backward.x, backward.dx, backward.dresidual);
    reduce_and_map(backward, cut, x);
  };
  if (training)
    run(std::true_type{});
  else
    run(std::false_type{});
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The gradient of x, or of what is like it, where it is wanted.
inline Tensor gradient_like(bool wanted, const Tensor& x) { return wanted ? aten::empty_like(x) : Tensor(); }

// That of a vector of C, in its dtype; in the dtype of sums where the vector, which the gradient need not read, is not given.
inline Tensor parameter_gradient(bool wanted, const OptionalTensor& t, const Tensor& x) {
  if (!wanted) return Tensor();
  const Tensor& given = tensor_or_undefined(t);
  return given.defined() ? aten::empty_like(given) : aten::empty({x.size(1)}, x.options().dtype(wide_type(x)));
}

// What the operator returns of it.
inline Tensor or_empty(const Tensor& gradient, const Tensor& x) {
  return gradient.defined() ? gradient : aten::empty({0}, x.options());
}

inline void zero(const BatchNormGradients& gradients) {
  for (const Tensor& t : {gradients.dx, gradients.dresidual, gradients.dweight, gradients.dbias})
    if (t.defined()) t.zero_();
}

}  // namespace cnnkern
