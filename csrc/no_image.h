// A GPU that the CUDA kernels were not built for: what to build, in the place of CUDA's own words.
#pragma once

#include <c10/util/Exception.h>

#include <string>
#include <string_view>
#include <utility>

namespace cnnkern {

// What `kernel` returns. Raises a sentence where the error is that no code of the extension runs on this GPU. `built` are the
// architectures as TORCH_CUDA_ARCH_LIST names them, and `gpu` is asked for the GPU's, "7.5", only then: a call that works
// pays nothing.
template <typename Kernel, typename Gpu>
auto with_image(const char* built, const Gpu& gpu, const Kernel& kernel) {
  try {
    return kernel();
  } catch (const c10::Error& error) {  // of every kind that PyTorch's releases make of a status of CUDA
    if (std::string_view(error.what()).find("no kernel image is available") == std::string_view::npos) throw;
    const std::string name = gpu();
    TORCH_CHECK(false, "cnnkern: the CUDA kernels are built for ", built, ", and this GPU is ", name, ": `TORCH_CUDA_ARCH_LIST=",
                name, " pip install --no-build-isolation .` in the repository builds them for it; until then "
                "`cnnkern.backend(\"triton\")` lets Triton's answer");
  }
}

}  // namespace cnnkern
