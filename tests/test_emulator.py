"""The CUDA kernels executed without a GPU, and the proof that what executes them would report a fault.

docs/emulator.md says how it works. `pytest --device emulator tests/test_battery.py` is the battery on it.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from gpu_gate import gate, machine_code

from cnnkern import testing
from cnnkern.testing import CASES
from tests.child import run_child
from tests.slow import proved

CUDA_CASES = [case for case in CASES.values() if "cuda" in case.devices]

# ---- the battery ------------------------------------------------------------------------------------------------

# What of the battery runs with which tool: with sanitizers all that reads or writes memory in a way of its own.
MEMORY = (
    "as_good_as or float32_parameters or any_layout or off_a_vector or memory_format or empty_batch or every_kernel"
)
ONE = "not float64 and not float16 and not bfloat16"
DTYPES = {"float32": ONE, "address+undefined": "not float64 and not float16", "thread": ONE}
if os.environ.get("EMULATOR_FULL") == "1":  # make sanitize
    RUNS = {"plain": f"{MEMORY} or gradcheck or compiles_to_one_graph or torch_func", **dict.fromkeys(DTYPES, MEMORY)}
else:  # test_every_kernel, and variants whose kernels differ; of the others what two dtypes make of them
    SOME = "(alone or none or silu or plain)"
    RUNS = {
        "float32": f"(as_good_as and {SOME}) or every_kernel",  # make test; the others are make prove's
        "plain": f"(({MEMORY}) and {SOME}) or (as_good_as and (float32 or bfloat16))"
        " or (gradcheck and (alone or plain)) or every_kernel",
        "address+undefined": f"(({MEMORY}) and {SOME}) or every_kernel",
        "thread": f"(as_good_as and ({SOME} or depthwise or stride or dilated)) or every_kernel",
    }
RUNS = {tool: f"({chosen}) and {DTYPES[tool]}" if tool in DTYPES else chosen for tool, chosen in RUNS.items()}


@pytest.mark.parametrize("tool", proved(RUNS, ["float32"]))
def test_battery(tool, tmp_path):
    emulator.build(f"{tool}/kernels.so")
    # One process, whatever this one is part of: the sanitizers' reports end it.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        "-s",
    ]
    command += ["-o", "addopts=", "--device", "emulator", "--emulator-tool", tool, "-k", RUNS[tool]]
    command += ["--emulator-launches", str(tmp_path / "launches.json")]
    command += ["tests/test_battery.py", f"{Path(__file__)}::test_every_kernel"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | emulator.environment(tool)
    done = run_child(command, cwd=emulator.ROOT, env=environment, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[:9000]}"  # a report of a sanitizer begins there
    assert " passed" in done.stdout
    launched = json.loads((tmp_path / "launches.json").read_text())
    missing = {function(name) for name in emulator.kernels(tool)} - {function(name) for name in launched}
    assert not missing, "kernels that no test has run: EVERY_KERNEL needs what reaches them"
    for name, shared in launched.items():
        counted = gate.limits_of(
            machine_code.Kernel(name, "sm_80", 0, 0, 0, 0, machine_code.Code()), "cuda"
        ).dynamic_shared
        assert shared <= counted, f"{name} was given {shared} bytes; gpu_gate/thresholds.py counts {counted}"


def function(kernel: str) -> str:
    """A kernel's name without the arguments of its template."""
    return kernel.partition("<")[0]


# (shape, layout, variant): what reaches every kernel, among it shapes that are larger than the battery's.
SHAPES = (
    ((3, 17, 7, 7), "contiguous", {}),  # one block a channel
    ((2, 8, 4, 4), "contiguous", {}),  # in whole vectors
    ((2, 2, 97, 101), "contiguous", {}),  # slices of a channel
    ((1, 1, 96, 96), "contiguous", {}),  # in whole vectors
    ((3, 17, 5, 5), "channels_last", {}),  # strips of rows
    ((5, 8, 31, 33), "channels_last", {}),  # in whole vectors
)


def of_activations(*activations: str) -> list[tuple]:
    variants = [{"act": act, "training": training} for act in activations for training in (True, False)]
    return [(shape, layout, variant) for variant in variants for shape, layout, _ in SHAPES]


EVERY_KERNEL = {
    "bn_act": of_activations("relu", "none", "silu"),
    "bn_add_act": of_activations("relu", "none"),
    "sync_bn": [
        (shape, layout, variant)
        for variant in (*({"act": act} for act in ("relu", "none", "silu")), {"residual": True})
        for shape, layout, _ in SHAPES
    ]
    + [(shape, layout, {"residual": True, "act": "none"}) for shape, layout, _ in SHAPES],
    "add_relu": [*SHAPES, ((3, 17), "off a vector", {})],
    "grouped_conv2d": [
        *SHAPES,
        *(  # depthwise
            ((2, channels, 10, 9), layout, {"kernel": k, "padding": k // 2, "stride": stride})
            for channels, layout in ((8, "contiguous"), (8, "channels_last"), (12, "channels_last"))
            for k in (3, 5, 7)
            for stride in (1, 2)
        ),
        *(((2, 16, 10, 9), "contiguous", {"width": 8, "stride": stride}) for stride in (1, 2)),
        ((2, 3, 6, 7), "contiguous", {"dilation": 2, "padding": 2}),  # for any convolution
    ],
    "layer_norm": [
        (shape, "contiguous", {})
        for shape in (
            (17000, 8),  # a strip has several rows for a group of threads,
            (140, 2056),  # or for a block
            (3, 8200),  # rows in slices, by vectors
            (2, 8197),  # and by elements
            (270, 8200),  # a block a row, in stretches
            (2, 16400),  # in slices of 16 bits
            (5, 24),  # whole rows
            (5, 7),
        )
    ],
    "layer_norm2d": [
        *SHAPES,
        ((2, 3, 48, 96), "contiguous", {}),  # strips of tiles
        ((1, 1100, 2, 4), "contiguous", {}),  # channels in chunks
        ((1, 1100, 3, 3), "contiguous", {}),
        ((2, 100, 14, 14), "contiguous", {}),  # half a vector of 16 bits
    ],
}


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "off a vector":  # begins where no vector does
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return testing.with_layout(x, layout)


def drawn(case: testing.Case, shape, layout: str, variant: dict, dtype: torch.dtype, generator) -> tuple:
    """(inputs, dy)"""
    inputs = case.inputs(shape, dtype, generator=generator, **variant)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == inputs["input"].shape:
            inputs[name] = in_layout(value, layout)
    output = testing.run(case.reference, case, inputs)["output"]
    dy = testing.randn(output.shape, generator, dtype)
    return inputs, in_layout(dy, layout) if layout == "off a vector" else dy


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_every_kernel(case, dtype, generator, device, pytestconfig):
    if pytestconfig.getoption("--device") != "emulator":
        pytest.skip("test_battery runs this with each tool")
    for shape, layout, variant in EVERY_KERNEL[case.name]:
        inputs, dy = drawn(case, shape, layout, variant, dtype, generator)
        testing.check(case, inputs, dy)


# ---- thread orders ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(case, dtype, generator, monkeypatch):
    with emulator.Emulator():
        for shape, layout, variant in EVERY_KERNEL[case.name]:
            inputs, dy = drawn(case, shape, layout, variant, dtype, generator)
            results = []
            for order in ("forward", "reverse", "random:1"):
                monkeypatch.setenv("EMULATOR_ORDER", order)
                results.append(testing.run(case.function, case, inputs, dy))
            for other in results[1:]:
                for name, value in results[0].items():
                    assert torch.equal(value, other[name]), f"{shape} {layout} {variant}: {name}"


@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_saved_tensors_come_back_in_another_layout(case, generator):
    for layout, other in (("channels_last", "contiguous"), ("contiguous", "channels_last")):
        inputs, dy = drawn(case, (3, 16, 4, 5), layout, next(iter(case.variants.values())), torch.float32, generator)

        def hooked(back_in=other, **arguments):
            place = lambda t: testing.with_layout(t, back_in).clone()  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, place):
                return case.function(**arguments)

        with emulator.Emulator("float32"):
            testing.check(case, inputs, dy, hooked)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["add_relu", "bn_add_act"])
def test_masks_are_those_of_the_cpu_kernels(name, dtype, generator):
    for shape, layout, variant in (*SHAPES, ((3, 5), "contiguous", {}), ((2, 7, 3, 5), "channels_last", {})):
        inputs, _ = drawn(CASES[name], shape, layout, variant, dtype, generator)
        operator, arguments = CASES[name].forward_call(inputs)

        def mask(operator=operator, arguments=arguments):
            return operator(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))[-1]

        on_cpu = mask()
        with emulator.Emulator():
            assert torch.equal(mask(), on_cpu), f"{shape} {layout}"


def test_an_order_that_there_is_not(monkeypatch):
    monkeypatch.setenv("EMULATOR_ORDER", "sideways")
    refused = pytest.raises(RuntimeError, match="forward, reverse or random:SEED; got sideways")
    with emulator.Emulator("float32"), refused:
        torch.ops.cnnkern.add_relu(torch.ones(3, 2), torch.ones(3, 2))


def test_the_emulator_answers_and_stands_aside():
    def registered() -> str:
        return torch._C._dispatch_dump("cnnkern::add_relu").partition("\nCPU: ")[2].partition("\n")[0]

    before = registered()
    with emulator.Emulator("float32"):
        assert "tests/emulator/registration.cpp" in registered()
        assert not torch.backends.mkldnn.enabled
    assert registered() == before
    assert torch.backends.mkldnn.enabled


# ---- grouped convolutions: kernels and library ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("variant", "planes", "rows"),  # ours in contiguous layout and in channels_last, but for float64, where all are
    [
        ({}, True, True),
        ({"kernel": (4, 9), "padding": (0, 5), "stride": 2}, True, True),
        ({"width": 8}, True, False),
        ({"width": 2, "stride": 2}, True, False),
        ({"width": 4, "kernel": 5, "padding": 2}, False, False),
        ({"width": 4, "dilation": 2, "padding": 2}, False, False),
        ({"multiplier": 2}, False, False),
    ],
    ids=str,
)
def test_who_answers_for_a_grouped_convolution(variant, planes, rows, layout, dtype, generator, monkeypatch):
    case = CASES["grouped_conv2d"]
    inputs = case.inputs((2, 24, 7, 8), dtype, generator=generator, **variant)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    forward, arguments = case.forward_call(inputs)
    dy = testing.randn(forward(*arguments).shape, generator, dtype)
    monkeypatch.setenv("EMULATOR_ORDER", "sideways")  # whatever is launched fails
    with emulator.Emulator():
        for operator, given in ((forward, arguments), case.backward_call(inputs, dy)):
            if (planes if layout == "contiguous" else rows) or dtype == torch.float64:
                with pytest.raises(RuntimeError, match="forward, reverse or random:SEED; got sideways"):
                    operator(*given)
            else:
                operator(*given)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "types"), [(8, 3), (12, 1), (32, 1), (33, 0)])  # of float32, bfloat16 and float16
def test_how_wide_groups_may_be_for_our_kernels_in_contiguous_layout(width, types, generator, monkeypatch):
    case = CASES["grouped_conv2d"]
    ours = 0
    monkeypatch.setenv("EMULATOR_ORDER", "sideways")  # whatever is launched fails
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operator, arguments = case.forward_call(case.inputs((2, 48, 7, 8), dtype, generator=generator, width=width))
        with emulator.Emulator():
            try:
                operator(*arguments)
            except RuntimeError as error:
                if "got sideways" not in str(error):
                    raise
                ours += 1
    assert ours == types


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("width", "kernel"), [(1, 3), (1, 5), (1, 7), (3, 3), (8, 3), (18, 3)])
def test_convolutions_of_any_padding_and_stride(width, kernel, layout, generator):
    case = CASES["grouped_conv2d"]
    for stride, padding in itertools.product((1, 2), ((0, 1), (kernel // 2, kernel - 1), (kernel, 2 * kernel + 1))):
        variant = {"width": width, "kernel": kernel, "stride": stride, "padding": padding}
        inputs = case.inputs((2, 8, 9, 16), generator=generator, **variant)
        inputs["input"] = testing.with_layout(inputs["input"], layout)
        dy = testing.randn(case.reference(**inputs).shape, generator, torch.float32)
        with emulator.Emulator():
            testing.check(case, inputs, dy)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(
    "shape",
    [
        (19, 64, 7, 7),  # several images a block, and one that has fewer
        (3, 72, 14, 15),  # a tile of channels that is not full
        (1, 8, 61, 13),  # an image in parts
        (1, 8, 6, 130),  # columns in tiles
        (2, 40, 1, 1),
    ],
)
def test_depthwise_convolutions_of_rows_of_channels(shape, kernel, stride, dtype, generator):
    case = CASES["grouped_conv2d"]
    inputs = case.inputs(shape, dtype, generator=generator, kernel=kernel, stride=stride, padding=kernel // 2)
    inputs["input"] = testing.with_layout(inputs["input"], "channels_last")
    dy = testing.randn(case.reference(**inputs).shape, generator, dtype)
    with emulator.Emulator():
        testing.check(case, inputs, dy)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 8, 32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_a_convolution_do_not_depend_on_dy_s_layout(layout, width, generator):
    case = CASES["grouped_conv2d"]
    inputs = case.inputs((5, 32, 23, 21), generator=generator, width=width)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    dy = testing.randn(inputs["input"].shape, generator, torch.float32)
    with emulator.Emulator():
        results = []
        for given in ("contiguous", "channels_last", "sliced"):
            operator, arguments = case.backward_call(inputs, testing.with_layout(dy, given))
            results.append(operator(*arguments))
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


# ---- planted faults ---------------------------------------------------------------------------------------------

# name in faults.cpp -> the tool that has to report it and what the report says; with `order` threads run in that order.
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
    "not_rounded_to_tf32": ("plain", "gives multiply_add_tf32 a number that is not of to_tf32"),
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
    "destination_written_under_a_copy": ("plain", "whose destination was written while it was under way, begun at copies"),
    "group_barrier_of_too_many": ("plain", "hang: 378 threads .* 6 threads wait for other blocks in the group barrier at groups.h"),
    "group_barrier_of_too_few": ("plain", "of a group barrier of 2 blocks, whose counter says that . have come before"),
    "group_barrier_in_a_turn_that_was": ("plain", "turn 0 of a group barrier of 3 blocks, whose counter says that 3 have"),
    "group_barrier_of_a_launch_apart": ("plain", "waits for other blocks, in a launch that is not launch_together's"),
    "counter_that_is_not_zero": ("plain", "turn 0 of a group barrier of 3 blocks, whose counter says that 3 have come"),
    "block_that_leaves_its_group": ("plain", "threads wait for other blocks in the group barrier .*; 4 blocks have ended"),
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
