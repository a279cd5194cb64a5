// The derivative of grouped_conv2d: the gradient operator's kernel; second derivatives by PyTorch's convolutions. In forward
// mode and under torch.func transforms PyTorch's own convolution answers.
#include <ATen/autocast_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"

namespace cnnkern {
namespace {

using at::IntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::grouped_conv2d", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef, int64_t)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::grouped_conv2d_backward", "")
                             .typed<Gradients(const Tensor&, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, Mask)>();
  return op;
}

// What of a call is no tensor, as a Function keeps it.
struct Settings {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  void save(AutogradContext* ctx) const {
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
  }
  static Settings of(AutogradContext* ctx) {
    return {ctx->saved_data["stride"].toIntVector(), ctx->saved_data["padding"].toIntVector(),
            ctx->saved_data["dilation"].toIntVector(), ctx->saved_data["groups"].toInt()};
  }
};

struct GroupedConv2dBackward : torch::autograd::Function<GroupedConv2dBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Tensor& weight,
                               const Settings& s, Mask mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({dy, x, weight});
    s.save(ctx);
    auto [dx, dweight, dbias] = backward_op().call(dy, x, weight, s.stride, s.padding, s.dilation, s.groups, mask);
    return {dx, dweight, dbias};
  }

  // A convolution is linear in x and in the weight, so each of these is one with the other's gradient in its place.
  // at::_convolution_double_backward is the same, but takes a convolution for each group, and torch 2.11 cannot trace it with
  // symbolic sizes.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &dy = saved[0], &x = saved[1], &weight = saved[2];
    const Settings s = Settings::of(ctx);
    const std::vector<int64_t> no_output_padding(s.stride.size(), 0);
    const auto is_given = [](const Tensor& t) { return t.defined() && t.sym_numel() > 0; };
    const bool ddx = is_given(grads[0]), ddweight = is_given(grads[1]), ddbias = is_given(grads[2]);

    Tensor ddy, dx, dweight;
    if (ctx->needs_input_grad(0)) {
      const auto add = [&](const Tensor& t) { ddy = ddy.defined() ? ddy + t : t; };
      const auto conv = [&](const Tensor& of, const Tensor& by) {
        return at::convolution(of, by, {}, s.stride, s.padding, s.dilation, /*transposed=*/false, no_output_padding, s.groups);
      };
      if (ddx) add(conv(grads[0], weight));
      if (ddweight) add(conv(x, grads[1]));
      if (ddbias) {
        std::vector<int64_t> per_channel(dy.dim() - 1, 1);  // of images or of volumes
        per_channel[0] = -1;
        add(grads[2].view(per_channel).expand_as(dy));
      }
    }
    const auto gradients = [&](const Tensor& of, const Tensor& by, Mask mask) {
      return at::convolution_backward(dy, of, by, /*bias_sizes=*/{}, s.stride, s.padding, s.dilation, /*transposed=*/false,
                                      no_output_padding, s.groups, mask);
    };
    if (ddweight && ctx->needs_input_grad(1)) dx = std::get<0>(gradients(x, grads[1], {true, false, false}));
    if (ddx && ctx->needs_input_grad(2)) dweight = std::get<1>(gradients(grads[0], weight, {false, true, false}));
    return {ddy, dx, dweight, Tensor(), Tensor()};
  }
};

struct GroupedConv2d {
  static constexpr const char* kName = "GroupedConv2d";
  static constexpr size_t kInputs = 3;  // x, weight, bias
  Settings s;

  variable_list backward(const Tensor& dy, const variable_list& saved, const Mask& needs) const {
    auto [dx, dweight, dbias] = backward_op().call(dy, saved[0], saved[1], s.stride, s.padding, s.dilation, s.groups, needs);
    return {needs[0] ? dx : Tensor(), needs[1] ? dweight : Tensor(), needs[2] ? dbias : Tensor()};
  }
};

Tensor conv2d_by_pytorch(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  return at::convolution(x, weight, bias, stride, padding, dilation, /*transposed=*/false, /*output_padding=*/{0}, groups);
}

Tensor grouped_conv2d_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const Tensor& b = tensor_or_undefined(bias);
  if (has_tangent(x) || has_tangent(weight) || has_tangent(b))
    return conv2d_by_pytorch(x, weight, bias, stride, padding, dilation, groups);
  const auto forward = [&] { return forward_op().call(x, weight, bias, stride, padding, dilation, groups); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || requires_grad(b)))
    return recorded<GroupedConv2d>({x, weight, b}, {x, weight}, forward, [&](const Tensor&) {
      return std::pair(GroupedConv2d{{stride.vec(), padding.vec(), dilation.vec(), groups}}, variable_list());
    });
  at::AutoDispatchBelowADInplaceOrView below;
  return forward();
}

Gradients grouped_conv2d_backward_autograd(const Tensor& dy, const Tensor& x, const Tensor& weight, IntArrayRef stride,
                                           IntArrayRef padding, IntArrayRef dilation, int64_t groups, Mask mask) {
  if (at::GradMode::is_enabled() && (dy.requires_grad() || x.requires_grad() || weight.requires_grad())) {
    auto out = GroupedConv2dBackward::apply(dy, x, weight, Settings{stride.vec(), padding.vec(), dilation.vec(), groups}, mask);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, x, weight, stride, padding, dilation, groups, mask);
}

// Autocast runs convolutions in the lower precision, as PyTorch's own.
template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
Tensor grouped_conv2d_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, kDevice); };
  return forward_op().call(cast(x), cast(weight), cast(bias), stride, padding, dilation, groups);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("grouped_conv2d", &cnnkern::grouped_conv2d_autograd);
  m.impl("grouped_conv2d_backward", &cnnkern::grouped_conv2d_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, AutocastCPU, m) {
  m.impl("grouped_conv2d", &cnnkern::grouped_conv2d_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(cnnkern, AutocastCUDA, m) {
  m.impl("grouped_conv2d", &cnnkern::grouped_conv2d_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}
TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("grouped_conv2d", &cnnkern::conv2d_by_pytorch); }
