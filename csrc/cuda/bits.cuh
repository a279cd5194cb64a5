// Masks of one bit per element, in the order of the tensor's memory: element i is bit i % 8 of byte i / 8, and so, on the
// little-endian machines there are, bit i % 32 of word i / 32.
#pragma once

#include "cuda/gpu_compat.cuh"

namespace cnnkern::gpu {

struct BitWriter {
  unsigned* words;

  // Writes the bits of a vector's existing lanes, all in one word: `at` is a multiple of V, as vectors begin where those of the
  // written tensor do. Vectors of eight that are never ragged own their bytes. If a byte may have other writers, every word is
  // written by atomic or, over zeros; an or has no order that could show in the result.
  template <bool kRagged, int V>
  __device__ __forceinline__ void set(int64_t at, Lanes lanes, unsigned bits) const {
    if constexpr (!kRagged && V == 8) {
      reinterpret_cast<uint8_t*>(words)[at / 8] = static_cast<uint8_t>(bits);
    } else {
      const int first = kRagged ? lanes.first : 0, last = kRagged ? lanes.last : V;
      if (first >= last) return;
      bits &= (1u << last) - (1u << first);
      if (bits != 0) atomicOr(words + at / 32, bits << at % 32);
    }
  }
};

struct BitReader {
  const uint8_t* bytes;

  // The bits of a vector's lanes; undefined for lanes that do not exist.
  template <bool kRagged, int V>
  __device__ __forceinline__ unsigned get(int64_t at, Lanes lanes) const {
    if constexpr (!kRagged) {
      return static_cast<unsigned>(bytes[at / 8]) >> at % 8;  // `at` is a multiple of V, which divides 8
    } else {
      if (lanes.first >= lanes.last) return 0;
      const int64_t i = at + lanes.first;
      const int shift = static_cast<int>(i % 8);
      unsigned bits = bytes[i / 8];
      if (shift + lanes.last - lanes.first > 8) bits |= static_cast<unsigned>(bytes[i / 8 + 1]) << 8;
      return bits >> shift << lanes.first;
    }
  }
};

}  // namespace cnnkern::gpu
