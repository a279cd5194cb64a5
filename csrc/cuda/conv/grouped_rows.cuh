// Convolution 3x3 of rows of channels (NHWC) by groups of several channels, on tensor cores: in 16 bits, or float32 in TF32. A
// block has 64 channels (48 of groups of 24; half as many of float32) of a stream of rows (row_stream.cuh), or one group of more
// than 32 channels, of which it has at most 64 outputs from 80 channels on. A warp has 8 of the outputs at all positions. A block
// reads every row of its input once and multiplies it by the three rows of the kernel: the output rows that it is added to are
// accumulators, and filters are in registers. Groups of 2 and 4 channels are multiplied eight channels by eight, with zeros between
// groups, so that a NaN in one spreads to the others of its eight. Float32 is rounded to TF32 as operands are loaded. Products are
// exact, sums in float.
#pragma once

#include "cuda/conv/grouped_planes.cuh"
#include "cuda/conv/row_stream.cuh"

namespace cnnkern::gpu {

// A turn of the stream, and what tap (ky, kx) of it does: it takes kIn rows of the input and completes kOut rows of the output.
// Forward, and the gradient of the input at stride 1.
template <int kStride, int kRowsOut = 1>
struct ForwardTurn {
  static constexpr int kOut = kRowsOut, kOutColumns = 1;  // rows, and columns of a position
  static constexpr int kIn = kStride * kOut, kInColumns = kStride, kHalo = 3 - kStride;
  static constexpr int kRows = kOut + 3 - kStride;  // of the output, under way
  static constexpr int kTiles = 2;                  // of 16 positions
  static constexpr int kDepth = kIn == 1 ? 6 : 3;   // turns in the ring
  // Which of the rows under way gets tap ky of row i; negative if none does.
  static __host__ __device__ constexpr int out(int i, int ky) { return (i - ky) % kStride == 0 ? (i - ky) / kStride + kRows - kOut : -1; }
  static __host__ __device__ constexpr int out_column(int) { return 0; }
  static __device__ __forceinline__ int pixel(int kx, int half) { return kx % kStride * half + kx / kStride; }
};

// The gradient of the input at stride 2. Row 2 m + ky of dx, before the padding is cut off, has row m of dy.
struct SpreadTurn {
  static constexpr int kIn = 1, kInColumns = 1, kHalo = 1, kOut = 2, kOutColumns = 2, kRows = 3, kTiles = 1, kDepth = 6;
  static __host__ __device__ constexpr int out(int, int ky) { return ky; }
  static __host__ __device__ constexpr int out_column(int kx) { return kx % 2; }
  static __device__ __forceinline__ int pixel(int kx, int) { return 1 - kx / 2; }
};

// Turn t reads rows from kIn t - top, and writes them from kOut t - above.
struct TurnShape {
  int top, above;
};

// Channels in a register of an operand.
template <typename T>
constexpr int kWord = sizeof(unsigned) / sizeof(T);

// Such a register.
template <typename T>
__device__ __forceinline__ unsigned operand(float a, float b) {
  const Vector<T, 2> pair = {{static_cast<T>(a), static_cast<T>(b)}};
  unsigned bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Sixteen positions of 32 bytes of channels.
template <typename T>
__device__ __forceinline__ void load_operand(unsigned (&a)[4], const unsigned char* row) {
  load_matrices(a, row);
  if constexpr (std::is_same_v<T, float>)
#pragma unroll
    for (unsigned& word : a) {
      float v;
      memcpy(&v, &word, sizeof(v));
      word = to_tf32(v);
    }
}

// Filters of a warp's eight outputs as operands: of each tap and 16 bytes of inputs, this lane's four.
template <typename T, int kWidth>
struct WarpFilters {
  static constexpr int kSteps = kWidth / kVector<T>;
  unsigned at[kSquare][kSteps];

  __device__ __forceinline__ void load(const Filters<T>& filters, int64_t output, int64_t input, bool there) {
    const int64_t o = output + threadIdx.x % 32 / 4, before = input + threadIdx.x % 4 * kWord<T> - o / filters.width * filters.width;
#pragma unroll
    for (int tap = 0; tap < kSquare; ++tap)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const auto get = [&](int64_t j) { return there && j >= 0 && j < filters.width ? filters.get(o, static_cast<int>(j), tap) : 0.0f; };
        const int64_t first = before + kVector<T> * step;
        if constexpr (std::is_same_v<T, float>)
          at[tap][step] = to_tf32(get(first));
        else
          at[tap][step] = operand<T>(get(first), get(first + 1));
      }
  }
};

// Where a lane's row of the operands begins in a row of the ring: the position of a tile of 16, and 32 or 16 bytes of channels.
template <typename Turn, int kVectors>
struct OperandPlace {
  int wide[Turn::kTiles], narrow;  // of 32 bytes and of the last 16

  __device__ __forceinline__ OperandPlace(const RowStream& s, int first, int vectors) {
    const int lane = threadIdx.x % 32;
    const auto place = [&](int position, int vector) {
      const int pixel = s.panel_of(position) * Turn::kInColumns * (s.panel + Turn::kHalo) + s.in_panel(position);
      return pixel * kPitch<kVectors> + 16 * vector;
    };
#pragma unroll
    for (int m = 0; m < Turn::kTiles; ++m) wide[m] = place(16 * m + lane % 16, first + lane / 16);
    narrow = place(lane % (16 * Turn::kTiles), first + vectors - 1);
  }
};

template <typename Turn>
using Accumulators = float[Turn::kRows][Turn::kOutColumns][Turn::kTiles][4];

// Adds the products of a turn's rows. half: pixels of a panel of each remainder.
template <typename T, typename Turn, int kWidth, int kVectors>
__device__ __forceinline__ void add_turn(const unsigned char* rows, int row_bytes, int half, const OperandPlace<Turn, kVectors>& place,
                                         const WarpFilters<T, kWidth>& filters, Accumulators<Turn>& sums) {
  constexpr int kSteps = WarpFilters<T, kWidth>::kSteps;
#pragma unroll
  for (int i = 0; i < Turn::kIn; ++i)
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      const unsigned char* const at = rows + i * row_bytes + Turn::pixel(kx, half) * kPitch<kVectors>;
      const auto each_tap = [&](const auto& f) {
#pragma unroll
        for (int ky = 0; ky < 3; ++ky)
          if (Turn::out(i, ky) >= 0) f(filters.at[ky * 3 + kx], sums[Turn::out(i, ky)][Turn::out_column(kx)]);
      };
#pragma unroll
      for (int step = 0; step < kSteps / 2; ++step)
#pragma unroll
        for (int m = 0; m < Turn::kTiles; ++m) {
          unsigned a[4];
          load_operand<T>(a, at + place.wide[m] + 32 * step);
          each_tap([&](const auto& filter, auto& sum) {
            const unsigned b[2] = {filter[2 * step], filter[2 * step + 1]};
            multiply_add<T>(sum[m], a, b);
          });
        }
      if constexpr (kSteps % 2 != 0) {
        unsigned a[2 * Turn::kTiles];
        load_matrices(a, at + place.narrow);
        each_tap([&](const auto& filter, auto& sum) {
          const unsigned b[1] = {filter[kSteps - 1]};
#pragma unroll
          for (int m = 0; m < Turn::kTiles; ++m) {
            const unsigned tile[2] = {a[2 * m], a[2 * m + 1]};
            multiply_add<T>(sum[m], tile, b);
          }
        });
      }
    }
}

// What a thread writes of each turn, an access each of some pixels of the rows that lie in shared memory.
template <typename T, typename Turn, int kVectors>
struct RowStore {
  static constexpr int kPositions = 16 * Turn::kTiles;
  static constexpr int kPixels = kPositions * Turn::kOutColumns;  // of a row
  static constexpr int kRounds = Turn::kOut * kPixels / kRoundPixels<T>;
  static constexpr int kBytes = Turn::kOut * kPixels * kPitch<kVectors>;
  unsigned to[kRounds];

  static __device__ __forceinline__ int pixel(int i) { return threadIdx.x / kVectors + kRoundPixels<T> * i; }

  __device__ __forceinline__ void enter(const RowStream& s, const RowTensor<T>& rows, const StreamPart& part, unsigned set) {
    const int vector = threadIdx.x % kVectors;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int column = pixel(i) % kPixels, position = column / Turn::kOutColumns, panel = s.panel_of(position), in_panel = s.in_panel(position);
      const int x = (static_cast<int>(part.column) + in_panel) * Turn::kOutColumns + column % Turn::kOutColumns - rows.left;
      const unsigned image = set * s.panels + panel;
      const bool there = image < s.images && vector < part.out.count && in_panel < s.tile && x >= 0 && x < rows.W;
      to[i] = there ? image * rows.H * rows.step + x * s.vectors + part.out.first + vector : kNowhere;
    }
  }

  __device__ __forceinline__ void store(const RowTensor<T>& rows, int row, const unsigned char* shared) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int y = row + pixel(i) / kPixels;
      if (to[i] == kNowhere || y < 0 || y >= rows.H) continue;
      const uint4 v = *reinterpret_cast<const uint4*>(shared + pixel(i) * kPitch<kVectors> + threadIdx.x % kVectors * 16);
      store_access(reinterpret_cast<uint4*>(rows.data + size_t{to[i] + static_cast<unsigned>(y) * rows.step} * kVector<T>), v);
    }
  }
};

// Kernels are compiled for groups of kWidth channels; those that lack in narrower ones are zero. From kWide on a block has one group.
constexpr int kWide = 40;

// Room for a pixel's accesses that a block reads and that it writes; blocks that share a multiprocessor; turns in the ring.
template <int kWidth>
constexpr int kReads = kWidth == 24 ? 6 : kWidth < kWide ? 8 : kWidth / 8;
template <int kWidth>
constexpr int kWrites = kReads<kWidth> > 9 ? 8 : kReads<kWidth>;
template <typename T, int kWidth>
constexpr int kBlocksOf = sizeof(T) == 4 || kWidth <= 8 ? 3 : kWidth < 72 ? 2 : 1;
template <typename Turn, int kWidth>
constexpr int kDepthOf = kWidth > 72 && Turn::kInColumns == 2 ? 2 : Turn::kDepth;  // that fit in 99 KB

// The first of the accesses that hold the inputs of a warp's outputs, in a pixel.
template <typename T, int kWidth>
__device__ __forceinline__ int group_of_warp(int warp) {
  return kWidth < kWide ? warp / (kWidth / kOutputs) * (kWidth / kVector<T>) : 0;
}

template <typename T, typename Turn, int kWidth>
__global__ void __launch_bounds__(kWrites<kWidth>* kRoundPixels<T>, kBlocksOf<T, kWidth>)
    grouped_rows_kernel(RowStream s, TurnShape shape, RowTensor<const T> x, Filters<T> filters, const T* __restrict__ bias, RowTensor<T> y) {
  constexpr int kIn = kReads<kWidth>, kOut = kWrites<kWidth>, kWarm = (Turn::kRows - 1) / Turn::kOut, kDepth = kDepthOf<Turn, kWidth>;
  using Copy = RowCopy<T, Turn::kInColumns, Turn::kHalo, 16 * Turn::kTiles, kIn, kOut * kRoundPixels<T>>;
  using Store = RowStore<T, Turn, kOut>;
  GPU_DYN_SHARED(unsigned char, shared);
  const StreamPart part(s);
  StreamPlace finished(s, part.begin);
  const unsigned warm = part.begin - static_cast<unsigned>(smaller(kWarm, finished.turn));  // outputs of a part have rows before it
  const int row_bytes = Copy::bytes(s), turn_bytes = Turn::kIn * row_bytes;
  unsigned char* const done = shared + kDepth * turn_bytes;

  Copy copy;
  StreamPlace ahead(s, warm);
  copy.enter(s, x, part.in, part.column, ahead.set);
  int slot_ahead = 0;
  const auto copy_next = [&] {
#pragma unroll
    for (int i = 0; i < Turn::kIn; ++i)
      copy.copy(x, ahead.turn * Turn::kIn + i - shape.top, shared + slot_ahead * turn_bytes + i * row_bytes);
    if (ahead.next(s)) copy.enter(s, x, part.in, part.column, ahead.set);
    slot_ahead = slot_ahead + 1 == kDepth ? 0 : slot_ahead + 1;
  };
#pragma unroll 1
  for (unsigned k = 0; k + 1 < kDepth; ++k) {
    if (warm + k < part.end) copy_next();
    async_commit();
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = group_of_warp<T, kWidth>(warp);
  const int64_t output = (part.out.first + warp * kWarpVectors<T>)*int64_t{kVector<T>};
  const bool active = warp * kWarpVectors<T> < part.out.count;
  WarpFilters<T, kWidth> b;
  b.load(filters, output, (part.in.first + group) * int64_t{kVector<T>}, active);
  float start[2] = {0, 0};
  if (bias != nullptr && active)
#pragma unroll
    for (int k = 0; k < 2; ++k) start[k] = static_cast<float>(bias[output + lane % 4 * 2 + k]);
  const OperandPlace<Turn, kIn> place(s, group, kWidth / kVector<T>);
  Accumulators<Turn> sums;
  const auto begin_rows = [&](int from) {
#pragma unroll
    for (int r = 0; r < Turn::kRows; ++r)
      if (r >= from)
#pragma unroll
        for (int c = 0; c < Turn::kOutColumns; ++c)
#pragma unroll
          for (int m = 0; m < Turn::kTiles; ++m)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[r][c][m][k] = start[k % 2];
  };
  begin_rows(0);

  Store store;
  store.enter(s, y, part, finished.set);
  int slot = 0;
#pragma unroll 1
  for (unsigned t = warm; t <= part.end; ++t) {
    async_wait<kDepth - 2>();
    __syncthreads();
    if (t + kDepth - 1 < part.end) copy_next();
    async_commit();
    if (t > part.begin) {  // what the last turn completed
      store.store(y, finished.turn * Turn::kOut - shape.above, done + (t - 1) % 2 * Store::kBytes);
      if (finished.next(s)) store.enter(s, y, part, finished.set);
    }
    if (t == part.end) break;
    if (active) {
      add_turn<T, Turn, kWidth, kIn>(shared + slot * turn_bytes, row_bytes, s.panel + Turn::kHalo, place, b, sums);
#pragma unroll
      for (int r = 0; r < Turn::kOut; ++r)
#pragma unroll
        for (int c = 0; c < Turn::kOutColumns; ++c)
#pragma unroll
          for (int m = 0; m < Turn::kTiles; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const int pixel = (r * Store::kPositions + 16 * m + 8 * k + lane / 4) * Turn::kOutColumns + c;
              T* const to = reinterpret_cast<T*>(done + t % 2 * Store::kBytes + pixel * kPitch<kOut>) + warp * kOutputs + lane % 4 * 2;
              const float pair[2] = {sums[r][c][m][2 * k], sums[r][c][m][2 * k + 1]};
              write<2>(to, pair);
            }
#pragma unroll
      for (int r = 0; r + Turn::kOut < Turn::kRows; ++r)
#pragma unroll
        for (int c = 0; c < Turn::kOutColumns; ++c)
#pragma unroll
          for (int m = 0; m < Turn::kTiles; ++m)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[r][c][m][k] = sums[r + Turn::kOut][c][m][k];
      begin_rows(Turn::kRows - Turn::kOut);
    }
    slot = slot + 1 == kDepth ? 0 : slot + 1;
  }
}

// Channels of the widest groups that the kernels compute.
constexpr int64_t kWidest = 128;

// What the kernels compute, of tensors that are aligned to vectors: in 16 bits, or in float32 where TF32 is allowed.
inline bool grouped_rows_take(const ConvGeometry& g, bool float32) {
  const int64_t width = g.inputs();
  const bool narrow = width == 2 || width == 4 || width == 8 || width == 16 || width == 24;
  const bool wide = !float32 && (width == 32 || (width >= kWide && width <= kWidest && width % kOutputs == 0));
  return g.rows && g.square() && g.kh == 3 && (narrow || wide) && g.outputs() == width && g.C % kOutputs == 0 && g.ph <= 2 && g.pw <= 2;
}

// Calls f with the width of groups that a kernel is compiled for.
template <typename T, typename F>
void with_width(const ConvGeometry& g, const F& f) {
  if (g.inputs() <= 8) return f(std::integral_constant<int, 8>{});
  if (g.inputs() == 16) return f(std::integral_constant<int, 16>{});
  if (g.inputs() == 24) return f(std::integral_constant<int, 24>{});
  if constexpr (sizeof(T) == 2) {
    if (g.inputs() == 32) return f(std::integral_constant<int, 32>{});
    if (g.inputs() <= 48) return f(std::integral_constant<int, 48>{});
    if (g.inputs() <= 56) return f(std::integral_constant<int, 56>{});
    if (g.inputs() <= 72) return f(std::integral_constant<int, 72>{});
    f(std::integral_constant<int, 128>{});
  }
}

// A plane of images that is read, or written.
template <typename T>
struct ImageRows {
  T* data;
  int64_t H, W;
};

// Two rows a turn take half as many barriers, and more registers than three blocks of the narrowest groups leave: 2 to 12 % faster
// for the others on an H100, in 16 bits at stride 1.
template <typename T, int kStride, int kWidth>
using ForwardTurnOf = ForwardTurn<kStride, kStride == 1 && sizeof(T) == 2 && (kWidth > 8) ? 2 : 1>;

template <typename T, typename Turn, int kWidth>
void stream_rows(const ConvGeometry& g, const ImageRows<const T>& x, const ImageRows<T>& y, TurnShape shape, int64_t left, int64_t y_left,
                 int64_t turns, int64_t positions, const Filters<T>& filters, const T* bias, Stream stream) {
  constexpr int kIn = kReads<kWidth>, kOut = kWrites<kWidth>, kPositions = 16 * Turn::kTiles, kThreads = kOut * kRoundPixels<T>;
  const int64_t vectors = g.C / kVector<T>;
  const auto channels = kWidth < kWide ? ChannelTiling::of_groups(vectors, kIn) : ChannelTiling::of_one(vectors, g.inputs() / kVector<T>, kIn, kOut);
  const RowStream s(g.N, vectors, positions, turns, kPositions, channels, kProcessors * kBlocksOf<T, kWidth>);
  const RowTensor<const T> from(x.data, x.H, x.W, left, s.vectors, Turn::kInColumns * (s.tile + Turn::kHalo));
  const RowTensor<T> to(y.data, y.H, y.W, y_left, s.vectors, 1);
  const int row_bytes = RowCopy<T, Turn::kInColumns, Turn::kHalo, kPositions, kIn, kThreads>::bytes(s);
  const size_t shared = kDepthOf<Turn, kWidth> * Turn::kIn * row_bytes + 2 * RowStore<T, Turn, kOut>::kBytes;
  launch(grouped_rows_kernel<T, Turn, kWidth>, s.grid(), dim3(kThreads), shared, stream, s, shape, from, filters, bias, to);
}

// y from x, of g's sizes.
template <typename T, int kStride>
void convolve_grouped_rows(const ConvGeometry& g, const T* x, const Filters<T>& filters, const T* bias, T* y, Stream stream) {
  with_width<T>(g, [&](auto width) {
    using Turn = ForwardTurnOf<T, kStride, width()>;
    constexpr int kUnderWay = Turn::kRows - Turn::kOut;
    stream_rows<T, Turn, width()>(g, {x, g.H, g.W}, {y, g.OH, g.OW}, {g.ph, kUnderWay}, g.pw, 0, divup(g.OH + kUnderWay, Turn::kOut), g.OW, filters,
                                  bias, stream);
  });
}

// dx from dy. At stride 1 filters are flipped.
template <typename T, int kStride>
void grouped_rows_gradient(const ConvGeometry& g, const T* dy, const Filters<T>& filters, T* dx, Stream stream) {
  constexpr const T* kNoBias = nullptr;
  const ImageRows<const T> from = {dy, g.OH, g.OW};
  const ImageRows<T> to = {dx, g.H, g.W};
  with_width<T>(g, [&](auto width) {
    if constexpr (kStride == 1) {
      using Turn = ForwardTurnOf<T, 1, width()>;
      stream_rows<T, Turn, width()>(g, from, to, {2 - g.ph, 2}, 2 - g.pw, 0, divup(g.H + 2, Turn::kOut), g.W, filters, kNoBias, stream);
    } else {
      stream_rows<T, SpreadTurn, width()>(g, from, to, {0, g.ph}, 1, g.pw, divup(g.H + g.ph, 2), divup(g.W + g.pw, 2), filters, kNoBias, stream);
    }
  });
}

}  // namespace cnnkern::gpu
