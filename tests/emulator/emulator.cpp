// The emulator: one fiber a CUDA thread, one block at a time, on the thread that launches. Built without sanitizers
// whatever the kernels are built with: it tells them of its fibers, and of the ordering that CUDA promises, by their
// own interfaces, and is none of their business otherwise.
//
// From the environment: EMULATOR_ORDER = forward (the default), reverse or random:SEED, the order in which blocks and
// runnable threads take their turn. EMULATOR_STRICT = 0 lets threads leave before the others' next barrier.
// EMULATOR_BLOCKS = ordered hides races between blocks from ThreadSanitizer.
//
// An observer may look on (observer.h).
#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "gpu_emulator.h"
#include "observer.h"

namespace emulator {

Observer* observer = nullptr;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kSharedBytes = 48 << 10;  // what a kernel may have without opting in to more

// ---- the block that runs ----------------------------------------------------------------------------------------

struct Rendezvous {  // of the lanes of a mask
  Exchange operation;
  unsigned mask, arrived;
  int width;
  void (*together)(Lanes);
  Place place;
  Token* token;
};

struct Warp {
  std::vector<Rendezvous> open;
  std::array<Token, 64> tokens;  // in turn, so that a lane that is late to acquire does not see the next operation
  unsigned used = 0;
};

// What the threads of a block meet by. One for each set of fibers: tokens that two blocks share would order them.
struct Meetings {
  std::array<Token, 2> barriers;  // in turn, for the same reason
  std::array<Warp, kMaxThreads / kWarp> warps;
};

struct Allocation {
  const void* key;  // null: the dynamic one
  size_t bytes, alignment;
  void* memory;
  Place place;
};

struct Settings {
  enum { forward, reverse, random } order = forward;
  bool strict = true, ordered_blocks = false;
};

Settings settings;
std::minstd_rand engine;
void (*kernel)(const void*);
const void* kernel_arguments;
unsigned threads;  // of a block
unsigned exited, waiting;
Place barrier_place;
unsigned barriers;  // passed by this block
std::array<Meetings, kSets> meetings_of_sets;
Meetings* meetings;  // of the block
Token launch_token, end_token, fence_token, shared_token;
std::vector<Allocation> shared;
std::vector<void*> old_shared;
size_t dynamic_bytes;
const Allocation* wanted = nullptr;  // of the host, by `requester`
Fiber* requester = nullptr;
std::string failure;

// Threads that can run, in the order in which they will.
std::array<unsigned, kMaxThreads> queue;
size_t queue_first, queue_size;

void enqueue(unsigned thread) {
  fibers[thread].state = State::runnable;
  queue[(queue_first + queue_size++) % kMaxThreads] = thread;
}

// Empties `some`.
void enqueue_all(std::vector<unsigned>& some) {
  if (settings.order == Settings::reverse) std::reverse(some.begin(), some.end());
  if (settings.order == Settings::random) std::shuffle(some.begin(), some.end(), engine);
  for (const unsigned thread : some) enqueue(thread);
  some.clear();
}

void run_next() {
  if (queue_size == 0) return switch_to(host);
  Fiber& next = fibers[queue[queue_first]];
  queue_first = (queue_first + 1) % kMaxThreads, --queue_size;
  switch_to(next);
}

std::string text(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(size_t thread) {
  return "thread " + std::to_string(thread) + " of block " + text(block_index);
}

// In a fiber: gives the block up. The host throws.
void fail(std::string message) {
  failure = std::move(message);
  switch_to(host);
}

const char* name(Exchange operation) {
  switch (operation) {
    case Exchange::sync: return "__syncwarp";
    case Exchange::shuffle: return "__shfl_sync";
    case Exchange::shuffle_up: return "__shfl_up_sync";
    case Exchange::shuffle_down: return "__shfl_down_sync";
    case Exchange::shuffle_xor: return "__shfl_xor_sync";
    case Exchange::ballot: return "__ballot_sync";
    case Exchange::load_matrices: return "load_matrices";
    default: return "multiply_add";
  }
}

bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

size_t self() { return static_cast<size_t>(current - fibers); }

void fiber_main() {
  arrive(nullptr);
  for (;;) {
    Fiber& me = *current;
    set_thread_index(self());
    launch_token.acquire();
    if (settings.ordered_blocks) end_token.acquire();
    kernel(kernel_arguments);
    end_token.release();
    me.state = State::exited;
    ++exited;
    const Warp& warp = meetings->warps[self() / kWarp];
    for (const Rendezvous& r : warp.open)
      if (r.mask >> self() % kWarp & 1)
        fail(text(self()) + " left while other lanes wait for it in " + name(r.operation) + " at " + text(r.place));
    if (waiting > 0 && settings.strict)
      fail(text(self()) + " left while " + std::to_string(waiting) + " threads wait at the barrier at " + text(barrier_place));
    run_next();
  }
}

void enqueue_every_thread() {
  static std::vector<unsigned> all;
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].state != State::exited) all.push_back(i);
  enqueue_all(all);
}

void pass_barrier() {
  waiting = 0, ++barriers;
  enqueue_every_thread();
}

// Nobody can run, and somebody has not finished.
std::string stuck() {
  std::map<std::string, unsigned> counts;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == State::at_barrier) ++counts["at the barrier at " + text(f.place)];
    if (f.state == State::in_exchange) ++counts["in the exchange at " + text(f.place)];
  }
  std::string message = "block " + text(block_index) + " hangs:";
  for (const auto& [where, count] : counts) message += " " + std::to_string(count) + " threads wait " + where + ";";
  return message + " " + std::to_string(exited) + " have left";
}

// On the host, so that no fiber counts as one that wrote it.
void allocate_shared() {
  Allocation a = *wanted;
  size_t total = dynamic_bytes;
  for (const Allocation& other : shared) total += other.key == nullptr ? 0 : other.bytes;
  if (a.key != nullptr && total + a.bytes > kSharedBytes) {
    failure = "a block's shared memory exceeds " + std::to_string(kSharedBytes) + " bytes with the array at " + text(a.place);
    return;
  }
  if (posix_memalign(&a.memory, std::max(a.alignment, sizeof(void*)), a.bytes) != 0) throw std::bad_alloc();
  std::memset(a.memory, 0xff, a.bytes);  // NaN
  shared.push_back(a);
  wanted = nullptr;
  shared_token.release();
}

void take_fibers() {
  static unsigned blocks = 0;
  const size_t turn = __tsan_create_fiber ? blocks++ % kSets : 0;
  if (sets[turn].empty()) sets[turn].resize(kMaxThreads);
  fibers = sets[turn].data();
  meetings = &meetings_of_sets[turn];
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].stack == nullptr) prepare(fibers[i]);
    if (__tsan_create_fiber && fibers[i].tsan == nullptr) fibers[i].tsan = __tsan_create_fiber(0);
  }
}

void run_block() {
  exited = waiting = barriers = 0;
  queue_first = queue_size = 0;
  take_fibers();
  for (Warp& warp : meetings->warps) warp.open.clear();
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::runnable;
  enqueue_every_thread();
  run_next();
  while (failure.empty() && exited < threads) {
    if (wanted != nullptr) {
      allocate_shared();
      if (failure.empty()) switch_to(*requester);
    } else if (!settings.strict && waiting > 0 && waiting + exited == threads) {
      pass_barrier();
      run_next();
    } else {
      failure = stuck();
    }
  }
  // For ThreadSanitizer a free is a write by the host, which is not ordered after the fibers before the launch ends.
  for (const Allocation& a : shared) __tsan_release ? old_shared.push_back(a.memory) : std::free(a.memory);
  shared.clear();
}

// ---- launches ---------------------------------------------------------------------------------------------------

void read_settings() {
  const auto get = [](const char* name, const char* otherwise) -> std::string {
    const char* value = std::getenv(name);
    return value == nullptr ? otherwise : value;
  };
  const std::string order = get("EMULATOR_ORDER", "forward");
  if (order.rfind("random:", 0) == 0) {
    settings.order = Settings::random;
    engine.seed(static_cast<unsigned>(std::stoul(order.substr(7))));
  } else if (order == "forward" || order == "reverse") {
    settings.order = order == "forward" ? Settings::forward : Settings::reverse;
  } else {
    throw std::runtime_error("emulator: EMULATOR_ORDER must be forward, reverse or random:SEED; got " + order);
  }
  settings.strict = get("EMULATOR_STRICT", "1") == "1";
  settings.ordered_blocks = get("EMULATOR_BLOCKS", "unordered") == "ordered";
}

void check_launch(dim3 grid, dim3 block, size_t dynamic_shared) {
  const auto require = [](bool held, const char* what, dim3 size) {
    if (held) return;
    throw std::runtime_error(std::string("emulator: invalid launch: ") + what + "; got " + text(uint3{size.x, size.y, size.z}));
  };
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "a grid has at least one block", grid);
  require(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "a grid has at most (2^31 - 1, 65535, 65535) blocks", grid);
  require(block.x >= 1 && block.y >= 1 && block.z >= 1, "a block has at least one thread", block);
  require(block.x <= 1024 && block.y <= 1024 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= kMaxThreads,
          "a block has at most 1024 threads, 64 of them in z", block);
  if (dynamic_shared > kSharedBytes)
    throw std::runtime_error("emulator: invalid launch: at most " + std::to_string(kSharedBytes) +
                             " bytes of shared memory; got " + std::to_string(dynamic_shared));
}

char the_stream;  // its address is the stream
thread_local unsigned guards = 0;
thread_local bool unchecked = false;  // a launch whose errors nobody has asked for

void check_place(const void* stream) {
  if (stream != &the_stream)
    throw std::runtime_error("emulator: invalid launch: on a stream that is not the current one, which getCurrentCUDAStream() gives");
  if (guards == 0) throw std::runtime_error("emulator: invalid launch: no CUDAGuard has chosen the tensors' device");
}

// What a failed launch leaves behind is not to be run again.
void abandon_fibers() {
  for (unsigned i = 0; i < threads; ++i) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fibers[i].stack, kStackBytes);
    prepare(fibers[i]);
  }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t dynamic_shared, void* stream, void (*thread)(const void*), const void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_place(stream);
  unchecked = true;
  check_launch(grid, block, dynamic_shared);
  read_settings();
  kernel = thread, kernel_arguments = arguments;
  grid_size = grid, block_size = block, dynamic_bytes = dynamic_shared;
  threads = block.x * block.y * block.z;
  if (__tsan_get_current_fiber) host.tsan = __tsan_get_current_fiber();
  launch_token.release();
  // gpu::launch hands over the kernel's address before its arguments.
  if (observer != nullptr) observer->launch(*static_cast<const void* const*>(arguments), dynamic_shared);
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> shuffled(settings.order == Settings::random ? count : 0);
  std::iota(shuffled.begin(), shuffled.end(), 0);
  std::shuffle(shuffled.begin(), shuffled.end(), engine);
  for (uint64_t i = 0; i < count && failure.empty(); ++i) {
    const uint64_t b = settings.order == Settings::forward ? i : settings.order == Settings::reverse ? count - 1 - i : shuffled[i];
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))};
    run_block();
    if (observer != nullptr) observer->block_ends();
  }
  end_token.acquire();
  for (void* const memory : old_shared) std::free(memory);
  old_shared.clear();
  if (!failure.empty()) {
    abandon_fibers();
    throw std::runtime_error("emulator: " + std::exchange(failure, {}));
  }
}

void* current_stream() { return &the_stream; }

void guard_begins() { ++guards; }

void guard_ends(bool unwinding) {
  --guards;
  if (std::exchange(unchecked, false) && !unwinding)
    throw std::runtime_error("emulator: an operator returned without C10_CUDA_KERNEL_LAUNCH_CHECK after its last launch");
}

void launches_checked() { unchecked = false; }

// ---- what kernels call ------------------------------------------------------------------------------------------

void block_barrier(Place place) {
  Fiber& me = *current;
  if (exited > 0 && settings.strict)
    fail(text(self()) + " waits at the barrier at " + text(place) + ", but " + std::to_string(exited) + " threads have left");
  if (waiting > 0 && !same(place, barrier_place))
    fail("divergent barrier: " + text(self()) + " waits at " + text(place) + ", others at " + text(barrier_place));
  barrier_place = me.place = place;
  me.state = State::at_barrier;
  Token& token = meetings->barriers[barriers % 2];
  token.release();
  if (++waiting + exited == threads) pass_barrier();
  run_next();
  token.acquire();
}

// In a lane: joins, or begins, the operation that the lanes of `mask` meet in.
Rendezvous& meet(Exchange operation, void (*together)(Lanes), unsigned mask, int width, Place place) {
  const unsigned lane = static_cast<unsigned>(self()) % kWarp, first = static_cast<unsigned>(self()) - lane;
  const auto what = [&] { return std::string(name(operation)) + " at " + text(place); };
  if ((mask >> lane & 1) == 0) fail(text(self()) + " is not in the mask of its own " + what());
  Warp& warp = meetings->warps[first / kWarp];
  for (unsigned l = 0; l < kWarp; ++l)
    if ((mask >> l & 1) != 0 && (first + l >= threads || fibers[first + l].state == State::exited))
      fail("lane " + std::to_string(l) + " is in the mask of " + what() + ", but is not there");
  const auto r = std::find_if(warp.open.begin(), warp.open.end(), [&](const Rendezvous& r) { return (r.mask & mask) != 0; });
  if (r == warp.open.end())
    return warp.open.emplace_back(operation, mask, 0, width, together, place, &warp.tokens[warp.used++ % warp.tokens.size()]);
  if (r->mask != mask || r->operation != operation || r->width != width || r->together != together || !same(r->place, place))
    fail(text(self()) + " is in " + what() + " with another mask or place than lanes that wait in " + name(r->operation) + " at " +
         text(r->place));
  return *r;
}

// Waits in r for the other lanes. The last one calls finish(lanes), with its threads, before any goes on.
template <typename Finish>
void wait_for_lanes(Rendezvous& r, Finish finish) {
  Fiber& me = *current;
  const unsigned lane = static_cast<unsigned>(self()) % kWarp, first = static_cast<unsigned>(self()) - lane;
  me.place = r.place, me.state = State::in_exchange;
  r.arrived |= 1u << lane;
  if (r.arrived == r.mask) {
    static std::vector<unsigned> lanes;
    for (unsigned l = 0; l < kWarp; ++l)
      if ((r.mask >> l & 1) != 0) lanes.push_back(first + l);
    finish(lanes);
    std::vector<Rendezvous>& open = meetings->warps[first / kWarp].open;
    open.erase(open.begin() + (&r - open.data()));
    enqueue_all(lanes);
  }
  run_next();
}

uint64_t warp_exchange(Exchange operation, unsigned mask, uint64_t value, int argument, int width, Place place) {
  Fiber& me = *current;
  const auto what = [&] { return std::string(name(operation)) + " at " + text(place); };
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("the width of " + what() + " is no power of two up to 32");
  Rendezvous& r = meet(operation, nullptr, mask, width, place);
  const int l = static_cast<int>(self() % kWarp), segment = l / width * width;
  switch (operation) {
    case Exchange::shuffle: me.source = segment + (argument & (width - 1)); break;
    case Exchange::shuffle_up: me.source = l - argument < segment ? l : l - argument; break;
    case Exchange::shuffle_down: me.source = l + argument >= segment + width ? l : l + argument; break;
    case Exchange::shuffle_xor: me.source = (l ^ argument) >= segment + width ? l : l ^ argument; break;
    default: me.source = l;
  }
  if ((mask >> me.source & 1) == 0)
    fail(text(self()) + " reads lane " + std::to_string(me.source) + ", which is not in the mask of " + what());
  me.value = value;
  Token* const token = operation == Exchange::sync ? r.token : nullptr;  // the others order no memory
  if (token != nullptr) token->release();
  wait_for_lanes(r, [&](const std::vector<unsigned>& lanes) {
    std::array<uint64_t, kWarp> given{};
    unsigned ballot = 0;
    for (const unsigned i : lanes) {
      given[i % kWarp] = fibers[i].value;
      ballot |= static_cast<unsigned>(fibers[i].value != 0) << i % kWarp;
    }
    for (const unsigned i : lanes) fibers[i].value = operation == Exchange::ballot ? ballot : given[fibers[i].source];
  });
  if (token != nullptr) token->acquire();
  return me.value;
}

void warp_together(Exchange operation, void (*together)(Lanes), void* mine, Place place) {
  Rendezvous& r = meet(operation, together, ~0u, kWarp, place);
  current->brought = mine;
  wait_for_lanes(r, [&](const std::vector<unsigned>& lanes) {
    std::array<void*, kWarp> brought;
    for (const unsigned i : lanes) brought[i % kWarp] = fibers[i].brought;
    together(brought.data());
  });
}

int lane() { return static_cast<int>(self() % kWarp); }

void refuse(const char* what, Place place) { fail(text(self()) + " " + what + " at " + text(place)); }

void check_shared(const void* p, const char* what, Place place) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % 16 != 0) refuse((std::string("gives an address that is no multiple of 16 to ") + what).c_str(), place);
  const auto within = [&](const Allocation& a) {
    const auto first = reinterpret_cast<uintptr_t>(a.memory);
    return first <= address && address + 16 <= first + a.bytes;
  };
  if (std::none_of(shared.begin(), shared.end(), within))
    refuse((std::string("gives 16 bytes that are not in the block's shared memory to ") + what).c_str(), place);
}

void fence() {
  fence_token.acquire();
  fence_token.release();
}

void* shared_memory(const void* key, size_t bytes, size_t alignment, Place place) {
  const auto find = [&] { return std::find_if(shared.begin(), shared.end(), [&](const Allocation& a) { return a.key == key; }); };
  auto found = find();
  if (found == shared.end()) {
    Allocation a{key, bytes, alignment, nullptr, place};
    wanted = &a, requester = current;
    switch_to(host);
    found = find();
  }
  void* const memory = found->memory;
  shared_token.acquire();
  return memory;
}

void* dynamic_shared_memory(Place place) { return shared_memory(nullptr, dynamic_bytes, 16, place); }

// ---- what an observer asks --------------------------------------------------------------------------------------

int running_thread() { return current == &host ? -1 : static_cast<int>(self()); }

bool is_global(const void* p) {
  const auto within = [p](const void* first, size_t bytes) {
    return p >= first && p < static_cast<const char*>(first) + bytes;
  };
  return !within(current->stack, kStackBytes) &&
         std::none_of(shared.begin(), shared.end(), [&](const Allocation& a) { return within(a.memory, a.bytes); });
}

}  // namespace emulator
