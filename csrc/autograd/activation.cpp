#include "autograd/activation.h"

#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include "check.h"

namespace cnnkern {

Tensor activation_by_pytorch(const Tensor& pre, c10::string_view act) {
  return with_activation("cnnkern", act, [&](auto activation) -> Tensor {
    using Act = decltype(activation);
    if constexpr (std::is_same_v<Act, Relu>) return at::relu(pre);
    if constexpr (std::is_same_v<Act, OtherActivation>) {
      switch (activation.kind) {
        case Act::kRelu6: return at::hardtanh(pre, 0, 6);
        case Act::kLeakyRelu: return at::leaky_relu(pre, Act::kSlope);
        case Act::kSigmoid: return at::sigmoid(pre);
        case Act::kSilu: return at::silu(pre);
        default: return at::hardswish(pre);
      }
    }
    return pre;
  });
}

}  // namespace cnnkern
