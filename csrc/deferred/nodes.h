// Deferred results in the autograd graph: the batch norm has its node when it is called, before it is computed.
//
// An activation that is fused with it has a separate node, because the batch norm's result may have hooks or other users, as in
// PyTorch. In the backward pass the activation's node passes its gradient on undifferentiated, and the batch norm's node computes both
// derivatives in one kernel. If something could see the gradient between them, each node computes its own. PReLU's node also needs
// the gradient of its slope: it computes all gradients, and passes the batch norm's on.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "autograd/node.h"
#include "autograd/recompute.h"
#include "check.h"
#include "deferred/seal.h"
#include "memory_layout.h"

namespace cnnkern {

// A lock that a thread may wait for while it holds Python's: the owner may run a kernel that is written in Python.
class Lock {
 public:
  explicit Lock(std::recursive_mutex& mutex);

 private:
  std::unique_lock<std::recursive_mutex> lock_;
};

// An activation by name, with its parameter if that is not the default, or with the slope of "prelu".
struct Activation {
  std::string name = "none";
  std::optional<double> param = std::nullopt;
  at::Tensor slope = {};
  operator ActivationName() const { return {name, param}; }
};

// A batch norm's arguments, as autograd saves them.
struct NormArguments {
  at::Tensor x, weight, bias;
  bool training;
};

// A copy that autograd and modes do not see.
at::Tensor copy_of(const at::Tensor& t);

// Materialises the result, a Deferred, whose node needs saved tensors.
void make_real(c10::TensorImpl* result);

class NormNode final : public torch::autograd::Node, public HasRecipe {
 public:
  std::string name() const override { return "BatchNorm"; }
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;

  // Saves what the gradient needs, after the result was computed. `reads_bias`: an activation was fused.
  void fill(const NormArguments& norm, const at::Tensor& mean, const at::Tensor& rstd, bool reads_bias);
  torch::autograd::variable_list unpack();  // x, weight, bias, mean, rstd
  bool training() const { return training_; }
  bool is_filled();
  // Whether only the activation's node passes a gradient to this one, and nothing else sees it. `uses`: references to this node.
  bool unobserved(size_t uses) const;

  // What the activation's node passes on: a gradient that is not yet differentiated through the activation, or all gradients.
  struct Known {
    at::Tensor dy;
    Activation act;
    Strides strides;  // of what the activation's gradient reads
    std::optional<torch::autograd::variable_list> gradients;
  } known;
  std::recursive_mutex mutex;
  c10::weak_intrusive_ptr<c10::TensorImpl> result{c10::intrusive_ptr<c10::TensorImpl>()};  // while its node is this
  bool used_again = false;  // the plain result is used too, in addition to the fused one

 private:
  std::vector<torch::autograd::SavedVariable> saved_;
  at::Tensor bias_;  // a copy: PyTorch's batch norm does not save its bias, which may change before the gradient is asked for
  bool training_ = false, filled_ = false;
};

using NormPointer = decltype(make_node<NormNode>());

// act(batch norm), whose node is the next one.
struct ActNode final : torch::autograd::Node, HasRecipe {
  Activation act;
  c10::weak_intrusive_ptr<c10::TensorImpl> result{c10::intrusive_ptr<c10::TensorImpl>()};  // if that was deferred
  Strides strides;  // of the result
  std::string name() const override { return "BatchNormAct"; }
  void release_variables() override { release_recipe(); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
};

// batch norm + residual: both have the gradient of the sum.
struct SumNode final : torch::autograd::Node, HasRecipe {
  c10::weak_intrusive_ptr<c10::TensorImpl> result{c10::intrusive_ptr<c10::TensorImpl>()};
  std::string name() const override { return "BatchNormAdd"; }
  void release_variables() override { release_recipe(); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
};

// act(batch norm + residual), whose node is the next one: computes the gradients of all three.
struct ActOfSumNode final : torch::autograd::Node, HasRecipe {
  Activation act;
  torch::autograd::SavedVariable mask;
  Kept residual;               // instead of a mask
  bool channels_last = false;  // the order of the mask
  Strides strides;             // of what the activation's gradient reads
  std::string name() const override { return "BatchNormAddAct"; }
  void release_variables() override { mask.reset_data(), residual.reset(), release_recipe(); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
};

// prelu(batch norm), or prelu(batch norm + residual). The next nodes are that of the activation's input and the slope's.
struct PReluNode final : torch::autograd::Node {
  torch::autograd::SavedVariable slope;
  bool sum = false;
  Kept residual;
  bool channels_last = false;  // of the batch norm's input
  Strides strides;             // of what the activation's gradient reads
  std::string name() const override { return sum ? "BatchNormAddPReLU" : "BatchNormPReLU"; }
  void release_variables() override { slope.reset_data(), residual.reset(); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
};

// An activation by PyTorch's own operators.
at::Tensor activated(const at::Tensor& pre, const Activation& act);

bool has_hooks(torch::autograd::Node& node);

}  // namespace cnnkern
