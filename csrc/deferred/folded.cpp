#include "deferred/folded.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <Python.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>

#include "block_pool.h"
#include "check.h"
#include "deferred/deferred.h"
#include "deferred/memory.h"

namespace cnnkern {

namespace {

class FoldedSource final : public Source {
 public:
  FoldedSource(std::shared_ptr<Folded> layer, const Tensor& x, const Remembered& x_was, at::ScalarType dtype)
      : layer_(std::move(layer)), x_(x), x_was_(x_was), dtype_(dtype) {}
  Result compute(const Tensor& residual, const Activation& act, bool) override {
    TORCH_CHECK(x_was_.holds(x_), "cnnkern: the input of a folded ", layer_->name(), " was changed by other means than PyTorch's "
                "operators, or by another thread, before its output was used");
    return {layer_->run(x_, residual, act, dtype_), {}, {}, {}};
  }
  std::vector<Tensor> reads() const override { return {x_}; }
  bool has_any_strides() const override { return true; }
  const std::shared_ptr<Folded>& layer() const { return layer_; }
  const Tensor& x() const { return x_; }
  const Remembered& x_was() const { return x_was_; }
  at::ScalarType dtype() const { return dtype_; }

 private:
  std::shared_ptr<Folded> layer_;
  Tensor x_;
  Remembered x_was_;
  at::ScalarType dtype_;
};

// Modes, for example one that counts operations, have to see those of the original model.
bool is_seen_by_modes() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

const FoldedSource* source_of(const Tensor& t) {
  const Deferred* deferred = Deferred::of(t);
  if (deferred == nullptr || t.requires_grad()) return nullptr;  // its gradient is needed
  return dynamic_cast<const FoldedSource*>(deferred->waiting_source());
}

}  // namespace

Folded::Folded(const Tensor& weight, const OptionalTensor& bias, std::vector<at::ScalarType> dtypes, Pack pack,
               const std::vector<Tensor>& sources)
    : weight_(weight), bias_(tensor_or_undefined(bias)), dtypes_(std::move(dtypes)), pack_(std::move(pack)), seal_(sources) {
  block_pool::use_for_pytorch();
}

at::ScalarType Folded::computed_in(const Tensor& t) const {
  const auto device = t.device().type();
  const bool casts = at::autocast::is_autocast_enabled(device) && t.is_floating_point() && t.scalar_type() != at::kDouble;
  return casts ? at::autocast::get_autocast_dtype(device) : t.scalar_type();
}

bool Folded::takes(const Tensor& x) const {
  return is_plain(x) && is_plain(weight_) && x.device() == weight_.device() && x.numel() > 0 && x.is_floating_point() && fits(x) &&
         is_seen(x) && computed_in(x) == computed_in(weight_);
}

bool Folded::is_librarys(const Tensor& x, at::ScalarType dtype) const {
  return x.is_cpu() && at::globalContext().userEnabledMkldnn() && std::find(dtypes_.begin(), dtypes_.end(), dtype) != dtypes_.end();
}

OptionalTensor Folded::bias_as(at::ScalarType dtype) const {
  return bias_.defined() ? OptionalTensor(bias_.to(dtype)) : std::nullopt;
}

std::optional<Tensor> Folded::call(const std::shared_ptr<Site>& site, const Tensor& input) {
  if (is_seen_by_modes()) return std::nullopt;
  const Tensor x = as_computed(input, name());
  if (!takes(x)) return std::nullopt;
  const auto sizes = output_sizes(x);
  if (*std::min_element(sizes.begin(), sizes.end()) <= 0) return std::nullopt;
  Remembered x_was;
  x_was.remember(x);
  return defer(site, x, x_was, sizes, gives_rows(input), computed_in(x));
}

Tensor Folded::take_over(const std::shared_ptr<Site>& site, const Tensor& deferred) {
  const FoldedSource* before = source_of(deferred);
  TORCH_CHECK(before != nullptr, "cnnkern: take_over needs the deferred result of a folded layer");
  const Tensor x = before->x();
  const Remembered x_was = before->x_was();
  const auto dtype = before->dtype();
  const bool rows = !deferred.is_contiguous();
  Deferred::of(deferred)->take_over("BatchNorm");
  return defer(site, x, x_was, deferred.sizes().vec(), rows, dtype);
}

Tensor Folded::defer(const std::shared_ptr<Site>& site, const Tensor& x, const Remembered& x_was, const std::vector<int64_t>& sizes,
                     bool rows, at::ScalarType dtype) {
  const Strides strides = plain_strides(sizes, rows);
  const auto source = std::make_shared<FoldedSource>(shared_from_this(), x, x_was, dtype);
  if (!site->defers(0) || !is_undisturbed()) return Deferred::compute_at_once(*source, strides);
  return tensor_of(Deferred::make(source, x.options().dtype(dtype), sizes, strides, {}, {site, 0}));
}

Tensor Folded::packed(const std::vector<int64_t>& sizes, at::ScalarType dtype) {
  const auto key = std::pair(dtype, sizes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = packed_.find(key);
    if (found != packed_.end()) return found->second;
  }
  const Tensor made = pack_(sizes, dtype);
  constexpr size_t kShapes = 8;  // of inputs, for which a layer keeps packed weights
  std::lock_guard<std::mutex> lock(mutex_);
  if (packed_.size() >= kShapes) packed_.erase(packed_.begin());
  return packed_.emplace(key, made).first->second;
}

PostOperator post_operator(const Activation& act) {
  if (act.name == "relu") return {"relu"};
  if (act.name == "sigmoid") return {"sigmoid"};
  if (act.name == "hardswish") return {"hardswish"};
  if (act.name == "hardsigmoid") return {"hardsigmoid"};
  if (act.name == "silu") return {"swish"};
  if (act.name == "relu6") return {"hardtanh", {0, 6}};
  if (act.name == "leaky_relu") return {"leaky_relu", {other_activation("cnnkern", act).param}};
  if (act.name == "prelu" && act.slope.numel() == 1) return {"leaky_relu", {act.slope.item<double>()}};
  if (act.name == "gelu") return {"gelu", {}, "none"};
  if (act.name == "gelu_tanh") return {"gelu", {}, "tanh"};
  return {};
}

PostOperator::Scalars PostOperator::scalars() const {
  Scalars found;
  for (const double number : numbers) found.push_back(at::Scalar(number));
  return found;
}

FusedActivation::FusedActivation(const Activation& act) {
  if (act.name != "prelu")
    fused = act;
  else if (act.slope.numel() == 1)
    fused = {"leaky_relu", act.slope.item<double>()};
  else
    after = act;
}

std::shared_ptr<Folded> folded_of(const Tensor& t) {
  const FoldedSource* source = is_seen_by_modes() ? nullptr : source_of(t);
  return source == nullptr ? nullptr : source->layer();
}

}  // namespace cnnkern
