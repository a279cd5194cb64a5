// Deferred results in the autograd graph: the batch norm has its node when it is called, before it is computed.
//
// An activation that is computed with it is a node of its own in front, because the batch norm's result may have hooks or other
// users, as in PyTorch. Going backward that node hands its gradient on as it is, and the batch norm's node computes both
// derivatives in one; or, where somebody could see the gradient in between, each computes its own. PReLU's node, which has a slope
// of its own to differentiate, computes all of them and hands the others' on.
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

// An activation by name, with its number where that is not the default, or with the slope of "prelu".
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

// A copy below autograd and modes, which are to see no more than PyTorch's operators.
at::Tensor copy_of(const at::Tensor& t);

// Makes the result, an object of Deferred, whose node is asked for a gradient.
void make_real(c10::TensorImpl* result);

class NormNode final : public torch::autograd::Node, public HasRecipe {
 public:
  std::string name() const override { return "BatchNorm"; }
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;

  // What the gradient needs, once it is computed. `reads_bias`: an activation was computed with it.
  void fill(const NormArguments& norm, const at::Tensor& mean, const at::Tensor& rstd, bool reads_bias);
  torch::autograd::variable_list unpack();  // x, weight, bias, mean, rstd
  bool training() const { return training_; }
  // Whether nobody but the node in front gives this one a gradient, or sees it. `uses`: the references to this node.
  bool unobserved(size_t uses) const;

  // What the node in front tells: a gradient that has yet to pass its activation, or all that is asked for.
  struct Known {
    at::Tensor dy;
    Activation act;
    Strides strides;  // of what the activation's gradient reads
    std::optional<torch::autograd::variable_list> gradients;
  } known;
  std::recursive_mutex mutex;
  c10::weak_intrusive_ptr<c10::TensorImpl> result{c10::intrusive_ptr<c10::TensorImpl>()};  // while its node is this
  bool used_again = false;  // the plain result too, beside the one that was fused

 private:
  std::vector<torch::autograd::SavedVariable> saved_;
  at::Tensor bias_;  // a copy: PyTorch's batch norm does not save its bias, which may change before the gradient is asked for
  bool training_ = false, filled_ = false;
};

using NormPointer = decltype(make_node<NormNode>());

// act(batch norm), whose node is the next one.
struct ActNode final : torch::autograd::Node, HasRecipe {
  Activation act;
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

// prelu(batch norm), or prelu(batch norm + residual): the next nodes are that of what the activation was given and the slope's.
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
