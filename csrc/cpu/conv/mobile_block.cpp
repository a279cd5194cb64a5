// The convolutions of a mobile block in one pass: rows of the expanded image go into a ring, from which the depthwise convolution
// reads them while they are in the second-level cache. Its rows are the input of the last convolution.
#include <ATen/Parallel.h>

#include "aten.h"
#include "cpu/conv/folded_tiles.h"

namespace cnnkern {
inline namespace CPU_CAPABILITY {

using namespace folded;

namespace {

constexpr int64_t kPixels = 48;  // that a product has at least, so that it is worth reading the weights

}  // namespace

void mobile_block_cpu(const float* x, const MobileBlock& b, float* y, const Behind& behind) {
  const ImageSizes& s = b.image;
  const bool expands = b.expand != nullptr, projects = b.project != nullptr;
  const Pointwise expand(b.expand, b.inputs, b.channels, b.expand_act), project(b.project, b.channels, b.outputs, behind.act);
  const Depthwise depthwise(b.depthwise, b.channels, b.k, b.padding, s.stride, projects ? b.depthwise_act : behind.act);
  const int64_t bands = b.bands, input_row = s.W * b.inputs, output_row = s.OW * b.outputs;
  const int64_t rows = std::min(divup(kPixels, s.OW), divup(s.OH, bands));  // of the output that are computed together
  const int64_t ring = (rows - 1) * s.stride + b.k, row = s.W * b.channels, wide_row = s.OW * b.channels;
  const int64_t ring_size = expands * ring * row, scratch_size = ring_size + projects * rows * wide_row;
  const at::Tensor scratch = aten::empty({at::get_num_threads() * scratch_size}, at::TensorOptions(at::kFloat));
  at::parallel_for(0, s.N * bands, 1, [&](int64_t begin, int64_t end) {
    float *const rows_in = scratch.mutable_data_ptr<float>() + at::get_thread_num() * scratch_size, *const wide = rows_in + ring_size;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / bands, band = unit % bands, from = band * s.OH / bands, until = (band + 1) * s.OH / bands;
      const float* const image = x + n * s.H * input_row;
      const Depthwise::Rows source{expands ? rows_in : image, s.H, s.W, expands ? ring : s.H};
      int64_t next = std::max<int64_t>(from * s.stride - b.padding, 0);  // the next row to expand
      for (int64_t oh = from; oh < until; oh += rows) {
        const int64_t count = std::min(rows, until - oh), last = std::min((oh + count - 1) * s.stride - b.padding + b.k, s.H);
        while (expands && next < last) {
          const int64_t slot = next % ring, together = std::min(last - next, ring - slot);
          expand.compute(together * s.W, image + next * input_row, nullptr, rows_in + slot * row);
          next += together;
        }
        const int64_t at = (n * s.OH + oh) * output_row;
        const float* const residual = behind.residual == nullptr ? nullptr : behind.residual + at;
        for (int64_t r = 0; r < count; ++r)
          if (projects)
            depthwise.compute(source, oh + r, s.OW, nullptr, wide + r * wide_row);
          else
            depthwise.compute(source, oh + r, s.OW, residual == nullptr ? nullptr : residual + r * output_row, y + at + r * output_row);
        if (projects) project.compute(count * s.OW, wide, residual, y + at);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
