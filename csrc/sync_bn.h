// The requirements on the inputs of synchronised batch norm's parts, on every device.
#pragma once

#include "check.h"

namespace cnnkern {

// The check of an argument that was computed elsewhere, for example summed over processes: float64, dense, of this shape.
inline void check_fp64(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& x) {
  TORCH_CHECK(t.sizes() == shape && t.scalar_type() == at::kDouble && t.is_contiguous() && t.device() == x.device(), op, ": ",
              name, " must be float64, contiguous, of shape ", shape, ", on ", x.device(), "; got ", t.scalar_type(), " ",
              t.sizes(), " on ", t.device());
}

// Synchronised batch norm, from statistics that are given.
inline void check_sync_bn_statistics(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& mean, const Tensor& rstd) {
  check_image(op, x);
  check_channel_vector(op, "weight", weight, x);
  check_channel_vector(op, "bias", bias, x);
  check_fp64(op, "mean", mean, {x.size(1)}, x);
  check_fp64(op, "rstd", rstd, {x.size(1)}, x);
}

inline void check_sync_bn(const char* op, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                          const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, const ActivationName& act) {
  check_sync_bn_statistics(op, x, weight, bias, mean, rstd);
  if (tensor_or_undefined(residual).defined()) check_same_shape(op, "residual", *residual, x);
  check_activation(op, act);
}

inline void check_sync_bn_sums(const char* op, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, const OptionalTensor& mask,
                               bool channels_last, const ActivationName& act, const OptionalTensor& residual,
                               bool wants_dresidual = false) {
  check_sync_bn_statistics(op, x, weight, bias, mean, rstd);
  check_same_shape(op, "dy", dy, x);
  if (tensor_or_undefined(mask).defined()) check_mask(op, *mask, mask_bytes(x.numel()), x);
  const bool adds = tensor_or_undefined(residual).defined();
  if (adds) check_same_shape(op, "residual", *residual, x);
  TORCH_CHECK(!adds || recomputes_sum(act.name), op, ": the gradient of ", act.name, " reads no residual; got one");
  TORCH_CHECK(!wants_dresidual || adds || tensor_or_undefined(mask).defined(), op,
              ": output_mask asks for dresidual, but mask and residual are None");
  check_channels_last(op, dy, channels_last);
  check_activation(op, act);
}

inline void check_sync_bn_backward(const char* op, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                   const OptionalTensor& mask, bool channels_last, const ActivationName& act, const Tensor& sums,
                                   const Tensor& count, const std::array<bool, 2>& output_mask, const OptionalTensor& residual) {
  check_sync_bn_sums(op, dy, x, weight, bias, mean, rstd, mask, channels_last, act, residual, output_mask[1]);
  check_fp64(op, "sums", sums, {2, x.size(1)}, x);
  check_fp64(op, "count", count, {1}, x);
}

}  // namespace cnnkern
