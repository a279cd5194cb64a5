#include "autograd/activation.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

namespace cnnkern {

Tensor activation_by_pytorch(const Tensor& pre, const ActivationName& act) {
  return with_activation("cnnkern", act, [&](auto activation) -> Tensor {
    using Act = decltype(activation);
    if constexpr (std::is_same_v<Act, Relu>) return at::relu(pre);
    if constexpr (std::is_same_v<Act, OtherActivation>) {
      switch (activation.kind) {
        case Act::kRelu6: return at::hardtanh(pre, 0, 6);
        case Act::kLeakyRelu: return at::leaky_relu(pre, activation.param);
        case Act::kSigmoid: return at::sigmoid(pre);
        case Act::kSilu: return at::silu(pre);
        case Act::kHardswish: return at::hardswish(pre);
        case Act::kElu: return at::elu(pre, activation.param);
        case Act::kGelu: return at::gelu(pre);
        case Act::kGeluTanh: return at::gelu(pre, "tanh");
        case Act::kMish: return at::mish(pre);
        // PyTorch has no second derivative of hardsigmoid.
        case Act::kHardsigmoid: return pre.requires_grad() ? at::hardtanh(pre + 3, 0, 6) / 6 : at::hardsigmoid(pre);
      }
    }
    return pre;
  });
}

Tensor prelu_by_pytorch(const Tensor& pre, const Tensor& slope) { return at::prelu(pre, slope.to(pre.scalar_type())); }

}  // namespace cnnkern
