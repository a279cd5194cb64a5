// bn_act_conv2d: y = conv2d(act(batch_norm(x)), kernel), grouped; the batch norm and its activation are applied to x as the
// convolution reads it. Backward: the gradient of act(batch_norm(x)), from which bn_act's own backward pass goes on, and dkernel, for which
// act(batch_norm(x)) is computed again.
// Memory traffic, in tensors read or written: 3 forward (statistics, x, y) where bn_act and the convolution take 4 or 5; backward as
// both. Neither pass stores act(batch_norm(x)). Where the rule leaves the convolution to the library, both are computed one
// after the other.
#include <array>

#include "cpu/batch_norm/batch_norm.h"
#include "cpu/conv/of_norm.h"
#include "kernels.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

signature::bn_act bn_act_cpu;
signature::sync_bn sync_bn_cpu;
signature::grouped_conv2d grouped_conv2d_cpu;
signature::grouped_conv2d_backward grouped_conv2d_backward_cpu;

namespace {

// Of bn_act all but the map.
template <typename T>
struct Statistics : BatchNormForward<T> {
  static constexpr bool reduces() { return true; }
  static constexpr bool maps() { return false; }
  template <typename At>
  void map(const At&, int64_t, bool) const {}
  template <typename At>
  void map_part(const At&, int64_t, int64_t) const {}
};

// In a layout that the kernels read.
bool is_dense(const Tensor& x) { return x.numel() > 0 && (x.is_contiguous() || is_rows(x)); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_conv2d_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                     const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                                     double momentum, double eps, c10::string_view act, std::optional<double> act_param,
                                                     const Tensor& kernel, const OptionalTensor& kernel_bias, at::IntArrayRef stride,
                                                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_batch_norm("cnnkern::bn_act_conv2d", x, weight, bias, running_mean, running_var, training, eps);
  check_activation("cnnkern::bn_act_conv2d", {act, act_param});
  if (is_dense(x)) {
    const Tensor x_ = with_plain_strides(x);
    const Layout layout = layout_of(x_);
    Tensor mean = aten::empty({layout.C}, x.options().dtype(at::kDouble)), rstd = aten::empty_like(mean), none = aten::empty({0}, x.options());
    with_type(x_, [&](auto scalar) {
      using T = decltype(scalar);
      Statistics<T> policy{batch_norm_forward<T>(x_, layout, weight, bias, running_mean, running_var, training, momentum, eps, none, mean, rstd)};
      if (training) return run(policy, layout);
      policy.table.resize(layout.C, layout.C);
      for (int64_t c = 0; c < layout.C; c += kLot) policy.prepare(c, std::min(kLot, layout.C - c));
    });
    const Norm norm{weight, bias, mean, rstd, {act, act_param}};
    if (auto y = conv2d_of_norm(norm, x_, kernel, kernel_bias, stride, padding, dilation, groups)) return {*std::move(y), mean, rstd};
    const Tensor a = std::get<0>(sync_bn_cpu(x, {}, weight, bias, mean, rstd, act, act_param));
    return {grouped_conv2d_cpu(a, kernel, kernel_bias, stride, padding, dilation, groups), mean, rstd};
  }
  const auto [a, mean, rstd] = bn_act_cpu(x, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param);
  return {grouped_conv2d_cpu(a, kernel, kernel_bias, stride, padding, dilation, groups), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_conv2d_backward_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                              bool /*training*/, c10::string_view act, std::optional<double> act_param,
                                                              const Tensor& kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                                                              at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> output_mask) {
  check_activation("cnnkern::bn_act_conv2d_backward", {act, act_param});
  if (is_dense(x)) {
    const Norm norm{weight, bias, mean, rstd, {act, act_param}};
    if (auto found = conv2d_of_norm_backward(norm, dy, with_plain_strides(x), kernel, stride, padding, dilation, groups, output_mask))
      return *std::move(found);
  }
  const Tensor a = std::get<0>(sync_bn_cpu(x, {}, weight, bias, mean, rstd, act, act_param));
  return grouped_conv2d_backward_cpu(dy, a, kernel, stride, padding, dilation, groups, output_mask);
}

bool fuses_bn_act_conv2d_cpu(const Tensor& x, const Tensor& kernel, const Tensor& kernel_bias, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return is_dense(x) && reads_through_norm(with_plain_strides(x), kernel, kernel_bias, stride, padding, dilation, groups);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
