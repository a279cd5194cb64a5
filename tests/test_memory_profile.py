"""How the CUDA kernels use memory, counted on the emulator: sectors of 32 bytes that the accesses of a warp touch."""

import re

import emulator
import pytest
import torch
from gpu_gate import traffic
from gpu_gate.thresholds import SECTORS, SECTORS_OF_ALL

from cnnkern import testing
from tests.child import run_child

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calls() -> list[traffic.Call]:
    return traffic.calls()


def test_every_operator_is_profiled(calls):
    assert {call.operator for call in calls} == testing.CASES.keys()
    assert all(call.traffic for call in calls)


@pytest.mark.parametrize("operator", testing.CASES)
def test_hot_kernels_touch_no_more_sectors_than_their_bytes_fill(calls, operator):
    for call in (call for call in calls if call.operator == operator):
        kernels = call.by_kernel()
        total = sum(moved for _, _, moved in kernels.values())
        for kernel, (wide, every, moved) in kernels.items():
            where = f"{kernel} in {call.direction} of {call.shape} {call.layout}"
            allowed = next((most for name, (most, _) in SECTORS_OF_ALL.items() if re.search(name, kernel)), SECTORS)
            assert wide <= SECTORS, where
            assert every <= allowed or moved < total / 10, where


def add_relu(x: torch.Tensor) -> dict[tuple[str, int], emulator.Traffic]:
    with emulator.Emulator("profile") as machine:
        machine.profile()
        torch.ops.cnnkern.add_relu(x, x)
        rows = machine.profile()
    assert {row.kernel for row in rows} <= {"add_relu_fwd_kernel<float, 4>", "add_relu_fwd_kernel<float, 1>"}
    return {(row.kind, row.width): row for row in rows}


def test_counts_are_those_of_a_kernel_that_one_can_count_by_hand():
    rows = add_relu(torch.ones(1 << 14))
    assert set(rows) == {("load", 16), ("store", 16), ("store", 4)}
    for kind, tensors in (("load", 2), ("store", 1)):
        row = rows[kind, 16]  # of 32 lanes with 16 bytes
        assert row.bytes == tensors * 4 << 14
        assert (row.requests, row.sectors, row.ideal) == (row.bytes // 512, row.bytes // 32, row.bytes // 32)
    mask = rows["store", 4]  # four words of a warp's 128 elements
    assert (mask.requests, mask.sectors, mask.bytes) == (128, 128, 1 << 11)


def test_what_is_not_aligned_touches_more_sectors():
    row = add_relu(torch.ones(1 + (1 << 14))[1:])["load", 4]
    assert row.sectors / row.ideal == 1.25  # 128 bytes in five sectors


def test_what_a_kernel_does_with_shared_memory_and_its_own_stack_is_left_out():
    x = torch.ones(2, 8, 16, 16)
    with emulator.Emulator("profile") as machine:
        machine.profile()
        torch.ops.cnnkern.bn_act(x, None, None, None, None, True, 0.1, 1e-5, "relu")
        rows = machine.profile()
    # Both passes read x and one writes y; a few samples and statistics are left.
    assert 3 <= sum(row.bytes for row in rows) / (4 * x.numel()) <= 3.1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_pixels_that_are_unlike_the_rest_cost_no_further_pass(layout):
    """Where the few elements that sums are shifted by are far from all others, sums are taken again. First pixels are
    what equal steps through a batch of 16 give: corners of images, which padding makes unlike the rest."""
    x = torch.randn(16, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 1e3
    x = testing.with_layout(x, layout)
    with emulator.Emulator("profile") as machine:
        machine.profile()
        torch.ops.cnnkern.bn_act(x, None, None, None, None, True, 0.1, 1e-5, "relu")
        rows = machine.profile()
    assert sum(row.bytes for row in rows) / (4 * x.numel()) <= 3.1


def test_asynchronous_copies_are_loads_of_a_warp():
    done = run_child([emulator.build("profile/faults"), "copy_never_waited_for"])
    assert (done.returncode, done.stderr) == (0, "")
    rows = [
        line.split()[1:] for line in done.stdout.splitlines()
    ]  # kind, bytes of a lane, then Traffic from requests on
    ((width, *counts),) = (row for kind, *row in rows if kind == "load")
    requests, sectors, ideal, loaded = map(int, counts)
    vectors = 7 * 64 - 3  # of 16 bytes: seven chunks of two warps, but for three that do not exist
    assert (width, requests, loaded) == ("16", 7 * 2, 16 * vectors)
    assert ideal <= sectors <= ideal + requests  # malloc aligns to half a sector
