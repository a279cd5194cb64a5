// What the emulator tells somebody who looks on while kernels run: profile.cpp or launches.cpp, whichever is linked.
#pragma once

#include "gpu_emulator.h"

namespace emulator {

struct Observer {
  virtual void launch(const void* kernel, size_t dynamic_shared) = 0;  // its address
  virtual void block_ends() = 0;
};
extern Observer* observer;  // null where there is none

// The running thread's number in its block, -1 outside of kernels.
int running_thread();

// Whether the running thread's kernel was given p: not its own stack, nor the block's shared memory.
bool is_global(const void* p);

}  // namespace emulator
