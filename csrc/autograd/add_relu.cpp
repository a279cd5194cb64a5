// The derivative of add_relu: the gradient operator's kernel, which is linear in dy and so its own derivative. In
// forward mode and under torch.func transforms PyTorch's own operators answer.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"
#include "autograd/strides.h"

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
                             .typed<Tensor(const Tensor&, const Tensor&, at::IntArrayRef)>();
  return op;
}

struct AddReluBackward : torch::autograd::Function<AddReluBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& mask, std::vector<int64_t> order) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    Tensor dx = backward_op().call(dy, mask, order);
    ctx->saved_data["order"] = std::move(order);
    return dx;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto order = ctx->saved_data["order"].toIntVector();
    return {backward_op().call(grads[0], ctx->get_saved_variables()[0].contiguous(), order), Tensor(), Tensor()};
  }
};

struct AddRelu {
  static constexpr const char* kName = "AddRelu";
  static constexpr size_t kInputs = 2;  // x, residual
  std::vector<int64_t> order;           // of the mask
  Strides strides;                      // of y

  static AddRelu of(const Tensor& y) {
    return {has_numbers(y) ? memory_order(y.strides()) : memory_order(y.sym_strides()), strides_of(y)};
  }

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 2>& needs) const {
    Tensor dx = backward_op().call(dy, saved[0].contiguous(), order);
    if (!strides.empty()) dx = restrided(dx, strides_of_gradient(dy, strides, "relu"));
    return {needs[0] ? dx : Tensor(), needs[1] ? dx : Tensor()};
  }
};

std::tuple<Tensor, Tensor> add_relu_by_pytorch(const Tensor& x, const Tensor& residual) {
  check_floating("cnnkern::add_relu", x);
  if (has_numbers(x) && has_numbers(residual)) check_same_shape("cnnkern::add_relu", "residual", residual, x);
  return {at::relu(x + residual), at::empty({0}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor> add_relu_autograd(const Tensor& x, const Tensor& residual) {
  if (has_tangent(x) || has_tangent(residual)) return add_relu_by_pytorch(x, residual);
  const auto forward = [&] { return forward_op().call(x, residual); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || residual.requires_grad()))
    return recorded<AddRelu>({x, residual}, {}, forward, [](const auto& results) {
      const auto& [y, mask] = results;
      return std::pair(AddRelu::of(y), variable_list{mask});
    });
  at::AutoDispatchBelowADInplaceOrView below;
  return forward();
}

Tensor add_relu_backward_autograd(const Tensor& dy, const Tensor& mask, at::IntArrayRef order) {
  if (at::GradMode::is_enabled() && dy.requires_grad()) return AddReluBackward::apply(dy, mask, order.vec());
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, mask, order);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("add_relu", &cnnkern::add_relu_autograd);
  m.impl("add_relu_backward", &cnnkern::add_relu_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("add_relu", &cnnkern::add_relu_by_pytorch); }
