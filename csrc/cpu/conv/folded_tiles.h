// What the kernels of folded layers consist of, float32, channels innermost. A 1x1 convolution is products of a tile of pixels with a
// panel of outputs, whose sums stay in registers until bias, residual and bounds are in them. A depthwise one is rows.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "cpu/conv/conv_in_place.h"
#include "folded_kernels.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace folded {

using V = Vec<float>;
constexpr int64_t kLane = kLanes<float>;
constexpr int64_t kSerialWork = 1 << 20;  // products that a thread is to have at least
constexpr int kVectors = kManyRegisters ? 4 : 2;  // of outputs in a panel, at most
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Pixels of a tile, so that its sums, a row of weights and a value of x fit the registers.
constexpr int kMostRows = 8;
constexpr int rows_with(int vectors) { return vectors == kVectors ? 6 : kMostRows; }

// What none, relu and relu6 do, two instructions. NaN and, where there is no bound, infinities pass.
struct Clamp {
  V low, high;
  V operator()(const V& v) const { return at::vec::clamp(v, low, high); }
};

// The epilogue of a convolution: a clamp, and the rest of the activation, if any.
struct Epilogue {
  float low, high;
  Clamp clamp;
  std::optional<OtherActivation> other;
  explicit Epilogue(const ActivationName& act) {
    low = act.name == "relu" || act.name == "relu6" ? 0 : -kInfinity;
    high = act.name == "relu6" ? 6 : kInfinity;
    clamp = {V(low), V(high)};
    if (low != 0 && act.name != "none") other = other_activation("cnnkern", act);
  }
  V operator()(const V& v) const { return other.has_value() ? other->value<float>(v) : clamp(v); }
};

// y = act(y + residual), of `rows` runs of floats that are still in a cache. The residual, null for none, lies as y.
inline void finish(const Epilogue& act, const float* residual, float* y, int64_t pitch, int64_t rows, int64_t run) {
  const auto sum = [&](const V& v, int64_t at, int64_t count) {
    if (residual == nullptr) return v;
    return v + (count == kLane ? V::loadu(residual + at) : vload(residual + at, count, V(0)));
  };
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = r * pitch;
    const int64_t end = at + run;
    for (; at + kLane <= end; at += kLane) act(sum(V::loadu(y + at), at, kLane)).store(y + at);
    if (at < end) vstore<float>(y + at, act(sum(vload(y + at, end - at, V(0)), at, end - at)), end - at);
  }
}

struct Tile {
  const float* x;
  int64_t x_pitch, inputs;
  const float* weight;  // (inputs, vectors)
  const float* bias;
  const float* residual;  // null for none
  float* y;
  int64_t y_pitch, outputs;  // that the panel has: fewer than its lanes, perhaps
  Clamp clamp;
};

// kRows pixels of x times kCount vectors of outputs. The sums are of a plain type, which compilers keep in registers.
template <int kRows, int kCount>
void product(const Tile& t) {
  using Sum = Simd<kPlane>;
  Sum sum[kRows][kCount];
  unrolled<kCount>([&](auto v) CNNKERN_INLINED {
    const Sum bias = Sum::load(t.bias + v * kLane);
    unrolled<kRows>([&](auto r) CNNKERN_INLINED { sum[r][v] = bias; });
  });
  const float *x = t.x, *w = t.weight;
  const int64_t pitch = t.x_pitch;
  for (const float* const end = x + t.inputs; x < end; ++x, w += kCount * kLane) {
    Sum weight[kCount];
    unrolled<kCount>([&](auto v) CNNKERN_INLINED { weight[v] = Sum::load(w + v * kLane); });
    unrolled<kRows>([&](auto r) CNNKERN_INLINED {
      const Sum value = Sum::all(x[r * pitch]);
      unrolled<kCount>([&](auto v) CNNKERN_INLINED { sum[r][v] = Sum::fma(value, weight[v], sum[r][v]); });
    });
  }
  const int64_t last = t.outputs - (kCount - 1) * kLane;  // of the last vector
  unrolled<kRows>([&](auto r) CNNKERN_INLINED {
    unrolled<kCount>([&](auto v) CNNKERN_INLINED {
      const int64_t at = r * t.y_pitch + v * kLane;
      const bool whole = v < kCount - 1 || last == kLane;
      V value = vec(sum[r][v]);
      if (t.residual != nullptr) value = value + (whole ? V::loadu(t.residual + at) : vload(t.residual + at, last, V(0)));
      value = t.clamp(value);
      whole ? value.store(t.y + at) : vstore<float>(t.y + at, value, last);
    });
  });
}

using Product = void (*)(const Tile&);

// product<rows, count>, at [count - 1][rows - 1].
struct ProductTable {
  Product of[kVectors][kMostRows] = {};
  ProductTable() {
    unrolled<kVectors>([&](auto v) { unrolled<rows_with(v + 1)>([&](auto r) { of[v][r] = &product<r + 1, v + 1>; }); });
  }
};

// Outputs cut into panels of about the same number of vectors.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t outputs) : vectors(divup(outputs, kLane)), count(divup(vectors, kVectors)) {}
  int64_t first(int64_t panel) const { return panel * vectors / count; }
  int64_t size(int64_t panel) const { return first(panel + 1) - first(panel); }
  int64_t largest() const { return divup(vectors, count); }
};

// A 1x1 convolution with packed weights.
struct Pointwise {
  const float* packed;
  int64_t inputs, outputs;
  Epilogue act;
  Panels panels;
  int64_t most;  // pixels of a tile
  Pointwise(const float* packed_, int64_t inputs_, int64_t outputs_, const ActivationName& act_)
      : packed(packed_), inputs(inputs_), outputs(outputs_), act(act_), panels(outputs_),
        most(rows_with(static_cast<int>(panels.largest()))) {}

  // The outputs of a panel, of tiles [begin, end) of the `tiles` into which `pixels` are cut. The residual lies as y; null for none.
  // `weights`: other ones for this panel.
  void compute(int64_t panel, int64_t begin, int64_t end, int64_t tiles, int64_t pixels, const float* x, const float* residual,
               float* y, const float* weights = nullptr) const {
    static const ProductTable products;
    const int64_t first = panels.first(panel) * kLane, vectors = panels.size(panel);
    Tile t{.x = x,
           .x_pitch = inputs,
           .inputs = inputs,
           .weight = weights != nullptr ? weights : packed + first * inputs,
           .bias = packed + panels.vectors * kLane * inputs + first,
           .residual = nullptr,
           .y = y,
           .y_pitch = outputs,
           .outputs = std::min(vectors * kLane, outputs - first),
           .clamp = act.clamp};
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t pixel = tile * pixels / tiles, rows = (tile + 1) * pixels / tiles - pixel, at = pixel * outputs + first;
      t.x = x + pixel * inputs;
      t.y = y + at;
      if (residual != nullptr) t.residual = residual + at;
      products.of[vectors - 1][rows - 1](t);
      if (act.other.has_value()) finish(act, nullptr, t.y, outputs, rows, t.outputs);
    }
  }
  // All outputs of these pixels.
  void compute(int64_t pixels, const float* x, const float* residual, float* y) const {
    const int64_t tiles = divup(pixels, most);
    for (int64_t panel = 0; panel < panels.count; ++panel) compute(panel, 0, tiles, tiles, pixels, x, residual, y);
  }
};

// A depthwise convolution k x k with packed weights.
struct Depthwise {
  const float* packed;
  int64_t channels, k, padding, stride;
  Epilogue act;
  Pieces pieces;
  int64_t pitch;
  Depthwise(const float* packed_, int64_t channels_, int64_t k_, int64_t padding_, int64_t stride_, const ActivationName& act_)
      : packed(packed_), channels(channels_), k(k_), padding(padding_), stride(stride_), act(act_), pieces(channels_),
        pitch(divup(channels_, kPlane) * kPlane) {}

  // Where the rows of the input are: row `i` of the image at x + i % ring * W * channels.
  struct Rows {
    const float* x;
    int64_t H, W, ring;
  };
  // Row `oh` of the output, with `columns` pixels. The residual lies as y; null for none.
  void compute(const Rows& rows, int64_t oh, int64_t columns, const float* residual, float* y) const {
    const int64_t top = oh * stride - padding;
    const auto [first, last] = rows_inside(top, k, rows.H);
    const int64_t size = rows.W * channels;
    // Bounds belong behind the residual.
    const float low = residual == nullptr ? act.low : -kInfinity, high = residual == nullptr ? act.high : kInfinity;
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const int64_t c = pieces.first(piece);
      RowInPlace<float, true> r{.in = {},
                                .in_pixel = channels,
                                .first = -padding,
                                .width = rows.W,
                                .weight = packed + first * k * pitch + c,
                                .weight_row = k * pitch,
                                .weight_tap = pitch,
                                .kernel_rows = last - first,
                                .bias = packed + k * k * pitch + c,
                                .out = y + c,
                                .out_pixel = channels,
                                .columns = columns,
                                .channels = pieces.size(piece),
                                .stream = false,
                                .low = low,
                                .high = high};
      for (int64_t i = first; i < last; ++i) r.in[i - first] = rows.x + (top + i) % rows.ring * size + c;
      if (k == 5)
        stride == 2 ? row_in_place<2, 5>(r) : row_in_place<1, 5>(r);
      else
        stride == 2 ? row_in_place<2, 3>(r) : row_in_place<1, 3>(r);
      if (residual != nullptr || act.other.has_value())
        finish(act, residual == nullptr ? nullptr : residual + c, y + c, channels, columns, pieces.size(piece));
    }
  }
};

}  // namespace folded
}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
