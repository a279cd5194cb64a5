// What the emulator tells somebody who looks on while kernels run: profile.cpp or launches.cpp, whichever is linked.
#pragma once

#include <optional>

#include "gpu_emulator.h"

namespace emulator {

struct Observer {
  virtual void launch(const void* kernel, size_t dynamic_shared) = 0;  // its address
  virtual void blocks_end() = 0;  // all that run at once
};
extern Observer* observer;  // null where there is none

struct Running {
  size_t block;  // of those that run at once
  unsigned thread;  // of the block
};
std::optional<Running> running_thread();  // nothing outside of kernels

// Whether the running thread's kernel was given p: not its own stack, nor the block's shared memory.
bool is_global(const void* p);

}  // namespace emulator
