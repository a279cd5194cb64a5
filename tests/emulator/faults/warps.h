// Exchanges of the lanes of a warp. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

template <bool kFault>
void sum_lower_half(float* out) {
  if (threadIdx.x >= 16) return;
  float v = 1;
  for (int d = 8; d > 0; d /= 2) v += __shfl_xor_sync(kFault ? kAll : 0x0000ffffu, v, d);
  out[threadIdx.x] = v;
}
template <bool kFault>
void wrong_mask() {
  Global<float> out(16);
  launch(sum_lower_half<kFault>, 1, 32, 0, out.data);
  expect(out, std::vector<float>(16, 16.0f));
}

template <bool kFault>
void agree_on_a_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFault && threadIdx.x % 2 == 1 ? kAll - (1u << 4) : kAll, 1.0f, 1);
}
template <bool kFault>
void lanes_with_different_masks() {
  Global<float> out(32);
  launch(agree_on_a_mask<kFault>, 1, 32, 0, out.data);
}

template <bool kFault>
void read_beyond_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, kFault ? 16 : 8);
}
template <bool kFault>
void source_outside_mask() {
  Global<float> out(16);
  launch(read_beyond_mask<kFault>, 1, 32, 0, out.data);
}

}  // namespace
