"""The machine code of the Triton kernels, compiled ahead of time as their launchers would for a few shapes.

`python -m gpu_gate.triton_code 90 fp32` compiles for compute capability 9.0 and prints what the code holds; gfx942 is
AMD's MI300, and gfx90a its MI200. Triton reads its environment when it is imported, so kernels() does its work in a
process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_gate.cache import ROOT, fingerprint, kept
from gpu_gate.machine_code import Kernel, read_amd, read_cubin, version

ARCHITECTURES = {"sm_80": "80", "sm_90": "90", "sm_100": "100", "gfx942": "gfx942", "gfx90a": "gfx90a"}
DTYPES = ("fp32", "bf16", "fp16")
# What `make prove` compiles; `make gpu-report` compiles every type for every architecture.
SAMPLES = {"sm_80": ("fp32",), "sm_90": ("bf16",), "sm_100": ("fp16",), "gfx942": ("fp32",)}
IN_128_BITS = {"fp32": 4, "bf16": 8, "fp16": 8}


class Launch(NamedTuple):
    """A kernel as its launcher compiles it for a shape, and how often a tile of it reads and writes a tensor."""

    function: object
    constants: dict
    tile: int = 0  # elements
    reads: int = 0
    writes: int = 0
    warps: int = 4

    @property
    def jit(self):
        from cnnkern.triton_kernels.tuning import Tunable

        return self.function.kernel if isinstance(self.function, Tunable) else self.function


def of_batch_norms(rows: bool) -> dict[str, Launch]:
    """For ResNet-50's (32, 64, 56, 56)."""
    from cnnkern.triton_kernels import batch_norm, batch_norm_backward, bn_act, bn_add_act, bn_prelu, layout

    x = torch.empty((32, 64, 56, 56), device="meta")
    cut = layout.Cut.of(x.to(memory_format=torch.channels_last) if rows else x)
    relu, tile = cut.constants | {"ACT": "relu", "PARAM": 0.0}, cut.R * cut.B
    masked = cut.constants | {"ACT": "none", "PARAM": 0.0, "residual": None, "slopes": None}
    unmasked = {"bits": None, "residual": None, "dresidual": None, "slopes": None}
    prelu = cut.constants | {"ACT": "prelu", "PARAM": 0.0, "bits": None}
    return {
        "moments": Launch(batch_norm.moments_kernel, cut.constants, tile, 2),  # the first tile stands before the loop
        "bn_act": Launch(bn_act.bn_act_apply_kernel, relu, tile, 1, 1),
        "bn_act backward sums": Launch(
            batch_norm_backward.backward_sums_kernel, relu | unmasked | {"dx": None}, tile, 2
        ),
        "bn_act backward": Launch(batch_norm_backward.backward_apply_kernel, relu | unmasked, tile, 2, 1),
        "bn_add_act": Launch(bn_add_act.bn_add_act_apply_kernel, relu, tile, 2, 1),
        "bn_add_act backward sums": Launch(batch_norm_backward.backward_sums_kernel, masked | {"dx": None}, tile, 2, 1),
        "bn_add_act backward": Launch(
            batch_norm_backward.backward_apply_kernel, masked | {"dresidual": None}, tile, 2, 1
        ),
        "bn_prelu": Launch(bn_prelu.bn_prelu_apply_kernel, cut.constants, tile, 2, 1),
        "bn_prelu backward sums": Launch(batch_norm_backward.backward_sums_kernel, prelu | {"dx": None}, tile, 3, 1),
        "bn_prelu backward": Launch(batch_norm_backward.backward_apply_kernel, prelu | {"dresidual": None}, tile, 3, 1),
    }


def of_layer_norms(rows: bool) -> dict[str, Launch]:
    """For ConvNeXt-Tiny's (16, 96, 56, 56), a line of which fits into a tile, and for rows of 16384."""
    from cnnkern.triton_kernels import lines

    found = {}
    wide = lines.Lines.of(1, 16384, 4096, True)
    whole = lines.Lines.of(1, 96, 16 * 56 * 56, True) if rows else lines.Lines.of(16, 96, 56 * 56, False)
    for name, cut in (("", whole), *([(" wide", wide)] if rows else [])):
        constants, tile = dict(cut.constants), cut.P * cut.B
        warps = constants.pop("num_warps")
        sweeps = 1 if cut.whole else 3
        in_tile = {"sums": None} if cut.whole else {}
        forward = constants | {"WHOLE": cut.whole}
        found[f"layer norm{name}"] = Launch(lines.normalize_kernel, forward, tile, sweeps, 1, warps)
        found[f"layer norm{name} backward"] = Launch(lines.gradient_kernel, constants | in_tile, tile, 2, 1, warps)
        if not cut.whole:
            found[f"layer norm{name} sums"] = Launch(lines.gradient_sums_kernel, constants, tile, 2, 0, warps)
    return found


def of_convolutions(rows: bool) -> dict[str, Launch]:
    """Depthwise 3x3 of 96 channels, and groups of 8 of 128, at 56x56."""
    from cnnkern.triton_kernels import grouped_conv2d

    found = {}
    for name, C, width, stride in (("depthwise", 96, 1, 1), ("depthwise stride 2", 96, 1, 2), ("width 8", 128, 8, 1)):
        x, weight = torch.empty((16, C, 56, 56), device="meta"), torch.empty((C, width, 3, 3), device="meta")
        g = grouped_conv2d.Geometry.of(x, weight, (stride, stride), (1, 1), (1, 1))
        constants = g.taps | g.tile(g.OH * g.OW, rows) | {"C": C}
        forward = grouped_conv2d.convolution_kernel
        found[name] = Launch(forward, constants | {"TRANSPOSED": False})
        found[f"{name} dx"] = Launch(forward, constants | {"TRANSPOSED": True, "bias": None})
        if stride == 1:
            found[f"{name} dweight"] = Launch(grouped_conv2d.weight_gradient_kernel, constants)
    return found


def of_poolings(rows: bool) -> dict[str, Launch]:
    """For ResNet-50's stem."""
    from cnnkern.triton_kernels import max_pool2d

    constants = {"SH": 2, "SW": 2, "PH": 1, "PW": 1, "KH": 3, "KW": 3, "TILE": max_pool2d.TILE, "C": 64 if rows else 1}
    return {
        "max_pool": Launch(max_pool2d.max_pool2d_kernel, constants),
        "max_pool backward": Launch(max_pool2d.max_pool2d_backward_kernel, constants),
    }


def launches(dtype: str) -> dict[str, Launch]:
    """By what they do."""
    import triton.language
    from cnnkern.triton_kernels import add_relu, batch_norm, batch_norm_backward, bits, layout, reduce

    found = {}
    for rows, layout_name in ((False, "planes"), (True, "rows")):
        for family in (of_batch_norms, of_layer_norms, of_convolutions, of_poolings):
            found |= {f"{name} {layout_name}": launch for name, launch in family(rows).items()}
    stretch = {"BYTES": layout.TILE // 8}
    found |= {
        "add_relu": Launch(add_relu.add_relu_kernel, stretch, layout.TILE, 2, 1),
        "add_relu backward": Launch(add_relu.add_relu_backward_kernel, stretch, layout.TILE, 1, 1),
        "mask of y": Launch(bits.positive_kernel, stretch, layout.TILE, 1, 0),
    }
    if dtype == "fp32":  # these compute in fp64 whatever the dtype
        found |= {
            "moments finalise": Launch(batch_norm.moments_finalise_kernel, layout.COMBINE),
            "running statistics": Launch(batch_norm.running_statistics_kernel, {"BLOCK": 128}),
            "backward finalise": Launch(
                batch_norm_backward.backward_finalise_kernel, layout.COMBINE | {"S": triton.language.float32}
            ),
            "sum of chunks": Launch(reduce.sum_chunks_kernel, layout.COMBINE),
        }
    return found


TENSORS = (
    "x",
    "y",
    "dy",
    "dx",
    "residual",
    "dresidual",
    "weight",
    "bias",
    "slopes",
    "running_mean",
    "running_var",
    "out",
)


def compile_kernel(launch: Launch, name: str, dtype: str, architecture: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.jit.arg_names
    statistics = "*fp32" if "layer norm" in name else "*fp64"
    finalises = "finalise" in name
    types = dict.fromkeys(TENSORS, f"*{dtype}")
    types |= {"mean": statistics, "rstd": statistics, "partial": "*fp64", "table": "*fp32", "sums": "*fp32"}
    types |= dict.fromkeys(("dweight", "dbias"), f"*{dtype}" if finalises else "*fp64") | {"dslopes": "*fp64"}
    types |= dict.fromkeys(("bits", "mask", "positions"), "*u8") | {"momentum": "fp64", "eps": "fp64"}
    signature = {n: "constexpr" if n in launch.constants else types.get(n, "i32") for n in names}
    constexprs = {(names.index(n),): value for n, value in launch.constants.items()}
    # What the launcher's arguments are divisible by: memory, and sizes that are specialised.
    plain = set(range(len(names))) - {p.num for p in launch.jit.params if p.do_not_specialize}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n] == "i32" and i in plain and n == "numel")
    }
    target = ARCHITECTURES[architecture]
    return triton.compile(
        ASTSource(launch.jit, signature=signature, constexprs=constexprs, attrs=aligned),
        target=GPUTarget("cuda", int(target), 32) if target.isdigit() else GPUTarget("hip", target, 64),
        options={"num_warps": launch.warps},
    )


def read(compiled, name: str, architecture: str, launch: Launch) -> Kernel:
    if "cubin" not in compiled.asm:
        text, shared = compiled.asm["amdgcn"], compiled.metadata.shared
        return read_amd(name, text, architecture, threads=64 * launch.warps, shared=shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = read_cubin(Path(file.name), architecture)
    kernel.name = name
    kernel.shared = max(kernel.shared, compiled.metadata.shared)  # which the launch asks for
    return kernel


def compile_all(architecture: str, dtype: str) -> list[Kernel]:
    found = []
    for label, launch in launches(dtype).items():
        name = f"{label} {dtype}"
        kernel = read(compile_kernel(launch, label, dtype, architecture), name, architecture, launch)
        # The widths of AMD's accesses are printed, and not judged: nobody has read that code yet.
        if not architecture.startswith("gfx"):
            accesses = launch.tile // (32 * launch.warps) // IN_128_BITS[dtype]
            kernel.tile = (launch.reads * accesses, launch.writes * accesses)
        found.append(kernel)
    return found


def kernels(architecture: str, everything: bool = False) -> list[Kernel]:
    """The kernels compiled for one of ARCHITECTURES, for the types of SAMPLES or for `everything`."""
    import triton

    sources = [*sorted((ROOT / "triton_kernels").glob("*.py")), Path(__file__)]
    found = []
    for dtype in DTYPES if everything else SAMPLES[architecture]:

        def compile_in_a_process(dtype: str = dtype) -> list[Kernel]:
            paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
            with tempfile.TemporaryDirectory() as cache:
                environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": paths}
                done = subprocess.run(
                    [sys.executable, "-m", "gpu_gate.triton_code", architecture, dtype],
                    env=os.environ | environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
            if done.returncode:
                raise RuntimeError(done.stderr)
            return [Kernel.from_json(kernel) for kernel in json.loads(done.stdout)]

        versions = [triton.__version__, version("cuobjdump")]
        of = fingerprint([*(path.read_bytes() for path in sources), architecture, dtype, *versions])
        found += kept(f"triton/{architecture}.{dtype}", of, compile_in_a_process)
    return found


def main(target: str, *dtypes: str) -> None:
    architecture = next((name for name, short in ARCHITECTURES.items() if target in (name, short)), None)
    if architecture is None or not set(dtypes) <= set(DTYPES):
        raise SystemExit(
            f"usage: python -m gpu_gate.triton_code {'|'.join(ARCHITECTURES.values())} {'|'.join(DTYPES)} ..."
        )
    found = [kernel.to_json() for dtype in dtypes for kernel in compile_all(architecture, dtype)]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
