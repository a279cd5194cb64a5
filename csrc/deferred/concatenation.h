// Concatenations within cnnkern.recompute: what saves one keeps the parts, which others keep too.
//
// A dense block concatenates all that it has before each of its layers, so that what is saved grows with the square of their number,
// and what there is to save only with the number. To concatenate again is one copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace cnnkern {

// Whether concatenations of this thread come to dispatch.cpp, as all operators do then. At the end what is known of them is forgotten.
void watch_concatenations(bool on);

// Where it is worth its while, `y` may be computed again from `parts`, of which it is the concatenation.
void remember_concatenation(const at::Tensor& y, const std::vector<at::Tensor>& parts, int64_t dim);

}  // namespace cnnkern
