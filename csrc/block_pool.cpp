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
constexpr size_t kMostSlack = size_t{512} << 20;
constexpr auto kIdle = std::chrono::seconds(10);  // after which a block that is kept is given back

// Classes are eighths of a power of two apart.
size_t class_of(size_t bytes) {
  size_t step = kLeast / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* from_system(size_t bytes) {
  void* const data = c10::alloc_cpu(bytes);
#ifdef MADV_HUGEPAGE
  constexpr size_t kHugePage = size_t{1} << 21;  // of x86-64 and arm64 Linux
  // Fewer pages to clear one by one. Advice: where it is not taken nothing is lost.
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
    size_t block = kept_block(needed);
    void* data = nullptr;
    if (block > 0) {
      const auto latest = kept_of_[block].back();  // the last one that was left: it may still be in cache
      data = latest->data;
      forget(latest);
    } else {
      block = needed;
      make_room(block);
      lock.unlock();
      data = allocate(block);
      lock.lock();
      held_ += block;
    }
    needed_ += needed;
    most_ = std::max(most_, needed_);
    wasted_ += block - needed;
    in_use_[data] = {block, needed};
    return data;
  }

  // False for memory that is not the pool's.
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
    const size_t used = needed_ + wasted_;
    return {static_cast<int64_t>(used), static_cast<int64_t>(held_ - used), static_cast<int64_t>(most_)};
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Kept {
    void* data;
    size_t block;
    Clock::time_point since;
  };

  struct InUse {
    size_t block, needed;  // bytes of the block, and of the class of its result
  };

  // The most that results have needed at once, with one more of this size; and how much may be held beyond that.
  size_t most_with(size_t needed) const { return std::max(most_, needed_ + needed); }
  size_t slack_with(size_t needed) const { return std::min(most_with(needed) / 2, kMostSlack); }

  // How much has to go back before a block of this size is added.
  size_t excess_with(size_t block) const {
    const size_t limit = most_with(block) + slack_with(block);
    return held_ + block > limit ? held_ + block - limit : 0;
  }

  // The size of a kept block for a result of this class, 0 if there is none. One of its class; where another may not be added, a
  // larger one.
  size_t kept_block(size_t needed) const {
    const auto at_least = kept_of_.lower_bound(needed);
    if (at_least == kept_of_.end()) return 0;
    const size_t block = at_least->first;
    if (block == needed) return block;
    return excess_with(needed) > 0 && wasted_ + block - needed <= slack_with(needed) ? block : 0;
  }

  void forget(std::list<Kept>::iterator kept) {
    const auto same = kept_of_.find(kept->block);
    same->second.erase(std::find(same->second.begin(), same->second.end(), kept));
    if (same->second.empty()) kept_of_.erase(same);
    kept_in_order_.erase(kept);
  }

  // A kept block, which the caller gives back.
  void* drop(std::list<Kept>::iterator kept) {
    void* const data = kept->data;
    held_ -= kept->block;
    forget(kept);
    return data;
  }

  // Before a block of these bytes is added: gives back the smallest one that is enough, or the largest ones.
  void make_room(size_t block) {
    for (size_t excess; !kept_of_.empty() && (excess = excess_with(block)) > 0;) {
      const auto enough = kept_of_.lower_bound(excess);
      const auto& same = (enough == kept_of_.end() ? std::prev(enough) : enough)->second;
      c10::free_cpu(drop(same.front()));
    }
  }

  void* allocate(size_t block) {
    try {
      return from_system(block);
    } catch (const c10::Error&) {  // no memory: not while the pool keeps some
      give_back();
    }
    try {
      return from_system(block);
    } catch (const c10::Error&) {
      c10::profiledCPUMemoryReporter().OutOfMemory(block);
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

// The allocator of cnnkern's results.
class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override { return serves(bytes) ? taken(bytes) : c10::GetCPUAllocator()->allocate(bytes); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// Of PyTorch: the one that it had before, but within a Scope.
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
