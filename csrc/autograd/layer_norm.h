// What the derivatives of both layer norms share.
#pragma once

#include <ATen/autocast_mode.h>

#include "autograd/composite.h"

namespace cnnkern {

// y of a layer norm over `dims` as a differentiable function of x, weight and bias, from the statistics that the
// forward pass saved; all broadcast against x. y has the dtype that its gradient has.
inline Tensor layer_norm_composite(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                   const Tensor& mean, const Tensor& rstd, at::IntArrayRef dims) {
  const auto type = mean.scalar_type();
  const Tensor wide = x.to(type);
  const auto [centre, scale] = differentiable_statistics(wide, mean, rstd, dims);
  Tensor y = (wide - centre) * scale;
  if (weight.defined()) y = y * weight.to(type);
  if (bias.defined()) y = y + bias.to(type);
  return y.to(dy.scalar_type());
}

// On a GPU autocast runs layer norms in float32. PyTorch first casts a 16-bit input in a separate kernel, and saves the result.
// cnnkern's kernel reads 16 bits and writes float32. call(x, weight, bias, wide).
template <typename Call>
auto under_autocast(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, bool wide, const Call& call) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  const auto in_float32 = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, c10::DeviceType::CUDA); };
  const bool reads_16_bits = x.is_cuda() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf);
  if (reads_16_bits) return call(x, in_float32(weight), in_float32(bias), true);
  return call(in_float32(x), in_float32(weight), in_float32(bias), wide);
}

// What PyTorch computes in the operator's place has no statistics to save.
inline std::tuple<Tensor, Tensor, Tensor> without_statistics(const Tensor& y, const Tensor& x) {
  const Tensor none = at::empty({0}, x.options().dtype(wide_type(x)));
  return {y, none, none.clone()};
}

}  // namespace cnnkern
