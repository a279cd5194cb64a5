// What csrc/cuda/gpu_compat.cuh asks of a compiler that is not nvcc: CUDA's names for device code, on the host. Kernels
// run on the emulator of emulator.cpp, one fiber a CUDA thread. See docs/emulator.md.
//
// There are no atomics on floating-point numbers on purpose: a sum in no fixed order does not repeat.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

struct Place {
  const char* file;
  int line;
};

// What a warp exchanges: every operation has a value from each lane, and one for each.
enum class Exchange { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, load_matrices, multiply_add };

// What the lanes of a warp have brought to an operation of all of them.
using Lanes = void* const*;

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// Runs the kernel to its end; throws std::runtime_error for whatever it does that CUDA forbids, and for a launch elsewhere
// than on the current stream of a device that a guard has chosen.
enum class Start {
  behind,    // what the stream had before
  together,  // all blocks at once, which then may wait for one another
  early,     // while the kernel before it ends: each thread waits for that one
};
void launch(dim3 grid, dim3 block, size_t dynamic_shared, void* stream, Start start, void (*thread)(const void*), const void* arguments);
void wait_for_previous();
int resident_blocks(int threads, size_t dynamic_shared);
void block_barrier(Place);
void release_to_group(const unsigned* counter, unsigned turn);
void wait_for_group(const unsigned* counter, unsigned before, unsigned blocks, unsigned turn, Place);  // before: what the counter was
uint64_t warp_exchange(Exchange, unsigned mask, uint64_t value, int argument, int width, Place);
void warp_together(Exchange, void (*operation)(Lanes), void* mine, Place);
int lane();
void fence();
void refuse(const char* what, Place);
// Refuses 16 bytes that are not aligned, or not in the block's shared memory.
void check_shared(const void* p, const char* what, Place);
void* shared_memory(const void* key, size_t bytes, size_t alignment, Place);
void* dynamic_shared_memory(Place);

// Of a lane: what it brings, and gets (tensor_cores.cpp).
struct MatrixRow {
  uint4 row;
  unsigned r[4];
};
struct Fragments {
  float d[4];
  unsigned a[4], b[2];
};
template <int kMatrices, bool kTransposed>
void load_matrices(Lanes);
template <typename T, int kDepth>  // float: tf32
void multiply_add(Lanes);

struct Copy {
  void* to;
  const void* from;  // null: zeros
  uint4 value;
  Place place;
  unsigned group = 0;
};
void check_copy(const void* shared, const void* global, bool exists, Place);
void begin_copy(Copy);
void commit_copies();
// The next copy that has to arrive before at most `left` groups of the thread are under way; false: there is none.
bool end_copy(unsigned left, Copy* copy);

// What the stand-ins in c10/cuda are made of.
void* current_stream();
void guard_begins();
void guard_ends(bool unwinding);  // throws where the errors of a launch under it were not checked
void launches_checked();

template <typename T>
T exchange(Exchange operation, unsigned mask, T value, int argument, int width, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(operation, mask, bits, argument, width, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (::emulator::thread_index)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

// The place of the call is that of the operation: a barrier or an exchange takes place at one line of a kernel.
#define GPU_EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(GPU_EMULATOR_PLACE) { emulator::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, GPU_EMULATOR_PLACE) {
  emulator::warp_exchange(emulator::Exchange::sync, mask, 0, 0, 32, {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, GPU_EMULATOR_PLACE) {
  return emulator::exchange(emulator::Exchange::shuffle, mask, value, lane, width, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, GPU_EMULATOR_PLACE) {
  return emulator::exchange(emulator::Exchange::shuffle_up, mask, value, static_cast<int>(distance), width, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, GPU_EMULATOR_PLACE) {
  return emulator::exchange(emulator::Exchange::shuffle_down, mask, value, static_cast<int>(distance), width, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, GPU_EMULATOR_PLACE) {
  return emulator::exchange(emulator::Exchange::shuffle_xor, mask, value, bits, width, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, GPU_EMULATOR_PLACE) {
  return static_cast<unsigned>(
      emulator::warp_exchange(emulator::Exchange::ballot, mask, predicate != 0, 0, 32, {file, line}));
}
inline void __threadfence() { emulator::fence(); }

template <typename T>
  requires std::is_integral_v<T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
  requires std::is_integral_v<T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

// Each declaration is an allocation of its own on the heap, one per block, filled with NaN.
#define GPU_SHARED(T, name, count)  \
  static const char name##_key = 0; \
  T* const name = static_cast<T*>(::emulator::shared_memory(&name##_key, sizeof(T) * (count), alignof(T), {__FILE__, __LINE__}))
#define GPU_DYN_SHARED(T, name) T* const name = static_cast<T*>(::emulator::dynamic_shared_memory({__FILE__, __LINE__}))

namespace cnnkern::gpu {

using Stream = void*;

namespace detail {

template <typename... Parameters, typename... Arguments>
void launch(emulator::Start start, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream,
            const Arguments&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(arguments...));
  emulator::launch(
      grid, block, shared, stream, start,
      [](const void* data) {
        const Call& call = *static_cast<const Call*>(data);
        std::apply(call.first, call.second);
      },
      &call);
}

}  // namespace detail

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  detail::launch(emulator::Start::behind, kernel, grid, block, shared, stream, arguments...);
}

// Kernels run one after the other here; what is seen is whether each thread waits.
template <typename... Parameters, typename... Arguments>
void launch_next(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  detail::launch(emulator::Start::early, kernel, grid, block, shared, stream, arguments...);
}
inline void wait_for_previous() { emulator::wait_for_previous(); }
inline void let_next_start() {}

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int threads, size_t shared) {
  return emulator::resident_blocks(threads, shared);
}

template <typename... Parameters, typename... Arguments>
void launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream, const Arguments&... arguments) {
  detail::launch(emulator::Start::together, kernel, grid, block, shared, stream, arguments...);
}

// Inlined, so that each call is a place of its own in the code to an observer. The source is read here, and must not change
// until the copy arrives; the destination is written twice, for it must not be read or written in between either.
[[gnu::always_inline]] inline void async_copy(void* shared, const void* global, bool exists = true, GPU_EMULATOR_PLACE) {
  emulator::check_copy(shared, global, exists, {file, line});
  emulator::Copy copy{shared, exists ? global : nullptr, {}, {file, line}};
  if (exists) copy.value = *static_cast<const uint4*>(global);
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};  // NaN
  emulator::begin_copy(copy);
}
inline void async_commit() { emulator::commit_copies(); }
template <int kLeft>
void async_wait() {
  for (emulator::Copy copy; emulator::end_copy(kLeft, &copy);) *static_cast<uint4*>(copy.to) = copy.value;
}

inline void group_barrier(unsigned* counter, unsigned blocks, unsigned turn, GPU_EMULATOR_PLACE) {
  emulator::block_barrier({file, line});
  if (threadIdx.x == 0) {
    emulator::release_to_group(counter, turn);
    emulator::wait_for_group(counter, atomicAdd(counter, 1u), blocks, turn, {file, line});
  }
  emulator::block_barrier({file, line});
}

template <int kMatrices, bool kTransposed = false>
void load_matrices(unsigned (&r)[kMatrices], const void* row, GPU_EMULATOR_PLACE) {
  emulator::MatrixRow mine{};
  if (emulator::lane() < 8 * kMatrices) {
    emulator::check_shared(row, "load_matrices", {file, line});
    mine.row = *static_cast<const uint4*>(row);
  }
  emulator::warp_together(emulator::Exchange::load_matrices, emulator::load_matrices<kMatrices, kTransposed>, &mine, {file, line});
  std::memcpy(r, mine.r, sizeof(r));
}

namespace detail {

template <typename T, int kDepth, int kA, int kB>
void multiply_add(float (&d)[4], const unsigned (&a)[kA], const unsigned (&b)[kB], emulator::Place place) {
  emulator::Fragments mine{};
  std::memcpy(mine.d, d, sizeof(d)), std::memcpy(mine.a, a, sizeof(a)), std::memcpy(mine.b, b, sizeof(b));
  emulator::warp_together(emulator::Exchange::multiply_add, emulator::multiply_add<T, kDepth>, &mine, place);
  std::memcpy(d, mine.d, sizeof(d));
}

}  // namespace detail

template <typename T>
void multiply_add(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1], GPU_EMULATOR_PLACE) {
  detail::multiply_add<T, 8>(d, a, b, {file, line});
}
// Of float it refuses bits that tf32 has not: a tensor core would drop them.
template <typename T>
void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], GPU_EMULATOR_PLACE) {
  constexpr bool kTf32 = std::is_same_v<T, float>;
  const auto check = [&](unsigned v) {
    const bool nan = (v & 0x7fffffff) > 0x7f800000;
    if ((v & 0x1fff) != 0 && !nan) emulator::refuse("gives multiply_add a number that is not of to_tf32", {file, line});
  };
  if constexpr (kTf32) {
    for (const unsigned v : a) check(v);
    for (const unsigned v : b) check(v);
  }
  detail::multiply_add<T, kTf32 ? 8 : 16>(d, a, b, {file, line});
}
inline unsigned to_tf32(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof(v));
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;  // NaN
  return (bits + 0x1000) & ~0x1fffu;
}

}  // namespace cnnkern::gpu
