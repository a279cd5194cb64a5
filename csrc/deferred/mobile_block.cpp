// Folded convolutions of a mobile block that one kernel computes: 1x1 and depthwise, depthwise and 1x1, or all three.
#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include "aten.h"
#include "deferred/folded_conv.h"
#include "deferred/own_kernels.h"

namespace cnnkern {

namespace {

constexpr auto kRows = at::MemoryFormat::ChannelsLast;

// Bands of rows into which images are cut, so that threads have about as much to do each.
int64_t bands_of(int64_t images, int64_t rows) {
  const int64_t threads = at::get_num_threads();
  int64_t bands = 1;
  while (bands < rows && images * bands % threads != 0 && images * bands < 4 * threads) ++bands;
  return bands;
}

// Where images are cut into bands, rows at their borders are expanded twice, and bands may differ in size: the rows that the slowest
// thread expands, compared with those that it would have to.
double work_in_bands(const ImageSizes& s, int64_t k, int64_t bands, bool expands) {
  const int64_t halo = expands ? k - s.stride : 0;
  return static_cast<double>(bands * (at::divup(s.OH, bands) * s.stride + halo)) / static_cast<double>(s.OH * s.stride + halo);
}

}  // namespace

bool FoldedConv::is_of_block(const char* kind) const {
  return settings_.own == kind && weight_.scalar_type() == at::kFloat && (settings_.own == "depthwise" || settings_.stride[0] == 1);
}

bool FoldedConv::can_lead(const Activation& act, at::ScalarType dtype) const {
  return dtype == at::kFloat && !act.slope.defined() && (is_of_block("pointwise") || is_of_block("depthwise"));
}

bool FoldedConv::follows(const LeadingSource& before) const {
  if (dynamic_cast<const ScaledSource*>(&before) != nullptr) return is_of_block("pointwise");
  const auto* layer = dynamic_cast<const FoldedConv*>(before.layer.get());
  return layer != nullptr && ((layer->is_of_block("pointwise") && is_of_block("depthwise")) ||
                              (layer->is_of_block("depthwise") && is_of_block("pointwise")));
}

bool FoldedConv::Block::is_faster(const Tensor& x) const {
  // By measurement: benchmarks/studies/mobile_blocks.py. The last convolution makes up for more. oneDNN's 5x5 is fast on tiny images.
  const ImageSizes size = image(x);
  const int64_t k = depthwise->weight_.size(2);
  if (project == nullptr && k == 5 && size.H * size.W < 64) return false;
  return work_in_bands(size, k, bands(x), expand != nullptr) <= (project == nullptr ? 1.02 : 1.15);
}

int64_t FoldedConv::Block::bands(const Tensor& x) const { return bands_of(x.size(0), image(x).OH); }

ImageSizes FoldedConv::Block::image(const Tensor& x) const {
  const auto sizes = depthwise->output_sizes(x);
  return {x.size(0), x.size(2), x.size(3), sizes[2], sizes[3], depthwise->settings_.stride[0]};
}

Tensor FoldedConv::Block::run(const Tensor& x, const Tensor& residual, const Activation& act) const {
  static auto* const mobile_block = CNNKERN_FOR_THIS_CPU(mobile_block);
  RECORD_FUNCTION("cnnkern::mobile_block", std::vector<c10::IValue>());
  const FoldedConv& last = project == nullptr ? *depthwise : *project;
  const ImageSizes size = image(x);
  const int64_t outputs = last.weight_.size(0);
  const Tensor from = x.contiguous(kRows), added = residual.defined() ? residual.contiguous(kRows) : residual;
  const Tensor y = aten::empty({size.N, outputs, size.OH, size.OW}, x.options().memory_format(kRows));
  const auto [fused, after] = FusedActivation(act);
  const MobileBlock block{.image = size,
                          .inputs = x.size(1),
                          .channels = depthwise->weight_.size(0),
                          .outputs = outputs,
                          .expand = expand == nullptr ? nullptr : expand->packed_for_own(),
                          .expand_act = expand_act,
                          .depthwise = depthwise->packed_for_own(),
                          .k = depthwise->weight_.size(2),
                          .padding = depthwise->settings_.padding[0],
                          .depthwise_act = depthwise_act,
                          .project = project == nullptr ? nullptr : project->packed_for_own(),
                          .bands = bands(x)};
  const Behind behind{added.defined() ? added.const_data_ptr<float>() : nullptr, fused};
  mobile_block(from.const_data_ptr<float>(), block, y.mutable_data_ptr<float>(), behind);
  return after.name == "none" ? y : activated(y, after);
}

Tensor FoldedConv::run_with(const LeadingSource& before, const Tensor& residual, const Activation& act) {
  if (const auto* scaled = dynamic_cast<const ScaledSource*>(&before)) return run_scaled(*scaled, residual, act);
  return run_block(static_cast<const ActivatedSource&>(before), residual, act);
}

Tensor FoldedConv::run_scaled(const ScaledSource& before, const Tensor& residual, const Activation& act) {
  static auto* const scaled = CNNKERN_FOR_THIS_CPU(scaled);
  const Tensor x = before.image();
  if (!is_librarys(x, at::kFloat)) return {};
  RECORD_FUNCTION("cnnkern::scaled_convolution", std::vector<c10::IValue>());
  const Tensor from = x.contiguous(kRows), scale = before.scale().contiguous();
  const Tensor added = residual.defined() ? residual.contiguous(kRows) : residual;
  const Tensor y = aten::empty({x.size(0), weight_.size(0), x.size(2), x.size(3)}, x.options().memory_format(kRows));
  const auto [fused, after] = FusedActivation(act);
  const Behind behind{added.defined() ? added.const_data_ptr<float>() : nullptr, fused};
  scaled(from.const_data_ptr<float>(), scale.const_data_ptr<float>(), packed_for_own(), y.mutable_data_ptr<float>(), x.size(1),
         weight_.size(0), x.size(0), x.size(2) * x.size(3), behind);
  return after.name == "none" ? y : activated(y, after);
}

// This is the last layer of two or three.
Tensor FoldedConv::run_block(const ActivatedSource& before, const Tensor& residual, const Activation& act) {
  auto* const layer = static_cast<FoldedConv*>(before.layer.get());
  const bool projects = is_of_block("pointwise");
  const auto first = std::dynamic_pointer_cast<ActivatedSource>(projects ? before.input.before() : nullptr);
  const ActivatedSource* const expand = projects ? first.get() : &before;
  const Block block{.expand = expand == nullptr ? nullptr : static_cast<FoldedConv*>(expand->layer.get()),
                    .depthwise = projects ? layer : this,
                    .project = projects ? this : nullptr,
                    .expand_act = expand == nullptr ? Activation() : expand->act,
                    .depthwise_act = projects ? before.act : Activation()};
  const Tensor x = (expand == nullptr ? before.input : expand->input).value(name());
  if (!is_librarys(x, at::kFloat) || !block.is_faster(x)) return {};
  if (first != nullptr) first->layer->count_together();
  return block.run(x, residual, act);
}

}  // namespace cnnkern
