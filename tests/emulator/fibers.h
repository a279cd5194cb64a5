// Fibers, one a CUDA thread, and what the sanitizers have to be told of them. Part of emulator.cpp.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#include "gpu_emulator.h"

#if !defined(__x86_64__)
#define EMULATOR_UCONTEXT
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

extern "C" {  // there only where the process runs under the sanitizer
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
WEAK void __asan_unpoison_memory_region(void const volatile* address, size_t size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
}

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber: a switch orders nothing

// ---- sanitizers -------------------------------------------------------------------------------------------------

// A thing to release and acquire: what was done before a release is ordered before what follows an acquire.
struct Token {
  char address;
  void release() {
    if (__tsan_release) __tsan_release(&address);
  }
  void acquire() {
    if (__tsan_acquire) __tsan_acquire(&address);
  }
};

// ---- fibers -----------------------------------------------------------------------------------------------------

enum class State { runnable, at_barrier, at_group_barrier, in_exchange, exited };

struct Block;

struct Fiber {
  Block* block = nullptr;
  unsigned thread = 0;  // of it

#ifdef EMULATOR_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // null for the host
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;

  State state = State::exited;
  Place place{};  // of what it waits in
  // The value given to an exchange and, when it is done, what came of it.
  uint64_t value = 0;
  int source = 0;
  void* brought = nullptr;  // to an operation of the whole warp, on its own stack
  std::vector<Copy> copies;  // that it has begun, and from [ended_copies] on not waited for
  size_t ended_copies = 0;
  unsigned groups = 0;  // of copies, that it has committed
};

Fiber host;
Fiber *current = &host, *previous = &host;

#ifdef EMULATOR_UCONTEXT
void switch_stacks(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#else
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
void switch_stacks(Fiber& from, Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
#endif

void set_indices(const Fiber&);  // of the thread and its block

// After a switch, on the stack that it led to.
void arrive(void* fake_stack) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, &previous->bottom, &previous->size);
  if (current != &host) set_indices(*current);
}

void switch_to(Fiber& next) {
  Fiber& from = *current;
  if (&next == &from) return;
  previous = &from, current = &next;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake_stack, next.bottom, next.size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan, kNoSync);
  switch_stacks(from, next);
  arrive(from.fake_stack);
}

[[noreturn]] void fiber_main();

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    const size_t guard = static_cast<size_t>(getpagesize());
    void* const memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory) + guard;
  }
  fiber.bottom = fiber.stack, fiber.size = kStackBytes;
  fiber.fake_stack = nullptr;
#ifdef EMULATOR_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack = {.ss_sp = fiber.stack, .ss_flags = 0, .ss_size = kStackBytes};
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#else
  // Six saved registers, the address to return to, and the stack as a call leaves it: eight off a multiple of 16.
  void** const top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 1;
  top[-1] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 7;
  top[0] = nullptr;
#endif
}

}  // namespace
}  // namespace emulator
