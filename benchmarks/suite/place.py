"""Where this package is: in a checkout, or installed as a part of cnnkern; and where its results go."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NAME = __package__.rpartition(".")[0]  # `benchmarks` in a checkout, `cnnkern.benchmarks` installed
ROOT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else None  # of the checkout
# An installed package is not written into.
RESULTS = PACKAGE / "results" if ROOT else Path.cwd() / "cnnkern-bench"
