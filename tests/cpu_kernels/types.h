// Included before the kernels' files: of the types that a kernel is made for, those that __init__.py asks for.
#pragma once

#include <ATen/Dispatch.h>

#undef AT_DISPATCH_FLOATING_TYPES_AND2
#define AT_DISPATCH_FLOATING_TYPES_AND2(A, B, TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::SECOND_TYPE, __VA_ARGS__))
