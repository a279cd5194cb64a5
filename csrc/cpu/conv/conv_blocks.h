// How a grouped convolution is cut up for the kernels of conv_kernels.h: blocks of channels, tiles of rows, and the
// order in which a block's weights are read.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/conv/conv_kernels.h"
#include "cpu/passes.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kTileBytes = 256 << 10;  // of scratch that a tile may take: a part of the second-level cache
constexpr int64_t kUnits = 64;             // pieces of work there should be, for threads to share

struct Geometry {  // of a convolution with as many output as input channels, dilation 1
  int64_t N, C, H, W, OH, OW, kh, kw, stride, ph, pw, width;  // width: channels of a group
  int64_t T = 1, OT = 1, kt = 1, stride_t = 1, pt = 0;        // frames of a volume; an image is one
  bool is_image() const { return T == 1 && kt == 1; }
  int64_t taps() const { return kt * kh * kw; }
  int64_t frame_taps() const { return kh * kw; }
  int64_t frame_weights() const { return frame_taps() * width * lanes(); }  // of a part of a block
  // The input frames that an output frame is computed from, and the output frames that an input frame is used for. That of an
  // output frame `out` and an input frame `in` meets tap `in - out * stride_t + pt`.
  std::pair<int64_t, int64_t> inputs_of(int64_t out) const {
    const int64_t first = out * stride_t - pt;
    return {std::max<int64_t>(first, 0), std::min(first + kt, T)};
  }
  std::pair<int64_t, int64_t> outputs_of(int64_t in) const {
    const int64_t end = std::min((in + pt) / stride_t + 1, OT);
    return {std::min(divup(std::max<int64_t>(in + pt - kt + 1, 0), stride_t), end), end};
  }
  bool narrow() const { return width <= kNarrow; }
  // Lanes of a vector of the wide kernels: as few as waste none.
  int64_t lanes() const { return narrow() || width % kPlane == 0 ? kPlane : 8; }
};

template <typename T>
struct Gradients {
  Image<T> dx;                // data null where it is not wanted
  at::Tensor dweight, dbias;  // undefined where they are not wanted
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

// The position of each tap in the order of pack_weights.
inline std::vector<int64_t> places_of_taps(const Geometry& g, bool of_input) {
  std::vector<int64_t> place(g.taps());
  std::iota(place.begin(), place.end(), int64_t{0});
  if (!of_input) return place;
  int64_t at = 0;
  for (int64_t frame = 0; frame < g.taps(); frame += g.frame_taps())
    for (int64_t my = 0; my < g.stride; ++my)
      for (int64_t mx = 0; mx < g.stride; ++mx) {
        const Residue rows(my, g.stride, g.kh), columns(mx, g.stride, g.kw);
        for (int64_t a = 0; a < rows.count; ++a)
          for (int64_t b = 0; b < columns.count; ++b) place[frame + rows.tap(a) * g.kw + columns.tap(b)] = at++;
      }
  return place;
}

// A block's weights in the order in which narrow_sums and wide_sums read them: parts of (taps, width, lanes). With
// `of_input` for the gradient of the input: parts of frames of residues of (their taps, width, lanes).
template <typename T>
void pack_weights(const T* weight, const Blocks& blocks, int64_t block, bool of_input, float* out) {
  const Geometry& g = blocks.g;
  const int64_t L = g.lanes(), taps = g.taps();
  const auto place = places_of_taps(g, of_input);
  for (int64_t part = 0; part < blocks.parts(); ++part, out += blocks.part_weights()) {
    const int64_t first = block * blocks.channels + blocks.lane(part), valid = std::min(L, blocks.end_of_part(first) - first);
    // A lane's taps follow one another in memory, and in the forward pass all channels' of its group: squares of them are turned.
    const int64_t run = of_input ? taps : g.width * taps;
    for (int64_t start = 0; start < g.width * taps; start += run) {
      const T* lane[kPlane];
      for (int64_t j = 0; j < valid; ++j) lane[j] = weight + weight_offset(g, first + j, start / taps, of_input);
      for (int64_t k = 0; k < run; k += kPlane) {
        const int64_t count = std::min<int64_t>(kPlane, run - k);
        Vec<float> v[kPlane];
        for (int64_t j = 0; j < kPlane; ++j) v[j] = j >= valid ? Vec<float>(0) : count == kPlane ? vload(lane[j] + k) : vload(lane[j] + k, count, Vec<float>(0));
        transpose(v);
        for (int64_t m = 0; m < count; ++m) {
          const int64_t i = (start + k + m) / taps, tap = (start + k + m) % taps;
          vstore(out + (place[tap] * g.width + i) * L, v[m], L);
        }
      }
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
