// The two sweeps over rows of channels: channels_last tensors, (N * HW, C).
#pragma once

#include <ATen/Parallel.h>
#include <c10/macros/Macros.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <vector>

#include "cpu/sweep.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

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
  constexpr int64_t L = kLanes<T>;
  const auto columns = [&](auto streamed, int64_t first, int64_t n) {
    int64_t v = 0;
    for (; v + L <= n; v += L) {
      policy.prefetch(first + v + kAhead / static_cast<int64_t>(sizeof(T)));
      policy.template map<decltype(streamed)::value>(Constants<Policy>::columns(policy, v), first + v);
    }
    if (const int64_t rest = n - v; rest > 0)
      policy.map(Constants<Policy>::columns(policy, v, rest), first + v, rest);
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
  const bool stream = beyond_cache<T>(numel) && width % L == 0 && short_of_alignment(policy.output()) == 0;
  const auto parallel = [&](int64_t n, const auto& f) {
    if (numel < kSerial || n == 1)
      f(int64_t{0}, n);
    else
      at::parallel_for(0, n, 1, f);
  };
  parallel(divup(s.C, kChannels), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kChannels; c < std::min(s.C, end * kChannels); ++c) policy.prepare(c);
  });
  policy.table.replicate();
  if constexpr (Policy::kReduces) {
    c10::SmallVector<double, 512> sums(units * 2 * width, 0.0);
    parallel(units, [&](int64_t begin, int64_t end) {
      std::vector<compute_t<T>> acc(2 * width);
      for (int64_t u = begin; u < end; ++u)
        reduce_rows(policy, width, u * piece, std::min(numel, (u + 1) * piece), &sums[u * 2 * width], acc.data());
      stream_fence();
    });
    parallel(divup(s.C, kChannels), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * kChannels, channels = std::min(kChannels, s.C - c0);
        double s1[kChannels] = {}, s2[kChannels] = {};
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
