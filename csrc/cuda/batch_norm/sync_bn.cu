// The parts of sync_bn on CUDA tensors. The kernels stand in sync_bn.cuh.
#include "aten.h"
#include "cuda/batch_norm/batch_norm.h"
#include "cuda/mask.h"
#include "cuda/batch_norm/sync_bn.cuh"
#include "sync_bn.h"

namespace cnnkern {
namespace {

template <typename T, typename R, typename... Pointers>
void launch_reduction(const R& reduction, const Tensor& x, const Pointers*... pointers) {
  const gpu::Cut<T> cut(layout_of(x), true, pointers...);
  const Tensor workspace = aten::empty({cut.template workspace<R>()}, x.options().dtype(at::kDouble));
  gpu::reduce(reduction, cut, workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename P, typename... Pointers>
void launch_map(const P& p, const Tensor& x, const Pointers*... pointers) {
  gpu::map(p, gpu::Cut<T>(layout_of(x), false, pointers...), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct BackwardInputs {
  const Tensor &dy, &x;
  const OptionalTensor &weight, &bias;
  const Tensor &mean, &rstd;
};

template <typename T, typename Gate>
gpu::BatchNormBackward<T, Gate, true> backward_of(const Gate& gate, const BackwardInputs& in) {
  return {.dy = in.dy.const_data_ptr<T>(),
          .x = in.x.const_data_ptr<T>(),
          .dx = nullptr,
          .dresidual = nullptr,
          .mean = in.mean.const_data_ptr<double>(),
          .rstd = in.rstd.const_data_ptr<double>(),
          .count = 0,  // of all processes, which is on the GPU
          .parameters = {channel_vector<T>(in.weight), channel_vector<T>(in.bias)},
          .dweight = channel_vector<T>(Tensor()),
          .dbias = channel_vector<T>(Tensor()),
          .coefficients = nullptr,
          .gate = gate};
}

// Calls f(type, gate): a gate by the mask, or without one by the activation. residual: laid out as x is, or undefined.
template <typename F>
void with_gate(const char* op, const Tensor& x, const OptionalTensor& mask, const ActivationName& act, const Tensor& residual,
               const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "sync_bn_backward", [&] {
    if (tensor_or_undefined(mask).defined())
      f(scalar_t{}, gpu::ThroughMask{{}, {mask->const_data_ptr<uint8_t>()}});
    else if (residual.defined())
      f(scalar_t{}, gpu::ThroughActivationOfSum<scalar_t, OtherActivation>{{}, other_activation(op, act),
                                                                           residual.const_data_ptr<scalar_t>()});
    else
      with_activation(op, act, [&](auto activation) {
        f(scalar_t{}, gpu::ThroughActivation<scalar_t, decltype(activation)>{{}, activation});
      });
  });
}

}  // namespace

Tensor sync_bn_stats_cuda(const Tensor& x) {
  check_image("cnnkern::sync_bn_stats", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t C = x.size(1);
  const Tensor moments = aten::empty({2 * C + 1}, x.options().dtype(at::kDouble));
  if (x.numel() == 0) return moments.zero_();
  const Tensor x_ = in_layout(x);
  double* const out = moments.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "sync_bn_stats", [&] {
    const gpu::SyncMoments<scalar_t> statistics{{.x = x_.const_data_ptr<scalar_t>(),
                                                 .mean = out,
                                                 .rstd = nullptr,
                                                 .view = gpu::ChannelView(layout_of(x_)),
                                                 .running_mean = channel_vector<scalar_t>(Tensor()),
                                                 .running_var = channel_vector<scalar_t>(Tensor()),
                                                 .momentum = 0.0,
                                                 .eps = 0.0,
                                                 .variance = out + C},
                                                out + 2 * C};
    launch_reduction<scalar_t>(statistics, x_, statistics.x);
  });
  return moments;
}

std::tuple<Tensor, Tensor> sync_bn_cuda(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                        c10::string_view act, std::optional<double> act_param) {
  const char* op = "cnnkern::sync_bn";
  const bool adds = tensor_or_undefined(residual).defined();
  check_sync_bn(op, x, residual, weight, bias, mean, rstd, {act, act_param});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = in_batch_norm_layout(x), residual_ = adds ? in_layout_of(*residual, x_) : Tensor();
  const Tensor y = adds ? aten::empty_like(x_) : batch_norm_result(x_, act);
  const auto result = [&] { return adds ? in_strides_of_sum(y, x_, *residual, act) : y; };
  // Zeros: vectors that share a byte add their bits to it.
  const Tensor mask = adds && act == "relu"
                          ? words_of_mask(x, [](int64_t n, const auto& options) { return aten::zeros({n}, options); })
                          : aten::empty({0}, x.options().dtype(at::kByte));
  if (x.numel() == 0) return {result(), mask};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "sync_bn", [&] {
    const auto apply = [&](auto activation, auto with_residual) {
      const gpu::SyncForward<scalar_t, decltype(activation), decltype(with_residual)::value> forward{
          .x = x_.const_data_ptr<scalar_t>(),
          .residual = adds ? residual_.const_data_ptr<scalar_t>() : nullptr,
          .y = y.mutable_data_ptr<scalar_t>(),
          .mean = mean.const_data_ptr<double>(),
          .rstd = rstd.const_data_ptr<double>(),
          .parameters = {channel_vector<scalar_t>(weight), channel_vector<scalar_t>(bias)},
          .act = activation,
          .mask = {words(mask)}};
      launch_map<scalar_t>(forward, x_, forward.x, forward.residual, forward.y);
    };
    with_activation(op, {act, act_param}, [&](auto activation) {
      adds ? apply(activation, std::true_type{}) : apply(activation, std::false_type{});
    });
  });
  return {result(), mask};
}

Tensor sync_bn_sums_cuda(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& rstd, const OptionalTensor& mask, bool channels_last,
                         c10::string_view act, const OptionalTensor& residual, std::optional<double> act_param) {
  const char* op = "cnnkern::sync_bn_sums";
  check_sync_bn_sums(op, dy, x, weight, bias, mean, rstd, mask, channels_last, {act, act_param}, residual);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor sums = aten::empty({2, x.size(1)}, mean.options());
  if (x.numel() == 0) return sums.zero_();
  const Tensor x_ = laid_out(x, channels_last), dy_ = laid_out(dy, channels_last);
  const Tensor residual_ = tensor_or_undefined(residual).defined() ? laid_out(*residual, channels_last) : Tensor();
  with_gate(op, x, mask, {act, act_param}, residual_, [&]<typename T>(T, const auto& gate) {
    using Gate = std::decay_t<decltype(gate)>;
    const gpu::SyncSums<T, Gate> reduction{backward_of<T>(gate, {dy_, x_, weight, bias, mean, rstd}),
                                           sums.mutable_data_ptr<double>(), x.size(1)};
    launch_reduction<T>(reduction, x_, gate.template reads<T>(), reduction.dy, reduction.x);
  });
  return sums;
}

std::tuple<Tensor, Tensor> sync_bn_backward_cuda(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                 const OptionalTensor& mask, bool channels_last, c10::string_view act,
                                                 const Tensor& sums, const Tensor& count, std::array<bool, 2> output_mask,
                                                 const OptionalTensor& residual, std::optional<double> act_param) {
  const char* op = "cnnkern::sync_bn_backward";
  check_sync_bn_backward(op, dy, x, weight, bias, mean, rstd, mask, channels_last, {act, act_param}, sums, count, output_mask, residual);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = laid_out(x, channels_last), dy_ = laid_out(dy, channels_last);
  const Tensor residual_ = tensor_or_undefined(residual).defined() ? laid_out(*residual, channels_last) : Tensor();
  const Tensor dx = gradient_like(output_mask[0], x_), dresidual = gradient_like(output_mask[1], x_);
  if (x.numel() > 0 && (output_mask[0] || output_mask[1]))
    with_gate(op, x, mask, {act, act_param}, residual_, [&]<typename T>(T, const auto& gate) {
      using Gate = std::decay_t<decltype(gate)>;
      gpu::SyncBackward<T, Gate> backward{backward_of<T>(gate, {dy_, x_, weight, bias, mean, rstd}), sums.const_data_ptr<double>(),
                                          count.const_data_ptr<double>(), x.size(1)};
      if (output_mask[0]) backward.dx = dx.mutable_data_ptr<T>();
      if (output_mask[1]) backward.dresidual = dresidual.mutable_data_ptr<T>();
      launch_map<T>(backward, x_, gate.template reads<T>(), backward.dy, backward.x, backward.dx, backward.dresidual);
    });
  return {or_empty(dx, x), or_empty(dresidual, x)};
}

}  // namespace cnnkern
