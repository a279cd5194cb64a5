// The convolution of a folded model: batch norm in its weights, residual and activation in its kernel.
#pragma once

#include "deferred/folded.h"
#include "folded_kernels.h"

namespace cnnkern {

class FoldedConv final : public Folded {
 public:
  struct Settings {
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups;
    std::vector<int64_t> pad;  // a padding before the convolution, with at::pad's arguments; may be empty
    std::string pad_mode;
    // The kernel of cnnkern that computes it in float32: "grouped", "pointwise" or "depthwise", or "" for none. `pad` is empty for the
    // last two. It is used for images of at least own_from_pixels, and results of at most own_to_elements.
    std::string own;
    int64_t own_from_pixels, own_to_elements;
    bool normed;  // a batch norm is folded into it
  };

  FoldedConv(const at::Tensor& weight, const std::optional<at::Tensor>& bias, Settings settings,
             const std::vector<at::ScalarType>& dtypes, Pack pack, const std::vector<at::Tensor>& sources);

  const char* name() const override { return "convolution"; }

  // Convolutions that one kernel computes (mobile_block.cpp): 1x1, depthwise and 1x1, where the first or the last may be null.
  struct Block {
    FoldedConv *expand, *depthwise, *project;
    Activation expand_act, depthwise_act;  // if another one follows
    at::Tensor run(const at::Tensor& x, const at::Tensor& residual, const Activation& act) const;
    bool is_faster(const at::Tensor& x) const;  // than layer by layer

   private:
    ImageSizes image(const at::Tensor& x) const;
    int64_t bands(const at::Tensor& x) const;
  };

 private:
  at::Tensor compute(const at::Tensor& x, const at::Tensor& residual, const Activation& act, at::ScalarType dtype) override;
  bool fits(const at::Tensor& x) const override { return x.dim() == weight_.dim() && x.size(1) == weight_.size(1) * settings_.groups; }
  std::vector<int64_t> output_sizes(const at::Tensor& x) const override;
  bool gives_rows(const at::Tensor& input) const override;
  // Of blocks.
  bool can_lead(const Activation& act, at::ScalarType dtype) const override;
  bool follows(const LeadingSource& before) const override;
  at::Tensor run_with(const LeadingSource& before, const at::Tensor& residual, const Activation& act) override;
  at::Tensor run_block(const ActivatedSource& before, const at::Tensor& residual, const Activation& act);
  at::Tensor run_scaled(const ScaledSource& before, const at::Tensor& residual, const Activation& act);
  bool is_of_block(const char* kind) const;
  const float* packed_for_own();
  at::Tensor by_parts(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  at::Tensor by_library(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  bool is_own(const at::Tensor& x, at::ScalarType dtype) const;
  at::Tensor by_grouped(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  at::Tensor by_own(const at::Tensor& x, const at::Tensor& residual, const Activation& act);

  Settings settings_;
};

}  // namespace cnnkern
