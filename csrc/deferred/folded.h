// A convolution or linear layer of a folded model. The residual addition and the activation after it run in its kernel. Its result is
// deferred, as a batch norm's is, so that the batch norm, addition and activation that follow can be fused.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "deferred/seal.h"
#include "deferred/site.h"
#include "deferred/source.h"

namespace cnnkern {

class Folded;

// A folded layer's input: a tensor, or the deferred result of a folded layer and an activation, if one kernel computes both layers.
class FoldedInput {
 public:
  FoldedInput(const at::Tensor& x, bool deferred);
  // What computes it, if it is still deferred; else null, and value() is the input.
  std::shared_ptr<class LeadingSource> before() const;
  at::Tensor value(const char* layer) const;  // for this layer; raises an error if it was changed by other means than PyTorch's operators
  std::vector<at::Tensor> reads() const;
  const at::TensorOptions options() const { return x_.options(); }

 private:
  at::Tensor x_;
  bool deferred_;
  int64_t version_ = 0;  // of a deferred one
  Remembered was_;
};

// What the kernel of the layer after it may compute too. `layer` counts how often that was so.
class LeadingSource : public Source {
 public:
  LeadingSource(std::shared_ptr<Folded> layer_, FoldedInput input_) : layer(std::move(layer_)), input(std::move(input_)) {}
  std::vector<at::Tensor> reads() const override { return input.reads(); }
  bool has_any_strides() const override { return true; }
  bool takes_more() const override { return false; }

  const std::shared_ptr<Folded> layer;
  const FoldedInput input;
};

// act(layer(input)).
class ActivatedSource final : public LeadingSource {
 public:
  ActivatedSource(std::shared_ptr<Folded> layer, FoldedInput input, at::ScalarType dtype, Activation act);
  Result compute(const at::Tensor& residual, const Activation& none, bool again) override;

  const at::ScalarType dtype;
  const Activation act;
};

// An image times a factor per channel, input * scale: squeeze-excitation. `layer` computed the scale (N, C, 1, 1).
class ScaledSource final : public LeadingSource {
 public:
  ScaledSource(std::shared_ptr<Folded> layer, FoldedInput input, FoldedInput scale)
      : LeadingSource(std::move(layer), std::move(input)), scale_(std::move(scale)) {}
  Result compute(const at::Tensor& residual, const Activation& none, bool again) override;
  std::vector<at::Tensor> reads() const override;
  at::Tensor image() const { return input.value("multiplication"); }
  at::Tensor scale() const { return scale_.value("multiplication"); }

 private:
  const FoldedInput scale_;
};

class Folded : public std::enable_shared_from_this<Folded> {
 public:
  // The weight in oneDNN's order for an input of these sizes and dtype.
  using Pack = std::function<at::Tensor(const std::vector<int64_t>&, at::ScalarType)>;

  // `sources` are the parameters and statistics from which weight and bias were computed. oneDNN has kernels for `dtypes`.
  Folded(const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::vector<at::ScalarType> dtypes, Pack pack,
         const std::vector<at::Tensor>& sources);
  virtual ~Folded() = default;

  // Whether these are its sources, unchanged.
  bool holds(const std::vector<at::Tensor>& sources) const { return seal_.holds(sources); }
  // The layer's result; nothing if PyTorch's layer has to compute it.
  std::optional<at::Tensor> call(const std::shared_ptr<Site>& site, const at::Tensor& input);
  // The result of this layer for the input of another one, whose deferred result is `deferred`.
  at::Tensor take_over(const std::shared_ptr<Site>& site, const at::Tensor& deferred);

  // act(layer(input) + residual), the residual being optional; in any strides. With the layers before it, if one kernel does.
  at::Tensor run(const FoldedInput& input, const at::Tensor& residual, const Activation& act, at::ScalarType dtype);
  virtual const char* name() const = 0;  // in messages
  // Whether act(layer(x)) should be deferred for the layer after it: that it can be, and usually was computed with that layer.
  bool leads(const Activation& act, at::ScalarType dtype) const { return alone_ <= together_ && can_lead(act, dtype); }
  void count_alone() { ++alone_; }
  void count_together() { ++together_; }

 protected:
  virtual bool fits(const at::Tensor& x) const = 0;  // whether it computes an input of this shape
  virtual std::vector<int64_t> output_sizes(const at::Tensor& x) const = 0;
  virtual bool gives_rows(const at::Tensor& input) const = 0;  // whether PyTorch's result has channels innermost
  virtual bool can_lead(const Activation& /*act*/, at::ScalarType) const { return false; }
  // Whether one kernel can compute `before` and this layer; and their result, undefined if layer by layer is faster.
  virtual bool follows(const LeadingSource& /*before*/) const { return false; }
  virtual at::Tensor run_with(const LeadingSource& /*before*/, const at::Tensor& /*residual*/, const Activation& /*act*/) { return {}; }
  virtual at::Tensor compute(const at::Tensor& x, const at::Tensor& residual, const Activation& act, at::ScalarType dtype) = 0;
  at::ScalarType computed_in(const at::Tensor& t) const;  // its dtype under the current autocast
  bool is_librarys(const at::Tensor& x, at::ScalarType dtype) const;  // whether oneDNN has the dtype
  std::optional<at::Tensor> bias_as(at::ScalarType dtype) const;
  // The weight in oneDNN's order for an input of these sizes.
  at::Tensor packed(const std::vector<int64_t>& sizes, at::ScalarType dtype);
  // Weight and bias as one of cnnkern's kernels reads them: pack(weight, bias), called once.
  template <typename Pack>
  const float* own_packed(const Pack& pack) {
    std::call_once(packs_own_, [&] { own_packed_ = pack(weight_, bias_); });
    return own_packed_.const_data_ptr<float>();
  }

  at::Tensor weight_, bias_;

 private:
  bool takes(const at::Tensor& x) const;
  at::Tensor defer(const std::shared_ptr<Site>& site, const FoldedInput& input, const std::vector<int64_t>& sizes, bool rows,
                   at::ScalarType dtype);

  std::vector<at::ScalarType> dtypes_;
  Pack pack_;
  Seal seal_;
  std::once_flag packs_own_;
  at::Tensor own_packed_;
  std::mutex mutex_;
  std::map<std::pair<at::ScalarType, std::vector<int64_t>>, at::Tensor> packed_;
  std::atomic<int64_t> alone_ = 0, together_ = 0;  // results that were deferred for the layer after it
};

// oneDNN's name and parameters of an activation, as the epilogue of a layer; "none" if it lacks it.
struct PostOperator {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  const char* name = "none";
  std::vector<double> numbers = {};
  const char* algorithm = "";
  Scalars scalars() const;
};
PostOperator post_operator(const Activation& act);

// For cnnkern's kernels: the activation of their epilogue, and the one to compute after them. One of the two is "none".
struct FusedActivation {
  Activation fused, after;
  explicit FusedActivation(const Activation& act);
};

// image * scale, deferred, if scale is the deferred result of a folded layer with one value per image and channel, and a layer that
// follows may compute the product. Nothing if PyTorch's operator has to.
std::optional<at::Tensor> scaled(const at::Tensor& scale, const at::Tensor& image);

// The layer whose deferred result t is; null if it is none.
std::shared_ptr<Folded> folded_of(const at::Tensor& t);

template <typename Signature>
auto operator_of(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace cnnkern
