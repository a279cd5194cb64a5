// Shared by the kernels that walk down the rows of images (depthwise_ring.cuh, depthwise_ring_sums.cuh): how work is cut into
// blocks, a thread's place in a block, and the copies of rows to shared memory.
#pragma once

#include "cuda/conv/conv_geometry.cuh"

namespace cnnkern::gpu {

constexpr int kRingThreads = 128;    // of a block, at most
constexpr int kRingProcessors = 132;  // of the GPU that work is cut for

// Channels of a lane: a word of shared memory.
template <typename T>
constexpr int kLane = 4 / sizeof(T);

struct RingWork {
  Divisor rows, columns, tiles;  // steps down an image; tiles of columns; tiles of channels
  unsigned items, part;          // rows of all images and tiles of columns, and those of a block
  int lanes, strips, images;     // of a block: along channels, along columns, and how many images
  int N, C, H, W, OH, OW;        // of the tensors that are read (H, W) and written (OH, OW)
  int ph, pw;
  bool flipped;       // filters are flipped
  int odd_h, odd_w;  // RingGradient: 1 where the padding of the convolution is odd
};

// A lane's values from the ring, widened. A shift and a mask widen two bfloat16; nvcc would use three instructions.
template <typename T>
__device__ __forceinline__ void read_lane(const T* p, compute_t<T> (&out)[kLane<T>]) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(p);
    const uint32_t bits[2] = {pair << 16, pair & 0xffff0000u};
    memcpy(out, bits, sizeof(bits));
  } else {
    read<kLane<T>>(p, true, out);
  }
}

// The place of a thread in a block, and its part in copies: 16 bytes of every `step`th pixel of a row of its image.
template <typename T>
struct RingThread {
  int width;               // channels of a pixel in the ring
  int lane, strip, image;  // first channel; numbers in the block
  int chunk, pixel, step;
  __device__ __forceinline__ explicit RingThread(const RingWork& work) : width(work.lanes * kLane<T>) {
    const int slot = threadIdx.x / work.lanes;
    image = slot / work.strips;
    strip = slot % work.strips;
    lane = threadIdx.x % work.lanes * kLane<T>;
    const int of_image = threadIdx.x - image * work.strips * work.lanes, chunks = width / kVector<T>;
    chunk = of_image % chunks * kVector<T>;
    pixel = of_image / chunks;
    step = work.strips * (kVector<T> / kLane<T>);
  }

  // Asks for `pixels` pixels of a row of `size` from `column` on. row: of the image, at its first pixel; there: it exists. If
  // kStep is 2, those at odd places lie behind the others, so that every second is a run.
  template <int kStep>
  __device__ __forceinline__ void copy(const RingWork& work, const T* row, bool there, int column, int size, int pixels, T* stage) const {
    T* to = stage + (image * pixels + pixel % kStep * ((pixels + 1) / 2) + pixel / kStep) * width + chunk;
    const T* from = row + (column + pixel) * work.C + chunk;
    for (int p = pixel; p < pixels; p += step) {
      async_copy(to, from, there && column + p >= 0 && column + p < size);
      to += step / kStep * width;  // `step` is even
      from += step * work.C;
    }
  }
};

// ---- how work is cut ----

// Threads along channels: 32 or 16 while at most an eighth of them have none, or 8.
inline int ring_lanes(int64_t words) {
  for (int lanes = 32; lanes > 8; lanes /= 2)
    if (8 * (divup(words, lanes) * lanes - words) <= words) return lanes;
  return 8;
}

// What is read (H, W) and written (OH, OW) in `rows` by `columns` outputs, or pairs of them.
struct RingShape {
  int64_t H, W, OH, OW, rows, columns;
  int ph, pw;
  bool flipped = false;
  int odd_h = 0, odd_w = 0;
};

// How they are cut into blocks: four to `most` rows each, and as many blocks as a GPU runs at once, or a multiple of that.
// If an image is cut in two, both parts read shared_rows of its rows: a block has whole images if that is no more work.
struct RingCut {
  int lanes, strips, images;
  int64_t tiles, column_tiles, items, part;
  RingCut(int64_t N, int64_t words, int64_t rows, int64_t columns, int outputs, int shared_rows, int blocks, int64_t most = int64_t{1} << 31)
      : lanes(ring_lanes(words)), tiles(divup(words, lanes)) {
    const int64_t slots = kRingThreads / lanes, all = divup(columns, outputs);
    column_tiles = divup(all, slots);
    strips = static_cast<int>(divup(all, column_tiles));
    images = static_cast<int>(smaller(N, slots / strips));
    items = rows * column_tiles * divup(N, images);
    const int64_t at_once = larger(1, kRingProcessors * blocks / tiles);
    part = larger(divup(items, at_once * divup(items, at_once * most)), smaller(4, rows));
    const int64_t whole = divup(part, rows) * rows;
    if (whole <= part + shared_rows && whole <= larger(most, rows)) part = whole;
  }
  int64_t parts() const { return divup(items, part); }
  unsigned blocks() const { return static_cast<unsigned>(tiles * parts()); }
  unsigned threads() const { return static_cast<unsigned>(lanes * strips * images); }
  RingWork work(const ConvGeometry& g, const RingShape& s) const {
    const auto small = [](int64_t n) { return static_cast<int>(n); };
    return {Divisor(s.rows), Divisor(column_tiles), Divisor(tiles), static_cast<unsigned>(items), static_cast<unsigned>(part), lanes, strips,
            images, small(g.N), small(g.C), small(s.H), small(s.W), small(s.OH), small(s.OW), s.ph, s.pw, s.flipped, s.odd_h, s.odd_w};
  }
};

}  // namespace cnnkern::gpu
