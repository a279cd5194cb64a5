// Grouped convolution in tiles, of images in either memory layout: forward and backward.
//
// A block of channels of one image is copied into planes of float vectors of channels, padding included, convolved
// there and copied out (conv_tile.h, conv_kernels.h), so both memory layouts and all dtypes run the same kernels. The
// backward pass packs dy once for dx and dweight. Of a volume, as many frames are kept as the kernel has, so that each is packed
// once; a frame's part of the sums is one image's convolution. Traffic in tensors read or written: 2 forward, 3 backward. Small depthwise
// kernels are convolved where they lie in channels_last (conv_in_place.h).
// The gradient of the weight is summed in float over a tile, over the tiles of a chunk of images, and in double over
// chunks, in their order; chunks depend on the shape alone, so results do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/conv/conv_choice.h"
#include "cpu/conv/prologue.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// Planes of a narrow block: in channels_last as many as whole cache lines have.
template <typename T>
int64_t narrow_planes(bool channels_last) {
  return channels_last ? std::max<int64_t>(64 / (kPlane * sizeof(T)), 1) : 1;
}

// How many tiles the rows of an image are cut into: so that a tile's scratch stays in cache, and threads have enough to do.
inline int64_t count_tiles(int64_t rows, int64_t row_bytes, int64_t units, int64_t kernel) {
  const int64_t for_cache = divup(rows * row_bytes, kTileBytes), for_threads = divup(kUnits / 4, std::max<int64_t>(units, 1));
  const int64_t most = std::max<int64_t>(1, rows / std::max<int64_t>(kernel, 4));  // what tiles share is packed twice
  return std::clamp<int64_t>(std::max(for_cache, for_threads), 1, most);
}

// Whether a block's results can be stored where they belong as they are computed: whole vectors of channels in float.
template <typename T>
bool stores_in_place(const Image<T>& y, const Blocks& blocks, int64_t block) {
  return std::is_same_v<T, float> && y.channels_last && (block + 1) * blocks.channels <= y.C && blocks.channels % kPlane == 0;
}

// Where that is.
template <typename T>
float* in_image(const Image<T>& y, int64_t n, int64_t c, int64_t h, int64_t frame) {
  if constexpr (std::is_same_v<T, float>) return y.at(n, c, h, frame);
  return nullptr;
}

// Adds the pixels of a plane's rows, `pitch` pixels apart, to a vector.
inline void add_pixels(const float* plane, int64_t rows, int64_t columns, int64_t pitch, float* to) {
  using V = Vec<float>;
  V sum(0);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < columns; ++j) sum = sum + V::loadu(plane + (row * pitch + j) * kPlane);
  (V::loadu(to) + sum).store(to);
}

template <typename T>
void forward(const Image<const T>& x, const Prologue<T>* prologue, const T* weight, const T* bias, const Image<T>& y,
             const Geometry& g) {
  const Blocks blocks(g, narrow_planes<T>(x.channels_last));
  const int64_t count = blocks.count();
  const int64_t cols = (g.OW - 1) * g.stride + g.kw;
  const bool stream = beyond_cache(y.data, g.N * g.C * g.OT * g.OH * g.OW * sizeof(T));
  const int64_t tiles = count_tiles(g.OH, blocks.planes * (g.kt * g.stride * cols + g.OW) * kPlane * 4, g.N * count, g.kh);
  // Weights, then the bias of a block, one value per lane of its planes.
  const int64_t block_floats = blocks.weights() + blocks.planes * kPlane + kPlane;
  std::unique_ptr<float[]> packed(new float[count * block_floats]);
  at::parallel_for(0, count, divup(16384, block_floats), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* p = &packed[b * block_floats];
      pack_weights(weight, blocks, b, /*of_input=*/false, p);
      const int64_t channels = std::min(blocks.channels, g.C - b * blocks.channels);
      for (int64_t c = 0; c < blocks.planes * kPlane + kPlane; ++c)
        p[blocks.weights() + c] = bias != nullptr && c < channels ? static_cast<float>(bias[b * blocks.channels + c]) : 0.0f;
    }
  });
  const bool whole_lines = y.C % kPlane == 0 && short_of_alignment(y.data) == 0 && g.lanes() == kPlane;
  const auto unit = [&](int64_t n, int64_t b, int64_t t) {
    const auto [begin, end] = tile_rows(g.OH, tiles, t);
    const Window window{begin * g.stride - g.ph, (end - begin - 1) * g.stride + g.kh, -g.pw, cols};
    const bool in_place = stores_in_place(y, blocks, b);
    const int64_t plane = window.rows * cols * kPlane, out_plane = (end - begin) * g.OW * kPlane;
    float* frames = scratch(blocks.planes * (g.kt * plane + out_plane) + out_plane);
    float* out = frames + g.kt * blocks.planes * plane;
    const auto kept = [&](int64_t frame) { return frames + frame % g.kt * blocks.planes * plane; };
    for (int64_t out_frame = 0, next = 0; out_frame < g.OT; ++out_frame) {
      const auto [first, last] = g.inputs_of(out_frame);
      for (next = std::max(next, first); next < last; ++next)
        for (int64_t p = 0; p < blocks.planes; ++p)
          pack_through(prologue, x, n, next, blocks.first(b, p), blocks.valid(b, p), window, kept(next) + p * plane);
      for (int64_t part = 0; part < blocks.parts(); ++part) {
        const int64_t lane = blocks.lane(part), group = blocks.group(part);
        const float* const weights = &packed[b * block_floats + part * blocks.part_weights()];
        OutputPlane outputs{.in = nullptr,
                            .in_row = g.stride * cols * kPlane,
                            .in_pitch = cols * kPlane,
                            .weight = nullptr,
                            .kernel_rows = g.kh,
                            .taps = g.kw,
                            .bias = &packed[b * block_floats + blocks.weights() + lane],
                            .out = out + lane / kPlane * out_plane + lane % kPlane,
                            .out_row = g.OW * kPlane,
                            .out_column = kPlane,
                            .rows = end - begin,
                            .columns = g.OW,
                            .first_row = -window.row,
                            .last_row = g.H - window.row,
                            .row_step = g.stride,
                            .stream = false};
        for (int64_t frame = first; frame < last; ++frame) {
          outputs.in = kept(frame) + group / kPlane * plane + group % kPlane;
          outputs.weight = weights + (frame - out_frame * g.stride_t + g.pt) * g.frame_weights();
          if (in_place && frame + 1 == last)
            outputs.store(in_image(y, n, blocks.first(b, 0) + lane, begin, out_frame), g.OW * y.C, y.C, stream && whole_lines);
          sums(g, outputs, g.stride, plane);
          outputs.add();
        }
      }
      for (int64_t p = 0; p < blocks.planes && !in_place; ++p)
        unpack(out + p * out_plane, y, n, out_frame, blocks.first(b, p), blocks.valid(b, p), begin, end - begin, stream,
               out + blocks.planes * out_plane);
    }
  };
  at::parallel_for(0, g.N * count * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      if (x.channels_last)  // blocks of the same pixels one after another: their cache lines are neighbours
        unit(u / (count * tiles), u % count, u / count % tiles);
      else
        unit(u / (count * tiles), u / tiles % count, u % tiles);
    }
    stream_fence();
  });
}

template <typename T>
void backward(const Image<const T>& dy, const Image<const T>& x, const Prologue<T>* prologue, const T* weight,
              const Gradients<T>& grads, const Geometry& g) {
  const Blocks blocks(g, narrow_planes<T>(x.channels_last));
  const bool dx = grads.dx.data != nullptr, dweight = grads.dweight.defined(), dbias = grads.dbias.defined();
  const int64_t count = blocks.count(), s = g.stride, L = g.lanes();
  const bool stream = beyond_cache(grads.dx.data, g.N * g.C * g.T * g.H * g.W * sizeof(T));
  // Columns of dy that a tile holds: those that dx needs, and all for dweight.
  const int64_t dy_col = std::min<int64_t>(g.pw / s - divup(g.kw, s) + 1, 0);
  const int64_t dy_cols = std::max((g.W - 1 + g.pw) / s + 1, g.OW) - dy_col, x_cols = (g.OW - 1) * s + g.kw;
  const int64_t row_bytes = blocks.planes * 4 * kPlane * (g.kt * dy_cols + dweight * s * x_cols + dx * s * g.W);
  const int64_t tiles = std::min(count_tiles(g.OH, row_bytes, g.N * count, g.kh), g.H);
  const int64_t items = g.N * tiles, chunks = std::clamp<int64_t>(divup(kUnits, count), 1, items);
  const int64_t block_floats = blocks.weights() + blocks.planes * kPlane;
  std::unique_ptr<float[]> packed(new float[dx ? count * blocks.weights() : 0]);
  if (dx)
    at::parallel_for(0, count, divup(16384, blocks.weights()), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) pack_weights(weight, blocks, b, /*of_input=*/true, &packed[b * blocks.weights()]);
    });
  const float zeros[kPlane] = {};
  std::unique_ptr<float[]> partial(new float[dweight || dbias ? count * chunks * block_floats : 0]);

  const bool whole_lines = g.C % kPlane == 0 && short_of_alignment(grads.dx.data) == 0 && L == kPlane;
  const auto unit = [&](int64_t b, int64_t n, int64_t t, float* sums_of_weight) {
    const auto [dy_begin, dy_end] = tile_rows(g.OH, tiles, t);
    const auto [begin, end] = tile_rows(g.H, tiles, t);
    int64_t lo = dy_begin, hi = dy_end;
    if (dx) {
      lo = std::min(lo, (begin + g.ph) / s - divup(g.kh, s) + 1);
      hi = std::max(hi, (end - 1 + g.ph) / s + 1);
    }
    const Window dy_window{lo, hi - lo, dy_col, dy_cols};
    const Window x_window{dy_begin * s - g.ph, (dy_end - dy_begin - 1) * s + g.kh, -g.pw, x_cols};
    const bool in_place = dx && stores_in_place(grads.dx, blocks, b);
    const int64_t dy_plane = dy_window.rows * dy_cols * kPlane, x_plane = x_window.rows * x_cols * kPlane;
    const int64_t dx_plane = (end - begin) * g.W * kPlane;
    float* frames = scratch(blocks.planes * (g.kt * dy_plane + (dweight ? x_plane : 0) + (dx ? dx_plane : 0)) + (dx ? dx_plane : 0));
    float* x_at = frames + g.kt * blocks.planes * dy_plane;
    float* dx_at = x_at + (dweight ? blocks.planes * x_plane : 0);
    const auto kept = [&](int64_t frame) { return frames + frame % g.kt * blocks.planes * dy_plane; };
    const int64_t own = ((dy_begin - lo) * dy_cols - dy_col) * kPlane;  // where the tile's own rows of a plane of dy begin
    for (int64_t in_frame = 0, next = 0; in_frame < g.T; ++in_frame) {
      const auto [first, last] = g.outputs_of(in_frame);
      for (; next < last; ++next)
        for (int64_t p = 0; p < blocks.planes; ++p) {
          float* const plane = kept(next) + p * dy_plane;
          pack(dy, n, next, blocks.first(b, p), blocks.valid(b, p), dy_window, plane);
          if (dbias) add_pixels(plane + own, dy_end - dy_begin, g.OW, dy_cols, sums_of_weight + blocks.weights() + p * kPlane);
        }
      for (int64_t p = 0; p < blocks.planes && dweight && first < last; ++p)
        pack_through(prologue, x, n, in_frame, blocks.first(b, p), blocks.valid(b, p), x_window, x_at + p * x_plane);
      for (int64_t part = 0; part < blocks.parts(); ++part) {
        const int64_t lane = blocks.lane(part), group = blocks.group(part);
        const auto weights_of = [&](int64_t frame) { return (in_frame - frame * g.stride_t + g.pt) * g.frame_weights(); };
        int64_t of_residue = part * blocks.part_weights();
        for (int64_t m = 0; dx && m < s * s; ++m) {
          const Residue rows(m / s, s, g.kh), columns(m % s, s, g.kw);
          const int64_t row = rows.first(begin, g.ph), column = columns.first(0, g.pw);
          const int64_t in_row = (row + g.ph) / s - rows.count + 1 - lo, in_col = (column + g.pw) / s - columns.count + 1 - dy_col;
          const auto at = [&](float* to, int64_t pixel) { return to + ((row - begin) * g.W + column) * pixel; };
          const int64_t from = group / kPlane * dy_plane + group % kPlane + (in_row * dy_cols + in_col) * kPlane;
          OutputPlane outputs{.in = kept(0) + from,
                              .in_row = dy_cols * kPlane,
                              .in_pitch = dy_cols * kPlane,
                              .weight = zeros,
                              .kernel_rows = 0,
                              .taps = columns.count,
                              .bias = zeros,
                              .out = at(dx_at + lane / kPlane * dx_plane + lane % kPlane, kPlane),
                              .out_row = s * g.W * kPlane,
                              .out_column = s * kPlane,
                              .rows = row < end ? divup(end - row, s) : 0,
                              .columns = column < g.W ? divup(g.W - column, s) : 0,
                              .first_row = -lo - in_row,
                              .last_row = g.OH - lo - in_row,
                              .row_step = 1,
                              .stream = false};
          int64_t frame = first;
          do {  // once for a frame that no output is computed from: its gradient is zero
            if (frame < last) {
              outputs.in = kept(frame) + from;
              outputs.weight = &packed[b * blocks.weights() + of_residue + weights_of(frame)];
              outputs.kernel_rows = rows.count;
            }
            if (in_place && frame + 1 >= last) {
              float* const to = in_image(grads.dx, n, blocks.first(b, 0) + lane, begin, in_frame);
              outputs.store(at(to, g.C), s * g.W * g.C, s * g.C, stream && whole_lines);
            }
            sums(g, outputs, 1, dy_plane);
            outputs.add();
          } while (++frame < last);
          of_residue += rows.count * columns.count * g.width * L;
        }
        for (int64_t frame = first; dweight && frame < last; ++frame) {
          const Products products{.dy = kept(frame) + own + lane / kPlane * dy_plane + lane % kPlane,
                                  .dy_row = dy_cols * kPlane,
                                  .in = x_at + group / kPlane * x_plane + group % kPlane,
                                  .in_row = s * x_cols * kPlane,
                                  .in_pixel = s * kPlane,
                                  .in_pitch = x_cols * kPlane,
                                  .rows = dy_end - dy_begin,
                                  .columns = g.OW,
                                  .first_row = -x_window.row,
                                  .last_row = g.H - x_window.row,
                                  .row_step = s};
          float* out = sums_of_weight + part * blocks.part_weights() + weights_of(frame);
          if (g.narrow())
            narrow_gradient(g, products, out);
          else if (L == kPlane)
            wide_gradient<kPlane>(g, products, x_plane, out);
          else
            wide_gradient<8>(g, products, x_plane, out);
        }
      }
      for (int64_t p = 0; p < blocks.planes && dx && !in_place; ++p)
        unpack(dx_at + p * dx_plane, grads.dx, n, in_frame, blocks.first(b, p), blocks.valid(b, p), begin, end - begin, stream,
               dx_at + blocks.planes * dx_plane);
    }
  };

  at::parallel_for(0, count * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      // Channels_last: blocks of the same pixels one after another; contiguous: images of the same block.
      const int64_t b = x.channels_last ? u % count : u / chunks, chunk = x.channels_last ? u / count : u % chunks;
      float* to = partial ? &partial[(b * chunks + chunk) * block_floats] : nullptr;
      if (dweight || dbias) std::fill_n(to, block_floats, 0.0f);
      const auto [begin, end] = tile_rows(items, chunks, chunk);
      for (int64_t item = begin; item < end; ++item) unit(b, item / tiles, item % tiles, to);
    }
    stream_fence();
  });

  if (!dweight && !dbias) return;
  T* dw = dweight ? grads.dweight.template mutable_data_ptr<T>() : nullptr;
  T* db = dbias ? grads.dbias.template mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, count, divup(16384, chunks * block_floats), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const float* p = &partial[b * chunks * block_floats];
      const auto total = [&](int64_t j) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += p[chunk * block_floats + j];
        return static_cast<T>(sum);
      };
      for (int64_t part = 0; dweight && part < blocks.parts(); ++part) {
        const int64_t channel = b * blocks.channels + blocks.lane(part);
        const int64_t end = blocks.end_of_part(channel);
        const auto strides = grads.dweight.strides();
        // A lane is an output channel, and i an input channel of its group; in narrow groups the other way round.
        const int64_t of_i = strides[g.narrow() ? 0 : 1], of_frame = g.kt > 1 ? strides[2] : 0, lanes = std::min(L, end - channel);
        int64_t of_lane[kPlane];
        for (int64_t j = 0; j < lanes; ++j) {
          const int64_t in = g.narrow() ? (channel + j) % g.width : 0;
          of_lane[j] = (channel + j - in) * strides[0] + in * strides[1];
        }
        for (int64_t tap = 0; tap < g.taps(); ++tap)
          for (int64_t i = 0; i < g.width; ++i) {
            T* const to = dw + tap / g.frame_taps() * of_frame + tap % g.frame_taps() / g.kw * *(strides.end() - 2) +
                          tap % g.kw * strides.back() + i * of_i;
            const int64_t from = part * blocks.part_weights() + (tap * g.width + i) * L;
            for (int64_t j = 0; j < lanes; ++j) to[of_lane[j]] = total(from + j);
          }
      }
      const int64_t channels = std::min(blocks.channels, g.C - b * blocks.channels);
      for (int64_t c = 0; dbias && c < channels; ++c) db[b * blocks.channels + c] = total(blocks.weights() + c);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
