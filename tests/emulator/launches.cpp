// Which kernels were launched, and with how much dynamic shared memory at most: tests demand that each tool has seen every
// kernel, and that the static gate counts as much memory.
#include <algorithm>
#include <map>
#include <sstream>
#include <string>

#include "observer.h"

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // of this library's image

namespace {

class Launches final : public emulator::Observer {
 public:
  void launch(const void* kernel, size_t dynamic_shared) override {
    size_t& most = most_[kernel];
    most = std::max(most, dynamic_shared);
  }
  void blocks_end() override {}

  // A line for each kernel: its offset in the library, bytes.
  std::string list() const {
    std::ostringstream lines;
    for (const auto& [kernel, most] : most_) lines << static_cast<const char*>(kernel) - &__ehdr_start << ' ' << most << '\n';
    return lines.str();
  }

 private:
  std::map<const void*, size_t> most_;
};

Launches launches;
const bool installed = (emulator::observer = &launches, true);

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* emulator_launches() {
  static std::string text;
  text = launches.list();
  return text.c_str();
}
