// A layer of a folded model that multiplies with weights: its residual and activation run in its kernel. Its result is deferred as a
// batch norm's is, for the batch norm, the addition and the activation behind it.
#pragma once

#include <ATen/core/Tensor.h>

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

class Folded : public std::enable_shared_from_this<Folded> {
 public:
  // The weight in oneDNN's order for an input of these sizes and dtype.
  using Pack = std::function<at::Tensor(const std::vector<int64_t>&, at::ScalarType)>;

  // Computes with weight and bias, which were made of `sources`, parameters and statistics of modules. oneDNN has kernels for `dtypes`.
  Folded(const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::vector<at::ScalarType> dtypes, Pack pack,
         const std::vector<at::Tensor>& sources);
  virtual ~Folded() = default;

  // Whether it is still what these sources give.
  bool holds(const std::vector<at::Tensor>& sources) const { return seal_.holds(sources); }
  // The layer of the input; nothing where PyTorch's has to compute it.
  std::optional<at::Tensor> call(const std::shared_ptr<Site>& site, const at::Tensor& input);
  // The same in place of another one, whose result `waiting` is.
  at::Tensor take_over(const std::shared_ptr<Site>& site, const at::Tensor& waiting);

  // act(layer(x) + residual), the residual being optional; in any strides.
  virtual at::Tensor run(const at::Tensor& x, const at::Tensor& residual, const Activation& act, at::ScalarType dtype) = 0;
  virtual const char* name() const = 0;  // in messages

 protected:
  virtual bool fits(const at::Tensor& x) const = 0;  // whether it computes an input of this shape
  virtual std::vector<int64_t> output_sizes(const at::Tensor& x) const = 0;
  virtual bool gives_rows(const at::Tensor& input) const = 0;  // whether PyTorch's result has channels innermost
  at::ScalarType computed_in(const at::Tensor& t) const;  // what autocast makes of its dtype
  bool is_librarys(const at::Tensor& x, at::ScalarType dtype) const;  // whether oneDNN has the dtype
  std::optional<at::Tensor> bias_as(at::ScalarType dtype) const;
  // The weight in oneDNN's order for an input of these sizes.
  at::Tensor packed(const std::vector<int64_t>& sizes, at::ScalarType dtype);

  at::Tensor weight_, bias_;

 private:
  bool takes(const at::Tensor& x) const;
  at::Tensor defer(const std::shared_ptr<Site>& site, const at::Tensor& x, const Remembered& x_was,
                   const std::vector<int64_t>& sizes, bool rows, at::ScalarType dtype);

  std::vector<at::ScalarType> dtypes_;
  Pack pack_;
  Seal seal_;
  std::mutex mutex_;
  std::map<std::pair<at::ScalarType, std::vector<int64_t>>, at::Tensor> packed_;
};

// An activation of ours as oneDNN has it behind a layer; "none" for one that it lacks.
struct PostOperator {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  const char* name = "none";
  std::vector<double> numbers = {};
  const char* algorithm = "";
  Scalars scalars() const;
};
PostOperator post_operator(const Activation& act);

// For kernels of ours that have the activation in their epilogue: it, and what is left to do behind them.
struct FusedActivation {
  Activation fused, behind;
  explicit FusedActivation(const Activation& act);
};

// The layer whose result this is, where it waits.
std::shared_ptr<Folded> folded_of(const at::Tensor& t);

template <typename Signature>
auto operator_of(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace cnnkern
