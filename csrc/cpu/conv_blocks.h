// How a grouped convolution is cut up for the kernels of conv_kernels.h: blocks of channels, tiles of rows, and the
// order in which a block's weights are read.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/conv_kernels.h"
#include "cpu/sweep.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kTileBytes = 256 << 10;  // of scratch that a tile may take: a part of the second-level cache
constexpr int64_t kUnits = 64;             // pieces of work there should be, for threads to share

struct Geometry {  // of a convolution with as many output as input channels, dilation 1
  int64_t N, C, H, W, OH, OW, kh, kw, stride, ph, pw, width;  // width: channels of a group
  int64_t taps() const { return kh * kw; }
  bool narrow() const { return width <= 4; }
  int64_t copies() const { return narrow() ? width : 1; }
  // Lanes of a vector of the wide kernels: as few as waste none.
  int64_t lanes() const { return narrow() || width % kPlane == 0 ? kPlane : 8; }
};

// Blocks of channels that are worked on together: some planes of the narrow family; in the wide one a group, or as
// many groups as fill a plane.
struct Blocks {
  const Geometry& g;
  int64_t channels, planes;
  Blocks(const Geometry& geometry, int64_t narrow_planes) : g(geometry) {
    if (g.narrow())
      channels = narrow_planes * kPlane, planes = narrow_planes;
    else if (kPlane % g.width == 0)
      channels = kPlane, planes = 1;
    else
      channels = g.width, planes = divup(g.width, kPlane);
  }
  int64_t count() const { return divup(g.C, channels); }
  int64_t first(int64_t block, int64_t plane) const { return block * channels + plane * kPlane; }
  // Channels of a plane that exist.
  int64_t valid(int64_t block, int64_t plane) const {
    const int64_t end = std::min(g.C, (block + 1) * channels);
    return std::clamp<int64_t>(end - first(block, plane), 0, kPlane);
  }
  // Vectors of outputs that share their weights' lanes: planes, or parts of groups.
  int64_t parts() const { return g.narrow() ? planes : groups() * parts_of_group(); }
  int64_t groups() const { return channels / g.width; }
  int64_t parts_of_group() const { return divup(g.width, g.lanes()); }
  int64_t part_weights() const { return g.taps() * g.width * g.lanes(); }
  int64_t weights() const { return parts() * part_weights(); }
  // The channel of a part's lane 0, relative to the block's first, as its planes hold it.
  int64_t lane(int64_t part) const {
    return group(part) + (g.narrow() ? 0 : part % parts_of_group() * g.lanes());
  }
  // The channel at which the planes that a part reads begin, counted in the same way: the first of its group.
  int64_t group(int64_t part) const { return g.narrow() ? part * kPlane : part / parts_of_group() * g.width; }
  // Behind the last channel that a part from this one on may have.
  int64_t end_of_part(int64_t channel) const {
    return g.narrow() ? g.C : std::min(g.C, (channel / g.width + 1) * g.width);
  }
};

// Where the taps begin that join `channel` with the i-th channel of its group, in a contiguous weight (C, width, kh, kw):
// an output channel with an input channel, or, for the gradient of the input, an input channel with an output channel.
inline int64_t weight_offset(const Geometry& g, int64_t channel, int64_t i, bool of_input) {
  const int64_t group = channel / g.width * g.width;
  return of_input ? ((group + i) * g.width + channel - group) * g.taps() : (channel * g.width + i) * g.taps();
}

// Taps of one residue class of a strided convolution's gradient: those that an input pixel r with (r + padding) %
// stride == residue meets, in the order of the gradient's rows. With stride 1 all, reversed.
struct Residue {
  int64_t residue, stride, count;
  Residue(int64_t residue_, int64_t stride_, int64_t kernel)
      : residue(residue_), stride(stride_), count(kernel > residue_ ? divup(kernel - residue_, stride_) : 0) {}
  int64_t tap(int64_t t) const { return residue + stride * (count - 1 - t); }
  int64_t first(int64_t begin, int64_t padding) const {  // the first such pixel from `begin` on
    return begin + ((residue - begin - padding) % stride + stride) % stride;
  }
};

// A block's weights in the order in which narrow_sums and wide_sums read them: parts of (taps, width, lanes). With
// `of_input` for the gradient of the input: parts of residues of (their taps, width, lanes).
template <typename T>
void pack_weights(const T* weight, const Blocks& blocks, int64_t block, bool of_input, float* out) {
  const Geometry& g = blocks.g;
  const int64_t L = g.lanes();
  for (int64_t part = 0; part < blocks.parts(); ++part) {
    int64_t lane[kPlane];  // where each lane's channel begins, -1 where there is none
    const int64_t first = block * blocks.channels + blocks.lane(part);
    const int64_t last = blocks.end_of_part(first);
    int64_t step = 0;  // from a group's channel to the next
    for (int64_t j = 0; j < L; ++j) {
      lane[j] = first + j < last ? weight_offset(g, first + j, 0, of_input) : -1;
      if (first + j < last) step = weight_offset(g, first + j, 1, of_input) - lane[j];
    }
    const auto tap = [&](int64_t ky, int64_t kx) {
      for (int64_t i = 0; i < g.width; ++i, out += L)
        for (int64_t j = 0; j < L; ++j)
          out[j] = lane[j] < 0 ? 0.0f : static_cast<float>(weight[lane[j] + i * step + ky * g.kw + kx]);
    };
    if (!of_input) {
      for (int64_t ky = 0; ky < g.kh; ++ky)
        for (int64_t kx = 0; kx < g.kw; ++kx) tap(ky, kx);
      continue;
    }
    for (int64_t my = 0; my < g.stride; ++my)
      for (int64_t mx = 0; mx < g.stride; ++mx) {
        const Residue rows(my, g.stride, g.kh), columns(mx, g.stride, g.kw);
        for (int64_t a = 0; a < rows.count; ++a)
          for (int64_t b = 0; b < columns.count; ++b) tap(rows.tap(a), columns.tap(b));
      }
  }
}

// Rows [begin, end) of tile t of `tiles`.
inline std::pair<int64_t, int64_t> tile_rows(int64_t rows, int64_t tiles, int64_t t) {
  return {t * rows / tiles, (t + 1) * rows / tiles};
}

// A thread's scratch memory, which it keeps: fresh memory of this size would be mapped anew on every call.
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, divup(floats * 4, 64) * 64)));
    if (memory == nullptr) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
