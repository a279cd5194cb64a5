// The linear layer of a folded model: residual and activation in its kernel.
#pragma once

#include "deferred/folded.h"

namespace cnnkern {

class FoldedLinear final : public Folded {
 public:
  // cnnkern's kernel computes inputs of at most `own_to_rows` vectors in float32.
  FoldedLinear(const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t own_to_rows,
               const std::vector<at::ScalarType>& dtypes, Pack pack, const std::vector<at::Tensor>& sources);

  const char* name() const override { return "linear layer"; }

 private:
  at::Tensor compute(const at::Tensor& x, const at::Tensor& residual, const Activation& act, at::ScalarType dtype) override;
  bool fits(const at::Tensor& x) const override;
  std::vector<int64_t> output_sizes(const at::Tensor& x) const override;
  bool gives_rows(const at::Tensor&) const override { return false; }
  at::Tensor by_library(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  at::Tensor by_own(const at::Tensor& x, const at::Tensor& residual, const Activation& act);

  int64_t own_to_rows_;
};

}  // namespace cnnkern
