// What tensor cores make of the operands of a warp's lanes, by the layouts that PTX defines (ldmatrix, mma.m16n8k8 and
// mma.m16n8k16). Lane l is row l / 4 of the fragments, and l % 4 is its place in the row.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "gpu_emulator.h"

namespace emulator {
namespace {

constexpr int kWarp = 32;

// Elements that a register holds: two of 16 bits, the first in its lower half, or one in tf32.
template <typename T>
constexpr int kPacked = std::is_same_v<T, float> ? 1 : 2;

template <typename T>
float element(unsigned r, int half) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(r);
  else
    return static_cast<float>(T(static_cast<uint16_t>(r >> 16 * half), T::from_bits()));
}

}  // namespace

template <int kMatrices, bool kTransposed>
void load_matrices(Lanes lanes) {
  const auto element = [&](int matrix, int row, int column) {
    uint16_t elements[8];
    std::memcpy(elements, &static_cast<const MatrixRow*>(lanes[8 * matrix + row])->row, sizeof(elements));
    return unsigned{elements[column]};
  };
  for (int l = 0; l < kWarp; ++l)
    for (int m = 0; m < kMatrices; ++m) {
      const int i = l / 4, j = 2 * (l % 4);
      static_cast<MatrixRow*>(lanes[l])->r[m] = kTransposed ? element(m, j, i) | element(m, j + 1, i) << 16
                                                            : element(m, i, j) | element(m, i, j + 1) << 16;
    }
}

// Every product is exact. In which order a tensor core adds, and how it rounds in between, nobody promises.
template <typename T, int kDepth>
void multiply_add(Lanes lanes) {
  constexpr int kRows = 16, kColumns = 8, kP = kPacked<T>;
  float a[kRows][kDepth], b[kDepth][kColumns];
  for (int l = 0; l < kWarp; ++l) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[l]);
    const int group = l / 4, place = kP * (l % 4);
    for (int half = 0; half < kP; ++half) {
      for (int i = 0; i < kDepth / (2 * kP); ++i)
        a[group + 8 * (i % 2)][place + 4 * kP * (i / 2) + half] = element<T>(f.a[i], half);
      for (int i = 0; i < kDepth / (4 * kP); ++i) b[place + 4 * kP * i + half][group] = element<T>(f.b[i], half);
    }
  }
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < 4; ++i) {
      float& d = static_cast<Fragments*>(lanes[l])->d[i];
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      for (int k = 0; k < kDepth; ++k) d = std::fma(a[row][k], b[k][column], d);
    }
}

template void load_matrices<1, false>(Lanes);
template void load_matrices<2, false>(Lanes);
template void load_matrices<4, false>(Lanes);
template void load_matrices<1, true>(Lanes);
template void load_matrices<2, true>(Lanes);
template void load_matrices<4, true>(Lanes);
template void multiply_add<c10::BFloat16, 8>(Lanes);
template void multiply_add<c10::BFloat16, 16>(Lanes);
template void multiply_add<c10::Half, 8>(Lanes);
template void multiply_add<c10::Half, 16>(Lanes);
template void multiply_add<float, 8>(Lanes);

}  // namespace emulator
