// A tensor of rows of channels (NHWC, 16 bits) as a stream of rows of pixels, through a ring in shared memory.
// An *image* here is a column of tiles: `tile` neighbouring positions of an image's rows, from its first row to its last. So that
// narrow images fill the 16 or 32 positions of a block, several lie side by side as its *panels*. The stream of a block is
// one such set of panels after another, and any part of it may be a block's: nothing begins or ends with an image. What lies outside
// an image is zero, which is the padding of a convolution.
#pragma once

#include "cuda/conv_geometry.cuh"

namespace cnnkern::gpu {

constexpr int kPacked = 8;         // channels of 16 bits in one access, and outputs of a tensor core's operand
constexpr int kNarrowest = 8;      // positions of a panel
constexpr unsigned kNowhere = ~0u;

// How many accesses of channels a block has: whole groups of kWidth channels.
template <int kWidth>
constexpr int kColumnsOf = kWidth == 24 ? 6 : 8;

// From pixel to pixel in shared memory, in bytes: eight neighbours lie in different banks.
template <int kVectors>
constexpr int kPitch = 16 * (kVectors + 1);

struct RowStream {
  Divisor channel_tiles, turns, tiles;  // blocks beside each other; turns of a set of panels; tiles of an image's row
  unsigned total, part;                 // turns of the stream, and of a block
  unsigned images;                      // tiles of all images
  int vectors;                          // accesses of a pixel
  int panel, panels, tile;              // positions of a panel, panels, and positions of them that are used

  // positions: of an image's row; turns: of an image; vectors: of a block.
  RowStream(int64_t N, int64_t C, int64_t positions, int64_t turns_, int most, int halo, int block_vectors, int64_t blocks, int64_t least)
      : channel_tiles(divup(C, block_vectors * kPacked)), turns(turns_), tiles(1), vectors(static_cast<int>(C / kPacked)), panel(most) {
    for (int width = most; width >= kNarrowest; width /= 2)
      if (divup(positions, width) * (width + halo) < divup(positions, panel) * (panel + halo)) panel = width;
    panels = most / panel;
    tiles = Divisor(divup(positions, panel));
    tile = static_cast<int>(divup(positions, tiles.by));
    images = static_cast<unsigned>(N * tiles.by);
    total = static_cast<unsigned>(divup(images, panels) * turns_);
    part = static_cast<unsigned>(larger(divup(total, larger(1, blocks / channel_tiles.by)), smaller(least, total)));
  }
  unsigned parts() const { return static_cast<unsigned>(divup(total, part)); }
};

// Where a stream is: the turn of a set of panels, and which set.
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

// A tensor that is read or written: pixel c of a panel is pixel c - left of its tile.
template <typename T>
struct RowTensor {
  T* data;
  int H, W, left;
  Divisor pixels;  // of a panel that are copied
};

// What a thread copies of each row: an access each of some pixels. kColumns: pixels from one position to the next; kHalo:
// further positions of a panel. Pixels of a panel lie by their remainder of division by kColumns, so that a tap's are neighbours.
template <typename T, int kColumns, int kHalo, int kPositions, int kVectors>
struct RowCopy {
  static constexpr int kMost = kColumns * (kPositions + kHalo * (kPositions / kNarrowest));
  static constexpr int kRounds = static_cast<int>(divup(kMost, 32));
  unsigned from[kRounds];
  int to[kRounds];

  // Bytes of a row in shared memory.
  static __host__ __device__ int bytes(const RowStream& s) { return kColumns * s.panels * (s.panel + kHalo) * kPitch<kVectors>; }

  // column: the first access of the block in a pixel.
  __device__ __forceinline__ void enter(const RowStream& s, const RowTensor<const T>& rows, unsigned set, unsigned first) {
    const unsigned vector = threadIdx.x % kVectors;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      unsigned panel = threadIdx.x / kVectors + 32 * i;
      const int column = rows.pixels.split(panel);
      unsigned image = set * s.panels + panel;
      bool there = image < s.images && first + vector < static_cast<unsigned>(s.vectors) && column < kColumns * (s.tile + kHalo);
      const int x = s.tiles.split(image) * s.tile * kColumns + column - rows.left;
      there = there && x >= 0 && x < rows.W;
      from[i] = there ? (image * rows.H * rows.W + x) * s.vectors + first + vector : kNowhere;
      const int pixel = (kColumns * static_cast<int>(panel) + column % kColumns) * (s.panel + kHalo) + column / kColumns;
      to[i] = panel < static_cast<unsigned>(s.panels) ? pixel * kPitch<kVectors> + static_cast<int>(vector) * 16 : -1;
    }
  }

  __device__ __forceinline__ void copy(const RowStream& s, const RowTensor<const T>& rows, int row, unsigned char* shared) const {
    const bool inside = row >= 0 && row < rows.H;
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
      if (to[i] >= 0) {
        const bool there = inside && from[i] != kNowhere;
        const size_t at = there ? size_t{from[i]} + static_cast<unsigned>(row * rows.W) * size_t(s.vectors) : 0;
        async_copy(shared + to[i], rows.data + at * kPacked, there);
      }
  }
};

}  // namespace cnnkern::gpu
