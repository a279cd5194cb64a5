// The error on a GPU that the CUDA kernels were not built for: it says what to build, instead of CUDA's own message.
#pragma once

#include <c10/util/Exception.h>

#include <string>
#include <string_view>
#include <utility>

namespace cnnkern {

// Returns what `kernel` returns. If it fails because no code of the extension runs on this GPU, the error says so. `built` has
// the architectures as in TORCH_CUDA_ARCH_LIST. `gpu`, which returns the GPU's, such as "7.5", is called only then: a call that
// works has no overhead.
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
