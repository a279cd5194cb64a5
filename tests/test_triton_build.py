"""What the compiler makes of the Triton kernels: compiled ahead of time, without a GPU, and judged by what it holds.

Run as a script, `python tests/test_triton_build.py 90 fp32`, this file compiles the kernels for a compute capability,
or for AMD's gfx942, and prints what the machine code contains.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
import triton.language as tl  # noqa: E402

ARCHITECTURES = {"80": ("fp32",), "90": ("bf16",), "100": ("fp16",), "gfx942": ("fp32",)}
MOST_REGISTERS = 65536 // 512  # so that four blocks of four warps, or one of sixteen, share a multiprocessor
IN_128_BITS = {"fp32": 4, "bf16": 8, "fp16": 8}

# The one kernel that spills: ptxas keeps a few values of rows beyond 8192 elements on the stack for sm_100.
STACK = {("100", "layer norm wide rows fp16"): 64}


class Kernel(NamedTuple):
    """A kernel as its launcher compiles it for a shape, and how often a tile of it reads and writes a tensor."""

    function: object
    constants: dict
    tile: int = 0  # elements
    reads: int = 0
    writes: int = 0
    warps: int = 4


def of_batch_norms(rows: bool) -> dict[str, Kernel]:
    """For ResNet-50's (32, 64, 56, 56)."""
    from cnnkern.triton_kernels import batch_norm, batch_norm_backward, bn_act, bn_add_act, layout

    x = torch.empty((32, 64, 56, 56), device="meta")
    cut = layout.Cut.of(x.to(memory_format=torch.channels_last) if rows else x)
    relu, tile = cut.constants | {"ACT": "relu"}, cut.R * cut.B
    masked = cut.constants | {"ACT": "none"}
    unmasked = {"bits": None, "dresidual": None}
    return {
        "moments": Kernel(batch_norm.moments_kernel, cut.constants, tile, 2),  # the first tile stands before the loop
        "bn_act": Kernel(bn_act.bn_act_apply_kernel, relu, tile, 1, 1),
        "bn_act backward sums": Kernel(
            batch_norm_backward.backward_sums_kernel, relu | unmasked | {"dx": None}, tile, 2
        ),
        "bn_act backward": Kernel(batch_norm_backward.backward_apply_kernel, relu | {"bits": None}, tile, 2, 1),
        "bn_add_act": Kernel(bn_add_act.bn_add_act_apply_kernel, relu, tile, 2, 1),
        "bn_add_act backward sums": Kernel(batch_norm_backward.backward_sums_kernel, masked | {"dx": None}, tile, 2, 1),
        "bn_add_act backward": Kernel(batch_norm_backward.backward_apply_kernel, masked, tile, 2, 1),
    }


def of_layer_norms(rows: bool) -> dict[str, Kernel]:
    """For ConvNeXt-Tiny's (16, 96, 56, 56), a line of which fits into a tile, and for rows of 16384."""
    from cnnkern.triton_kernels import lines

    kernels = {}
    wide = lines.Lines.of(1, 16384, 4096, True)
    whole = lines.Lines.of(1, 96, 16 * 56 * 56, True) if rows else lines.Lines.of(16, 96, 56 * 56, False)
    for name, cut in (("", whole), *([(" wide", wide)] if rows else [])):
        constants, tile = dict(cut.constants), cut.P * cut.B
        warps = constants.pop("num_warps")
        sweeps = 1 if cut.whole else 3
        in_tile = {"sums": None} if cut.whole else {}
        forward = constants | {"WHOLE": cut.whole}
        kernels[f"layer norm{name}"] = Kernel(lines.normalize_kernel, forward, tile, sweeps, 1, warps)
        kernels[f"layer norm{name} backward"] = Kernel(lines.gradient_kernel, constants | in_tile, tile, 2, 1, warps)
        if not cut.whole:
            kernels[f"layer norm{name} sums"] = Kernel(lines.gradient_sums_kernel, constants, tile, 2, 0, warps)
    return kernels


def of_convolutions(rows: bool) -> dict[str, Kernel]:
    """Depthwise 3x3 of 96 channels, and groups of 8 of 128, at 56x56."""
    from cnnkern.triton_kernels import grouped_conv2d

    kernels = {}
    for name, C, width, stride in (("depthwise", 96, 1, 1), ("depthwise stride 2", 96, 1, 2), ("width 8", 128, 8, 1)):
        x, weight = torch.empty((16, C, 56, 56), device="meta"), torch.empty((C, width, 3, 3), device="meta")
        g = grouped_conv2d.Geometry.of(x, weight, (stride, stride), (1, 1), (1, 1))
        constants = g.taps | g.tile(g.OH * g.OW, rows) | {"C": C}
        forward = grouped_conv2d.convolution_kernel
        kernels[name] = Kernel(forward, constants | {"TRANSPOSED": False})
        kernels[f"{name} dx"] = Kernel(forward, constants | {"TRANSPOSED": True, "bias": None})
        if stride == 1:
            kernels[f"{name} dweight"] = Kernel(grouped_conv2d.weight_gradient_kernel, constants)
    return kernels


def kernels_of(dtype: str) -> dict[str, Kernel]:
    from cnnkern.triton_kernels import add_relu, batch_norm, batch_norm_backward, bits, layout, reduce

    kernels = {}
    for rows, layout_name in ((False, "planes"), (True, "rows")):
        for family in (of_batch_norms, of_layer_norms, of_convolutions):
            kernels |= {f"{name} {layout_name}": kernel for name, kernel in family(rows).items()}
    stretch = {"BYTES": layout.TILE // 8}
    kernels |= {
        "add_relu": Kernel(add_relu.add_relu_kernel, stretch, layout.TILE, 2, 1),
        "add_relu backward": Kernel(add_relu.add_relu_backward_kernel, stretch, layout.TILE, 1, 1),
        "mask of y": Kernel(bits.positive_kernel, stretch, layout.TILE, 1, 0),
    }
    if dtype == "fp32":  # these compute in fp64 whatever the dtype
        kernels |= {
            "moments finalise": Kernel(batch_norm.moments_finalise_kernel, layout.COMBINE),
            "running statistics": Kernel(batch_norm.running_statistics_kernel, {"BLOCK": 128}),
            "backward finalise": Kernel(
                batch_norm_backward.backward_finalise_kernel, layout.COMBINE | {"S": tl.float32}
            ),
            "sum of chunks": Kernel(reduce.sum_chunks_kernel, layout.COMBINE),
        }
    return kernels


TENSORS = ("x", "y", "dy", "dx", "residual", "dresidual", "weight", "bias", "running_mean", "running_var", "out")


def compile_kernel(kernel: Kernel, name: str, dtype: str, architecture: str):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.function.arg_names
    statistics = "*fp32" if "layer norm" in name else "*fp64"
    finalises = "finalise" in name
    types = dict.fromkeys(TENSORS, f"*{dtype}")
    types |= {"mean": statistics, "rstd": statistics, "partial": "*fp64", "table": "*fp32", "sums": "*fp32"}
    types |= dict.fromkeys(("dweight", "dbias"), f"*{dtype}" if finalises else "*fp64")
    types |= dict.fromkeys(("bits", "mask"), "*u8") | {"momentum": "fp64", "eps": "fp64"}
    signature = {n: "constexpr" if n in kernel.constants else types.get(n, "i32") for n in names}
    constexprs = {(names.index(n),): value for n, value in kernel.constants.items()}
    # What the launcher's arguments are divisible by: memory, and sizes that are specialised.
    plain = set(range(len(names))) - {p.num for p in kernel.function.params if p.do_not_specialize}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n] == "i32" and i in plain and n == "numel")
    }
    return triton.compile(
        ASTSource(kernel.function, signature=signature, constexprs=constexprs, attrs=aligned),
        target=GPUTarget("cuda", int(architecture), 32)
        if architecture.isdigit()
        else GPUTarget("hip", architecture, 64),
        options={"num_warps": kernel.warps},
    )


def describe_amd(compiled) -> dict[str, object]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": re.findall(r"\b((?:global|buffer|flat)_load_\w+)", text),
        "stores": re.findall(r"\b((?:global|buffer|flat)_store_\w+)", text),
    }


def describe(compiled) -> dict[str, object]:
    if "cubin" not in compiled.asm:
        return describe_amd(compiled)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def run(option: str) -> str:
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout

    usage, code = run("-res-usage"), run("-sass")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": re.findall(r"\b(LDG\.[\w.]+)", code),
        "stores": re.findall(r"\b(STG\.[\w.]+)", code),
    }


def compile_all(architecture: str, dtypes: list[str]) -> dict[str, dict[str, object]]:
    report = {}
    for dtype in dtypes:
        for name, kernel in kernels_of(dtype).items():
            code = describe(compile_kernel(kernel, name, dtype, architecture))
            # The widths of AMD's accesses are printed, and not judged: nobody has read that code yet.
            accesses = kernel.tile // (32 * kernel.warps) // IN_128_BITS[dtype] if architecture.isdigit() else 0
            expected = {"loads": kernel.reads * accesses, "stores": kernel.writes * accesses}
            report[f"{name} {dtype}"] = code | {"expected": expected}
    return report


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_code(tmp_path, architecture):
    """No spills, few enough registers, and 128-bit accesses to the tensors of the kernels that memory limits."""
    command = [sys.executable, __file__, architecture, *ARCHITECTURES[architecture]]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report
    for name, code in report.items():
        allowed = STACK.get((architecture, name), 0)  # bytes
        assert code["stack"] <= allowed, name
        assert code["spills"] == 0 or allowed, name
        assert code["registers"] <= MOST_REGISTERS, name
        wide = {kind: sum(".128" in access for access in code[kind]) for kind in ("loads", "stores")}
        assert all(wide[kind] >= expected for kind, expected in code["expected"].items()), f"{name}: {code}"


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1], sys.argv[2:]), indent=1))
