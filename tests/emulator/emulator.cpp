// The emulator: one fiber a CUDA thread, on the thread that launches; one block at a time, or all those of gpu::launch_together.
// Built without sanitizers whatever the kernels are built with: it tells them of its fibers, and of the ordering that CUDA
// promises, by their own interfaces, and is none of their business otherwise.
//
// From the environment: EMULATOR_ORDER = forward (the default), reverse or random:SEED, the order in which blocks and
// runnable threads take their turn. EMULATOR_STRICT = 0 lets threads leave before the others' next barrier.
// EMULATOR_BLOCKS = ordered hides races between blocks from ThreadSanitizer. EMULATOR_RESIDENT = 8 is the number of blocks
// that fit on the device at once.
//
// An observer may look on (observer.h).
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "blocks.h"
#include "copies.h"
#include "observer.h"
#include "warps.h"

namespace emulator {

Observer* observer = nullptr;

namespace {

// ---- launches ---------------------------------------------------------------------------------------------------

std::string get(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

void read_settings() {
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

void check_launch(dim3 grid, dim3 block, size_t dynamic_shared, bool at_once) {
  const auto require = [](bool held, const char* what, dim3 size) {
    if (held) return;
    throw std::runtime_error(std::string("emulator: invalid launch: ") + what + "; got " + text(uint3{size.x, size.y, size.z}));
  };
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "a grid has at least one block", grid);
  require(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "a grid has at most (2^31 - 1, 65535, 65535) blocks", grid);
  require(block.x >= 1 && block.y >= 1 && block.z >= 1, "a block has at least one thread", block);
  require(block.x <= 1024 && block.y <= 1024 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= kMaxThreads,
          "a block has at most 1024 threads, 64 of them in z", block);
  if (dynamic_shared > kMostSharedBytes)
    throw std::runtime_error("emulator: invalid launch: at most " + std::to_string(kMostSharedBytes) +
                             " bytes of shared memory; got " + std::to_string(dynamic_shared));
  if (!at_once) return;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  const int resident = resident_blocks(static_cast<int>(block.x * block.y * block.z), dynamic_shared);
  if (count > static_cast<uint64_t>(resident))
    throw std::runtime_error("emulator: invalid launch: " + std::to_string(count) + " blocks cannot be co-resident: " +
                             std::to_string(resident) + " fit on the device at once");
}

char the_stream;  // its address is the stream
uint64_t waits = 0;  // of the present launch's threads, for the kernel before it
thread_local unsigned guards = 0;
thread_local bool unchecked = false;  // a launch whose errors nobody has asked for

void check_guard() {
  if (guards == 0) throw std::runtime_error("emulator: invalid launch: no CUDAGuard has chosen the tensors' device");
}

void check_place(const void* stream) {
  if (stream != &the_stream)
    throw std::runtime_error("emulator: invalid launch: on a stream that is not the current one, which getCurrentCUDAStream() gives");
  check_guard();
}

// What a failed launch leaves behind is not to be run again.
void abandon_fibers() {
  for (Block* const block : running)
    for (unsigned i = 0; i < threads; ++i) {
      if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(block->fibers[i].stack, kStackBytes);
      prepare(block->fibers[i]);
    }
  wanted = nullptr;
}

// Where a block runs that others have preceded, or that runs together with others.
size_t next_place() {
  static size_t blocks = 0;
  return together ? running.size() : __tsan_create_fiber ? blocks++ % kSets : 0;
}

// The block of a launch that begins as the i-th of `count`.
uint3 block_of_turn(uint64_t i, uint64_t count, const std::vector<uint64_t>& shuffled) {
  const uint64_t b = settings.order == Settings::forward ? i : settings.order == Settings::reverse ? count - 1 - i : shuffled[i];
  return {static_cast<unsigned>(b % grid_size.x), static_cast<unsigned>(b / grid_size.x % grid_size.y),
          static_cast<unsigned>(b / (uint64_t{grid_size.x} * grid_size.y))};
}

}  // namespace

int resident_blocks(int block, size_t dynamic_shared) {
  check_guard();
  const std::string given = get("EMULATOR_RESIDENT", "8");
  const int resident = std::atoi(given.c_str());
  if (resident < 1) throw std::runtime_error("emulator: EMULATOR_RESIDENT must be a number of blocks from 1 on; got " + given);
  return block > static_cast<int>(kMaxThreads) || dynamic_shared > kMostSharedBytes ? 0 : resident;
}

void launch(dim3 grid, dim3 block, size_t dynamic_shared, void* stream, Start start, void (*thread)(const void*), const void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_place(stream);
  unchecked = true;
  check_launch(grid, block, dynamic_shared, start == Start::together);
  read_settings();
  kernel = thread, kernel_arguments = arguments, together = start == Start::together;
  grid_size = grid, block_size = block, dynamic_bytes = dynamic_shared;
  threads = block.x * block.y * block.z;
  groups.clear();
  waits = 0;
  if (__tsan_get_current_fiber) host.tsan = __tsan_get_current_fiber();
  launch_token.release();
  // gpu::launch hands over the kernel's address before its arguments.
  if (observer != nullptr) observer->launch(*static_cast<const void* const*>(arguments), dynamic_shared);
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> shuffled(settings.order == Settings::random ? count : 0);
  std::iota(shuffled.begin(), shuffled.end(), 0);
  std::shuffle(shuffled.begin(), shuffled.end(), engine);
  for (uint64_t i = 0; i < count && failure.empty();) {
    running.clear();
    do {
      const size_t place = next_place();
      begin_block(place, block_of_turn(i++, count, shuffled));
    } while (together && i < count);
    run_blocks();
    if (observer != nullptr) observer->blocks_end();
  }
  end_token.acquire();
  for (void* const memory : old_shared) std::free(memory);
  old_shared.clear();
  if (start == Start::early && failure.empty() && waits != count * threads)
    failure = "of " + std::to_string(count * threads) + " threads of a kernel that may start early " + std::to_string(waits) +
              " have waited for the kernel before it";
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

void wait_for_previous() { ++waits; }

void block_barrier(Place place) {
  Fiber& me = *current;
  Block& block = *me.block;
  if (block.exited > 0 && settings.strict)
    fail(text(me) + " waits at the barrier at " + text(place) + ", but " + std::to_string(block.exited) + " threads have left");
  if (block.waiting > 0 && !same(place, block.barrier_place))
    fail("divergent barrier: " + text(me) + " waits at " + text(place) + ", others at " + text(block.barrier_place));
  block.barrier_place = me.place = place;
  me.state = State::at_barrier;
  Token& token = block.barrier_tokens[block.barriers % 2];
  token.release();
  if (++block.waiting + block.exited == threads) pass_barrier(block);
  run_next();
  token.acquire();
}

void release_to_group(const unsigned* counter, unsigned turn) { groups[counter].tokens[turn % 2].release(); }

void wait_for_group(const unsigned* counter, unsigned before, unsigned blocks, unsigned turn, Place place) {
  Fiber& me = *current;
  Group& group = groups[counter];
  if (!together && blocks != 1) refuse("waits for other blocks, in a launch that is not launch_together's, in the group barrier", place);
  if (blocks == 0 || before / blocks != turn)
    fail(text(me) + " comes to turn " + std::to_string(turn) + " of a group barrier of " + std::to_string(blocks) +
         " blocks, whose counter says that " + std::to_string(before) + " have come before, at " + text(place));
  if (!group.waiting.empty() && (group.blocks != blocks || group.turn != turn))
    fail(text(me) + " comes to turn " + std::to_string(turn) + " of a group barrier of " + std::to_string(blocks) + " blocks at " +
         text(place) + ", where others wait in turn " + std::to_string(group.turn) + " of one of " + std::to_string(group.blocks));
  group.blocks = blocks, group.turn = turn;
  group.waiting.reserve(running.size());  // to ThreadSanitizer a vector that grows is read by who makes it grow
  group.waiting.push_back(&me);
  me.place = place, me.state = State::at_group_barrier;
  if (before + 1 == blocks * (turn + 1)) enqueue_all(group.waiting);
  run_next();
  group.tokens[turn % 2].acquire();
}

void refuse(const char* what, Place place) { fail(text(*current) + " " + what + " at " + text(place)); }

void check_shared(const void* p, const char* what, Place place) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % 16 != 0) refuse((std::string("gives an address that is no multiple of 16 to ") + what).c_str(), place);
  const auto within = [&](const Allocation& a) {
    const auto first = reinterpret_cast<uintptr_t>(a.memory);
    return first <= address && address + 16 <= first + a.bytes;
  };
  const std::vector<Allocation>& shared = current->block->shared;
  if (std::none_of(shared.begin(), shared.end(), within))
    refuse((std::string("gives 16 bytes that are not in the block's shared memory to ") + what).c_str(), place);
}

void fence() {
  fence_token.acquire();
  fence_token.release();
}

void* shared_memory(const void* key, size_t bytes, size_t alignment, Place place) {
  const std::vector<Allocation>& shared = current->block->shared;
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

std::optional<Running> running_thread() {
  if (current == &host) return {};
  const auto place = std::find(running.begin(), running.end(), current->block);
  return Running{static_cast<size_t>(place - running.begin()), current->thread};
}

bool is_global(const void* p) {
  const auto within = [p](const void* first, size_t bytes) {
    return p >= first && p < static_cast<const char*>(first) + bytes;
  };
  const std::vector<Allocation>& shared = current->block->shared;
  return !within(current->stack, kStackBytes) &&
         std::none_of(shared.begin(), shared.end(), [&](const Allocation& a) { return within(a.memory, a.bytes); });
}

}  // namespace emulator
