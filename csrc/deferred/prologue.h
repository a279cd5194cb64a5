// A convolution that computes act(batch norm) as it reads its input, so that the activated tensor is never stored.
//
// An activation is deferred as the batch norm before it was: its result is another Deferred. If the first operator that reads it is
// a convolution that does this, it is called. Any other materialises it, as it does a batch norm's result. The graph is the same in
// both cases, batch norm, activation and convolution each with a node. Only the convolution's node differs: it saves the batch norm's
// input, which the batch norm's node saves anyway, and computes its own input again.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "deferred/source.h"

namespace cnnkern {

// A grouped convolution's arguments but its input.
struct ConvolutionArguments {
  const at::Tensor& weight;
  const at::Tensor& bias;  // undefined for none
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// What computes act(batch norm).
class ActivatedNorm final : public Source {
 public:
  ActivatedNorm(std::shared_ptr<BatchNorm> norm, const Activation& act) : norm_(std::move(norm)), act_(act) {}

  // Whether it may be deferred: cnnkern has convolutions that read such an input.
  static bool may_be(const BatchNorm& norm, const Activation& act);
  // The strides of the activation's result.
  Strides strides() const;

  // Whether cnnkern's kernels compute the convolution of it in this way, and gain (docs/grouped_conv.md has what was measured). The
  // result's memory format is that of the activation's; `records`: there will be a backward pass, which computes it once more.
  bool fuses_with(const ConvolutionArguments& convolution, at::MemoryFormat format, bool records) const;
  // The convolution's result, without autograd.
  Result convolve(const ConvolutionArguments& convolution, bool again) { return norm_->convolve(act_, convolution, again); }

  Result compute(const at::Tensor& residual, const Activation& act, bool again) override;
  std::vector<at::Tensor> reads() const override { return norm_->reads(); }
  const NormArguments* norm() const override { return norm_->norm(); }
  const Activation* activation() const override { return &act_; }
  bool takes_more() const override { return false; }
  bool keeps_statistic(const c10::StorageImpl* memory) const override { return norm_->keeps_statistic(memory); }
  bool updates_statistics() const override { return norm_->updates_statistics(); }

 private:
  std::shared_ptr<BatchNorm> norm_;
  Activation act_;
};

// The convolution of act(batch norm), whose node is the next one.
struct ConvolutionNode final : torch::autograd::Node {
  Activation act;
  bool training = false;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;

  std::string name() const override { return "GroupedConv2d"; }
  void save(const NormArguments& norm, const Result& statistics, const at::Tensor& kernel);
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;

 private:
  std::mutex mutex_;
  std::vector<torch::autograd::SavedVariable> saved_;  // x, weight, bias, mean, rstd, the convolution's weight
  // Copies of the batch norm's, which may change before the gradient is asked for: PyTorch's convolution saves what it reads.
  at::Tensor weight_, bias_;
};

}  // namespace cnnkern
