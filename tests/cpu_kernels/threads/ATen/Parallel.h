// Stands before PyTorch's header where kernels are compiled for ThreadSanitizer. PyTorch's at::parallel_for is OpenMP's, whose
// runtime is not instrumented: where its threads begin and end would be unknown, and all that one wrote before another read it
// would be reported. Here the threads of a call are threads of the system, started for it and joined by it, and that is all
// the order that ThreadSanitizer is told of. The range is cut as PyTorch cuts it, but that the caller waits for the others.
#pragma once

#define parallel_for parallel_for_of_openmp
#include_next <ATen/Parallel.h>
#undef parallel_for

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace at {

template <typename F>
struct ThreadsPart {
  const F* f;
  int64_t begin, end;
  int number;
  static void* run(void* given) {
    const auto* const part = static_cast<ThreadsPart*>(given);
    internal::ThreadIdGuard guard(part->number);
    c10::ParallelGuard region(true);
    (*part->f)(part->begin, part->end);
    return nullptr;
  }
};

template <typename F>
inline void parallel_for(const int64_t begin, const int64_t end, const int64_t grain_size, const F& f) {
  if (begin >= end) return;
  const int64_t n = end - begin;
  int64_t threads = in_parallel_region() ? 1 : get_num_threads();
  if (grain_size > 0) threads = std::min(threads, (n + grain_size - 1) / grain_size);
  if (threads <= 1) return f(begin, end);
  const int64_t chunk = (n + threads - 1) / threads;
  std::vector<ThreadsPart<F>> parts;
  for (int64_t at = begin; at < end; at += chunk)
    parts.push_back({&f, at, std::min(end, at + chunk), static_cast<int>(parts.size())});
  std::vector<pthread_t> ids(parts.size());
  for (size_t i = 0; i < parts.size(); ++i)
    TORCH_CHECK(pthread_create(&ids[i], nullptr, &ThreadsPart<F>::run, &parts[i]) == 0, "no thread to be had");
  for (const pthread_t id : ids) pthread_join(id, nullptr);
}

}  // namespace at
