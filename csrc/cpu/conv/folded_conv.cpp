// Convolutions of folded models, float32, channels innermost. 1x1: products of a tile of pixels with a panel of outputs, whose sums
// stay in registers until bias, residual and bounds are in them. Depthwise: rows, finished while they are in a cache.
#include "folded_kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "aten.h"
#include "cpu/conv/conv_in_place.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {
namespace {

using V = Vec<float>;
constexpr int64_t kLane = kLanes<float>;
constexpr int64_t kSerialWork = 1 << 20;  // products that a thread is to have at least
constexpr int kVectors = kManyRegisters ? 4 : 2;  // of outputs in a panel, at most
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
  Clamp clamp;
  std::optional<OtherActivation> other;
  explicit Epilogue(const ActivationName& act) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const bool relu = act.name == "relu" || act.name == "relu6";
    clamp = {V(relu ? 0 : -infinity), V(act.name == "relu6" ? 6 : infinity)};
    if (!relu && act.name != "none") other = other_activation("cnnkern", act);
  }
  V operator()(const V& v) const { return other.has_value() ? other->value<float>(v) : clamp(v); }
};

// y = act(y + residual), of `rows` runs of floats that are still in a cache. The residual, null for none, lies as y.
void finish(const Epilogue& act, const float* residual, float* y, int64_t pitch, int64_t rows, int64_t run) {
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

// kRows pixels of x times kCount vectors of outputs.
template <int kRows, int kCount>
void product(const Tile& t) {
  V sum[kRows][kCount];
  unrolled<kCount>([&](auto v) CNNKERN_INLINED {
    const V bias = V::loadu(t.bias + v * kLane);
    unrolled<kRows>([&](auto r) CNNKERN_INLINED { sum[r][v] = bias; });
  });
  const float* row[kRows];
  unrolled<kRows>([&](auto r) CNNKERN_INLINED { row[r] = t.x + r * t.x_pitch; });
  const float* w = t.weight;
  for (int64_t k = 0; k < t.inputs; ++k, w += kCount * kLane) {
    V weight[kCount];
    unrolled<kCount>([&](auto v) CNNKERN_INLINED { weight[v] = V::loadu(w + v * kLane); });
    unrolled<kRows>([&](auto r) CNNKERN_INLINED {
      const V x(row[r][k]);
      unrolled<kCount>([&](auto v) CNNKERN_INLINED { sum[r][v] = at::vec::fmadd(x, weight[v], sum[r][v]); });
    });
  }
  const int64_t last = t.outputs - (kCount - 1) * kLane;  // of the last vector
  unrolled<kRows>([&](auto r) CNNKERN_INLINED {
    unrolled<kCount>([&](auto v) CNNKERN_INLINED {
      const int64_t at = r * t.y_pitch + v * kLane;
      const bool whole = v < kCount - 1 || last == kLane;
      V value = sum[r][v];
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

at::Tensor floats(int64_t count) { return aten::empty({count}, at::TensorOptions(at::kFloat)); }

}  // namespace

// Panels of (inputs, vectors), then the bias, in whole vectors.
at::Tensor pack_pointwise_cpu(const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Panels panels(outputs);
  const at::Tensor packed = floats(panels.vectors * kLane * (inputs + 1)), from = weight.contiguous();
  const float* const w = from.const_data_ptr<float>();
  float* to = packed.data_ptr<float>();
  for (int64_t panel = 0; panel < panels.count; ++panel)
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t o = panels.first(panel) * kLane; o < panels.first(panel + 1) * kLane; ++o)
        *to++ = o < outputs ? w[o * inputs + k] : 0.0f;
  std::fill_n(to, panels.vectors * kLane, 0.0f);
  if (bias.defined()) std::copy_n(bias.contiguous().const_data_ptr<float>(), outputs, to);
  return packed;
}

void pointwise_cpu(const float* x, const float* packed, float* y, int64_t inputs, int64_t outputs, int64_t pixels,
                   const Behind& behind) {
  static const ProductTable products;
  const Panels panels(outputs);
  const Epilogue epilogue(behind.act);
  const int64_t most = rows_with(static_cast<int>(panels.largest())), tiles = divup(pixels, most);
  // Blocks of pixels that stay in the second-level cache while the panels pass by; four at least, for threads to share.
  const int64_t in_block = std::clamp<int64_t>(kTileBytes / (most * inputs * 4), 1, divup(tiles, 4)), blocks = divup(tiles, in_block);
  const int64_t work = in_block * most * panels.largest() * kLane * inputs;
  const bool by_panel = outputs > pixels;  // weights are the larger part of what is read: a thread reads few of them, once
  const float* const bias = packed + panels.vectors * kLane * inputs;
  at::parallel_for(0, blocks * panels.count, divup(kSerialWork, work), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t panel = by_panel ? piece / blocks : piece % panels.count, block = by_panel ? piece % blocks : piece / panels.count;
      const int64_t first = panels.first(panel) * kLane, vectors = panels.size(panel);
      Tile t{.x = x,
             .x_pitch = inputs,
             .inputs = inputs,
             .weight = packed + first * inputs,
             .bias = bias + first,
             .residual = nullptr,
             .y = y,
             .y_pitch = outputs,
             .outputs = std::min(vectors * kLane, outputs - first),
             .clamp = epilogue.clamp};
      for (int64_t tile = block * in_block; tile < std::min(tiles, (block + 1) * in_block); ++tile) {
        const int64_t pixel = tile * pixels / tiles, rows = (tile + 1) * pixels / tiles - pixel, at = pixel * outputs + first;
        t.x = x + pixel * inputs;
        t.y = y + at;
        if (behind.residual != nullptr) t.residual = behind.residual + at;
        products.of[vectors - 1][rows - 1](t);
        if (epilogue.other.has_value()) finish(epilogue, nullptr, t.y, outputs, rows, t.outputs);
      }
    }
  });
}

// (taps, channels), then the bias, in whole vectors.
at::Tensor pack_depthwise_cpu(const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3), pitch = divup(channels, kPlane) * kPlane;
  const at::Tensor packed = floats(pitch * (taps + 1)), from = weight.contiguous();
  const float* const w = from.const_data_ptr<float>();
  float* const to = packed.data_ptr<float>();
  std::fill_n(to, pitch * (taps + 1), 0.0f);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) to[tap * pitch + c] = w[c * taps + tap];
  if (bias.defined()) std::copy_n(bias.contiguous().const_data_ptr<float>(), channels, to + taps * pitch);
  return packed;
}

void depthwise_cpu(const float* x, const float* packed, float* y, int64_t channels, int64_t k, int64_t padding, const ImageSizes& s,
                   const Behind& behind) {
  const Pieces pieces(channels);
  const int64_t pitch = divup(channels, kPlane) * kPlane;
  const Epilogue epilogue(behind.act);
  at::parallel_for(0, s.N * s.OH, divup(kSerialWork / 8, s.OW * channels * k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t c = pieces.first(piece), n = row / s.OH, oh = row % s.OH, top = oh * s.stride - padding;
        const auto [first, last] = rows_inside(top, k, s.H);
        const int64_t at = row * s.OW * channels + c;
        const RowInPlace<float> r{.in = x + ((n * s.H + top + first) * s.W) * channels + c,
                                  .in_row = s.W * channels,
                                  .in_pixel = channels,
                                  .first = -padding,
                                  .width = s.W,
                                  .weight = packed + first * k * pitch + c,
                                  .weight_row = k * pitch,
                                  .weight_tap = pitch,
                                  .kernel_rows = last - first,
                                  .bias = packed + k * k * pitch + c,
                                  .out = y + at,
                                  .out_pixel = channels,
                                  .columns = s.OW,
                                  .channels = pieces.size(piece),
                                  .stream = false};
        if (k == 5)
          s.stride == 2 ? row_in_place<2, 5>(r) : row_in_place<1, 5>(r);
        else
          s.stride == 2 ? row_in_place<2, 3>(r) : row_in_place<1, 3>(r);
        if (behind.residual != nullptr || behind.act.name != "none")
          finish(epilogue, behind.residual == nullptr ? nullptr : behind.residual + at, y + at, channels, s.OW, pieces.size(piece));
      }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
