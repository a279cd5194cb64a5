// The derivative of max_pool2d: the gradient operator's kernel. That is linear in dy, and its own derivative gathers by the
// same positions. In forward mode and under torch.func transforms PyTorch's own operator answers.
#include <torch/library.h>

#include "autograd/composite.h"
#include "autograd/node.h"
#include "pooling.h"

namespace cnnkern {
namespace {

using at::IntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Size = std::vector<c10::SymInt>;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cnnkern::max_pool2d", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool)>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("cnnkern::max_pool2d_backward", "")
          .typed<Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>();
  return op;
}

// The elements of t, of x's shape, that are the maxima of their windows.
Tensor gathered(const Tensor& t, const Tensor& positions, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  const auto longs = positions.options().dtype(at::kLong);
  const auto begins = [&](int d) { return at::arange(positions.sym_size(2 + d), longs).mul(stride[d]).sub(padding[d]); };
  const Tensor at = positions.to(at::kLong);
  const Tensor row = begins(0).unsqueeze(1) + at.div(kernel[1], "floor"), column = begins(1) + at.remainder(kernel[1]);
  const Tensor place = row * t.sym_size(3) + column;
  return t.flatten(2).gather(2, place.flatten(2)).view_symint(positions.sym_sizes());
}

struct MaxPool2dBackward : torch::autograd::Function<MaxPool2dBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& positions, const Size& size, std::vector<int64_t> kernel,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({positions});
    Tensor dx = backward_op().call(dy, positions, size, kernel, stride, padding, channels_last);
    ctx->saved_data["kernel"] = std::move(kernel);
    ctx->saved_data["stride"] = std::move(stride);
    ctx->saved_data["padding"] = std::move(padding);
    return dx;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(7);
    const auto numbers = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    if (grads[0].defined())
      out[0] = gathered(grads[0], ctx->get_saved_variables()[0], numbers("kernel"), numbers("stride"), numbers("padding"));
    return out;
  }
};

struct MaxPool2d {
  static constexpr const char* kName = "MaxPool2d";
  static constexpr size_t kInputs = 1;  // x
  Size size;                            // height and width of x
  std::vector<int64_t> kernel, stride, padding;
  bool channels_last;

  variable_list backward(const Tensor& dy, const variable_list& saved, const std::array<bool, 1>& needs) const {
    return {needs[0] ? backward_op().call(dy, saved[0], size, kernel, stride, padding, channels_last) : Tensor()};
  }
};

std::tuple<Tensor, Tensor> max_pool2d_by_pytorch(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                                 bool ceil_mode) {
  check_window("cnnkern::max_pool2d", kernel, stride, padding);
  return {at::max_pool2d(x, kernel, stride, padding, /*dilation=*/1, ceil_mode), at::empty({0}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor> max_pool2d_autograd(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, bool ceil_mode) {
  if (has_tangent(x)) return max_pool2d_by_pytorch(x, kernel, stride, padding, ceil_mode);
  const auto forward = [&] { return forward_op().call(x, kernel, stride, padding, ceil_mode); };
  if (at::GradMode::is_enabled() && x.requires_grad())
    return recorded<MaxPool2d>({x}, {}, forward, [&](const auto& results) {
      return std::pair(MaxPool2d{{x.sym_size(2), x.sym_size(3)}, kernel.vec(), stride.vec(), padding.vec(), pooled_in_rows(x)},
                       variable_list{std::get<1>(results)});
    });
  at::AutoDispatchBelowADInplaceOrView below;
  return forward();
}

Tensor max_pool2d_backward_autograd(const Tensor& dy, const Tensor& positions, c10::SymIntArrayRef size, IntArrayRef kernel,
                                    IntArrayRef stride, IntArrayRef padding, bool channels_last) {
  if (at::GradMode::is_enabled() && dy.requires_grad())
    return MaxPool2dBackward::apply(dy, positions, size.vec(), kernel.vec(), stride.vec(), padding.vec(), channels_last);
  at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(dy, positions, size, kernel, stride, padding, channels_last);
}

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  m.impl("max_pool2d", &cnnkern::max_pool2d_autograd);
  m.impl("max_pool2d_backward", &cnnkern::max_pool2d_backward_autograd);
}

TORCH_LIBRARY_IMPL(cnnkern, FuncTorchDynamicLayerFrontMode, m) { m.impl("max_pool2d", &cnnkern::max_pool2d_by_pytorch); }
