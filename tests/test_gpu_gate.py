"""The static gate: the machine code of every kernel, CUDA C++ and Triton, held to gpu_gate/thresholds.py.

The machine code of the built extension is judged in full; for the other architectures ptxas compiles a part of it here,
and all of it in `make gpu-report`. What was read is kept in build/gpu_gate while it is the same.
"""

import re

import pytest
from gpu_gate import cuda, gate, machine_code, predicted, report, triton_code
from gpu_gate.limits import Rule
from gpu_gate.thresholds import RULES

FULL = next(name for name, types in cuda.SAMPLES.items() if types is None)


def compiled(architecture: str) -> list[machine_code.Kernel]:
    try:
        return cuda.kernels(architecture)
    except cuda.Unavailable as reason:
        pytest.skip(str(reason))


# ---- the kernels that ship --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda.ARCHITECTURES)
def test_cuda_kernels_keep_the_thresholds(architecture):
    kernels = compiled(architecture)
    assert kernels
    assert not gate.judge(kernels, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", triton_code.SAMPLES)  # a report compiles for all
def test_triton_kernels_keep_the_thresholds(architecture):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    kernels = triton_code.kernels(architecture)
    assert kernels
    assert not gate.judge(kernels, "triton")


@pytest.mark.slow
def test_every_kernel_that_ships_is_judged():
    judged = {kernel.name for kernel in compiled(FULL)}
    for stem, module in cuda.modules().items():
        for ptx in module.ptx.values():
            shipped = machine_code.spelled(re.findall(r"\.entry (\w+)", ptx.decode()))
            assert shipped, stem
            assert set(shipped) <= judged, stem


@pytest.mark.slow
def test_no_rule_is_left_over():
    assert not gate.unused_rules(compiled(FULL), "cuda")


# ---- the gate itself --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "value", "reported"),
    [
        ("registers", 16, "registers: "),
        ("spills", -1, "accesses to local memory: 0, at most -1"),
        ("stack", -1, "bytes of stack: 0, at most -1"),
        ("shared", 8, "bytes of static shared memory: "),
        ("occupancy", 1.01, "at least 101%"),
        ("narrow", -1, "loads and stores of less than 16 bytes in hot code: 0, at most -1"),
        ("atomics", -1, "atomics in hot code: 0, at most -1"),
        ("divisions", -1, "divisions, roots and calls in hot code: 0, at most -1"),
        ("functions", -1, "exponentials in hot code: 0, at most -1"),
        ("fp64", -1, "float64 instructions in hot code: 0, at most -1"),
        ("round", (5, 4), r"loads and stores of 16 bytes of a round: .*, at least \(5, 4\)"),
        ("whole", (99, 0), r"loads and stores of 16 bytes of all code: .*, at least \(99, 0\)"),
    ],
)
def test_a_broken_threshold_is_reported(limit, value, reported):
    name = "map_planes_kernel<BnActForward<float, Relu>, false>"
    kernels = [kernel for kernel in compiled(FULL) if kernel.name.startswith("map_planes_kernel<BnActForward<float")]
    assert not gate.judge(kernels, "cuda")
    broken = (*RULES, Rule("cuda", f"^{re.escape(name)}$", "broken on purpose", {limit: value}))
    (line,) = gate.judge(kernels, "cuda", broken)
    assert line.startswith(f"{FULL} {name}: ")
    assert re.search(reported, line)


PLANTED = {
    "narrow": "loads and stores of less than 16 bytes in hot code",
    "half_narrow": "loads and stores of less than 16 bytes in hot code",
    "integer_division": "divisions, roots and calls in hot code",
    "division": "divisions, roots and calls in hot code",
    "exponential": "exponentials in hot code",
    "double": "float64 instructions in hot code",
    "atomic": "atomics in hot code",
    "spilling": "accesses to local memory",
    "greedy": "registers",
    "crowded": "occupancy",
}


@pytest.fixture(scope="module")
def planted() -> dict[str, machine_code.Kernel]:
    if machine_code.toolkit("nvcc") is None or machine_code.toolkit("cuobjdump") is None:
        pytest.skip("needs nvcc and cuobjdump, which `pip install -r requirements.txt` brings")
    return {kernel.name.removesuffix("_kernel"): kernel for kernel in cuda.planted()}


@pytest.mark.slow  # nvcc compiles them
def test_a_sound_kernel_passes(planted):
    assert set(planted) == {"sound", *PLANTED}
    assert not gate.judge([planted["sound"]], "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_kernel_is_refused(planted, name):
    lines = gate.judge([planted[name]], "cuda")
    assert any(line.startswith(f"sm_80 {name}_kernel: {PLANTED[name]}: ") for line in lines), lines


def test_occupancy():
    def kernel(**changes):
        plain = {"name": "k", "architecture": "sm_80", "registers": 32, "stack": 0, "shared": 0, "threads": 256}
        return machine_code.Kernel(**plain | changes, whole=machine_code.Code())

    # By hand, from the tables of the CUDA programming guide.
    assert kernel().occupancy() == 1.0  # 8 blocks of 256, 65536 registers
    assert kernel(registers=33).occupancy() == 0.75  # 40 per thread: 51 warps, 48 in blocks of eight
    assert kernel(registers=128).occupancy() == 0.25
    assert kernel(registers=255).occupancy() == 0.125
    assert kernel(threads=32).occupancy() == 0.5  # 32 blocks
    assert kernel(threads=1024, registers=64).occupancy() == 0.5
    assert kernel(shared=48 << 10).occupancy() == 0.375  # three blocks in 164 KB
    assert kernel(shared=48 << 10, architecture="sm_90a").occupancy() == 0.5  # four in 228
    assert kernel(shared=40 << 10).occupancy(dynamic_shared=8 << 10) == 0.375


# ---- the page ---------------------------------------------------------------------------------------------------


def test_what_is_predicted_of_batch_norms_in_channels_last_was_measured():
    rows = [r for r in predicted.rows() if r.operator == "bn_act" and r.layout == "channels_last"]
    assert len(rows) >= 8
    for row in rows:
        assert row.median_ms == pytest.approx(1e3 * predicted.seconds(row), rel=0.25), row.shape


def test_the_report_is_of_these_sources():
    assert report.stamp() in report.PAGE.read_text(), "docs/gpu-report.md is of other sources: run `make gpu-report`"
