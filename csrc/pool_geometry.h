// The sizes of a pooling, for every backend.
#pragma once

#include <cstdint>

namespace cnnkern {

// x: (N, H, W, C); y: (N, OH, OW, C). A contiguous tensor is N * C images of one channel.
struct PoolGeometry {
  int64_t N, C, H, W, OH, OW;
  int kh, kw, sh, sw, ph, pw;
  bool square(int kernel, int stride) const { return kh == kernel && kw == kernel && sh == stride && sw == stride; }
};

}  // namespace cnnkern
