// bn_act: y = act(pre), pre = (x - mean) * weight * rstd + bias.
// Backward, with g = dy * act'(pre), n elements per channel: dbias = sum(g), dweight = sum(g * (x - mean)) * rstd,
//   dx = weight * rstd * (g - dbias / n - (x - mean) * rstd * dweight / n)   training
//   dx = weight * rstd * g                                                   eval
// act'(pre) is recomputed from x by the same subtraction and fma as in the forward pass, so it is that of the
// output bit for bit, and nothing but x and two vectors of C is saved.
// Memory traffic, in tensors read or written, while a channel (planes) or the tensor (rows) stays in cache: 2 forward,
// 3 backward; rows beyond the last-level cache 3 and 5. A thread owns blocks of channels, or pieces of rows.
// Accumulators: the arithmetic type for 64 additions, then double (see passes.h).
#include <array>

#include "cpu/batch_norm/batch_norm.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T, typename Act>
struct BnActForward : BatchNormForward<T> {
  using V = Vec<T>;
  Act act;

  template <typename At>
  void map(const At& at, int64_t i, bool stream) const {
    vput(this->y + i, act.template value<T>(this->normalized(at, vload(this->x + i))), stream);
  }
  template <typename At>
  void map_part(const At& at, int64_t i, int64_t n) const {
    vstore(this->y + i, act.template value<T>(this->normalized(at, vload(this->x + i, n, V(0)))), n);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                              bool training, double momentum, double eps, c10::string_view act,
                                              std::optional<double> act_param) {
  check_batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, training, eps);
  check_activation("cnnkern::bn_act", {act, act_param});
  const Tensor x_ = in_batch_norm_layout(x);
  const Layout layout = layout_of(x_);
  Tensor y = batch_norm_result(x_, act);
  Tensor mean = aten::empty({layout.C}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean);
  if (x.numel() == 0) return {y, mean.zero_(), rstd.fill_(1)};
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    with_activation("cnnkern::bn_act", {act, act_param}, [&](auto activation) {
      using Forward = BnActForward<T, decltype(activation)>;
      run(Forward{batch_norm_forward<T>(x_, layout, weight, bias, running_mean, running_var, training, momentum, eps,
                                        y, mean, rstd),
                  activation},
          layout);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, const Tensor& mean,
                                                       const Tensor& rstd, bool training, c10::string_view act,
                                                       std::array<bool, 3> output_mask, std::optional<double> act_param) {
  check_batch_norm_backward("cnnkern::bn_act_backward", dy, x, weight, bias, /*reads_bias=*/act != "none", mean, rstd, output_mask);
  check_activation("cnnkern::bn_act_backward", {act, act_param});
  const Tensor x_ = in_batch_norm_layout(x), dy_ = in_layout_of(dy, x_);
  const Layout layout = layout_of(x_);
  Tensor dx = gradient_like(output_mask[0], x_);
  Tensor dweight = parameter_gradient(output_mask[1], weight, x_), dbias = parameter_gradient(output_mask[2], bias, x_);
  if (x.numel() == 0) return {dx, dweight.zero_(), dbias.zero_()};
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    with_activation("cnnkern::bn_act_backward", {act, act_param}, [&](auto activation) {
      using Gate = ThroughActivation<T, decltype(activation)>;
      run(batch_norm_backward<T>(dy_, x_, layout, weight, bias, mean, rstd, training, {.dx = dx, .dweight = dweight, .dbias = dbias},
                                 Gate{activation}),
          layout);
    });
  });
  return {dx, dweight, dbias};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
