#include "deferred/folded_conv.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "aten.h"
#include "block_pool.h"
#include "deferred/own_kernels.h"

namespace cnnkern {

namespace {

using Scalars = PostOperator::Scalars;
using Name = std::optional<c10::string_view>;
using Pointwise = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                         int64_t, c10::string_view, Scalars, Name);
using Binary = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                      at::IntArrayRef, int64_t, c10::string_view, std::optional<at::Scalar>, Name, Scalars, Name);
using Grouped = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t);

}  // namespace

FoldedConv::FoldedConv(const Tensor& weight, const OptionalTensor& bias, Settings settings, const std::vector<at::ScalarType>& dtypes,
                       Pack pack, const std::vector<Tensor>& sources)
    : Folded(weight, bias, dtypes, std::move(pack), sources), settings_(std::move(settings)) {}

std::vector<int64_t> FoldedConv::output_sizes(const Tensor& x) const {
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, normed] = settings_;
  std::vector<int64_t> sizes = {x.size(0), weight_.size(0)};
  for (size_t d = 0; d < stride.size(); ++d) {
    const size_t last = 2 * (stride.size() - 1 - d);
    const int64_t around = pad.empty() ? 0 : pad[last] + pad[last + 1];
    sizes.push_back((x.size(d + 2) + around + 2 * padding[d] - dilation[d] * (weight_.size(d + 2) - 1) - 1) / stride[d] + 1);
    if (x.size(d + 2) + around + 2 * padding[d] < dilation[d] * (weight_.size(d + 2) - 1) + 1) sizes.back() = 0;
  }
  return sizes;
}

bool FoldedConv::gives_rows(const Tensor& input) const {
  const auto gives = [](const Tensor& t) { return t.suggest_memory_format() != at::MemoryFormat::Contiguous; };
  if (!gives(input) && !gives(weight_)) return false;
  const auto sizes = output_sizes(input);  // PyTorch's batch norm makes a single pixel contiguous
  return !settings_.normed || std::any_of(sizes.begin() + 2, sizes.end(), [](int64_t n) { return n != 1; });
}

Tensor FoldedConv::compute(const Tensor& x, const Tensor& residual, const Activation& act, at::ScalarType dtype) {
  const Tensor padded = (settings_.pad.empty() ? x : at::pad(x, settings_.pad, settings_.pad_mode)).to(dtype);
  if (x.dim() < 4 || !is_librarys(padded, dtype)) return by_parts(padded, residual, act);
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
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, normed] = settings_;
  const OptionalTensor bias = bias_as(x.scalar_type());
  const std::vector<int64_t> none(stride.size(), 0);
  Tensor y = at::convolution(x, weight_.to(x.scalar_type()), bias, stride, padding, dilation, /*transposed=*/false, none, groups);
  if (residual.defined()) y.add_(residual);
  return act.name == "relu" ? y.relu_() : activated(y, act);
}

Tensor FoldedConv::by_library(const Tensor& x, const Tensor& residual, const Activation& act) {
  static const auto pointwise = operator_of<Pointwise>("mkldnn::_convolution_pointwise");
  static const auto binary = operator_of<Binary>("mkldnn::_convolution_pointwise", "binary");
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, normed] = settings_;
  const OptionalTensor bias = bias_as(x.scalar_type());
  const Tensor weight = packed(x.sizes().vec(), x.scalar_type());
  const block_pool::Scope pooled;
  if (residual.defined()) {
    const Name relu = act.name == "relu" ? Name("relu") : std::nullopt;
    const Tensor y = binary.call(x, residual, weight, bias, padding, stride, dilation, groups, "add", std::nullopt, relu, Scalars(), "");
    return relu ? y : activated(y, act);
  }
  const auto post = post_operator(act);
  const Tensor y = pointwise.call(x, weight, bias, padding, stride, dilation, groups, post.name, post.scalars(), post.algorithm);
  return std::string_view(post.name) == "none" ? activated(y, act) : y;
}

// By cnnkern's grouped convolution, then the addition and the activation.
Tensor FoldedConv::by_grouped(const Tensor& x, const Tensor& residual, const Activation& act) {
  static const auto grouped = operator_of<Grouped>("cnnkern::grouped_conv2d");
  const auto& [stride, padding, dilation, groups, pad, pad_mode, own, own_from_pixels, own_to_elements, normed] = settings_;
  Tensor y = grouped.call(x.contiguous(at::MemoryFormat::ChannelsLast), weight_.to(x.scalar_type()), optional_of(bias_), stride, padding,
                          dilation, groups);
  if (residual.defined()) y.add_(residual);
  return act.name == "relu" ? y.relu_() : activated(y, act);
}

const float* FoldedConv::packed_for_own() {
  static auto* const pack_pointwise = CNNKERN_FOR_THIS_CPU(pack_pointwise);
  static auto* const pack_depthwise = CNNKERN_FOR_THIS_CPU(pack_depthwise);
  return own_packed(settings_.own == "pointwise" ? pack_pointwise : pack_depthwise);
}

// By cnnkern's kernel, which includes the addition and the activation.
Tensor FoldedConv::by_own(const Tensor& x, const Tensor& residual, const Activation& act) {
  static auto* const pointwise = CNNKERN_FOR_THIS_CPU(pointwise);
  static auto* const depthwise = CNNKERN_FOR_THIS_CPU(depthwise);
  constexpr auto kRows = at::MemoryFormat::ChannelsLast;
  const bool is_pointwise = settings_.own == "pointwise";
  const int64_t stride = settings_.stride[0], channels = weight_.size(0);
  const bool strides = is_pointwise && stride > 1;
  const Tensor from = (strides ? x.slice(2, 0, std::nullopt, stride).slice(3, 0, std::nullopt, stride) : x).contiguous(kRows);
  const Tensor added = residual.defined() ? residual.contiguous(kRows) : residual;
  const auto sizes = output_sizes(x);
  const Tensor y = aten::empty(sizes, x.options().memory_format(kRows));
  const auto [fused, after] = FusedActivation(act);
  const Behind behind{added.defined() ? added.const_data_ptr<float>() : nullptr, fused};
  const float *const in = from.const_data_ptr<float>(), *const packed = packed_for_own();
  float* const out = y.mutable_data_ptr<float>();
  const ImageSizes image{x.size(0), x.size(2), x.size(3), sizes[2], sizes[3], stride};
  if (is_pointwise)
    pointwise(in, packed, out, x.size(1), channels, y.numel() / channels, behind);
  else
    depthwise(in, packed, out, channels, weight_.size(2), settings_.padding[0], image, behind);
  return after.name == "none" ? y : activated(y, after);
}

}  // namespace cnnkern
