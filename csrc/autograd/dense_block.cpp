#include "autograd/dense_block.h"

#include <ATen/Functions.h>
#include <ATen/TracerMode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "aten.h"
#include "autograd/composite.h"
#include "autograd/node.h"
#include "deferred/deferred.h"
#include "kernels.h"
#include "prefix.h"

namespace cnnkern {

using torch::autograd::Node;
using torch::autograd::variable_list;
using torch::autograd::impl::gradient_edge;

namespace {

uint32_t version_of(const Tensor& t) { return t.unsafeGetTensorImpl()->version_counter().current_version(); }

Tensor dense_copy(const Tensor& t, bool rows) { return aten::empty_strided(t.sizes(), plain_strides(t.sizes(), rows), t.options()).copy_(t); }

// The gradient of channels [begin, end) of what has the gradient g.
Tensor channels_of(const Tensor& g, int64_t begin, int64_t end) { return at::narrow(g, 1, begin, end - begin); }

// Features with further channels: inputs are the features and those.
struct AppendNode final : Node {
  int64_t channels;  // of the features
  bool rows;

  std::string name() const override { return "DenseBlockAppend"; }
  variable_list apply(variable_list&& grads) override {
    const Tensor& g = grads[0];
    variable_list out(2);
    if (!g.defined()) return out;
    if (at::GradMode::is_enabled()) {
      if (task_should_compute_output(0)) out[0] = channels_of(g, 0, channels);
      if (task_should_compute_output(1)) out[1] = channels_of(g, channels, g.size(1));
      return out;
    }
    // No view in autograd's sense, which would hold the whole gradient. The new channels' is a copy: the rest of this memory is
    // written to again.
    at::AutoDispatchBelowADInplaceOrView below;
    if (task_should_compute_output(1)) out[1] = dense_copy(channels_of(g, channels, g.size(1)), rows);
    if (task_should_compute_output(0)) out[0] = channels_of(g, 0, channels);
    return out;
  }
};

// Whether nobody but who holds this reference can see the gradient's memory, and its strides are those of a prefix.
bool is_own_prefix(const Tensor& g, bool rows) {
  return g.defined() && is_plain(g) && g.use_count() == 1 && g.storage().use_count() == 1 && width_of_prefix(g, rows) > 0;
}

}  // namespace

// What is handed out: an alias of the features. Statistics outlive the buffer, for a norm behind the block.
struct FeaturesNode final : Node {
  std::weak_ptr<FeatureBuffer> buffer;
  Tensor mean, var;
  uint32_t version;
  bool rows;

  std::string name() const override { return "DenseBlockFeatures"; }
  variable_list apply(variable_list&& grads) override { return std::move(grads); }

  static FeaturesNode* of(const Tensor& x) {
    const auto node = x.grad_fn();
    auto* const found = node ? dynamic_cast<FeaturesNode*>(&*node) : nullptr;
    const bool unchanged = found != nullptr && version_of(x) == found->version && width_of_prefix(x, found->rows) > 0;
    // Who looks at operators is to see all of them.
    const bool seen = c10::impl::TorchDispatchModeTLS::any_modes_set() || at::tracer::impl::is_dispatch_enabled();
    return unchanged && x.size(1) == found->mean.size(0) && !seen ? found : nullptr;
  }
};

namespace {

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::bn_act_backward", "").typed<signature::bn_act_backward>();
  return op;
}

struct BnRelu {
  static constexpr const char* kName = "DenseBlockBnRelu";
  static constexpr size_t kInputs = 4;  // what the layer got, the features that go on (undefined if none do), weight, bias
  bool rows;
  double eps;
  Tensor var;

  RecipePointer recipe(const variable_list& inputs, const variable_list& statistics) const {
    const Tensor& x = inputs[1].defined() ? inputs[1] : inputs[0];
    const auto from = std::make_shared<Packed>(x, Depth::kWithinRecipe);
    const auto copied = [](const Tensor& t) { return t.defined() ? OptionalTensor(copy_of(t)) : std::nullopt; };
    const auto compute = [from, w = copied(inputs[2]), b = copied(inputs[3]), mean = statistics[0], *this](const Tensor&) {
      return std::get<0>(prefix_bn_relu(from->unpack(), w, b, {}, {}, mean, var, 0.0, eps, rows));
    };
    return std::make_shared<Recipe>(compute, !from->is_recipe());
  }

  variable_list backward(variable_list&& grads, const variable_list& saved, const std::array<bool, kInputs>& needs,
                         const Node& node) const {
    const Tensor &dy = grads[0], &x = saved[0];
    variable_list out(kInputs);
    const OptionalTensor weight = optional_of(saved[1]), bias = optional_of(saved[2]);
    const bool goes_on = grads.size() == 2;
    if (dy.defined() && (needs[0] || needs[2] || needs[3])) {
      const Tensor mean = saved[3].contiguous(), rstd = saved[4].contiguous();
      // Nobody else holds the layer's input, whose gradient then nobody asks for, but for that of the features.
      const bool unseen = goes_on && node.next_edge(0).function.use_count() == 1;
      if (unseen && needs[1] && !at::GradMode::is_enabled() && is_plain(dy) && width_of_prefix(x, rows) > 0 &&
          is_own_prefix(grads[1], rows)) {
        at::AutoDispatchBelowADInplaceOrView below;
        std::tie(out[2], out[3]) = prefix_bn_relu_backward(dy, x, weight, bias, mean, rstd, grads[1], rows, {needs[2], needs[3]});
      } else {
        std::tie(out[0], out[2], out[3]) = backward_op().call(dy, x, weight, bias, mean, rstd, /*training=*/true, "relu",
                                                              {needs[0], needs[2], needs[3]}, std::nullopt);
      }
      if (!needs[0]) out[0] = Tensor();
      for (const size_t i : {2, 3})
        if (!needs[i]) out[i] = Tensor();
    }
    if (goes_on && needs[1]) out[1] = std::move(grads[1]);
    return out;
  }
};

}  // namespace

std::shared_ptr<FeatureBuffer> FeatureBuffer::of(const Tensor& x, int64_t further) {
  if (!at::GradMode::is_enabled() || !x.requires_grad() || !is_undisturbed() || !is_plain(x) || !x.is_cpu() || x.dim() != 4 ||
      x.numel() == 0 || x.is_inference() || has_tangent(x) || further <= 0)
    return nullptr;
  const auto type = x.scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) return nullptr;
  std::shared_ptr<FeatureBuffer> made(new FeatureBuffer(x, x.size(1) + further));
  made->write(x);
  return made;
}

FeatureBuffer::FeatureBuffer(const Tensor& x, int64_t width) : rows_(batch_norm_in_rows(x)) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = width;
  at::AutoDispatchBelowADInplaceOrView below;
  buffer_ = aten::empty_strided(sizes, plain_strides(sizes, rows_), x.options());
  mean_ = at::empty({width}, x.options().dtype(at::kDouble)), var_ = at::empty_like(mean_);
  version_ = version_of(buffer_);
}

Tensor FeatureBuffer::first(int64_t channels) const {
  at::AutoDispatchBelowADInplaceOrView below;
  std::vector<int64_t> sizes = buffer_.sizes().vec();
  sizes[1] = channels;
  const Tensor t = buffer_.as_strided(sizes, prefix_strides(sizes, buffer_.size(1), rows_));
  t.unsafeGetTensorImpl()->set_version_counter(buffer_.unsafeGetTensorImpl()->version_counter());
  return t;
}

void FeatureBuffer::write(const Tensor& t) {
  static const auto moments_of =
      c10::Dispatcher::singleton().findSchemaOrThrow("cnnkern::sync_bn_stats", "").typed<signature::sync_bn_stats>();
  const int64_t before = channels_, more = t.size(1);
  {
    const Below below(/*inference=*/false);
    buffer_.narrow(1, before, more).copy_(t);
    const Tensor moments = moments_of.call(t);
    mean_.narrow(0, before, more).copy_(moments.narrow(0, 0, more));
    var_.narrow(0, before, more).copy_(moments.narrow(0, more, more));
  }
  const auto node = make_node<AppendNode>();
  node->channels = before, node->rows = rows_;
  node->set_next_edges({features_.defined() ? gradient_edge(features_) : torch::autograd::Edge(), gradient_edge(t)});
  channels_ += more;
  features_ = first(channels_);
  torch::autograd::set_history(features_, node);
  announce(node);
}

bool FeatureBuffer::append(const Tensor& t) {
  TORCH_CHECK(version_of(buffer_) == version_, "cnnkern.nn.DenseBlock: a layer has written to its input in place, which is the memory "
              "of all layers' inputs; use an operation that is not in place");
  handed_ = nullptr;
  std::vector<int64_t> sizes = buffer_.sizes().vec();
  if (t.dim() == 4) sizes[1] = t.size(1);
  if (!at::GradMode::is_enabled() || !is_undisturbed() || !is_plain(t) || t.is_inference() || has_tangent(t) ||
      t.sizes() != at::IntArrayRef(sizes) || t.scalar_type() != buffer_.scalar_type() || t.device() != buffer_.device() ||
      t.size(1) == 0 || channels_ + t.size(1) > buffer_.size(1))
    return false;
  write(t);
  return true;
}

Tensor FeatureBuffer::features() {
  const auto node = make_node<FeaturesNode>();
  node->set_next_edges({gradient_edge(features_)});
  node->buffer = weak_from_this();
  node->mean = mean_.narrow(0, 0, channels_), node->var = var_.narrow(0, 0, channels_);
  node->version = version_, node->rows = rows_;
  handed_ = node.get();
  const Tensor t = first(channels_);
  torch::autograd::set_history(t, node);
  announce(node);
  return t;
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> bn_relu_of_features(const Tensor& x, const OptionalTensor& weight,
                                                                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                                      const OptionalTensor& running_var, double momentum, double eps) {
  FeaturesNode* const handed = FeaturesNode::of(x);
  if (handed == nullptr) return std::nullopt;
  check_batch_norm("cnnkern::bn_act", x, weight, bias, running_mean, running_var, /*training=*/true, eps);
  const auto buffer = handed->buffer.lock();
  const bool goes_on = buffer && buffer->handed_ == handed;
  const Tensor features = goes_on ? buffer->features_ : Tensor(), &read = goes_on ? features : x;
  const Tensor &w = tensor_or_undefined(weight), &b = tensor_or_undefined(bias), mean = handed->mean, var = handed->var;
  const RunningStatistics statistics(/*training=*/true, running_mean, running_var, /*saves=*/true);
  const auto forward = [&] {
    return prefix_bn_relu(read, weight, bias, statistics.mean(), statistics.var(), mean, var, momentum, eps, handed->rows);
  };
  const auto describe = [&](const auto& results) {
    return std::pair(BnRelu{handed->rows, eps, var}, variable_list{std::get<1>(results), std::get<2>(results)});
  };
  auto results = recorded<BnRelu>({x, features, w, b}, {read, w, b}, forward, describe, [&] { statistics.settle(); });
  if (goes_on) {
    buffer->handed_ = nullptr;
    buffer->features_ = buffer->first(buffer->channels_);
    torch::autograd::set_history(buffer->features_, gradient_edge(std::get<0>(results)).function);
  }
  return results;
}

}  // namespace cnnkern
