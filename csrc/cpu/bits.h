// Masks of one bit per element, in the order of the tensor's memory: element i is bit i % 8 of byte i / 8.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace cnnkern {
inline namespace CPU_CAPABILITY {

struct BitWriter {
  uint8_t* bytes;  // zero before the first write

  // Writes the bits of elements [i, i + n). Another thread may write a byte at the same time that is not covered whole.
  void set(int64_t i, uint32_t bits, int64_t n) const {
    if (i % 8 == 0 && n % 8 == 0) {
      std::memcpy(bytes + i / 8, &bits, n / 8);
      return;
    }
    bits &= (uint32_t{1} << n) - 1;
    uint64_t shifted = static_cast<uint64_t>(bits) << i % 8;
    for (uint8_t* p = bytes + i / 8; shifted != 0; ++p, shifted >>= 8)
      __atomic_fetch_or(p, static_cast<uint8_t>(shifted), __ATOMIC_RELAXED);
  }
};

struct BitReader {
  const uint8_t* bytes;
  int64_t size;

  // The bits of the elements from i on, of up to 16 of them; what follows the tensor's last is undefined.
  uint32_t from(int64_t i) const {
    const int64_t byte = std::min(i / 8, size - 4);  // never beyond the end
    uint32_t bits;
    std::memcpy(&bits, bytes + byte, 4);
    return bits >> (i - 8 * byte);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace cnnkern
