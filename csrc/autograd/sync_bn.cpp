// The parts of batch norm over processes have no derivative each: that of the whole takes a collective between them, and
// is cnnkern/ops/sync_bn_autograd.py's. Where gradients are recorded they refuse, rather than to give a result without.
#include <torch/library.h>

#include "autograd/composite.h"
#include "kernels.h"

namespace cnnkern {
namespace {

template <typename... Arguments>
bool any_requires_grad(const Arguments&... arguments) {
  const auto wants = []<typename A>(const A& a) {
    if constexpr (std::is_same_v<A, Tensor>) return requires_grad(a);
    if constexpr (std::is_same_v<A, OptionalTensor>) return requires_grad(tensor_or_undefined(a));
    return false;
  };
  return (wants(arguments) || ...);
}

template <typename Signature>
struct BelowAutograd;
template <typename Result, typename... Arguments>
struct BelowAutograd<Result(Arguments...)> {
  template <const char* kName>
  static Result call(Arguments... arguments) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !any_requires_grad(arguments...), kName,
                " is a part of a batch norm over processes and has no derivative of its own; "
                "cnnkern.functional.sync_batch_norm_act is differentiable");
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kName, "").typed<Result(Arguments...)>();
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(std::forward<Arguments>(arguments)...);
  }
};

constexpr char kStats[] = "cnnkern::sync_bn_stats", kForward[] = "cnnkern::sync_bn", kSums[] = "cnnkern::sync_bn_sums",
               kBackward[] = "cnnkern::sync_bn_backward";

}  // namespace
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, Autograd, m) {
  using namespace cnnkern;
  m.impl("sync_bn_stats", &BelowAutograd<signature::sync_bn_stats>::call<kStats>);
  m.impl("sync_bn", &BelowAutograd<signature::sync_bn>::call<kForward>);
  m.impl("sync_bn_sums", &BelowAutograd<signature::sync_bn_sums>::call<kSums>);
  m.impl("sync_bn_backward", &BelowAutograd<signature::sync_bn_backward>::call<kBackward>);
}
