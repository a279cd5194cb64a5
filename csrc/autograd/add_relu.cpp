// The derivative of add_relu: the gradient operator's kernel, which is linear in dy and so its own derivative. In
// forward mode and under torch.func transforms PyTorch's own operators answer.
#include <torch/library.h>

#include "autograd/composite.h"

namespace cnnkern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::add_relu", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::add_relu_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, bool)>();
  return op;
}

struct AddReluBackward : torch::autograd::Function<AddReluBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& mask, bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    ctx->saved_data["channels_last"] = channels_last;
    return backward_op().call(dy, mask, channels_last);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const bool channels_last = ctx->saved_data["channels_last"].toBool();
    return {backward_op().call(grads[0], ctx->get_saved_variables()[0], channels_last), Tensor(), Tensor()};
  }
};

struct AddRelu : torch::autograd::Function<AddRelu> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mask] = forward_op().call(x, residual);
    ctx->save_for_backward({mask});
    ctx->mark_non_differentiable({mask});
    ctx->set_materialize_grads(false);  // that of the mask is never read
    ctx->saved_data["channels_last"] = !y.is_contiguous();
    return {y, mask};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(2);
    const bool channels_last = ctx->saved_data["channels_last"].toBool();
    const Tensor dx = backward_op().call(grads[0], ctx->get_saved_variables()[0], channels_last);
    return {ctx->needs_input_grad(0) ? dx : Tensor(), ctx->needs_input_grad(1) ? dx : Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_relu_by_pytorch(const Tensor& x, const Tensor& residual) {
  return {at::relu(x + residual), at::empty({0}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor> add_relu_autograd(const Tensor& x, const Tensor& residual) {
  if (under_functorch() || has_tangent(x) || has_tangent(residual)) return add_relu_by_pytorch(x, residual);
  if (at::GradMode::is_enabled() && (x.requires_grad() || residual.requires_grad())) {
    auto out = AddRelu::apply(x, residual);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return forward_op().call(x, residual);
}

Tensor add_relu_backward_autograd(const Tensor& dy, const Tensor& mask, bool channels_last) {
  if (at::GradMode::is_enabled() && dy.requires_grad()) return AddReluBackward::apply(dy, mask, channels_last);
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, mask, channels_last);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("add_relu", &cnnkern::add_relu_autograd);
  m.impl("add_relu_backward", &cnnkern::add_relu_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchBatched, m) { m.impl("add_relu", &cnnkern::add_relu_by_pytorch); }
