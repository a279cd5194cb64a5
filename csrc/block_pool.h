// The memory of CPU results of cnnkern's operators: blocks that earlier results have freed.
//
// malloc returns a large block to the system when it is freed. The next one is new memory, which the system clears page by
// page as it is first written: that often takes longer than the kernel that writes it. The pool keeps blocks instead. Used and
// unused blocks together are at most 1.5 times the most that results have needed at one time, and at most 512 MiB more than
// that. A block that was unused for ten seconds is freed in the next call.
//
// Sizes are rounded up to classes, so that at most an eighth of a block is unused. If a new block would exceed the limit, a
// result gets a larger block that is unused. Otherwise, or without the factor of 1.5, a network whose results shrink from layer
// to layer would get new memory for most of them in each call.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>
#include <cstdint>

namespace cnnkern::block_pool {

// For results of this many bytes; malloc's for small ones, which it serves from memory that it keeps, and where the pool is off.
c10::Allocator* allocator(size_t bytes);

// While it lives, what this thread takes from PyTorch's CPU allocator is the pool's too: results of PyTorch's operators that we
// call. use_for_pytorch has to have been called before; a thread that allocates meanwhile takes from either.
class Scope {
 public:
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};
void use_for_pytorch();

struct Sizes {
  int64_t used, kept, most;  // bytes of blocks in use, of blocks that are kept; the most that results have needed at once
};
Sizes sizes();

// Gives back what is kept.
void give_back();

// Off: results have malloc's memory. What is kept is given back.
void set_on(bool on);

}  // namespace cnnkern::block_pool
