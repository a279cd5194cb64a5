// Declares cnnkern's kernels for folded layers, for each instruction set.
#pragma once

#include "folded_kernels.h"
#include "for_this_cpu.h"

namespace cnnkern {

#define CNNKERN_DECLARE(kernel) folded_signature::kernel kernel##_cpu;
CNNKERN_DECLARE_FOR_EACH_CPU(CNNKERN_FOLDED_KERNELS, CNNKERN_DECLARE)
#undef CNNKERN_DECLARE

}  // namespace cnnkern
