// cnnkern.recompute: results that are recomputed in the backward pass, from what their node saves anyway, instead of saved.
//
// Within it, this thread's saved-tensor hooks are `pack` and `unpack`. A node whose result can be recomputed has a recipe. So do
// concatenations, which PyTorch computes (deferred/concatenation.h). If a layer saves such a result, or a view of it, `pack` saves
// the recipe instead. Other tensors are saved as usual. Autograd does not check versions of tensors that hooks have packed, so they
// are checked here.
//
// A recipe's inputs may have recipes themselves: a batch norm's input may be a concatenation, a part of which is a batch norm's
// result. It is nested no deeper: otherwise one layer's gradient could recompute the whole network.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "autograd/plain.h"
#include "memory_layout.h"

namespace cnnkern {

enum class SavedTensorHooks { kNone, kOurs, kOthers };

// The saved-tensor hooks that are active in this thread.
SavedTensorHooks saved_tensor_hooks();

// A copy that autograd and modes do not see.
at::Tensor copy_of(const at::Tensor& t);

// A tensor's version, which can be checked after the tensor was freed.
class Version {
 public:
  explicit Version(const at::Tensor& t);
  bool is_current() const { return counter_.current_version() == was_; }
  // The error that autograd raises for a saved tensor.
  void check(at::ScalarType dtype, at::IntArrayRef sizes) const;

 private:
  c10::VariableVersion counter_;
  uint32_t was_;
};

// A tensor whose memory others keep alive.
class Borrowed {
 public:
  explicit Borrowed(const at::Tensor& t);
  // Keeps it alive from here on. Returns whether it still existed, unchanged.
  bool hold();
  const at::Tensor& tensor() const { return held_; }
  const Version& version() const { return version_; }

 private:
  Version version_;
  c10::weak_intrusive_ptr<c10::StorageImpl> memory_;
  at::TensorOptions options_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_;
  at::Tensor held_;
};

// How a result is recomputed.
class Recipe : public std::enable_shared_from_this<Recipe> {
 public:
  // Without autograd. `residual` is undefined if there is none.
  using Compute = std::function<at::Tensor(const at::Tensor& residual)>;
  // With a residual, the recipe is only used if the residual is saved anyway, as a block's input is by its first convolution.
  // `of_kept`: its other inputs have no recipes themselves.
  Recipe(Compute compute, bool of_kept, const at::Tensor& residual = {});
  virtual ~Recipe() = default;

  // Sets the result of this recipe, when it has just been computed.
  void is_for(const at::Tensor& y);
  // Whether t is that result, unchanged, and can be recomputed without keeping other tensors alive.
  bool gives(const at::Tensor& t);
  // The result's values, in its strides. It is computed once per backward pass, for all layers that saved it.
  at::Tensor result();
  void saved_by(int change);  // +1 or -1
  at::ScalarType dtype() const { return dtype_; }
  bool is_of_kept() const { return of_kept_; }

 private:
  at::Tensor computed() const;
  void forget();

  Compute compute_;
  bool of_kept_;
  std::optional<Borrowed> residual_;
  std::optional<Version> version_;
  c10::weak_intrusive_ptr<c10::StorageImpl> memory_{c10::intrusive_ptr<c10::StorageImpl>()};
  std::vector<int64_t> sizes_;
  Strides strides_;
  at::ScalarType dtype_ = at::kFloat;
  c10::Device device_ = at::kCPU;

  std::mutex computing_, mutex_;
  int savers_ = 0, given_ = 0, task_ = -1;
  at::Tensor shared_;  // within the backward pass `task_`
  std::optional<c10::Stream> stream_;
};

using RecipePointer = std::shared_ptr<Recipe>;

// Which recipes may replace a tensor: any, or, for the input of another recipe, those whose inputs are saved.
enum class Depth { kAny, kWithinRecipe };

// The recipe of t, or of the tensor that t is a view of; null if that has none or was changed.
RecipePointer recipe_of(const at::Tensor& t, Depth depth);

// What autograd saves in place of a tensor: the tensor, or a recipe and the tensor's place in its result.
class Packed {
 public:
  Packed(const at::Tensor& t, Depth depth);
  ~Packed();
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  bool is_recipe() const { return recipe_ != nullptr; }
  at::Tensor unpack() const;    // an error if it was changed
  at::Tensor computed() const;  // by the recipe, as it was

 private:
  Version version_;
  at::Tensor kept_;  // undefined if there is a recipe
  RecipePointer recipe_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_ = 0;
};

// For an input of a recipe: saved without the hooks, as the tensor or as the recipe that replaces it.
torch::autograd::SavedVariable saved_with_recipe(const at::Tensor& t);

// Recipes of PyTorch's operators. This thread knows each while the tensor exists. After that only the layers that saved it keep
// the recipe.
void remember_recipe(const at::Tensor& y, RecipePointer recipe);
void forget_recipes();

// The recipes of cnnkern's operators. Vectors of parameters are copied, because autograd allows a bias to change.
RecipePointer recipe_of_batch_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, const at::Tensor& bias,
                                   const at::Tensor& mean, const at::Tensor& rstd, const std::string& act,
                                   std::optional<double> act_param);
// Statistics are recomputed too: that takes little time compared with reading x.
using LayerNormForward = std::function<at::Tensor(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias)>;
RecipePointer recipe_of_layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, LayerNormForward forward);

// What a node is as well that has one.
class HasRecipe {
 public:
  virtual ~HasRecipe() = default;
  // Where results are to be computed again: `make` gives the recipe of y, the node's result.
  template <typename Make>
  void keep_recipe(const at::Tensor& y, const Make& make) {
    if (saved_tensor_hooks() != SavedTensorHooks::kOurs || !is_plain(y) || !y.is_non_overlapping_and_dense() ||
        y.storage_offset() != 0)
      return;
    RecipePointer made = make();
    made->is_for(y);
    std::lock_guard<std::mutex> lock(mutex_of_recipe_);
    recipe_ = std::move(made);
  }
  RecipePointer recipe() {
    std::lock_guard<std::mutex> lock(mutex_of_recipe_);
    return recipe_;
  }
  void release_recipe() {
    std::lock_guard<std::mutex> lock(mutex_of_recipe_);
    recipe_ = nullptr;
  }

 private:
  std::mutex mutex_of_recipe_;
  RecipePointer recipe_;
};

// Whether the hooks may be set: not within other hooks, and not where PyTorch refuses hooks.
bool may_recompute();

// Sets Python's function for `pack`, which identifies cnnkern's hooks.
void hooks_are_ours_with(const void* pack);

}  // namespace cnnkern
