// The two passes that every batch-norm kernel makes, once for each memory layout (planes.h, rows.h). An operator
// brings a policy:
//
//   kRows                          per-channel constants it keeps (rows of a ChannelTable)
//   Reduction                      the type whose sums the first pass takes: the policy, or a base of it
//   kSums                          of Reduction: its sums per channel
//   reduces(), maps()              which of the two passes it makes
//   prefetch(i)                    prefetches the first pass's inputs at element i
//   prepare(c, n)                  before the first pass, n channels from c, at most kLot
//   term<kPartial>(at, i, n, sums) first pass: adds element i (a vector; its first n lanes if kPartial) to its VectorSums
//   finish(c, n, sums, step)       the channels' sums -> constants of the second pass; sum k of channel c is sums[k * step]
//   map(at, i, stream)             second pass: computes and stores element i (a vector), past the caches if `stream`
//   map_part(at, i, n)             the same for its first n lanes
//   output()                       where the second pass stores
//
// `at(row)` gives a per-channel constant as a vector: broadcast in planes, loaded in rows of channels. Sums are kept
// in vector accumulators of the arithmetic type for at most kFlush additions per lane, then in double. The pieces over
// which sums are taken depend only on the shape, so results do not depend on the number of threads.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/vec.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kFlush = 16;             // additions per lane before a sum moves to double
constexpr int64_t kPiece = 8192;           // elements of one channel whose sums are taken in one go
constexpr int64_t kRunBytes = 8192;        // contiguous bytes that a thread reads before it jumps to the next image
constexpr int64_t kBlockBytes = 1 << 19;   // of one tensor that a thread reads twice, while they stay in its own cache
constexpr int64_t kSerial = 16384;         // elements below which waking a second thread costs more than it saves
constexpr int64_t kMaxBlock = 64;          // channels of a block
constexpr int64_t kChannels = 512;         // whose constants a thread computes in one go, in rows
constexpr int64_t kLot = 64;               // channels whose constants are computed in vectors, step by step
constexpr int64_t kShortPlane = 512;       // elements of a plane so short that one branch per plane takes time
constexpr int64_t kStretch = 65536;        // elements of rows that are read forward in the reversed second pass
constexpr int64_t kAhead = 8192;           // bytes between what is read and what is fetched
constexpr int64_t kCoreCache = 1 << 20;    // bytes of a tensor that a core's own caches hold: it is not fetched ahead

// How many elements p is short of the alignment of a whole vector.
template <typename T>
int64_t short_of_alignment(const T* p) {
  constexpr uintptr_t bytes = kLanes<T> * sizeof(T);
  const uintptr_t over = reinterpret_cast<uintptr_t>(p) % bytes;
  return over == 0 ? 0 : static_cast<int64_t>((bytes - over) / sizeof(T));
}

inline int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The last-level cache of one core. sysconf returns the sum over the machine on some processors (an AMD EPYC under KVM:
// `getconf LEVEL3_CACHE_SIZE` says 320 MB for 32 MB), so this reads the kernel's own table.
inline int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t size = 0;
    char unit = 0;
    if (file >> size >> unit && size > 0) return size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0);
    return int64_t{32} << 20;
  }();
  return bytes;
}

// Whether the page at p has been written since the system allocated it. At the first access the system clears the page
// through the caches, so that it is in cache afterwards.
inline bool is_mapped(const void* p) {
#ifdef __linux__
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  unsigned char resident = 1;
  void* const begin = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / page * page);
  return mincore(begin, 1, &resident) != 0 || (resident & 1) != 0;
#else
  return true;
#endif
}

// How many results have to fit into the last-level cache for one to be kept in it. Fewer in inference: nothing is read again.
constexpr int64_t kResultsInCache = 16, kResultsInCacheInference = 4;

// Whether a result of this many bytes bypasses the caches. That is faster if its memory is not in cache yet, as when an
// operator follows others on other tensors. A small result stays in cache for the operator that reads it next.
inline bool beyond_cache(const void* out, int64_t bytes, int64_t results_in_cache = kResultsInCache) {
  return results_in_cache * bytes > last_level_cache_bytes() && is_mapped(static_cast<const char*>(out) + bytes / 2);
}

// f(0), f(1), ..., f(n - 1), each a constant.
template <int n, typename F>
inline void each(const F& f) {
  [&]<int... k>(std::integer_sequence<int, k...>) { (f(std::integral_constant<int, k>{}), ...); }(std::make_integer_sequence<int, n>{});
}

// A policy's sums, each in a register: hence there are no loops here, whose variable index would need memory.
template <typename V, int kSums>
struct VectorSums {
  V v[kSums];
  static VectorSums zero() {
    VectorSums sums;
    each<kSums>([&](auto k) { sums.v[k] = V(0); });
    return sums;
  }
  V& operator[](int k) { return v[k]; }
};

struct Planes {  // contiguous: (N, C, HW)
  int64_t N, C, HW;
  int64_t numel() const { return N * C * HW; }
};
struct Rows {  // channels_last: (rows, C)
  int64_t rows, C;
  int64_t numel() const { return rows * C; }
};

// kRows constants per channel, row-major. In rows of channels a table is `width` wide: C, or a multiple of C where
// several short rows are read as one.
template <typename T, int kRows>
class ChannelTable {
 public:
  void resize(int64_t channels, int64_t width) {
    channels_ = channels;
    width_ = width;
    data_.resize(kRows * width);
  }
  const compute_t<T>* row(int r) const { return data_.data() + r * width_; }
  compute_t<T>* row(int r) { return data_.data() + r * width_; }
  void replicate() {
    if (channels_ == width_) return;
    for (int row = 0; row < kRows; ++row) {
      compute_t<T>* p = data_.data() + row * width_;
      for (int64_t j = channels_; j < width_; ++j) p[j] = p[j - channels_];
    }
  }
  int64_t width() const { return width_; }

 private:
  int64_t channels_ = 0, width_ = 0;
  c10::SmallVector<compute_t<T>, 512> data_;
};

// A channel's constants as vectors, loaded once per run; unused rows take no time once inlined.
template <typename Policy>
struct Constants {
  using V = Vec<typename Policy::Scalar>;
  V v[Policy::kRows];
  V operator()(int row) const { return v[row]; }
  static Constants broadcast(const Policy& policy, int64_t c) {
    Constants k;
    for (int r = 0; r < Policy::kRows; ++r) k.v[r] = V(policy.table.row(r)[c]);
    return k;
  }
  // The first n lanes from `first`, the others from `rest`.
  static Constants joined(const Constants& first, const Constants& rest, int64_t n) {
    Constants k;
    for (int r = 0; r < Policy::kRows; ++r) k.v[r] = first_lanes(first.v[r], n, rest.v[r]);
    return k;
  }
  static Constants columns(const Policy& policy, int64_t c) {
    Constants k;
    for (int r = 0; r < Policy::kRows; ++r) k.v[r] = V::loadu(policy.table.row(r) + c);
    return k;
  }
  static Constants columns(const Policy& policy, int64_t c, int64_t n) {
    Constants k;
    for (int r = 0; r < Policy::kRows; ++r) k.v[r] = vload(policy.table.row(r) + c, n, V(0));
    return k;
  }
};

// Where the elements of a channel lie: `runs` runs of `length` elements, `step` apart.
struct ChannelView {
  int64_t channel_stride, runs, run_stride, length, step;
  explicit ChannelView(const Planes& s) : channel_stride(s.HW), runs(s.N), run_stride(s.C * s.HW), length(s.HW), step(1) {}
  explicit ChannelView(const Rows& s) : channel_stride(1), runs(1), run_stride(0), length(s.rows), step(s.C) {}
  int64_t count() const { return runs * length; }
  int64_t offset(int64_t c, int64_t j) const {
    return c * channel_stride + j / length * run_stride + j % length * step;
  }
};

// The layout of a tensor's memory, and its shape as the two passes see it.
struct Layout {
  bool rows;
  int64_t N, C, HW;
  Planes as_planes() const { return {N, C, HW}; }
  Rows as_rows() const { return {N * HW, C}; }
  ChannelView channel() const { return rows ? ChannelView(as_rows()) : ChannelView(as_planes()); }
};

// A policy as the drivers of the passes see it: without its type, so that a driver is compiled once per arithmetic type
// and not once per kernel. Each call is for a block of channels, or for a run of elements.
struct Passes {
  int64_t element_bytes;
  bool reduces, maps;
  const void* output;
  bool streams(int64_t numel) const {
    return beyond_cache(output, numel * element_bytes, reduces ? kResultsInCache : kResultsInCacheInference);
  }
  virtual void prepare(int64_t begin, int64_t end) = 0;
  virtual void finish(int64_t begin, int64_t end, const double* sums, int64_t step) = 0;  // sums from `begin` on

 protected:
  ~Passes() = default;
};

// What is the same in either layout. `Interface` is PlanePasses or RowPasses, each a Passes.
template <typename Policy, typename Interface>
struct PassesOf : Interface {
  Policy& policy;
  explicit PassesOf(Policy& policy) : policy(policy) {
    this->element_bytes = sizeof(typename Policy::Scalar);
    this->reduces = policy.reduces(), this->maps = policy.maps(), this->output = policy.output();
  }
  void prepare(int64_t begin, int64_t end) override {
    for (int64_t c = begin; c < end; c += kLot) policy.prepare(c, std::min(kLot, end - c));
  }
  void finish(int64_t begin, int64_t end, const double* sums, int64_t step) override {
    for (int64_t c = begin; c < end; c += kLot, sums += kLot) policy.finish(c, std::min(kLot, end - c), sums, step);
  }

 protected:
  ~PassesOf() = default;
};

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
