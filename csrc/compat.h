// What differs between the releases of PyTorch that the extension is built against (pyproject.toml has them), and is not
// to be met anywhere else in csrc. Each entry says which release makes it go away. What a release has is asked of its
// headers, not of its number, as nightly builds and patch releases have what neither promises.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace cnnkern {

// Nodes are held by std::shared_ptr in 2.9 and 2.11, by c10::intrusive_ptr in 2.13 and later. Goes when 2.13 is the oldest.
template <typename Node, typename... Arguments>
auto make_node(Arguments&&... arguments) {
  using Held = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<Node>(std::forward<Arguments>(arguments)...);
  else
    return c10::make_intrusive<Node>(std::forward<Arguments>(arguments)...);
}

// Calls PyTorch's hooks on new nodes, in releases that have them: 2.14 and later. Goes when 2.14 is the oldest.
template <typename Pointer>
void announce(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

// Sets the node of a tensor that was written in place. From 2.14 on PyTorch returns the resulting node, another one for a view.
template <typename Pointer>
void rebase(const at::Tensor& t, const Pointer& node) {
  node->add_input_metadata(t);
  const auto put = [&] { return torch::autograd::impl::rebase_history(t, {node, 0}); };
  if constexpr (std::is_void_v<decltype(put())>)
    put();
  else
    announce(put());
}

// Whether only the storage refers to its Python object. 2.9 cannot tell, so the answer is no: a convolution is not folded if Python
// has an object for its weight's storage. Goes when 2.11 is the oldest.
template <typename Slot>
bool is_kept_by_cpp_alone(const Slot* slot) {
  if constexpr (requires { slot->has_unique_reference(); }) return slot->has_unique_reference();
  return false;
}

// What at::Context::allowTF32CuDNN says of convolutions, which names operations by strings in 2.9, by an enumeration in 2.11 and
// later. Goes when 2.11 is the oldest.
template <typename Operation>
bool allows_tf32(bool (at::Context::*allowed)(std::optional<Operation>) const) {
  return (at::globalContext().*allowed)(Operation::CONV);
}
inline bool allows_tf32(bool (at::Context::*allowed)(const std::string&) const) { return (at::globalContext().*allowed)("conv"); }

// Whether PyTorch's convolutions of float32 on a GPU may multiply in TF32 now: its settings say so, and cuDNN computes them.
inline bool convolutions_in_tf32() {
  return at::globalContext().userEnabledCuDNN() && allows_tf32(&at::Context::allowTF32CuDNN);
}

// The weight of PyTorch's batch norm of x: ones on a GPU where there is a bias alone, to which its CUDA kernels give a wrong
// gradient in eval, or crash. Seen in 2.11; whether a later release has it is not known. cnnkern/compat.py has the same.
inline std::optional<at::Tensor> weight_beside(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                               const std::optional<at::Tensor>& bias) {
  const auto is_given = [](const std::optional<at::Tensor>& t) { return t && t->defined(); };
  return x.is_cuda() && is_given(bias) && !is_given(weight) ? at::ones_like(*bias) : weight;
}

}  // namespace cnnkern
