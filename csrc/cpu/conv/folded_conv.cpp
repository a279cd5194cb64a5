// 1x1 and depthwise convolutions of folded models, float32, channels innermost.
#include "cpu/conv/folded_tiles.h"

#include <ATen/Parallel.h>

#include "aten.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

using namespace folded;

namespace {

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
  const Pointwise layer(packed, inputs, outputs, behind.act);
  const Panels& panels = layer.panels;
  const int64_t tiles = divup(pixels, layer.most);
  // Blocks of pixels that stay in the second-level cache while the panels pass by; four at least, for threads to share.
  const int64_t in_block = std::clamp<int64_t>(kTileBytes / (layer.most * inputs * 4), 1, divup(tiles, 4)), blocks = divup(tiles, in_block);
  const int64_t work = in_block * layer.most * panels.largest() * kLane * inputs;
  const bool by_panel = outputs > pixels;  // weights are the larger part of what is read: a thread reads few of them, once
  at::parallel_for(0, blocks * panels.count, divup(kSerialWork, work), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t panel = by_panel ? piece / blocks : piece % panels.count, block = by_panel ? piece % blocks : piece / panels.count;
      layer.compute(panel, block * in_block, std::min(tiles, (block + 1) * in_block), tiles, pixels, x, behind.residual, y);
    }
  });
}

// The factors of an image go into the weights: as many products as of a pixel.
void scaled_cpu(const float* x, const float* scale, const float* packed, float* y, int64_t inputs, int64_t outputs, int64_t images,
                int64_t pixels, const Behind& behind) {
  constexpr int64_t kPixels = 128;  // that a panel's weights are multiplied for, at least, where there are so many
  const Pointwise layer(packed, inputs, outputs, behind.act);
  const Panels& panels = layer.panels;
  const int64_t pieces = images * panels.count, blocks = std::clamp<int64_t>(divup(4 * at::get_num_threads(), pieces), 1, divup(pixels, kPixels));
  const int64_t size = panels.largest() * kLane * inputs;
  const at::Tensor scratch = floats(at::get_num_threads() * size);
  at::parallel_for(0, pieces * blocks, divup(kSerialWork, pixels / blocks * size), [&](int64_t begin, int64_t end) {
    float* const weights = scratch.mutable_data_ptr<float>() + at::get_thread_num() * size;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t image = piece / (panels.count * blocks), panel = piece / blocks % panels.count, block = piece % blocks;
      const int64_t first = panels.first(panel) * kLane, width = panels.size(panel) * kLane;
      const int64_t from = block * pixels / blocks, until = (block + 1) * pixels / blocks;
      const float* w = packed + first * inputs;
      float* to = weights;
      for (int64_t k = 0; k < inputs; ++k) {
        const V factor(scale[image * inputs + k]);
        for (int64_t lane = 0; lane < width; lane += kLane, w += kLane, to += kLane) (V::loadu(w) * factor).store(to);
      }
      const int64_t pixel = image * pixels + from, at = pixel * outputs, tiles = divup(until - from, layer.most);
      layer.compute(panel, 0, tiles, tiles, until - from, x + pixel * inputs, behind.residual == nullptr ? nullptr : behind.residual + at,
                    y + at, weights);
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
  const Depthwise layer(packed, channels, k, padding, s.stride, behind.act);
  at::parallel_for(0, s.N * s.OH, divup(kSerialWork / 8, s.OW * channels * k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * s.OW * channels;
      const Depthwise::Rows rows{x + row / s.OH * s.H * s.W * channels, s.H, s.W, s.H};
      layer.compute(rows, row % s.OH, s.OW, behind.residual == nullptr ? nullptr : behind.residual + at, y + at);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
