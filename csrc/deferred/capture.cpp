#include "deferred/capture.h"

#ifdef CNNKERN_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace cnnkern {

#ifdef CNNKERN_CUDA

bool sees_captures() { return true; }

uint64_t capture_of(const c10::Stream& stream) {
  if (!stream.device().is_cuda()) return 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(c10::cuda::CUDAStream(stream), &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

#else

bool sees_captures() { return false; }

uint64_t capture_of(const c10::Stream&) { return 0; }

#endif

}  // namespace cnnkern
