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
  void fused(int mode, const std::string& with) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++modes_[mode].fused, ++fused_[with];
  }
  void missed(int mode, const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++modes_[mode].missed, ++alone_[why];
  }
  // A result that was fused with its first use is used again.
  void used_again(int mode, const std::string& with) {
    std::lock_guard<std::mutex> lock(mutex_);
    --modes_[mode].fused, --fused_[with];
    ++modes_[mode].missed, ++alone_["its output is used again"];
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
  };
  std::mutex mutex_;
  std::array<Mode, 4> modes_;
  std::map<std::string, int64_t> fused_, alone_;
};

}  // namespace cnnkern
