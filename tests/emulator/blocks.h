// Blocks while they run: whose turn it is, who waits for whom, and what ends a launch. Part of emulator.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "gpu_emulator.h"

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kSets = 5;  // of fibers, that blocks which run one after another take in turn
constexpr size_t kSharedBytes = 48 << 10;  // what a block may have without its kernel opting in to more
constexpr size_t kMostSharedBytes = 227 << 10;

// ---- what there is ----------------------------------------------------------------------------------------------

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

struct Allocation {
  const void* key;  // null: the dynamic one
  size_t bytes, alignment;
  void* memory;
  Place place;
};

// Fibers and what they meet by. A block that runs after another may take its place here, of which there are kSets to
// ThreadSanitizer: it hears of nothing that orders the threads of two of them, so that a race between blocks shows; one
// that comes back to a place counts as ordered after its predecessor there. Each has stacks of its own, or their reuse
// would look like a race, and tokens of its own, which would order blocks that share them.
struct Block {
  std::vector<Fiber> fibers{kMaxThreads};
  std::array<Token, 2> barrier_tokens;  // in turn, as those of a warp
  std::array<Warp, kMaxThreads / kWarp> warps;

  uint3 index{};
  unsigned exited = 0, waiting = 0;
  unsigned barriers = 0;  // passed
  Place barrier_place{};
  std::vector<Allocation> shared;
};

struct Group {  // of the blocks that meet by one counter
  unsigned blocks = 0, turn = 0;
  std::vector<Fiber*> waiting;
  std::array<Token, 2> tokens;  // in turn
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
size_t dynamic_bytes;
bool together;  // whether all blocks of the launch run at once

std::deque<Block> places;
std::vector<Block*> running;
std::map<const void*, Group> groups;  // by their counters
Token launch_token, end_token, fence_token, shared_token;
std::vector<void*> old_shared;
const Allocation* wanted = nullptr;  // of the host, by `requester`
Fiber* requester = nullptr;
std::string failure;

// ---- turns ------------------------------------------------------------------------------------------------------

// Threads that can run, in the order in which they will: a ring.
std::vector<Fiber*> queue;
size_t queue_first, queue_size;

void enqueue(Fiber& fiber) {
  fiber.state = State::runnable;
  queue[(queue_first + queue_size++) % queue.size()] = &fiber;
}

// Empties `some`.
void enqueue_all(std::vector<Fiber*>& some) {
  if (settings.order == Settings::reverse) std::reverse(some.begin(), some.end());
  if (settings.order == Settings::random) std::shuffle(some.begin(), some.end(), engine);
  for (Fiber* const fiber : some) enqueue(*fiber);
  some.clear();
}

void run_next() {
  if (queue_size == 0) return switch_to(host);
  Fiber& next = *queue[queue_first];
  queue_first = (queue_first + 1) % queue.size(), --queue_size;
  switch_to(next);
}

void set_indices(const Fiber& fiber) {
  const unsigned n = fiber.thread;
  thread_index = {n % block_size.x, n / block_size.x % block_size.y, n / (block_size.x * block_size.y)};
  block_index = fiber.block->index;
}

// ---- words ------------------------------------------------------------------------------------------------------

bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of block " + text(fiber.block->index);
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

// In a fiber: gives the launch up. The host throws.
void fail(std::string message) {
  failure = std::move(message);
  switch_to(host);
}

// ---- a block's life ---------------------------------------------------------------------------------------------

void fiber_main() {
  arrive(nullptr);
  for (;;) {
    Fiber& me = *current;
    Block& block = *me.block;
    set_indices(me);
    launch_token.acquire();
    if (settings.ordered_blocks) end_token.acquire();
    kernel(kernel_arguments);
    end_token.release();
    me.state = State::exited;
    ++block.exited;
    if (!me.copies.empty()) refuse("left without having waited for a copy that it began", me.copies[me.ended_copies].place);
    for (const Rendezvous& r : block.warps[me.thread / kWarp].open)
      if (r.mask >> me.thread % kWarp & 1)
        fail(text(me) + " left while other lanes wait for it in " + name(r.operation) + " at " + text(r.place));
    if (block.waiting > 0 && settings.strict)
      fail(text(me) + " left while " + std::to_string(block.waiting) + " threads wait at the barrier at " + text(block.barrier_place));
    run_next();
  }
}

// All threads of a block that have not left, of one or of several.
void enqueue_every_thread(const std::vector<Block*>& blocks) {
  static std::vector<Fiber*> all;
  for (Block* const block : blocks)
    for (unsigned i = 0; i < threads; ++i)
      if (block->fibers[i].state != State::exited) all.push_back(&block->fibers[i]);
  enqueue_all(all);
}

void pass_barrier(Block& block) {
  block.waiting = 0, ++block.barriers;
  enqueue_every_thread({&block});
}

bool ended(const Block& block) { return block.exited == threads; }

// Where threads may leave early: lets those go on whose barrier only they have not come to.
bool pass_barriers_of_who_is_left() {
  bool any = false;
  for (Block* const block : running)
    if (block->waiting > 0 && block->waiting + block->exited == threads) pass_barrier(*block), any = true;
  return any;
}

// Nobody can run, and somebody has not finished.
std::string stuck() {
  std::string blocks;
  std::map<std::string, unsigned> counts;
  unsigned hanging = 0, left = 0;
  for (const Block* const block : running) {
    if (ended(*block)) continue;
    ++hanging, left += block->exited;
    blocks += " " + text(block->index);
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber& f = block->fibers[i];
      if (f.state == State::at_barrier) ++counts["at the barrier at " + text(f.place)];
      if (f.state == State::at_group_barrier) ++counts["for other blocks in the group barrier at " + text(f.place)];
      if (f.state == State::in_exchange) ++counts["in the exchange at " + text(f.place)];
    }
  }
  std::string message = (hanging == 1 ? "block" + blocks + " hangs:" : "blocks" + blocks + " hang:");
  for (const auto& [where, count] : counts) message += " " + std::to_string(count) + " threads wait " + where + ";";
  message += " " + std::to_string(left) + " have left";
  return message + (together ? "; " + std::to_string(running.size() - hanging) + " blocks have ended" : "");
}

// On the host, so that no fiber counts as one that wrote it.
void allocate_shared() {
  std::vector<Allocation>& shared = requester->block->shared;
  Allocation a = *wanted;
  if (a.key != nullptr) {
    size_t arrays = a.bytes;
    for (const Allocation& other : shared) arrays += other.key == nullptr ? 0 : other.bytes;
    // gpu::launch opts in where the dynamic memory alone asks for it.
    const size_t most = dynamic_bytes > kSharedBytes ? kMostSharedBytes - dynamic_bytes : kSharedBytes - dynamic_bytes;
    if (arrays > std::min(most, kSharedBytes)) {
      failure = "a block's shared memory exceeds " + std::to_string(dynamic_bytes > kSharedBytes ? kMostSharedBytes : kSharedBytes) +
                " bytes with the array at " + text(a.place);
      return;
    }
  }
  if (posix_memalign(&a.memory, std::max(a.alignment, sizeof(void*)), a.bytes) != 0) throw std::bad_alloc();
  std::memset(a.memory, 0xff, a.bytes);  // NaN
  shared.push_back(a);
  wanted = nullptr;
  shared_token.release();
}

void begin_block(size_t place, uint3 index) {
  while (places.size() <= place) places.emplace_back();
  Block& block = places[place];
  block.index = index;
  block.exited = block.waiting = block.barriers = 0;
  for (Warp& warp : block.warps) warp.open.clear(), warp.open.reserve(kWarp);  // no more, so that it grows in no fiber
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block, fiber.thread = i, fiber.state = State::runnable;
    fiber.copies.clear(), fiber.ended_copies = fiber.groups = 0;
    if (fiber.stack == nullptr) prepare(fiber);
    if (__tsan_create_fiber && fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
  }
  running.push_back(&block);
}

// Runs those that have begun to their end, or to a failure.
void run_blocks() {
  queue.resize(running.size() * threads);
  queue_first = queue_size = 0;
  enqueue_every_thread(running);
  run_next();
  while (failure.empty() && !std::all_of(running.begin(), running.end(), [](const Block* block) { return ended(*block); })) {
    if (wanted != nullptr) {
      allocate_shared();
      if (failure.empty()) switch_to(*requester);
    } else if (!settings.strict && pass_barriers_of_who_is_left()) {
      run_next();
    } else {
      failure = stuck();
    }
  }
  // For ThreadSanitizer a free is a write by the host, which is not ordered after the fibers before the launch ends.
  for (Block* const block : running) {
    for (const Allocation& a : block->shared) __tsan_release ? old_shared.push_back(a.memory) : std::free(a.memory);
    block->shared.clear();
  }
}

}  // namespace
}  // namespace emulator
