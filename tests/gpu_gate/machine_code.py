"""What compiled kernels hold, read from cubins: registers, memory, and what their loops do."""

import functools
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

# What a multiprocessor has, from the CUDA programming guide: bytes of shared memory, of which a block reserves 1024.
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
REGISTERS, THREADS, BLOCKS, WARP = 65536, 2048, 32, 32
RESERVED_SHARED = 1024


def toolkit(program: str) -> Path | None:
    """A program of the CUDA toolkit: from CUDA_HOME, PyPI's wheels, Triton's wheel, or the path."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    places.append(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin")
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = next((place / program for place in places if (place / program).exists()), None) or shutil.which(program)
    return Path(found) if found else None


def run(*command: object, cwd: Path | None = None, given: str | None = None) -> str:
    """What a command prints. Raises RuntimeError with what it said if it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))[:400]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


@dataclass
class Code:
    """The instructions of a stretch of code that matter, by number. Widths are in bits."""

    loads: dict[int, int] = field(default_factory=dict)  # of global memory
    stores: dict[int, int] = field(default_factory=dict)
    atomics: int = 0
    local: int = 0  # accesses to the thread's own memory: spills, and arrays that are not in registers
    divisions: int = 0  # reciprocals, square roots, and calls of the routines for what takes more than these
    functions: int = 0  # exponentials and their like
    fp64: int = 0

    def accesses(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values()) + self.atomics

    def narrow(self) -> int:
        """Loads and stores of fewer than 16 bytes."""
        return sum(n for widths in (self.loads, self.stores) for width, n in widths.items() if width < 128)

    def wide(self) -> tuple[int, int]:
        """Loads and stores of 16 bytes at least."""
        loads, stores = (sum(n for w, n in widths.items() if w >= 128) for widths in (self.loads, self.stores))
        return loads, stores


@dataclass
class Kernel:
    """A compiled kernel: `name` as C++ spells it, without namespaces and parameters."""

    name: str
    architecture: str
    registers: int
    stack: int  # bytes of a thread
    shared: int  # bytes of a block
    threads: int  # of a block, at most
    whole: Code
    # The innermost loops that touch global memory, in the order of the code.
    loops: list[Code] = field(default_factory=list)
    spills: int = 0  # of AMD's registers, as its compiler counts them
    tile: tuple[int, int] = (0, 0)  # 16-byte loads and stores of a tile, for Triton's kernels

    def occupancy(self, dynamic_shared: int = 0) -> float:
        """Threads that a multiprocessor runs at a time, of those that it could."""
        if self.architecture.startswith("gfx"):  # waves of a SIMD, with 512 registers per lane in steps of eight
            return min(8, 512 // (-(-max(self.registers, 1) // 8) * 8)) / 8
        warps = -(-self.threads // WARP)
        of_a_warp = -(-max(self.registers, 1) * WARP // 256) * 256
        by_registers = REGISTERS // of_a_warp // 4 * 4 // warps
        shared = -(-(self.shared + dynamic_shared) // 128) * 128 + RESERVED_SHARED
        by_shared = SHARED[self.architecture.rstrip("a")] // shared
        return min(BLOCKS, THREADS // WARP // warps, by_registers, by_shared) * warps * WARP / THREADS

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: dict) -> "Kernel":
        def code(c: dict) -> Code:
            return Code(**{n: {int(w): k for w, k in v.items()} if isinstance(v, dict) else v for n, v in c.items()})

        whole, loops = code(kept.pop("whole")), [code(c) for c in kept.pop("loops")]
        return cls(**kept | {"whole": whole, "loops": loops, "tile": tuple(kept["tile"])})


# ---- reading ----------------------------------------------------------------------------------------------------


def spelled(symbols: list[str]) -> list[str]:
    """Kernels' names without namespaces, return types and parameters: `map_rows_kernel<Statistics<float>, 4>`."""
    names = []
    for text in run("c++filt", given="\n".join(symbols)).splitlines():
        text = text.replace("> >", ">>").removeprefix("void ")
        depth = 0
        for end, c in enumerate(text):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                text = text[:end]
                break
        names.append(re.sub(r"\b(?:cnnkern|gpu)::", "", text))
    return names


def width(instruction: str) -> int:
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction)
    return int(found[1]) if found else 32


def read_code(instructions: list[str]) -> Code:
    code, loads, stores = Code(), Counter(), Counter()
    for text in instructions:
        opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split(" ", 1)[0]
        kind = opcode.split(".", 1)[0]
        if kind == "LDG":
            loads[width(opcode)] += 1
        elif kind == "STG":
            stores[width(opcode)] += 1
        elif kind in ("ATOM", "ATOMG", "RED", "REDG"):
            code.atomics += 1
        elif kind in ("LDL", "STL"):
            code.local += 1
        elif kind == "MUFU":
            if re.search(r"RCP|RSQ|SQRT", opcode):
                code.divisions += 1
            else:
                code.functions += 1
        elif kind == "CALL":
            code.divisions += 1
        elif kind in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") or (kind in ("F2F", "I2F", "F2I") and "F64" in opcode):
            code.fp64 += 1
    code.loads, code.stores = dict(sorted(loads.items())), dict(sorted(stores.items()))
    return code


def innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions, of code with addresses, of each loop without a loop in it."""
    # Behind its end a kernel keeps what it seldom does, and jumps back from there: no loop.
    ends = [address for address, text in code if re.match(r"(?:EXIT|RET)\b", text)]
    spans = set()
    for address, text in code:
        branch = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", text)
        begin = int(branch[1], 16) if branch else address
        if begin < address and not any(begin <= end <= address for end in ends):
            spans.add((begin, address))
    innermost = sorted(s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans))
    # ptxas for sm_80 leaves some loops by a CALL over the branch that would repeat them, which is a jump.
    return [
        [text for at, text in code if begin <= at <= end and not re.search(rf"CALL\S* {at + 32:#x}\b", text)]
        for begin, end in innermost
    ]


def threads_of_a_block(cubin: bytes) -> dict[str, int]:
    """By kernel, from the section `.nv.info.KERNEL` of each: launch bounds, or the size that the code requires."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)
    ]  # name, .., offset, size
    strings = headers[names][4]
    found = {}
    for name, *_, offset, length in headers:
        text = cubin[strings + name : cubin.index(b"\0", strings + name)].decode()
        if not text.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + length:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            if attribute in (0x05, 0x10):  # EIATTR_MAX_THREADS, EIATTR_REQNTID
                x, y, z = struct.unpack_from("<III", cubin, at + 4)
                found[text.removeprefix(".nv.info.")] = x * y * z
            at += 4 + (value if form == 0x04 else 0)  # EIFMT_SVAL: that many bytes follow
    return found


def read_cubin(cubin: Path, architecture: str) -> list[Kernel]:
    """The kernels of a cubin, in the order of their names."""
    cuobjdump = toolkit("cuobjdump")
    usage = run(cuobjdump, "-res-usage", cubin)
    threads = threads_of_a_block(cubin.read_bytes())
    resources = {
        symbol: (int(registers), int(stack), int(shared))
        for symbol, registers, stack, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        )
    }
    names = dict(zip(resources, spelled(list(resources)), strict=True))
    kernels = []
    for symbol, text in re.findall(
        r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", run(cuobjdump, "-sass", cubin), re.DOTALL
    ):
        code = [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]*?)\s*;", text)]
        registers, stack, shared = resources[symbol]
        loops = [read_code(body) for body in innermost_loops(code)]
        kernels.append(
            Kernel(
                name=names[symbol],
                architecture=architecture,
                registers=registers,
                stack=stack,
                shared=shared,
                threads=threads.get(symbol, 1024),
                whole=read_code([i for _, i in code]),
                loops=[loop for loop in loops if loop.accesses()],
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def read_amd(name: str, text: str, architecture: str, threads: int, shared: int) -> Kernel:
    """A kernel in AMD's assembly language."""

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    def widths(access: str) -> dict[int, int]:
        bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "b128": 128, "b96": 96, "b64": 64, "b32": 32}
        found = Counter(
            bits.get(kind, 8 if "byte" in kind else 16)
            for kind in re.findall(rf"\b(?:global|buffer|flat)_{access}_(\w+)", text)
        )
        return dict(sorted(found.items()))

    whole = Code(loads=widths("load"), stores=widths("store"))
    return Kernel(
        name=name,
        architecture=architecture,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        shared=shared,
        threads=threads,
        whole=whole,
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
    )


@functools.cache
def version(program: str) -> str:
    return run(toolkit(program), "--version").strip().splitlines()[-1]
