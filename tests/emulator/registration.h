// Included before csrc/cuda/*.cu: what these would register on the CUDA key is kept for emulator_install() instead, which
// puts it on the CPU key (registration.cpp).
#pragma once

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace emulator {

struct Registration {
  explicit Registration(void (*registers)(torch::Library&));
};

}  // namespace emulator

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) EMULATOR_REGISTERS(m, __COUNTER__)
#define EMULATOR_REGISTERS(m, id)                                                                                       \
  static void C10_CONCATENATE(emulated_, id)(torch::Library&);                                                          \
  static const emulator::Registration C10_CONCATENATE(registration_, id)(&C10_CONCATENATE(emulated_, id));              \
  static void C10_CONCATENATE(emulated_, id)(torch::Library & m)

// Of the types that a kernel is made for, those that __init__.py asks for.
#ifdef EMULATOR_TYPES
#undef AT_DISPATCH_FLOATING_TYPES_AND2
#if EMULATOR_TYPES == 1
#define AT_DISPATCH_FLOATING_TYPES_AND2(A, B, TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__))
#else
#define AT_DISPATCH_FLOATING_TYPES_AND2(A, B, TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))
#endif
#endif
