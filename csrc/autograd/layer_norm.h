// What the derivatives of both layer norms share.
#pragma once

#include <ATen/autocast_mode.h>

#include "autograd/composite.h"

namespace cnnkern {

// y of a layer norm over `dims` as a differentiable function of x, weight and bias, from the statistics that the
// forward pass saved; all broadcast against x.
inline Tensor layer_norm_composite(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                   const Tensor& rstd, at::IntArrayRef dims) {
  const auto type = mean.scalar_type();
  const Tensor wide = x.to(type);
  const auto [centre, scale] = differentiable_statistics(wide, mean, rstd, dims);
  Tensor y = (wide - centre) * scale;
  if (weight.defined()) y = y * weight.to(type);
  if (bias.defined()) y = y + bias.to(type);
  return y.to(x.scalar_type());
}

// A tensor, or an optional one, as autocast on a GPU casts it for what it runs in float32.
template <typename T>
T in_float32(const T& t) {
  return at::autocast::cached_cast(at::kFloat, t, c10::DeviceType::CUDA);
}

// What PyTorch computes in the operator's place has no statistics to save.
inline std::tuple<Tensor, Tensor, Tensor> without_statistics(const Tensor& y, const Tensor& x) {
  const Tensor none = at::empty({0}, x.options().dtype(wide_type(x)));
  return {y, none, none.clone()};
}

}  // namespace cnnkern
