"""Mutation tests of the emulator: it reports each kernel with a deliberate bug, and nothing without it."""

import os
import re
import subprocess

import emulator
import pytest

from tests.child import run_child
from tests.slow import proved

# name in emulator/faults.cpp -> the tool that has to report it, what the report says and, where it takes one, the order
# in which threads run.
FAULTS = {
    "missing_barrier": ("thread", "data race"),
    "missing_syncwarp": ("thread", "data race"),
    "shuffle_as_barrier": ("thread", "data race"),
    "missing_threadfence": ("thread", "data race"),
    "cross_block_race": ("thread", "data race"),
    "cross_block_race_around_a_barrier": ("thread", "data race"),
    "block_reads_another": ("thread", "data race"),
    "shared_overrun": ("address+undefined", "heap-buffer-overflow"),
    "dynamic_shared_overrun": ("address+undefined", "heap-buffer-overflow"),
    "global_overrun": ("address+undefined", "heap-buffer-overflow"),
    "misaligned_vector": ("address+undefined", "misaligned address"),
    "index_overflow": ("address+undefined", "signed integer overflow"),
    "uninitialised_shared": ("plain", "wrong result: element 0 is -?nan"),
    "order_of_threads": ("plain", "wrong result: element 1 is -?nan", "reverse"),
    "divergent_barrier": ("plain", "divergent barrier: thread 1 of block"),
    "early_exit": ("plain", "thread 40 of block .* left while 40 threads wait at the barrier"),
    "threads_that_hang": ("plain", "divergent barrier: thread 33 of block"),
    "wrong_mask": ("plain", "thread 16 of block .* left while other lanes wait for it in __shfl_xor_sync"),
    "lanes_with_different_masks": ("plain", "with another mask or place than lanes that wait in __shfl_xor_sync"),
    "source_outside_mask": ("plain", "reads lane 16, which is not in the mask of __shfl_xor_sync"),
    "fragments_out_of_order": ("plain", "wrong result: element 0 is"),
    "fragments_not_transposed": ("plain", "wrong result: element 0 is"),
    "misaligned_matrix": ("plain", "an address that is no multiple of 16 to load_matrices at tensor_cores.h"),
    "matrix_outside_shared_memory": ("plain", "not in the block's shared memory to load_matrices at tensor_cores.h"),
    "product_of_half_a_warp": ("plain", "left while other lanes wait for it in multiply_add"),
    "products_at_two_places": ("plain", "with another mask or place than lanes that wait in multiply_add"),
    "not_rounded_to_tf32": ("plain", "gives multiply_add a number that is not of to_tf32"),
    "copy_never_waited_for": ("plain", "left without having waited for a copy that it began at copies.h"),
    "copy_read_before_the_wait": ("plain", "wrong result: element 0 is -?nan"),
    "wait_that_leaves_one_too_many": ("plain", "wrong result: element 0 is -?nan"),
    "copy_not_committed": ("plain", "left without having waited for a copy that it began at copies.h"),
    "missing_barrier_after_a_copy": ("thread", "data race"),
    "copy_over_what_others_read": ("thread", "data race"),
    "copy_from_beyond_a_tensor": ("address+undefined", "heap-buffer-overflow"),
    "copy_to_a_misaligned_address": ("plain", "an address that is no multiple of 16 to async_copy at copies.h"),
    "copy_from_a_misaligned_address": ("plain", "a source that is no multiple of 16 to async_copy at copies.h"),
    "copy_beyond_shared_memory": ("plain", "not in the block's shared memory to async_copy at copies.h"),
    "copy_from_shared_memory": ("plain", "a source that is not in global memory to async_copy at copies.h"),
    "source_written_under_a_copy": ("plain", "whose source was written while it was under way, begun at copies.h"),
    "destination_written_under_a_copy": ("plain", "whose destination was written while it was under way, begun at"),
    "group_barrier_of_too_many": ("plain", "hang: .* 6 threads wait for other blocks in the group barrier at groups.h"),
    "group_barrier_of_too_few": ("plain", "of a group barrier of 2 blocks, whose counter says that . have come before"),
    "group_barrier_in_a_turn_that_was": ("plain", "turn 0 of .* 3 blocks, whose counter says that 3 have come"),
    "group_barrier_of_a_launch_apart": ("plain", "waits for other blocks, in a launch that is not launch_together's"),
    "counter_that_is_not_zero": ("plain", "turn 0 of a group barrier of 3 blocks, whose counter says that 3 have come"),
    "block_that_leaves_its_group": ("plain", "wait for other blocks in the group barrier .*; 4 blocks have ended"),
    "missing_group_barrier": ("thread", "data race"),
    "partial_of_another_group": ("thread", "data race"),
    "partial_overwritten_before_all_read_it": ("thread", "data race"),
    "too_many_to_be_resident": ("plain", "9 blocks cannot be co-resident: 8 fit on the device at once"),
    "too_much_shared_together": ("plain", "a block's shared memory exceeds 49152 bytes with the array"),
    "too_many_threads": ("plain", "a block has at most 1024 threads"),
    "empty_grid": ("plain", "a grid has at least one block"),
    "grid_too_tall": ("plain", "a grid has at most .* blocks"),
    "too_much_shared": ("plain", "at most 232448 bytes of shared memory; got 232449"),
    "too_much_static_shared": ("plain", "shared memory exceeds 49152 bytes with the array"),
    "threads_that_do_not_wait": ("plain", "of 64 threads of a kernel that may start early 32 have waited"),
    "another_stream": ("plain", "on a stream that is not the current one"),
    "missing_guard": ("plain", "no CUDAGuard has chosen the tensors' device"),
    "missing_launch_check": ("plain", "returned without C10_CUDA_KERNEL_LAUNCH_CHECK"),
}


def run_faults(tool: str, *arguments: str, **switches: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **emulator.environment(tool), **switches}
    environment.pop("LD_PRELOAD", None)  # the program is linked to its sanitizer
    command = [emulator.build(f"{tool}/faults"), *arguments]
    return run_child(command, env=environment)


@pytest.mark.parametrize("name", proved(FAULTS, (name for name, (tool, *_) in FAULTS.items() if tool == "plain")))
def test_a_planted_fault_is_reported(name):
    tool, report, *order = FAULTS[name]
    done = run_faults(tool, "--fault", name, EMULATOR_ORDER=order[0] if order else "forward")
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


@pytest.mark.parametrize("order", ["forward", "reverse", "random:7"])
@pytest.mark.parametrize("tool", proved(("plain", "address+undefined", "thread"), ["plain"]))
def test_correct_kernels_are_silent(tool, order):
    names = run_faults(tool).stdout.split()
    assert sorted(names) == sorted(FAULTS)
    done = run_faults(tool, *names, EMULATOR_ORDER=order)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("early_exit", "EMULATOR_STRICT=0"),
        pytest.param("cross_block_race", "EMULATOR_BLOCKS=ordered", marks=pytest.mark.slow),
    ],
)
def test_a_switch_that_hides_a_fault(name, switch):
    done = run_faults(FAULTS[name][0], "--fault", name, **dict([switch.split("=")]))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("resident", "report"),
    [
        ("2", "3 blocks cannot be co-resident: 2 fit on the device at once"),
        ("none", "EMULATOR_RESIDENT must be .*; got none"),
    ],
)
def test_how_many_blocks_are_resident_is_a_setting(resident, report):
    done = run_faults("plain", "--fault", "too_many_to_be_resident", EMULATOR_RESIDENT=resident)
    assert re.search(report, done.stderr), done.stderr
