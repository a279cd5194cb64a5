// The gradient of the weight of what grouped_rows.cuh computes: dweight[o, c, tap] is a product over pixels of x, a tap aside, and dy.
// A block has a part of the stream of dy's rows, a warp eight of its channels. Of a group of more than 32 channels it has at most 40
// inputs and 72 outputs. Each row of x is multiplied by the rows of dy that it meets, whose operands stay in registers; the products of
// all taps are accumulators until the block ends. Unused positions are zero in both.
#pragma once

#include "cuda/conv/grouped_rows.cuh"

namespace cnnkern::gpu {

// Each block writes partial sums, which are read again: as many bytes as those of (groups' width / 4) turns.
// So a multiprocessor has two blocks, or three of float32, if these have enough turns, otherwise one.
template <typename T>
constexpr int kSumBlocksOf = sizeof(T) == 4 ? 3 : 2;

// What a kernel is compiled for: kInputs channels of a group, and kOut accesses of a pixel of dy. A wide group is cut into blocks.
template <int kInputs, int kOut, bool kCut>
struct SumWidth {
  static constexpr int inputs = kInputs, out = kOut, in = kCut ? kInputs / 8 : kOut;  // in: accesses of a pixel of x
  static constexpr bool cut = kCut;
};

// Calls f with one.
template <typename T, typename F>
void with_sum_width(const ConvGeometry& g, const F& f) {
  if constexpr (sizeof(T) == 2) {
    if (g.inputs() >= kWide) return g.inputs() <= 48 ? f(SumWidth<24, 6, true>{}) : f(SumWidth<40, 9, true>{});
  }
  if (g.inputs() < kWide) with_width<T>(g, [&](auto width) {
    if constexpr (width() < kWide) f(SumWidth<width(), kReads<width()>, false>{});
  });
}

template <typename T, int kStride, typename Width>
RowStream sums_stream(const ConvGeometry& g) {
  using Turn = ForwardTurn<kStride>;
  const int64_t vectors = g.C / kVector<T>;
  const auto channels = Width::cut ? ChannelTiling::of_one(vectors, g.inputs() / kVector<T>, Width::in, Width::out)
                                   : ChannelTiling::of_groups(vectors, Width::out);
  const auto by = [&](int64_t blocks) { return RowStream(g.N, vectors, g.OW, g.OH + Turn::kRows - 1, 16 * Turn::kTiles, channels, blocks); };
  const RowStream s = by(kSumBlocksOf<T> * kProcessors);
  return s.part < g.inputs() ? by(kProcessors) : s;
}

// Operands of 16 rows each, which are eight channels of a tap's pixels twice: tile j has the `halves` 2 j and 2 j + 1 of a row of taps.
template <int kWidth>
struct SumTiles {
  static constexpr int kChunks = kWidth / 8, kHalves = 3 * kChunks, kCount = (kHalves + 1) / 2;
  static __host__ __device__ constexpr bool whole(int j) { return 2 * j + 1 < kHalves; }
  static __host__ __device__ constexpr int kx(int half) { return half / kChunks; }
  static __host__ __device__ constexpr int chunk(int half) { return half % kChunks; }
};

// A lane's place in the rows of the ring, and what it reads there: operands whose depth is kDeep positions. In 16 bits matrices
// are transposed as they are loaded.
template <typename T, typename Turn, int kIn, int kOut>
struct SumOperands {
  static constexpr int kDeep = 16, kCount = Turn::kTiles;
  int whole[kCount], single[kCount], of_dy;  // operands with two halves, and with one
  float dy_sum[4] = {};

  // group, warp: where the channels of x and of dy begin in a pixel, in bytes; place: of a position in x.
  template <typename Place>
  __device__ __forceinline__ SumOperands(const Place& place, int group, int warp) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kCount; ++m)
      whole[m] = place(16 * m + lane % 8 + lane / 16 * 8) + group, single[m] = place(16 * m + lane % 16) + group;
    of_dy = lane * kPitch<kOut> + warp;
  }

  // b: of all positions; sum_dy adds those of operand m to the sums of dy.
  __device__ __forceinline__ void load_dy(unsigned (&b)[2 * kCount], const unsigned char* rows) {
    load_matrices<2 * kCount, true>(b, rows + of_dy);
  }
  __device__ __forceinline__ void sum_dy(const unsigned (&b)[2 * kCount], int m) {
    const unsigned one = operand<T>(1, 1), ones[4] = {one, one, one, one}, fresh[2] = {b[2 * m], b[2 * m + 1]};
    multiply_add<T>(dy_sum, ones, fresh);
  }

  // first, second: where the halves are, from a position on.
  __device__ __forceinline__ void load_x(unsigned (&a)[4], const unsigned char* rows, int m, int first, int second) const {
    load_matrices<4, true>(a, rows + whole[m] + (threadIdx.x / 8 % 2 == 0 ? first : second));
  }
  __device__ __forceinline__ void load_x(unsigned (&a)[4], const unsigned char* rows, int m, int only) const {
    unsigned low[2];
    load_matrices<2, true>(low, rows + single[m] + only);
    a[0] = low[0], a[1] = 0, a[2] = low[1], a[3] = 0;
  }

  // The sums of dy of the warp's eight outputs.
  __device__ __forceinline__ void write_dy_sums(float* sums, int lane) const {
    const float pair[2] = {dy_sum[0], dy_sum[1]};
    if (lane < 4) write<2>(sums + 2 * lane, pair);
  }
};

// In TF32 a lane has a channel of two neighbouring positions, which are operands' columns or rows i and i + 4: so the 32 lanes
// read from as many banks. dy is summed before it is rounded.
template <typename Turn, int kIn, int kOut>
struct SumOperands<float, Turn, kIn, kOut> {
  static constexpr int kDeep = 8, kCount = 2 * Turn::kTiles;
  int of_x[kCount], of_dy;
  float dy_sum = 0;

  template <typename Place>
  __device__ __forceinline__ SumOperands(const Place& place, int group, int warp) {
    const int lane = threadIdx.x % 32, first = lane % 4 * 2, channel = lane / 4 * static_cast<int>(sizeof(float));
#pragma unroll
    for (int m = 0; m < kCount; ++m) of_x[m] = place(kDeep * m + first) + group + channel;
    of_dy = first * kPitch<kOut> + warp + channel;
  }

  static __device__ __forceinline__ float at(const unsigned char* p) { return *reinterpret_cast<const float*>(p); }

  __device__ __forceinline__ void load_dy(unsigned (&b)[2 * kCount], const unsigned char* rows) {
#pragma unroll
    for (int k = 0; k < 2 * kCount; ++k) {
      const float v = at(rows + of_dy + (k / 2 * kDeep + k % 2) * kPitch<kOut>);
      dy_sum += v;
      b[k] = to_tf32(v);
    }
  }
  __device__ __forceinline__ void sum_dy(const unsigned (&)[2 * kCount], int) {}  // load_dy has summed it

  __device__ __forceinline__ void load_x(unsigned (&a)[4], const unsigned char* rows, int m, int first, int second) const {
    load_x(a, rows, m, first);
    const unsigned char* const p = rows + of_x[m] + second;
    a[1] = to_tf32(at(p)), a[3] = to_tf32(at(p + kPitch<kIn>));
  }
  __device__ __forceinline__ void load_x(unsigned (&a)[4], const unsigned char* rows, int m, int only) const {
    const unsigned char* const p = rows + of_x[m] + only;
    a[0] = to_tf32(at(p)), a[1] = 0, a[2] = to_tf32(at(p + kPitch<kIn>)), a[3] = 0;
  }

  __device__ __forceinline__ void write_dy_sums(float* sums, int lane) const {
    float sum = dy_sum;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane % 4 == 0) sums[lane / 4] = sum;
  }
};

template <typename T, int kStride, typename Width>
__global__ void __launch_bounds__(Width::out* kRoundPixels<T>, Width::out > 8 ? 1 : kSumBlocksOf<T>)
    grouped_rows_sums_kernel(RowStream s, int top, int width, RowTensor<const T> x, RowTensor<const T> dy, PartialSums<float> sums) {
  using Turn = ForwardTurn<kStride>;
  using Tiles = SumTiles<Width::inputs>;
  constexpr int kIn = Width::in, kOut = Width::out, kDepth = kStride == 1 ? 4 : 3, kPositions = 16 * Turn::kTiles;
  using CopyX = RowCopy<T, Turn::kInColumns, Turn::kHalo, kPositions, kIn, kOut * kRoundPixels<T>>;
  using CopyY = RowCopy<T, 1, 0, kPositions, kOut, kOut * kRoundPixels<T>>;
  GPU_DYN_SHARED(unsigned char, shared);
  const StreamPart part(s);
  const unsigned last = static_cast<unsigned>(smaller(part.end + Turn::kRows - 1, s.total));  // rows of x that meet the block's of dy
  const int row_bytes = CopyX::bytes(s), dy_at = Turn::kIn * row_bytes, turn_bytes = dy_at + CopyY::bytes(s);

  CopyX copy_x;
  CopyY copy_y;
  StreamPlace ahead(s, part.begin);
  copy_x.enter(s, x, part.in, part.column, ahead.set), copy_y.enter(s, dy, part.out, part.column, ahead.set);
  int slot_ahead = 0;
  const auto copy_next = [&](unsigned t) {
    unsigned char* const to = shared + slot_ahead * turn_bytes;
#pragma unroll
    for (int i = 0; i < Turn::kIn; ++i) copy_x.copy(x, ahead.turn * Turn::kIn + i - top, to + i * row_bytes);
    copy_y.copy(dy, t < part.end ? ahead.turn : -1, to + dy_at);
    if (ahead.next(s)) copy_x.enter(s, x, part.in, part.column, ahead.set), copy_y.enter(s, dy, part.out, part.column, ahead.set);
    slot_ahead = slot_ahead + 1 == kDepth ? 0 : slot_ahead + 1;
  };
#pragma unroll 1
  for (unsigned k = 0; k + 1 < kDepth; ++k) {
    if (part.begin + k < last) copy_next(part.begin + k);
    async_commit();
  }

  constexpr int kChannels = kOutputs * sizeof(T);  // of a warp, in bytes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = Width::cut ? 0 : warp / Tiles::kChunks * Tiles::kChunks;
  const bool active = warp * kWarpVectors<T> < part.out.count;
  const auto place = [&](int position) {
    return (s.panel_of(position) * Turn::kInColumns * (s.panel + Turn::kHalo) + s.in_panel(position)) * kPitch<kIn>;
  };
  const auto half_at = [&](int half) {
    return Turn::pixel(Tiles::kx(half), s.panel + Turn::kHalo) * kPitch<kIn> + kChannels * Tiles::chunk(half);
  };
  using Operands = SumOperands<T, Turn, kIn, kOut>;
  Operands operands(place, kChannels * group, kChannels * warp);
  float sum[3][Tiles::kCount][4] = {};
  unsigned b[Turn::kRows][2 * Operands::kCount] = {};  // of this row of dy, and of those before

  int slot = 0;
#pragma unroll 1
  for (unsigned t = part.begin; t < last; ++t) {
    async_wait<kDepth - 2>();
    __syncthreads();
    if (t + kDepth - 1 < last) copy_next(t + kDepth - 1);
    async_commit();
    if (active) {
      const unsigned char* const rows = shared + slot * turn_bytes;
#pragma unroll
      for (int r = Turn::kRows - 1; r > 0; --r)
#pragma unroll
        for (int k = 0; k < 2 * Operands::kCount; ++k) b[r][k] = b[r - 1][k];
      operands.load_dy(b[0], rows + dy_at);
#pragma unroll
      for (int m = 0; m < Operands::kCount; ++m) {
        operands.sum_dy(b[0], m);
#pragma unroll
        for (int i = 0; i < Turn::kIn; ++i)
#pragma unroll
          for (int j = 0; j < Tiles::kCount; ++j) {
            const unsigned char* const at = rows + i * row_bytes;
            unsigned a[4];
            if (Tiles::whole(j)) {
              operands.load_x(a, at, m, half_at(2 * j), half_at(2 * j + 1));
            } else {
              operands.load_x(a, at, m, half_at(2 * j));
            }
#pragma unroll
            for (int ky = 0; ky < 3; ++ky)
              if (Turn::out(i, ky) >= 0) {
                const int age = ky / kStride;
                const unsigned met[2] = {b[age][2 * m], b[age][2 * m + 1]};
                multiply_add<T>(sum[ky][j], a, met);
              }
          }
      }
    }
    slot = slot + 1 == kDepth ? 0 : slot + 1;
  }
  if (!active) return;
  const int64_t outputs = (part.out.first + warp * kWarpVectors<T>)*int64_t{kVector<T>};
  if (part.in_split == 0) operands.write_dy_sums(&sums.at(part.index, outputs, sums.taps), lane);
  const int column = lane % 4 * 2, first = Width::cut ? part.in_split * s.in * kVector<T> : 0;
#pragma unroll
  for (int ky = 0; ky < 3; ++ky)
#pragma unroll
    for (int half = 0; half < Tiles::kHalves; ++half) {  // narrower groups, powers of two, lie side by side in the eight channels
      const int input = first + Tiles::chunk(half) * 8 + lane / 4 - (Width::inputs == 8 ? column & -width : 0);
      const float* const values = sum[ky][half / 2] + half % 2 * 2;
      const float pair[2] = {values[0], values[1]};
      if (input >= 0 && input < width && (!Width::cut || Tiles::chunk(half) < part.in.count)) write<2>(&sums.at(part.index, outputs + column, input * kSquare + ky * 3 + Tiles::kx(half)), pair);
    }
}

// Parts of the sums.
template <typename T>
int64_t grouped_rows_parts(const ConvGeometry& g) {
  int64_t parts = 0;
  with_sum_width<T>(g, [&](auto width) {
    using Width = decltype(width);
    parts = (g.sh == 1 ? sums_stream<T, 1, Width>(g) : sums_stream<T, 2, Width>(g)).parts();
  });
  return parts;
}

// sums: channels last.
template <typename T, int kStride>
void sum_grouped_rows(const ConvGeometry& g, const T* dy, const T* x, const PartialSums<float>& sums, Stream stream) {
  using Turn = ForwardTurn<kStride>;
  with_sum_width<T>(g, [&](auto width) {
    using Width = decltype(width);
    constexpr int kPositions = 16 * Turn::kTiles, kDepth = kStride == 1 ? 4 : 3, kThreads = Width::out * kRoundPixels<T>;
    const RowStream s = sums_stream<T, kStride, Width>(g);
    const RowTensor<const T> of_x(x, g.H, g.W, g.pw, s.vectors, Turn::kInColumns * (s.panel + Turn::kHalo));
    const RowTensor<const T> of_dy(dy, g.OH, g.OW, 0, s.vectors, s.panel);
    const size_t turn = Turn::kIn * RowCopy<T, Turn::kInColumns, Turn::kHalo, kPositions, Width::in, kThreads>::bytes(s) +
                        RowCopy<T, 1, 0, kPositions, Width::out, kThreads>::bytes(s);
    launch(grouped_rows_sums_kernel<T, kStride, Width>, s.grid(), dim3(kThreads), kDepth * turn, stream, s, g.ph,
           static_cast<int>(g.inputs()), of_x, of_dy, sums);
  });
}

}  // namespace cnnkern::gpu
