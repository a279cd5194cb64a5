// Input contracts that several operators share, one helper each. Every message names the operator, what came and
// what is allowed. Types and wording follow torch.nn.functional.batch_norm where it checks the same thing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

#include "activations.h"

namespace cnnkern {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const Tensor& tensor_or_undefined(const OptionalTensor& t) {
  static const Tensor undefined;
  return t.has_value() ? *t : undefined;
}

inline OptionalTensor optional_of(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// The dtype of sums over x, and of results without a dtype of their own.
inline at::ScalarType wide_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_floating(const char* op, const Tensor& x) {
  const auto t = x.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf, op,
      ": input must be float32, float64, bfloat16 or float16; got ", t);
}

inline void check_image(const char* op, const Tensor& x) {
  check_floating(op, x);
  TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5, op, ": expected an input of 2 to 5 dimensions (N, C, ...); got ", x.sizes());
}

// On the input's device, in the input's dtype or, for 16-bit input, in float32; for a wide result in the result's dtype.
inline void check_parameter_type(const char* op, const char* name, const OptionalTensor& v, const Tensor& x, bool wide = false) {
  TORCH_CHECK(v->device() == x.device(), op, ": expected ", name, " on ", x.device(), " like the input; got ", v->device());
  TORCH_CHECK(!wide || v->scalar_type() == wide_type(x), op, ": expected ", name, " in ", wide_type(x),
              " beside a result in that dtype; got ", v->scalar_type());
  const bool mixed = v->scalar_type() == at::kFloat && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf);
  TORCH_CHECK(v->scalar_type() == x.scalar_type() || mixed, op, ": expected ", name,
              " in the input's dtype (", x.scalar_type(), ")", x.scalar_type() == at::kDouble ? "" : " or float32",
              "; got ", v->scalar_type());
}

// A per-channel vector: C elements, on the input's device, in the input's dtype or float32.
inline void check_channel_vector(const char* op, const char* name, const OptionalTensor& v, const Tensor& x, bool wide = false) {
  if (!v.has_value() || !v->defined()) return;
  TORCH_CHECK(v->dim() == 1 && v->size(0) == x.size(1), op, ": ", name, " should contain ", x.size(1),
              " elements (one per channel), not ", v->numel(), "; got shape ", v->sizes());
  check_parameter_type(op, name, v, x, wide);
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& x, bool wide = false) {
  TORCH_CHECK(t.sizes() == x.sizes(), op, ": ", name, " must have the input's shape ", x.sizes(), "; got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == (wide ? wide_type(x) : x.scalar_type()), op, ": ", name, " must have the input's dtype ", x.scalar_type(),
              "; got ", t.scalar_type());
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " must be on ", x.device(), "; got ", t.device());
}

inline int64_t elements_per_channel(const Tensor& x) { return x.size(1) == 0 ? 0 : x.numel() / x.size(1); }

// The requirements on batch norm's inputs; nothing has been written when it throws.
inline void check_batch_norm(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                             double eps) {
  check_image(op, x);
  check_channel_vector(op, "weight", weight, x);
  check_channel_vector(op, "bias", bias, x);
  check_channel_vector(op, "running_mean", running_mean, x);
  check_channel_vector(op, "running_var", running_var, x);
  const bool has_mean = tensor_or_undefined(running_mean).defined(), has_var = tensor_or_undefined(running_var).defined();
  TORCH_CHECK_VALUE(has_mean == has_var, op, ": running_mean and running_var must both be given or both be None; got only ",
                    has_mean ? "running_mean" : "running_var");
  TORCH_CHECK(training || has_mean, op, ": running_mean and running_var must be defined in evaluation mode; got None");
  TORCH_CHECK_VALUE(!training || elements_per_channel(x) != 1, "Expected more than 1 value per channel when training, got input size ",
                    x.sizes(), " (", op, ")");
  TORCH_CHECK_VALUE(training ? eps > 0 : eps >= 0, op, ": batch_norm eps must be ",
                    training ? "positive during training" : "non-negative", ", but got ", eps);
}

inline void check_batch_norm_backward(const char* op, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                      const OptionalTensor& bias, bool reads_bias, const Tensor& mean, const Tensor& rstd,
                                      const std::array<bool, 3>& output_mask) {
  check_image(op, x);
  check_same_shape(op, "dy", dy, x);
  check_channel_vector(op, "weight", weight, x);
  check_channel_vector(op, "bias", bias, x);
  for (const Tensor* t : {&mean, &rstd})
    TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) && t->scalar_type() == at::kDouble && t->is_contiguous() &&
                    t->device() == x.device(),
                op, ": mean and rstd must be the vectors that the forward operator returned: float64, ", x.size(1),
                " elements, on ", x.device(), "; got ", t->scalar_type(), " ", t->sizes(), " on ", t->device());
  TORCH_CHECK(!output_mask[1] || tensor_or_undefined(weight).defined(), op, ": output_mask asks for dweight, but weight is None");
  TORCH_CHECK(!output_mask[2] || !reads_bias || tensor_or_undefined(bias).defined(), op,
              ": output_mask asks for dbias behind an activation, which reads the bias, but bias is None");
}

// The slope of a PReLU.
inline void check_slope(const char* op, const Tensor& slope, const Tensor& x) {
  TORCH_CHECK(slope.dim() <= 1 && (slope.numel() == 1 || slope.numel() == x.size(1)), op, ": slope should contain 1 element or ",
              x.size(1), " (one per channel); got shape ", slope.sizes());
  check_parameter_type(op, "slope", slope, x);
}

// The requirements on layer norm's inputs: parameters have the shape of the last dimensions of x.
inline void check_layer_norm(const char* op, const Tensor& x, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                             const OptionalTensor& bias, bool wide) {
  check_floating(op, x);
  const auto n = static_cast<int64_t>(normalized_shape.size());
  TORCH_CHECK(n >= 1, op, ": expected normalized_shape to be at least 1-dimensional; got normalized_shape = ", normalized_shape);
  TORCH_CHECK(x.dim() >= n && x.sizes().slice(x.dim() - n) == normalized_shape, op, ": given normalized_shape=", normalized_shape,
              ", expected an input whose last dimensions are these; got input of size ", x.sizes());
  const auto check = [&](const char* name, const OptionalTensor& v) {
    if (!v.has_value() || !v->defined()) return;
    TORCH_CHECK(v->sizes() == normalized_shape, op, ": expected ", name, " to be of the same shape as normalized_shape = ",
                normalized_shape, "; got ", name, " of shape ", v->sizes());
    check_parameter_type(op, name, v, x, wide);
  };
  check("weight", weight);
  check("bias", bias);
}

inline void check_layer_norm2d(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                               bool wide) {
  check_floating(op, x);
  TORCH_CHECK(x.dim() == 4, op, ": expected an input of 4 dimensions (N, C, H, W); got ", x.sizes());
  check_channel_vector(op, "weight", weight, x, wide);
  check_channel_vector(op, "bias", bias, x, wide);
}

// Whether the result of a layer norm was wide where x is not.
inline bool is_wide(const Tensor& dy, const Tensor& x) { return dy.scalar_type() != x.scalar_type() && dy.scalar_type() == wide_type(x); }

// Further requirements of the gradient of a layer norm: statistics of the shape `shape`, as the forward operator returned them.
inline void check_layer_norm_saved(const char* op, const Tensor& dy, const Tensor& x, at::IntArrayRef shape,
                                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                                   const Tensor& rstd, const std::array<bool, 3>& output_mask) {
  check_same_shape(op, "dy", dy, x, is_wide(dy, x));
  const auto type = wide_type(x);
  for (const Tensor* t : {&mean, &rstd})
    TORCH_CHECK(t->sizes() == shape && t->scalar_type() == type && t->is_contiguous() && t->device() == x.device(), op,
                ": mean and rstd must be those that the forward operator returned: ", type, ", of shape ", shape, ", on ",
                x.device(), "; got ", t->scalar_type(), " ", t->sizes(), " on ", t->device());
  TORCH_CHECK(!output_mask[1] || tensor_or_undefined(weight).defined(), op, ": output_mask asks for dweight, but weight is None");
}

// Of a mask of one bit per element. At least four, which is what a vectorised kernel reads or writes at once.
inline int64_t mask_bytes(int64_t numel) { return std::max<int64_t>((numel + 7) / 8, 4); }

inline void check_mask(const char* op, const Tensor& mask, int64_t bytes, const Tensor& x) {
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.size(0) == bytes && mask.is_contiguous() &&
                  mask.device() == x.device(),
              op, ": mask must be the one that the forward operator returned: uint8, ", bytes, " bytes, on ", x.device(),
              "; got ", mask.scalar_type(), " ", mask.sizes(), " on ", mask.device());
}

// The order of the mask, as bn_add_act_backward gets it.
inline void check_channels_last(const char* op, const Tensor& x, bool channels_last) {
  TORCH_CHECK(!channels_last || (x.dim() >= 3 && x.dim() <= 5), op,
              ": channels_last needs an input of 3 to 5 dimensions; got ", x.sizes());
}

// The order of the mask, as add_relu_backward gets it: every dimension once.
inline void check_order(const char* op, at::IntArrayRef order, const Tensor& dy) {
  std::vector<int64_t> sorted(order.begin(), order.end());
  std::sort(sorted.begin(), sorted.end());
  bool fits = static_cast<int64_t>(sorted.size()) == dy.dim();
  for (size_t d = 0; fits && d < sorted.size(); ++d) fits = sorted[d] == static_cast<int64_t>(d);
  TORCH_CHECK(fits, op, ": order must name each of the ", dy.dim(), " dimensions of dy once; got ", order);
}

// An activation by name, and its parameter: the slope of leaky_relu or alpha of elu, if that is not PyTorch's default.
struct ActivationName {
  std::string_view name;
  std::optional<double> param;
};

// One that is neither none nor relu.
inline OtherActivation other_activation(const char* op, const ActivationName& act) {
  using Other = OtherActivation;
  struct Known {
    std::string_view name;
    Other::Kind kind;
    double param;
  };
  static constexpr Known known[] = {{"relu6", Other::kRelu6, 0},         {"leaky_relu", Other::kLeakyRelu, 0.01},
                                    {"sigmoid", Other::kSigmoid, 0},     {"silu", Other::kSilu, 0},
                                    {"hardswish", Other::kHardswish, 0}, {"elu", Other::kElu, 1},
                                    {"gelu", Other::kGelu, 0},           {"gelu_tanh", Other::kGeluTanh, 0},
                                    {"mish", Other::kMish, 0},           {"hardsigmoid", Other::kHardsigmoid, 0}};
  for (const Known& other : known)
    if (act.name == other.name) return {other.kind, act.param.value_or(other.param)};
  TORCH_CHECK_VALUE(false, op, ": act must be one of none, relu, relu6, leaky_relu, sigmoid, silu, hardswish, elu, gelu, gelu_tanh, "
                    "mish, hardsigmoid; got '", act.name, "'");
}

// Calls f with any activation, as a type.
template <typename F>
auto with_activation(const char* op, const ActivationName& act, F&& f) {
  if (act.param.has_value()) {
    TORCH_CHECK_VALUE(act.name == "leaky_relu" || act.name == "elu", op, ": act_param is the slope of leaky_relu or alpha of elu; got ",
                      *act.param, " for '", act.name, "'");
    TORCH_CHECK_VALUE(std::isfinite(*act.param), op, ": act_param must be finite; got ", *act.param);
  }
  if (act.name == "relu") return f(Relu{});
  if (act.name == "none") return f(Identity{});
  return f(other_activation(op, act));
}

inline void check_activation(const char* op, const ActivationName& act) {
  with_activation(op, act, [](auto) {});
}

// After an addition the gradient of a ReLU goes through a mask of one bit per element, that of any other activation through
// what the activation saw, which is computed again: from x, the bias and the residual.
inline bool recomputes_sum(std::string_view act) { return act != "none" && act != "relu"; }

// The residual in the gradient operator.
inline void check_saved_residual(const char* op, std::string_view act, const OptionalTensor& residual, const Tensor& x) {
  if (!recomputes_sum(act)) return;
  TORCH_CHECK(tensor_or_undefined(residual).defined(), op, ": the gradient of ", act, " reads the residual, but residual is None");
  check_same_shape(op, "residual", *residual, x);
}

inline void check_bn_prelu_backward(const char* op, const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                                    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& slope,
                                    const Tensor& mean, const Tensor& rstd, bool channels_last,
                                    const std::array<bool, 5>& output_mask) {
  check_batch_norm_backward(op, dy, x, weight, bias, /*reads_bias=*/true, mean, rstd, {output_mask[0], output_mask[2], output_mask[3]});
  check_slope(op, slope, x);
  const bool adds = tensor_or_undefined(residual).defined();
  if (adds) check_same_shape(op, "residual", *residual, x);
  TORCH_CHECK(adds || !output_mask[1], op, ": output_mask asks for dresidual, but residual is None");
  check_channels_last(op, x, channels_last);
}

}  // namespace cnnkern
