// The convolution of a folded model: batch norm in its weights, residual and activation in its epilogue. Its result is deferred, as a
// batch norm's is, until the batch norm, the addition and the activation after it are known.
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

class FoldedConv : public std::enable_shared_from_this<FoldedConv> {
 public:
  struct Settings {
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups;
    std::vector<int64_t> pad;  // a padding before the convolution, with at::pad's arguments; may be empty
    std::string pad_mode;
    // The kernel of cnnkern that computes it in float32: "grouped", "pointwise" or "depthwise", or "" for none. `pad` is empty for the
    // last two. It is used for images of at least own_from_pixels, and results of at most own_to_elements.
    std::string own;
    int64_t own_from_pixels, own_to_elements;
    std::vector<at::ScalarType> dtypes;  // for which oneDNN has kernels
  };
  // The weight in oneDNN's order for an input of these sizes and dtype.
  using Pack = std::function<at::Tensor(const std::vector<int64_t>&, at::ScalarType)>;

  // Computes with weight and bias, which were computed from `sources`: parameters and statistics of modules.
  FoldedConv(const at::Tensor& weight, const std::optional<at::Tensor>& bias, Settings settings, Pack pack,
             const std::vector<at::Tensor>& sources);

  // Whether the sources are these and unchanged.
  bool holds(const std::vector<at::Tensor>& sources) const { return seal_.holds(sources); }
  // The convolution of the input; nothing if PyTorch's has to compute it.
  std::optional<at::Tensor> call(const std::shared_ptr<Site>& site, const at::Tensor& input);
  // The same, in place of the convolution whose deferred result is `waiting`.
  at::Tensor take_over(const std::shared_ptr<Site>& site, const at::Tensor& waiting);

  at::Tensor run(const at::Tensor& x, const at::Tensor& residual, const Activation& act, at::ScalarType dtype);

 private:
  bool takes(const at::Tensor& x) const;
  at::ScalarType computed_in(const at::Tensor& t) const;
  std::vector<int64_t> output_sizes(const at::Tensor& x) const;
  at::Tensor defer(const std::shared_ptr<Site>& site, const at::Tensor& x, const Remembered& x_was,
                   const std::vector<int64_t>& sizes, bool rows, at::ScalarType dtype);
  bool is_librarys(const at::Tensor& x, at::ScalarType dtype) const;
  at::Tensor by_parts(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  at::Tensor by_library(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  bool is_own(const at::Tensor& x, at::ScalarType dtype) const;
  at::Tensor by_grouped(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  at::Tensor by_own(const at::Tensor& x, const at::Tensor& residual, const Activation& act);
  at::Tensor packed(const at::Tensor& x);

  at::Tensor weight_, bias_;
  Settings settings_;
  Pack pack_;
  Seal seal_;
  std::mutex mutex_;
  std::map<std::pair<at::ScalarType, std::vector<int64_t>>, at::Tensor> packed_;
  std::once_flag packs_own_;
  at::Tensor own_packed_;  // for cnnkern's kernel
};

// The convolution whose deferred result this is; else null.
std::shared_ptr<FoldedConv> convolution_of(const at::Tensor& t);

}  // namespace cnnkern
