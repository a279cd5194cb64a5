// A batch norm whose result is deferred (deferred.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "deferred/site.h"

namespace cnnkern {

// The batch norm of x. It is deferred if nothing can observe that. The operator's function in Python has an activation after these
// arguments; here it is "none".
at::Tensor defer_batch_norm(const std::shared_ptr<Site>& site, const at::Tensor& x, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, bool training, double momentum, double eps);

}  // namespace cnnkern
