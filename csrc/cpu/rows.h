// The two passes over rows of channels: channels_last tensors, (N * HW, C).
#pragma once

#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <vector>

#include "cpu/passes.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

template <typename Policy>
void reduce_rows(const Policy& policy, int64_t width, int64_t begin, int64_t end, bool fetch, double* sums,
                 compute_t<typename Policy::Scalar>* acc) {
  // elements [begin, end) of the tensor, begin at a row's start; sums and acc: (kSums, width); fetch: as in map_rows
  using T = typename Policy::Scalar;
  constexpr int kSums = Policy::kSums;
  using S = compute_t<T>;
  using V = Vec<T>;
  constexpr int64_t L = V::size();
  const int64_t ahead = std::max(kAhead / static_cast<int64_t>(sizeof(T)), 4 * width);
  const auto columns = [&](auto rows, int64_t first, int64_t n) {  // `rows` whole rows (or n columns of one) from `first`
    constexpr int kRows = decltype(rows)::value;
    int64_t v = 0;
    for (; v + L <= n; v += L) {
      const auto at = Constants<Policy>::columns(policy, v);
      auto found = VectorSums<V, kSums>::zero();
      if (fetch)
        for (int r = 0; r < kRows; ++r) policy.prefetch(first + r * width + v + ahead);
      for (int r = 0; r < kRows; ++r) policy.template term<false>(at, first + r * width + v, L, found);
      each<kSums>([&](auto k) { (V::loadu(acc + k * width + v) + found[k]).store(acc + k * width + v); });
    }
    if (const int64_t rest = n - v; rest > 0) {
      const auto at = Constants<Policy>::columns(policy, v, rest);
      auto found = VectorSums<V, kSums>::zero();
      for (int r = 0; r < kRows; ++r) policy.template term<true>(at, first + r * width + v, rest, found);
      each<kSums>([&](auto k) {
        S* const to = acc + k * width + v;
        vstore<S>(to, vload<S>(to, rest, V(0)) + found[k], rest);
      });
    }
  };
  std::fill_n(acc, kSums * width, S(0));
  const auto flush = [&] {
    for (int64_t j = 0; j < kSums * width; ++j) sums[j] += acc[j];
    std::fill_n(acc, kSums * width, S(0));
  };
  int64_t i = begin, pending = 0;
  // Several rows are summed in registers before they are added to the accumulators in cache. Eight at a time are faster if
  // the rows are in the core's own cache, four otherwise.
  const auto sum_together = [&](auto rows) {
    for (; i + rows * width <= end; i += rows * width) {
      columns(rows, i, width);
      if ((pending += rows) >= 4 * kFlush) flush(), pending = 0;
    }
  };
  if (fetch)
    sum_together(std::integral_constant<int, 4>{});
  else
    sum_together(std::integral_constant<int, 8>{});
  for (; i + width <= end; i += width) columns(std::integral_constant<int, 1>{}, i, width);
  if (i < end) columns(std::integral_constant<int, 1>{}, i, end - i);
  flush();
}

// `fetch`: whether to prefetch what is read next; if all is in the core's own cache, that takes time without use.
template <typename Policy>
void map_rows(const Policy& policy, int64_t width, int64_t begin, int64_t end, bool fetch, bool stream) {
  using T = typename Policy::Scalar;
  constexpr int64_t L = kLanes<T>;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t n = std::min(width, end - first);  // the last row may be short
    int64_t v = 0;
    for (; v + L <= n; v += L) {
      if (fetch) policy.prefetch(first + v + kAhead / static_cast<int64_t>(sizeof(T)));
      policy.map(Constants<Policy>::columns(policy, v), first + v, stream);
    }
    if (const int64_t rest = n - v; rest > 0)
      policy.map_part(Constants<Policy>::columns(policy, v, rest), first + v, rest);
  }
}

template <typename S, int kSums>
struct RowPasses : Passes {
  Rows s;
  virtual void resize(int64_t width) = 0;
  virtual void replicate() = 0;
  virtual void reduce(int64_t width, int64_t begin, int64_t end, bool fetch, double* sums, S* acc) const = 0;
  virtual void map(int64_t width, int64_t begin, int64_t end, bool fetch, bool stream) const = 0;

 protected:
  ~RowPasses() = default;
};

template <typename Policy>
struct RowPassesOf final : PassesOf<Policy, RowPasses<compute_t<typename Policy::Scalar>, Policy::Reduction::kSums>> {
  using S = compute_t<typename Policy::Scalar>;
  using PassesOf<Policy, RowPasses<S, Policy::Reduction::kSums>>::PassesOf;
  void resize(int64_t width) override { this->policy.table.resize(this->s.C, width); }
  void replicate() override { this->policy.table.replicate(); }
  void reduce(int64_t width, int64_t begin, int64_t end, bool fetch, double* sums, S* acc) const override {
    reduce_rows<typename Policy::Reduction>(this->policy, width, begin, end, fetch, sums, acc);
  }
  void map(int64_t width, int64_t begin, int64_t end, bool fetch, bool stream) const override {
    map_rows(this->policy, width, begin, end, fetch, stream);
  }
};

template <typename S, int kSums>
C10_NOINLINE void pass_over_rows(RowPasses<S, kSums>& passes) {
  constexpr int64_t L = at::vec::Vectorized<S>::size();
  const Rows s = passes.s;
  // Short or odd rows are read several at once, as one row of whole vectors.
  int64_t join = 1;
  if (s.C < 256)
    while ((s.C * join) % L != 0 || (s.C * join < 64 && join < 64)) join *= 2;
  const int64_t width = s.C * join, numel = s.numel();
  // Pieces are whole rows: enough to keep the threads busy, and few enough that partial sums are small compared with the rows.
  const int64_t pieces = std::clamp<int64_t>(numel / kSerial, 1, std::clamp<int64_t>(divup(numel, width) / 32, 4, 64));
  const int64_t piece = std::max<int64_t>(divup(divup(numel, width), pieces), 1) * width;
  const int64_t units = std::max<int64_t>(divup(numel, piece), 1);
  const bool stream = passes.streams(numel) && width % L == 0 &&
                      reinterpret_cast<uintptr_t>(passes.output) % (L * passes.element_bytes) == 0;
  const bool fetch = numel * passes.element_bytes > kCoreCache;
  const auto parallel = [&](int64_t n, const auto& f) {
    if (numel < kSerial || n == 1)
      f(int64_t{0}, n);
    else
      at::parallel_for(0, n, 1, f);
  };
  passes.resize(width);
  parallel(divup(s.C, kChannels), [&](int64_t begin, int64_t end) {
    passes.prepare(begin * kChannels, std::min(s.C, end * kChannels));
  });
  passes.replicate();
  if (passes.reduces) {
    c10::SmallVector<double, 512> sums(units * kSums * width, 0.0);
    parallel(units, [&](int64_t begin, int64_t end) {
      std::vector<S> acc(kSums * width);
      for (int64_t u = begin; u < end; ++u)
        passes.reduce(width, u * piece, std::min(numel, (u + 1) * piece), fetch, &sums[u * kSums * width], acc.data());
      stream_fence();
    });
    parallel(divup(s.C, kChannels), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * kChannels, channels = std::min(kChannels, s.C - c0);
        double total[kSums][kChannels] = {};
        for (const double* row = sums.data() + c0; row < sums.data() + units * kSums * width; row += kSums * width)
          for (int64_t j = 0; j < width; j += s.C)
            for (int64_t c = 0; c < channels; ++c)
              for (int k = 0; k < kSums; ++k) total[k][c] += row[k * width + j + c];
        passes.finish(c0, c0 + channels, total[0], kChannels);
      }
    });
    passes.replicate();
  }
  if (!passes.maps) return;
  parallel(units, [&](int64_t begin, int64_t end) {
    // In reverse order, so that what the first pass read last is still in cache; forward within a stretch.
    const int64_t first = begin * piece, last = std::min(numel, end * piece), stretch = divup(kStretch, width) * width;
    for (int64_t i = divup(last - first, stretch); i-- > 0;)
      passes.map(width, first + i * stretch, std::min(last, first + (i + 1) * stretch), fetch, stream);
    stream_fence();
  });
}

template <typename Policy>
void run_rows(Policy& policy, const Rows& s) {
  RowPassesOf<Policy> passes(policy);
  passes.s = s;
  pass_over_rows(passes);
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
