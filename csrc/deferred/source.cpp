#include "deferred/source.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <utility>

#include "autograd/composite.h"
#include "deferred/memory.h"
#include "kernels.h"

namespace cnnkern {

namespace {

using NormAdd = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                           const OptionalTensor&, const OptionalTensor&, bool, double, double,
                                                           c10::string_view, std::optional<double>);

const auto& norm_add_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_add_act", "").typed<NormAdd>();
  return op;
}
const auto& norm_prelu_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_prelu", "").typed<signature::bn_prelu>();
  return op;
}

}  // namespace

const c10::TypedOperatorHandle<NormOperator>& norm_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_act", "").typed<NormOperator>();
  return op;
}

Result Source::add_into(const Tensor&, bool) { TORCH_INTERNAL_ASSERT(false, "nothing of this kind adds to memory that is there"); }

void Remembered::remember(const Tensor& t) {
  memory_ = memory_of(t);
  bytes_ = memory_->nbytes();
  resizable_ = t.storage().resizable();
  version_ = t.is_inference() ? 0 : t._version();
}

bool Remembered::holds_memory(const Tensor& t) const {
  return memory_of(t) == memory_ && memory_->nbytes() == bytes_ && t.storage().resizable() == resizable_;
}

bool Remembered::holds(const Tensor& t) const { return holds_memory(t) && (t.is_inference() || t._version() == version_); }

BatchNorm::BatchNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean, const Tensor& running_var,
                     bool training, double momentum, double eps, bool any_strides)
    : arguments_{x, weight, bias, training}, running_mean_(running_mean), running_var_(running_var), momentum_(momentum), eps_(eps),
      any_strides_(any_strides) {}

BatchNorm::~BatchNorm() {
  if (waits_for_statistics_) --waiting_readers_of_statistics;
}

bool BatchNorm::can_wait() {
  const Tensor& x = arguments_.x;
  if (!is_plain(x) || x.dim() < 2 || x.dim() > 5 || x.numel() == 0 || !x.is_floating_point()) return false;
  if (!x.is_contiguous() && !is_rows(x)) return false;
  if (arguments_.training ? x.numel() == x.size(1) : !running_mean_.defined()) return false;
  if (!(eps_ >= 0) || running_mean_.defined() != running_var_.defined()) return false;
  for (const Tensor* t : tensors()) {
    if (!t->defined()) continue;
    if (has_tangent(*t) || !is_seen(*t)) return false;
    if (t == &x) continue;
    const bool mixed = t->scalar_type() == at::kFloat && x.element_size() == 2;
    if (!is_plain(*t) || t->device() != x.device() || t->dim() != 1 || t->size(0) != x.size(1) ||
        !(t->scalar_type() == x.scalar_type() || mixed))
      return false;
  }
  if (requires_grad(running_mean_) || requires_grad(running_var_)) return false;
  // Recorded only if the result can be deferred.
  if (!arguments_.training && !std::exchange(waits_for_statistics_, true)) ++waiting_readers_of_statistics;
  for (size_t i = 0; i < remembered_.size(); ++i)
    if (tensors()[i]->defined()) remembered_[i].remember(*tensors()[i]);
  return true;
}

std::vector<Tensor> BatchNorm::reads() const {
  std::vector<Tensor> found;
  for (const Tensor* t : tensors())
    if (t->defined()) found.push_back(*t);
  return found;
}

bool BatchNorm::keeps_statistic(const c10::StorageImpl* memory) const {
  return (running_mean_.defined() && memory_of(running_mean_) == memory) || (running_var_.defined() && memory_of(running_var_) == memory);
}

void BatchNorm::check_unchanged(bool statistics) const {
  for (size_t i = 0; i < (statistics ? 5 : 3); ++i) {
    const Tensor& t = *tensors()[i];
    // Another thread may train with the same statistics: the update uses their current values.
    const bool updates = i >= 3 && arguments_.training;
    TORCH_CHECK(!t.defined() || (updates ? remembered_[i].holds_memory(t) : remembered_[i].holds(t)), "cnnkern: ",
                i == 0 ? "the input" : i < 3 ? "a parameter" : "a running statistic",
                " of a batch norm was changed by other means than PyTorch's operators, or by another thread, after the batch norm "
                "was called and before its output was used. Use the output first, or leave this batch norm unconverted.");
  }
}

std::pair<OptionalTensor, OptionalTensor> BatchNorm::statistics(bool again) const {
  const bool of_batch_only = arguments_.training && again;
  check_unchanged(!of_batch_only);
  if (of_batch_only) return {};
  return {optional_of(running_mean_), optional_of(running_var_)};
}

Result BatchNorm::compute(const Tensor& residual, const Activation& act, bool again) {
  const auto& [x, weight, bias, training] = arguments_;
  const auto [mean, var] = statistics(again);
  Result result;
  if (act.slope.defined())
    std::tie(result.value, result.mean, result.rstd) =
        norm_prelu_op().call(x, optional_of(residual), optional_of(weight), optional_of(bias), act.slope, mean, var, training, momentum_,
                             eps_);
  else if (residual.defined())
    std::tie(result.value, result.mean, result.rstd, result.mask) =
        norm_add_op().call(x, residual, optional_of(weight), optional_of(bias), mean, var, training, momentum_, eps_, act.name,
                           act.param);
  else
    std::tie(result.value, result.mean, result.rstd) =
        norm_operator().call(x, optional_of(weight), optional_of(bias), mean, var, training, momentum_, eps_, act.name,
                           act.param);
  if (training) updated_statistic(mean), updated_statistic(var);
  return result;
}

bool BatchNorm::adds_into(const Tensor& r) const {
  const Tensor& x = arguments_.x;
  return x.is_cpu() && lie_alike(x.sizes(), r.strides(), plain_strides(x.sizes(), batch_norm_in_rows(x)));
}

Result BatchNorm::add_into(const Tensor& r, bool again) {
  RECORD_FUNCTION("cnnkern::bn_add_into", std::vector<c10::IValue>());
  const auto& [x, weight, bias, training] = arguments_;
  const auto [mean, var] = statistics(again);
  Result result;
  std::tie(result.mean, result.rstd) =
      bn_add_into(x, r, optional_of(weight), optional_of(bias), mean, var, training, momentum_, eps_);
  if (training) updated_statistic(mean), updated_statistic(var);
  return result;
}

}  // namespace cnnkern
