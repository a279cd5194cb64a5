// The node that a call of a fused operator leaves in the autograd graph.
//
// PyTorch's own operators make theirs in this way. A torch::autograd::Function is shorter to write, but made small layers
// slower than eager's, whose arithmetic takes less time than it does; second derivatives, which are rare, are written as one.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "autograd/below.h"
#include "autograd/recompute.h"
#include "compat.h"

#include <array>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace cnnkern {

// `Operator` keeps what its gradient needs beside tensors, and has
//   kName, kInputs      its name, and how many tensors may want a gradient
//   recipe(inputs, of_results)   what computes the result again, if it has one: recorded() gives it what it was given
//   backward(dy, saved, needs)   their gradients, one for each; `needs` says which are wanted. Or, if there are several results,
//   backward(grads, saved, needs, node)
// Saved tensors may come back from a hook in other strides than they had: what depends on those is kept in the operator.
template <typename Operator>
struct OperatorNode final : torch::autograd::Node, HasRecipe {
  static constexpr bool has_recipe =
      requires(Operator op, const torch::autograd::variable_list& tensors) { op.recipe(tensors, tensors); };

  std::string name() const override { return Operator::kName; }

  void save(const torch::autograd::variable_list& tensors) {
    const bool with_recipe = has_recipe && saved_tensor_hooks() == SavedTensorHooks::kOurs;
    for (const at::Tensor& t : tensors)
      saved_.push_back(with_recipe ? saved_with_recipe(t) : torch::autograd::SavedVariable(t, /*is_output=*/false));
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
    release_recipe();
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);  // a graph may be walked by several threads
    torch::autograd::variable_list saved;
    saved.reserve(saved_.size());
    for (const auto& variable : saved_) saved.push_back(variable.unpack());
    std::array<bool, Operator::kInputs> needs;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
    if constexpr (requires { op.backward(std::move(grads), saved, needs, *this); }) {
      return op.backward(std::move(grads), saved, needs, *this);
    } else {
      if (!grads[0].defined()) return torch::autograd::variable_list(Operator::kInputs);
      return op.backward(grads[0], saved, needs);
    }
  }

  Operator op{};

 private:
  std::vector<torch::autograd::SavedVariable> saved_;
};

inline const at::Tensor& output_of(const at::Tensor& results) { return results; }
template <typename... Rest>
const at::Tensor& output_of(const std::tuple<at::Tensor, Rest...>& results) {
  return std::get<0>(results);
}

// The results of `forward`, computed with autograd excluded; the first one gets a node. `inputs` are the operator's kInputs
// tensors, undefined ones included. `saves` are the arguments to save: they are packed before anything is computed, because that
// may raise an error. `describe` returns a pair for the results: the operator, and the tensors to save. `settle` is called when
// all of these except the last are packed.
template <typename Operator, typename Forward, typename Describe, typename Settle>
auto recorded(const torch::autograd::variable_list& inputs, const torch::autograd::variable_list& saves, const Forward& forward,
              const Describe& describe, const Settle& settle) {
  auto node = make_node<OperatorNode<Operator>>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->save(saves);
  auto results = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward();
  }();
  torch::autograd::variable_list of_results;
  std::tie(node->op, of_results) = describe(results);
  for (size_t i = 0; i < of_results.size(); ++i) {
    if (i + 1 == of_results.size()) settle();
    node->save({of_results[i]});
  }
  torch::autograd::set_history(output_of(results), node);
  if constexpr (OperatorNode<Operator>::has_recipe)
    node->keep_recipe(output_of(results), [&] { return node->op.recipe(inputs, of_results); });
  announce(node);
  return results;
}

template <typename Operator, typename Forward, typename Describe>
auto recorded(const torch::autograd::variable_list& inputs, const torch::autograd::variable_list& saves, const Forward& forward,
              const Describe& describe) {
  return recorded<Operator>(inputs, saves, forward, describe, [] {});
}

}  // namespace cnnkern
