// The functions that answer for the operators on a device: op_cpu for each instruction set, op_cuda.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "check.h"

// f(op) for every operator of ops.cpp.
#define CNNKERN_OPERATORS(f)                        \
  f(bn_act) f(bn_act_backward)                      \
  f(bn_add_act) f(bn_add_act_backward)              \
  f(bn_prelu) f(bn_prelu_backward)                  \
  f(sync_bn_stats) f(sync_bn)                       \
  f(sync_bn_sums) f(sync_bn_backward)               \
  f(add_relu) f(add_relu_backward)                  \
  f(grouped_conv2d) f(grouped_conv2d_backward)      \
  f(layer_norm) f(layer_norm_backward)              \
  f(layer_norm2d) f(layer_norm2d_backward)          \
  f(max_pool2d) f(max_pool2d_backward)

namespace cnnkern::signature {

using One = Tensor;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Optional = const OptionalTensor&;
using Sizes = at::IntArrayRef;
using Number = std::optional<double>;

using bn_act = Three(const Tensor& x, Optional weight, Optional bias, Optional running_mean, Optional running_var,
                     bool training, double momentum, double eps, c10::string_view act, Number act_param);
using bn_act_backward = Three(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                              const Tensor& rstd, bool training, c10::string_view act, std::array<bool, 3> output_mask,
                              Number act_param);

using bn_add_act = Four(const Tensor& x, const Tensor& residual, Optional weight, Optional bias, Optional running_mean,
                        Optional running_var, bool training, double momentum, double eps, c10::string_view act, Number act_param);
using bn_add_act_backward = Four(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                                 const Tensor& rstd, const Tensor& mask, bool channels_last, bool training,
                                 c10::string_view act, std::array<bool, 4> output_mask, Optional residual, Number act_param);

using bn_add_into = Two(const Tensor& x, const Tensor& residual, Optional weight, Optional bias, Optional running_mean,
                        Optional running_var, bool training, double momentum, double eps);

using prefix_bn_relu = Three(const Tensor& x, Optional weight, Optional bias, Optional running_mean, Optional running_var,
                             const Tensor& mean, const Tensor& var, double momentum, double eps, bool rows);
using prefix_bn_relu_backward = Two(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                                    const Tensor& rstd, const Tensor& dx, bool rows, std::array<bool, 2> output_mask);

using bn_prelu = Three(const Tensor& x, Optional residual, Optional weight, Optional bias, const Tensor& slope, Optional running_mean,
                       Optional running_var, bool training, double momentum, double eps);
using bn_prelu_backward = Five(const Tensor& dy, const Tensor& x, Optional residual, Optional weight, Optional bias,
                               const Tensor& slope, const Tensor& mean, const Tensor& rstd, bool channels_last, bool training,
                               std::array<bool, 5> output_mask);

using sync_bn_stats = One(const Tensor& x);
using sync_bn = Two(const Tensor& x, Optional residual, Optional weight, Optional bias, const Tensor& mean, const Tensor& rstd,
                    c10::string_view act, Number act_param);
using sync_bn_sums = One(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                         const Tensor& rstd, Optional mask, bool channels_last, c10::string_view act, Optional residual,
                         Number act_param);
using sync_bn_backward = Two(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                             const Tensor& rstd, Optional mask, bool channels_last, c10::string_view act, const Tensor& sums,
                             const Tensor& count, std::array<bool, 2> output_mask, Optional residual, Number act_param);

using add_relu = Two(const Tensor& x, const Tensor& residual);
using add_relu_backward = One(const Tensor& dy, const Tensor& mask, Sizes order);

using grouped_conv2d = One(const Tensor& x, const Tensor& weight, Optional bias, Sizes stride, Sizes padding, Sizes dilation,
                           int64_t groups);
using grouped_conv2d_backward = Three(const Tensor& dy, const Tensor& x, const Tensor& weight, Sizes stride, Sizes padding,
                                      Sizes dilation, int64_t groups, std::array<bool, 3> output_mask);

using bn_act_conv2d = Three(const Tensor& x, Optional weight, Optional bias, Optional running_mean, Optional running_var, bool training,
                            double momentum, double eps, c10::string_view act, Number act_param, const Tensor& kernel,
                            Optional kernel_bias, Sizes stride, Sizes padding, Sizes dilation, int64_t groups);
using bn_act_conv2d_backward = Three(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                                     const Tensor& rstd, bool training, c10::string_view act, Number act_param, const Tensor& kernel,
                                     Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::array<bool, 3> output_mask);
using fuses_bn_act_conv2d = bool(const Tensor& x, const Tensor& kernel, const Tensor& kernel_bias, Sizes stride, Sizes padding,
                                 Sizes dilation, int64_t groups);

using layer_norm = Three(const Tensor& x, Sizes normalized_shape, Optional weight, Optional bias, double eps, bool wide);
using layer_norm_backward = Three(const Tensor& dy, const Tensor& x, Sizes normalized_shape, Optional weight, Optional bias,
                                  const Tensor& mean, const Tensor& rstd, std::array<bool, 3> output_mask);

using layer_norm2d = Three(const Tensor& x, Optional weight, Optional bias, double eps, bool wide);
using layer_norm2d_backward = Three(const Tensor& dy, const Tensor& x, Optional weight, Optional bias, const Tensor& mean,
                                    const Tensor& rstd, std::array<bool, 3> output_mask);

using max_pool2d = Two(const Tensor& x, Sizes kernel_size, Sizes stride, Sizes padding, bool ceil_mode);
using max_pool2d_backward = One(const Tensor& dy, const Tensor& positions, Sizes size, Sizes kernel_size, Sizes stride,
                                Sizes padding, bool channels_last);

}  // namespace cnnkern::signature

namespace cnnkern {

// No operator, but the end of one of PyTorch's: residual += batch_norm(x), written to the residual's memory, whose elements have to
// lie as those of x do. Gives mean and rstd. On CPU tensors; who calls it sees to versions and gradients.
signature::bn_add_into bn_add_into;

// No operators either, but what bn_act with a relu is in training, and its gradient, on the first channels of a CPU tensor whose
// statistics are given: x is (N, C, H, W), `rows` says that it has channels innermost. Gives y, mean and rstd as bn_act does, and
// dweight and dbias; dx has channels beside it as x has, and the gradient is added to it. Who calls it checks its arguments.
signature::prefix_bn_relu prefix_bn_relu;
signature::prefix_bn_relu_backward prefix_bn_relu_backward;

// Whether the CPU's kernel of bn_act_conv2d computes the convolution's input as it reads it. Otherwise it calls both parts.
signature::fuses_bn_act_conv2d fuses_bn_act_conv2d;

// Whether the launchers of cnnkern/backends.py answer for CUDA tensors in the place of the kernels of csrc/cuda.
void let_launchers_answer(bool do_so);

}  // namespace cnnkern
