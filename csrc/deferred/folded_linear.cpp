#include "deferred/folded_linear.h"

#include <ATen/Functions.h>

#include "aten.h"
#include "block_pool.h"
#include "deferred/own_kernels.h"

namespace cnnkern {

namespace {

using Pointwise = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view, PostOperator::Scalars,
                         std::optional<c10::string_view>);
using Binary = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view);

}  // namespace

FoldedLinear::FoldedLinear(const Tensor& weight, const OptionalTensor& bias, int64_t own_to_rows,
                           const std::vector<at::ScalarType>& dtypes, Pack pack, const std::vector<Tensor>& sources)
    : Folded(weight, bias, dtypes, std::move(pack), sources), own_to_rows_(own_to_rows) {}

bool FoldedLinear::fits(const Tensor& x) const {
  return weight_.dim() == 2 && x.dim() > 0 && x.size(-1) == weight_.size(1) && is_librarys(x, computed_in(x));
}

std::vector<int64_t> FoldedLinear::output_sizes(const Tensor& x) const {
  auto sizes = x.sizes().vec();
  sizes.back() = weight_.size(0);
  return sizes;
}

Tensor FoldedLinear::compute(const Tensor& x, const Tensor& residual, const Activation& act, at::ScalarType dtype) {
  const Tensor rows = x.to(dtype).contiguous().view({-1, x.size(-1)});
  const auto sizes = output_sizes(x);
  const Tensor added = residual.defined() ? residual.contiguous().view({rows.size(0), sizes.back()}) : residual;
  const bool own = dtype == at::kFloat && weight_.scalar_type() == dtype && rows.size(0) <= own_to_rows_;
  const auto [fused, after] = FusedActivation(act);
  const Tensor y = (own ? by_own(rows, added, fused) : by_library(rows, added, fused)).view(sizes);
  return after.name == "none" ? y : activated(y, after);
}

Tensor FoldedLinear::by_library(const Tensor& x, const Tensor& residual, const Activation& act) {
  static const auto pointwise = operator_of<Pointwise>("mkldnn::_linear_pointwise");
  static const auto binary = operator_of<Binary>("mkldnn::_linear_pointwise", "binary");
  const OptionalTensor bias = bias_as(x.scalar_type());
  const Tensor weight = packed({x.size(0)}, x.scalar_type());
  const block_pool::Scope pooled;
  if (residual.defined()) return activated(binary.call(x, residual, weight, bias, "add"), act);
  const auto post = post_operator(act);
  const Tensor y = pointwise.call(x, weight, bias, post.name, post.scalars(), post.algorithm);
  return std::string_view(post.name) == "none" ? activated(y, act) : y;
}

// By the kernel of 1x1 convolutions: a row is a pixel.
Tensor FoldedLinear::by_own(const Tensor& x, const Tensor& residual, const Activation& act) {
  static auto* const pack_pointwise = CNNKERN_FOR_THIS_CPU(pack_pointwise);
  static auto* const pointwise = CNNKERN_FOR_THIS_CPU(pointwise);
  const Tensor y = aten::empty({x.size(0), weight_.size(0)}, x.options());
  const Behind behind{residual.defined() ? residual.const_data_ptr<float>() : nullptr, act};
  pointwise(x.const_data_ptr<float>(), own_packed(pack_pointwise), y.mutable_data_ptr<float>(), x.size(1), y.size(1), x.size(0),
            behind);
  return y;
}

}  // namespace cnnkern
