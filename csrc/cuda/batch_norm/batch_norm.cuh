// What the batch-norm operators share: statistics, the affine map of them, and the gradients.
#pragma once

#include "cuda/approximate.cuh"
#include "cuda/bits.cuh"
#include "cuda/channels.cuh"
#include "cuda/reduce.cuh"
#include "scattered.h"

namespace cnnkern::gpu {

constexpr int kSamples = 8;

// The first sweep of the forward pass in training: mean and rstd, running statistics.
template <typename T>
struct Statistics {
  using Scalar = T;
  using S = compute_t<T>;
  using Reduction = Statistics;
  struct Before {
    S center;
  };
  template <int V>
  struct Input {
    S x[V];
  };
  static constexpr bool kWritesWhileReducing = false, kCostly = false;
  static constexpr int kSums = 2;

  const T* x;
  double *mean, *rstd;
  ChannelView view;
  ChannelVector<T> running_mean, running_var;
  double momentum, eps;
  double* variance = nullptr;  // where that is wanted in place of rstd

  // Sums are taken of x - center, so that a large mean costs no digits: an element near the mean is near enough, and the
  // median of a few is one, whatever a border or an outlier among them. Where those stand has nothing to do with images.
  __device__ Before before(int64_t c) const {
    S sample[kSamples];
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
      const int64_t i = scattered(j, view.count()), run = view.runs == 1 ? 0 : i / view.length;
      sample[j] = static_cast<S>(x[c * view.channel_stride + run * view.run_stride + (i - run * view.length) * view.step]);
    }
#pragma unroll
    for (int n = kSamples - 1; n >= kSamples / 2; --n)
#pragma unroll
      for (int j = 0; j < n; ++j) {  // the largest of those left goes to the end
        const S low = sample[j] < sample[j + 1] ? sample[j] : sample[j + 1];
        sample[j + 1] = sample[j] < sample[j + 1] ? sample[j + 1] : sample[j];
        sample[j] = low;
      }
    return {sample[kSamples / 2]};
  }

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(x + at, lanes, fill, in.x);
  }

  template <int V>
  __device__ __forceinline__ void term(const Input<V>& in, int k, const Before& b, S (&sums)[kSums]) const {
    const S d = in.x[k] - b.center;
    sums[0] += d;
    sums[1] = fma(d, d, sums[1]);
  }

  __device__ void finish(int64_t c, const double (&sums)[kSums], double center) const {
    const double s1 = sums[0], s2 = sums[1];
    GPU_SHARED(int, sound, 1);
    if (threadIdx.x == 0) {
      const double n = static_cast<double>(view.count()), delta = s1 / n, moment = (s2 - s1 * delta) / n;
      const double var = moment > 0 ? moment : 0.0;
      // Far from the mean the shift was of no use; squares may have left the arithmetic type's range; NaN fails too.
      sound[0] = (s1 == 0 && s2 == 0) || (delta * delta <= 8 * var && std::isfinite(s2) && s2 / n > 1e-28);
      if (sound[0]) publish(c, center + delta, var);
    }
    __syncthreads();
    if (!sound[0]) publish_exact_moments(c);
  }

  // Two more passes over the channel, in double. For data of a kind that hardly occurs, so it need not be fast.
  __device__ void publish_exact_moments(int64_t c) const {
    const double n = static_cast<double>(view.count());
    double m[1] = {0}, squares[1] = {0};
    for_channel(c, [&](double v) { m[0] += v; });
    block_sum(m);
    m[0] /= n;
    for_channel(c, [&](double v) { squares[0] += (v - m[0]) * (v - m[0]); });
    block_sum(squares);
    if (threadIdx.x == 0) publish(c, m[0], squares[0] / n);
  }

  template <typename F>
  __device__ void for_channel(int64_t c, const F& f) const {
    for (int64_t run = 0; run < view.runs; ++run) {
      const T* p = x + c * view.channel_stride + run * view.run_stride;
      for (int64_t j = threadIdx.x; j < view.length; j += blockDim.x)
        f(static_cast<double>(static_cast<S>(p[j * view.step])));
    }
  }

  __device__ void publish(int64_t c, double m, double var) const {
    mean[c] = m;
    if (variance != nullptr) {
      variance[c] = var;
      return;
    }
    rstd[c] = 1.0 / ::sqrt(var + eps);
    if (running_mean.data == nullptr) return;
    const double n = static_cast<double>(view.count());
    running_mean.set(c, momentum * m + (1 - momentum) * running_mean.get(c));
    running_var.set(c, momentum * (var * (n / (n - 1))) + (1 - momentum) * running_var.get(c));
  }
};

// All of batch norm's forward pass but what is stored.
template <typename T>
struct BatchNormForward : Statistics<T> {
  using S = compute_t<T>;
  using After = Affine<S>;

  T* y;
  Parameters<T> parameters;
  bool training;

  bool maps() const { return true; }
  __device__ After after(int64_t c, bool owner) const {
    double m, r;
    if (training) {
      m = this->mean[c], r = this->rstd[c];
    } else {
      m = this->running_mean.get(c), r = 1.0 / ::sqrt(this->running_var.get(c) + this->eps);
      if (owner) this->mean[c] = m, this->rstd[c] = r;
    }
    return affine(parameters, c, m, r);
  }
};

// What a gate reads beside x and dy: nothing, or the residual.
template <typename S, int V>
struct NothingElse {};
template <typename S, int V>
struct ResidualToo {
  S residual[V];
};

// What lets dy through to the batch norm: an activation, computed again from x, or from x and the residual; a mask; nothing
// that stops it. `close` is called when dy has been read, the call operator when the pre-activation is known. bn_prelu.cuh has
// one with constants per channel and its own sum, which these lack.
struct OfAnyChannel {
  static constexpr int kSums = 0;
  template <typename S>
  using Constants = Affine<S>;
  template <typename S>
  __device__ Affine<S> constants(int64_t, const Affine<S>& a) const { return a; }
  template <typename T>
  const T* reads() const { return nullptr; }  // beside x and dy
};
template <typename T, typename Act>
struct ThroughActivation : OfAnyChannel {
  static constexpr bool kResidual = false;  // whether there is one, with a gradient of its own
  static constexpr bool kCostly = std::is_same_v<Act, OtherActivation>;  // takes many registers
  template <typename S, int V>
  using Else = NothingElse<S, V>;
  Act act;
  template <bool kRagged, typename S, int V>
  __device__ __forceinline__ void close(S (&)[V], NothingElse<S, V>&, int64_t, Lanes) const {}
  template <typename S, int V>
  __device__ __forceinline__ S operator()(S dy, S pre, const NothingElse<S, V>&, int, const Affine<S>&) const {
    return act.template grad<T>(dy, pre);
  }
};
template <typename T, typename Act>
struct ThroughActivationOfSum : OfAnyChannel {
  static constexpr bool kResidual = true, kCostly = true;
  template <typename S, int V>
  using Else = ResidualToo<S, V>;
  Act act;
  const T* residual;
  template <typename>
  const T* reads() const { return residual; }
  template <bool kRagged, typename S, int V>
  __device__ __forceinline__ void close(S (&)[V], ResidualToo<S, V>& in, int64_t at, Lanes lanes) const {
    gpu::load<kRagged>(residual + at, lanes, [](int) { return S(0); }, in.residual);
  }
  template <typename S, int V>
  __device__ __forceinline__ S operator()(S dy, S pre, const ResidualToo<S, V>& in, int k, const Affine<S>&) const {
    return act.template grad<T>(dy, pre + in.residual[k]);
  }
};
struct ThroughMask : OfAnyChannel {
  static constexpr bool kResidual = true, kCostly = false;
  template <typename S, int V>
  using Else = NothingElse<S, V>;
  BitReader mask;
  template <bool kRagged, typename S, int V>
  __device__ __forceinline__ void close(S (&dy)[V], NothingElse<S, V>&, int64_t at, Lanes lanes) const {
    const unsigned bits = mask.template get<kRagged, V>(at, lanes);
#pragma unroll
    for (int k = 0; k < V; ++k) dy[k] = bits >> k & 1 ? dy[k] : S(0);
  }
  template <typename S, int V>
  __device__ __forceinline__ S operator()(S dy, S, const NothingElse<S, V>&, int, const Affine<S>&) const {
    return dy;
  }
};
struct ThroughNothing : OfAnyChannel {
  static constexpr bool kResidual = true, kCostly = false;
  template <typename S, int V>
  using Else = NothingElse<S, V>;
  template <bool kRagged, typename S, int V>
  __device__ __forceinline__ void close(S (&)[V], NothingElse<S, V>&, int64_t, Lanes) const {}
  template <typename S, int V>
  __device__ __forceinline__ S operator()(S dy, S, const NothingElse<S, V>&, int, const Affine<S>&) const {
    return dy;
  }
};

// Batch norm's backward pass, from g, the part of dy that `Gate` lets through. The residual's gradient is g itself.
template <typename T, typename Gate, bool kTraining>
struct BatchNormBackward {
  using Scalar = T;
  using S = compute_t<T>;
  using Reduction = BatchNormBackward;
  using Before = typename Gate::template Constants<S>;
  struct After : Before {
    S slope, constant;
  };
  static constexpr int kSums = 2 + Gate::kSums;
  template <int V>
  struct Input {
    S x[V], dy[V];
    [[no_unique_address]] typename Gate::template Else<S, V> others;
  };
  // In eval the gradients need no sums.
  static constexpr bool kWritesWhileReducing = !kTraining, kCostly = Gate::kCostly;

  const T *dy, *x;
  T *dx, *dresidual;  // null where not wanted
  const double *mean, *rstd;
  int64_t count;
  Parameters<T> parameters;
  ChannelVector<T> dweight, dbias;
  S* coefficients;  // (C, 2): slope and constant, from the first sweep to the second
  Gate gate;

  __host__ __device__ bool writes() const { return dx != nullptr || (Gate::kResidual && dresidual != nullptr); }
  bool maps() const { return kTraining && writes(); }
  __device__ Before before(int64_t c) const { return gate.constants(c, affine(parameters, c, mean[c], rstd[c])); }
  __device__ After after(int64_t c, bool) const { return {before(c), coefficients[2 * c], coefficients[2 * c + 1]}; }

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(x + at, lanes, fill, in.x);
    gpu::load<kRagged>(dy + at, lanes, [](int) { return S(0); }, in.dy);
    gate.template close<kRagged>(in.dy, in.others, at, lanes);
  }

  template <int V>
  __device__ __forceinline__ S gradient(const Input<V>& in, int k, const Before& a) const {
    return gate(in.dy[k], a.pre(in.x[k]), in.others, k, a);
  }

  template <int V>
  __device__ __forceinline__ void term(const Input<V>& in, int k, const Before& b, S (&sums)[kSums]) const {
    const S g = gradient(in, k, b);
    sums[0] += g;
    sums[1] = fma(g, in.x[k] - b.center, sums[1]);
    if constexpr (Gate::kSums > 0) sums[2] += gate.own_term(in.dy[k], b.pre(in.x[k]), in.others, k);
  }

  // dx of an element: in eval, and in training.
  static __device__ __forceinline__ S point(S g, S, const Before& b) { return g * b.scale; }
  static __device__ __forceinline__ S point(S g, S x, const After& a) {
    return a.scale * (g + fma(x - a.center, a.slope, a.constant));
  }

  template <bool kRagged, int V, typename Constants, int K>
  __device__ __forceinline__ void store(const Input<V>& in, int64_t at, Lanes lanes, const Constants (&constants)[K]) const {
    S g[V], out[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Constants& a = constants[K == 1 ? 0 : k];
      g[k] = gradient(in, k, a);
      out[k] = point(g[k], in.x[k], a);
    }
    if (!Gate::kResidual || dx != nullptr) gpu::store<kRagged>(dx + at, lanes, out);
    if constexpr (Gate::kResidual)
      if (dresidual != nullptr) gpu::store<kRagged>(dresidual + at, lanes, g);
  }

  __device__ void finish(int64_t c, const double (&sums)[kSums], double) const {
    if (threadIdx.x != 0) return;
    const double s1 = sums[0], s2 = sums[1], n = static_cast<double>(count), r = rstd[c];
    if constexpr (Gate::kSums > 0) gate.finish(c, sums[2]);
    const double lost = lost_by_rounding<S>(mean[c]);
    const double centered_sum = s2 - lost * s1;  // of g * (x - mean)
    if (dbias.data != nullptr) dbias.set(c, s1);
    if (dweight.data != nullptr) dweight.set(c, centered_sum * r);
    const double slope = -r * r * centered_sum / n;
    coefficients[2 * c] = static_cast<S>(slope);
    coefficients[2 * c + 1] = static_cast<S>(-s1 / n - slope * lost);
  }
};

}  // namespace cnnkern::gpu
