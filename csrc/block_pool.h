// The memory of CPU results of cnnkern's operators: blocks that earlier results have freed.
//
// malloc returns a large block to the system when it is freed. The next one is new memory, which the system clears page by
// page as it is first written: that often takes longer than the kernel that writes it. The pool keeps blocks instead. Used and
// kept blocks together never exceed the most that was in use at one time. A block that was unused for ten seconds is freed in
// the next call. Sizes are rounded up to classes, so that at most an eighth of a block is unused.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>
#include <cstdint>

namespace cnnkern::block_pool {

// For results of this many bytes. Small ones come from malloc, which keeps small blocks itself; so do all if the pool is off.
c10::Allocator* allocator(size_t bytes);

// While it lives, PyTorch's CPU allocator serves this thread from the pool too: for results of PyTorch's operators that
// kernels call. use_for_pytorch has to be called before; a thread that allocates during that call may get either memory.
class Scope {
 public:
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};
void use_for_pytorch();

struct Sizes {
  int64_t used, kept, most;  // bytes that results need now, what is held beyond that, the most that they have needed at once
};
Sizes sizes();

// Frees the blocks that are kept.
void give_back();

// Off: results get malloc's memory. What is kept is freed.
void set_on(bool on);

}  // namespace cnnkern::block_pool
