#include "deferred/seal.h"

#include <algorithm>
#include <mutex>

#include "check.h"
#include "deferred/deferred.h"
#include "deferred/memory.h"

namespace cnnkern {

struct Sealed {
  std::vector<const c10::TensorImpl*> tensors;
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> memory;  // so that its address is nobody else's

  bool has(size_t i, const c10::StorageImpl* other) const { return memory[i]._unsafe_get_target() == other; }
  bool broken = false;
};

namespace {

std::mutex mutex;
std::vector<Sealed*> all;
std::vector<Kept*> all_kept;

// The keys of any tensor, which its class keeps to its heirs.
struct Keys : c10::TensorImpl {
  static c10::DispatchKeySet& of(const Tensor& t) { return t.unsafeGetTensorImpl()->*(&Keys::key_set_); }
};

// Whether nobody can write to t's memory but through t: no other tensor has it, no object of Python's, no array of NumPy's.
bool has_no_alias(const Tensor& t) { return t.storage().resizable() && is_alone_in_memory(t); }

}  // namespace

Seal::Seal(const std::vector<Tensor>& tensors) : sealed_(std::make_unique<Sealed>()) {
  std::lock_guard<std::mutex> lock(mutex);
  for (const Tensor& t : tensors) {
    sealed_->broken = sealed_->broken || !is_plain(t) || !has_no_alias(t);
    sealed_->tensors.push_back(t.unsafeGetTensorImpl());
    sealed_->memory.emplace_back(t.storage().getWeakStorageImpl());
    if (!t.key_set().has(kDeferredKey)) Keys::of(t) = Keys::of(t).add(kDeferredKey);
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

void Kept::keep(const Tensor& t) {
  std::lock_guard<std::mutex> lock(mutex);
  tensor_ = t, version_ = t._version();
  if (!t.key_set().has(kDeferredKey)) Keys::of(t) = Keys::of(t).add(kDeferredKey);
  all_kept.push_back(this);
}

void Kept::reset() {
  Tensor released, copy;  // destroyed without the lock: what they free may be kept tensors' nodes
  std::lock_guard<std::mutex> lock(mutex);
  std::erase(all_kept, this);
  std::swap(released, tensor_), std::swap(copy, copy_);
}

Tensor Kept::unpack() const {
  std::lock_guard<std::mutex> lock(mutex);
  if (!tensor_.defined()) return Tensor();
  if (copy_.defined()) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !tensor_.requires_grad(), "cnnkern: what was added to a batch norm's output was changed "
                "in place since, and a second derivative needs it as it was");
    return copy_;
  }
  TORCH_CHECK(tensor_._version() == version_, "one of the variables needed for gradient computation has been modified by an inplace "
              "operation: what was added to a batch norm's output, through a view that was made before. Use the view after the "
              "gradient, or leave this batch norm unconverted.");
  return tensor_;
}

void Kept::copy_those_of(const c10::StorageImpl* memory) {
  std::lock_guard<std::mutex> lock(mutex);
  for (Kept* kept : all_kept)
    if (memory_of(kept->tensor_) == memory && !kept->copy_.defined() && kept->tensor_._version() == kept->version_)
      kept->copy_ = copy_of(kept->tensor_);
}

void Seal::break_those_of(const c10::StorageImpl* memory) {
  std::lock_guard<std::mutex> lock(mutex);
  for (Sealed* seal : all)
    for (size_t i = 0; i < seal->memory.size(); ++i) seal->broken = seal->broken || seal->has(i, memory);
}

}  // namespace cnnkern
