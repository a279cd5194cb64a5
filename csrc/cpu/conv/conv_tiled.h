// Grouped convolution in tiles, of images in either memory layout: forward and backward.
//
// A block of channels of one image is copied into planes of float vectors of channels, padding included, convolved
// there and copied out (conv_tile.h, conv_kernels.h), so both memory layouts and all dtypes run the same kernels. The
// backward pass packs dy once for dx and dweight. Traffic in tensors read or written: 2 forward, 3 backward. Small depthwise
// kernels are convolved where they lie in channels_last (conv_in_place.h).
// The gradient of the weight is summed in float over a tile, over the tiles of a chunk of images, and in double over
// chunks, in their order; chunks depend on the shape alone, so results do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <array>

#include "cpu/conv/conv_blocks.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

// Calls f with the number of taps of a kernel row as a constant if it is one of kTaps, else with 0: any number.
template <int... kTaps, typename F>
void with_taps(int64_t taps, const F& f) {
  const bool found = ((kKeepsTaps && taps == kTaps && (f(std::integral_constant<int, kKeepsTaps ? kTaps : 0>{}), true)) || ...);
  if (!found) f(std::integral_constant<int, 0>{});
}

// One part's sums over its taps; `step` pixels of the plane lie between the first taps of two neighbouring outputs.
inline void sums(const Geometry& g, const Sweep& s, int64_t step, int64_t plane) {
  const auto narrow = [&](auto taps) {
    constexpr int K = decltype(taps)::value, strided = K >= 3 ? K : 0, few = K <= 3 ? K : 0, few_strided = K == 3 ? 3 : 0;
    if (g.width == 1) return step == 1 ? narrow_sums<1, 1, K>(s) : narrow_sums<1, 2, strided>(s);
    if (g.width == 2) return step == 1 ? narrow_sums<2, 1, 0>(s) : narrow_sums<2, 2, 0>(s);
    if (g.width == 4) return step == 1 ? narrow_sums<4, 1, few>(s) : narrow_sums<4, 2, few_strided>(s);
    if constexpr (kNarrow == 8) step == 1 ? narrow_sums<8, 1, few>(s) : narrow_sums<8, 2, few_strided>(s);
  };
  const auto wide = [&](auto taps) {
    constexpr int K = decltype(taps)::value, strided = K >= 3 ? K : 0;
    if (g.lanes() == kPlane)
      return step == 1 ? wide_sums<kPlane, 1, K>(s, g.width, plane) : wide_sums<kPlane, 2, strided>(s, g.width, plane);
    if constexpr (kPlane != 8)
      step == 1 ? wide_sums<8, 1, K>(s, g.width, plane) : wide_sums<8, 2, strided>(s, g.width, plane);
  };
  g.narrow() ? with_taps<1, 2, 3, 5, 7>(s.taps, narrow) : with_taps<1, 2, 3>(s.taps, wide);
}

// The gradient of a narrow part, into (kernel rows, taps, channels of a group, kPlane).
inline void narrow_gradient(const Geometry& g, const Products& s, float* out) {
  const int64_t pitch = g.kw * g.width * kPlane;
  const auto rows = [&](auto width, auto step, auto taps, auto most) {  // as many kernel rows at once as registers hold
    constexpr int kWidth = decltype(width)::value, kStep = decltype(step)::value, K = decltype(taps)::value;
    constexpr int R = decltype(most)::value;
    for (int c = 0; c < kWidth; ++c) {
      int64_t row = 0;
      for (; row + R <= g.kh; row += R) narrow_products<R, kWidth, kStep, K>(s.of_kernel_rows(row, R), c, out + row * pitch);
      for (; row < g.kh; ++row) narrow_products<1, kWidth, kStep, K>(s.of_kernel_rows(row, 1), c, out + row * pitch);
    }
  };
  using std::integral_constant;
  constexpr integral_constant<int, 1> one;
  constexpr integral_constant<int, 4> four;
  constexpr integral_constant<int, 8> eight;
  const auto with_step = [&](auto width, auto taps, auto most) {
    g.stride == 1 ? rows(width, one, taps, most) : rows(width, integral_constant<int, 2>{}, taps, most);
  };
  if constexpr (kKeepsTaps) {
    constexpr integral_constant<int, 3> three;
    if (g.width == 1 && g.kw == 3) return with_step(one, three, three);
    if (g.width == 1 && g.kw == 5) return with_step(one, integral_constant<int, 5>{}, integral_constant<int, kManyRegisters ? 5 : 1>{});
    if (g.width == 1 && g.kw == 7) return with_step(one, integral_constant<int, 7>{}, integral_constant<int, kManyRegisters ? 2 : 1>{});
    if (g.width == 4 && g.kw == 3) return with_step(four, three, three);
    if constexpr (kNarrow == 8)
      if (g.width == 8 && g.kw == 3) return with_step(eight, three, three);
  }
  const auto any_taps = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t row = 0; row < g.kh; ++row)
      for (int c = 0; c < kWidth; ++c) {
        int64_t k = 0;
        const auto some = [&](auto taps) {
          constexpr int K = decltype(taps)::value;
          for (; k + K <= g.kw; k += K) {
            Products part = s.of_kernel_rows(row, 1);
            part.in += k * kPlane;
            some_products<K, kWidth>(part, c, out + row * pitch + k * kWidth * kPlane);
          }
        };
        some(eight);
        some(four);
        some(one);
      }
  };
  if (g.width == 1) return any_taps(one);
  if (g.width == 2) return any_taps(integral_constant<int, 2>{});
  if (g.width == 4) return any_taps(four);
  if constexpr (kNarrow == 8) any_taps(eight);
}

// The gradient of a wide part, whose group's channels begin at `s.in`.
template <int L>
void wide_gradient(const Geometry& g, const Products& s, int64_t plane, float* out) {
  const auto taps = [&](auto step, auto k, int64_t ky, int64_t kx) {
    constexpr int kStep = decltype(step)::value, K = decltype(k)::value;
    constexpr int I = K > 1 && !kManyRegisters ? 2 : 4;  // channels whose sums fit into registers
    const Products row = s.of_kernel_rows(ky, 1);
    float* o = out + (ky * g.kw + kx) * g.width * L;
    for (int64_t i = 0; i < g.width; i += I) {
      Products part = row;
      part.in += kx * kPlane + i / kPlane * plane + i % kPlane;
      wide_products<L, kStep, K, I>(part, o + i * L, g.width * L);
    }
  };
  using std::integral_constant;
  for (int64_t ky = 0; ky < g.kh; ++ky) {
    int64_t kx = 0;
    for (; kKeepsTaps && kx + 3 <= g.kw; kx += 3)
      g.stride == 1 ? taps(integral_constant<int, 1>{}, integral_constant<int, 3>{}, ky, kx)
                    : taps(integral_constant<int, 2>{}, integral_constant<int, 3>{}, ky, kx);
    for (; kx < g.kw; ++kx) taps(integral_constant<int, 1>{}, integral_constant<int, 1>{}, ky, kx);
  }
}

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

template <typename T>
void forward(const Image<const T>& x, const T* weight, const T* bias, const Image<T>& y, const Geometry& g) {
  const Blocks blocks(g, narrow_planes<T>(x.channels_last));
  const int64_t count = blocks.count();
  const int64_t cols = (g.OW - 1) * g.stride + g.kw;
  const bool stream = beyond_cache(y.data, g.N * g.C * g.OH * g.OW * sizeof(T));
  const int64_t tiles = count_tiles(g.OH, blocks.planes * (g.stride * cols + g.OW) * kPlane * 4, g.N * count, g.kh);
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
    float* in = scratch(blocks.planes * (plane + out_plane) + out_plane);
    float* out = in + blocks.planes * plane;
    for (int64_t p = 0; p < blocks.planes; ++p)
      pack(x, n, blocks.first(b, p), blocks.valid(b, p), window, in + p * plane);
    for (int64_t part = 0; part < blocks.parts(); ++part) {
      const int64_t lane = blocks.lane(part), group = blocks.group(part);
      float* to = out + lane / kPlane * out_plane + lane % kPlane;
      if constexpr (std::is_same_v<T, float>)
        if (in_place) to = y.at(n, blocks.first(b, 0) + lane, begin);
      sums(g,
           {.in = in + group / kPlane * plane + group % kPlane,
            .in_row = g.stride * cols * kPlane,
            .in_pitch = cols * kPlane,
            .weight = &packed[b * block_floats + part * blocks.part_weights()],
            .kernel_rows = g.kh,
            .taps = g.kw,
            .bias = &packed[b * block_floats + blocks.weights() + lane],
            .out = to,
            .out_row = in_place ? g.OW * y.C : g.OW * kPlane,
            .out_column = in_place ? y.C : kPlane,
            .rows = end - begin,
            .columns = g.OW,
            .first_row = -window.row,
            .last_row = g.H - window.row,
            .row_step = g.stride,
            .stream = in_place && stream && whole_lines},
           g.stride, plane);
    }
    for (int64_t p = 0; p < blocks.planes && !in_place; ++p)
      unpack(out + p * out_plane, y, n, blocks.first(b, p), blocks.valid(b, p), begin, end - begin, stream,
             out + blocks.planes * out_plane);
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
void backward(const Image<const T>& dy, const Image<const T>& x, const T* weight, const Gradients<T>& grads, const Geometry& g) {
  const Blocks blocks(g, narrow_planes<T>(x.channels_last));
  const bool dx = grads.dx.data != nullptr, dweight = grads.dweight.defined(), dbias = grads.dbias.defined();
  const int64_t count = blocks.count(), s = g.stride, L = g.lanes();
  const bool stream = beyond_cache(grads.dx.data, g.N * g.C * g.H * g.W * sizeof(T));
  // Columns of dy that a tile holds: those that dx needs, and all for dweight.
  const int64_t dy_col = std::min<int64_t>(g.pw / s - divup(g.kw, s) + 1, 0);
  const int64_t dy_cols = std::max((g.W - 1 + g.pw) / s + 1, g.OW) - dy_col, x_cols = (g.OW - 1) * s + g.kw;
  const int64_t row_bytes = blocks.planes * 4 * kPlane * (dy_cols + dweight * s * x_cols + dx * s * g.W);
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
    float* dy_at = scratch(blocks.planes * (dy_plane + (dweight ? x_plane : 0) + (dx ? dx_plane : 0)) + (dx ? dx_plane : 0));
    float* x_at = dy_at + blocks.planes * dy_plane;
    float* dx_at = x_at + (dweight ? blocks.planes * x_plane : 0);
    for (int64_t p = 0; p < blocks.planes; ++p) {
      const int64_t c = blocks.first(b, p), valid = blocks.valid(b, p);
      pack(dy, n, c, valid, dy_window, dy_at + p * dy_plane);
      if (dweight) pack(x, n, c, valid, x_window, x_at + p * x_plane);
    }
    const float* dy_first = dy_at + ((dy_begin - lo) * dy_cols - dy_col) * kPlane;  // plane 0, the tile's own rows
    for (int64_t part = 0; part < blocks.parts(); ++part) {
      const int64_t lane = blocks.lane(part), group = blocks.group(part);
      if (dx) {
        float* to = dx_at + lane / kPlane * dx_plane + lane % kPlane;
        if constexpr (std::is_same_v<T, float>)
          if (in_place) to = grads.dx.at(n, blocks.first(b, 0) + lane, begin);
        const int64_t pixel = in_place ? g.C : kPlane;
        const float* w = &packed[b * blocks.weights() + part * blocks.part_weights()];
        for (int64_t my = 0; my < s; ++my)
          for (int64_t mx = 0; mx < s; ++mx) {
            const Residue rows(my, s, g.kh), columns(mx, s, g.kw);
            const int64_t row = rows.first(begin, g.ph), column = columns.first(0, g.pw);
            const int64_t in_row = (row + g.ph) / s - rows.count + 1 - lo, in_col = (column + g.pw) / s - columns.count + 1 - dy_col;
            sums(g,
                 {.in = dy_at + group / kPlane * dy_plane + group % kPlane + (in_row * dy_cols + in_col) * kPlane,
                  .in_row = dy_cols * kPlane,
                  .in_pitch = dy_cols * kPlane,
                  .weight = w,
                  .kernel_rows = rows.count,
                  .taps = columns.count,
                  .bias = zeros,
                  .out = to + ((row - begin) * g.W + column) * pixel,
                  .out_row = s * g.W * pixel,
                  .out_column = s * pixel,
                  .rows = row < end ? divup(end - row, s) : 0,
                  .columns = column < g.W ? divup(g.W - column, s) : 0,
                  .first_row = -lo - in_row,
                  .last_row = g.OH - lo - in_row,
                  .row_step = 1,
                  .stream = in_place && stream && whole_lines},
                 1, dy_plane);
            w += rows.count * columns.count * g.width * L;
          }
      }
      if (dweight) {
        const Products products{.dy = dy_first + lane / kPlane * dy_plane + lane % kPlane,
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
        float* out = sums_of_weight + part * blocks.part_weights();
        if (g.narrow())
          narrow_gradient(g, products, out);
        else if (L == kPlane)
          wide_gradient<kPlane>(g, products, x_plane, out);
        else
          wide_gradient<8>(g, products, x_plane, out);
      }
    }
    if (dbias)
      for (int64_t p = 0; p < blocks.planes; ++p) {
        using V = Vec<float>;
        float* to = sums_of_weight + blocks.weights() + p * kPlane;
        V sum(0);
        for (int64_t row = 0; row < dy_end - dy_begin; ++row)
          for (int64_t j = 0; j < g.OW; ++j) sum = sum + V::loadu(dy_first + p * dy_plane + (row * dy_cols + j) * kPlane);
        (V::loadu(to) + sum).store(to);
      }
    if (dx && !in_place)
      for (int64_t p = 0; p < blocks.planes; ++p)
        unpack(dx_at + p * dx_plane, grads.dx, n, blocks.first(b, p), blocks.valid(b, p), begin, end - begin, stream,
               dx_at + blocks.planes * dx_plane);
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
        const int64_t of_i = strides[g.narrow() ? 0 : 1], lanes = std::min(L, end - channel);
        int64_t of_lane[kPlane];
        for (int64_t j = 0; j < lanes; ++j) {
          const int64_t in = g.narrow() ? (channel + j) % g.width : 0;
          of_lane[j] = (channel + j - in) * strides[0] + in * strides[1];
        }
        for (int64_t tap = 0; tap < g.taps(); ++tap)
          for (int64_t i = 0; i < g.width; ++i) {
            T* const to = dw + tap / g.kw * strides[2] + tap % g.kw * strides[3] + i * of_i;
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
