// Keeps all features of a dense block in one buffer instead of concatenating them.
//
// Each layer of a dense block reads the outputs of all layers before it, side by side. Here a layer's output is written after the
// channels already in the buffer. The next layer gets an ordinary tensor on the buffer's memory, its first channels, with a node in
// the graph. A channel is written once, before any tensor contains it. All tensors on the buffer share one version counter, so
// autograd notices a write to any of them.
//
// The graph has a chain of `features`. Each is the first channels of the next:
//
//   x -> Append -> features -> (norm) -> features' -> Append -> features -> ... -> View -> the block's result
//                     |                                 ^
//                     View -> what the layer gets    the layer's result
//
// If bn_act with ReLU is called on a layer's input in training (`bn_relu_of_features`), it uses the known statistics. Its node has two
// inputs and two results: the normalised channels, and the same features. Its backward pass adds its gradient to that of the features,
// in place, if nothing else refers to that. Other users of the layer's input get a gradient as of any tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <tuple>

#include "check.h"

namespace cnnkern {

class FeatureBuffer : public std::enable_shared_from_this<FeatureBuffer> {
 public:
  // With the channels of x, and room for `further` channels. Null, so that PyTorch concatenates, unless x is a plain CPU tensor
  // (N, C, H, W) that requires a gradient, without modes, transforms or other saved-tensor hooks.
  static std::shared_ptr<FeatureBuffer> of(const Tensor& x, int64_t further);
  // All channels so far, as the next layer's input.
  Tensor features();
  // Writes t after them. False, so that PyTorch concatenates, if it has another shape or dtype, or if there is no room.
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
  const torch::autograd::Node* handed_ = nullptr;  // the node of the layer input that was last returned
};

// y, mean and rstd of bn_act(x, ..., "relu") in training, if x is a buffer's features, unchanged.
std::optional<std::tuple<Tensor, Tensor, Tensor>> bn_relu_of_features(const Tensor& x, const OptionalTensor& weight,
                                                                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                                      const OptionalTensor& running_var, double momentum, double eps);

}  // namespace cnnkern
