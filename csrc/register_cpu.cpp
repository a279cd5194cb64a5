// Puts the kernels of csrc/cpu on the CPU key.
#include <torch/library.h>

#include "for_this_cpu.h"
#include "kernels.h"

namespace cnnkern {

#define DECLARE(op) signature::op op##_cpu;
CNNKERN_DECLARE_FOR_EACH_CPU(CNNKERN_OPERATORS, DECLARE)

}  // namespace cnnkern

#define REGISTER(op) m.impl(#op, CNNKERN_FOR_THIS_CPU(op));

TORCH_LIBRARY_IMPL(cnnkern, CPU, m) {
  using namespace cnnkern;
  CNNKERN_OPERATORS(REGISTER)
}
