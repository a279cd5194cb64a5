// The fused layers in PyTorch's own differentiable operators, for what a fused kernel has no formula for: second
// derivatives, forward-mode differentiation and torch.func transforms.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <atomic>
#include <functional>
#include <tuple>

#include "autograd/activation.h"
#include "autograd/recompute.h"
#include "autograd/strides.h"
#include "check.h"
#include "compat.h"

namespace cnnkern {

// Which of `inputs`, the leading tensor arguments of a Function, want gradients; one that is None has no edge.
inline std::vector<bool> needs_grad(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& inputs) {
  std::vector<bool> needs(inputs.size());
  size_t edge = 0;
  for (size_t i = 0; i < inputs.size(); ++i) needs[i] = inputs[i].defined() && ctx->needs_input_grad(edge++);
  return needs;
}

inline bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }

inline bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

// Deferred results in eval mode that have yet to read running statistics, in all threads.
inline std::atomic<int64_t> waiting_readers_of_statistics = 0;

// Called after a kernel has updated a running statistic. Its version stays the same, as after PyTorch's batch norm, which saves
// running statistics for a gradient that does not read them: both may compute the same module in one graph. The exception is for
// results that wait in other threads, which notice an update by the version.
inline void updated_statistic(const OptionalTensor& t) {
  if (waiting_readers_of_statistics == 0 || !tensor_or_undefined(t).defined() || t->is_inference()) return;
  t->unsafeGetTensorImpl()->bump_version();
}

// The running statistics of one call. Hooks on saved tensors may refuse what a kernel gave: where there are some, the kernel
// updates copies, and the statistics are settled when all but the last tensor are packed. Not after the last: a checkpointed
// segment ends its second forward pass by raising there, and that pass counts, as in PyTorch.
class RunningStatistics {
 public:
  RunningStatistics(bool training, const OptionalTensor& mean, const OptionalTensor& var, bool saves)
      : training_(training), mean_(mean), var_(var), kernels_mean_(mean), kernels_var_(var) {
    copied_ = training && saves && tensor_or_undefined(mean).defined() && tensor_or_undefined(var).defined() &&
              saved_tensor_hooks() == SavedTensorHooks::kOthers;
    if (!copied_) return;
    at::AutoDispatchBelowADInplaceOrView below;
    kernels_mean_ = mean->clone(), kernels_var_ = var->clone();
  }
  const OptionalTensor& mean() const { return kernels_mean_; }
  const OptionalTensor& var() const { return kernels_var_; }
  void settle() const {
    if (!training_) return;
    if (copied_) {
      at::AutoDispatchBelowADInplaceOrView below;
      mean_->copy_(*kernels_mean_), var_->copy_(*kernels_var_);
    }
    updated_statistic(mean_), updated_statistic(var_);
  }

 private:
  bool training_, copied_;
  const OptionalTensor &mean_, &var_;
  OptionalTensor kernels_mean_, kernels_var_;
};

// PyTorch computes no gradient of running statistics, and refuses those that require one.
inline void check_statistics_want_no_gradient(const char* op, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  const bool mean = requires_grad(tensor_or_undefined(running_mean));
  TORCH_CHECK(!at::GradMode::is_enabled() || (!mean && !requires_grad(tensor_or_undefined(running_var))), op,
              ": running_mean and running_var are not differentiable; got a ", mean ? "running_mean" : "running_var",
              " that requires grad");
}

// bn_act by PyTorch's operators, with all kinds of gradients. The arguments are checked as by cnnkern's kernels, because PyTorch's
// operator would update the running statistics before an error is raised: torch.nn.functional's checks are not in it.
inline std::tuple<Tensor, Tensor, Tensor> batch_norm_by_pytorch(
    const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double momentum, double eps, const ActivationName& act) {
  if (has_numbers(x)) check_batch_norm(op, x, weight, bias, running_mean, running_var, training, eps);
  check_activation(op, act);
  check_statistics_want_no_gradient(op, running_mean, running_var);
  const OptionalTensor scale = weight_beside(x, weight, bias);
  const Tensor pre = at::batch_norm(x, scale, bias, running_mean, running_var, training, momentum, eps, /*cudnn_enabled=*/false);
  const Tensor none = at::empty({0}, x.options().dtype(at::kDouble));
  return {activation_by_pytorch(pre, act), none, none.clone()};
}

// Mean and rstd over `dims` as functions of x whose values are the saved ones: rstd's eps is not needed, its derivative is.
inline std::tuple<Tensor, Tensor> differentiable_statistics(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                                            at::IntArrayRef dims) {
  const Tensor centred = x - mean;
  const Tensor shift = centred.mean(dims, /*keepdim=*/true);
  const Tensor var = (centred - shift).square().mean(dims, /*keepdim=*/true);
  return {mean + shift, (var - var.detach() + rstd.detach().pow(-2)).rsqrt()};
}

// y of bn_act as a differentiable function of x, weight and bias, from the vectors that the forward pass saved.
inline Tensor bn_act_composite(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                               const Tensor& rstd, bool training, const ActivationName& act) {
  const auto type = wide_type(x);
  std::vector<int64_t> shape(x.dim(), 1), dims;
  shape[1] = x.size(1);
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != 1) dims.push_back(d);
  const Tensor wide = x.to(type);
  Tensor centre = mean.to(type).view(shape), scale = rstd.to(type).view(shape);
  if (training) std::tie(centre, scale) = differentiable_statistics(wide, centre, scale, dims);
  Tensor pre = (wide - centre) * scale;
  if (weight.defined()) pre = pre * weight.to(type).view(shape);
  if (bias.defined()) pre = pre + bias.to(type).view(shape);
  return activation_by_pytorch(pre.to(x.scalar_type()), act);
}

// A bias that the gradient operator was not given, in its second derivative: the values do not matter, the sum over them does.
inline Tensor bias_or_zeros(const Tensor& bias, bool has_gradient, const Tensor& mean, c10::SymIntArrayRef shape) {
  return bias.defined() || !has_gradient ? bias : at::zeros_symint(shape, mean.options());
}

// The gradient of a gradient operator: `y` gives the layer's output from `inputs`, of which the first is dy and the
// others are what the layer differentiates; `grads` came for its gradients.
inline torch::autograd::variable_list second_order(
    const torch::autograd::variable_list& inputs, const std::vector<bool>& needs, const torch::autograd::variable_list& grads,
    const std::function<Tensor(const torch::autograd::variable_list&)>& y) {
  using torch::autograd::variable_list;
  const bool create_graph = at::GradMode::is_enabled();
  at::AutoGradMode enable(true);
  variable_list v(inputs.size());  // with a history of their own where they have none
  for (size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].defined()) v[i] = inputs[i].requires_grad() ? inputs[i].view_as(inputs[i]) : inputs[i].detach().requires_grad_();
  variable_list wanted, gradient_of;
  const variable_list layer_inputs(v.begin() + 1, v.end());
  variable_list firsts;
  for (const Tensor& t : layer_inputs)
    if (t.defined()) firsts.push_back(t);
  const variable_list first = torch::autograd::grad({y(v)}, firsts, {v[0]}, /*retain_graph=*/true, /*create_graph=*/true,
                                                    /*allow_unused=*/true);
  variable_list outputs, output_grads;
  for (size_t i = 1, j = 0; i < v.size(); ++i) {
    if (!v[i].defined()) continue;
    const Tensor& g = first[j++];
    if (g.defined() && grads[i - 1].defined() && grads[i - 1].sym_numel() > 0 && g.requires_grad()) {
      outputs.push_back(g);
      output_grads.push_back(grads[i - 1]);
    }
  }
  for (size_t i = 0; i < v.size(); ++i)
    if (v[i].defined() && needs[i]) wanted.push_back(v[i]);
  variable_list result(inputs.size());
  if (outputs.empty() || wanted.empty()) return result;
  const variable_list second = torch::autograd::grad(outputs, wanted, output_grads, /*retain_graph=*/create_graph,
                                                     create_graph, /*allow_unused=*/true);
  for (size_t i = 0, j = 0; i < v.size(); ++i)
    if (v[i].defined() && needs[i]) result[i] = second[j++];
  return result;
}

}  // namespace cnnkern
