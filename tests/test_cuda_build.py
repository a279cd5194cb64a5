"""The CUDA kernels where there is no GPU: compiled for each architecture, and the machine code judged by what it holds.

With a GPU the battery over CASES["bn_act"] runs on it too.
"""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cnnkern
from cnnkern import testing

ROOT = Path(__file__).parent.parent
CASE = testing.CASES["bn_act"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Hot(NamedTuple):
    """A kernel of the hot path: the 16-byte accesses in a round of the loop that does the work, and those of a mask."""

    kernel: str
    loads: int
    stores: int
    mask: str = ""  # pattern of the instruction, which comes four times a round


def hot_kernels(scalar: str, vector: int) -> dict[str, Hot]:
    """By what they do: `sweep layout direction`."""
    relu = f"ThroughActivation<{scalar}, Relu>"
    # Of eight bits a vector's thread owns the byte; four it adds to a word that others write too.
    write = r"STG\.E\.U8" if vector == 8 else r"REDG?\.E\.OR"
    kernels = {}
    for layout, last in (("planes", "false"), ("rows", str(vector))):
        for sweep in ("reduce", "map"):
            stores = 4 if sweep == "map" else 0
            instance = f"{sweep}_{layout}_kernel<{{}}, {last}>"
            kernels |= {
                f"{sweep} {layout} bn_act backward": Hot(
                    instance.format(f"BatchNormBackward<{scalar}, {relu}, true>"), 8, stores
                ),
                f"{sweep} {layout} bn_add_act backward": Hot(
                    instance.format(f"BatchNormBackward<{scalar}, ThroughMask, true>"), 8, 2 * stores, r"LDG\.E\.U8"
                ),
            }
        kernels |= {
            f"reduce {layout} forward": Hot(f"reduce_{layout}_kernel<Statistics<{scalar}>, {last}>", 4, 0),
            f"map {layout} bn_act forward": Hot(f"map_{layout}_kernel<BnActForward<{scalar}, Relu>, {last}>", 4, 4),
            f"map {layout} bn_add_act forward": Hot(
                f"map_{layout}_kernel<BnAddActForward<{scalar}, Relu>, {last}>", 8, 4, write
            ),
        }
    return kernels


HOT_KERNELS = {
    f"{name} {dtype}": hot
    for dtype, scalar, vector in (("float32", "float", 4), ("bfloat16", "c10::BFloat16", 8))
    for name, hot in hot_kernels(scalar, vector).items()
}
# Without a loop: 16-byte accesses of the vectors that exist as a whole, in the last block and in all others.
STRAIGHT_KERNELS = {
    "add_relu forward float32": Hot("add_relu_fwd_kernel<float, 4>", 16, 8),
    "add_relu backward float32": Hot("add_relu_bwd_kernel<float, 4>", 8, 8),
    "add_relu forward bfloat16": Hot("add_relu_fwd_kernel<c10::BFloat16, 8>", 16, 8),
    "add_relu backward bfloat16": Hot("add_relu_bwd_kernel<c10::BFloat16, 8>", 8, 8),
}
# 16-byte accesses of the whole code: x, dy, the result; parameters, in either type that they may have; partial sums.
LAYER_NORM_KERNELS = {
    f"{name} {dtype}": Hot(f"ln_{kernel}_kernel<{scalar}, {vector}>", *accesses[which])
    for which, dtype, scalar, vector in ((0, "float32", "float", 4), (1, "bfloat16", "c10::BFloat16", 8))
    for name, kernel, *accesses in (
        ("layer_norm forward", "rows_fwd", (12, 4), (28, 4)),
        ("layer_norm backward", "rows_bwd", (10, 6), (7, 5)),
        ("layer_norm forward slices", "slices_fwd", (16, 4), (32, 4)),
        ("layer_norm forward join", "slices_join", (12, 4), (28, 4)),
        ("layer_norm backward slices", "slices_bwd", (6, 0), (10, 0)),
        ("layer_norm backward tiles", "tiles_bwd", (9, 4), (11, 6)),
        ("layer_norm2d forward", "planes_fwd", (18, 6), (18, 6)),
        ("layer_norm2d backward", "planes_bwd", (18, 4), (20, 4)),
    )
}
# Kernels whose loops hold less regular accesses too; they must not spill.
OTHER_KERNELS = (
    "own_planes_kernel<BnActForward<float, Relu>, false>",
    "own_planes_kernel<BnActForward<float, Relu>, true>",
    "own_planes_kernel<BnActForward<c10::BFloat16, OtherActivation>, true>",
    "own_planes_kernel<BnAddActForward<float, Relu>, false>",
    "own_planes_kernel<BnAddActForward<c10::BFloat16, Relu>, true>",
    "own_planes_kernel<BatchNormBackward<c10::BFloat16, ThroughActivation<c10::BFloat16, Relu>, true>, true>",
    "own_planes_kernel<BatchNormBackward<float, ThroughActivation<float, OtherActivation>, true>, false>",
    "own_planes_kernel<BatchNormBackward<c10::BFloat16, ThroughMask, true>, true>",
    "reduce_planes_kernel<BatchNormBackward<c10::BFloat16, ThroughActivation<c10::BFloat16, Relu>, false>, true>",
    "reduce_rows_kernel<BatchNormBackward<double, ThroughActivation<double, Relu>, false>, 2>",
    "reduce_rows_kernel<BatchNormBackward<c10::Half, ThroughMask, false>, 8>",
    "reduce_rows_kernel<BatchNormBackward<c10::Half, ThroughActivation<c10::Half, OtherActivation>, false>, 8>",
    "finish_kernel<Statistics<float>>",
    "add_relu_fwd_kernel<float, 1>",
    "add_relu_bwd_kernel<double, 2>",
    "ln_rows_fwd_kernel<double, 2>",
    "ln_rows_fwd_kernel<float, 1>",
    "ln_rows_bwd_kernel<double, 1>",
    "ln_rows_bwd_kernel<c10::Half, 1>",
    "ln_slices_fwd_kernel<double, 1>",
    "ln_slices_join_kernel<c10::Half, 1>",
    "ln_slices_bwd_kernel<float, 1>",
    "ln_slices_means_kernel<double>",
    "ln_tiles_bwd_kernel<double, 2>",
    "ln_finish_kernel<float>",
    "ln_planes_fwd_kernel<double, 2>",
    "ln_planes_fwd_kernel<double, 1>",
    "ln_planes_fwd_kernel<c10::BFloat16, 4>",
    "ln_planes_bwd_kernel<double, 2>",
    "ln_planes_bwd_kernel<c10::BFloat16, 4>",
    "ln_planes_bwd_kernel<c10::Half, 1>",
)
PARAMETERS = {
    "reduce_planes": "{}, PlaneCut, double*",
    "map_planes": "{}, PlaneCut",
    "own_planes": "{}, PlaneCut, bool",
    "reduce_rows": "{}, RowCut, double*",
    "map_rows": "{}, RowCut",
    "finish": "{}, int64_t, const double*",
    "add_relu_fwd": "const {0}*, const {0}*, {0}*, unsigned*, int64_t",
    "add_relu_bwd": "const {0}*, BitReader, {0}*, int64_t",
    "ln_rows_fwd": "LayerNormForward<{}>, RowGroups",
    "ln_rows_bwd": "LayerNormBackward<{0}>, LayerNormParameterGradients<{0}>, RowGroups, compute_t<{0}>*",
    "ln_slices_fwd": "LayerNormForward<{}>, RowSlices, Moments*",
    "ln_slices_join": "LayerNormForward<{}>, RowSlices, const Moments*",
    "ln_slices_bwd": "LayerNormBackward<{}>, RowSlices, double*",
    "ln_slices_means": "const {0}*, const double*, Means<{0}>*, RowSlices",
    "ln_tiles_bwd": "LayerNormBackward<{0}>, RowTiles, const Means<compute_t<{0}>>*, compute_t<{0}>*",
    "ln_finish": "LayerNormParameterGradients<{0}>, const compute_t<{0}>*, int64_t, int64_t, int",
    "ln_planes_fwd": "LayerNormForward<{}>, PixelCut",
    "ln_planes_bwd": "LayerNormBackward<{0}>, PixelCut, compute_t<{0}>*",
}


def toolkit(program: str) -> Path | None:
    """A program of the CUDA toolkit: from CUDA_HOME, PyPI's wheels, Triton's wheel, or the path."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    places.append(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin")
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = next((place / program for place in places if (place / program).exists()), None) or shutil.which(program)
    return Path(found) if found else None


def instantiation(kernel: str) -> str:
    """The explicit instantiation of a kernel, given as `name_kernel<first argument, ...>`."""
    name, _, arguments = kernel.removesuffix(">").partition("_kernel<")
    first = re.match(r"(?:[^<>,]|<(?:[^<>]|<[^<>]*>)*>)+", arguments).group()
    return f"template __global__ void {kernel}({PARAMETERS[name].format(first)});"


@dataclass
class Kernel:
    spills: int
    registers: int
    code: list[tuple[int, str]] = field(default_factory=list)  # address, instruction

    def loops(self) -> list[list[str]]:
        """The instructions of each innermost loop that reads or writes global memory."""
        spans = []
        for address, text in self.code:
            branch = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", text)
            if branch and int(branch.group(1), 16) < address:
                spans.append((int(branch.group(1), 16), address))
        innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        # ptxas for sm_80 leaves some loops by a CALL of what follows them, which is a jump.
        bodies = [
            [text for at, text in self.code if begin <= at <= end and not re.search(rf"CALL\S* {end + 16:#x}\b", text)]
            for begin, end in innermost
        ]
        return [body for body in bodies if any(re.search(r"\b(LDG|STG)\b", text) for text in body)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory) -> dict[str, Kernel]:
    """csrc/cuda/*.cuh compiled for one architecture: kernels by the instantiation that asked for them."""
    nvcc, cuobjdump = toolkit("nvcc"), toolkit("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip(
            f"needs nvcc and cuobjdump, which `pip install -r requirements.txt` brings; found {nvcc}, {cuobjdump}"
        )
    folder = tmp_path_factory.mktemp(request.param)
    judged = (HOT_KERNELS | STRAIGHT_KERNELS | LAYER_NORM_KERNELS).values()
    wanted = list(dict.fromkeys(hot.kernel for hot in judged)) + list(OTHER_KERNELS)
    lines = [instantiation(kernel) for kernel in wanted]
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    body = "\n".join(lines)
    headers = "".join(f'#include "cuda/{name}.cuh"\n' for name in ("bn_act", "bn_add_act", "add_relu", "layer_norm2d"))
    source.write_text(f"{headers}namespace cnnkern::gpu {{\n{body}\n}}\n")
    home = nvcc.parent.parent
    includes = [ROOT / "csrc", Path(torch.__file__).parent / "include", home / "include", home / "include" / "cccl"]
    compiled = subprocess.run(
        [
            nvcc,
            "-cubin",
            f"-arch={request.param}",
            "-std=c++20",
            "-O3",
            "--fmad=false",
            "-Xptxas",
            "-v",
            "-Werror",
            "all-warnings",
        ]
        + [f"-I{path}" for path in includes]
        + ["-o", cubin, source],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    found = {}
    report = r"entry function '(\S+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    for match in re.finditer(report + r".*?Used (\d+) registers", compiled.stderr, re.DOTALL):
        symbol, stores, loads, registers = match.groups()
        found[symbol] = Kernel(int(stores) + int(loads), int(registers))
    listing = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for symbol, text in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.DOTALL):
        found[symbol].code = [
            (int(address, 16), instruction)
            for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]*);", text)
        ]
    demangled = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    by_name = dict(zip(demangled.splitlines(), found.values(), strict=True))

    def of(kernel: str) -> Kernel:
        spelled = [
            n
            for n in by_name
            if n.replace("cnnkern::gpu::", "")
            .replace("cnnkern::", "")
            .replace("> >", ">>")
            .startswith(f"void {kernel}(")
        ]
        assert len(spelled) == 1, f"{kernel}: {spelled} of {list(by_name)}"
        return by_name[spelled[0]]

    return {kernel: of(kernel) for kernel in wanted}


def test_no_spills_and_enough_threads_a_multiprocessor(kernels):
    for name, kernel in kernels.items():
        assert kernel.spills == 0, name
        assert name in OTHER_KERNELS or not any(re.search(r"\b(LDL|STL)\b", text) for _, text in kernel.code), name
        # With 65536 registers: two blocks of 256 threads, or one of 512.
        assert kernel.registers <= 128, f"{name}: {kernel.registers} registers"


@pytest.mark.parametrize("name", HOT_KERNELS)
def test_hot_loops_access_16_bytes_and_do_not_divide(kernels, name):
    hot = HOT_KERNELS[name]
    loops = kernels[hot.kernel].loops()
    assert loops
    rounds = []
    for body in loops:
        accesses = [text for text in body if re.search(r"\b(LDG|STG|ATOMG?|REDG?)\b", text)]
        masks = [text for text in accesses if hot.mask and re.search(hot.mask, text)]
        wide = [text for text in accesses if text not in masks]
        assert all(".128" in text for text in wide), accesses
        # A division is a reciprocal's first guess and a few corrections, or a call.
        assert not [text for text in body if re.search(r"\b(CALL|MUFU)\b", text)]
        rounds.append((*(sum(access in text for text in wide) for access in ("LDG", "STG")), len(masks)))
    assert (hot.loads, hot.stores, 4 if hot.mask else 0) in rounds, rounds


@pytest.mark.parametrize("name", STRAIGHT_KERNELS)
def test_kernels_without_a_loop_access_16_bytes_and_do_not_divide(kernels, name):
    hot = STRAIGHT_KERNELS[name]
    code = [text for _, text in kernels[hot.kernel].code]
    assert not [text for text in code if re.search(r"\b(CALL|MUFU)\b", text)]
    wide = tuple(sum(access in text and ".128" in text for text in code) for access in ("LDG", "STG"))
    assert wide == (hot.loads, hot.stores)


@pytest.mark.parametrize("name", LAYER_NORM_KERNELS)
def test_layer_norms_access_16_bytes_and_do_not_divide(kernels, name):
    hot = LAYER_NORM_KERNELS[name]
    kernel = kernels[hot.kernel]
    wide = [text for _, text in kernel.code if re.search(r"\b(LDG|STG)\S*\.128", text)]
    assert tuple(sum(access in text for text in wide) for access in ("LDG", "STG")) == (hot.loads, hot.stores)
    for body in kernel.loops():
        if any(re.search(r"\bSTG\S*\.128", text) for text in body):
            assert not [text for text in body if re.search(r"\b(CALL|MUFU)\b", text)]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_half_vectors_are_8_bytes(kernels, direction):
    code = [text for _, text in kernels[f"ln_planes_{direction}_kernel<c10::BFloat16, 4>"].code]
    wide = sum(bool(re.search(r"\bLDG\S*\.64", text)) for text in code)
    assert wide >= 24  # what a thread holds of one tensor or two, and the same again from L2
    assert sum(bool(re.search(r"\bSTG\S*\.64", text)) for text in code) == (8 if direction == "fwd" else 6)


def test_every_kernel_that_ships_fits_the_registers_of_a_multiprocessor():
    """All instantiations in the built extension, of all its architectures."""
    if not cnnkern._C.build_info()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    cuobjdump = toolkit("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, which `pip install -r requirements.txt` brings with Triton")
    command = [cuobjdump, "-res-usage", cnnkern._C.__file__]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert found
    for name, registers, stack, shared, local in found:
        assert int(registers) <= 128, f"{name}: {registers} registers"
        assert int(stack) == int(local) == 0, f"{name}: {stack} bytes of stack, {local} of local memory"
        assert int(shared) <= 48 << 10, f"{name}: {shared} bytes of shared memory"


def test_kernels_are_registered():
    if not cnnkern._C.build_info()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    operators = [name for name, case in testing.CASES.items() if "cuda" in case.devices]
    assert operators
    for name in itertools.chain(operators, (f"{name}_backward" for name in operators)):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnkern::{name}", "CUDA")


def on_gpu(shape, dtype, generator, layout="contiguous", **variant) -> tuple[dict, torch.Tensor]:
    inputs = CASE.inputs(shape, dtype, generator=generator, **variant)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    inputs["input"] = testing.with_layout(inputs["input"], layout)
    return inputs, testing.randn(shape, generator, dtype).cuda()


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("variant", CASE.variants)
def test_battery_on_a_gpu(variant, dtype, generator):
    larger = ((4, 3, 100, 100), (2, 100, 20, 20), (4, 128, 28, 28))  # slices, strips and blocks that own a channel
    for shape, layout in itertools.product(CASE.shapes + larger, ("contiguous", "channels_last", "sliced")):
        inputs, dy = on_gpu(shape, dtype, generator, layout, **CASE.variants[variant])
        testing.check(CASE, inputs, dy)
        testing.check(CASE, inputs, testing.with_layout(dy, "channels_last"))
        once, again = (testing.run(CASE.function, CASE, inputs, dy) for _ in range(2))
        for name, value in once.items():
            assert torch.equal(value, again[name]), f"{name} differs in a second run"


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# Not in float64, where eager counts as the truth and loses more digits to a large mean than these kernels do.
@pytest.mark.parametrize(
    "dtype", [d for d in DTYPES if d != torch.float64], ids=lambda d: str(d).removeprefix("torch.")
)
def test_numbers_that_are_hard_on_a_gpu(dtype, layout, generator):
    for shape, change in itertools.product(
        ((4, 6, 9, 9), (4, 8, 64, 64)),
        (
            lambda x: 1e4 + 1e-2 * x,
            lambda x: 1e6 + x if dtype != torch.float16 else x,
            lambda x: x * (1e30 if dtype != torch.float16 else 1e4),
            lambda x: x * 1e-20,
            lambda x: torch.where(torch.arange(x.shape[1]).view(-1, 1, 1) == 1, 3.0, x),
            lambda x: x.index_fill(0, torch.tensor([0]), float("nan")),
            lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
        ),
    ):
        inputs, dy = on_gpu(shape, dtype, generator)
        x = change(inputs["input"].cpu().double())
        # The special values stay in one channel.
        x = torch.where((torch.arange(shape[1]).view(-1, 1, 1) == 0) | x.isfinite(), x, 1.0)
        inputs["input"] = testing.with_layout(x.to(dtype).cuda(), layout)
        testing.check(CASE, inputs, dy)


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_mask_of_backward_is_that_of_the_output_on_a_gpu(dtype, layout, generator):
    for scale in (1.0, 1e-5, 1e-7, 3e-8, 1e-38, 1e-40):  # down to where positive values round to zero
        x = testing.with_layout(testing.randn((2, 5, 32, 33), generator, dtype).cuda(), layout)
        weight = torch.full(
            (5,), scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cuda"
        )
        y, mean, rstd = torch.ops.cnnkern.bn_act(x, weight, None, None, None, True, 0.1, 1e-5, "relu")
        count = torch.ops.cnnkern.bn_act_backward(
            torch.ones_like(x), x, weight, torch.zeros_like(weight), mean, rstd, True, "relu", [True] * 3
        )[2]
        assert torch.equal(count.double(), (y > 0).sum((0, 2, 3)).double())
