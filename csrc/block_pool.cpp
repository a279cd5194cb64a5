#include "block_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace cnnkern::block_pool {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kLeast = size_t{1} << 18;      // bytes of a block
constexpr size_t kHugePage = size_t{1} << 21;   // of x86-64 and arm64 Linux
constexpr auto kIdle = std::chrono::seconds(10);  // after which a block that is kept is freed

// The distance between size classes is an eighth of a power of two.
size_t class_of(size_t bytes) {
  size_t step = kLeast / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* from_system(size_t bytes) {
  void* const data = c10::alloc_cpu(bytes);
#ifdef MADV_HUGEPAGE
  // Fewer pages to clear one by one. It is only advice: if the system ignores it, results are the same.
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return data;
}

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t needed = class_of(bytes);
    std::unique_lock<std::mutex> lock(mutex_);
    needed_ += needed;
    most_ = std::max(most_, needed_);
    size_t block = kept_block(needed);
    void* data = nullptr;
    if (!same.empty()) {
      data = same.back()->data;  // the newest: it may still be in cache
      kept_ -= block;
      kept_in_order_.erase(same.back());
      same.pop_back();
    } else {
      block = needed;
      make_room(block);
      held_ += block;
      lock.unlock();
      data = allocate(block, needed);
      lock.lock();
    }
    wasted_ += block - needed;
    in_use_[data] = {block, needed};
    return data;
  }

  // False for memory that is not from the pool.
  bool leave(void* data) {
    std::vector<void*> given_back;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = in_use_.find(data);
      if (found == in_use_.end()) return false;
      const auto [block, needed] = found->second;
      in_use_.erase(found);
      needed_ -= needed;
      wasted_ -= block - needed;
      if (!on_) {
        held_ -= block;
        given_back.push_back(data);
      } else {
        kept_in_order_.push_back({data, block, Clock::now()});
        kept_of_[block].push_back(std::prev(kept_in_order_.end()));
      }
      while (!kept_in_order_.empty() && Clock::now() - kept_in_order_.front().since > kIdle) given_back.push_back(drop(kept_in_order_.begin()));
    }
    for (void* const each : given_back) c10::free_cpu(each);
    return true;
  }

  void give_back() {
    std::vector<void*> given_back;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (!kept_in_order_.empty()) given_back.push_back(drop(kept_in_order_.begin()));
    }
    for (void* const each : given_back) c10::free_cpu(each);
  }

  void set_on(bool on) {
    on_ = on;
    if (!on) give_back();
  }

  bool is_on() const { return on_; }

  Sizes sizes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(needed_), static_cast<int64_t>(held_ - needed_), static_cast<int64_t>(most_)};
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Kept {
    void* data;
    size_t block;
    Clock::time_point since;
  };

  void* drop_oldest() {
    const Kept oldest = kept_in_order_.front();
    auto& same = kept_of_[oldest.block];
    same.erase(same.begin());  // the oldest of its class
    kept_in_order_.pop_front();
    kept_ -= oldest.block;
    return oldest.data;
  }

  // Before a block of these bytes is added: frees kept blocks beyond the most that was in use at one time.
  void make_room(size_t block) {
    while (!kept_of_.empty() && held_ + block > most_ + slack()) {
      const auto enough = kept_of_.lower_bound(held_ + block - most_ - slack());
      const auto& same = (enough == kept_of_.end() ? std::prev(enough) : enough)->second;
      c10::free_cpu(drop(same.front()));
    }
  }

  void* allocate(size_t block, size_t needed) {
    try {
      return from_system(block);
    } catch (const c10::Error&) {  // no memory: not while the pool keeps some
      give_back();
    }
    try {
      return from_system(block);
    } catch (const c10::Error&) {
      c10::profiledCPUMemoryReporter().OutOfMemory(block);
      std::lock_guard<std::mutex> lock(mutex_);
      held_ -= block;
      needed_ -= needed;
      throw;
    }
  }

  std::mutex mutex_;
  std::atomic<bool> on_{true};
  std::unordered_map<void*, InUse> in_use_;
  std::list<Kept> kept_in_order_;                                     // the oldest first
  std::map<size_t, std::vector<std::list<Kept>::iterator>> kept_of_;  // by size, the oldest first; no size without a block
  size_t needed_ = 0, most_ = 0;    // by results, in bytes of their classes, now and at most
  size_t held_ = 0, wasted_ = 0;    // in blocks; what blocks in use have beyond their results' classes
};

// Never destroyed: tensors may outlive what a process destroys at its end.
Pool& pool() {
  static Pool* const it = [] {
    auto* const made = new Pool;
#ifdef __linux__
    // The child of a fork has the pool as it was between two calls.
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
#endif
    return made;
  }();
  return *it;
}

thread_local int scopes = 0;  // of this thread

void leave(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  pool().leave(data);
}

c10::DataPtr taken(size_t bytes) {
  void* const data = pool().take(bytes);
  c10::profiledCPUMemoryReporter().New(data, bytes);
  return {data, data, &leave, c10::Device(c10::DeviceType::CPU)};
}

bool serves(size_t bytes) { return bytes >= kLeast && pool().is_on(); }

// For results of cnnkern's operators.
class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override { return serves(bytes) ? taken(bytes) : c10::GetCPUAllocator()->allocate(bytes); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// For PyTorch: its previous allocator, except within a Scope.
class ScopedAllocator final : public c10::Allocator {
 public:
  explicit ScopedAllocator(c10::Allocator* before) { before_ = before; }
  c10::DataPtr allocate(size_t bytes) override { return scopes > 0 && serves(bytes) ? taken(bytes) : before_->allocate(bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return before_->raw_deleter() == nullptr ? nullptr : &delete_either; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { before_->copy_data(to, from, bytes); }

 private:
  static void delete_either(void* data) {
    if (!pool().leave(data)) before_->raw_deleter()(data);
  }
  static inline c10::Allocator* before_ = nullptr;
};

}  // namespace

c10::Allocator* allocator(size_t bytes) {
  static auto* const ours = new PoolAllocator;
  return serves(bytes) ? ours : c10::GetCPUAllocator();
}

void use_for_pytorch() {
  static std::once_flag once;
  std::call_once(once, [] { c10::SetCPUAllocator(new ScopedAllocator(c10::GetCPUAllocator())); });
}

Scope::Scope() { ++scopes; }
Scope::~Scope() { --scopes; }

Sizes sizes() { return pool().sizes(); }
void give_back() { pool().give_back(); }
void set_on(bool on) { pool().set_on(on); }

}  // namespace cnnkern::block_pool
