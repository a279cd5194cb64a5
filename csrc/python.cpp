// cnnkern._C as Python sees it: what is no operator. Importing it registers the operators.
#include <ATen/Version.h>
#include <torch/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "kernels.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", "g++ " __VERSION__},
      {"torch", TORCH_VERSION},
#ifdef CNNKERN_CUDA
      {"cuda", CNNKERN_CUDA},
      {"cuda_architectures", CNNKERN_CUDA_ARCHITECTURES},
#else
      {"cuda", ""},
      {"cuda_architectures", ""},
#endif
#if CNNKERN_X86
      {"cpu_capabilities", "DEFAULT AVX2 AVX512"},
#else
      {"cpu_capabilities", "DEFAULT"},
#endif
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of cnnkern; importing this module registers torch.ops.cnnkern.*";
  m.def("build_info", &build_info, "What this extension was built with, as a dict of strings.");
  m.def("cpu_capability", &at::get_cpu_capability,
        "The instruction set whose kernels answer: DEFAULT, AVX2 or AVX512. ATEN_CPU_CAPABILITY selects it.");
#ifdef CNNKERN_CUDA
  m.def("let_launchers_answer", &cnnkern::let_launchers_answer,
        "Whether torch.ops.cnnkern_launchers answer for CUDA tensors, in the place of this extension's kernels.");
#endif
}
