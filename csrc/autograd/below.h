// What results that are computed at another time than their layer was called are computed under.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>

namespace cnnkern {

// PyTorch keeps this key for extensions that defer: those of torchdistx, which is no longer developed.
constexpr auto kDeferredKey = c10::DispatchKey::DeferredInit;

// Below autograd, autocast, modes and transforms.
class Below {
 public:
  explicit Below(bool inference)
      : mode_(c10::InferenceMode::is_enabled() == inference ? nullptr : std::make_unique<c10::InferenceMode>(inference)),
        keys_(c10::default_included_set,
              c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::DispatchKeySet(kDeferredKey)) {}

 private:
  std::unique_ptr<c10::InferenceMode> mode_;
  c10::impl::ForceDispatchKeyGuard keys_;
};

// What autograd saves here is saved as it is, whatever hooks there are.
class NoHooks {
 public:
  NoHooks() : before_(at::SavedTensorDefaultHooks::set_tracing(true)) {}
  ~NoHooks() { at::SavedTensorDefaultHooks::set_tracing(before_); }
  NoHooks(const NoHooks&) = delete;
  NoHooks& operator=(const NoHooks&) = delete;

 private:
  bool before_;
};

inline c10::Stream stream_of(c10::Device device) {
  if (device.is_cpu()) return c10::Stream(c10::Stream::DEFAULT, device);
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace cnnkern
