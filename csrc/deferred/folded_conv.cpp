#include "deferred/folded_conv.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>

#include "aten.h"
#include "block_pool.h"
#include "check.h"
#include "deferred/deferred.h"
#include "deferred/memory.h"
#include "folded_kernels.h"
#include "for_this_cpu.h"

namespace cnnkern {

#define DECLARE(kernel) folded_signature::kernel kernel##_cpu;
CNNKERN_DECLARE_FOR_EACH_CPU(CNNKERN_FOLDED_KERNELS, DECLARE)
#undef DECLARE

namespace {

using Scalars = c10::List<std::optional<at::Scalar>>;
using Name = std::optional<c10::string_view>;
using Pointwise = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                         int64_t, c10::string_view, Scalars, Name);
using Binary = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                      at::IntArrayRef, int64_t, c10::string_view, std::optional<at::Scalar>, Name, Scalars, Name);
using Grouped = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t);

template <typename Signature>
auto operator_of(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// oneDNN's name of an activation in a convolution's epilogue; "none" if it lacks it.
struct PostOperator {
  const char* name = "none";
  std::vector<double> numbers = {};
  const char* algorithm = "";
};

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

class Convolved final : public Source {
 public:
  Convolved(std::shared_ptr<FoldedConv> conv, const Tensor& x, const Remembered& x_was, at::ScalarType dtype)
      : conv_(std::move(conv)), x_(x), x_was_(x_was), dtype_(dtype) {}
  Result compute(const Tensor& residual, const Activation& act, bool) override {
    TORCH_CHECK(x_was_.holds(x_), "cnnkern: the input of a folded convolution was changed by other means than PyTorch's operators, "
                "or by another thread, before its output was used");
    return {conv_->run(x_, residual, act, dtype_), {}, {}, {}};
  }
  std::vector<Tensor> reads() const override { return {x_}; }
  bool has_any_strides() const override { return true; }
  const std::shared_ptr<FoldedConv>& conv() const { return conv_; }
  const Tensor& x() const { return x_; }
  const Remembered& x_was() const { return x_was_; }
  at::ScalarType dtype() const { return dtype_; }

 private:
  std::shared_ptr<FoldedConv> conv_;
  Tensor x_;
  Remembered x_was_;
  at::ScalarType dtype_;
};

// Modes, such as one that counts FLOPs, see the original operators.
bool is_seen_by_modes() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

const Convolved* waiting_convolution(const Tensor& t) {
  const Deferred* deferred = Deferred::of(t);
  if (deferred == nullptr || t.requires_grad()) return nullptr;  // the batch norm needs the gradient of the convolution
  return dynamic_cast<const Convolved*>(deferred->waiting_source());
}

}  // namespace

FoldedConv::FoldedConv(const Tensor& weight, const OptionalTensor& bias, Settings settings, Pack pack, const std::vector<Tensor>& sources)
    : weight_(weight), bias_(tensor_or_undefined(bias)), settings_(std::move(settings)), pack_(std::move(pack)), seal_(sources) {
  block_pool::use_for_pytorch();
}

at::ScalarType FoldedConv::computed_in(const Tensor& t) const {
  const auto device = t.device().type();
  const bool casts = at::autocast::is_autocast_enabled(device) && t.is_floating_point() && t.scalar_type() != at::kDouble;
  return casts ? at::autocast::get_autocast_dtype(device) : t.scalar_type();
}

std::vector<int64_t> FoldedConv::output_sizes(const Tensor& x) const {
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, dtypes] = settings_;
  std::vector<int64_t> sizes = {x.size(0), weight_.size(0)};
  for (size_t d = 0; d < stride.size(); ++d) {
    const size_t last = 2 * (stride.size() - 1 - d);
    const int64_t around = pad.empty() ? 0 : pad[last] + pad[last + 1];
    sizes.push_back((x.size(d + 2) + around + 2 * padding[d] - dilation[d] * (weight_.size(d + 2) - 1) - 1) / stride[d] + 1);
    if (x.size(d + 2) + around + 2 * padding[d] < dilation[d] * (weight_.size(d + 2) - 1) + 1) sizes.back() = 0;
  }
  return sizes;
}

bool FoldedConv::takes(const Tensor& x) const {
  if (!is_plain(x) || !is_plain(weight_) || x.device() != weight_.device() || x.dim() != weight_.dim() || x.numel() == 0) return false;
  if (!x.is_floating_point() || x.size(1) != weight_.size(1) * settings_.groups || !is_seen(x)) return false;
  return computed_in(x) == computed_in(weight_);
}

// Whether oneDNN's fused operators compute it.
bool FoldedConv::is_librarys(const Tensor& x, at::ScalarType dtype) const {
  return x.is_cpu() && x.dim() >= 4 && at::globalContext().userEnabledMkldnn() &&
         std::find(settings_.dtypes.begin(), settings_.dtypes.end(), dtype) != settings_.dtypes.end();
}

std::optional<Tensor> FoldedConv::call(const std::shared_ptr<Site>& site, const Tensor& input) {
  if (is_seen_by_modes()) return std::nullopt;
  const Tensor x = as_computed(input);
  if (!takes(x)) return std::nullopt;
  const auto sizes = output_sizes(x);
  if (*std::min_element(sizes.begin(), sizes.end()) <= 0) return std::nullopt;
  const bool rows = (!input.is_contiguous() && is_rows(input)) || (!weight_.is_contiguous() && is_rows(weight_));
  Remembered x_was;
  x_was.remember(x);
  return defer(site, x, x_was, sizes, rows, computed_in(x));
}

Tensor FoldedConv::take_over(const std::shared_ptr<Site>& site, const Tensor& waiting) {
  const Convolved* before = waiting_convolution(waiting);
  TORCH_CHECK(before != nullptr, "cnnkern: FoldedConv.take_over needs the deferred result of a convolution");
  const Tensor x = before->x();
  const Remembered x_was = before->x_was();
  const auto dtype = before->dtype();
  const bool rows = !waiting.is_contiguous();
  Deferred::of(waiting)->take_over("BatchNorm");
  return defer(site, x, x_was, waiting.sizes().vec(), rows, dtype);
}

Tensor FoldedConv::defer(const std::shared_ptr<Site>& site, const Tensor& x, const Remembered& x_was,
                         const std::vector<int64_t>& sizes, bool rows, at::ScalarType dtype) {
  const Strides strides = plain_strides(sizes, rows);
  const auto source = std::make_shared<Convolved>(shared_from_this(), x, x_was, dtype);
  if (!site->defers(0) || !is_undisturbed()) return Deferred::compute_at_once(*source, strides);
  return tensor_of(Deferred::make(source, x.options().dtype(dtype), sizes, strides, {}, {site, 0}));
}

Tensor FoldedConv::run(const Tensor& x, const Tensor& residual, const Activation& act, at::ScalarType dtype) {
  const Tensor padded = (settings_.pad.empty() ? x : at::pad(x, settings_.pad, settings_.pad_mode)).to(dtype);
  if (!is_librarys(padded, dtype)) return by_parts(padded, residual, act);
  if (!is_own(padded, dtype)) return by_library(padded, residual, act);
  return settings_.own == "grouped" ? by_grouped(padded, residual, act) : by_own(padded, residual, act);
}

bool FoldedConv::is_own(const Tensor& x, at::ScalarType dtype) const {
  return !settings_.own.empty() && dtype == at::kFloat && weight_.scalar_type() == dtype &&
         x.size(-1) * x.size(-2) >= settings_.own_from_pixels &&
         c10::multiply_integers(output_sizes(x)) <= settings_.own_to_elements;
}

// By PyTorch's convolution with the folded weights, then the addition and the activation.
Tensor FoldedConv::by_parts(const Tensor& x, const Tensor& residual, const Activation& act) {
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, dtypes] = settings_;
  const OptionalTensor bias = bias_.defined() ? OptionalTensor(bias_.to(x.scalar_type())) : std::nullopt;
  const std::vector<int64_t> none(stride.size(), 0);
  Tensor y = at::convolution(x, weight_.to(x.scalar_type()), bias, stride, padding, dilation, /*transposed=*/false, none, groups);
  if (residual.defined()) y.add_(residual);
  return act.name == "relu" ? y.relu_() : activated(y, act);
}

Tensor FoldedConv::by_library(const Tensor& x, const Tensor& residual, const Activation& act) {
  static const auto pointwise = operator_of<Pointwise>("mkldnn::_convolution_pointwise");
  static const auto binary = operator_of<Binary>("mkldnn::_convolution_pointwise", "binary");
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, dtypes] = settings_;
  const OptionalTensor bias = bias_.defined() ? OptionalTensor(bias_.to(x.scalar_type())) : std::nullopt;
  const Tensor weight = packed(x);
  const block_pool::Scope pooled;
  if (residual.defined()) {
    const Name relu = act.name == "relu" ? Name("relu") : std::nullopt;
    const Tensor y = binary.call(x, residual, weight, bias, padding, stride, dilation, groups, "add", std::nullopt, relu, Scalars(), "");
    return relu ? y : activated(y, act);
  }
  const auto [name, numbers, algorithm] = post_operator(act);
  Scalars scalars;
  for (const double number : numbers) scalars.push_back(at::Scalar(number));
  const Tensor y = pointwise.call(x, weight, bias, padding, stride, dilation, groups, name, scalars, algorithm);
  return std::string_view(name) == "none" ? activated(y, act) : y;
}

// By cnnkern's grouped convolution, then the addition and the activation.
Tensor FoldedConv::by_grouped(const Tensor& x, const Tensor& residual, const Activation& act) {
  static const auto grouped = operator_of<Grouped>("cnnkern::grouped_conv2d");
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, dtypes] = settings_;
  Tensor y = grouped.call(x.contiguous(at::MemoryFormat::ChannelsLast), weight_.to(x.scalar_type()), optional_of(bias_), stride, padding,
                          dilation, groups);
  if (residual.defined()) y.add_(residual);
  return act.name == "relu" ? y.relu_() : activated(y, act);
}

// By cnnkern's kernel, which includes the addition and the activation.
Tensor FoldedConv::by_own(const Tensor& x, const Tensor& residual, const Activation& act) {
  static auto* const pack_pointwise = CNNKERN_FOR_THIS_CPU(pack_pointwise);
  static auto* const pointwise = CNNKERN_FOR_THIS_CPU(pointwise);
  static auto* const pack_depthwise = CNNKERN_FOR_THIS_CPU(pack_depthwise);
  static auto* const depthwise = CNNKERN_FOR_THIS_CPU(depthwise);
  constexpr auto kRows = at::MemoryFormat::ChannelsLast;
  const bool is_pointwise = settings_.own == "pointwise";
  std::call_once(packs_own_, [&] { own_packed_ = (is_pointwise ? pack_pointwise : pack_depthwise)(weight_, bias_); });
  const int64_t stride = settings_.stride[0], channels = weight_.size(0);
  const bool strides = is_pointwise && stride > 1;
  const Tensor from = (strides ? x.slice(2, 0, std::nullopt, stride).slice(3, 0, std::nullopt, stride) : x).contiguous(kRows);
  const Tensor added = residual.defined() ? residual.contiguous(kRows) : residual;
  const auto sizes = output_sizes(x);
  const Tensor y = aten::empty(sizes, x.options().memory_format(kRows));
  const bool is_fused = act.name != "prelu" || act.slope.numel() == 1;
  const Activation fused = !is_fused ? Activation() : act.name == "prelu" ? Activation{"leaky_relu", act.slope.item<double>()} : act;
  const Behind behind{added.defined() ? added.const_data_ptr<float>() : nullptr, fused};
  const float *const in = from.const_data_ptr<float>(), *const packed = own_packed_.const_data_ptr<float>();
  float* const out = y.mutable_data_ptr<float>();
  const ImageSizes image{x.size(0), x.size(2), x.size(3), sizes[2], sizes[3], stride};
  if (is_pointwise)
    pointwise(in, packed, out, x.size(1), channels, y.numel() / channels, behind);
  else
    depthwise(in, packed, out, channels, weight_.size(2), settings_.padding[0], image, behind);
  return is_fused ? y : activated(y, act);
}

Tensor FoldedConv::packed(const Tensor& x) {
  const auto key = std::pair(x.scalar_type(), x.sizes().vec());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = packed_.find(key);
    if (found != packed_.end()) return found->second;
  }
  const Tensor made = pack_(key.second, key.first);
  constexpr size_t kShapes = 8;  // input shapes for which a convolution keeps packed weights
  std::lock_guard<std::mutex> lock(mutex_);
  if (packed_.size() >= kShapes) packed_.erase(packed_.begin());
  return packed_.emplace(key, made).first->second;
}

std::shared_ptr<FoldedConv> convolution_of(const Tensor& t) {
  const Convolved* source = is_seen_by_modes() ? nullptr : waiting_convolution(t);
  return source == nullptr ? nullptr : source->conv();
}

}  // namespace cnnkern
