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

// From pixel to pixel in shared memory, in bytes: eight neighbours lie in different banks.
template <int kVectors>
constexpr int kPitch = 16 * (kVectors + 1);

struct RowStream {
  Divisor channel_tiles, tiles, turns;  // blocks beside each other by channels and by positions; turns of a set of panels
  unsigned total, part;                 // turns of the stream, and of a block
  unsigned images;
  int vectors;               // accesses of a pixel
  int panel, panels, tile;   // positions of a panel, a power of two; panels; positions of each that are used
  int panel_bits;

  // vectors: accesses of a pixel; positions: of an image's row; turns: of an image; most: positions of a block; block_vectors:
  // accesses of a pixel that it has.
  RowStream(int64_t N, int64_t vectors, int64_t positions, int64_t image_turns, int most, int block_vectors, int64_t blocks)
      : channel_tiles(divup(vectors, block_vectors)), tiles(1), turns(image_turns), images(static_cast<unsigned>(N)),
        vectors(static_cast<int>(vectors)), panel(most) {
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

// A block's part of a stream.
struct StreamPart {
  unsigned index, vector, column, begin, end;  // which of the parts, first access of a pixel, first position, turns
  __device__ __forceinline__ StreamPart(const RowStream& s, int block_vectors) : index(blockIdx.x) {
    vector = static_cast<unsigned>(s.channel_tiles.split(index) * block_vectors);
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
// further positions of a panel. Pixels of a panel lie by their remainder of division by kColumns, so that a tap's are neighbours.
template <typename T, int kColumns, int kHalo, int kPositions, int kVectors>
struct RowCopy {
  static constexpr int kMost = kColumns * (kPositions + kHalo * (kPositions / kNarrowest));
  static constexpr int kRounds = static_cast<int>(divup(kMost, kRoundPixels<T>));
  unsigned from[kRounds];
  int to[kRounds];

  // Bytes of a row in shared memory.
  static __host__ __device__ int bytes(const RowStream& s) { return kColumns * s.panels * (s.panel + kHalo) * kPitch<kVectors>; }

  __device__ __forceinline__ void enter(const RowStream& s, const RowTensor<const T>& rows, const StreamPart& part, unsigned set) {
    const unsigned vector = threadIdx.x % kVectors;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      unsigned panel = threadIdx.x / kVectors + kRoundPixels<T> * i;
      const int pixel = rows.pixels.split(panel), x = static_cast<int>(part.column) * kColumns + pixel - rows.left;
      const unsigned image = set * s.panels + panel;
      const bool there = image < s.images && part.vector + vector < static_cast<unsigned>(s.vectors) && x >= 0 && x < rows.W &&
                         pixel < kColumns * (s.tile + kHalo);
      from[i] = there ? image * rows.H * rows.step + x * s.vectors + part.vector + vector : kNowhere;
      const int place = (kColumns * static_cast<int>(panel) + pixel % kColumns) * (s.panel + kHalo) + pixel / kColumns;
      to[i] = panel < static_cast<unsigned>(s.panels) ? place * kPitch<kVectors> + static_cast<int>(vector) * 16 : -1;
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
