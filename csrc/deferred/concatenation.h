// Concatenations within cnnkern.recompute: a layer that saves one saves its parts instead, which other layers save too.
//
// A dense block concatenates all its feature maps before each layer, so saved memory grows with the square of the number of layers.
// The feature maps themselves grow linearly. Recomputing a concatenation is one copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace cnnkern {

// Switches recording of this thread's concatenations on or off. While it is on, all operators go through dispatch.cpp. Switching it
// off forgets what was recorded.
void watch_concatenations(bool on);

// Records that `y` is the concatenation of `parts`, and can be recomputed from them, if that saves memory.
void remember_concatenation(const at::Tensor& y, const std::vector<at::Tensor>& parts, int64_t dim);

}  // namespace cnnkern
