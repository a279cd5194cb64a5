"""The mutation tests: bugs ("faults") in the kernels, each with the tests that have to find it.

`make faults` inserts them into a copy of the source tree, one at a time (__main__.py). tests/test_faults.py, which runs
in `make test`, checks that the text that each fault replaces is still in its file.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Fault(NamedTuple):
    """A text that occurs once in a file of `backend`, its replacement, and the tests that have to fail."""

    backend: str  # cpu, cuda (on the emulator) or triton (interpreted)
    operator: str  # the operator with wrong results; if several share the file, the one that is tested
    name: str
    file: str  # of csrc/cpu, csrc/cuda or triton_kernels
    right: str
    wrong: str
    tests: tuple[str, ...]  # pytest's arguments, for a few tests that take seconds
    tool: str = ""  # the sanitizer: one of cpu_kernels.TOOLS or emulator.TOOLS

    @property
    def path(self) -> Path:
        """The path of the file in the tree."""
        return Path({"cpu": "csrc/cpu", "cuda": "csrc/cuda", "triton": "triton_kernels"}[self.backend]) / self.file

    def applies(self, root: Path = ROOT) -> bool:
        path = root / self.path
        return path.exists() and path.read_text().count(self.right) == 1

    def plant(self, root: Path) -> str:
        """Inserts the fault into a tree. Returns the file's text without it."""
        path = root / self.path
        text = path.read_text()
        if text.count(self.right) != 1:
            raise ValueError(
                f"{self.backend}, {self.name}: {self.path} has the text to change {text.count(self.right)} times"
            )
        path.write_text(text.replace(self.right, self.wrong))
        return text


def all_faults() -> list[Fault]:
    from faults import cpu, cuda, cuda_convolutions, triton

    return [*cpu.FAULTS, *cuda.FAULTS, *cuda_convolutions.FAULTS, *triton.FAULTS]
