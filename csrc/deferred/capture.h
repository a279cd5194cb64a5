// Which CUDA graph capture a stream is in. A result has to be computed within the capture in which it was called.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>

namespace cnnkern {

// Whether this extension can tell: it was built with CUDA.
bool sees_captures();
// A number of the capture; 0 where there is none.
uint64_t capture_of(const c10::Stream& stream);

}  // namespace cnnkern
