// The two passes over planes: contiguous tensors, (N, C, HW).
#pragma once

#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>

#include <algorithm>
#include <vector>

#include "cpu/passes.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// `ahead`: the distance in elements to what is prefetched; 0 for no prefetch. Hardware prefetchers stop at every page and
// do not predict the jump to the next image.
template <typename Policy, typename At>
inline void sum_run(const Policy& policy, const At& at, int64_t begin, int64_t n, int64_t ahead,
                    VectorSums<Vec<typename Policy::Scalar>, Policy::kSums>& sums) {
  using V = Vec<typename Policy::Scalar>;
  constexpr int64_t L = V::size();
  const int64_t end = begin + n;
  int64_t i = begin;
  if (n >= 4 * L) {
    auto a = VectorSums<V, Policy::kSums>::zero(), b = a, c = a, d = a;
    for (; i + 4 * L <= end; i += 4 * L) {
      if (ahead != 0)
        for (int64_t j = 0; j < 4 * L; j += L) policy.prefetch(i + j + ahead);
      policy.template term<false>(at, i, L, a);
      policy.template term<false>(at, i + L, L, b);
      policy.template term<false>(at, i + 2 * L, L, c);
      policy.template term<false>(at, i + 3 * L, L, d);
    }
    each<Policy::kSums>([&](auto k) { sums[k] = sums[k] + ((a[k] + b[k]) + (c[k] + d[k])); });
  }
  for (; i + L <= end; i += L) {
    if (ahead != 0) policy.prefetch(i + ahead);
    policy.template term<false>(at, i, L, sums);
  }
  if (i < end) policy.template term<true>(at, i, end - i, sums);
}

// Second pass over elements [begin, end), which may cross planes and images. A vector that straddles two planes
// takes each lane's constants from its own channel, so that stores stay whole and aligned wherever planes begin.
// `end` is the end of a plane, or lies in the plane of `begin`.
template <typename Policy>
void map_span(const Policy& policy, const Planes& s, int64_t begin, int64_t end, int64_t ahead, bool stream) {
  using T = typename Policy::Scalar;
  using K = Constants<Policy>;
  constexpr int64_t L = kLanes<T>;
  const T* const out = policy.output();
  int64_t i = begin, c = begin / s.HW % s.C, left = s.HW - begin % s.HW;  // left: elements of the plane from i on
  const auto part = [&](int64_t n) {
    policy.map_part(K::broadcast(policy, c), i, n);
    i += n, left -= n;
    if (left == 0) left = s.HW, c = c + 1 == s.C ? 0 : c + 1;
  };
  if (const int64_t head = std::min({short_of_alignment(out + i), left, end - i}); head > 0) part(head);
  if (s.HW < L || (stream && short_of_alignment(out + i) != 0)) {
    while (i < end) part(std::min({L, left, end - i}));
    return;
  }
  if (s.HW < kShortPlane) {
    // Without a branch that depends on where planes begin: such branches cannot be predicted.
    for (; i + L <= end; i += L) {
      if (ahead != 0) policy.prefetch(i + ahead);
      const int64_t next = c + 1 == s.C ? 0 : c + 1;
      // Constants of a channel without a lane here may belong to another thread, which computes them at the same time.
      const int64_t behind = left < L ? next : c;
      policy.map(K::joined(K::broadcast(policy, c), K::broadcast(policy, behind), std::min(left, L)), i, stream);
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
        if (ahead != 0) policy.prefetch(i + ahead);
        policy.map(at, i, stream);
      }
      left -= i - first;
      if (i + L > end) break;
      c = c + 1 == s.C ? 0 : c + 1;
      if (left > 0) {
        policy.map(K::joined(at, K::broadcast(policy, c), left), i, stream);
        i += L, left -= L;
      }
      left += s.HW;
    }
  }
  while (i < end) part(std::min({L, left, end - i}));
}

// How a tensor of planes is cut: blocks of channels (a thread's contiguous run in one image), and for each block
// pieces of at most about kPiece elements per channel: groups of whole images, or parts of one image's plane.
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

// The sums of one piece, image by image. S: the arithmetic type.
template <typename S, int kSums>
class PieceSums {
  using V = at::vec::Vectorized<S>;
  static constexpr int64_t L = V::size();

 public:
  PieceSums(const Planes& s, const PlaneCut& cut) : s_(s), cut_(cut) {}

  void start(int64_t block) {
    c0_ = block * cut_.block;
    channels_ = std::min(cut_.block, s_.C - c0_);
    pending_ = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      sums_[c] = VectorSums<V, kSums>::zero();
      std::fill_n(wide_[c][0], kSums * L, 0.0);
    }
  }

  template <typename Policy>
  void add(const Policy& policy, int64_t n, int64_t part, int64_t ahead) {
    const int64_t p0 = part * cut_.part, pn = std::min(cut_.part, s_.HW - p0);
    for (int64_t c = 0; c < channels_; ++c) {
      const auto at = Constants<Policy>::broadcast(policy, c0_ + c);
      const int64_t begin = (n * s_.C + c0_ + c) * s_.HW + p0;
      // A long run is summed in stretches, so that no lane sees more than kFlush additions.
      for (int64_t j = 0; j < pn; j += kFlush * 4 * L) {
        if (j > 0) flush(c);
        sum_run(policy, at, begin + j, std::min(kFlush * 4 * L, pn - j), ahead, sums_[c]);
      }
    }
    if ((pending_ += pn / (4 * L) + 4) >= kFlush) {
      for (int64_t c = 0; c < channels_; ++c) flush(c);
      pending_ = 0;
    }
  }

  void add_to(double* sums) {  // (kSums, channels of a block)
    for (int64_t c = 0; c < channels_; ++c) {
      flush(c);
      for (int k = 0; k < kSums; ++k) sums[k * cut_.block + c] += sum_pairwise<L>(wide_[c][k]);
    }
  }

 private:
  C10_NOINLINE void flush(int64_t c) {
    each<kSums>([&](auto k) { add_lanes(wide_[c][k], sums_[c][k]); });
    sums_[c] = VectorSums<V, kSums>::zero();
  }

  const Planes& s_;
  const PlaneCut& cut_;
  int64_t c0_ = 0, channels_ = 0, pending_ = 0;
  VectorSums<V, kSums> sums_[kMaxBlock];
  alignas(64) double wide_[kMaxBlock][kSums][L];
};

template <typename S, int kSums>
struct PlanePasses : Passes {
  Planes s;
  virtual void add(PieceSums<S, kSums>& piece, int64_t n, int64_t part, int64_t ahead) const = 0;
  virtual void map(int64_t begin, int64_t end, int64_t ahead, bool stream) const = 0;

 protected:
  ~PlanePasses() = default;
};

template <typename Policy>
struct PlanePassesOf final : PassesOf<Policy, PlanePasses<compute_t<typename Policy::Scalar>, Policy::Reduction::kSums>> {
  using S = compute_t<typename Policy::Scalar>;
  static constexpr int kSums = Policy::Reduction::kSums;
  using PassesOf<Policy, PlanePasses<S, kSums>>::PassesOf;
  void add(PieceSums<S, kSums>& piece, int64_t n, int64_t part, int64_t ahead) const override {
    piece.template add<typename Policy::Reduction>(this->policy, n, part, ahead);
  }
  void map(int64_t begin, int64_t end, int64_t ahead, bool stream) const override {
    map_span(this->policy, this->s, begin, end, ahead, stream);
  }
};

// Without sums there is one pass, in the order of memory.
template <typename S, int kSums>
void map_planes(PlanePasses<S, kSums>& passes, int64_t ahead, bool stream) {
  const Planes s = passes.s;
  if (s.N > 1) passes.prepare(0, s.C);
  const auto planes = [&](int64_t begin, int64_t end) {
    if (s.N == 1) passes.prepare(begin, end);  // planes are channels; on few elements these take a good part of the time
    passes.map(begin * s.HW, end * s.HW, ahead, stream);
    stream_fence();
  };
  if (s.numel() < kSerial)
    planes(0, s.N * s.C);
  else
    at::parallel_for(0, s.N * s.C, divup(kSerial / 2, s.HW), planes);
}

template <typename S, int kSums>
C10_NOINLINE void pass_over_planes(PlanePasses<S, kSums>& passes) {
  const Planes s = passes.s;
  const int64_t threads = s.numel() < kSerial ? 1 : at::get_num_threads();
  const PlaneCut cut(s, passes.element_bytes, threads);
  const bool stream = passes.streams(s.numel());
  const int64_t far = kAhead / passes.element_bytes;
  if (!passes.reduces) return map_planes(passes, far, stream);
  const auto end_of = [&](int64_t block) { return std::min(s.C, (block + 1) * cut.block); };
  const auto prepare = [&](int64_t block) { passes.prepare(block * cut.block, end_of(block)); };
  const auto finish = [&](int64_t block, const double* sums) {  // (kSums, channels of a block)
    passes.finish(block * cut.block, end_of(block), sums, cut.block);
  };
  // Second pass over part of a block's planes in image n.
  const auto map = [&](int64_t block, int64_t n, int64_t part, int64_t ahead) {
    const int64_t c0 = block * cut.block, channels = end_of(block) - c0, p0 = part * cut.part;
    const int64_t begin = (n * s.C + c0) * s.HW + p0;
    // A plane that is cut into parts is one block.
    passes.map(begin, begin + (cut.parts > 1 ? std::min(cut.part, s.HW - p0) : channels * s.HW), ahead, stream);
  };
  // A thread owns blocks of channels, and makes the second pass while they are in its cache, if that keeps all threads busy.
  if (threads == 1 || 20 * cut.blocks >= 17 * threads * divup(cut.blocks, threads)) {
    const auto own_blocks = [&](int64_t begin, int64_t end) {
      PieceSums<S, kSums> piece(s, cut);
      double sums[kSums * kMaxBlock], part[kSums * kMaxBlock];
      const auto reduce = [&](int64_t block, int64_t n, int64_t ahead) {
        for (int64_t p = 0; p < cut.parts; ++p) {
          if (n % cut.group == 0) piece.start(block);
          passes.add(piece, n, p, ahead);
          if ((n + 1) % cut.group != 0 && n + 1 != s.N) continue;
          std::fill_n(part, kSums * cut.block, 0.0);
          piece.add_to(part);
          for (int64_t j = 0; j < kSums * cut.block; ++j) sums[j] += part[j];
        }
      };
      std::fill_n(sums, kSums * kMaxBlock, 0.0);
      prepare(begin);
      for (int64_t n = 0; n < s.N; ++n) reduce(begin, n, s.C * s.HW);
      for (int64_t block = begin; block < end; ++block) {
        finish(block, sums);
        std::fill_n(sums, kSums * kMaxBlock, 0.0);
        if (block + 1 < end) prepare(block + 1);
        // One block is written while the next is read, image by image, so that reads and writes overlap; in reverse
        // order, so that what the first pass read last is still in cache.
        for (int64_t n = 0; n < s.N; ++n) {
          const int64_t written = s.N - 1 - n;
          const int64_t ahead = block + 1 < end ? ((n - written) * s.C + cut.block) * s.HW : 0;
          if (passes.maps)
            for (int64_t p = 0; p < cut.parts; ++p) map(block, written, p, ahead);
          if (block + 1 < end) reduce(block + 1, n, passes.maps ? 0 : s.C * s.HW);
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
  // Otherwise threads share the pieces of every block, with a barrier between the two passes.
  const int64_t units = cut.blocks * cut.pieces();  // piece-major: a thread's units are near each other in memory
  for (int64_t block = 0; block < cut.blocks; ++block) prepare(block);
  std::vector<double> partial(units * kSums * cut.block, 0.0);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    PieceSums<S, kSums> piece(s, cut);
    for (int64_t u = begin; u < end; ++u) {
      piece.start(u % cut.blocks);
      cut.for_images(u / cut.blocks, s.N, [&](int64_t n, int64_t p) { passes.add(piece, n, p, far); });
      piece.add_to(&partial[u * kSums * cut.block]);
    }
    stream_fence();
  });
  for (int64_t block = 0; block < cut.blocks; ++block) {
    double sums[kSums * kMaxBlock] = {};
    for (int64_t piece = 0; piece < cut.pieces(); ++piece)
      for (int64_t j = 0; j < kSums * cut.block; ++j) sums[j] += partial[(piece * cut.blocks + block) * kSums * cut.block + j];
    finish(block, sums);
  }
  if (passes.maps) {
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = end; u-- > begin;)
        cut.for_images(u / cut.blocks, s.N, [&](int64_t n, int64_t p) { map(u % cut.blocks, n, p, 0); });
      stream_fence();
    });
  }
}

template <typename Policy>
void run_planes(Policy& policy, const Planes& s) {
  policy.table.resize(s.C, s.C);
  PlanePassesOf<Policy> passes(policy);
  passes.s = s;
  pass_over_planes(passes);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
