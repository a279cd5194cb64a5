// What the parts of batch norm over processes ask of their inputs, on every device.
#pragma once

#include "check.h"

namespace cnnkern {

// What an operator works on that was computed elsewhere, for instance summed over processes: float64, dense, of this shape.
inline void check_fp64(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& x) {
  TORCH_CHECK(t.sizes() == shape && t.scalar_type() == at::kDouble && t.is_contiguous() && t.device() == x.device(), op, ": ",
              name, " must be float64, contiguous, of shape ", shape, ", on ", x.device(), "; got ", t.scalar_type(), " ",
              t.sizes(), " on ", t.device());
}

// Batch norm over processes, from statistics that are given.
inline void check_sync_bn(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Tensor& mean, const Tensor& rstd) {
  check_image(op, x);
  check_channel_vector(op, "weight", weight, x);
  check_channel_vector(op, "bias", bias, x);
  check_fp64(op, "mean", mean, {x.size(1)}, x);
  check_fp64(op, "rstd", rstd, {x.size(1)}, x);
}

inline void check_sync_bn_backward(const char* op, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                   const OptionalTensor& mask, bool channels_last, bool wants_dresidual = false) {
  check_sync_bn(op, x, weight, bias, mean, rstd);
  check_same_shape(op, "dy", dy, x);
  if (tensor_or_undefined(mask).defined()) check_mask(op, *mask, mask_bytes(x.numel()), x);
  TORCH_CHECK(!wants_dresidual || tensor_or_undefined(mask).defined(), op,
              ": output_mask asks for dresidual, but mask is None");
  check_channels_last(op, dy, channels_last);
}

// Beside a residual: those that a mask of one bit an element tells the gradient of.
inline void check_sync_bn_activation(const char* op, bool masked, std::string_view act) {
  if (masked)
    check_relu_or_none(op, act);
  else
    check_activation(op, act);
}

}  // namespace cnnkern
