// An activation by PyTorch's own differentiable operators. Raises ValueError for a name that is none.
#pragma once

#include <ATen/core/Tensor.h>

namespace cnnkern {

at::Tensor activation_by_pytorch(const at::Tensor& pre, c10::string_view act);

}  // namespace cnnkern
