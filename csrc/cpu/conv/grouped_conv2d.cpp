// grouped_conv2d: y = conv2d(x, weight, bias), as many output as input channels per group; conv3d, where x is (N, C, T, H, W).
// Backward: dx, dweight, dbias.
// Kernels: conv_tiled.h, and for small depthwise kernels in channels_last conv_in_place.h. The rule of dispatch: conv_rule.h.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <array>
#include <tuple>
#include <vector>

#include "aten.h"
#include "check.h"
#include "cpu/conv/conv_in_place.h"
#include "cpu/conv/conv_rule.h"
#include "cpu/conv/conv_tiled.h"
#include "cpu/conv/of_norm.h"
#include "memory_layout.h"
#include "own_convolutions.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

// Of the result.
std::vector<int64_t> output_sizes(const Geometry& g, int64_t dims) {
  return dims == 5 ? std::vector{g.N, g.C, g.OT, g.OH, g.OW} : std::vector{g.N, g.C, g.OH, g.OW};
}

// The memory format of results, chosen as ATen's convolutions choose it.
at::MemoryFormat result_format(const Tensor& x, const Tensor& weight) {
  const auto channels_last = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  return x.suggest_memory_format() == channels_last || weight.suggest_memory_format() == channels_last
             ? channels_last
             : at::MemoryFormat::Contiguous;
}

template <typename T>
Image<T> of_input(T* data, const Tensor& t, const Geometry& g) {
  return {data, g.N, g.C, g.H, g.W, !t.is_contiguous(), g.T};
}

template <typename T>
Image<T> of_output(T* data, const Tensor& t, const Geometry& g) {
  return {data, g.N, g.C, g.OH, g.OW, !t.is_contiguous(), g.OT};
}

// The gradient of the weight without a dimension of one tap where volumes are computed as images.
Tensor taps_of(const Tensor& dweight, const Geometry& g) {
  return dweight.dim() == 4 || g.kt > 1 ? dweight : dweight.squeeze(dweight.size(2) == 1 ? 2 : -1);
}

// Calls f with a value of the element type.
template <typename F>
void with_dtype(at::ScalarType type, const F& f) {
  if (type == at::kFloat) return f(float{});
  if (type == at::kBFloat16) return f(c10::BFloat16{});
  f(c10::Half{});
}

// Whether the kernels read x through a batch norm: an image that they read where it lies.
bool reads_through(const Norm* norm, const Tensor& x, at::MemoryFormat format) {
  return norm == nullptr || (x.dim() == 4 && x.is_contiguous(format));
}

// Whether the kernels of this file compute the forward pass.
bool is_ours(const Norm* norm, const Tensor& x, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
             at::IntArrayRef dilation, int64_t groups) {
  if (!covered(x, weight, bias, stride, padding, dilation, groups)) return false;
  const auto format = result_format(x, weight);
  if (!reads_through(norm, x, format)) return false;
  return !left_to_library(geometry(x, weight, stride, padding), x.scalar_type(), format != at::MemoryFormat::Contiguous, Pass::forward) ||
         is_own_convolution(x, weight, stride, padding, dilation, false);
}

// Calls f with the prologue for a norm of C channels, or null for none.
template <typename T, typename F>
void with_prologue(const Norm* norm, int64_t C, const F& f) {
  if (norm == nullptr) return f(static_cast<const Prologue<T>*>(nullptr));
  with_activation("cnnkern::bn_act_conv2d", norm->act, [&](auto act) {
    const Prologue<T> prologue({tensor_or_undefined(norm->weight), tensor_or_undefined(norm->bias)}, norm->mean.const_data_ptr<double>(),
                               norm->rstd.const_data_ptr<double>(), C, act);
    f(&prologue);
  });
}

// The convolution of x, or of act(batch_norm(x)); nothing if the library computes it.
std::optional<Tensor> convolve(const Norm* norm, const Tensor& x, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  if (!is_ours(norm, x, weight, bias, stride, padding, dilation, groups)) return std::nullopt;
  const auto format = result_format(x, weight);
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const Geometry whole = geometry(x, weight, stride, padding), g = as_images(whole, channels_last);
  const bool reads_in_place = forward_is_in_place(g, channels_last);
  const Tensor x_ = reads_in_place || x.dim() == 5 ? x.contiguous(format) : in_layout(x), weight_ = weight.contiguous(),
               bias_ = bias.defined() ? bias.contiguous() : bias;
  const Tensor y = aten::empty(output_sizes(whole, x.dim()), x.options().memory_format(format));
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Image<const T> from = of_input(x_.const_data_ptr<T>(), x_, g);
    const Image<T> to = of_output(y.mutable_data_ptr<T>(), y, g);
    const T *const w = weight_.const_data_ptr<T>(), *const bias_data = bias.defined() ? bias_.const_data_ptr<T>() : nullptr;
    with_prologue<T>(norm, g.C, [&](const Prologue<T>* prologue) {
      reads_in_place ? forward_in_place(from, prologue, w, bias_data, to, g) : forward(from, prologue, w, bias_data, to, g);
    });
  });
  return y;
}

// Its gradients; dx is that of act(batch_norm(x)).
std::optional<std::tuple<Tensor, Tensor, Tensor>> gradients(const Norm* norm, const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                                            int64_t groups, std::array<bool, 3> output_mask) {
  if (!covered(x, weight, {}, stride, padding, dilation, groups)) return std::nullopt;
  const Tensor none = aten::empty({0}, x.options());
  const auto format = result_format(x, weight);
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const Geometry whole = geometry(x, weight, stride, padding), g = as_images(whole, channels_last);
  const auto sizes = output_sizes(whole, x.dim());
  TORCH_CHECK(dy.sizes() == sizes && dy.scalar_type() == x.scalar_type() && dy.device().is_cpu(),
              "cnnkern::grouped_conv2d_backward: dy must be ", x.scalar_type(), " ", at::IntArrayRef(sizes),
              " like the forward pass's output; got ", dy.scalar_type(), " ", dy.sizes(), " on ", dy.device());
  if (!reads_through(norm, x, format)) return std::nullopt;
  const Pass pass = !output_mask[0] ? Pass::weight_gradient : output_mask[1] ? Pass::both_gradients : Pass::input_gradient;
  if (left_to_library(whole, x.scalar_type(), channels_last, pass) &&
      !is_own_convolution(x, weight, stride, padding, dilation, true))
    return std::nullopt;
  const bool reads_in_place = backward_is_in_place(g, channels_last);
  const auto placed = [&](const Tensor& t) { return reads_in_place || x.dim() == 5 ? t.contiguous(format) : in_layout(t); };
  const Tensor x_ = placed(x), dy_ = placed(dy), weight_ = weight.contiguous();
  const Tensor dx = output_mask[0] ? aten::empty(x.sizes(), x.options().memory_format(format)) : none;
  const Tensor dweight = output_mask[1] ? aten::empty(weight.sizes(), weight.options().memory_format(format)) : none;
  const Tensor dbias = output_mask[2] ? aten::empty({g.C}, weight.options()) : none;
  if (!output_mask[0] && !output_mask[1] && !output_mask[2]) return std::tuple(dx, dweight, dbias);
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Image<const T> gradient = of_output(dy_.const_data_ptr<T>(), dy_, g), from = of_input(x_.const_data_ptr<T>(), x_, g);
    const Gradients<T> wanted{.dx = output_mask[0] ? of_input(dx.mutable_data_ptr<T>(), dx, g) : Image<T>{},
                              .dweight = output_mask[1] ? taps_of(dweight, g) : Tensor(),
                              .dbias = output_mask[2] ? dbias : Tensor()};
    const T* const w = weight_.const_data_ptr<T>();
    with_prologue<T>(norm, g.C, [&](const Prologue<T>* prologue) {
      reads_in_place ? backward_in_place(gradient, from, prologue, w, wanted, g) : backward(gradient, from, prologue, w, wanted, g);
    });
  });
  return std::tuple(dx, dweight, dbias);
}

}  // namespace

Tensor grouped_conv2d_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  if (auto y = convolve(nullptr, x, weight, tensor_or_undefined(bias), stride, padding, dilation, groups)) return *std::move(y);
  return aten::convolution(x, weight, bias, stride, padding, dilation, groups);
}

bool reads_through_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups) {
  const Norm any{{}, {}, x, x, {}};
  return is_ours(&any, x, weight, bias, stride, padding, dilation, groups);
}

std::optional<Tensor> conv2d_of_norm(const Norm& norm, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return convolve(&norm, x, weight, tensor_or_undefined(bias), stride, padding, dilation, groups);
}

std::tuple<Tensor, Tensor, Tensor> grouped_conv2d_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                               at::IntArrayRef stride, at::IntArrayRef padding,
                                                               at::IntArrayRef dilation, int64_t groups,
                                                               std::array<bool, 3> output_mask) {
  if (auto found = gradients(nullptr, dy, x, weight, stride, padding, dilation, groups, output_mask)) return *std::move(found);
  // oneDNN's 16-bit gradients of small grouped weights depend on what its memory held before (torch 2.14.1).
  const bool widen = groups > 1 && x.is_floating_point() && x.element_size() == 2;
  const auto wide = [&](const Tensor& t) { return widen ? t.to(at::kFloat) : t; };
  const auto grads = aten::convolution_backward(wide(dy), wide(x), wide(weight), stride, padding, dilation, groups, output_mask);
  const auto asked = [&](bool wanted, const Tensor& t) { return wanted ? t.to(x.scalar_type()) : aten::empty({0}, x.options()); };
  return {asked(output_mask[0], std::get<0>(grads)), asked(output_mask[1], std::get<1>(grads)),
          asked(output_mask[2], std::get<2>(grads))};
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> conv2d_of_norm_backward(const Norm& norm, const Tensor& dy, const Tensor& x,
                                                                          const Tensor& weight, at::IntArrayRef stride,
                                                                          at::IntArrayRef padding, at::IntArrayRef dilation,
                                                                          int64_t groups, std::array<bool, 3> output_mask) {
  return gradients(&norm, dy, x, weight, stride, padding, dilation, groups, output_mask);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
