// An activation by PyTorch's own differentiable operators. Raises ValueError for what is none.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"

namespace cnnkern {

at::Tensor activation_by_pytorch(const at::Tensor& pre, const ActivationName& act);

}  // namespace cnnkern
