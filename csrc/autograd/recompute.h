// Results that are not kept for the gradient but computed again, from what their node saves anyway: cnnkern.recompute.
//
// While it is on, the saved-tensor hooks of this thread are `pack` and `unpack`. A node whose result can be computed again has a
// recipe, and so have concatenations, which are PyTorch's (deferred/concatenation.h). Whatever saves such a result, or a view of
// it, comes to `pack`, which keeps the recipe in its place. All else is kept as autograd keeps it. Autograd does not look at
// versions behind hooks, so that both are looked at here.
//
// What a recipe computes from may have a recipe in its turn: the input of a batch norm that is a concatenation, a part of a
// concatenation that is a batch norm's result. No deeper: else one layer's gradient could compute the whole network again.
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

// Whose hooks autograd packs what is saved in this thread with.
SavedTensorHooks saved_tensor_hooks();

// A copy below autograd and modes, which are to see no more than PyTorch's operators.
at::Tensor copy_of(const at::Tensor& t);

// A tensor's version, which is looked at when the tensor itself may be gone.
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

// A tensor that is there for as long as somebody else holds its memory.
class Borrowed {
 public:
  explicit Borrowed(const at::Tensor& t);
  // Holds it from here on; whether it was still there, unchanged.
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

// How a result is computed again.
class Recipe : public std::enable_shared_from_this<Recipe> {
 public:
  // Below autograd. `residual` is undefined where there is none.
  using Compute = std::function<at::Tensor(const at::Tensor& residual)>;
  // Where there is a residual, the recipe is worth its while if somebody else keeps that: a block's input for its first
  // convolution, for one. `of_kept`: what else it computes from has no recipe itself.
  Recipe(Compute compute, bool of_kept, const at::Tensor& residual = {});
  virtual ~Recipe() = default;

  // `y` is the result, as what computed it left it.
  void is_for(const at::Tensor& y);
  // Whether t is that result, unchanged, and can be computed without keeping what nobody else keeps.
  bool gives(const at::Tensor& t);
  // The result's values, in its strides. Several who saved it get the same tensor in one backward pass.
  at::Tensor result();
  void saved_by(int change);  // one more, or less
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

// Which recipes may stand for a tensor: any, or in another recipe those that compute from what is kept.
enum class Depth { kAny, kWithinRecipe };

// The recipe of t, or of what t is a view of: nothing where that is no result with one, or has changed.
RecipePointer recipe_of(const at::Tensor& t, Depth depth);

// What stands in the graph for a saved tensor: the tensor, or a recipe and where in its result the tensor lies.
class Packed {
 public:
  Packed(const at::Tensor& t, Depth depth);
  ~Packed();
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
  bool is_recipe() const { return recipe_ != nullptr; }
  at::Tensor unpack() const;    // an error where it has changed
  at::Tensor computed() const;  // by the recipe, as it was

 private:
  Version version_;
  at::Tensor kept_;  // undefined where there is a recipe
  RecipePointer recipe_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_ = 0;
};

// For a node with a recipe, what that computes from: past the hooks, as the tensor or the recipe that stands for it there too.
torch::autograd::SavedVariable saved_with_recipe(const at::Tensor& t);

// Results of PyTorch's operators that can be computed again. This thread knows each for as long as somebody has the tensor;
// then only what has saved it keeps its recipe.
void remember_recipe(const at::Tensor& y, RecipePointer recipe);
void forget_recipes();

// The recipes of our operators. Vectors of parameters are copied: autograd allows a bias to change.
RecipePointer recipe_of_batch_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, const at::Tensor& bias,
                                   const at::Tensor& mean, const at::Tensor& rstd, const std::string& act,
                                   std::optional<double> act_param);
// Statistics are taken again: that costs little beside reading x.
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

// Whether the hooks may be set: not within others, nor where PyTorch refuses any.
bool may_recompute();

// Python's function for `pack`, by which hooks are known as ours.
void hooks_are_ours_with(const void* pack);

}  // namespace cnnkern
