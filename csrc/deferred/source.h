// How a deferred result is computed: a batch norm here, a layer of a folded model in folded.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "autograd/plain.h"
#include "deferred/nodes.h"

namespace cnnkern {

// cnnkern::bn_act.
using NormOperator = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, bool, double, double, c10::string_view, std::optional<double>);
const c10::TypedOperatorHandle<NormOperator>& norm_operator();

struct Result {
  at::Tensor value, mean, rstd, mask;
};

class Source {
 public:
  virtual ~Source() = default;
  // act(result + residual), without autograd; the residual is optional. `again`: it was computed before.
  virtual Result compute(const at::Tensor& residual, const Activation& act, bool again) = 0;
  // Whether one pass can compute result + r and write it to r's memory; and that pass.
  virtual bool adds_into(const at::Tensor& /*r*/) const { return false; }
  virtual Result add_into(const at::Tensor& r, bool again);
  virtual std::vector<at::Tensor> reads() const = 0;
  virtual const NormArguments* norm() const { return nullptr; }  // if cnnkern computes the gradients
  // The activation whose result it computes, which is then fused with nothing but a convolution.
  virtual const Activation* activation() const { return nullptr; }
  // Whether it reads or updates a running statistic in this memory, which no operator may access before.
  virtual bool keeps_statistic(const c10::StorageImpl*) const { return false; }
  virtual bool updates_statistics() const { return false; }
  // What computes act(result), if that should be deferred again, because a layer that follows may compute both. Null if not.
  virtual std::shared_ptr<Source> followed_by(const Activation& /*act*/) { return nullptr; }
  // Whether an activation or an addition can be fused with the result.
  virtual bool takes_more() const { return true; }
  // Whether it may compute the result in other strides than PyTorch's. It is copied into PyTorch's if needed.
  virtual bool has_any_strides() const { return false; }
};

// The state of a call's arguments, to tell whether they were changed without PyTorch's operators.
class Remembered {
 public:
  void remember(const at::Tensor& t);
  bool holds(const at::Tensor& t) const;
  bool holds_memory(const at::Tensor& t) const;  // whatever is in it

 private:
  const c10::StorageImpl* memory_ = nullptr;
  size_t bytes_ = 0;
  int64_t version_ = 0;
  bool resizable_ = false;  // until an array is made of it
};

struct ConvolutionArguments;

class BatchNorm final : public Source {
 public:
  BatchNorm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& running_mean,
            const at::Tensor& running_var, bool training, double momentum, double eps, bool any_strides);
  ~BatchNorm() override;

  // Whether cnnkern's kernels support it, and nothing can observe when it is computed.
  bool can_wait();

  Result compute(const at::Tensor& residual, const Activation& act, bool again) override;
  bool adds_into(const at::Tensor& r) const override;
  Result add_into(const at::Tensor& r, bool again) override;
  // The convolution of act(this) (prologue.h).
  Result convolve(const Activation& act, const ConvolutionArguments& convolution, bool again);
  std::vector<at::Tensor> reads() const override;
  const NormArguments* norm() const override { return &arguments_; }
  bool keeps_statistic(const c10::StorageImpl* memory) const override;
  bool updates_statistics() const override { return arguments_.training && running_mean_.defined(); }
  bool has_any_strides() const override { return any_strides_; }

 private:
  std::array<const at::Tensor*, 5> tensors() const {
    return {&arguments_.x, &arguments_.weight, &arguments_.bias, &running_mean_, &running_var_};
  }
  void check_unchanged(bool statistics) const;
  // The running statistics for the kernel: none if they already contain this batch. Raises an error if an argument was changed.
  std::pair<OptionalTensor, OptionalTensor> statistics(bool again) const;

  NormArguments arguments_;
  at::Tensor running_mean_, running_var_;
  double momentum_, eps_;
  bool any_strides_;
  bool waits_for_statistics_ = false;
  std::array<Remembered, 5> remembered_;
};

}  // namespace cnnkern
