// add_relu: y = relu(x + residual). Backward: dx = dresidual = dy * [y > 0].
// [y > 0] is saved as one bit per element, in the order of memory, and nothing else.
// Memory traffic, in tensors read or written: 3 forward, 2 backward. Threads own stretches of memory that share no byte of
// the mask.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <tuple>

#include "aten.h"
#include "check.h"
#include "cpu/bits.h"
#include "cpu/passes.h"
#include "memory_layout.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

// f(stream, begin, end) over stretches of a result of numel elements; all begin at whole vectors.
template <typename T, typename F>
void over_stretches(const T* out, int64_t numel, const F& f) {
  constexpr int64_t kStretchLength = 1024;
  const bool stream = beyond_cache(out, numel * sizeof(T));
  const auto stretches = [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(numel, end * kStretchLength);
    f(stream, begin * kStretchLength, last);
    stream_fence();
  };
  const int64_t count = divup(numel, kStretchLength);
  if (numel < kSerial)
    stretches(0, count);
  else
    at::parallel_for(0, count, kSerial / 2 / kStretchLength, stretches);
}

template <typename T>
void forward(const T* x, const T* residual, T* y, BitWriter mask, int64_t numel) {
  using V = Vec<T>;
  constexpr int64_t L = V::size(), ahead = kAhead / static_cast<int64_t>(sizeof(T));
  over_stretches(y, numel, [&](bool stream, int64_t i, int64_t end) {
    const V bound(rounds_to_zero<T>());
    for (; i + L <= end; i += L) {
      if (stream) __builtin_prefetch(x + i + ahead, 0, 2), __builtin_prefetch(residual + i + ahead, 0, 2);
      const V v = vload(x + i) + vload(residual + i);
      vput(y + i, Relu::value<T>(v), stream);
      mask.set(i, bits_above(v, bound), L);
    }
    if (i < end) {
      const V v = vload(x + i, end - i, V(0)) + vload(residual + i, end - i, V(0));
      vstore(y + i, Relu::value<T>(v), end - i);
      mask.set(i, bits_above(v, bound), end - i);
    }
  });
}

template <typename T>
void backward(const T* dy, T* dx, BitReader mask, int64_t numel) {
  constexpr int64_t L = kLanes<T>, ahead = kAhead / static_cast<int64_t>(sizeof(T));
  // The forward pass has two streams of reads for one of writes. This one has one, and waits for data that is not prefetched
  // if it is not in the core's own caches, up to twice as long depending on dx's address. A needless prefetch takes no time.
  over_stretches(dx, numel, [&](bool stream, int64_t i, int64_t end) {
    for (; i + L <= end; i += L) {
      __builtin_prefetch(dy + i + ahead, 0, 2);
      vput(dx + i, zero_unless(vload(dy + i), mask.from(i)), stream);
    }
    if (i < end) vstore(dx + i, zero_unless(vload(dy + i, end - i, Vec<T>(0)), mask.from(i)), end - i);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> add_relu_cpu(const Tensor& x, const Tensor& residual) {
  check_floating("cnnkern::add_relu", x);
  check_same_shape("cnnkern::add_relu", "residual", residual, x);
  const Strides strides = strides_of_sum(x, residual, "relu");  // in which memory is read from end to end
  const Tensor x_ = densely(x, strides), residual_ = densely(residual, strides);
  Tensor y = aten::empty_strided(x.sizes(), strides, x.options()), mask = aten::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte));
  // Only bytes to which bits are added one by one have to be zero: with fewer than 8 lanes all of them.
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "add_relu", [&] {
    uint8_t* bits = mask.mutable_data_ptr<uint8_t>();
    constexpr int64_t L = kLanes<scalar_t>;
    const int64_t from = L % 8 != 0 ? 0 : x.numel() / L * L / 8;
    std::fill(bits + from, bits + mask.numel(), uint8_t{0});
    forward(x_.const_data_ptr<scalar_t>(), residual_.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(),
            BitWriter{bits}, x.numel());
  });
  return {y, mask};
}

Tensor add_relu_backward_cpu(const Tensor& dy, const Tensor& mask, at::IntArrayRef order) {
  const char* op = "cnnkern::add_relu_backward";
  check_floating(op, dy);
  check_mask(op, mask, mask_bytes(dy.numel()), dy);
  check_order(op, order, dy);
  const Strides strides = strides_in_order(dy.sizes(), order);
  const Tensor dy_ = densely(dy, strides);
  Tensor dx = aten::empty_strided(dy.sizes(), strides, dy.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dy.scalar_type(), "add_relu_backward", [&] {
    backward(dy_.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>(),
             BitReader{mask.const_data_ptr<uint8_t>(), mask.numel()}, dy.numel());
  });
  return dx;
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
