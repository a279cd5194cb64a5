"""The CUDA kernels executed without a GPU, and the proof that what executes them would report a fault.

docs/emulator.md says how it works. `pytest --device emulator tests/test_battery.py` is the battery on it.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch

from cnnkern import testing
from cnnkern.testing import CASES

CUDA_CASES = [case for case in CASES.values() if "cuda" in case.devices]

# ---- the battery ------------------------------------------------------------------------------------------------

# What of the battery runs with which tool: with sanitizers all that reads or writes memory in a way of its own.
MEMORY = "as_good_as or float32_parameters or any_layout or off_a_vector or memory_format or empty_batch or larger"
DTYPES = {"address+undefined": "not float64 and not float16", "thread": "not float64 and not float16 and not bfloat16"}
if os.environ.get("EMULATOR_FULL") == "1":  # make sanitize
    RUNS = {"plain": f"{MEMORY} or gradcheck or compiles_to_one_graph or torch_func", **dict.fromkeys(DTYPES, MEMORY)}
else:  # make test: variants that reach every kernel; of the others what two dtypes make of them
    EVERY_KERNEL = "(alone or none or silu or plain)"
    RUNS = {
        "plain": f"(({MEMORY}) and {EVERY_KERNEL}) or (as_good_as and (float32 or bfloat16)) or (gradcheck and alone)"
        " or larger",
        "address+undefined": f"(({MEMORY}) and {EVERY_KERNEL}) or larger",
        "thread": f"(as_good_as and ({EVERY_KERNEL} or depthwise or stride or dilated)) or larger",
    }
RUNS = {tool: f"({chosen}) and {DTYPES[tool]}" if tool in DTYPES else chosen for tool, chosen in RUNS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("tool", RUNS)
def test_battery(tool):
    emulator.build(f"{tool}/kernels.so")
    # One process, whatever this one is part of: the sanitizers' reports end it.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    command += ["--device", "emulator", "--emulator-tool", tool, "-k", RUNS[tool]]
    command += ["tests/test_battery.py", f"{Path(__file__)}::test_larger_shapes"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | emulator.environment(tool)
    done = subprocess.run(command, cwd=emulator.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout


# What the battery's shapes are too small for.
LARGER = (
    ((3, 17, 7, 7), "contiguous"),  # one block a channel
    ((2, 2, 97, 101), "contiguous"),  # slices of a channel
    ((5, 8, 31, 33), "channels_last"),  # strips of rows
)
LARGER_OF = {
    "layer_norm": (
        ((17000, 8), "contiguous"),  # a strip has several rows for a group of threads,
        ((140, 2056), "contiguous"),  # or for a block
        ((3, 8200), "contiguous"),  # rows in slices, by vectors
        ((2, 8197), "contiguous"),  # and by elements
        ((270, 8200), "contiguous"),  # a block a row, in stretches
    ),
    "layer_norm2d": (
        ((2, 3, 48, 96), "contiguous"),  # strips of tiles
        ((1, 1100, 2, 4), "contiguous"),  # channels in chunks
        ((1, 1100, 3, 3), "contiguous"),
        ((2, 100, 14, 14), "contiguous"),  # half a vector of 16 bits
    ),
}


def larger(case: testing.Case) -> tuple:
    return LARGER + LARGER_OF.get(case.name, ())


def drawn(case: testing.Case, shape, layout: str, dtype: torch.dtype, generator) -> tuple[dict, torch.Tensor]:
    """(inputs, dy)"""
    inputs = case.inputs(shape, dtype, generator=generator)
    inputs = {
        n: testing.with_layout(v, layout) if isinstance(v, torch.Tensor) and v.shape == shape else v
        for n, v in inputs.items()
    }
    output = testing.run(case.reference, case, inputs)["output"]
    return inputs, testing.randn(output.shape, generator, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_larger_shapes(case, dtype, generator, device, pytestconfig):
    if pytestconfig.getoption("--device") != "emulator":
        pytest.skip("test_battery runs this with each tool")
    for shape, layout in larger(case):
        inputs, dy = drawn(case, shape, layout, dtype, generator)
        testing.check(case, inputs, dy)


# ---- thread orders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(case, generator, monkeypatch):
    with emulator.Emulator():
        for shape, layout in larger(case):
            inputs, dy = drawn(case, shape, layout, torch.float32, generator)
            results = []
            for order in ("forward", "reverse", "random:1", "random:2"):
                monkeypatch.setenv("EMULATOR_ORDER", order)
                results.append(testing.run(case.function, case, inputs, dy))
            for other in results[1:]:
                for name, value in results[0].items():
                    assert torch.equal(value, other[name]), f"{shape} {layout}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["add_relu", "bn_add_act"])
def test_masks_are_those_of_the_cpu_kernels(name, dtype, generator):
    for shape, layout in (*LARGER, ((3, 5), "contiguous"), ((2, 7, 3, 5), "channels_last")):
        inputs, _ = drawn(CASES[name], shape, layout, dtype, generator)
        operator, arguments = CASES[name].forward_call(inputs)

        def mask(operator=operator, arguments=arguments):
            return operator(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))[-1]

        on_cpu = mask()
        with emulator.Emulator():
            assert torch.equal(mask(), on_cpu), f"{shape} {layout}"


def test_an_order_that_there_is_not(monkeypatch):
    monkeypatch.setenv("EMULATOR_ORDER", "sideways")
    with emulator.Emulator(), pytest.raises(RuntimeError, match="forward, reverse or random:SEED; got sideways"):
        torch.ops.cnnkern.add_relu(torch.ones(3, 2), torch.ones(3, 2))


def test_the_emulator_answers_and_stands_aside():
    def registered() -> str:
        return torch._C._dispatch_dump("cnnkern::add_relu").partition("\nCPU: ")[2].partition("\n")[0]

    before = registered()
    with emulator.Emulator():
        assert "tests/emulator/registration.cpp" in registered()
        assert not torch.backends.mkldnn.enabled
    assert registered() == before
    assert torch.backends.mkldnn.enabled


# ---- grouped convolutions: kernels and library ------------------------------------------------------------------


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
    "too_many_threads": ("plain", "a block has at most 1024 threads"),
    "empty_grid": ("plain", "a grid has at least one block"),
    "grid_too_tall": ("plain", "a grid has at most .* blocks"),
    "too_much_shared": ("plain", "at most 49152 bytes of shared memory; got 49153"),
    "too_much_static_shared": ("plain", "shared memory exceeds 49152 bytes"),
}


def run_faults(tool: str, *arguments: str, **switches: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **emulator.environment(tool), **switches}
    environment.pop("LD_PRELOAD", None)  # the program is linked to its sanitizer
    command = [emulator.build(f"{tool}/faults"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name):
    tool, report, *order = FAULTS[name]
    done = run_faults(tool, "--fault", name, EMULATOR_ORDER=order[0] if order else "forward")
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


@pytest.mark.parametrize("order", ["forward", "reverse", "random:7"])
@pytest.mark.parametrize("tool", emulator.TOOLS)
def test_correct_kernels_are_silent(tool, order):
    names = run_faults(tool).stdout.split()
    assert sorted(names) == sorted(FAULTS)
    done = run_faults(tool, *names, EMULATOR_ORDER=order)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "switch"), [("early_exit", "EMULATOR_STRICT=0"), ("cross_block_race", "EMULATOR_BLOCKS=ordered")]
)
def test_a_switch_that_hides_a_fault(name, switch):
    done = run_faults(FAULTS[name][0], "--fault", name, **dict([switch.split("=")]))
    assert (done.returncode, done.stderr) == (0, "")
