// The emulator's own proof. Each kernel is right without its fault and wrong with it: `faults NAME` and
// `faults --fault NAME`. A run without a report ends with 0. tests/test_emulator_faults.py says which tool has to report which.
// Linked to the profile it prints what that has counted.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "faults/accesses.h"
#include "faults/blocks.h"
#include "faults/copies.h"
#include "faults/groups.h"
#include "faults/launches.h"
#include "faults/shared_memory.h"
#include "faults/tensor_cores.h"
#include "faults/warps.h"

extern "C" __attribute__((weak)) const char* emulator_profile();

namespace {

struct Fault {
  const char* name;
  void (*right)();
  void (*wrong)();
};

#define FAULT(name) {#name, name<false>, name<true>}
const Fault kFaults[] = {
    FAULT(missing_barrier),
    FAULT(order_of_threads),
    FAULT(missing_syncwarp),
    FAULT(shuffle_as_barrier),
    FAULT(shared_overrun),
    FAULT(dynamic_shared_overrun),
    FAULT(global_overrun),
    FAULT(uninitialised_shared),
    FAULT(divergent_barrier),
    FAULT(early_exit),
    FAULT(threads_that_hang),
    FAULT(wrong_mask),
    FAULT(lanes_with_different_masks),
    FAULT(source_outside_mask),
    FAULT(fragments_out_of_order),
    FAULT(fragments_not_transposed),
    FAULT(misaligned_matrix),
    FAULT(matrix_outside_shared_memory),
    FAULT(product_of_half_a_warp),
    FAULT(products_at_two_places),
    FAULT(not_rounded_to_tf32),
    FAULT(copy_never_waited_for),
    FAULT(copy_read_before_the_wait),
    FAULT(wait_that_leaves_one_too_many),
    FAULT(copy_not_committed),
    FAULT(missing_barrier_after_a_copy),
    FAULT(copy_over_what_others_read),
    FAULT(copy_from_beyond_a_tensor),
    FAULT(copy_to_a_misaligned_address),
    FAULT(copy_from_a_misaligned_address),
    FAULT(copy_beyond_shared_memory),
    FAULT(copy_from_shared_memory),
    FAULT(source_written_under_a_copy),
    FAULT(destination_written_under_a_copy),
    FAULT(group_barrier_of_too_many),
    FAULT(group_barrier_of_too_few),
    FAULT(group_barrier_in_a_turn_that_was),
    FAULT(group_barrier_of_a_launch_apart),
    FAULT(counter_that_is_not_zero),
    FAULT(block_that_leaves_its_group),
    FAULT(missing_group_barrier),
    FAULT(partial_of_another_group),
    FAULT(partial_overwritten_before_all_read_it),
    FAULT(too_many_to_be_resident),
    FAULT(missing_threadfence),
    FAULT(cross_block_race),
    FAULT(cross_block_race_around_a_barrier),
    FAULT(block_reads_another),
    FAULT(misaligned_vector),
    FAULT(index_overflow),
    FAULT(too_many_threads),
    FAULT(empty_grid),
    FAULT(grid_too_tall),
    FAULT(too_much_shared),
    FAULT(too_much_static_shared),
    FAULT(too_much_shared_together),
    FAULT(threads_that_do_not_wait),
    FAULT(another_stream),
    FAULT(missing_guard),
    FAULT(missing_launch_check),
};

}  // namespace

int main(int argc, char** argv) {
  const bool wrong = argc > 1 && std::strcmp(argv[1], "--fault") == 0;
  if (argc < 2 + wrong) {
    for (const Fault& fault : kFaults) std::puts(fault.name);
    return 0;
  }
  try {
    for (int i = 1 + wrong; i < argc; ++i)
      for (const Fault& fault : kFaults)
        if (std::strcmp(fault.name, argv[i]) == 0) (wrong ? fault.wrong : fault.right)();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  if (emulator_profile != nullptr) std::fputs(emulator_profile(), stdout);
  return 0;
}
