"""The CUDA kernels executed without a GPU. tests/test_emulator_faults.py proves that what executes them reports faults.

docs/emulator.md says how it works. `pytest --device emulator tests/test_battery.py` is the battery on it.
"""

import itertools
import json
import os
import sys
from pathlib import Path

import emulator
import pytest
import torch
from gpu_gate import gate, machine_code

from cnnkern import testing
from cnnkern.testing import CASES
from tests import wide_layer_norms
from tests.child import run_child
from tests.slow import proved

# ---- the battery ------------------------------------------------------------------------------------------------

# What of the battery runs with which tool: with sanitizers all that reads or writes memory in a way of its own.
MEMORY = (
    "as_good_as or float32_parameters or any_layout or off_a_vector or memory_format or empty_batch or every_kernel"
)
ONE = "not float64 and not float16 and not bfloat16"
DTYPES = {"float32": ONE, "address+undefined": "not float64 and (bfloat16 or not float16)", "thread": ONE}
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
    command += ["tests/test_grouped_rows.py::test_every_kernel_in_tf32"]
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
    ((3, 17, 7, 7), "contiguous", {}),  # one block per channel
    ((2, 8, 4, 4), "contiguous", {}),  # in whole vectors
    ((2, 2, 97, 101), "contiguous", {}),  # slices of a channel
    ((1, 1, 96, 96), "contiguous", {}),  # in whole vectors
    ((3, 17, 5, 5), "channels_last", {}),  # strips of rows
    ((5, 8, 31, 33), "channels_last", {}),  # in whole vectors
)


def of_activations(*activations: str) -> list[tuple]:
    variants = [{"act": act, "training": training} for act in activations for training in (True, False)]
    return [(shape, layout, variant) for variant in variants for shape, layout, _ in SHAPES]


# The residual alone begins off a vector: the gradients of silu and PReLU read it beside tensors that begin with one.
RESIDUAL_OFF_A_VECTOR = [((4, 16, 10, 12), "residual off a vector", {"act": act}) for act in ("silu", "gelu", "relu")]
EVERY_KERNEL = {
    "bn_act": of_activations("relu", "none", "silu", "relu6", "gelu"),
    "bn_add_act": [*of_activations("relu", "none", "silu"), *RESIDUAL_OFF_A_VECTOR],
    "bn_prelu": [
        (shape, layout, {"residual": residual, "training": training, "slopes": slopes})
        for residual, slopes in ((False, "one"), (True, "one per channel"))
        for training in (True, False)
        for shape, layout, _ in (*SHAPES, ((2, 128, 4, 4), "channels_last", {}))  # more sums than threads
    ]
    + [((4, 16, 10, 12), "residual off a vector", {"residual": True})],
    "sync_bn": [
        (shape, layout, variant)
        for variant in (*({"act": act} for act in ("relu", "none", "silu")), {"residual": True})
        for shape, layout, _ in SHAPES
    ]
    + [(shape, layout, {"residual": True, "act": act}) for act in ("none", "silu") for shape, layout, _ in SHAPES]
    + [(shape, layout, {"residual": True} | variant) for shape, layout, variant in RESIDUAL_OFF_A_VECTOR],
    "add_relu": [*SHAPES, ((3, 17), "off a vector", {})],
    "grouped_conv2d": [
        *SHAPES,
        *(  # depthwise
            ((2, channels, 10, 9), layout, {"kernel": k, "padding": k // 2, "stride": stride})
            for channels, layout in ((8, "contiguous"), (8, "channels_last"), (12, "channels_last"))
            for k in (3, 5, 7)
            for stride in (1, 2)
        ),
        *(
            ((2, 48, 10, 9), layout, {"width": width, "stride": stride})
            for layout, widths in (("contiguous", (8,)), ("channels_last", (4, 8, 16, 24, 32)))
            for width in widths
            for stride in (1, 2)
        ),
        *(  # of which a block has one group, or a part of it
            ((2, 2 * width, 6, 5), "channels_last", {"width": width, "stride": stride})
            for width in (40, 56, 72, 120)
            for stride in (1, 2)
        ),
        ((2, 3, 6, 7), "contiguous", {"dilation": 2, "padding": 2}),  # for any convolution
    ],
    "layer_norm": [
        (shape, "contiguous", {})
        for shape in (
            (17000, 8),  # a strip has several rows for a group of threads,
            (140, 2056),  # or for a block
            (3, 8200),  # rows in slices, by vectors
            (2, 8197),  # and by elements
            (270, 8200),  # a block per row, in stretches
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
    "max_pool2d": [
        (shape, layout, {"kernel": kernel, "stride": stride, "padding": padding})
        for kernel, stride, padding in ((3, 2, 1), (3, 2, 0), (2, 2, 0), (2, 2, 1), (3, 1, 1), (5, 3, 2))
        for shape in ((2, 8, 10, 12), (3, 5, 9, 7))
        for layout in ("contiguous", "channels_last", "off a vector")
    ]
    + [((40, 160, 34, 10), "channels_last", {}), ((300, 40, 34, 10), "contiguous", {})],  # several windows a thread
}


OFF_A_VECTOR = "off a vector"


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == OFF_A_VECTOR:  # begins where no vector does
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return testing.with_layout(x, "contiguous" if layout.endswith(OFF_A_VECTOR) else layout)


def drawn(case: testing.Case, shape, layout: str, variant: dict, dtype: torch.dtype, generator) -> tuple:
    """(inputs, dy)"""
    inputs = case.inputs(shape, dtype, generator=generator, **variant)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == inputs["input"].shape:
            inputs[name] = in_layout(value, OFF_A_VECTOR if layout == f"{name} {OFF_A_VECTOR}" else layout)
    output = testing.run(case.reference, case, inputs)["output"]
    dy = testing.randn(output.shape, generator, dtype)
    return inputs, in_layout(dy, layout) if layout == "off a vector" else dy


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_kernel(case, dtype, generator, device, pytestconfig):
    if pytestconfig.getoption("--device") != "emulator":
        pytest.skip("test_battery runs this with each tool")
    for shape, layout, variant in EVERY_KERNEL[case.name]:
        inputs, dy = drawn(case, shape, layout, variant, dtype, generator)
        testing.check(case, inputs, dy)
        if case.name in wide_layer_norms.NAMES and dtype in wide_layer_norms.DTYPES:
            given = wide_layer_norms.drawn(case.name, shape, dtype, generator, layout)
            wide_layer_norms.check(case.name, *given)


# ---- thread orders ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
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


OF_16_BITS = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *OF_16_BITS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("variant", "planes", "rows"),  # ours in contiguous layout, in channels_last, but for float64, where all are
    [
        ({}, ALL, ALL),
        ({"kernel": (4, 9), "padding": (0, 5), "stride": 2}, ALL, ALL),
        ({"width": 8}, (torch.float32,), OF_16_BITS),
        ({"width": 2, "stride": 2}, ALL, OF_16_BITS),
        ({"width": 24, "padding": 2}, (torch.float32,), OF_16_BITS),
        ({"width": 8, "padding": 3}, (torch.float32,), ()),
        ({"width": 4, "padding": 3}, ALL, ()),
        ({"width": 4, "kernel": 5, "padding": 2}, (), ()),
        ({"width": 4, "dilation": 2, "padding": 2}, (), ()),
        ({"multiplier": 2}, (), ()),
    ],
    ids=str,
)
def test_the_rule_of_dispatch_of_grouped_convolutions(variant, planes, rows, layout, dtype, generator, monkeypatch):
    case = CASES["grouped_conv2d"]
    inputs = case.inputs((2, 24, 7, 8), dtype, generator=generator, **variant)
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    forward, arguments = case.forward_call(inputs)
    dy = testing.randn(forward(*arguments).shape, generator, dtype)
    monkeypatch.setenv("EMULATOR_ORDER", "sideways")  # whatever is launched fails
    with emulator.Emulator():
        for operator, given in ((forward, arguments), case.backward_call(inputs, dy)):
            if dtype in (planes if layout == "contiguous" else rows) or dtype == torch.float64:
                with pytest.raises(RuntimeError, match="forward, reverse or random:SEED; got sideways"):
                    operator(*given)
            else:
                operator(*given)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "types"), [(4, 3), (6, 1), (32, 1), (33, 0)])  # of float32, bfloat16 and float16
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
        (19, 64, 7, 7),  # several images per block, and one that has fewer
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
