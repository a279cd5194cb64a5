// The capture of a CUDA graph that a stream is in: what is computed within one is part of the graph, and not of another.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>

namespace cnnkern {

// Whether this extension can tell: it was built with CUDA.
bool sees_captures();
// A number of the capture; 0 where there is none.
uint64_t capture_of(const c10::Stream& stream);

}  // namespace cnnkern
