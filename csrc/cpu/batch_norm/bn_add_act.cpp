// bn_add_act: y = act(pre + residual), pre = (x - mean) * weight * rstd + bias.
// Backward, with g = dy * act'(pre + residual): dresidual = g, and dx, dweight, dbias as those of bn_act. Of relu act' is
// [y > 0], saved as one bit per element, in the order of memory, and nothing is saved of the residual. Of other activations
// it is recomputed from x and the residual, which are saved. Nothing is saved of y.
// Traffic in tensors read or written, while a channel (planes) or the tensor (rows) stays in cache: 3 forward, 4 backward;
// rows beyond the last-level cache 4 and 6. Where the residual is read backward: 5, and 8. A thread owns blocks of channels, or pieces of rows.
// bn_add_into: pre + residual written to the residual's memory, by the same passes.
// Accumulators: the arithmetic type for 64 additions, then double (see passes.h).

#include <array>

#include "aten.h"
#include "cpu/batch_norm/batch_norm.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T, typename Act>
struct BnAddActForward : BatchNormForward<T> {
  using V = Vec<T>;
  static constexpr bool kMasks = std::is_same_v<Act, Relu>;

  const T* residual;
  Act act;
  BitWriter mask;

  template <typename At>
  V pre(const At& at, V x, V r) const {
    return this->normalized(at, x) + r;
  }
  template <typename At>
  void map(const At& at, int64_t i, bool stream) const {
    if (stream) __builtin_prefetch(residual + i + kAhead / sizeof(T), 0, 2);
    const V v = pre(at, vload(this->x + i), vload(residual + i));
    // What was just read is in the cache: a store past it would have it written out first.
    vput(this->y + i, act.template value<T>(v), stream && this->y != residual);
    if constexpr (kMasks) mask.set(i, bits_above(v, V(rounds_to_zero<T>())), V::size());
  }
  template <typename At>
  void map_part(const At& at, int64_t i, int64_t n) const {
    const V v = pre(at, vload(this->x + i, n, V(0)), vload(residual + i, n, V(0)));
    vstore(this->y + i, act.template value<T>(v), n);
    if constexpr (kMasks) mask.set(i, bits_above(v, V(rounds_to_zero<T>())), n);
  }
};

// Writes y, which may be the residual itself: the thread that writes a vector reads it first.
std::tuple<Tensor, Tensor, Tensor> computed_into(Tensor& y, const char* op, const Tensor& x, const Tensor& residual,
                                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                                 const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                                 double momentum, double eps, const ActivationName& act) {
  const Layout layout = layout_of(x);
  Tensor mean = aten::empty({layout.C}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean);
  Tensor mask = aten::zeros({act.name == "relu" ? mask_bytes(x.numel()) : 0}, x.options().dtype(at::kByte));
  if (x.numel() == 0) return {mean.zero_(), rstd.fill_(1), mask};
  with_type(x, [&](auto scalar) {
    using T = decltype(scalar);
    with_activation(op, act, [&](auto activation) {
      using Forward = BnAddActForward<T, decltype(activation)>;
      run(Forward{batch_norm_forward<T>(x, layout, weight, bias, running_mean, running_var, training, momentum, eps,
                                        y, mean, rstd),
                  residual.const_data_ptr<T>(),
                  activation,
                  {mask.mutable_data_ptr<uint8_t>()}},
          layout);
    });
  });
  return {mean, rstd, mask};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_cpu(const Tensor& x, const Tensor& residual,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training,
                                                          double momentum, double eps, c10::string_view act,
                                                          std::optional<double> act_param) {
  const char* op = "cnnkern::bn_add_act";
  check_batch_norm(op, x, weight, bias, running_mean, running_var, training, eps);
  check_same_shape(op, "residual", residual, x);
  check_activation(op, {act, act_param});
  const Tensor x_ = in_batch_norm_layout(x), residual_ = in_layout_of(residual, x_);
  Tensor y = aten::empty_like(x_);
  const auto [mean, rstd, mask] = computed_into(y, op, x_, residual_, weight, bias, running_mean, running_var, training, momentum, eps,
                                                {act, act_param});
  return {in_strides_of_sum(y, x_, residual, act), mean, rstd, mask};
}

std::tuple<Tensor, Tensor> bn_add_into_cpu(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, bool training, double momentum, double eps) {
  const char* op = "cnnkern::bn_add_into";
  check_batch_norm(op, x, weight, bias, running_mean, running_var, training, eps);
  check_same_shape(op, "residual", residual, x);
  const Tensor x_ = in_batch_norm_layout(x);
  TORCH_CHECK(lie_alike(x.sizes(), residual.strides(), x_.strides()), op, ": the residual has to lie in memory as the input does, with "
              "strides ", x_.strides(), "; got ", residual.strides());
  Tensor y = residual;
  const auto [mean, rstd, mask] =
      computed_into(y, op, x_, residual, weight, bias, running_mean, running_var, training, momentum, eps, {"none", std::nullopt});
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_backward_cpu(const Tensor& dy, const Tensor& x,
                                                                   const OptionalTensor& weight,
                                                                   const OptionalTensor& bias, const Tensor& mean,
                                                                   const Tensor& rstd, const Tensor& mask, bool channels_last,
                                                                   bool training, c10::string_view act,
                                                                   std::array<bool, 4> output_mask,
                                                                   const OptionalTensor& residual,
                                                                   std::optional<double> act_param) {
  const char* op = "cnnkern::bn_add_act_backward";
  check_batch_norm_backward(op, dy, x, weight, bias, /*reads_bias=*/recomputes_sum(act), mean, rstd,
                            {output_mask[0], output_mask[2], output_mask[3]});
  check_activation(op, {act, act_param});
  check_saved_residual(op, act, residual, x);
  check_channels_last(op, x, channels_last);
  check_mask(op, mask, act == "relu" ? mask_bytes(x.numel()) : 0, x);
  const Tensor x_ = laid_out(x, channels_last), dy_ = in_layout_of(dy, x_);
  const Tensor residual_ = recomputes_sum(act) ? in_layout_of(*residual, x_) : Tensor();
  const Layout layout = layout_of(x_);
  Tensor dx = gradient_like(output_mask[0], x_), dresidual = gradient_like(output_mask[1], x_);
  Tensor dweight = parameter_gradient(output_mask[2], weight, x_), dbias = parameter_gradient(output_mask[3], bias, x_);
  if (x.numel() == 0) return {dx, dresidual, dweight.zero_(), dbias.zero_()};
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    const auto through = [&](auto gate) {
      run(batch_norm_backward<T>(dy_, x_, layout, weight, bias, mean, rstd, training, {dx, dresidual, dweight, dbias}, gate), layout);
    };
    if (act == "relu")
      through(ThroughMask{{mask.const_data_ptr<uint8_t>(), mask.numel()}});
    else if (act == "none")
      through(ThroughNothing{});
    else
      through(ThroughActivationOfSum<T, OtherActivation>{other_activation(op, {act, act_param}), residual_.const_data_ptr<T>()});
  });
  return {dx, dresidual, dweight, dbias};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
