// The emulator's own proof. Each kernel is right without its fault and wrong with it: `faults NAME` and
// `faults --fault NAME`. A run without a report ends with 0. tests/test_emulator.py says which tool has to report which.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/gpu_compat.cuh"

namespace {

const c10::Device kDevice(c10::kCPU);

// As an operator launches.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  const c10::cuda::CUDAGuard guard(kDevice);
  cnnkern::gpu::launch(kernel, grid, block, shared, c10::cuda::getCurrentCUDAStream(), arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// Global memory of exactly the size it is given, filled with NaN.
template <typename T>
struct Global {
  T* data;
  int size;
  explicit Global(int size) : data(static_cast<T*>(std::malloc(size * sizeof(T)))), size(size) {
    std::memset(data, 0xff, size * sizeof(T));
  }
  Global(int size, T value) : Global(size) { std::fill(data, data + size, value); }
  ~Global() { std::free(data); }
};

void expect(const Global<float>& got, const std::vector<float>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!(got.data[i] == wanted[i]))
      throw std::runtime_error("wrong result: element " + std::to_string(i) + " is " + std::to_string(got.data[i]) +
                               " and not " + std::to_string(wanted[i]));
}

std::vector<float> rotated(int n) {  // 1, 2, ..., n - 1, 0
  std::vector<float> v(n);
  for (int i = 0; i < n; ++i) v[i] = static_cast<float>((i + 1) % n);
  return v;
}

// ---- shared memory and barriers ---------------------------------------------------------------------------------

template <bool kFault>
void rotate(float* out) {
  GPU_SHARED(float, s, kThreads);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kFault) __syncthreads();
  const float v = s[(threadIdx.x + 1) % kThreads];
  __syncthreads();
  out[threadIdx.x] = v;
}
template <bool kFault>
void missing_barrier() {
  Global<float> out(kThreads);
  launch(rotate<kFault>, 1, kThreads, 0, out.data);
  if (!kFault) expect(out, rotated(kThreads));
}

// Right in the order of the threads, and wrong in any other.
template <bool kFault>
void broadcast(float* out) {
  GPU_SHARED(float, s, 1);
  if (threadIdx.x == 0) s[0] = 3;
  if (!kFault) __syncthreads();
  out[threadIdx.x] = s[0];
}
template <bool kFault>
void order_of_threads() {
  Global<float> out(kThreads);
  launch(broadcast<kFault>, 1, kThreads, 0, out.data);
  expect(out, std::vector<float>(kThreads, 3.0f));
}

template <bool kFault>
void rotate_in_warps(float* out) {
  GPU_SHARED(float, s, kThreads);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  s[threadIdx.x] = static_cast<float>(lane);
  if (!kFault) __syncwarp();
  const float v = s[first + (lane + 1) % 32];
  __syncwarp();
  out[threadIdx.x] = v;
}
template <bool kFault>
void missing_syncwarp() {
  Global<float> out(kThreads);
  launch(rotate_in_warps<kFault>, 1, kThreads, 0, out.data);
  if (!kFault) expect(out, rotated(32));
}

// A shuffle exchanges registers, and orders no memory.
template <bool kFault>
void shuffle_for_a_barrier(float* out) {
  GPU_SHARED(float, s, 32);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kFault) __syncwarp();
  __shfl_xor_sync(kAll, 0, 1);
  out[threadIdx.x] = s[(threadIdx.x + 1) % 32];
}
template <bool kFault>
void shuffle_as_barrier() {
  Global<float> out(32);
  launch(shuffle_for_a_barrier<kFault>, 1, 32, 0, out.data);
  expect(out, rotated(32));
}

template <bool kFault>
void overrun_shared(float* out) {
  GPU_SHARED(float, s, kThreads);
  s[threadIdx.x + (kFault ? 1 : 0)] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
template <bool kFault>
void shared_overrun() {
  Global<float> out(kThreads);
  launch(overrun_shared<kFault>, 1, kThreads, 0, out.data);
}

template <bool kFault>
void overrun_dynamic(float* out) {
  GPU_DYN_SHARED(float, s);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
template <bool kFault>
void dynamic_shared_overrun() {
  Global<float> out(kThreads);
  launch(overrun_dynamic<kFault>, 1, kThreads, sizeof(float) * (kThreads - (kFault ? 1 : 0)), out.data);
}

template <bool kFault>
void overrun_global(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + (kFault ? 1 : 0)) out[i] = 1;
}
template <bool kFault>
void global_overrun() {
  Global<float> out(100);
  launch(overrun_global<kFault>, 2, kThreads, 0, out.data, out.size);
  expect(out, std::vector<float>(100, 1.0f));
}

template <bool kFault>
void sum_of_all(float* out) {
  GPU_SHARED(float, s, kThreads);
  if (!kFault || threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += s[i];
  out[threadIdx.x] = sum;
}
template <bool kFault>
void uninitialised_shared() {
  Global<float> out(kThreads);
  launch(sum_of_all<kFault>, 1, kThreads, 0, out.data);
  expect(out, std::vector<float>(kThreads, static_cast<float>(kThreads)));
}

// ---- control flow -----------------------------------------------------------------------------------------------

template <bool kFault>
void diverge(float* out) {
  if (kFault && threadIdx.x % 2 == 0) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}
template <bool kFault>
void divergent_barrier() {
  Global<float> out(kThreads);
  launch(diverge<kFault>, 1, kThreads, 0, out.data);
}

template <bool kFault>
void leave_early(float* out) {
  if (kFault && threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
template <bool kFault>
void early_exit() {
  Global<float> out(kThreads);
  launch(leave_early<kFault>, 1, kThreads, 0, out.data);
}

// The other half of the warps never comes: a barrier is for all threads of a block.
template <bool kFault>
void wait_in_one_warp(float* out) {
  if (!kFault || threadIdx.x < 32) __syncthreads();
  if (kFault && threadIdx.x == 32) __syncwarp();
  if (kFault && threadIdx.x > 32) __syncthreads();
  out[threadIdx.x] = 1;
}
template <bool kFault>
void threads_that_hang() {
  Global<float> out(kThreads);
  launch(wait_in_one_warp<kFault>, 1, kThreads, 0, out.data);
}

// ---- warps ------------------------------------------------------------------------------------------------------

template <bool kFault>
void sum_lower_half(float* out) {
  if (threadIdx.x >= 16) return;
  float v = 1;
  for (int d = 8; d > 0; d /= 2) v += __shfl_xor_sync(kFault ? kAll : 0x0000ffffu, v, d);
  out[threadIdx.x] = v;
}
template <bool kFault>
void wrong_mask() {
  Global<float> out(16);
  launch(sum_lower_half<kFault>, 1, 32, 0, out.data);
  expect(out, std::vector<float>(16, 16.0f));
}

template <bool kFault>
void agree_on_a_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFault && threadIdx.x % 2 == 1 ? kAll - (1u << 4) : kAll, 1.0f, 1);
}
template <bool kFault>
void lanes_with_different_masks() {
  Global<float> out(32);
  launch(agree_on_a_mask<kFault>, 1, 32, 0, out.data);
}

template <bool kFault>
void read_beyond_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, kFault ? 16 : 8);
}
template <bool kFault>
void source_outside_mask() {
  Global<float> out(16);
  launch(read_beyond_mask<kFault>, 1, 32, 0, out.data);
}

// ---- blocks -----------------------------------------------------------------------------------------------------

// The last block to finish adds up what the others wrote.
template <bool kFault>
void last_block_adds(float* partial, unsigned* counter, float* out) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = static_cast<float>(blockIdx.x);
  if (!kFault) __threadfence();
  if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
  __threadfence();
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  out[0] = sum;
}
template <bool kFault>
void missing_threadfence() {
  Global<float> partial(8), out(1);
  Global<unsigned> counter(1, 0u);
  launch(last_block_adds<kFault>, 8, kThreads, 0, partial.data, counter.data, out.data);
  expect(out, {28.0f});
}

// In memory, where a block's local variables are not another block's, whatever the emulator reuses.
__attribute__((noinline)) void set(float* p) { *p = 1; }

template <bool kFault>
void write_own_or_shared(float* out) {
  float local;
  set(&local);
  if (threadIdx.x == 0) out[kFault ? blockIdx.x / 2 : blockIdx.x] = local;
}
template <bool kFault>
void cross_block_race() {
  Global<float> out(4);
  launch(write_own_or_shared<kFault>, 4, kThreads, 0, out.data);
}

// A barrier that one block has passed after its access and the other before its own does not order the two.
template <bool kFault>
void write_around_a_barrier(float* out) {
  const auto write = [&] { out[kFault ? blockIdx.x / 2 : blockIdx.x] = 1; };
  if (threadIdx.x == 0 && blockIdx.x % 2 == 0) write();
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x % 2 == 1) write();
}
template <bool kFault>
void cross_block_race_around_a_barrier() {
  Global<float> out(4);
  launch(write_around_a_barrier<kFault>, 4, kThreads, 0, out.data);
}

// A block that reads what another has written in the same launch.
template <bool kFault>
void read_neighbour(const float* in, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = 1;
  if (threadIdx.x == 1 && blockIdx.x > 0) out[4 + blockIdx.x] = (kFault ? out : in)[blockIdx.x - 1];
}
template <bool kFault>
void block_reads_another() {
  Global<float> in(4, 1.0f), out(8);
  launch(read_neighbour<kFault>, 4, kThreads, 0, in.data, out.data);
}

// ---- arithmetic and accesses ------------------------------------------------------------------------------------

template <bool kFault>
void read_vector(const float* in, uint4* out) {
  *out = *reinterpret_cast<const uint4*>(in + (kFault ? 1 : 4));
}
template <bool kFault>
void misaligned_vector() {
  Global<float> in(8, 1.0f);
  Global<uint4> out(1);
  launch(read_vector<kFault>, 1, 1, 0, in.data, out.data);
}

template <bool kFault>
void index_of_the_last(int64_t* out, int rows, int columns) {
  *out = kFault ? rows * columns - 1 : static_cast<int64_t>(rows) * columns - 1;
}
template <bool kFault>
void index_overflow() {
  Global<int64_t> out(1);
  launch(index_of_the_last<kFault>, 1, 1, 0, out.data, 1 << 16, 1 << 16);
}

// ---- launches ---------------------------------------------------------------------------------------------------

void nothing() {}
template <bool kFault>
void too_many_threads() {
  launch(nothing, 1, dim3(kFault ? 1056 : 1024), 0);
}
template <bool kFault>
void empty_grid() {
  launch(nothing, kFault ? 0 : 1, 32, 0);
}
template <bool kFault>
void grid_too_tall() {
  launch(nothing, dim3(1, kFault ? 65536 : 2), 32, 0);
}
template <bool kFault>
void too_much_shared() {
  launch(nothing, 1, 32, (48 << 10) + (kFault ? 1 : 0));
}
template <bool kFault>
void fill_arrays(float* out) {
  GPU_SHARED(double, large, kFault ? 6145 : 6000);
  large[threadIdx.x] = 1;
  out[threadIdx.x] = static_cast<float>(large[threadIdx.x]);
}
template <bool kFault>
void too_much_static_shared() {
  Global<float> out(32);
  launch(fill_arrays<kFault>, 1, 32, 0, out.data);
}

template <bool kFault>
void another_stream() {
  const c10::cuda::CUDAGuard guard(kDevice);
  cnnkern::gpu::launch(nothing, 1, 32, 0, kFault ? nullptr : c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
template <bool kFault>
void missing_guard() {
  std::optional<c10::cuda::CUDAGuard> guard;
  if (!kFault) guard.emplace(kDevice);
  cnnkern::gpu::launch(nothing, 1, 32, 0, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
template <bool kFault>
void missing_launch_check() {
  const c10::cuda::CUDAGuard guard(kDevice);
  for (int i = 0; i < 2; ++i) {
    cnnkern::gpu::launch(nothing, 1, 32, 0, c10::cuda::getCurrentCUDAStream());
    if (!kFault || i == 0) C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

struct Fault {
  const char* name;
  void (*right)();
  void (*wrong)();
};

#define FAULT(name) {#name, name<false>, name<true>}
const Fault kFaults[] = {
    FAULT(missing_barrier),
    FAULT(order_of_threads),
    FAULT(missing_syncwarp),
    FAULT(shuffle_as_barrier),
    FAULT(shared_overrun),
    FAULT(dynamic_shared_overrun),
    FAULT(global_overrun),
    FAULT(uninitialised_shared),
    FAULT(divergent_barrier),
    FAULT(early_exit),
    FAULT(threads_that_hang),
    FAULT(wrong_mask),
    FAULT(lanes_with_different_masks),
    FAULT(source_outside_mask),
    FAULT(missing_threadfence),
    FAULT(cross_block_race),
    FAULT(cross_block_race_around_a_barrier),
    FAULT(block_reads_another),
    FAULT(misaligned_vector),
    FAULT(index_overflow),
    FAULT(too_many_threads),
    FAULT(empty_grid),
    FAULT(grid_too_tall),
    FAULT(too_much_shared),
    FAULT(too_much_static_shared),
    FAULT(another_stream),
    FAULT(missing_guard),
    FAULT(missing_launch_check),
};

}  // namespace

int main(int argc, char** argv) {
  const bool wrong = argc > 1 && std::strcmp(argv[1], "--fault") == 0;
  if (argc < 2 + wrong) {
    for (const Fault& fault : kFaults) std::puts(fault.name);
    return 0;
  }
  try {
    for (int i = 1 + wrong; i < argc; ++i)
      for (const Fault& fault : kFaults)
        if (std::strcmp(fault.name, argv[i]) == 0) (wrong ? fault.wrong : fault.right)();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
