// The places of a small sample of many elements.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CNNKERN_EVERYWHERE __host__ __device__
#else
#define CNNKERN_EVERYWHERE
#endif

namespace cnnkern {

// The j-th place, from 0 to count - 1. Places are multiples of the golden ratio: they are spread out and form no grid. Equal
// steps do form one: if their number divides the batch, they all fall on the beginning of an image.
CNNKERN_EVERYWHERE constexpr int64_t scattered(int j, int64_t count) {
  const uint32_t fraction = static_cast<uint32_t>(j + 1) * 0x9e3779b9u;  // of 2^32
  const uint64_t n = static_cast<uint64_t>(count);
  return static_cast<int64_t>((n >> 32) * fraction + ((n & 0xffffffffu) * fraction >> 32));
}

}  // namespace cnnkern
