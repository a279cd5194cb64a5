// bn_act: y = act(pre), pre = (x - mean) * weight * rstd + bias.
// Backward, with g = dy * act'(pre), n elements a channel: dbias = sum(g), dweight = sum(g * (x - mean)) * rstd,
//   dx = weight * rstd * (g - dbias / n - (x - mean) * rstd * dweight / n)   training
//   dx = weight * rstd * g                                                   eval
// act'(pre) is recomputed from x by the same subtraction and fma as in the forward pass, so it is that of the
// output bit for bit.
// Traffic in tensors read or written, where a channel (planes) or the tensor (rows) stays in L2: 2 forward, 3
// backward (1 and 2 of them reads); else 3 and 5. Eval: 2 and 3.
// A block owns a channel and both sweeps (planes, short channels), or a slice of one channel, or a strip of rows of
// up to 128 channels; then its two sums go to memory, a second kernel adds them, a third maps. How a tensor is cut
// depends on its shape and alignment alone, not on the GPU.
// Accumulators: the arithmetic type (float, double for double) for at most 128 elements, then double.
#pragma once

#include "activations.h"
#include "cuda/gpu_compat.cuh"
#include "cuda/reduce.cuh"

namespace cnnkern::gpu {

constexpr int kThreads = 256;            // of a block that shares its channel
constexpr int kOwnerThreads = 512;       // of a block that owns one
constexpr int kFinishThreads = 128;
constexpr int kUnroll = 4;               // vectors that a thread has under way
constexpr int kFlush = 4;                // batches whose sums stay in the arithmetic type
constexpr int kTileChannels = 128;
constexpr int kSamples = 8;
constexpr int64_t kBlocks = 1024;        // enough for every GPU
constexpr int64_t kOwnerBlocks = 96;     // channels that keep a GPU busy with one block each,
constexpr int64_t kOwnerBytes = 256 << 10;  // while all of them together stay in L2
constexpr int64_t kSmallChannel = 8192;  // elements below which further launches cost more than idle processors

__host__ __device__ constexpr int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// A tensor of planes (N, C, HW), or of rows (N * HW, C).
struct Layout {
  bool rows;
  int64_t N, C, HW;
};

// Where the elements of a channel lie: `runs` runs of `length` elements, `step` apart.
struct ChannelView {
  int64_t channel_stride, runs, run_stride, length, step;
  explicit ChannelView(const Layout& s)
      : channel_stride(s.rows ? 1 : s.HW),
        runs(s.rows ? 1 : s.N),
        run_stride(s.rows ? 0 : s.C * s.HW),
        length(s.rows ? s.N * s.HW : s.HW),
        step(s.rows ? s.C : 1) {}
  __host__ __device__ int64_t count() const { return runs * length; }
};

// One value a channel, of type T or float; not there if data is null.
template <typename T>
struct ChannelVector {
  void* data;
  int64_t stride;
  bool is_float;
  __device__ double get(int64_t c) const {
    if (is_float) return static_cast<const float*>(data)[c * stride];
    return static_cast<compute_t<T>>(static_cast<const T*>(data)[c * stride]);
  }
  __device__ double get_or(double otherwise, int64_t c) const { return data == nullptr ? otherwise : get(c); }
  __device__ void set(int64_t c, double value) const {
    if (is_float)
      static_cast<float*>(data)[c * stride] = static_cast<float>(value);
    else
      static_cast<T*>(data)[c * stride] = static_cast<T>(static_cast<compute_t<T>>(value));
  }
};

template <typename T>
struct Parameters {
  ChannelVector<T> weight, bias;
};

// pre = fma(x - center, scale, offset). What rounding the mean to the arithmetic type loses is put into the offset.
template <typename S>
struct Affine {
  S center, scale, offset;
  __device__ __forceinline__ S pre(S x) const { return fma(x - center, scale, offset); }
};

template <typename S>
__device__ __forceinline__ double lost_by_rounding(double mean) {
  return std::isfinite(mean) ? mean - static_cast<double>(static_cast<S>(mean)) : 0.0;
}

// Forward and backward have to agree on every bit: no expression that a compiler may contract one way or another.
template <typename T, typename S = compute_t<T>>
__device__ __forceinline__ Affine<S> affine(const Parameters<T>& parameters, int64_t c, double mean, double rstd) {
  const double scale = parameters.weight.get_or(1.0, c) * rstd;
  const double offset = fma(-lost_by_rounding<S>(mean), scale, parameters.bias.get_or(0.0, c));
  return {static_cast<S>(mean), static_cast<S>(scale), static_cast<S>(offset)};
}

// ---- what is computed -------------------------------------------------------------------------------------------
// A policy brings the constants of the first sweep (`before`) and of the second (`after`) for a channel, both with a
// `center` that stands in for elements that do not exist; `term`, an element's part in the two sums; `finish`, called
// by a whole block, which turns a channel's sums into what `after` reads; and `point`, an element of the result.

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
  static constexpr bool kWritesWhileReducing = false;

  const T* x;
  double *mean, *rstd;
  ChannelView view;
  ChannelVector<T> running_mean, running_var;
  double momentum, eps;

  // Sums are taken of x - center, so that a large mean costs no digits: a few elements' mean is near enough.
  __device__ Before before(int64_t c) const {
    S sample[kSamples];
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
      const int64_t run = j * view.runs / kSamples, i = (2 * j + 1) * view.length / (2 * kSamples);
      sample[j] = static_cast<S>(x[c * view.channel_stride + run * view.run_stride + i * view.step]);
    }
    // In pairs, so that the mean of equal values is that value.
    double sum[kSamples];
#pragma unroll
    for (int j = 0; j < kSamples; ++j) sum[j] = static_cast<double>(sample[j]);
#pragma unroll
    for (int n = kSamples / 2; n > 0; n /= 2)
#pragma unroll
      for (int j = 0; j < n; ++j) sum[j] += sum[j + n];
    return {static_cast<S>(sum[0] * (1.0 / kSamples))};
  }

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(x + at, lanes, fill, in.x);
  }

  template <int V>
  __device__ __forceinline__ void term(const Input<V>& in, int k, const Before& b, S& s1, S& s2) const {
    const S d = in.x[k] - b.center;
    s1 += d;
    s2 = fma(d, d, s2);
  }

  __device__ void finish(int64_t c, double s1, double s2) const {
    GPU_SHARED(int, sound, 1);
    if (threadIdx.x == 0) {
      const double n = static_cast<double>(view.count()), delta = s1 / n, moment = (s2 - s1 * delta) / n;
      const double var = moment > 0 ? moment : 0.0;
      // Far from the mean the shift was of no use; squares may have left the arithmetic type's range; NaN fails too.
      sound[0] = (s1 == 0 && s2 == 0) || (delta * delta <= 8 * var && std::isfinite(s2) && s2 / n > 1e-28);
      if (sound[0]) publish(c, before(c).center + delta, var);
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
    rstd[c] = 1.0 / ::sqrt(var + eps);
    if (running_mean.data == nullptr) return;
    const double n = static_cast<double>(view.count());
    running_mean.set(c, momentum * m + (1 - momentum) * running_mean.get(c));
    running_var.set(c, momentum * (var * (n / (n - 1))) + (1 - momentum) * running_var.get(c));
  }
};

template <typename T, typename Act>
struct BnActForward : Statistics<T> {
  using S = compute_t<T>;
  using After = Affine<S>;
  template <int V>
  using Input = typename Statistics<T>::template Input<V>;

  T* y;
  Parameters<T> parameters;
  bool training;

  bool maps() const { return true; }
  __device__ T* result() const { return y; }

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

  template <int V>
  __device__ __forceinline__ S point(const Input<V>& in, int k, const After& a) const {
    return Act::template value<T>(a.pre(in.x[k]));
  }
};

template <typename T, typename Act, bool kTraining>
struct BnActBackward {
  using Scalar = T;
  using S = compute_t<T>;
  using Reduction = BnActBackward;
  using Before = Affine<S>;
  struct After : Affine<S> {
    S slope, constant;
  };
  template <int V>
  struct Input {
    S x[V], dy[V];
  };
  // In eval dx needs no sums.
  static constexpr bool kWritesWhileReducing = !kTraining;

  const T *dy, *x;
  T* dx;  // null where it is not wanted
  const double *mean, *rstd;
  int64_t count;
  Parameters<T> parameters;
  ChannelVector<T> dweight, dbias;
  S* coefficients;  // (C, 2): slope and constant, from the first sweep to the second

  bool maps() const { return kTraining && dx != nullptr; }
  __device__ T* result() const { return dx; }
  __device__ Before before(int64_t c) const { return affine(parameters, c, mean[c], rstd[c]); }
  __device__ After after(int64_t c, bool) const { return {before(c), coefficients[2 * c], coefficients[2 * c + 1]}; }

  template <bool kRagged, int V, typename Fill>
  __device__ __forceinline__ void load(Input<V>& in, int64_t at, Lanes lanes, const Fill& fill) const {
    gpu::load<kRagged>(x + at, lanes, fill, in.x);
    gpu::load<kRagged>(dy + at, lanes, [](int) { return S(0); }, in.dy);
  }

  template <int V>
  __device__ __forceinline__ S gradient(const Input<V>& in, int k, const Affine<S>& a) const {
    return Act::template grad<T>(in.dy[k], a.pre(in.x[k]));
  }

  template <int V>
  __device__ __forceinline__ void term(const Input<V>& in, int k, const Before& b, S& s1, S& s2) const {
    const S g = gradient(in, k, b);
    s1 += g;
    s2 = fma(g, in.x[k] - b.center, s2);
  }

  template <int V>
  __device__ __forceinline__ S point(const Input<V>& in, int k, const Before& b) const {  // in eval
    return gradient(in, k, b) * b.scale;
  }

  template <int V>
  __device__ __forceinline__ S point(const Input<V>& in, int k, const After& a) const {
    return a.scale * (gradient(in, k, a) + fma(in.x[k] - a.center, a.slope, a.constant));
  }

  __device__ void finish(int64_t c, double s1, double s2) const {
    if (threadIdx.x != 0) return;
    const double n = static_cast<double>(count), r = rstd[c];
    const double lost = lost_by_rounding<S>(mean[c]);
    const double centered_sum = s2 - lost * s1;  // of g * (x - mean)
    if (dbias.data != nullptr) dbias.set(c, s1);
    if (dweight.data != nullptr) dweight.set(c, centered_sum * r);
    const double slope = -r * r * centered_sum / n;
    coefficients[2 * c] = static_cast<S>(slope);
    coefficients[2 * c + 1] = static_cast<S>(-s1 / n - slope * lost);
  }
};

// ---- the two sweeps ---------------------------------------------------------------------------------------------
// The constants of a thread are one for all lanes of its vectors (planes) or one a lane (rows): K is 1 or V.

// A batch is the U vectors that a thread has under way. In ragged planes that is one, of which only `lanes` may exist.

template <bool kRagged, int V, typename P, typename Constants, int K, int U>
__device__ __forceinline__ void load_batch(const P& p, typename P::template Input<V> (&in)[U], const int64_t (&at)[U], Lanes lanes,
                                           const Constants (&constants)[K]) {
#pragma unroll
  for (int u = 0; u < U; ++u)
    p.template load<kRagged>(in[u], at[u], lanes, [&](int k) { return constants[K == 1 ? 0 : k].center; });
}

template <bool kRagged, int V, typename P, typename Constants, int K, int U>
__device__ __forceinline__ void store_batch(const P& p, const typename P::template Input<V> (&in)[U], const int64_t (&at)[U],
                                            Lanes lanes, const Constants (&constants)[K]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    typename P::S out[V];
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = p.point(in[u], k, constants[K == 1 ? 0 : k]);
    store<kRagged>(p.result() + at[u], lanes, out);
  }
}

template <bool kRagged, int V, typename P, int K, int U>
__device__ __forceinline__ void map_batch(const P& p, const int64_t (&at)[U], Lanes lanes, const typename P::After (&constants)[K]) {
  typename P::template Input<V> in[U];
  load_batch<kRagged, V>(p, in, at, lanes, constants);
  store_batch<kRagged, V>(p, in, at, lanes, constants);
}

// A thread's two sums, one pair for all lanes or one a lane: kept in the arithmetic type for kFlush batches.
template <typename P, int V, int K>
struct ThreadSums {
  using S = typename P::S;
  double wide[2 * K] = {};  // K first sums, K second ones
  S s1[K] = {}, s2[K] = {};
  int pending = 0;

  template <bool kRagged, int U>
  __device__ __forceinline__ void add(const P& p, const int64_t (&at)[U], Lanes lanes, const typename P::Before (&constants)[K]) {
    typename P::template Input<V> in[U];
    load_batch<kRagged, V>(p, in, at, lanes, constants);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int j = K == 1 ? 0 : k;
        p.term(in[u], k, constants[j], s1[j], s2[j]);
      }
    if constexpr (P::kWritesWhileReducing)
      if (p.result() != nullptr) store_batch<kRagged, V>(p, in, at, lanes, constants);
    if (++pending == kFlush) flush();
  }

  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      wide[k] += s1[k], wide[K + k] += s2[k];
      s1[k] = s2[k] = 0;
    }
    pending = 0;
  }
};

// The constants of `channels` channels, computed by a thread each, then read by all.
template <typename Constants, typename F>
__device__ __forceinline__ void share(Constants* shared, int channels, const F& compute) {
  __syncthreads();  // the block may still read what it shared before
  if (static_cast<int>(threadIdx.x) < channels) shared[threadIdx.x] = compute(static_cast<int>(threadIdx.x));
  __syncthreads();
}

// ---- planes -----------------------------------------------------------------------------------------------------
// The vectors of a channel are counted through its N planes. If `kRagged`, planes do not begin or end with whole
// aligned vectors: a plane's vectors are then the aligned ones that contain an element of it, and both ends of it may
// have elements of other planes, which do not exist for this channel.

struct PlaneCut {
  int64_t C, HW;
  int64_t vectors;                  // of a plane
  int64_t total, slices, slice;     // vectors of a channel; slices of a channel; vectors of a slice
  int64_t step_planes, step_vectors;  // from a thread's vector to its next
  int misaligned;                   // elements by which the pointers exceed a multiple of 16 bytes
  bool aligned;                     // it is the same for all of them
  bool ragged, owned;
};

template <bool kRagged, int V, typename F>
__device__ __forceinline__ void for_planes(const PlaneCut& cut, int64_t c, int64_t slice, const F& f) {
  const int64_t begin = slice * cut.slice + threadIdx.x, end = smaller(cut.total, (slice + 1) * cut.slice);
  const int64_t image = cut.C * cut.HW;
  int64_t start = begin / cut.vectors * image + c * cut.HW, vector = begin % cut.vectors, j = begin;
  const auto batch = [&](auto count) {
    constexpr int U = decltype(count)::value;
    int64_t at[U];
    Lanes lanes = {0, V, cut.aligned};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at[u] = start + vector * V;
      if constexpr (kRagged) {
        at[u] -= (start + cut.misaligned) & (V - 1);
        lanes.first = static_cast<int>(larger(0, start - at[u]));
        lanes.last = static_cast<int>(smaller(V, start + cut.HW - at[u]));
      }
      start += cut.step_planes * image;
      vector += cut.step_vectors;
      if (vector >= cut.vectors) vector -= cut.vectors, start += image;
    }
    f(at, lanes);
    j += U * static_cast<int64_t>(blockDim.x);
  };
  if constexpr (!kRagged)
    while (j + (kUnroll - 1) * static_cast<int64_t>(blockDim.x) < end) batch(std::integral_constant<int, kUnroll>{});
  while (j < end) batch(std::integral_constant<int, 1>{});
}

template <bool kRagged, typename P>
__device__ __forceinline__ void reduce_planes(const P& p, const PlaneCut& cut, int64_t c, int64_t slice, double (&sums)[2]) {
  constexpr int V = kVector<typename P::Scalar>;
  GPU_SHARED(typename P::Before, shared, 1);
  share(shared, 1, [&](int) { return p.before(c); });
  const typename P::Before constants[1] = {shared[0]};
  ThreadSums<P, V, 1> mine;
  for_planes<kRagged, V>(cut, c, slice,
                         [&](const auto& at, Lanes lanes) { mine.template add<kRagged>(p, at, lanes, constants); });
  mine.flush();
  sums[0] = mine.wide[0], sums[1] = mine.wide[1];
  block_sum(sums);
}

template <bool kRagged, typename P>
__device__ __forceinline__ void map_planes(const P& p, const PlaneCut& cut, int64_t c, int64_t slice) {
  constexpr int V = kVector<typename P::Scalar>;
  GPU_SHARED(typename P::After, shared, 1);
  share(shared, 1, [&](int) { return p.after(c, slice == 0); });
  const typename P::After constants[1] = {shared[0]};
  for_planes<kRagged, V>(cut, c, slice, [&](const auto& at, Lanes lanes) { map_batch<kRagged, V>(p, at, lanes, constants); });
}

template <typename P, bool kRagged>
__global__ void __launch_bounds__(kThreads) reduce_planes_kernel(P p, PlaneCut cut, double* partial) {
  double sums[2];
  reduce_planes<kRagged>(p, cut, blockIdx.x / cut.slices, blockIdx.x % cut.slices, sums);
  if (threadIdx.x < 2) partial[2 * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = threadIdx.x == 0 ? sums[0] : sums[1];
}

// Blocks go backwards through memory: what the first sweep read last is still in L2.
template <typename P, bool kRagged>
__global__ void __launch_bounds__(kThreads) map_planes_kernel(P p, PlaneCut cut) {
  const int64_t b = gridDim.x - 1 - blockIdx.x;
  map_planes<kRagged>(p, cut, b / cut.slices, b % cut.slices);
}

template <typename P, bool kRagged>
__global__ void __launch_bounds__(kOwnerThreads) own_planes_kernel(P p, PlaneCut cut, bool maps) {
  double sums[2];
  reduce_planes<kRagged>(p, cut, blockIdx.x, 0, sums);
  p.finish(blockIdx.x, sums[0], sums[1]);
  if (maps) map_planes<kRagged>(p, cut, blockIdx.x, 0);
}

// Adds the sums of a channel's slices or strips. partial: (C, slices, 2).
template <typename P>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(P p, int64_t slices, const double* partial) {
  const int64_t c = blockIdx.x;
  double sums[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < slices; i += blockDim.x) {
    sums[0] += partial[2 * (c * slices + i)];
    sums[1] += partial[2 * (c * slices + i) + 1];
  }
  block_sum(sums);
  p.finish(c, sums[0], sums[1]);
}

// ---- rows of channels -------------------------------------------------------------------------------------------
// A block is thread_rows by `columns` threads (what is left over of its kThreads is idle), a thread keeps to the V
// channels of its column.

struct RowCut {
  int64_t rows, C;
  int64_t tiles, strips, strip;  // tiles of channels; strips of rows; rows of a strip
  int columns, thread_rows;
  bool vector;                   // whole aligned vectors of channels
};

template <int V>
struct RowPlace {
  int64_t strip, first, channel;  // first: channel of the tile
  int row, column, channels;      // channels of the tile
  bool active;
  __device__ RowPlace(const RowCut& cut, int64_t block) {
    strip = block / cut.tiles;
    first = block % cut.tiles * cut.columns * V;
    channels = static_cast<int>(smaller(cut.C - first, cut.columns * V));
    row = threadIdx.x / cut.columns;
    column = threadIdx.x % cut.columns;
    channel = first + column * V;
    active = row < cut.thread_rows && column * V < channels;
  }
};

template <int V, typename F>
__device__ __forceinline__ void for_rows(const RowCut& cut, const RowPlace<V>& place, const F& f) {
  const int64_t end = smaller(cut.rows, (place.strip + 1) * cut.strip);
  int64_t r = place.strip * cut.strip + place.row;
  const auto batch = [&](auto count) {
    constexpr int U = decltype(count)::value;
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) at[u] = (r + u * cut.thread_rows) * cut.C + place.channel;
    f(at);
    r += U * cut.thread_rows;
  };
  while (r + (kUnroll - 1) * cut.thread_rows < end) batch(std::integral_constant<int, kUnroll>{});
  while (r < end) batch(std::integral_constant<int, 1>{});
}

template <typename P, int V>
__global__ void __launch_bounds__(kThreads) reduce_rows_kernel(P p, RowCut cut, double* partial) {
  GPU_DYN_SHARED(double, scratch);
  GPU_SHARED(typename P::Before, shared, kTileChannels);
  const RowPlace<V> place(cut, blockIdx.x);
  share(shared, place.channels, [&](int j) { return p.before(place.first + j); });
  ThreadSums<P, V, V> mine;
  if (place.active) {
    typename P::Before constants[V];
#pragma unroll
    for (int k = 0; k < V; ++k) constants[k] = shared[place.column * V + k];
    for_rows<V>(cut, place, [&](const auto& at) { mine.template add<false>(p, at, Lanes{}, constants); });
    mine.flush();
  }
  column_sum(mine.wide, place.row, cut.thread_rows, place.column, cut.columns, scratch);
  if (place.active && place.row == 0)
#pragma unroll
    for (int k = 0; k < V; ++k) {
      double* const out = partial + 2 * ((place.channel + k) * cut.strips + place.strip);
      out[0] = mine.wide[k], out[1] = mine.wide[V + k];
    }
}

template <typename P, int V>
__global__ void __launch_bounds__(kThreads) map_rows_kernel(P p, RowCut cut) {
  GPU_SHARED(typename P::After, shared, kTileChannels);
  const RowPlace<V> place(cut, gridDim.x - 1 - blockIdx.x);  // backwards, as in planes
  share(shared, place.channels, [&](int j) { return p.after(place.first + j, place.strip == 0); });
  if (!place.active) return;
  typename P::After constants[V];
#pragma unroll
  for (int k = 0; k < V; ++k) constants[k] = shared[place.column * V + k];
  for_rows<V>(cut, place, [&](const auto& at) { map_batch<false, V>(p, at, Lanes{}, constants); });
}

// ---- launchers --------------------------------------------------------------------------------------------------

// How a tensor is cut. may_own: both sweeps are made, so one block may make them. pointers: what they access, or null.
template <typename T>
struct Cut {
  bool by_rows;
  PlaneCut planes{};
  RowCut rows{};

  template <typename... Pointers>
  explicit Cut(const Layout& s, bool may_own, const Pointers*... pointers) : by_rows(s.rows) {
    constexpr int V = kVector<T>;
    int misaligned = -1;
    bool same = true;
    const auto consider = [&](const T* p) {
      const int m = static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % V);
      if (p == nullptr) return;
      same = same && (misaligned == -1 || misaligned == m);
      misaligned = m;
    };
    (consider(pointers), ...);
    if (s.rows) {
      RowCut& cut = rows;
      cut.rows = s.N * s.HW, cut.C = s.C;
      cut.vector = same && misaligned == 0 && s.C % V == 0;
      cut.tiles = divup(s.C, kTileChannels);
      cut.columns = static_cast<int>(divup(s.C / (cut.vector ? V : 1), cut.tiles));
      cut.thread_rows = kThreads / cut.columns;
      const int64_t least = static_cast<int64_t>(cut.thread_rows) * kUnroll * kFlush;
      cut.strip = divup(cut.rows, larger(1, smaller(kBlocks / cut.tiles, cut.rows / least)));
      cut.strips = divup(cut.rows, cut.strip);
    } else {
      PlaneCut& cut = planes;
      cut.C = s.C, cut.HW = s.HW;
      cut.misaligned = misaligned, cut.aligned = same;
      cut.ragged = !same || misaligned != 0 || s.HW % V != 0;
      cut.vectors = cut.ragged ? divup(s.HW + V - 1, V) : s.HW / V;
      cut.total = s.N * cut.vectors;
      const int64_t count = s.N * s.HW, bytes = count * static_cast<int64_t>(sizeof(T));
      cut.owned = may_own && (count <= kSmallChannel || (s.C >= kOwnerBlocks && bytes <= kOwnerBytes));
      const int64_t least = 2 * kUnroll * kThreads;
      cut.slice = cut.owned ? cut.total : divup(cut.total, larger(1, smaller(kBlocks / s.C, cut.total / least)));
      cut.slices = divup(cut.total, cut.slice);
      cut.step_planes = threads() / cut.vectors, cut.step_vectors = threads() % cut.vectors;
    }
  }

  int threads() const {  // of a block of planes
    if (!planes.owned) return kThreads;
    return planes.total > kUnroll * kFinishThreads ? kOwnerThreads : kFinishThreads;
  }

  // Doubles of scratch memory that a reduction needs.
  int64_t workspace() const {
    if (by_rows) return 2 * rows.C * rows.strips;
    return planes.owned ? 0 : 2 * planes.C * planes.slices;
  }
};

template <typename P>
void map(const P& p, const Cut<typename P::Scalar>& cut, Stream stream) {
  constexpr int V = kVector<typename P::Scalar>;
  if (cut.by_rows) {
    const dim3 grid(static_cast<unsigned>(cut.rows.tiles * cut.rows.strips));
    launch(cut.rows.vector ? map_rows_kernel<P, V> : map_rows_kernel<P, 1>, grid, dim3(kThreads), 0, stream, p, cut.rows);
  } else {
    const dim3 grid(static_cast<unsigned>(cut.planes.C * cut.planes.slices));
    launch(cut.planes.ragged ? map_planes_kernel<P, true> : map_planes_kernel<P, false>, grid, dim3(kThreads), 0, stream, p, cut.planes);
  }
}

// Both sweeps. workspace: cut.workspace() doubles.
template <typename P>
void reduce_and_map(const P& p, const Cut<typename P::Scalar>& cut, double* workspace, Stream stream) {
  using R = typename P::Reduction;
  constexpr int V = kVector<typename P::Scalar>;
  const R& reduction = p;
  int64_t C, slices;
  if (cut.by_rows) {
    C = cut.rows.C, slices = cut.rows.strips;
    const int lanes = cut.rows.vector ? V : 1;
    const size_t shared = sizeof(double) * 2 * lanes * (cut.rows.thread_rows / 2) * cut.rows.columns;
    const dim3 grid(static_cast<unsigned>(cut.rows.tiles * slices));
    launch(cut.rows.vector ? reduce_rows_kernel<R, V> : reduce_rows_kernel<R, 1>, grid, dim3(kThreads), shared, stream, reduction,
           cut.rows, workspace);
  } else {
    C = cut.planes.C, slices = cut.planes.slices;
    if constexpr (!P::kWritesWhileReducing)
      if (cut.planes.owned)
        return launch(cut.planes.ragged ? own_planes_kernel<P, true> : own_planes_kernel<P, false>, dim3(static_cast<unsigned>(C)),
                      dim3(cut.threads()), 0, stream, p, cut.planes, p.maps());
    launch(cut.planes.ragged ? reduce_planes_kernel<R, true> : reduce_planes_kernel<R, false>,
           dim3(static_cast<unsigned>(C * slices)), dim3(kThreads), 0, stream, reduction, cut.planes, workspace);
  }
  launch(finish_kernel<R>, dim3(static_cast<unsigned>(C)), dim3(kFinishThreads), 0, stream, reduction, slices, workspace);
  if constexpr (!P::kWritesWhileReducing)
    if (p.maps()) map(p, cut, stream);
}

}  // namespace cnnkern::gpu
