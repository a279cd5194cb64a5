// The memory profile of emulated kernels: how many sectors of 32 bytes each warp-wide access to global memory touches, and
// how many different ones a launch reads and writes.
//
// Kernels are compiled for ThreadSanitizer, which makes every access call a function; these are here instead of in its
// runtime. The n-th time that a thread of a warp comes by one place in the code belongs to the n-th time that the others do.
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "observer.h"

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // of this library's image
extern "C" const char _end __attribute__((visibility("hidden")));

namespace {

constexpr uintptr_t kSector = 32;
constexpr unsigned kWarp = 32, kMaxThreads = 1024;

enum class Kind { load, store, atomic };

struct Access {  // of a warp
  std::array<uintptr_t, kWarp> address{};
  std::array<uint8_t, kWarp> bytes{};  // 0: the lane takes no part
};

struct Place {  // in the code
  Kind kind;
  std::array<uint32_t, kMaxThreads> visits{};
  std::array<std::vector<Access>, kMaxThreads / kWarp> of_warp;
};

struct Totals {
  uint64_t requests = 0, sectors = 0, ideal = 0, bytes = 0;
};

class Profile final : public emulator::Observer {
 public:
  void launch(const void* address, size_t) override {
    count_different();
    kernel_ = address, places_.clear();
  }

  void blocks_end() override {
    for (auto& places : places_)
      for (auto& [pc, place] : places) {
        for (auto& accesses : place.of_warp) {
          for (const Access& access : accesses) add(place.kind, access);
          accesses.clear();
        }
        place.visits.fill(0);
      }
  }

  void access(const void* pc, Kind kind, uintptr_t address, size_t bytes) {
    const auto running = emulator::running_thread();
    if (!running || bytes == 0 || !in_tensors(address)) return;
    const auto [block, thread] = *running;
    if (block >= places_.size()) places_.resize(block + 1);
    Place& place = places_[block].try_emplace(pc).first->second;
    place.kind = kind;
    auto& accesses = place.of_warp[thread / kWarp];
    const uint32_t visit = place.visits[thread]++;
    if (visit >= accesses.size()) accesses.resize(visit + 1);
    accesses[visit].address[thread % kWarp] = address;
    accesses[visit].bytes[thread % kWarp] = static_cast<uint8_t>(bytes);
  }

  // Bytes of the sectors that launches read, and of those that they wrote, each once a launch: since the last call.
  uint64_t take_moved() {
    count_different();
    return std::exchange(moved_, 0);
  }

  // A line for each kernel, kind and width: offset in the library, load, store or atomic, bytes of a lane, then Totals.
  std::string take() {
    std::ostringstream lines;
    for (const auto& [key, t] : std::exchange(totals_, {})) {
      const auto& [kernel, kind, width] = key;
      static constexpr const char* kNames[] = {"load", "store", "atomic"};
      lines << static_cast<const char*>(kernel) - &__ehdr_start << ' ' << kNames[static_cast<int>(kind)] << ' ' << width << ' '
            << t.requests << ' ' << t.sectors << ' ' << t.ideal << ' ' << t.bytes << '\n';
    }
    return lines.str();
  }

 private:
  // The launch's arguments are on the stack of the host's thread, constants in the library's image.
  static bool in_tensors(uintptr_t address) {
    static const std::pair<uintptr_t, uintptr_t> stack = [] {
      pthread_attr_t attributes;
      void* bottom = nullptr;
      size_t size = 0;
      pthread_getattr_np(pthread_self(), &attributes);
      pthread_attr_getstack(&attributes, &bottom, &size);
      pthread_attr_destroy(&attributes);
      return std::pair(reinterpret_cast<uintptr_t>(bottom), reinterpret_cast<uintptr_t>(bottom) + size);
    }();
    if (stack.first <= address && address < stack.second) return false;
    if (reinterpret_cast<uintptr_t>(&__ehdr_start) <= address && address < reinterpret_cast<uintptr_t>(&_end)) return false;
    return emulator::is_global(reinterpret_cast<const void*>(address));
  }

  void count_different() {
    for (std::vector<uintptr_t>& sectors : {std::ref(read_), std::ref(written_)}) {
      std::sort(sectors.begin(), sectors.end());
      moved_ += kSector * static_cast<uint64_t>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
      sectors.clear();
    }
  }

  void add(Kind kind, const Access& access) {
    std::array<std::pair<uintptr_t, uintptr_t>, kWarp> spans;  // [first, end) of each lane
    size_t lanes = 0;
    uint8_t width = 0;
    for (unsigned l = 0; l < kWarp; ++l)
      if (access.bytes[l] != 0) {
        spans[lanes++] = {access.address[l], access.address[l] + access.bytes[l]};
        width = std::max(width, access.bytes[l]);
      }
    if (lanes == 0) return;
    std::sort(spans.begin(), spans.begin() + lanes);
    uint64_t sectors = 0, bytes = 0;
    uintptr_t next_sector = 0, next_byte = 0;  // the first that was not counted
    for (size_t i = 0; i < lanes; ++i) {
      const auto [first, end] = spans[i];
      bytes += end - std::min(end, std::max(first, next_byte));
      next_byte = std::max(next_byte, end);
      const uintptr_t from = std::max(first / kSector, next_sector), to = (end - 1) / kSector + 1;
      sectors += to - std::min(to, from);
      for (uintptr_t s = from; s < to; ++s) {
        if (kind != Kind::store) read_.push_back(s);
        if (kind != Kind::load) written_.push_back(s);
      }
      next_sector = std::max(next_sector, to);
    }
    Totals& t = totals_[{kernel_, kind, width}];
    ++t.requests;
    t.sectors += sectors;
    t.ideal += (bytes + kSector - 1) / kSector;
    t.bytes += bytes;
  }

  const void* kernel_ = nullptr;
  std::vector<std::unordered_map<const void*, Place>> places_;  // of each block that runs at once
  std::map<std::tuple<const void*, Kind, unsigned>, Totals> totals_;
  std::vector<uintptr_t> read_, written_;  // by this launch
  uint64_t moved_ = 0;
};

Profile profile;
const bool installed = (emulator::observer = &profile, true);

void note(const void* pc, Kind kind, const volatile void* address, size_t bytes) {
  profile.access(pc, kind, reinterpret_cast<uintptr_t>(address), bytes);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* emulator_profile() {
  static std::string text;
  text = profile.take();
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) uint64_t emulator_moved() { return profile.take_moved(); }

// ---- ThreadSanitizer's interface --------------------------------------------------------------------------------

#define HERE __builtin_return_address(0)
#define ACCESSES(n)                                                                   \
  void __tsan_read##n(void* p) { note(HERE, Kind::load, p, n); }                      \
  void __tsan_write##n(void* p) { note(HERE, Kind::store, p, n); }                    \
  void __tsan_unaligned_read##n(void* p) { note(HERE, Kind::load, p, n); }            \
  void __tsan_unaligned_write##n(void* p) { note(HERE, Kind::store, p, n); }          \
  void __tsan_volatile_read##n(void* p) { note(HERE, Kind::load, p, n); }             \
  void __tsan_volatile_write##n(void* p) { note(HERE, Kind::store, p, n); }
// Whoever calls these expects them to do what they say.
#define FETCH(bits, name)                                                                          \
  uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* p, uint##bits##_t v, int) { \
    note(HERE, Kind::atomic, p, bits / 8);                                                         \
    return __atomic_##name(p, v, __ATOMIC_SEQ_CST);                                                \
  }
#define COMPARE(bits, strength, weak)                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile uint##bits##_t* p, uint##bits##_t* old, uint##bits##_t v, \
                                                        int, int) {                                                     \
    note(HERE, Kind::atomic, p, bits / 8);                                                                              \
    return __atomic_compare_exchange_n(p, old, v, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                            \
  }
#define ATOMICS(bits)                                                                           \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {            \
    note(HERE, Kind::load, p, bits / 8);                                                        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                \
  }                                                                                             \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) {         \
    note(HERE, Kind::store, p, bits / 8);                                                       \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                             \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v, int) { \
    note(HERE, Kind::atomic, p, bits / 8);                                                      \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                         \
  }                                                                                             \
  FETCH(bits, fetch_add)                                                                        \
  FETCH(bits, fetch_sub)                                                                        \
  FETCH(bits, fetch_and)                                                                        \
  FETCH(bits, fetch_or)                                                                         \
  FETCH(bits, fetch_xor)                                                                        \
  COMPARE(bits, strong, false)                                                                  \
  COMPARE(bits, weak, true)

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)
void __tsan_read_range(void* p, size_t n) { note(HERE, Kind::load, p, n); }
void __tsan_write_range(void* p, size_t n) { note(HERE, Kind::store, p, n); }
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
