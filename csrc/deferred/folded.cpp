#include "deferred/folded.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <Python.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>

#include "block_pool.h"
#include "autograd/composite.h"
#include "check.h"
#include "deferred/deferred.h"
#include "deferred/memory.h"
#include "memory_layout.h"

namespace cnnkern {

namespace {

class FoldedSource final : public Source {
 public:
  FoldedSource(std::shared_ptr<Folded> layer_, FoldedInput input_, at::ScalarType dtype_)
      : layer(std::move(layer_)), input(std::move(input_)), dtype(dtype_) {}
  Result compute(const Tensor& residual, const Activation& act, bool) override {
    return {layer->run(input, residual, act, dtype), {}, {}, {}};
  }
  std::shared_ptr<Source> followed_by(const Activation& act) override {
    return layer->leads(act, dtype) ? std::make_shared<ActivatedSource>(layer, input, dtype, act) : nullptr;
  }
  std::vector<Tensor> reads() const override { return input.reads(); }
  bool has_any_strides() const override { return true; }

  const std::shared_ptr<Folded> layer;
  const FoldedInput input;
  const at::ScalarType dtype;
};

// Modes, for example one that counts operations, have to see those of the original model.
bool is_seen_by_modes() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

template <typename Kind>
std::shared_ptr<Kind> source_of(const Tensor& t) {
  Deferred* deferred = Deferred::of(t);
  if (deferred == nullptr || t.requires_grad()) return nullptr;  // its gradient is needed
  return std::dynamic_pointer_cast<Kind>(deferred->waiting_source());
}

}  // namespace

FoldedInput::FoldedInput(const Tensor& x, bool deferred) : x_(x), deferred_(deferred) {
  if (!deferred)
    was_.remember(x);
  else if (!x.is_inference())
    version_ = x._version();
}

std::shared_ptr<LeadingSource> FoldedInput::before() const { return deferred_ ? source_of<LeadingSource>(x_) : nullptr; }

Tensor FoldedInput::value(const char* layer) const {
  const bool holds = deferred_ ? x_.is_inference() || x_._version() == version_ : was_.holds(x_);
  TORCH_CHECK(holds, "cnnkern: the input of a folded ", layer, " was changed by other means than PyTorch's operators, or by another "
              "thread, before its output was used");
  return deferred_ ? as_computed(x_, layer) : x_;
}

std::vector<Tensor> FoldedInput::reads() const {
  const auto source = before();
  return source == nullptr ? std::vector<Tensor>{x_} : source->reads();
}

ActivatedSource::ActivatedSource(std::shared_ptr<Folded> layer_, FoldedInput input_, at::ScalarType dtype_, Activation act_)
    : LeadingSource(std::move(layer_), std::move(input_)), dtype(dtype_), act(std::move(act_)) {}

Result ActivatedSource::compute(const Tensor& residual, const Activation& none, bool) {
  TORCH_INTERNAL_ASSERT(!residual.defined() && none.name == "none");
  layer->count_alone();
  return {layer->run(input, residual, act, dtype), {}, {}, {}};
}

Result ScaledSource::compute(const Tensor& residual, const Activation& none, bool) {
  TORCH_INTERNAL_ASSERT(!residual.defined() && none.name == "none");
  layer->count_alone();
  return {at::mul(image(), scale()), {}, {}, {}};
}

std::vector<Tensor> ScaledSource::reads() const {
  auto found = input.reads();
  for (const Tensor& t : scale_.reads()) found.push_back(t);
  return found;
}

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
  const auto before = source_of<LeadingSource>(input);
  const bool follows = before != nullptr && is_undisturbed() && computed_in(input) == at::kFloat && this->follows(*before);
  const Tensor x = follows ? input : as_computed(input, name());
  if (follows ? !fits(x) : !takes(x)) return std::nullopt;
  const auto sizes = output_sizes(x);
  if (*std::min_element(sizes.begin(), sizes.end()) <= 0) return std::nullopt;
  return defer(site, FoldedInput(x, follows), sizes, gives_rows(input), computed_in(x));
}

Tensor Folded::take_over(const std::shared_ptr<Site>& site, const Tensor& deferred) {
  const auto before = source_of<FoldedSource>(deferred);
  TORCH_CHECK(before != nullptr, "cnnkern: take_over needs the deferred result of a folded layer");
  Deferred::of(deferred)->take_over("BatchNorm");
  return defer(site, before->input, deferred.sizes().vec(), !deferred.is_contiguous(), before->dtype);
}

Tensor Folded::defer(const std::shared_ptr<Site>& site, const FoldedInput& input, const std::vector<int64_t>& sizes, bool rows,
                     at::ScalarType dtype) {
  const Strides strides = plain_strides(sizes, rows);
  const auto source = std::make_shared<FoldedSource>(shared_from_this(), input, dtype);
  if (!site->defers(0) || !is_undisturbed()) return Deferred::compute_at_once(*source, strides);
  return tensor_of(Deferred::make(source, input.options().dtype(dtype), sizes, strides, {}, {site, 0}));
}

Tensor Folded::run(const FoldedInput& input, const Tensor& residual, const Activation& act, at::ScalarType dtype) {
  if (const auto before = input.before()) {
    const Tensor y = run_with(*before, residual, act);
    before->layer->count_together();  // also if it is faster alone, for a shape like this
    if (y.defined()) return y;
  }
  return compute(input.value(name()), residual, act, dtype);
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

std::optional<Tensor> scaled(const Tensor& scale, const Tensor& image) {
  const auto source = source_of<ActivatedSource>(scale);
  if (source == nullptr || is_seen_by_modes() || !is_undisturbed()) return std::nullopt;
  if (!is_plain(image) || image.dim() != 4 || !image.is_cpu() || scale.dim() != 4 || image.scalar_type() != at::kFloat || source->dtype != at::kFloat)
    return std::nullopt;
  const auto sizes = image.sizes();
  if (scale.sizes() != at::IntArrayRef({sizes[0], sizes[1], 1, 1}) || sizes[2] * sizes[3] == 1 || sizes[1] == 1) return std::nullopt;
  const bool rows = !image.is_contiguous() && is_rows(image);
  if ((!rows && !image.is_contiguous()) || (at::GradMode::is_enabled() && image.requires_grad())) return std::nullopt;
  const Tensor x = as_computed(image, "multiplication");
  if (!is_plain(x) || !is_seen(x) || has_tangent(x) || x.is_inference() != c10::InferenceMode::is_enabled()) return std::nullopt;
  const Tensor factors = as_computed(scale, "multiplication");
  if (!is_seen(factors)) return std::nullopt;
  source->layer->count_together();
  return Deferred::uncounted(std::make_shared<ScaledSource>(source->layer, FoldedInput(x, /*deferred=*/false),
                                                            FoldedInput(factors, /*deferred=*/false)),
                             x.options(), sizes, plain_strides(sizes.vec(), rows));
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
  const auto source = is_seen_by_modes() ? nullptr : source_of<FoldedSource>(t);
  return source == nullptr ? nullptr : source->layer;
}

}  // namespace cnnkern
