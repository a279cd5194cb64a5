// The channels of a dense block in one buffer, in the place of concatenations.
//
// Each layer of a dense block reads what all before it gave, side by side. Here a layer's result is written behind the channels that
// are there, and the next layer gets a tensor that is the first channels of the buffer's memory: an ordinary tensor, with a place in
// the graph. Channels are written once, before any tensor shows them. All tensors on the buffer have one version counter, so that
// autograd notices a write to any of them.
//
// In the graph there is a chain, of `features`, each the first channels of the next:
//
//   x -> Append -> features -> (norm) -> features' -> Append -> features -> ... -> View -> the block's result
//                     |                                 ^
//                     View -> what the layer gets    the layer's result
//
// bn_act with a relu, called in training with what the layer gets (`bn_relu_of_features`), takes known statistics, and has a node with
// two inputs and two results: the normalised channels, and the same features. Its backward pass adds its gradient to that of the
// features, in place: it alone holds that. Who else uses the layer's input has a gradient of it as of any tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <tuple>

#include "check.h"

namespace cnnkern {

class FeatureBuffer : public std::enable_shared_from_this<FeatureBuffer> {
 public:
  // With the channels of x, and room for `further` channels. Null where PyTorch concatenates: unless x is a plain CPU tensor (N, C, H, W)
  // with a gradient, under no mode, transform, or foreign saved-tensor hooks.
  static std::shared_ptr<FeatureBuffer> of(const Tensor& x, int64_t further);
  // All channels so far, for who reads them next.
  Tensor features();
  // Whether t is behind them now; false where PyTorch concatenates it: if it has another shape or dtype, or there is no room.
  bool append(const Tensor& t);

 private:
  friend struct FeaturesNode;
  friend std::optional<std::tuple<Tensor, Tensor, Tensor>> bn_relu_of_features(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                                                const OptionalTensor&, const OptionalTensor&, double, double);
  FeatureBuffer(const Tensor& x, int64_t width);
  void write(const Tensor& t);
  Tensor first(int64_t channels) const;

  bool rows_;
  Tensor buffer_, mean_, var_;  // var_: biased
  uint32_t version_;
  int64_t channels_ = 0;
  Tensor features_;                               // the end of the chain
  const torch::autograd::Node* handed_ = nullptr;  // the node of what was handed out of it
};

// y, mean and rstd of bn_act(x, ..., "relu") in training, if x is a buffer's features, unchanged.
std::optional<std::tuple<Tensor, Tensor, Tensor>> bn_relu_of_features(const Tensor& x, const OptionalTensor& weight,
                                                                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                                      const OptionalTensor& running_var, double momentum, double eps);

}  // namespace cnnkern
