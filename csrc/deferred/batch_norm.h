// A batch norm whose result is computed when it is first used, together with what uses it (deferred.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "deferred/site.h"

namespace cnnkern {

// The batch norm of x, deferred where that cannot be told from computing it now. The activation, which the operator's
// function has behind these arguments in Python, is "none".
at::Tensor defer_batch_norm(const std::shared_ptr<Site>& site, const at::Tensor& x, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, bool training, double momentum, double eps);

}  // namespace cnnkern
