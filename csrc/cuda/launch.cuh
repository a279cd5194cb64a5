// How a tensor is cut into blocks, which depends on its shape and alignment alone and not on the GPU, and the launches.
// Where slices or strips share a channel, their sums go to memory, a second kernel adds them in order, a third maps.
#pragma once

#include "cuda/planes.cuh"
#include "cuda/rows.cuh"

namespace cnnkern::gpu {

constexpr int64_t kBlocks = 1024;           // enough for every GPU
constexpr int64_t kRowSumBlocks = 132 * kSumsPerProcessor;  // of sums over rows: as many as run at once on a Hopper
constexpr int64_t kSumRows = 128;           // of a thread at most, whose sums stay in the arithmetic type
constexpr int64_t kOwnerBlocks = 96;        // channels that keep a GPU busy with one block each,
constexpr int64_t kOwnerBytes = 256 << 10;  // while all of them together stay in L2
constexpr int64_t kSmallChannel = 8192;     // elements below which further launches cost more than idle processors

// Adds the sums of a channel's slices or strips.
template <typename P>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(P p, Partial<P::kSums> partial) {
  wait_for_previous();
  let_next_start();
  const int64_t c = blockIdx.x;
  double sums[P::kSums] = {};
  for (int64_t i = threadIdx.x; i < partial.slices; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < P::kSums; ++k) sums[k] += partial.sum(c, i, k);
  }
  block_sum(sums);
  p.finish(c, sums, partial.center(c));
}

// How a tensor is cut. may_own: both sweeps are made, so one block may make them. pointers: what they access, or null;
// vectors begin where those of the last one do, which is what is written, if anything is.
template <typename T>
struct Cut {
  bool by_rows;
  PlaneCut planes{};
  RowCut rows{}, sums{};  // rows as they are mapped, and as they are summed

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
      const int64_t least = static_cast<int64_t>(cut.thread_rows) * kUnroll;  // small tensors want every processor
      const auto strip = [&](int64_t blocks) { return divup(cut.rows, larger(1, smaller(blocks / cut.tiles, cut.rows / least))); };
      sums = cut;
      sums.strip = smaller(strip(kRowSumBlocks), kSumRows * cut.thread_rows);
      cut.strip = strip(kBlocks);
      for (RowCut* c : {&cut, &sums}) c->strips = divup(c->rows, c->strip);
    } else {
      PlaneCut& cut = planes;
      cut.C = s.C, cut.HW = s.HW;
      cut.misaligned = misaligned, cut.aligned = same;
      const auto whole = [&](int lanes) { return same && misaligned % lanes == 0 && s.HW % lanes == 0; };
      cut.halves = sizeof(T) == 2 && !whole(V) && whole(V / 2);
      cut.ragged = !whole(V) && !cut.halves;
      cut.vectors = cut.ragged ? divup(s.HW + V - 1, V) : s.HW / (cut.halves ? V / 2 : V);
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
  template <typename R>
  int64_t workspace() const {
    if (by_rows) return Partial<R::kSums>::doubles(sums.C, sums.strips);
    return planes.owned ? 0 : Partial<R::kSums>::doubles(planes.C, planes.slices);
  }
};

// f(policy, whether planes are ragged) as types.
template <typename P, typename F>
void of_planes(const P& p, const PlaneCut& cut, const F& f) {
  if (cut.ragged) return f(p, std::true_type{});
  if constexpr (sizeof(typename P::Scalar) == 2)
    if (cut.halves) return f(InHalves<P>(p), std::false_type{});
  f(p, std::false_type{});
}

// The second sweep; `behind`: right behind the first one on the stream.
template <typename P>
void map(const P& p, const Cut<typename P::Scalar>& cut, Stream stream, bool behind = false) {
  constexpr int V = kVector<typename P::Scalar>;
  const auto start = [&](auto kernel, int64_t blocks, const auto& policy, const auto& piece) {
    const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
    behind ? launch_next(kernel, grid, block, 0, stream, policy, piece) : launch(kernel, grid, block, 0, stream, policy, piece);
  };
  if (cut.by_rows)
    return start(cut.rows.vector ? map_rows_kernel<P, V> : map_rows_kernel<P, 1>, cut.rows.tiles * cut.rows.strips, p, cut.rows);
  of_planes(p, cut.planes, [&](const auto& policy, auto ragged) {
    using Policy = std::decay_t<decltype(policy)>;
    start(map_planes_kernel<Policy, decltype(ragged)::value>, cut.planes.C * cut.planes.slices, policy, cut.planes);
  });
}

// The first sweep by slices or strips that share a channel. workspace: cut.workspace<R>() doubles.
template <typename R>
void reduce_shared(const R& p, const Cut<typename R::Scalar>& cut, double* workspace, Stream stream) {
  constexpr int V = kVector<typename R::Scalar>;
  const auto partial = cut.by_rows ? Partial<R::kSums>{workspace, cut.sums.C, cut.sums.strips}
                                   : Partial<R::kSums>{workspace, cut.planes.C, cut.planes.slices};
  if (cut.by_rows) {
    const dim3 grid(static_cast<unsigned>(cut.sums.tiles * partial.slices));
    const int sums = R::kSums * cut.sums.columns * (cut.sums.vector ? V : 1) * cut.sums.thread_rows;
    launch(cut.sums.vector ? reduce_rows_kernel<R, V> : reduce_rows_kernel<R, 1>, grid, dim3(kThreads), sizeof(typename R::S) * sums,
           stream, p, cut.sums, partial);
  } else {
    of_planes(p, cut.planes, [&](const auto& policy, auto ragged) {
      using Policy = std::decay_t<decltype(policy)>;
      launch(reduce_planes_kernel<Policy, decltype(ragged)::value>, dim3(static_cast<unsigned>(partial.C * partial.slices)),
             dim3(kThreads), 0, stream, policy, cut.planes, partial);
    });
  }
  launch_next(finish_kernel<R>, dim3(static_cast<unsigned>(partial.C)), dim3(kFinishThreads), 0, stream, p, partial);
}

// The first sweep alone.
template <typename R>
void reduce(const R& p, const Cut<typename R::Scalar>& cut, double* workspace, Stream stream) {
  if (cut.by_rows || !cut.planes.owned) return reduce_shared(p, cut, workspace, stream);
  of_planes(p, cut.planes, [&](const auto& policy, auto ragged) {
    using Policy = std::decay_t<decltype(policy)>;
    launch(own_sums_kernel<Policy, decltype(ragged)::value>, dim3(static_cast<unsigned>(cut.planes.C)), dim3(cut.threads()), 0,
           stream, policy, cut.planes);
  });
}

// Both sweeps.
template <typename P>
void reduce_and_map(const P& p, const Cut<typename P::Scalar>& cut, double* workspace, Stream stream) {
  if constexpr (!P::kWritesWhileReducing)
    if (!cut.by_rows && cut.planes.owned)
      return of_planes(p, cut.planes, [&](const auto& policy, auto ragged) {
        using Policy = std::decay_t<decltype(policy)>;
        launch(own_planes_kernel<Policy, decltype(ragged)::value>, dim3(static_cast<unsigned>(cut.planes.C)), dim3(cut.threads()), 0,
               stream, policy, cut.planes, p.maps());
      });
  const typename P::Reduction& reduction = p;
  reduce_shared(reduction, cut, workspace, stream);
  if constexpr (!P::kWritesWhileReducing)
    if (p.maps()) map(p, cut, stream, /*behind=*/true);
}

}  // namespace cnnkern::gpu
