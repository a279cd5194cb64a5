#include "deferred/concatenation.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <set>

#include "autograd/plain.h"
#include "autograd/recompute.h"
#include "deferred/deferred.h"
#include "deferred/seal.h"

namespace cnnkern {

namespace {

// A part of a concatenation: its values, or how to recompute them.
struct Part {
  std::shared_ptr<Values> values;
  std::shared_ptr<Packed> recipe;
  Tensor tensor() const { return values ? values->tensor() : recipe->computed(); }
};

class Concatenation final : public Recipe {
 public:
  Concatenation(std::vector<Part> parts, int64_t dim)
      : Recipe([parts, dim](const Tensor&) { return concatenated(parts, dim); },
               std::all_of(parts.begin(), parts.end(), [](const Part& part) { return part.values != nullptr; })),
        parts_(std::move(parts)), dim_(dim) {}
  const std::vector<Part>& parts() const { return parts_; }
  int64_t dim() const { return dim_; }

 private:
  static Tensor concatenated(const std::vector<Part>& parts, int64_t dim) {
    std::vector<Tensor> tensors;
    for (const Part& part : parts) tensors.push_back(part.tensor());
    return at::cat(tensors, dim);
  }

  std::vector<Part> parts_;
  int64_t dim_;
};

// If a part is itself a recorded concatenation, its parts instead, so that these are never nested.
void append(std::vector<Part>& parts, const Tensor& t, int64_t dim) {
  const auto inner = t.is_view() ? nullptr : std::dynamic_pointer_cast<Concatenation>(recipe_of(t, Depth::kAny));
  if (inner && inner->dim() == dim) {
    parts.insert(parts.end(), inner->parts().begin(), inner->parts().end());
  } else if (recipe_of(t, Depth::kWithinRecipe)) {
    parts.push_back({nullptr, std::make_shared<Packed>(t, Depth::kWithinRecipe)});
  } else {
    parts.push_back({Values::of(t), nullptr});
  }
}

// How much memory the parts keep alive: the whole storage of each, of which the part may be a view.
size_t bytes_of(const std::vector<Part>& parts) {
  std::set<const c10::StorageImpl*> counted;
  size_t bytes = 0;
  for (const Part& part : parts) {
    if (!part.values) continue;
    const c10::StorageImpl* memory = memory_of(part.values->tensor());
    if (counted.insert(memory).second) bytes += memory->nbytes();
  }
  return bytes;
}

bool can_be_computed_again(const Tensor& y, const std::vector<Tensor>& parts) {
  if (!at::GradMode::is_enabled() || !is_undisturbed() || !is_plain(y) || Deferred::of(y) || y.is_inference() || y.storage_offset() != 0 ||
      !y.is_non_overlapping_and_dense())
    return false;
  return std::all_of(parts.begin(), parts.end(), [&](const Tensor& t) {
    return is_plain(t) && !t.is_inference() && t.dim() == y.dim() && t.scalar_type() == y.scalar_type() && t.device() == y.device();
  });
}

}  // namespace

void watch_concatenations(bool on) {
  Waiting::of_this_thread()->watch(on);
  if (!on) forget_recipes();
}

void remember_concatenation(const Tensor& y, const std::vector<Tensor>& tensors, int64_t dim) {
  if (saved_tensor_hooks() != SavedTensorHooks::kOurs || !can_be_computed_again(y, tensors)) return;
  const int64_t counted = dim < 0 ? dim + y.dim() : dim;
  std::vector<Part> parts;
  for (const Tensor& t : tensors) append(parts, t, counted);
  if (bytes_of(parts) <= y.nbytes()) remember_recipe(y, std::make_shared<Concatenation>(std::move(parts), counted));
}

}  // namespace cnnkern
