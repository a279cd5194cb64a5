// How the results of one batch norm module were computed: for the report, and to stop deferring if it does not help.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace cnnkern {

class Site {
 public:
  // Deferring has some overhead, so it ends if most results were not fused. `mode`: training or not, with or without gradients.
  bool defers(int mode) {
    std::lock_guard<std::mutex> lock(mutex_);
    return modes_[mode].missed <= modes_[mode].fused;
  }
  bool always_fuses(int mode) {
    std::lock_guard<std::mutex> lock(mutex_);
    return modes_[mode].missed == 0 && modes_[mode].fused > 0;
  }
  // So does the fusion of a sum with the activation that follows, if most sums are used again.
  bool activates_sums(int mode) {
    std::lock_guard<std::mutex> lock(mutex_);
    return modes_[mode].sums_used_again <= modes_[mode].sums_activated;
  }
  void fused(int mode, const std::string& with) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++modes_[mode].fused, ++fused_[with];
    if (is_activated_sum(with)) ++modes_[mode].sums_activated;
  }
  void missed(int mode, const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++modes_[mode].missed, ++alone_[why];
  }
  // A result that was fused with its first use is used again. The sum of one is still one kernel.
  void used_again(int mode, const std::string& with) {
    std::lock_guard<std::mutex> lock(mutex_);
    --fused_[with];
    if (is_activated_sum(with)) {
      ++fused_["add"];
      --modes_[mode].sums_activated, ++modes_[mode].sums_used_again;
      return;
    }
    --modes_[mode].fused;
    ++modes_[mode].missed, ++alone_["its output is used again"];
  }
  // Whether activations are deferred too: until a result of one was not the input of a convolution that computes it.
  bool defers_activations(int mode) {
    std::lock_guard<std::mutex> lock(mutex_);
    return !computes_activations_ && modes_[mode].not_convolved <= modes_[mode].convolved;
  }
  // From here on they are computed when they are called.
  void compute_activations() {
    std::lock_guard<std::mutex> lock(mutex_);
    computes_activations_ = true;
  }
  void convolved(int mode) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++modes_[mode].convolved;
  }
  // `again`: it was used in another way too.
  void not_convolved(int mode, bool again) {
    std::lock_guard<std::mutex> lock(mutex_);
    modes_[mode].convolved -= again, ++modes_[mode].not_convolved;
  }
  int64_t convolutions() {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t all = 0;
    for (const Mode& mode : modes_) all += mode.convolved;
    return all;
  }
  void at_once(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++alone_[why];
  }
  std::map<std::string, int64_t> fusions() {
    std::lock_guard<std::mutex> lock(mutex_);
    return fused_;
  }
  std::map<std::string, int64_t> alone() {
    std::lock_guard<std::mutex> lock(mutex_);
    return alone_;
  }

 private:
  struct Mode {
    int64_t fused = 0, missed = 0;
    int64_t sums_activated = 0, sums_used_again = 0;
    int64_t convolved = 0, not_convolved = 0;
  };
  static bool is_activated_sum(const std::string& with) { return with.rfind("add + ", 0) == 0; }
  std::mutex mutex_;
  std::array<Mode, 4> modes_;
  bool computes_activations_ = false;
  std::map<std::string, int64_t> fused_, alone_;
};

}  // namespace cnnkern
