#include "deferred/seal.h"

#include <algorithm>
#include <mutex>

#include "check.h"
#include "deferred/deferred.h"
#include "deferred/memory.h"

namespace cnnkern {

struct Sealed {
  std::vector<const c10::TensorImpl*> tensors;
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> memory;  // so that its address is not reused

  bool has(size_t i, const c10::StorageImpl* other) const { return memory[i]._unsafe_get_target() == other; }
  bool broken = false;
};

namespace {

std::mutex mutex;
std::vector<Sealed*> all;
std::vector<Values*> all_values;

// Access to the dispatch keys of a TensorImpl, which are protected members.
struct Keys : c10::TensorImpl {
  static c10::DispatchKeySet& of(const Tensor& t) { return t.unsafeGetTensorImpl()->*(&Keys::key_set_); }
};

// From now on dispatch.cpp is called for operators that get t or a view of it.
void mark(const Tensor& t) {
  if (!t.key_set().has(kDeferredKey)) Keys::of(t) = Keys::of(t).add(kDeferredKey);
}

// Whether t's memory can only be written through t: no other tensor, Python object or NumPy array shares it.
bool has_no_alias(const Tensor& t) { return t.storage().resizable() && is_alone_in_memory(t); }

}  // namespace

Seal::Seal(const std::vector<Tensor>& tensors) : sealed_(std::make_unique<Sealed>()) {
  std::lock_guard<std::mutex> lock(mutex);
  for (const Tensor& t : tensors) {
    sealed_->broken = sealed_->broken || !is_plain(t) || !has_no_alias(t);
    sealed_->tensors.push_back(t.unsafeGetTensorImpl());
    sealed_->memory.emplace_back(t.storage().getWeakStorageImpl());
    mark(t);
  }
  all.push_back(sealed_.get());
}

Seal::~Seal() {
  std::lock_guard<std::mutex> lock(mutex);
  std::erase(all, sealed_.get());
}

bool Seal::holds(const std::vector<Tensor>& tensors) const {
  if (sealed_->broken || tensors.size() != sealed_->tensors.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& storage = tensors[i].unsafeGetTensorImpl()->unsafe_storage();
    if (tensors[i].unsafeGetTensorImpl() != sealed_->tensors[i] || !sealed_->has(i, memory_of(tensors[i])) || !storage.resizable() ||
        !tensors[i].key_set().has(kDeferredKey))
      return false;
  }
  return true;
}

std::shared_ptr<Values> Values::of(const Tensor& t) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (Values* values : all_values)
      if (values->are_those_of(t))
        if (auto found = values->weak_from_this().lock()) return found;
  }
  return std::make_shared<Values>(t);
}

Values::Values(const Tensor& t) : tensor_(t.tensor_data()), version_(t._version()) {
  mark(t);
  if (t.is_view()) mark(Tensor(t._base()));
  std::lock_guard<std::mutex> lock(mutex);
  all_values.push_back(this);
}

Values::~Values() {
  std::lock_guard<std::mutex> lock(mutex);
  std::erase(all_values, this);
}

bool Values::are_those_of(const Tensor& t) const {
  return !copied_ && memory_of(t) == memory_of(tensor_) && t._version() == version_ && tensor_._version() == version_ &&
         t.sizes() == tensor_.sizes() && t.strides() == tensor_.strides() && t.storage_offset() == tensor_.storage_offset() &&
         t.scalar_type() == tensor_.scalar_type();
}

Tensor Values::tensor() const {
  std::lock_guard<std::mutex> lock(mutex);
  TORCH_CHECK(copied_ || tensor_._version() == version_, "one of the variables needed for gradient computation has been modified by an "
              "inplace operation: what was added to a batch norm's output, or concatenated within cnnkern.recompute, through a view "
              "that was made before. Use the view after the gradient, or leave this batch norm unconverted.");
  return tensor_;
}

bool Values::are_copied() const {
  std::lock_guard<std::mutex> lock(mutex);
  return copied_;
}

void Values::copy_those_of(const c10::StorageImpl* memory) {
  std::lock_guard<std::mutex> lock(mutex);
  for (Values* values : all_values) {
    if (values->copied_ || memory_of(values->tensor_) != memory || values->tensor_._version() != values->version_) continue;
    values->tensor_ = copy_of(values->tensor_);
    values->copied_ = true;
  }
}

Tensor Kept::unpack() const {
  if (!values_) return Tensor();
  const Tensor values = values_->tensor();
  if (!values_->are_copied()) return tensor_;
  TORCH_CHECK(!at::GradMode::is_enabled() || !tensor_.requires_grad(), "cnnkern: what was added to a batch norm's output was changed in "
              "place since, and a second derivative needs it as it was");
  return values;
}

void Seal::break_those_of(const c10::StorageImpl* memory) {
  std::lock_guard<std::mutex> lock(mutex);
  for (Sealed* seal : all)
    for (size_t i = 0; i < seal->memory.size(); ++i) seal->broken = seal->broken || seal->has(i, memory);
}

}  // namespace cnnkern
