// Arithmetic and accesses. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

template <bool kFault>
void read_vector(const float* in, uint4* out) {
  *out = *reinterpret_cast<const uint4*>(in + (kFault ? 1 : 4));
}
template <bool kFault>
void misaligned_vector() {
  Global<float> in(8, 1.0f);
  Global<uint4> out(1);
  launch(read_vector<kFault>, 1, 1, 0, in.data, out.data);
}

template <bool kFault>
void index_of_the_last(int64_t* out, int rows, int columns) {
  *out = kFault ? rows * columns - 1 : static_cast<int64_t>(rows) * columns - 1;
}
template <bool kFault>
void index_overflow() {
  Global<int64_t> out(1);
  launch(index_of_the_last<kFault>, 1, 1, 0, out.data, 1 << 16, 1 << 16);
}

}  // namespace
