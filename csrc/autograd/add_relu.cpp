// The derivative of add_relu: the gradient operator's kernel, which is linear in dy and so its own derivative. In
// forward mode and under torch.func transforms PyTorch's own operators answer.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"

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

struct AddRelu {
  static constexpr const char* kName = "AddRelu";
  static constexpr size_t kInputs = 2;  // x, residual
  bool channels_last;

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 2>& needs) const {
    const Tensor dx = backward_op().call(dy, saved[0], channels_last);
    return {needs[0] ? dx : Tensor(), needs[1] ? dx : Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_relu_by_pytorch(const Tensor& x, const Tensor& residual) {
  check_floating("cnnkern::add_relu", x);
  if (has_numbers(x) && has_numbers(residual)) check_same_shape("cnnkern::add_relu", "residual", residual, x);
  return {at::relu(x + residual), at::empty({0}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor> add_relu_autograd(const Tensor& x, const Tensor& residual) {
  if (under_functorch() || has_tangent(x) || has_tangent(residual)) return add_relu_by_pytorch(x, residual);
  const auto forward = [&] { return forward_op().call(x, residual); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || residual.requires_grad()))
    return recorded({x, residual}, forward, [](const auto& results) {
      const auto& [y, mask] = results;
      return std::pair(AddRelu{!y.is_contiguous()}, variable_list{mask});
    });
  at::AutoDispatchBelowADInplaceOrView below;
  return forward();
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
