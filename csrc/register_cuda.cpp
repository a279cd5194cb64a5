// Puts the kernels of csrc/cuda on the CUDA key, where they are built. (Not at the foot of their own files: nvcc would
// take seconds longer for each.)
#include <torch/library.h>

#include "kernels.h"

#ifdef CNNKERN_CUDA

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>

#include <atomic>
#include <string>
#include <utility>

#include "no_image.h"

namespace cnnkern {
namespace {

std::atomic<bool> launchers_answer{false};

std::string this_gpu() {
  int device = 0, major = 0, minor = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return std::to_string(major) + "." + std::to_string(minor);
}

// The function on the CUDA key: calls the kernel or, if another backend is selected, the operator under whose name
// cnnkern/backends.py registered the launchers. Registering launchers on this key instead would free them when the backend changes,
// while other threads may run them.
template <const char* launcher_name, auto kernel>
struct OnCudaKey;
template <const char* launcher_name, typename Result, typename... Arguments, Result (*kernel)(Arguments...)>
struct OnCudaKey<launcher_name, kernel> {
  static Result call(Arguments... arguments) {
    if (!launchers_answer)
      return with_image(CNNKERN_CUDA_ARCHITECTURES, this_gpu, [&] { return kernel(std::forward<Arguments>(arguments)...); });
    static const auto launcher =
        c10::Dispatcher::singleton().findSchemaOrThrow(launcher_name, "").typed<Result(Arguments...)>();
    return launcher.redispatch(c10::DispatchKeySet(c10::DispatchKey::CUDA), std::forward<Arguments>(arguments)...);
  }
};

#define NAME(op) constexpr char op##_launcher[] = "cnnkern_launchers::" #op;
CNNKERN_OPERATORS(NAME)

}  // namespace

#define DECLARE(op) signature::op op##_cuda;
CNNKERN_OPERATORS(DECLARE)

void let_launchers_answer(bool do_so) { launchers_answer = do_so; }

}  // namespace cnnkern

TORCH_LIBRARY_IMPL(cnnkern, CUDA, m) {
#define REGISTER(op) m.impl(#op, &cnnkern::OnCudaKey<cnnkern::op##_launcher, &cnnkern::op##_cuda>::call);
  CNNKERN_OPERATORS(REGISTER)
}

#endif
