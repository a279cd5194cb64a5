// The two sweeps that every batch-norm kernel makes, once for each memory layout. An operator brings a policy:
//
//   kRows                          per-channel constants it keeps (rows of a ChannelTable)
//   prefetch(i)                    asks for the inputs at element i
//   prepare(c)                     before the first sweep, channel c
//   term<Partial>(at, i, n, s1, s2)   first sweep: adds element i (a vector; its first n lanes if Partial) to two sums
//   finish(c, s1, s2)              the channel's sums -> constants of the second sweep
//   point(at, i)                   second sweep: computes element i (a vector), point(at, i, n) its first n lanes
//   output()                       where the second sweep stores
//
// `at(row)` gives a per-channel constant as a vector: broadcast in planes, loaded in rows of channels. Sums are kept
// in vector accumulators of the arithmetic type for at most kFlush additions a lane, then in double. The pieces over
// which sums are taken depend on the shape alone, so results do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <vector>

#include "cpu/vec.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kFlush = 16;             // additions a lane before a sum moves to double
constexpr int64_t kPiece = 8192;           // elements of one channel whose sums are taken in one go
constexpr int64_t kRunBytes = 8192;        // contiguous bytes a thread reads before it jumps to the next image
constexpr int64_t kBlockBytes = 1 << 19;   // of one tensor that a thread reads twice, while they stay in its own cache
constexpr int64_t kSerial = 32768;         // elements below which waking a second thread costs more than it saves
constexpr int64_t kMaxBlock = 64;          // channels of a block
constexpr int64_t kStretch = 16384;        // elements of rows that are read forward in the reversed second sweep
constexpr int64_t kAhead = 8192;           // bytes between what is read and what is fetched, in rows

// How many elements p is short of the alignment of a whole vector.
template <typename T>
int64_t short_of_alignment(const T* p) {
  constexpr uintptr_t bytes = kLanes<T> * sizeof(T);
  const uintptr_t over = reinterpret_cast<uintptr_t>(p) % bytes;
  return over == 0 ? 0 : static_cast<int64_t>((bytes - over) / sizeof(T));
}

inline int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cache that one core's misses go to. sysconf adds up all that the machine has on some processors (measured: AMD
// EPYC 9R14 under KVM, 320 MB for 32 MB), so the kernel's own table is asked.
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

struct Planes {  // contiguous: (N, C, HW)
  int64_t N, C, HW;
  int64_t numel() const { return N * C * HW; }
};
struct Rows {  // channels_last: (rows, C)
  int64_t rows, C;
  int64_t numel() const { return rows * C; }
};

// kRows constants a channel, row-major. In rows of channels a table is `width` wide: C, or a multiple of C where
// several short rows are read as one.
template <typename T, int kRows>
class ChannelTable {
 public:
  void resize(int64_t channels, int64_t width) {
    channels_ = channels;
    width_ = width;
    data_.resize(kRows * width);
  }
  compute_t<T>& operator()(int row, int64_t c) { return data_[row * width_ + c]; }
  const compute_t<T>* row(int r) const { return data_.data() + r * width_; }
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

// A channel's constants as vectors, loaded once for a run; rows that nobody reads cost nothing once inlined.
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

// The layout of a tensor's memory, and its shape as the two sweeps see it.
struct Layout {
  bool rows;
  int64_t N, C, HW;
  Planes as_planes() const { return {N, C, HW}; }
  Rows as_rows() const { return {N * HW, C}; }
  ChannelView channel() const { return rows ? ChannelView(as_rows()) : ChannelView(as_planes()); }
};

// ---- planes -----------------------------------------------------------------------------------------------------

// `ahead`: how far from an element the one lies that is to be fetched meanwhile; 0 for none. The hardware's own
// prefetching ends at every page and does not foresee the jump to the next image.
template <typename Policy, typename At>
inline void sum_run(const Policy& policy, const At& at, int64_t begin, int64_t n, int64_t ahead,
                    Vec<typename Policy::Scalar>& s1, Vec<typename Policy::Scalar>& s2) {
  using V = Vec<typename Policy::Scalar>;
  constexpr int64_t L = V::size();
  const int64_t end = begin + n;
  int64_t i = begin;
  if (n >= 4 * L) {
    V a1(0), a2(0), b1(0), b2(0), c1(0), c2(0), d1(0), d2(0);
    for (; i + 4 * L <= end; i += 4 * L) {
      if (ahead != 0)
        for (int64_t j = 0; j < 4 * L; j += L) policy.prefetch(i + j + ahead);
      policy.template term<false>(at, i, L, a1, a2);
      policy.template term<false>(at, i + L, L, b1, b2);
      policy.template term<false>(at, i + 2 * L, L, c1, c2);
      policy.template term<false>(at, i + 3 * L, L, d1, d2);
    }
    s1 = s1 + ((a1 + b1) + (c1 + d1));
    s2 = s2 + ((a2 + b2) + (c2 + d2));
  }
  for (; i + L <= end; i += L) {
    if (ahead != 0) policy.prefetch(i + ahead);
    policy.template term<false>(at, i, L, s1, s2);
  }
  if (i < end) policy.template term<true>(at, i, end - i, s1, s2);
}

constexpr int64_t kShortPlane = 512;  // elements

// Second sweep over elements [begin, end), which may cross planes and images. A vector that straddles two planes
// takes each lane's constants from its own channel, so that stores stay whole and aligned wherever planes begin.
template <bool kStream, bool kPrefetch, typename Policy>
C10_NOINLINE void map_span(const Policy& policy, const Planes& s, int64_t begin, int64_t end, int64_t ahead) {
  using T = typename Policy::Scalar;
  using K = Constants<Policy>;
  constexpr int64_t L = kLanes<T>;
  T* const out = policy.output();
  const auto store = [&](int64_t i, Vec<T> v) { kStream ? vstream(out + i, v) : vstore(out + i, v); };
  int64_t i = begin, c = begin / s.HW % s.C, left = s.HW - begin % s.HW;  // left: elements of the plane from i on
  const auto part = [&](int64_t n) {
    vstore(out + i, policy.point(K::broadcast(policy, c), i, n), n);
    i += n, left -= n;
    if (left == 0) left = s.HW, c = c + 1 == s.C ? 0 : c + 1;
  };
  if (const int64_t head = std::min({short_of_alignment(out + i), left, end - i}); head > 0) part(head);
  if (s.HW < L || (kStream && short_of_alignment(out + i) != 0)) {
    while (i < end) part(std::min({L, left, end - i}));
    return;
  }
  if (s.HW < kShortPlane) {
    // Without a branch that depends on where planes begin: such branches cannot be foreseen.
    for (; i + L <= end; i += L) {
      if (kPrefetch) policy.prefetch(i + ahead);
      const int64_t next = c + 1 == s.C ? 0 : c + 1;
      store(i, policy.point(K::joined(K::broadcast(policy, c), K::broadcast(policy, next), std::min(left, L)), i));
      left -= L;
      const bool over = left <= 0;
      left += over ? s.HW : 0;
      c = over ? next : c;
    }
  } else {
    while (i + L <= end) {
      const K at = K::broadcast(policy, c);
      const int64_t stop = std::min(end, i + left);
      const int64_t first = i;
      for (; i + L <= stop; i += L) {
        if (kPrefetch) policy.prefetch(i + ahead);
        store(i, policy.point(at, i));
      }
      left -= i - first;
      if (i + L > end) break;
      c = c + 1 == s.C ? 0 : c + 1;
      if (left > 0) {
        store(i, policy.point(K::joined(at, K::broadcast(policy, c), left), i));
        i += L, left -= L;
      }
      left += s.HW;
    }
  }
  while (i < end) part(std::min({L, left, end - i}));
}

template <typename Policy>
void map_span(const Policy& policy, const Planes& s, int64_t begin, int64_t end, int64_t ahead, bool stream) {
  if (stream)
    ahead != 0 ? map_span<true, true>(policy, s, begin, end, ahead) : map_span<true, false>(policy, s, begin, end, 0);
  else
    ahead != 0 ? map_span<false, true>(policy, s, begin, end, ahead) : map_span<false, false>(policy, s, begin, end, 0);
}

// How a tensor of planes is cut: blocks of channels (a thread's contiguous run in one image), and for each block
// pieces of at most about kPiece elements a channel: groups of whole images, or parts of one image's plane.
struct PlaneCut {
  int64_t block, blocks, group, groups, part, parts;
  PlaneCut(const Planes& s, int64_t element_bytes, int64_t threads) {
    const int64_t run = std::clamp(kBlockBytes / s.N, kRunBytes / 4, kRunBytes);
    block = std::clamp<int64_t>(divup(run, s.HW * element_bytes), 1, std::min(kMaxBlock, s.C));
    blocks = divup(s.C, block);
    block = divup(s.C, std::min(s.C, divup(blocks, threads) * threads));  // as many for each thread
    blocks = divup(s.C, block);
    group = std::clamp<int64_t>(kPiece / s.HW, 1, s.N);
    groups = divup(s.N, group);
    part = std::min(kPiece, s.HW);
    parts = divup(s.HW, part);
  }
  int64_t pieces() const { return groups * parts; }
  // Calls f(image, part) for each image of a piece.
  template <typename F>
  void for_images(int64_t piece, int64_t N, const F& f) const {
    const int64_t first = piece / parts * group;
    for (int64_t n = first; n < std::min(N, first + group); ++n) f(n, piece % parts);
  }
};

// The sums of one piece, image by image.
template <typename Policy>
class PieceSums {
  using V = Vec<typename Policy::Scalar>;
  static constexpr int64_t L = V::size();

 public:
  PieceSums(const Policy& policy, const Planes& s, const PlaneCut& cut) : policy_(policy), s_(s), cut_(cut) {}

  void start(int64_t block) {
    c0_ = block * cut_.block;
    channels_ = std::min(cut_.block, s_.C - c0_);
    pending_ = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      s1_[c] = s2_[c] = V(0);
      std::fill_n(wide1_[c], L, 0.0), std::fill_n(wide2_[c], L, 0.0);
    }
  }

  C10_NOINLINE void add(int64_t n, int64_t part, int64_t ahead) {
    const int64_t p0 = part * cut_.part, pn = std::min(cut_.part, s_.HW - p0);
    for (int64_t c = 0; c < channels_; ++c) {
      const auto at = Constants<Policy>::broadcast(policy_, c0_ + c);
      const int64_t begin = (n * s_.C + c0_ + c) * s_.HW + p0;
      // A long run is summed in stretches, so that no lane sees more than kFlush additions.
      for (int64_t j = 0; j < pn; j += kFlush * 4 * L) {
        if (j > 0) flush(c);
        sum_run(policy_, at, begin + j, std::min(kFlush * 4 * L, pn - j), ahead, s1_[c], s2_[c]);
      }
    }
    if ((pending_ += pn / (4 * L) + 4) >= kFlush) {
      for (int64_t c = 0; c < channels_; ++c) flush(c);
      pending_ = 0;
    }
  }

  void add_to(double* sums) {  // (channels of the block, 2)
    for (int64_t c = 0; c < channels_; ++c) {
      flush(c);
      double t1 = 0, t2 = 0;
      for (int64_t j = 0; j < L; ++j) t1 += wide1_[c][j], t2 += wide2_[c][j];
      sums[2 * c] += t1, sums[2 * c + 1] += t2;
    }
  }

 private:
  void flush(int64_t c) {
    add_lanes(wide1_[c], s1_[c]), add_lanes(wide2_[c], s2_[c]);
    s1_[c] = s2_[c] = V(0);
  }

  const Policy& policy_;
  const Planes& s_;
  const PlaneCut& cut_;
  int64_t c0_ = 0, channels_ = 0, pending_ = 0;
  V s1_[kMaxBlock], s2_[kMaxBlock];
  alignas(64) double wide1_[kMaxBlock][L], wide2_[kMaxBlock][L];
};

// Without sums there is one sweep, in the order of memory.
template <typename Policy>
void map_planes(Policy& policy, const Planes& s, bool stream) {
  for (int64_t c = 0; c < s.C; ++c) policy.prepare(c);
  const auto planes = [&](int64_t begin, int64_t end) {
    map_span(policy, s, begin * s.HW, end * s.HW, kAhead / static_cast<int64_t>(sizeof(typename Policy::Scalar)), stream);
    stream_fence();
  };
  if (s.numel() < kSerial)
    planes(0, s.N * s.C);
  else
    at::parallel_for(0, s.N * s.C, divup(kSerial / 2, s.HW), planes);
}

template <typename Policy>
void run_planes(Policy& policy, const Planes& s) {
  using T = typename Policy::Scalar;
  const int64_t threads = s.numel() < kSerial ? 1 : at::get_num_threads();
  const PlaneCut cut(s, sizeof(T), threads);
  policy.table.resize(s.C, s.C);
  const bool stream = policy.streams(s.numel());
  if constexpr (!Policy::kReduces) return map_planes(policy, s, stream);
  const auto prepare = [&](int64_t block) {
    for (int64_t c = block * cut.block; c < std::min(s.C, (block + 1) * cut.block); ++c)
      policy.prepare(c);
  };
  const auto finish = [&](int64_t block, const double* sums) {
    for (int64_t c = block * cut.block; c < std::min(s.C, (block + 1) * cut.block); ++c, sums += 2)
      policy.finish(c, sums[0], sums[1]);
  };
  // Second sweep over part of a block's planes in image n.
  const auto map = [&](int64_t block, int64_t n, int64_t part, int64_t ahead) {
    const int64_t c0 = block * cut.block, channels = std::min(cut.block, s.C - c0), p0 = part * cut.part;
    const int64_t begin = (n * s.C + c0) * s.HW + p0;
    // A plane in parts is a block of its own.
    map_span(policy, s, begin, begin + (cut.parts > 1 ? std::min(cut.part, s.HW - p0) : channels * s.HW), ahead, stream);
  };
  // A thread owns blocks of channels, and applies while its reads are in its cache, if that keeps threads busy.
  if (threads == 1 || 20 * cut.blocks >= 17 * threads * divup(cut.blocks, threads)) {
    const auto own_blocks = [&](int64_t begin, int64_t end) {
      PieceSums<Policy> piece(policy, s, cut);
      double sums[2 * kMaxBlock], part[2 * kMaxBlock];
      const auto reduce = [&](int64_t block, int64_t n, int64_t ahead) {
        for (int64_t p = 0; p < cut.parts; ++p) {
          if (n % cut.group == 0) piece.start(block);
          piece.add(n, p, ahead);
          if ((n + 1) % cut.group != 0 && n + 1 != s.N) continue;
          std::fill_n(part, 2 * cut.block, 0.0);
          piece.add_to(part);
          for (int64_t j = 0; j < 2 * cut.block; ++j) sums[j] += part[j];
        }
      };
      std::fill_n(sums, 2 * kMaxBlock, 0.0);
      prepare(begin);
      for (int64_t n = 0; n < s.N; ++n) reduce(begin, n, s.C * s.HW);
      for (int64_t block = begin; block < end; ++block) {
        finish(block, sums);
        std::fill_n(sums, 2 * kMaxBlock, 0.0);
        if (block + 1 < end) prepare(block + 1);
        // One block is written while the next is read, image by image, so that memory does both all the time; in
        // reverse order, so that what the first sweep read last is found in cache.
        for (int64_t n = 0; n < s.N; ++n) {
          const int64_t written = s.N - 1 - n;
          const int64_t ahead = block + 1 < end ? ((n - written) * s.C + cut.block) * s.HW : 0;
          if (policy.maps())
            for (int64_t p = 0; p < cut.parts; ++p) map(block, written, p, ahead);
          if (block + 1 < end) reduce(block + 1, n, policy.maps() ? 0 : s.C * s.HW);
        }
      }
      stream_fence();
    };
    if (threads == 1)
      own_blocks(0, cut.blocks);
    else
      at::parallel_for(0, cut.blocks, 1, own_blocks);
    return;
  }
  // Else threads share the pieces of every block, and meet between the two sweeps.
  const int64_t units = cut.blocks * cut.pieces();  // piece-major: a thread's units are near each other in memory
  for (int64_t block = 0; block < cut.blocks; ++block) prepare(block);
  std::vector<double> partial(units * 2 * cut.block, 0.0);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    PieceSums<Policy> piece(policy, s, cut);
    for (int64_t u = begin; u < end; ++u) {
      piece.start(u % cut.blocks);
      cut.for_images(u / cut.blocks, s.N, [&](int64_t n, int64_t p) { piece.add(n, p, kAhead / static_cast<int64_t>(sizeof(T))); });
      piece.add_to(&partial[u * 2 * cut.block]);
    }
    stream_fence();
  });
  for (int64_t block = 0; block < cut.blocks; ++block) {
    double sums[2 * kMaxBlock] = {};
    for (int64_t piece = 0; piece < cut.pieces(); ++piece)
      for (int64_t j = 0; j < 2 * cut.block; ++j) sums[j] += partial[(piece * cut.blocks + block) * 2 * cut.block + j];
    finish(block, sums);
  }
  if (policy.maps()) {
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = end; u-- > begin;)
        cut.for_images(u / cut.blocks, s.N, [&](int64_t n, int64_t p) { map(u % cut.blocks, n, p, 0); });
      stream_fence();
    });
  }
}

// ---- rows of channels -------------------------------------------------------------------------------------------

template <typename Policy>
C10_NOINLINE void reduce_rows(const Policy& policy, int64_t width, int64_t begin, int64_t end, double* sums, compute_t<typename Policy::Scalar>* acc) {
  // elements [begin, end) of the tensor, begin at a row's start; sums and acc: (2, width)
  using T = typename Policy::Scalar;
  using S = compute_t<T>;
  using V = Vec<T>;
  constexpr int64_t L = V::size();
  const int64_t ahead = std::max(kAhead / static_cast<int64_t>(sizeof(T)), 4 * width);
  const auto columns = [&](auto rows, int64_t first, int64_t n) {  // `rows` whole rows (or n columns of one) from `first`
    constexpr int kRows = decltype(rows)::value;
    int64_t v = 0;
    for (; v + L <= n; v += L) {
      const auto at = Constants<Policy>::columns(policy, v);
      V s1(0), s2(0);
      for (int r = 0; r < kRows; ++r) policy.prefetch(first + r * width + v + ahead);
      for (int r = 0; r < kRows; ++r) policy.template term<false>(at, first + r * width + v, L, s1, s2);
      (V::loadu(acc + v) + s1).store(acc + v), (V::loadu(acc + width + v) + s2).store(acc + width + v);
    }
    if (const int64_t rest = n - v; rest > 0) {
      const auto at = Constants<Policy>::columns(policy, v, rest);
      V s1(0), s2(0);
      for (int r = 0; r < kRows; ++r) policy.template term<true>(at, first + r * width + v, rest, s1, s2);
      vstore<S>(acc + v, vload<S>(acc + v, rest, V(0)) + s1, rest);
      vstore<S>(acc + width + v, vload<S>(acc + width + v, rest, V(0)) + s2, rest);
    }
  };
  std::fill_n(acc, 2 * width, S(0));
  const auto flush = [&] {
    for (int64_t j = 0; j < 2 * width; ++j) sums[j] += acc[j];
    std::fill_n(acc, 2 * width, S(0));
  };
  int64_t i = begin, pending = 0;
  for (; i + 4 * width <= end; i += 4 * width) {
    columns(std::integral_constant<int, 4>{}, i, width);
    if (++pending >= kFlush) flush(), pending = 0;
  }
  for (; i + width <= end; i += width) columns(std::integral_constant<int, 1>{}, i, width);
  if (i < end) columns(std::integral_constant<int, 1>{}, i, end - i);
  flush();
}

template <typename Policy>
C10_NOINLINE void map_rows(const Policy& policy, int64_t width, int64_t begin, int64_t end, bool stream) {
  using T = typename Policy::Scalar;
  using V = Vec<T>;
  constexpr int64_t L = V::size();
  const auto columns = [&](auto streamed, int64_t first, int64_t n) {
    T* const out = policy.output() + first;
    int64_t v = 0;
    for (; v + L <= n; v += L) {
      policy.prefetch(first + v + kAhead / static_cast<int64_t>(sizeof(T)));
      const V result = policy.point(Constants<Policy>::columns(policy, v), first + v);
      if constexpr (decltype(streamed)::value)
        vstream(out + v, result);
      else
        vstore(out + v, result);
    }
    if (const int64_t rest = n - v; rest > 0)
      vstore(out + v, policy.point(Constants<Policy>::columns(policy, v, rest), first + v, rest), rest);
  };
  for (int64_t i = begin; i < end; i += width) {
    const int64_t n = std::min(width, end - i);  // the last row may be short
    if (stream)
      columns(std::true_type{}, i, n);
    else
      columns(std::false_type{}, i, n);
  }
}

template <typename Policy>
void run_rows(Policy& policy, const Rows& s) {
  using T = typename Policy::Scalar;
  constexpr int64_t L = kLanes<T>;
  // Short or odd rows are read several at once, as one row of whole vectors.
  int64_t join = 1;
  if (s.C < 256)
    while ((s.C * join) % L != 0 || (s.C * join < 64 && join < 64)) join *= 2;
  const int64_t width = s.C * join, numel = s.numel();
  // Pieces are whole rows; as many as can keep threads busy, as few as keep the partial sums small.
  const int64_t pieces = std::clamp<int64_t>(numel / kSerial, 1, 64);
  const int64_t piece = std::max<int64_t>(divup(divup(numel, width), pieces), 1) * width;
  const int64_t units = std::max<int64_t>(divup(numel, piece), 1);
  policy.table.resize(s.C, width);
  const bool stream = policy.streams(numel) && width % L == 0 && short_of_alignment(policy.output()) == 0;
  const auto parallel = [&](int64_t n, const auto& f) {
    if (numel < kSerial || n == 1)
      f(int64_t{0}, n);
    else
      at::parallel_for(0, n, 1, f);
  };
  for (int64_t c = 0; c < s.C; ++c) policy.prepare(c);
  policy.table.replicate();
  if constexpr (Policy::kReduces) {
    c10::SmallVector<double, 512> sums(units * 2 * width, 0.0);
    parallel(units, [&](int64_t begin, int64_t end) {
      std::vector<compute_t<T>> acc(2 * width);
      for (int64_t u = begin; u < end; ++u)
        reduce_rows(policy, width, u * piece, std::min(numel, (u + 1) * piece), &sums[u * 2 * width], acc.data());
      stream_fence();
    });
    parallel(divup(s.C, 256), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * 256, channels = std::min<int64_t>(256, s.C - c0);
        double s1[256] = {}, s2[256] = {};
        for (const double* row = sums.data() + c0; row < sums.data() + units * 2 * width; row += 2 * width)
          for (int64_t j = 0; j < width; j += s.C)
            for (int64_t c = 0; c < channels; ++c) s1[c] += row[j + c], s2[c] += row[width + j + c];
        for (int64_t c = 0; c < channels; ++c) policy.finish(c0 + c, s1[c], s2[c]);
      }
    });
    policy.table.replicate();
  }
  if (!policy.maps()) return;
  parallel(units, [&](int64_t begin, int64_t end) {
    // In reverse order, so that what the first sweep read last is still in cache; forward within a stretch.
    const int64_t first = begin * piece, last = std::min(numel, end * piece), stretch = divup(kStretch, width) * width;
    for (int64_t i = divup(last - first, stretch); i-- > 0;)
      map_rows(policy, width, first + i * stretch, std::min(last, first + (i + 1) * stretch), stream);
    stream_fence();
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
