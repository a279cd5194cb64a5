"""The processes that tests start: it is reported if one ran out of memory."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.child import OutOfMemory, memory, refuse_lack_of_memory, run_child


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"was killed \(SIGKILL\), .* memory has run out"),
        ("raise MemoryError", "got no memory: it ended with 'MemoryError'"),
        ("import torch; torch.empty(1 << 60)", 'got no memory: it ended with "can\'t allocate memory"'),
    ],
)
def test_a_child_without_memory_says_so(code, said):
    with pytest.raises(OutOfMemory, match=f"(?s){said}.*GB of .* GB are free now, and pytest's process has .* GB"):
        run_child([sys.executable, "-c", code])


def test_a_shell_s_child_that_was_killed():
    with pytest.raises(OutOfMemory, match="was killed"):
        run_child("sh -c 'kill -9 $$'; exit $?", shell=True)


def test_another_failure_is_not_taken_for_it():
    done = run_child([sys.executable, "-c", "import sys; print('out of memory', file=sys.stderr)"])
    assert (done.returncode, done.stderr) == (0, "out of memory\n")
    assert run_child([sys.executable, "-c", "raise KeyError(9)"]).returncode == 1
    with pytest.raises(AssertionError, match=r"(?s)exit status 3.*the reason") as error:
        run_child([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"], check=True)
    assert not isinstance(error.value, OutOfMemory)


def test_memory_is_counted():
    free, total = (float(word) for word in memory().replace(" GB", "").split()[:3:2])
    assert 0 < free <= total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 + 0.1


def test_every_test_starts_its_processes_by_it():
    """But for those that are watched while they run: what came of them goes to refuse_lack_of_memory."""
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        if path.name in ("child.py", "native.py", Path(__file__).name) or path.parent.name == "gpu_gate":
            continue  # the latter two compile, and say what the compiler said
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "subprocess":
                waits = ("run", "check_output", "check_call", "call")
                assert node.attr not in waits, f"{path}:{node.lineno}: not by run_child"
        killed = "first.kill()" in path.read_text()  # on purpose, and said to be
        if "subprocess.Popen(" in path.read_text() and not killed:
            assert "refuse_lack_of_memory" in path.read_text(), path


def test_a_process_that_was_watched():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        process.kill()
    with pytest.raises(OutOfMemory):
        refuse_lack_of_memory(subprocess.CompletedProcess(process.args, process.wait(), None, None))
