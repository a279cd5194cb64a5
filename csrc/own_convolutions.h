// Convolutions that cnnkern's kernels compute on this machine although the built-in rule dispatches them to PyTorch, as
// `cnnkern tune` has measured (cnnkern/ops/tuned.py). The rules look here first.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

namespace cnnkern {

// Whether on a GPU, the dtype, and these numbers: whether the input is channels_last, whether this is the backward pass, threads
// (0 on a GPU), bits of the batch size, the input's other sizes, the weight's sizes, stride, padding, dilation.
using OwnConvolution = std::tuple<bool, at::ScalarType, std::vector<int64_t>>;

// Another thread may still read a set that was replaced. So it is never freed: there is one set per table that is loaded.
inline std::atomic<const std::set<OwnConvolution>*> own_convolutions{nullptr};

// Replaces the previous set, for all threads.
inline void set_own_convolutions(const std::vector<OwnConvolution>& convolutions) {
  own_convolutions = convolutions.empty() ? nullptr : new std::set<OwnConvolution>(convolutions.begin(), convolutions.end());
}

// Without a set this reads one pointer.
inline bool is_own_convolution(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool backward) {
  const auto* const all = own_convolutions.load();
  if (!all) return false;
  int64_t bits = 0;
  for (int64_t batch = x.size(0); batch > 0; batch >>= 1) ++bits;
  std::vector<int64_t> numbers = {!x.is_contiguous(), backward, x.is_cuda() ? 0 : at::get_num_threads(), bits};
  numbers.insert(numbers.end(), x.sizes().begin() + 1, x.sizes().end());
  for (const auto& more : {weight.sizes(), stride, padding, dilation}) numbers.insert(numbers.end(), more.begin(), more.end());
  return all->count({x.is_cuda(), x.scalar_type(), numbers}) > 0;
}

}  // namespace cnnkern
