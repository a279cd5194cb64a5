"""The set-up, tools/bootstrap.py and the Makefile, on checkouts whose .venv is a fake: nothing is installed."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

from tests.child import run_child

ROOT = Path(__file__).parent.parent

# Answers the probe, writes down what pip is asked for, and leaves behind what the real one would.
FAKE_PYTHON = """#!{python} -IS
import json, sys
from pathlib import Path
root, arguments = Path({root!r}), sys.argv[1:]
site = root / "site"
if arguments[0] == "-I":
    print(json.dumps([[3, 11], {base!r}, str(site), str(root / "include"), ".fake.so"]))
    sys.exit()
with (root / "calls").open("a") as calls:
    print(*arguments, file=calls)
says = root / "pip-says"
if says.exists():
    sys.exit(says.read_text())
if "-e" in arguments:
    (root / "cnnkern" / "_C.fake.so").write_text("an extension")
    wanted = ["cnnkern==0.1.0"]
elif "-r" in arguments:
    wanted = (root / "requirements.txt").read_text().split()
else:
    wanted = arguments[-1:]
for name, version in (line.split("==") for line in wanted):
    for old in site.glob(name + "-*.dist-info"):
        old.rmdir()
    (site / f"{{name}}-{{version}}.dist-info").mkdir()
"""


@pytest.fixture
def bootstrap(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PYTHON", *module.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    # So that a full disk on the machine that runs the tests does not decide them.
    monkeypatch.setattr(module, "check_space", lambda folder, needed, purpose: None)
    return module


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with a fake .venv in which all pins are installed, and a fake g++ alone on the path."""
    for folder in ("tools", "csrc/cpu/batch_norm", "cnnkern", "site/pip", "site/torch", "include", "bin", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("bootstrap.py", "setup_step.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==2.14.1\nruff==0.17.6\n")
    sources = ("csrc/check.h", "csrc/cpu/batch_norm/bn_act.cpp", "include/Python.h")
    for name in ("setup.py", "tools/build_extension.py", "pyproject.toml", *sources):
        (tmp_path / name).write_text(name)
    (tmp_path / "site/torch/version.py").write_text("2.14.1")
    (tmp_path / "site/torch-2.14.1+cu130.dist-info").mkdir()
    (tmp_path / "site/ruff-0.17.6.dist-info").mkdir()
    python = FAKE_PYTHON.format(python=sys.executable, root=str(tmp_path), base=sys.base_prefix)
    write_program(tmp_path / ".venv/bin/python", python)
    write_program(tmp_path / "bin/g++", "#!/bin/sh\necho g++ 12\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def calls(checkout: Path) -> list[str]:
    """What pip was asked for since the last call: pins, build or the name of a package."""
    path = checkout / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return ["build" if " -e " in line else "pins" if " -r " in line else line.split()[-1] for line in lines]


def fail_in_one_line(checkout: Path, *command: str) -> str:
    """The one line on standard error of a set-up that has to fail."""
    command = command or (sys.executable, "tools/bootstrap.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON", "CXX"))}
    done = run_child(command, cwd=checkout, env=environment)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not re.match(r"make(\[\d+\])?: \*\*\*", line)]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout
    return lines[0]


def edit(path: Path) -> None:
    path.write_text(path.read_text() + " edited")


CHANGES = {
    "source": (lambda root: edit(root / "csrc/cpu/batch_norm/bn_act.cpp"), ["build"]),
    "header": (lambda root: edit(root / "csrc/check.h"), ["build"]),
    "new source": (lambda root: (root / "csrc/cpu/add_relu.cpp").write_text("new"), ["build"]),
    "removed source": (lambda root: (root / "csrc/cpu/batch_norm/bn_act.cpp").unlink(), ["build"]),
    "setup.py": (lambda root: edit(root / "setup.py"), ["build"]),
    "how it is built": (lambda root: edit(root / "tools/build_extension.py"), ["build"]),
    "pyproject.toml": (lambda root: edit(root / "pyproject.toml"), ["build"]),
    "pin": (lambda root: (root / "requirements.txt").write_text("torch==2.14.1\nruff==0.18.0\n"), ["pins"]),
    "pin gone from .venv": (lambda root: (root / "site/ruff-0.17.6.dist-info").rmdir(), ["pins"]),
    "torch": (lambda root: edit(root / "site/torch/version.py"), ["build"]),
    "compiler": (lambda root: write_program(root / "bin/g++", "#!/bin/sh\necho g++ 13\n"), ["build"]),
    "extension gone": (lambda root: (root / "cnnkern/_C.fake.so").unlink(), ["build"]),
    "extension of another build": (lambda root: edit(root / "cnnkern/_C.fake.so"), ["build"]),
    "package uninstalled": (lambda root: (root / "site/cnnkern-0.1.0.dist-info").rmdir(), ["build"]),
    "modification times": (lambda root: [os.utime(path, (0, 0)) for path in root.glob("*.*")], []),
    "text beside the sources": (lambda root: (root / "csrc/notes.txt").write_text("new"), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_once(bootstrap, checkout, change):
    bootstrap.set_up(checkout, lint=False)
    assert calls(checkout) == ["pins", "build"]
    apply, expected = CHANGES[change]
    apply(checkout)
    bootstrap.set_up(checkout, lint=False)
    assert calls(checkout) == expected
    bootstrap.set_up(checkout, lint=False)
    assert calls(checkout) == []


def test_another_setting_is_noticed(bootstrap, checkout, monkeypatch):
    for value in (None, "0", "1"):
        if value is not None:
            monkeypatch.setenv("CNNKERN_CUDA", value)
        bootstrap.set_up(checkout, lint=False)
        assert "build" in calls(checkout)
        bootstrap.set_up(checkout, lint=False)
        assert calls(checkout) == []


def test_ninja_sees_a_source_that_became_older(bootstrap, checkout):
    bootstrap.set_up(checkout, lint=False)
    changed, same = checkout / "csrc/cpu/batch_norm/bn_act.cpp", checkout / "csrc/check.h"
    edit(changed)
    for path in (changed, same):
        os.utime(path, (0, 0))
    bootstrap.set_up(checkout, lint=False)
    assert changed.stat().st_mtime > 0
    assert same.stat().st_mtime == 0


def test_objects_are_dropped_for_another_torch_only(bootstrap, checkout):
    bootstrap.set_up(checkout, lint=False)
    objects = checkout / "build" / "cpython-311-cpu"
    objects.mkdir()
    edit(checkout / "csrc/check.h")
    bootstrap.set_up(checkout, lint=False)
    assert objects.exists()
    edit(checkout / "site/torch/version.py")
    bootstrap.set_up(checkout, lint=False)
    assert not objects.exists()


def test_a_failed_build_is_tried_again(bootstrap, checkout, capsys):
    bootstrap.set_up(checkout, lint=False)
    calls(checkout)
    edit(checkout / "csrc/check.h")
    (checkout / "pip-says").write_text("csrc/check.h:1:1: error: 'edited' does not name a type\n")
    with pytest.raises(bootstrap.SetupError, match=r"compiler error: csrc/check\.h:1:1: error: 'edited'"):
        bootstrap.set_up(checkout, lint=False)
    assert "'edited'" in (checkout / ".venv" / "setup.log").read_text()
    (checkout / "pip-says").unlink()
    bootstrap.set_up(checkout, lint=False)
    assert calls(checkout) == ["build", "build"]
    assert "csrc/check.h changed" in capsys.readouterr().out


def test_lint_installs_ruff_alone(bootstrap, checkout):
    (checkout / "site/ruff-0.17.6.dist-info").rmdir()
    (checkout / "bin/g++").unlink()
    bootstrap.set_up(checkout, lint=True)
    assert calls(checkout) == ["ruff==0.17.6"]
    bootstrap.set_up(checkout, lint=True)
    assert calls(checkout) == []


def test_the_interpreter_that_was_asked_for_gets_a_venv_of_its_own(bootstrap, checkout, monkeypatch):
    made = []
    monkeypatch.setattr(bootstrap, "run_step", lambda title, usually, command, *rest: made.append(command))
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 12, 1))
    assert bootstrap.ensure_venv(checkout).version == (3, 11)
    assert not made
    monkeypatch.setenv("PYTHON", "python3.12")
    bootstrap.ensure_venv(checkout)
    assert made[0][1:4] == ["-m", "venv", "--clear"]


def test_pip_installs_itself_where_ensurepip_is_missing(bootstrap, checkout, monkeypatch):
    made, find_spec = [], importlib.util.find_spec

    def run_step(title, usually, command, *rest):
        made.append([str(part) for part in command])
        if "download" in command:
            (checkout / "build/pip").mkdir(parents=True)
            (checkout / "build/pip/pip-26.0-py3-none-any.whl").touch()

    monkeypatch.setattr(bootstrap, "run_step", run_step)
    monkeypatch.setattr(
        bootstrap.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name)
    )
    monkeypatch.setenv("PYTHON", "python3.99")
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 12, 1))
    bootstrap.ensure_venv(checkout)
    assert "--without-pip" in made[0]
    assert made[1][1:4] == ["-m", "pip", "download"]
    assert made[2][:3] == [
        str(checkout / ".venv/bin/python"),
        str(checkout / "build/pip/pip-26.0-py3-none-any.whl/pip"),
        "install",
    ]


def test_condensed_output(bootstrap):
    line = "  Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl (812.3 MB)\n"
    assert bootstrap.condense_pip(line) == "downloading torch 2.14.1 (812.3 MB)"
    assert bootstrap.condense_pip("  Downloading wheel-0.48.0-py3-none-any.whl (31 kB)\n") is None
    line = "  [3/9] c++ -MMD -MF x.d -c -c /a/csrc/cpu/batch_norm/bn_act.cpp -o /b/x.o -DCPU_CAPABILITY=AVX2 -mavx2\n"
    assert bootstrap.condense_build(line) == "[3/9] csrc/cpu/batch_norm/bn_act.cpp (AVX2)"
    assert bootstrap.condense_build("  running build_ext\n") is None


def test_no_compiler(checkout):
    (checkout / "bin/g++").unlink()
    assert "apt-get install g++" in fail_in_one_line(checkout)


def test_no_headers(checkout):
    (checkout / "include/Python.h").unlink()
    line = fail_in_one_line(checkout)
    assert "apt-get install python3-dev" in line
    assert "python3.11-dev" in line


def test_no_space_while_installing(checkout):
    # torch is there, so that no 10 GB are asked for beforehand
    (checkout / "site/ruff-0.17.6.dist-info").rmdir()
    (checkout / "pip-says").write_text("ERROR: Could not install: [Errno 28] No space left on device\nTraceback ...\n")
    line = fail_in_one_line(checkout)
    assert "no space left" in line
    assert str(checkout / ".venv" / "setup.log") in line


def test_no_space_beforehand(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 3 << 30))
    module.check_space(tmp_path, 1 << 30, "this")
    with pytest.raises(module.SetupError, match=r"this needs about 8 GB, and .* has 3\.0 GB free"):
        module.check_space(tmp_path, 8 << 30, "this")


def test_python_too_old(bootstrap, checkout, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    assert bootstrap.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Python 3.10 to 3.13 is needed" in line


def test_a_file_that_is_missing(bootstrap, checkout, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "__file__", str(checkout / "tools/bootstrap.py"))
    (checkout / "requirements.txt").unlink()
    assert bootstrap.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "requirements.txt" in line


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "no space left"),
        ("/tmp/ccX.s: fatal error: error writing to /tmp/ccX.s: No space left on device", "no space left"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("a.cpp:1:10: fatal error: Python.h: No such file or directory", "apt-get install python3-dev"),
        ("  [2/9] g++ a\n  csrc/a.cpp:7:1: error: first\n  b.cpp:8:1: error: second", "csrc/a.cpp:7:1: error: first"),
        ('csrc/cuda/a.cu(12): error: identifier "x" is undefined', 'a.cu(12): error: identifier "x"'),
        ("c++: error: unrecognized command-line option '-std=c++20'", "unrecognized command-line option"),
        ("      cnnkern: CNNKERN_CUDA must be 0, 1 or unset; got 'yes'", "cnnkern: CNNKERN_CUDA must be"),
        ("NewConnectionError('[Errno -2]')\nERROR: No matching distribution found for torch", "cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.14.1", "has no torch==2.14.1"),
        ("ERROR: ResolutionImpossible: for help visit", "conflict"),
        ("/usr/bin/python3: No module named pip", "apt-get install python3-pip"),
        ("ERROR: something else\n\n", "ERROR: something else"),
        ("", "it said nothing"),
    ],
)
def test_diagnosis(bootstrap, output, advice):
    diagnosis = bootstrap.diagnose(output)
    assert advice in diagnosis
    assert "\n" not in diagnosis


make = shutil.which("make")
needs_make = pytest.mark.skipif(make is None, reason="needs make")


def fake_python(path: Path, suitable: bool) -> None:
    """An interpreter whose version is right or wrong and that writes its name down instead of setting up."""
    write_program(path, f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not suitable)}\necho "$0 $@" >&2\nexit 1\n')


@needs_make
def test_make_takes_the_first_suitable_interpreter(checkout):
    fake_python(checkout / "bin/python3", suitable=False)
    fake_python(checkout / "bin/python3.12", suitable=True)
    fake_python(checkout / "bin/python3.10", suitable=True)
    assert fail_in_one_line(checkout, make) == f"{checkout}/bin/python3.12 tools/bootstrap.py"
    assert fail_in_one_line(checkout, make, "lint") == f"{checkout}/bin/python3.12 tools/bootstrap.py --lint"
    assert fail_in_one_line(checkout, make, "PYTHON=python3.10") == f"{checkout}/bin/python3.10 tools/bootstrap.py"


@needs_make
def test_make_without_a_suitable_interpreter(checkout):
    fake_python(checkout / "bin/python3", suitable=False)
    assert "no Python 3.10 to 3.13" in fail_in_one_line(checkout, make)
    assert "PYTHON=python3 does not run" in fail_in_one_line(checkout, make, "PYTHON=python3")
    assert "PYTHON=python3.12 does not run" in fail_in_one_line(checkout, make, "test", "PYTHON=python3.12")


@needs_make
def test_make_help_names_every_command():
    said = run_child([make, "help"], cwd=ROOT).stdout
    commands = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(re.findall(r"^make ([a-z-]+)", said, re.M)) == set(commands) - {"setup"}


def test_one_range_of_interpreters(bootstrap):
    (first, last), makefile = bootstrap.PYTHONS, (ROOT / "Makefile").read_text()
    assert f"Python {first[0]}.{first[1]} to {last[0]}.{last[1]}" == bootstrap.PYTHON_RANGE
    assert f"not {first} <= sys.version_info[:2] <= {last}" in makefile
    assert makefile.count(bootstrap.PYTHON_RANGE) == 2
    # Of the package it is wider: not all pins have wheels for the newest interpreters.
    supported = SpecifierSet(re.search(r'^requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1])
    assert all(supported.contains(f"{major}.{minor}") for major, minor in (first, last))


def test_every_requirement_is_an_exact_pin(bootstrap):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(bootstrap.read_pins(ROOT)) == len(wanted)


def test_stamps_survive_as_json(bootstrap, checkout):
    bootstrap.set_up(checkout, lint=False)
    stamps = json.loads((checkout / ".venv" / "setup-stamps.json").read_text())
    assert {"csrc/check.h", "setup.py", "CNNKERN_CUDA", "the installed torch"} <= stamps["build"].keys()


@pytest.mark.parametrize("gpu", [False, True])
def test_benchmarks_need_the_kernels_of_this_machine_alone(bootstrap, checkout, gpu, monkeypatch):
    if gpu:
        write_program(checkout / "bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    bootstrap.set_up(checkout, lint=False, bench=True)
    assert calls(checkout) == ["pins", "build"]
    stamp = json.loads((checkout / ".venv" / "setup-stamps.json").read_text())["build"]
    assert stamp["CNNKERN_CUDA"] == ("" if gpu else "0")
    assert stamp["CNNKERN_CPU"] == "native"
    bootstrap.set_up(checkout, lint=False, bench=True)
    assert calls(checkout) == []
    with monkeypatch.context() as moved:
        moved.setattr(bootstrap, "processor", lambda: "another")
        bootstrap.set_up(checkout, lint=False, bench=True)
        assert calls(checkout) == ["build"]
    bootstrap.set_up(checkout, lint=False)  # `make test` asks for them
    assert calls(checkout) == ["build"]
    bootstrap.set_up(checkout, lint=False, bench=True)  # which does for benchmarks too
    assert calls(checkout) == []


def test_the_pins_are_supported(bootstrap):
    (supported,) = re.findall(r'^torch = "torch([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    pinned = bootstrap.read_pins(ROOT)["torch"]
    (isolated,) = re.findall(r'"torch==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert isolated == pinned
    assert SpecifierSet(supported).contains(pinned)
    said = "cnnkern: torch 2.8.1 is not supported: the extension needs another"  # and `make` hands it on
    assert bootstrap.diagnose(f"running build_ext\n  {said}\nerror: subprocess-exited-with-error") == said
