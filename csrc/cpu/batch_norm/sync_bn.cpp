// sync_bn: synchronised batch norm, in parts, between which statistics and sums travel from process to process.
//   sync_bn_stats     moments = mean and biased variance of every channel of x, elements per channel
//   sync_bn           y = act(pre + residual), pre = (x - mean) * weight * rstd + bias, from given mean and rstd
//   sync_bn_sums      sum(g) and sum(g * (x - mean)) * rstd, g = dy * act'(pre), pre with the residual, or dy * [y > 0]
//   sync_bn_backward  dx = weight * rstd * (g - sum(g) / n - (x - mean) * rstd * sum(g * (x - mean) * rstd) / n), with
//                     sums and n over all processes; dresidual = g
// The passes are those of bn_act and bn_add_act, one per part. Memory traffic, in tensors read or written: 1 and 2 (3 with a
// residual) forward, 2 and 3 (4) backward: as for those operators if a channel does not stay in cache.
// Accumulators: the arithmetic type for 64 additions, then double (see passes.h).
#include <array>

#include "cpu/batch_norm/batch_norm.h"
#include "sync_bn.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T>
struct Moments : BatchNormForward<T> {
  double* var;

  static constexpr bool reduces() { return true; }
  static constexpr bool maps() { return false; }
  void finish(int64_t c, int64_t n, const double* sums, int64_t step) {
    Lot m, v;
    this->moments(c, n, sums, sums + step, m, v);
    std::copy_n(m.data(), n, this->mean + c);
    std::copy_n(v.data(), n, var + c);
  }
  template <typename At>
  void map(const At&, int64_t, bool) const {}
  template <typename At>
  void map_part(const At&, int64_t, int64_t) const {}
};

template <typename T, typename Act, bool kAdds>
struct Apply : BatchNormForward<T> {
  using V = Vec<T>;
  static constexpr bool kMasks = kAdds && std::is_same_v<Act, Relu>;

  const double *given_mean, *given_rstd;
  const T* residual;
  Act act;
  BitWriter mask;

  static constexpr bool reduces() { return false; }
  void prepare(int64_t c, int64_t n) {
    auto& table = this->table;
    this->parameters.affine(c, n, given_mean + c, given_rstd + c, table.row(this->kCenter) + c, table.row(this->kScale) + c,
                            table.row(this->kOffset) + c);
  }
  template <typename At>
  void map(const At& at, int64_t i, bool stream) const {
    V v = this->normalized(at, vload(this->x + i));
    if constexpr (kAdds) {
      if (stream) __builtin_prefetch(residual + i + kAhead / sizeof(T), 0, 2);
      v = v + vload(residual + i);
    }
    vput(this->y + i, act.template value<T>(v), stream);
    if constexpr (kMasks) mask.set(i, bits_above(v, V(rounds_to_zero<T>())), V::size());
  }
  template <typename At>
  void map_part(const At& at, int64_t i, int64_t n) const {
    V v = this->normalized(at, vload(this->x + i, n, V(0)));
    if constexpr (kAdds) v = v + vload(residual + i, n, V(0));
    vstore(this->y + i, act.template value<T>(v), n);
    if constexpr (kMasks) mask.set(i, bits_above(v, V(rounds_to_zero<T>())), n);
  }
};

// One of the two backward passes over memory: without `sums` the first, with those of all processes the second.
template <typename T, typename Gate>
struct Backward : BatchNormBackward<T, Gate> {
  using Base = BatchNormBackward<T, Gate>;
  const double* sums;
  double count;

  bool reduces() const { return sums == nullptr; }
  bool maps() const { return sums != nullptr; }
  void prepare(int64_t c, int64_t n) {
    Base::prepare(c, n);
    if (maps()) this->set_slopes(c, n, sums + c, sums + channels + c, count);
  }
  int64_t channels;
};

struct BackwardInputs {
  const Tensor &dy, &x;
  const OptionalTensor &weight, &bias;
  const Tensor &mean, &rstd;
  const OptionalTensor &mask, &residual;
  ActivationName act;
  bool channels_last;
};

// Runs one pass; x and dy are in one of the two layouts. `change` sets what differs between the passes.
template <typename F>
void run_backward(const char* op, const BackwardInputs& in, const F& change) {
  const Layout layout = layout_of(in.x);
  const bool masked = tensor_or_undefined(in.mask).defined(), adds = tensor_or_undefined(in.residual).defined();
  const Tensor residual = adds ? laid_out(*in.residual, in.channels_last) : Tensor();
  with_type(in.x, [&](auto scalar) {
    using T = decltype(scalar);
    const auto through = [&](auto gate) {
      Backward<T, decltype(gate)> policy{
          batch_norm_backward<T>(in.dy, in.x, layout, in.weight, in.bias, in.mean, in.rstd, /*training=*/true, {}, gate), nullptr, 0.0,
          layout.C};
      change(policy);
      run(policy, layout);
    };
    if (masked)
      through(ThroughMask{{in.mask->template const_data_ptr<uint8_t>(), in.mask->numel()}});
    else if (adds)
      through(ThroughActivationOfSum<T, OtherActivation>{other_activation(op, in.act), residual.const_data_ptr<T>()});
    else
      with_activation(op, in.act, [&](auto activation) { through(ThroughActivation<T, decltype(activation)>{activation}); });
  });
}

}  // namespace

Tensor sync_bn_stats_cpu(const Tensor& x) {
  check_image("cnnkern::sync_bn_stats", x);
  const Tensor x_ = in_layout(x);
  const int64_t C = x.size(1);
  Tensor moments = aten::zeros({2 * C + 1}, x.options().dtype(at::kDouble));
  if (x.numel() == 0) return moments;
  const Layout layout = layout_of(x_);
  double* const out = moments.mutable_data_ptr<double>();
  out[2 * C] = static_cast<double>(elements_per_channel(x));
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    run(Moments<T>{{.x = x_.const_data_ptr<T>(),
                    .y = nullptr,
                    .mean = out,
                    .rstd = nullptr,
                    .training = true,
                    .view = layout.channel(),
                    .parameters = {Tensor(), Tensor()},
                    .running = {Tensor(), Tensor(), 0.0},
                    .eps = 0.0},
                   out + C},
        layout);
  });
  return moments;
}

std::tuple<Tensor, Tensor> sync_bn_cpu(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                       c10::string_view act, std::optional<double> act_param) {
  const char* op = "cnnkern::sync_bn";
  const bool adds = tensor_or_undefined(residual).defined();
  check_sync_bn(op, x, residual, weight, bias, mean, rstd, {act, act_param});
  const Tensor x_ = in_batch_norm_layout(x), residual_ = adds ? in_layout_of(*residual, x_) : Tensor();
  Tensor y = adds ? aten::empty_like(x_) : batch_norm_result(x_, act);
  const auto result = [&] { return adds ? in_strides_of_sum(y, x_, *residual, act) : y; };
  Tensor mask = aten::zeros({adds && act == "relu" ? mask_bytes(x.numel()) : 0}, x.options().dtype(at::kByte));
  if (x.numel() == 0) return {result(), mask};
  const Layout layout = layout_of(x_);
  with_type(x_, [&](auto scalar) {
    using T = decltype(scalar);
    const auto forward = [&]() -> BatchNormForward<T> {
      return {.x = x_.const_data_ptr<T>(),
              .y = y.mutable_data_ptr<T>(),
              .mean = nullptr,
              .rstd = nullptr,
              .training = false,
              .view = layout.channel(),
              .parameters = {tensor_or_undefined(weight), tensor_or_undefined(bias)},
              .running = {Tensor(), Tensor(), 0.0},
              .eps = 0.0};
    };
    const auto apply = [&](auto activation, auto with_residual) {
      run(Apply<T, decltype(activation), decltype(with_residual)::value>{forward(),
                                                                         mean.const_data_ptr<double>(),
                                                                         rstd.const_data_ptr<double>(),
                                                                         adds ? residual_.const_data_ptr<T>() : nullptr,
                                                                         activation,
                                                                         {mask.mutable_data_ptr<uint8_t>()}},
          layout);
    };
    with_activation(op, {act, act_param}, [&](auto activation) {
      adds ? apply(activation, std::true_type{}) : apply(activation, std::false_type{});
    });
  });
  return {result(), mask};
}

Tensor sync_bn_sums_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& mean, const Tensor& rstd, const OptionalTensor& mask, bool channels_last,
                        c10::string_view act, const OptionalTensor& residual, std::optional<double> act_param) {
  const char* op = "cnnkern::sync_bn_sums";
  check_sync_bn_sums(op, dy, x, weight, bias, mean, rstd, mask, channels_last, {act, act_param}, residual);
  const Tensor sums = aten::zeros({2, x.size(1)}, mean.options());
  if (x.numel() == 0) return sums;
  const Tensor x_ = laid_out(x, channels_last), dy_ = laid_out(dy, channels_last);
  run_backward(op, {dy_, x_, weight, bias, mean, rstd, mask, residual, {act, act_param}, channels_last},
               [&](auto& policy) { policy.dbias = sums[0], policy.dweight = sums[1]; });
  return sums;
}

std::tuple<Tensor, Tensor> sync_bn_backward_cpu(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                const OptionalTensor& mask, bool channels_last, c10::string_view act,
                                                const Tensor& sums, const Tensor& count, std::array<bool, 2> output_mask,
                                                const OptionalTensor& residual, std::optional<double> act_param) {
  const char* op = "cnnkern::sync_bn_backward";
  check_sync_bn_backward(op, dy, x, weight, bias, mean, rstd, mask, channels_last, {act, act_param}, sums, count, output_mask, residual);
  const Tensor x_ = laid_out(x, channels_last), dy_ = laid_out(dy, channels_last);
  Tensor dx = gradient_like(output_mask[0], x_), dresidual = gradient_like(output_mask[1], x_);
  if (x.numel() == 0 || (!output_mask[0] && !output_mask[1])) return {dx, dresidual};
  run_backward(op, {dy_, x_, weight, bias, mean, rstd, mask, residual, {act, act_param}, channels_last}, [&]<typename Policy>(Policy& policy) {
    using T = typename Policy::Scalar;
    if (output_mask[0]) policy.dx = dx.mutable_data_ptr<T>();
    if (output_mask[1]) policy.dresidual = dresidual.mutable_data_ptr<T>();
    policy.sums = sums.const_data_ptr<double>();
    policy.count = *count.const_data_ptr<double>();
  });
  return {dx, dresidual};
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
