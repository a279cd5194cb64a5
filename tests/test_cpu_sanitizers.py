"""The CPU kernels under sanitizers: the battery, and what threads share, in a process a tool (tests/cpu_kernels).

`make faults` plants what each has to report: a mask byte written without its atomic or, constants that another thread
is working out, a read beyond the end.
"""

import os
import sys

import cpu_kernels
import pytest

from tests.child import run_child

pytestmark = pytest.mark.slow
# With each tool the types that its kernels are built for, and tests of their own: threads meet in large tensors alone.
MEMORY = "any_layout or off_a_vector or memory_format or empty_batch"
RUNS = {
    "address+undefined": f"(as_good_as and (float32 or bfloat16)) or {MEMORY} or many_threads",
    "thread": "(as_good_as and (float32 or float64)) or many_threads or reruns",
}


@pytest.mark.parametrize("tool", RUNS)
def test_battery(tool):
    cpu_kernels.build(tool)
    # One process, whatever this one is part of: the sanitizers' reports end it, and -s keeps them.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "addopts=", "--cpu-tool", tool, "-k", RUNS[tool], "tests/test_battery.py"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | cpu_kernels.environment(tool)
    environment["CNNKERN_EACH_SHAPE_ONCE"] = "1"
    done = run_child(command, cwd=cpu_kernels.native.ROOT, env=environment, timeout=1800)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:9000]}"  # a report begins there
    assert " passed" in done.stdout
