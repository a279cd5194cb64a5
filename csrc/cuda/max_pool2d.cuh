// max_pool2d: y is the maximum of each window of x; a byte per output has its position in the window, counted row by row.
// Backward is a gather: dx of a pixel is the sum of dy over the windows that hold it and whose position is this pixel, in the
// order of the windows. No atomics, so reruns are bit-equal.
// Kernels of 3x3 and 2x2 at stride 2: a thread has V channels and goes down a column of windows. What two windows share stays in
// registers: forward the maximum of a row, backward dy and position. Any other kernel: a thread has one element.
// Memory traffic: x, y and a byte per output forward; dy, that byte and dx backward.
#pragma once

#include "cuda/conv/conv_geometry.cuh"
#include "pool_geometry.h"

namespace cnnkern::gpu {

constexpr int kPoolThreads = 256;
constexpr int64_t kPoolBusy = 1 << 18;     // threads that keep a GPU busy: columns are cut until there are so many,
constexpr int64_t kPoolRun = 14;           // and into pieces of at most so many windows
constexpr int64_t kPoolMost = 1u << 31;    // threads of a launch stay below, which Divisor asks for
constexpr uint8_t kNoPosition = 0xFF;      // of a window that does not exist

// The work of one launch: per thread a column of `rows` places, in pieces of `run`, the first of which is number
// `first_row` of image `n`; columns are counted from `first_column`.
struct PoolWork {
  PoolGeometry g;
  unsigned total;
  Divisor channels, columns, pieces, down, across;  // the last two are the strides
  int run, rows, first_row, first_column;
  bool pairs;  // two neighbours of a plane may be accessed as one

  PoolWork(const PoolGeometry& g, int lanes, int64_t rows, int64_t columns, int64_t run)
      : g(g), total(0), channels(g.C / lanes), columns(columns), pieces(divup(rows, run)), down(g.sh), across(g.sw),
        run(static_cast<int>(run)), rows(static_cast<int>(rows)), first_row(0), first_column(0), pairs(false) {}
  int64_t threads_of_an_image() const { return int64_t{channels.by} * columns.by * pieces.by; }
  __host__ __device__ int64_t x_image() const { return g.H * g.W * g.C; }
  __host__ __device__ int64_t y_image() const { return g.OH * g.OW * g.C; }
};

// ---- what a thread does ----

template <typename T>
__device__ __forceinline__ T minus_infinity() {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return T(0xFF80, T::from_bits());
  else if constexpr (std::is_same_v<T, c10::Half>)
    return T(0xFC00, T::from_bits());
  else
    return -static_cast<T>(INFINITY);
}

// The maximum so far of V channels and its place; the first of equal ones, or the last NaN, as PyTorch has it.
template <typename S, int V>
struct Largest {
  S value[V];
  int place[V];
  __device__ __forceinline__ void take(int k, S v, int at) {
    const bool larger = v > value[k] || v != v;
    value[k] = larger ? v : value[k];
    place[k] = larger ? at : place[k];
  }
};

// V neighbours by one access; `otherwise` each if they do not exist.
template <typename T, int V>
__device__ __forceinline__ Vector<T, V> vector_or(const T* p, bool there, T otherwise) {
  Vector<T, V> vector;
#pragma unroll
  for (int k = 0; k < V; ++k) vector.lane[k] = otherwise;
  if constexpr (V == 1) {
    if (there) vector.lane[0] = *p;
  } else {
    using Access = typename Bits<V * sizeof(T)>::type;
    Access raw;
    memcpy(&raw, &vector, sizeof(raw));
    if (there) raw = *reinterpret_cast<const Access*>(p);
    memcpy(&vector, &raw, sizeof(raw));
  }
  return vector;
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, V>& vector) {
  if constexpr (V == 1) {
    *p = vector.lane[0];
  } else {
    using Access = typename Bits<V * sizeof(T)>::type;
    Access raw;
    memcpy(&raw, &vector, sizeof(raw));
    if constexpr (sizeof(Access) == 16)
      store_access(reinterpret_cast<Access*>(p), raw);
    else
      *reinterpret_cast<Access*>(p) = raw;
  }
}

// The K pixels of a row of a window that begins in column `left`. row: where column 0 is. F: of planes, the pixel from which
// two may be one access.
template <int K, int V, int F, typename T>
__device__ __forceinline__ void load_taps(const PoolWork& work, const T* row, int left, bool there, Vector<T, V> (&taps)[K]) {
  const int W = static_cast<int>(work.g.W);
  const auto inside = [&](int kx) { return there && left + kx >= 0 && left + kx < W; };
#pragma unroll
  for (int kx = 0; kx < K; ++kx) {
    if (V == 1 && F + 1 < K && (kx == F || kx == F + 1) && work.pairs) continue;
    taps[kx] = vector_or<T, V>(row + int64_t{left + kx} * work.g.C, inside(kx), minus_infinity<T>());
  }
  if constexpr (V == 1 && F + 1 < K) {
    if (!work.pairs) return;
    const Vector<T, 2> pair = vector_or<T, 2>(row + left + F, inside(F), minus_infinity<T>());
    taps[F].lane[0] = pair.lane[0], taps[F + 1].lane[0] = pair.lane[1];
  }
}

// The maxima of a row, whose places are columns. first: the first column that is there.
template <typename T, int K, int V>
__device__ __forceinline__ Largest<compute_t<T>, V> largest_of_row(const Vector<T, V> (&taps)[K], int first) {
  Largest<compute_t<T>, V> row;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    row.value[k] = static_cast<compute_t<T>>(taps[0].lane[k]), row.place[k] = first;
#pragma unroll
    for (int kx = 1; kx < K; ++kx) row.take(k, static_cast<compute_t<T>>(taps[kx].lane[k]), kx);
  }
  return row;
}

template <typename T, int K, int S, int V, int F>
__global__ void __launch_bounds__(kPoolThreads, 3)
    max_pool_columns_kernel(PoolWork work, const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ positions) {
  constexpr int kKept = K > S ? K - S : 0;  // rows that a window shares with the one above
  unsigned at = blockIdx.x * kPoolThreads + threadIdx.x;
  if (at >= work.total) return;
  const int c = work.channels.split(at) * V, ow = work.columns.split(at), begin = work.pieces.split(at) * work.run;
  const int end = static_cast<int>(smaller(begin + work.run, work.rows)), left = ow * S - work.g.pw, first = left < 0 ? -left : 0;
  const int64_t line = work.g.W * work.g.C, y_line = work.g.OW * work.g.C;
  const T* const image = x + at * work.x_image() + c;
  int64_t out = at * work.y_image() + begin * y_line + ow * work.g.C + c;

  Vector<T, V> taps[K - kKept][K];
  Largest<compute_t<T>, V> rows[K];
  const auto load_row = [&](int h, Vector<T, V>(&row)[K]) {
    load_taps<K, V, F>(work, image + h * line, left, h >= 0 && h < work.g.H, row);
  };
#pragma unroll
  for (int r = 0; r < kKept; ++r) {
    load_row(begin * S - work.g.ph + r, taps[0]);
    rows[r] = largest_of_row<T, K, V>(taps[0], first);
  }
  for (int oh = begin; oh < end; ++oh, out += y_line) {
    const int top = oh * S - work.g.ph, above = top < 0 ? -top : 0;
#pragma unroll
    for (int r = kKept; r < K; ++r) load_row(top + r, taps[r - kKept]);
    Vector<T, V> value;
    Vector<uint8_t, V> position;
#pragma unroll
    for (int r = kKept; r < K; ++r) rows[r] = largest_of_row<T, K, V>(taps[r - kKept], first);
    Largest<compute_t<T>, V> largest = rows[0];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      largest.place[k] += K * above;  // of what is there the first, where nothing is larger than minus infinity
#pragma unroll
      for (int r = 1; r < K; ++r) largest.take(k, rows[r].value[k], rows[r].place[k] + K * r);
      value.lane[k] = static_cast<T>(largest.value[k]);
      position.lane[k] = static_cast<uint8_t>(largest.place[k]);
    }
    store_vector<T, V>(y + out, value);
    store_vector<uint8_t, V>(positions + out, position);
#pragma unroll
    for (int r = 0; r < kKept; ++r) rows[r] = rows[r + S];
  }
}

// dy and positions of the neighbouring windows that a group of S columns of pixels is in.
template <typename T, int kWindows, int V>
struct WindowRow {
  Vector<T, V> dy[kWindows];
  Vector<uint8_t, V> position[kWindows];
};

// A group is S x S pixels: of rows S a - ph to S a - ph + S - 1, of columns from S b - pw + F.
template <typename T, int K, int S, int V, int F>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_pool_columns_gradient_kernel(PoolWork work, const T* __restrict__ dy, const uint8_t* __restrict__ positions, T* __restrict__ dx) {
  constexpr int kLeft = (K - 1 - F) / S, kRight = (F + S - 1) / S;  // windows beside window b in which pixels of the group are
  constexpr int kWindows = kLeft + kRight + 1, kAbove = (K - 1) / S;
  unsigned at = blockIdx.x * kPoolThreads + threadIdx.x;
  if (at >= work.total) return;
  const int c = work.channels.split(at) * V, b = work.columns.split(at) + work.first_column, from = work.pieces.split(at) * work.run;
  const int begin = from + work.first_row, end = static_cast<int>(smaller(from + work.run, work.rows)) + work.first_row;
  const int H = static_cast<int>(work.g.H), W = static_cast<int>(work.g.W), OH = static_cast<int>(work.g.OH), OW = static_cast<int>(work.g.OW);
  const int64_t C = work.g.C, y_at = at * work.y_image() + c;
  T* const image = dx + at * work.x_image() + c;

  WindowRow<T, kWindows, V> windows[kAbove + 1];  // the last is the row of windows a
  const auto load_windows = [&](int oh, WindowRow<T, kWindows, V>& row) {
#pragma unroll
    for (int e = 0; e < kWindows; ++e) {
      const int ow = b - kLeft + e;
      const bool there = oh >= 0 && oh < OH && ow >= 0 && ow < OW;
      const int64_t from = y_at + (int64_t{oh} * OW + ow) * C;
      row.dy[e] = vector_or<T, V>(dy + from, there, T(0));
      row.position[e] = vector_or<uint8_t, V>(positions + from, there, kNoPosition);
    }
  };
#pragma unroll
  for (int d = 0; d < kAbove; ++d) load_windows(begin - kAbove + d, windows[d]);
  for (int a = begin; a < end; ++a) {
    load_windows(a, windows[kAbove]);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const int h = a * S + i - work.g.ph, w = b * S + F - work.g.pw;
      Vector<T, V> gradient[S];
#pragma unroll
      for (int j = 0; j < S; ++j)
#pragma unroll
        for (int k = 0; k < V; ++k) {
          compute_t<T> sum = 0;
#pragma unroll
          for (int d = 0; d <= kAbove; ++d)
#pragma unroll
            for (int e = 0; e < kWindows; ++e) {
              const int ky = i + (kAbove - d) * S, kx = F + j + (kLeft - e) * S;  // of the pixel in that window
              if (ky < K && kx >= 0 && kx < K && windows[d].position[e].lane[k] == ky * K + kx)
                sum += static_cast<compute_t<T>>(windows[d].dy[e].lane[k]);
            }
          gradient[j].lane[k] = static_cast<T>(sum);
        }
      if (h < 0 || h >= H) continue;
      T* const to = image + (int64_t{h} * W + w) * C;
      if constexpr (V == 1 && S == 2) {
        if (work.pairs && w >= 0 && w < W) {
          store_vector<T, 2>(to, {gradient[0].lane[0], gradient[1].lane[0]});
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < S; ++j)
        if (w + j >= 0 && w + j < W) store_vector<T, V>(to + j * C, gradient[j]);
    }
#pragma unroll
    for (int d = 0; d < kAbove; ++d) windows[d] = windows[d + 1];
  }
}

// ---- any kernel, an element per thread ----

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_any_kernel(PoolWork work, const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ positions) {
  unsigned at = blockIdx.x * kPoolThreads + threadIdx.x;
  if (at >= work.total) return;
  const int64_t out = at;
  const int c = work.channels.split(at), ow = work.columns.split(at), oh = work.pieces.split(at);
  const PoolGeometry& g = work.g;
  const int top = oh * g.sh - g.ph, left = ow * g.sw - g.pw, above = top < 0 ? -top : 0, before = left < 0 ? -left : 0;
  const T* const window = x + at * work.x_image() + (top * g.W + left) * g.C + c;
  const int below = static_cast<int>(smaller(g.kh, g.H - top)), behind = static_cast<int>(smaller(g.kw, g.W - left));
  Largest<compute_t<T>, 1> largest = {{static_cast<compute_t<T>>(minus_infinity<T>())}, {above * g.kw + before}};
  for (int ky = above; ky < below; ++ky)
    for (int kx = before; kx < behind; ++kx)
      largest.take(0, static_cast<compute_t<T>>(window[(ky * g.W + kx) * g.C]), ky * g.kw + kx);
  y[out] = static_cast<T>(largest.value[0]);
  positions[out] = static_cast<uint8_t>(largest.place[0]);
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_any_gradient_kernel(PoolWork work, const T* __restrict__ dy, const uint8_t* __restrict__ positions, T* __restrict__ dx) {
  unsigned at = blockIdx.x * kPoolThreads + threadIdx.x;
  if (at >= work.total) return;
  const int64_t out = at;
  const int c = work.channels.split(at), w = work.columns.split(at), h = work.pieces.split(at);
  const PoolGeometry& g = work.g;
  const int64_t image = at * work.y_image() + c;
  // The windows along one dimension that a pixel is in, u counted from where the first window begins.
  const auto begin = [](int u, int kernel, const Divisor& stride) { return u < kernel ? 0 : static_cast<int>(stride.quotient(u - kernel)) + 1; };
  const auto end = [](int u, int64_t windows, const Divisor& stride) { return static_cast<int>(smaller(stride.quotient(u) + 1, windows)); };
  const int first = begin(w + g.pw, g.kw, work.across), last = end(w + g.pw, g.OW, work.across);
  const int bottom = end(h + g.ph, g.OH, work.down);
  compute_t<T> sum = 0;
  for (int oh = begin(h + g.ph, g.kh, work.down); oh < bottom; ++oh)
    for (int ow = first; ow < last; ++ow) {
      const int position = (h + g.ph - oh * g.sh) * g.kw + w + g.pw - ow * g.sw;
      const int64_t from = image + (oh * g.OW + ow) * g.C;
      if (positions[from] == position) sum += static_cast<compute_t<T>>(dy[from]);
    }
  dx[out] = static_cast<T>(sum);
}

// ---- launches ----

// Several where threads are too many for one. start(work, image): launches `work.total` threads from that image on.
template <typename Start>
void for_images(PoolWork work, const Start& start) {
  const int64_t each = work.threads_of_an_image(), most = larger(1, (kPoolMost - 1) / each);
  for (int64_t n = 0; n < work.g.N; n += most) {
    work.total = static_cast<unsigned>(smaller(most, work.g.N - n) * each);
    start(work, dim3(static_cast<unsigned>(divup(work.total, kPoolThreads))), n);
  }
}

// How many of `rows` a thread computes.
inline int64_t pool_run(int64_t columns, int64_t rows) {
  const int64_t run = larger(1, smaller(kPoolRun, columns * rows / kPoolBusy));
  return divup(rows, divup(rows, run));
}

// Calls f(lanes, first of a pair) with constants: V channels of a pixel, or one.
template <typename T, typename F>
void with_lanes(const PoolGeometry& g, bool vectors, const F& f) {
  if (vectors) return f(std::integral_constant<int, kVector<T>>{}, std::integral_constant<int, 0>{});
  constexpr std::integral_constant<int, 1> one;
  g.C == 1 && g.pw % 2 == 1 ? f(one, one) : f(one, std::integral_constant<int, 0>{});
}

template <typename T>
bool in_vectors(const PoolGeometry& g, const T* a, const T* b, const uint8_t* positions) {
  return g.C % kVector<T> == 0 && aligned_to_vectors(a) && aligned_to_vectors(b) && reinterpret_cast<uintptr_t>(positions) % kVector<T> == 0;
}

// x: its memory is that of the pixels.
template <typename T>
bool in_pairs(const PoolGeometry& g, const T* x) {
  return g.C == 1 && g.W % 2 == 0 && reinterpret_cast<uintptr_t>(x) % (2 * sizeof(T)) == 0;
}

template <typename T, int K>
void max_pool_columns(const PoolGeometry& g, const T* x, T* y, uint8_t* positions, Stream stream) {
  with_lanes<T>(g, in_vectors(g, x, y, positions), [&](auto lanes, auto first) {
    PoolWork work(g, lanes(), g.OH, g.OW, pool_run(g.N * g.C / lanes() * g.OW, g.OH));
    work.pairs = in_pairs(g, x);
    for_images(work, [&](const PoolWork& some, dim3 grid, int64_t n) {
      launch(max_pool_columns_kernel<T, K, 2, lanes(), first()>, grid, dim3(kPoolThreads), 0, stream, some, x + n * some.x_image(),
             y + n * some.y_image(), positions + n * some.y_image());
    });
  });
}

template <typename T, int K>
void max_pool_columns_gradient(const PoolGeometry& g, const T* dy, const uint8_t* positions, T* dx, Stream stream) {
  with_lanes<T>(g, in_vectors(g, dy, dx, positions), [&](auto lanes, auto first) {
    const int64_t top = g.ph / 2, left = (g.pw - first()) / 2;
    const int64_t rows = (g.H - 1 + g.ph) / 2 - top + 1, columns = (g.W - 1 + g.pw - first()) / 2 - left + 1;
    PoolWork work(g, lanes(), rows, columns, pool_run(g.N * g.C / lanes() * columns, rows));
    work.pairs = in_pairs(g, dx), work.first_row = static_cast<int>(top), work.first_column = static_cast<int>(left);
    for_images(work, [&](const PoolWork& some, dim3 grid, int64_t n) {
      launch(max_pool_columns_gradient_kernel<T, K, 2, lanes(), first()>, grid, dim3(kPoolThreads), 0, stream, some, dy + n * some.y_image(),
             positions + n * some.y_image(), dx + n * some.x_image());
    });
  });
}

template <typename T>
void max_pool2d_forward(const PoolGeometry& g, const T* x, T* y, uint8_t* positions, Stream stream) {
  if (g.square(3, 2)) return max_pool_columns<T, 3>(g, x, y, positions, stream);
  if (g.square(2, 2)) return max_pool_columns<T, 2>(g, x, y, positions, stream);
  for_images(PoolWork(g, 1, g.OH, g.OW, 1), [&](const PoolWork& some, dim3 grid, int64_t n) {
    launch(max_pool_any_kernel<T>, grid, dim3(kPoolThreads), 0, stream, some, x + n * some.x_image(), y + n * some.y_image(),
           positions + n * some.y_image());
  });
}

template <typename T>
void max_pool2d_backward(const PoolGeometry& g, const T* dy, const uint8_t* positions, T* dx, Stream stream) {
  if (g.square(3, 2)) return max_pool_columns_gradient<T, 3>(g, dy, positions, dx, stream);
  if (g.square(2, 2)) return max_pool_columns_gradient<T, 2>(g, dy, positions, dx, stream);
  for_images(PoolWork(g, 1, g.H, g.W, 1), [&](const PoolWork& some, dim3 grid, int64_t n) {
    launch(max_pool_any_gradient_kernel<T>, grid, dim3(kPoolThreads), 0, stream, some, dy + n * some.y_image(),
           positions + n * some.y_image(), dx + n * some.x_image());
  });
}

}  // namespace cnnkern::gpu
