// A tensor of rows of channels (NHWC, 16 bits or float32) as streams of rows of pixels, which blocks read through a ring in shared memory.
// A block has some channels of `tile` neighbouring positions of each row, in image after image; so that narrow images fill
// its 16 or 32 positions, several lie side by side as its *panels*. The stream is one set of panels after another, row by row,
// and a block's part of it may begin and end anywhere. What lies outside an image is zero, which is the padding of a convolution.
#pragma once

#include "cuda/conv/conv_geometry.cuh"

namespace cnnkern::gpu {

constexpr int kOutputs = 8;           // channels of a warp, and of a tensor core's operand
constexpr int kNarrowest = 8;         // positions of a panel
constexpr int64_t kProcessors = 132;  // multiprocessors of the largest GPU
constexpr int64_t kLeastTurns = 16;   // of a block, before there are more of them

// A warp's accesses of a pixel, and pixels of which a block's threads have an access each.
template <typename T>
constexpr int kWarpVectors = kOutputs / kVector<T>;
template <typename T>
constexpr int kRoundPixels = 32 / kWarpVectors<T>;

// From pixel to pixel in shared memory, in bytes: an odd number of accesses, so that eight neighbours lie in different banks.
template <int kVectors>
constexpr int kPitch = 16 * (kVectors | 1);

// The channels of blocks, in accesses of a pixel. Blocks beside each other have `group` accesses: several groups of the
// convolution, or one that is cut into blocks by its inputs and by its outputs.
struct ChannelTiling {
  int64_t tiles;
  int in_splits, out_splits;
  int group, in, out;  // in, out: that a block has

  // `most` accesses a block, which are whole groups.
  static ChannelTiling of_groups(int64_t vectors, int most) { return {divup(vectors, most), 1, 1, most, most, most}; }
  // One group of so many accesses, of which a block reads at most `in` and has at most `out` as its outputs.
  static ChannelTiling of_one(int64_t vectors, int64_t group, int in, int out) {
    const int64_t in_splits = divup(group, in), out_splits = divup(group, out);
    const auto small = [](int64_t n) { return static_cast<int>(n); };
    return {divup(vectors, group) * in_splits * out_splits, small(in_splits), small(out_splits), small(group),
            small(divup(group, in_splits)), small(divup(group, out_splits))};
  }
};

struct RowStream {
  Divisor channel_tiles, tiles, turns;  // blocks beside each other by channels and by positions; turns of a set of panels
  Divisor in_splits, out_splits;        // of ChannelTiling, as are group, in and out
  unsigned total, part;                 // turns of the stream, and of a block
  unsigned images;
  int vectors, group, in, out;  // vectors: accesses of a pixel
  int panel, panels, tile;   // positions of a panel, a power of two; panels; positions of each that are used
  int panel_bits;

  // vectors: accesses of a pixel; positions: of an image's row; turns: of an image; most: positions of a block.
  RowStream(int64_t N, int64_t vectors, int64_t positions, int64_t image_turns, int most, const ChannelTiling& channels, int64_t blocks)
      : channel_tiles(channels.tiles), tiles(1), turns(image_turns), in_splits(channels.in_splits), out_splits(channels.out_splits),
        images(static_cast<unsigned>(N)), vectors(static_cast<int>(vectors)), group(channels.group), in(channels.in), out(channels.out),
        panel(most) {
    const auto sets = [&](int width) { return divup(positions, width) * divup(N, most / width); };
    for (int width = most; width >= kNarrowest; width /= 2)
      if (sets(width) < sets(panel)) panel = width;
    panels = most / panel;
    for (panel_bits = 0; 1 << panel_bits < panel;) ++panel_bits;
    tiles = Divisor(divup(positions, panel));
    tile = static_cast<int>(divup(positions, tiles.by));
    total = static_cast<unsigned>(divup(N, panels) * image_turns);
    const int64_t parts = larger(1, blocks / (int64_t{channel_tiles.by} * tiles.by));
    part = static_cast<unsigned>(larger(divup(total, parts), smaller(kLeastTurns, total)));
  }
  __device__ __forceinline__ int panel_of(int position) const { return position >> panel_bits; }
  __device__ __forceinline__ int in_panel(int position) const { return position & (panel - 1); }
  unsigned parts() const { return tiles.by * static_cast<unsigned>(divup(total, part)); }  // that the blocks of some channels have
  dim3 grid() const { return dim3(channel_tiles.by * parts()); }
};

// Accesses of a pixel.
struct PixelPart {
  int first, count;
};

// A block's part of a stream.
struct StreamPart {
  unsigned index, column, begin, end;  // which of the parts, first position, turns
  PixelPart in, out;
  int in_split;
  __device__ __forceinline__ explicit StreamPart(const RowStream& s) : index(blockIdx.x) {
    unsigned tile = static_cast<unsigned>(s.channel_tiles.split(index));
    in_split = s.in_splits.split(tile);
    const int out_split = s.out_splits.split(tile), first = static_cast<int>(tile) * s.group;
    const auto least = [](int a, int b) { return a < b ? a : b; };
    const int group = least(s.group, s.vectors - first);
    in = {first + in_split * s.in, least(s.in, group - in_split * s.in)};
    out = {first + out_split * s.out, least(s.out, group - out_split * s.out)};
    begin = index;
    column = static_cast<unsigned>(s.tiles.split(begin) * s.tile);
    begin *= s.part;
    end = begin + s.part < s.total ? begin + s.part : s.total;
  }
};

// Where a stream is: which set of panels, and the turn of it.
struct StreamPlace {
  unsigned set;
  int turn;
  __device__ __forceinline__ StreamPlace(const RowStream& s, unsigned at) : set(at) { turn = s.turns.split(set); }
  __device__ __forceinline__ bool next(const RowStream& s) {  // whether another set begins
    if (++turn < static_cast<int>(s.turns.by)) return false;
    turn = 0, ++set;
    return true;
  }
};

// A tensor that is read or written. A panel's first pixel lies `left` before that of its first position.
template <typename T>
struct RowTensor {
  T* data;
  int H, W, left;
  unsigned step;   // accesses of a row
  Divisor pixels;  // of a panel that are copied

  RowTensor(T* data, int64_t H, int64_t W, int64_t left, int vectors, int64_t pixels)
      : data(data), H(static_cast<int>(H)), W(static_cast<int>(W)), left(static_cast<int>(left)), step(static_cast<unsigned>(W * vectors)),
        pixels(pixels) {}
};

constexpr unsigned kNowhere = ~0u;

// What a thread copies of each row: an access each of some pixels. kColumns: pixels from one position to the next; kHalo:
// further positions of a panel; kVectors: room for accesses of a pixel. Pixels of a panel lie by their remainder of division by
// kColumns, so that a tap's are neighbours. Accesses that a block does not have are zero, too.
template <typename T, int kColumns, int kHalo, int kPositions, int kVectors, int kThreads>
struct RowCopy {
  static constexpr int kMost = kColumns * (kPositions + kHalo * (kPositions / kNarrowest));
  static constexpr int kPixels = kThreads / kVectors;  // of a round
  static constexpr int kRounds = static_cast<int>(divup(kMost, kPixels));
  unsigned from[kRounds];
  int to[kRounds];

  // Bytes of a row in shared memory.
  static __host__ __device__ int bytes(const RowStream& s) { return kColumns * s.panels * (s.panel + kHalo) * kPitch<kVectors>; }

  __device__ __forceinline__ void enter(const RowStream& s, const RowTensor<const T>& rows, const PixelPart& accesses, unsigned column,
                                        unsigned set) {
    const int vector = threadIdx.x % kVectors;
    const bool copies = threadIdx.x < kPixels * kVectors;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      unsigned panel = threadIdx.x / kVectors + kPixels * i;
      const int pixel = rows.pixels.split(panel), x = static_cast<int>(column) * kColumns + pixel - rows.left;
      const unsigned image = set * s.panels + panel;
      const bool there = image < s.images && vector < accesses.count && x >= 0 && x < rows.W && pixel < kColumns * (s.tile + kHalo);
      from[i] = there ? image * rows.H * rows.step + x * s.vectors + accesses.first + vector : kNowhere;
      const int place = (kColumns * static_cast<int>(panel) + pixel % kColumns) * (s.panel + kHalo) + pixel / kColumns;
      to[i] = copies && panel < static_cast<unsigned>(s.panels) ? place * kPitch<kVectors> + vector * 16 : -1;
    }
  }

  __device__ __forceinline__ void copy(const RowTensor<const T>& rows, int row, unsigned char* shared) const {
    const bool inside = row >= 0 && row < rows.H;
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
      if (to[i] >= 0) {
        const bool there = inside && from[i] != kNowhere;
        const unsigned at = there ? from[i] + static_cast<unsigned>(row) * rows.step : 0;
        async_copy(shared + to[i], rows.data + size_t{at} * kVector<T>, there);
      }
  }
};

}  // namespace cnnkern::gpu
