"""The kernels of the other instruction sets: the battery's results and numerics again, in a process for each."""

import os
import sys
from pathlib import Path

import pytest

from cnnkern import _C
from tests.child import run_child

pytestmark = pytest.mark.slow
RANK = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_battery_on(capability):
    if RANK[capability.upper()] >= RANK.get(_C.cpu_capability(), 0):
        pytest.skip(f"this process runs {_C.cpu_capability()} kernels itself, or the CPU lacks {capability}")
    # Formulas are the same in every instruction set: finite differences of them are taken once, not here.
    wanted = "(as_good_as or float32_parameters or empty or channels or any_scale or shift or mask) and not emulator"
    tests = [str(Path(__file__).parent / name) for name in ("test_battery.py", "test_numerics.py")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "CNNKERN_EACH_SHAPE_ONCE": "1"}
    ask = "from cnnkern import _C; print(_C.cpu_capability())"
    done = run_child([sys.executable, "-c", ask], env=environment, check=True)
    assert done.stdout.strip() == capability.upper()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, *tests]
    done = run_child(command, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (
            "test_grouped_conv2d.py",
            "every_width or large_and_uneven or in_place or subset or reruns or (past_the_caches and float32)",
        ),
        ("test_fold_own.py", ""),
    ],
)
def test_convolutions_on_avx2(module, wanted):
    if _C.cpu_capability() != "AVX512":
        pytest.skip(f"this process runs {_C.cpu_capability()} kernels itself, or the CPU lacks avx2")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted]
    command.append(str(Path(__file__).parent / module))
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = run_child(command, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
