// The sizes of a grouped convolution, division by numbers known at the launch, and reads of a few channels or pixels.
#pragma once

#include "cuda/channels.cuh"
#include "cuda/reduce.cuh"

namespace cnnkern::gpu {

// x (N, C, H, W) and y (N, O, OH, OW), both in rows of channels (NHWC) or both in planes (NCHW).
struct ConvGeometry {
  bool rows;
  int64_t N, C, H, W, O, OH, OW, groups;
  int kh, kw, sh, sw, ph, pw, dh, dw;
  bool tf32;  // float32 may be multiplied in TF32
  int taps() const { return kh * kw; }
  int64_t inputs() const { return C / groups; }   // channels of x per group
  int64_t outputs() const { return O / groups; }  // channels of y per group
  bool square() const { return kh == kw && sh == sw && sh <= 2 && dh == 1 && dw == 1; }  // and of stride 1 or 2, not dilated
};

// Division of n < 2^31, by a product and a shift (Granlund and Montgomery).
struct Divisor {
  unsigned by, factor, shift;
  explicit Divisor(int64_t d) : by(static_cast<unsigned>(d)), shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<unsigned>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by) / by + 1);
  }
  __device__ __forceinline__ unsigned quotient(unsigned n) const {
    return (static_cast<unsigned>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
  // The remainder; n becomes the quotient.
  __device__ __forceinline__ int split(unsigned& n) const {
    const unsigned q = quotient(n), r = n - q * by;
    n = q;
    return static_cast<int>(r);
  }
};

template <size_t kBytes>
struct Bits;
template <>
struct Bits<16> {
  using type = uint4;
};
template <>
struct Bits<8> {
  using type = uint64_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};

// V neighbours, widened, by one access; zeros if they do not exist.
template <int V, typename T>
__device__ __forceinline__ void read(const T* p, bool there, compute_t<T> (&out)[V]) {
  using Access = typename Bits<V * sizeof(T)>::type;
  Access raw{};
  if (there) raw = *reinterpret_cast<const Access*>(p);
  Vector<T, V> vector;
  memcpy(&vector, &raw, sizeof(vector));
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = static_cast<compute_t<T>>(vector.lane[k]);
}

template <int V, typename T>
__device__ __forceinline__ void write(T* p, const compute_t<T> (&in)[V]) {
  using Access = typename Bits<V * sizeof(T)>::type;
  Vector<T, V> vector;
#pragma unroll
  for (int k = 0; k < V; ++k) vector.lane[k] = static_cast<T>(in[k]);
  Access raw;
  memcpy(&raw, &vector, sizeof(vector));
  if constexpr (sizeof(Access) == 16)
    store_access(reinterpret_cast<Access*>(p), raw);
  else
    *reinterpret_cast<Access*>(p) = raw;
}

template <typename T>
__device__ __forceinline__ compute_t<T> read_one(const T* p, bool there) {
  return there ? static_cast<compute_t<T>>(*p) : compute_t<T>(0);
}

constexpr int64_t kConvBlocks = 1056;  // of 256 threads, that keep a GPU busy: eight per multiprocessor of the largest
constexpr int kConvThreads = 256;
constexpr int kRun = 7;  // outputs of a thread in a row: the side of the last layers' images, and a divisor of others'

// Sums that were taken in parts: (parts, values) of S, where `values` are the taps of C channels and after them dy's own
// sum, channel by channel or, with `rows`, tap by tap.
template <typename S>
struct PartialSums {
  S* data;
  int64_t parts, channels;
  int taps;  // with those of all input channels of a group
  bool rows;
  __host__ __device__ int64_t values() const { return channels * (taps + 1); }
  __device__ __forceinline__ S& at(int64_t part, int64_t channel, int tap) const {
    return data[part * values() + (rows ? tap * channels + channel : channel * (taps + 1) + tap)];
  }
};

// The destination of the weight's gradient: (O, inputs, kh, kw), by strides.
template <typename T>
struct WeightGradient {
  T *data, *bias;  // bias null if not needed
  int64_t strides[4];
  int kh, kw;
};

// Threads of a block that add parts of one value, and values of a block.
template <int kSlices>
constexpr int kSumColumns = kSlices == 32 ? 32 : 256 / kSlices;

// Adds the parts in a fixed order, in double.
template <typename T, int kSlices>
__global__ void __launch_bounds__(kSumColumns<kSlices>* kSlices)
    sum_parts_kernel(PartialSums<compute_t<T>> sums, WeightGradient<T> gradient) {
  constexpr int kColumns = kSumColumns<kSlices>;
  GPU_SHARED(double, scratch, kColumns* kSlices);
  const int column = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t value = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  double sum = 0;
  if (value < sums.values())
#pragma unroll 8
    for (int64_t part = slice; part < sums.parts; part += kSlices) sum += sums.data[part * sums.values() + value];
  scratch[slice * kColumns + column] = sum;
  __syncthreads();
  for (int half = kSlices / 2; half > 0; half /= 2) {
    if (slice < half) scratch[slice * kColumns + column] += scratch[(slice + half) * kColumns + column];
    __syncthreads();
  }
  if (slice != 0 || value >= sums.values()) return;
  const int64_t channel = sums.rows ? value % sums.channels : value / (sums.taps + 1);
  const int tap = static_cast<int>(sums.rows ? value / sums.channels : value % (sums.taps + 1));
  const T result = static_cast<T>(static_cast<compute_t<T>>(scratch[column]));
  if (tap == sums.taps) {
    if (gradient.bias != nullptr) gradient.bias[channel] = result;
    return;
  }
  const int kernel = gradient.kh * gradient.kw, input = tap / kernel, ky = tap % kernel / gradient.kw, kx = tap % gradient.kw;
  gradient.data[channel * gradient.strides[0] + input * gradient.strides[1] + ky * gradient.strides[2] + kx * gradient.strides[3]] =
      result;
}

template <typename T>
void sum_parts(const PartialSums<compute_t<T>>& sums, const WeightGradient<T>& gradient, Stream stream) {
  const auto by = [&](auto slices) {
    constexpr int kColumns = kSumColumns<slices()>;
    launch(sum_parts_kernel<T, slices()>, dim3(static_cast<unsigned>(divup(sums.values(), kColumns))), dim3(kColumns * slices()), 0, stream, sums,
           gradient);
  };
  if (sums.parts >= 256) return by(std::integral_constant<int, 32>{});
  if (sums.parts >= 64) return by(std::integral_constant<int, 8>{});
  by(std::integral_constant<int, 2>{});
}

}  // namespace cnnkern::gpu
