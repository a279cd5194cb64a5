// An activation by PyTorch's own differentiable operators. Raises ValueError for what is none.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"

namespace cnnkern {

at::Tensor activation_by_pytorch(const at::Tensor& pre, const ActivationName& act);

// The same with a slope of any dtype that cnnkern's operators accept.
at::Tensor prelu_by_pytorch(const at::Tensor& pre, const at::Tensor& slope);

}  // namespace cnnkern
