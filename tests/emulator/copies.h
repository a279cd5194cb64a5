// Asynchronous copies from global to shared memory: they arrive when their thread waits for them. Part of emulator.cpp.
#pragma once

#include "blocks.h"
#include "observer.h"

namespace emulator {
namespace {

constexpr uint4 kUnder = {~0u, ~0u, ~0u, ~0u};  // what a destination holds while its copy is under way: NaN

bool equal(const void* a, const uint4& b) { return std::memcmp(a, &b, sizeof(b)) == 0; }

}  // namespace

void check_copy(const void* shared, const void* global, bool exists, Place place) {
  check_shared(shared, "async_copy", place);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) refuse("gives a source that is no multiple of 16 to async_copy", place);
  if (exists && !is_global(global)) refuse("gives a source that is not in global memory to async_copy", place);
}

void begin_copy(Copy copy) {
  copy.group = current->groups;
  current->copies.push_back(copy);
}

void commit_copies() { ++current->groups; }

bool end_copy(unsigned left, Copy* copy) {
  std::vector<Copy>& copies = current->copies;
  size_t& ended = current->ended_copies;
  if (ended == copies.size() || copies[ended].group + left >= current->groups) return false;
  *copy = copies[ended++];
  if (ended == copies.size()) copies.clear(), ended = 0;
  if (!equal(copy->to, kUnder)) refuse("waits for a copy whose destination was written while it was under way, begun", copy->place);
  if (copy->from != nullptr && !equal(copy->from, copy->value))
    refuse("waits for a copy whose source was written while it was under way, begun", copy->place);
  return true;
}

}  // namespace emulator
