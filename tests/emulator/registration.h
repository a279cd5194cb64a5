// Included before every csrc/cuda/*.cu: what the file would register on the CUDA key is kept for install() instead,
// which puts it on the CPU key (registration.cpp).
#pragma once

#include <torch/library.h>

namespace emulator {

struct Registration {
  explicit Registration(void (*registers)(torch::Library&));
};

}  // namespace emulator

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m)                                                           \
  static void C10_CONCATENATE(emulated_, __LINE__)(torch::Library&);                             \
  static const emulator::Registration C10_CONCATENATE(registration_, __LINE__)(                  \
      &C10_CONCATENATE(emulated_, __LINE__));                                                    \
  static void C10_CONCATENATE(emulated_, __LINE__)(torch::Library & m)
