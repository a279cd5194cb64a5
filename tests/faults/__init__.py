"""Faults that are planted in the kernels, one at a time, each with the tests that have to notice it.

`make faults` plants all of them in a copy of the tree (__main__.py). tests/test_faults.py holds them to the sources:
that each still applies, in every `make test`, so that none rots unseen.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Fault(NamedTuple):
    """A text that stands once in a file of `backend`, what is put in its place, and which tests are asked."""

    backend: str  # cpu, cuda (on the emulator) or triton (interpreted)
    operator: str  # whose results are wrong: of those that share the file, the one that is tested
    name: str
    file: str  # of csrc/cpu, csrc/cuda or triton_kernels
    right: str
    wrong: str
    tests: tuple[str, ...]  # pytest's arguments, of few tests that take seconds
    tool: str = ""  # what the kernels are built with, of cpu_kernels.TOOLS or emulator.TOOLS

    @property
    def path(self) -> Path:
        """Of the file, from the root of the tree."""
        return Path({"cpu": "csrc/cpu", "cuda": "csrc/cuda", "triton": "triton_kernels"}[self.backend]) / self.file

    def applies(self, root: Path = ROOT) -> bool:
        path = root / self.path
        return path.exists() and path.read_text().count(self.right) == 1

    def plant(self, root: Path) -> str:
        """Puts the fault into a tree. Returns the file's text without it."""
        path = root / self.path
        text = path.read_text()
        if text.count(self.right) != 1:
            raise ValueError(
                f"{self.backend}, {self.name}: {self.path} has the text to change {text.count(self.right)} times"
            )
        path.write_text(text.replace(self.right, self.wrong))
        return text


def all_faults() -> list[Fault]:
    from faults import cpu, cuda, triton

    return [*cpu.FAULTS, *cuda.FAULTS, *triton.FAULTS]
