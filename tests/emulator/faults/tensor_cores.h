// Operations of a whole warp on matrices: against plain products of tagged elements, in PTX's words. Part of faults.cpp.
#pragma once

#include "common.h"

namespace {

using cnnkern::gpu::load_matrices;
using cnnkern::gpu::multiply_add;
using cnnkern::gpu::to_tf32;

constexpr int kRows = 16, kColumns = 8;

// Whole numbers, each of which T holds as it is, and their sums of products too: no rounding hides a wrong place.
template <typename T>
struct Tagged : Global<T> {
  Tagged(int size, unsigned seed) : Global<T>(size) {
    for (int i = 0; i < size; ++i) {
      seed = seed * 1664525u + 1013904223u;
      this->data[i] = static_cast<T>(static_cast<float>(seed >> 24) - 128);
    }
  }
};

template <typename T>
std::vector<float> product(const Global<T>& a, const Global<T>& b, int depth) {  // + 1; b[k][column]
  std::vector<float> d(kRows * kColumns, 1.0f);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c)
      for (int k = 0; k < depth; ++k)
        d[r * kColumns + c] += static_cast<float>(a.data[r * depth + k]) * static_cast<float>(b.data[k * kColumns + c]);
  return d;
}

__device__ void store_product(const float (&d)[4], float* out) {
  const unsigned group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    out[row * kColumns + column] = d[i];
  }
}

// mma.m16n8k16 and mma.m16n8k8 of 16-bit elements: a[i], b[i] of PTX, two of which make a register.
template <typename T, int kDepth>
void multiply(const T* a, const T* b, float* out, bool swapped) {
  const unsigned group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  unsigned fragments_a[kDepth / 4], fragments_b[kDepth / 8];
  for (unsigned i = 0; i < kDepth / 2; i += 2) {
    const unsigned row = (i < 2) || (4 <= i && i < 6) ? group : group + 8, column = in_group * 2 + (i < 4 ? 0 : 8);
    memcpy(&fragments_a[i / 2], a + row * kDepth + column, 4);
  }
  for (unsigned i = 0; i < kDepth / 4; i += 2) {
    const unsigned row = in_group * 2 + (i < 2 ? 0 : 8);
    const T pair[] = {b[row * kColumns + group], b[(row + 1) * kColumns + group]};
    memcpy(&fragments_b[i / 2], pair, 4);
  }
  if (swapped) std::swap(fragments_a[0], fragments_a[1]);
  float d[4] = {1, 1, 1, 1};
  multiply_add<T>(d, fragments_a, fragments_b);
  store_product(d, out);
}
void multiply_tf32(const float* a, const float* b, float* out, bool swapped) {
  const unsigned group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  unsigned fragments_a[4], fragments_b[2];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
    fragments_a[i] = to_tf32(a[row * 8 + column]);
  }
  for (unsigned i = 0; i < 2; ++i) fragments_b[i] = to_tf32(b[(i == 0 ? in_group : in_group + 4) * kColumns + group]);
  if (swapped) std::swap(fragments_a[0], fragments_a[1]);
  float d[4] = {1, 1, 1, 1};
  multiply_add<float>(d, fragments_a, fragments_b);
  store_product(d, out);
}
template <typename T>
void multiplies(void (*kernel)(const T*, const T*, float*, bool), int depth, bool swapped) {
  const Tagged<T> a(kRows * depth, 1), b(depth * kColumns, 2);
  const Global<float> out(kRows * kColumns);
  launch(kernel, 1, 32, 0, a.data, b.data, out.data, swapped);
  expect(out, product(a, b, depth));
}
template <bool kFault>
void fragments_out_of_order() {
  multiplies<c10::BFloat16>(multiply<c10::BFloat16, 16>, 16, kFault);
  multiplies<c10::Half>(multiply<c10::Half, 16>, 16, kFault);
  multiplies<c10::BFloat16>(multiply<c10::BFloat16, 8>, 8, kFault);
  multiplies<c10::Half>(multiply<c10::Half, 8>, 8, kFault);
  multiplies<float>(multiply_tf32, 8, kFault);
}

// Which element each half of a lane's registers has: the number of its matrix, row and column.
template <int kMatrices, bool kTransposed>
void load_tags(unsigned* out) {
  GPU_SHARED(uint4, rows, 8 * kMatrices);
  if (threadIdx.x < 8 * kMatrices)
    for (unsigned j = 0; j < 8; ++j) reinterpret_cast<uint16_t*>(rows + threadIdx.x)[j] = static_cast<uint16_t>(8 * threadIdx.x + j);
  __syncthreads();
  unsigned r[kMatrices];
  load_matrices<kMatrices, kTransposed>(r, threadIdx.x < 8 * kMatrices ? rows + threadIdx.x : nullptr);
  memcpy(out + kMatrices * threadIdx.x, r, sizeof(r));
}
template <int kMatrices, bool kTransposed>
void loads_tags() {
  const Global<unsigned> out(32 * kMatrices);
  launch(load_tags<kMatrices, kTransposed>, 1, 32, 0, out.data);
  std::vector<unsigned> wanted;
  for (unsigned i = 0; i < 32; ++i)
    for (unsigned matrix = 0; matrix < kMatrices; ++matrix) {
      const auto tag = [&](unsigned row, unsigned column) { return matrix * 64 + row * 8 + column; };
      wanted.push_back(kTransposed ? tag(2 * (i % 4), i / 4) | tag(2 * (i % 4) + 1, i / 4) << 16
                                   : tag(i / 4, 2 * (i % 4)) | tag(i / 4, 2 * (i % 4) + 1) << 16);
    }
  expect(out, wanted);
}

// a[row][k] and b[k][column] by way of shared memory, where b's rows go along columns and its fragments along k.
template <bool kFault>
void load_and_multiply(const c10::BFloat16* a, const c10::BFloat16* b, float* out) {
  GPU_SHARED(uint4, rows_of_a, 32);
  GPU_SHARED(uint4, rows_of_b, 16);
  rows_of_a[threadIdx.x] = reinterpret_cast<const uint4*>(a)[threadIdx.x];
  if (threadIdx.x < 16) rows_of_b[threadIdx.x] = reinterpret_cast<const uint4*>(b)[threadIdx.x];
  __syncthreads();
  unsigned fragments_a[4], fragments_b[2];
  load_matrices(fragments_a, rows_of_a + 2 * (threadIdx.x % 16) + threadIdx.x / 16);
  load_matrices<2, !kFault>(fragments_b, rows_of_b + threadIdx.x % 16);
  float d[4] = {1, 1, 1, 1};
  multiply_add<c10::BFloat16>(d, fragments_a, fragments_b);
  store_product(d, out);
}
template <bool kFault>
void fragments_not_transposed() {
  loads_tags<1, false>(), loads_tags<2, false>(), loads_tags<4, false>();
  loads_tags<1, true>(), loads_tags<2, true>(), loads_tags<4, true>();
  const Tagged<c10::BFloat16> a(kRows * 16, 3), b(16 * kColumns, 4);
  const Global<float> out(kRows * kColumns);
  launch(load_and_multiply<kFault>, 1, 32, 0, a.data, b.data, out.data);
  expect(out, product(a, b, 16));
}

template <bool kFault>
void load_off_a_row(unsigned* out) {
  GPU_SHARED(uint4, rows, 9);
  if (threadIdx.x < 9) rows[threadIdx.x] = {};
  __syncthreads();
  unsigned r[1];
  load_matrices(r, reinterpret_cast<const uint16_t*>(rows + threadIdx.x % 8) + (kFault ? 1 : 0));
  out[threadIdx.x] = r[0];
}
template <bool kFault>
void misaligned_matrix() {
  const Global<unsigned> out(32);
  launch(load_off_a_row<kFault>, 1, 32, 0, out.data);
}

template <bool kFault>
void load_beyond(const uint4* in, unsigned* out) {
  GPU_SHARED(uint4, rows, 8);
  if (threadIdx.x < 8) rows[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  unsigned r[1];
  load_matrices(r, (kFault ? in : rows) + threadIdx.x % 8);
  out[threadIdx.x] = r[0];
}
template <bool kFault>
void matrix_outside_shared_memory() {
  const Global<uint4> in(8, uint4{});
  const Global<unsigned> out(32);
  launch(load_beyond<kFault>, 1, 32, 0, in.data, out.data);
}

template <bool kFault>
void multiply_in_some_lanes(float* out) {
  const unsigned a[2] = {}, b[1] = {};
  float d[4] = {};
  if (!kFault || threadIdx.x < 16) multiply_add<c10::Half>(d, a, b);
  out[threadIdx.x] = d[0];
}
template <bool kFault>
void product_of_half_a_warp() {
  const Global<float> out(32);
  launch(multiply_in_some_lanes<kFault>, 1, 32, 0, out.data);
}

template <bool kFault>
void multiply_in_a_branch(float* out) {
  const unsigned a[2] = {}, b[1] = {};
  float d[4] = {};
  if (kFault && threadIdx.x % 2 == 0)
    multiply_add<c10::Half>(d, a, b);
  else
    multiply_add<c10::Half>(d, a, b);
  out[threadIdx.x] = d[0];
}
template <bool kFault>
void products_at_two_places() {
  const Global<float> out(32);
  launch(multiply_in_a_branch<kFault>, 1, 32, 0, out.data);
}

template <bool kFault>
void multiply_unrounded(float* out) {
  const float tenth = 0.1f;
  unsigned bits;
  memcpy(&bits, &tenth, sizeof(bits));
  const unsigned rounded = kFault ? bits : to_tf32(tenth), a[4] = {rounded, rounded, rounded, rounded}, b[2] = {rounded, rounded};
  float d[4] = {};
  multiply_add<float>(d, a, b);
  out[threadIdx.x] = d[0];
}
template <bool kFault>
void not_rounded_to_tf32() {
  const Global<float> out(32);
  launch(multiply_unrounded<kFault>, 1, 32, 0, out.data);
  const float near_tenth = 1638.0f / 16384;  // of eleven bits
  expect(out, std::vector<float>(32, 8 * (near_tenth * near_tenth)));
}

}  // namespace
