// Puts the kernels of csrc/cuda on the CUDA key, where they are built. (Not at the foot of their own files: nvcc would
// take seconds longer for each.)
#include <torch/library.h>

#include "kernels.h"

#ifdef CNNKERN_CUDA

namespace cnnkern {
#define DECLARE(op) signature::op op##_cuda;
CNNKERN_OPERATORS(DECLARE)
}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, CUDA, m) {
#define REGISTER(op) m.impl(#op, &cnnkern::op##_cuda);
  CNNKERN_OPERATORS(REGISTER)
}

#endif
