// Stands in for PyTorch's header: one stream, which has finished a kernel when its launch returns. The emulator refuses
// launches on any other, the null stream included.
#pragma once
#include "gpu_emulator.h"

namespace c10::cuda {

inline void* getCurrentCUDAStream() { return emulator::current_stream(); }

}  // namespace c10::cuda
