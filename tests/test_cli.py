"""The command line: what the doctor says of this machine and of a broken installation, and `cnnkern bench`."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnnkern import _C, __version__, cli, doctor
from cnnkern.testing import CASES
from tests.child import run_child

PACKAGE = Path(cli.__file__).parent


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder`, from which it imports the package where there is one."""
    kept = {k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "PYTHONPATH")}
    return run_child([sys.executable, *command], cwd=folder, env=kept | environment)


def test_doctor_names_versions_kernels_and_instruction_set(capsys):
    assert cli.main(["doctor"]) == 0
    said, errors = capsys.readouterr()
    assert not errors
    lines = [line.split() for line in said.splitlines()]
    assert ["torch", torch.__version__.partition("+")[0]] in [line[:2] for line in lines]
    assert ["cnnkern", importlib.metadata.version("cnnkern")] in [line[:2] for line in lines]
    assert importlib.metadata.version("cnnkern").partition("+")[0] == __version__
    assert f"{_C.cpu_capability()} in use; the CPU has {doctor.capability_of_cpu()}" in said
    for operator in CASES:
        assert any(line[:2] == [operator, "cpu"] and doctor.CORRECT in " ".join(line) for line in lines), operator
    assert "\x1b" not in said
    cuda = [line for line in lines if line[1:2] == ["cuda"]]
    assert len(cuda) >= 2 * len(CASES)
    for line in cuda:  # a status in every row, and a kernel that was built is told from one that stands in for it
        status = " ".join(line)
        if torch.cuda.is_available():
            assert doctor.CORRECT in status
        else:
            assert status.endswith("built, not run: no GPU" if "CUDA C++" in status else "not run: no GPU")
            assert ("built" in status) == ("CUDA C++" in status)


def test_a_kernel_of_the_gpu_is_run_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "gpus", lambda: [("a GPU",)])
    monkeypatch.setattr(doctor, "tables", list)
    found = {"cpu": {"bn_act": doctor.CORRECT}, "cuda": {"bn_act": "wrong on cuda"}}
    monkeypatch.setattr(doctor, "check_kernels", found.get)
    assert cli.main(["doctor"]) == 1
    said, errors = capsys.readouterr()
    assert errors == "cnnkern: the GPU kernels do not work: bn_act: wrong on cuda\n"
    assert re.search(r"^bn_act_backward +cuda .*wrong on cuda *$", said, re.M)


def test_a_built_cuda_kernel_that_was_not_run_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which kernels are run")
    status = {
        "bn_act": {"cpu": "C++ AVX2", "cuda": "CUDA C++"},
        "add_relu": {"cpu": "C++ AVX2", "cuda": "Triton: none"},
    }
    monkeypatch.setattr("cnnkern.backends.status", lambda: status)
    assert [row[3] for row in doctor.kernels({"cpu": {"bn_act": doctor.CORRECT, "add_relu": doctor.CORRECT}})] == [
        *(doctor.CORRECT, "built, not run: no GPU"),
        *(doctor.CORRECT, "not run: no GPU"),
    ]


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_the_environment_selects_the_instruction_set(capability):
    if capability not in _C.build_info()["cpu_capabilities"].split() or doctor.capability_of_cpu() == "DEFAULT":
        pytest.skip(f"this CPU has no choice of instruction sets with {capability} among them")
    code = "import sys; from cnnkern import _C, cli; print(_C.cpu_capability()); sys.exit(cli.main(['doctor']))"
    done = run("-c", code, folder=PACKAGE.parent, ATEN_CPU_CAPABILITY=capability.lower())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == capability
    assert f"{capability} in use" in done.stdout
    if capability != doctor.capability_of_cpu():
        assert f"ATEN_CPU_CAPABILITY={capability.lower()} is set: unset it" in done.stdout


@pytest.mark.parametrize(
    ("flags", "capability"),
    [
        ("fpu sse2 avx2 fma f16c avx512f avx512bw avx512vl avx512dq", "AVX512"),
        ("fpu sse2 avx2 fma f16c avx512f", "AVX2"),
        ("fpu sse2 avx", "DEFAULT"),
        ("", "DEFAULT"),
    ],
)
def test_capability_of_cpu(monkeypatch, flags, capability):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: set(flags.split()))
    assert doctor.capability_of_cpu() == capability


def test_doctor_fails_where_a_cpu_kernel_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_kernels", lambda device: {"bn_act": "output: error 1.0"})
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu"])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "cnnkern: the CPU kernels do not work: bn_act: output: error 1.0\n"


def test_a_check_reports_a_wrong_kernel_and_a_missing_one(monkeypatch):
    from dataclasses import replace

    def missing(**arguments):
        raise NotImplementedError("Could not run 'cnnkern::bn_act'\nfrom the 'CPU' backend")

    case = CASES["bn_act"]
    wrong = replace(case, function=lambda **arguments: case.function(**arguments) + 1)
    monkeypatch.setattr("cnnkern.testing.CASES", {"wrong": wrong, "missing": replace(case, function=missing)})
    results = doctor.check_kernels("cpu")
    assert results["wrong"].startswith("output: error")
    assert results["missing"] == "Could not run 'cnnkern::bn_act'"


PROBLEMS = {
    "not built": ("", None, "the extension is not built"),
    "other torch": (
        "",
        "raise ImportError('undefined symbol: x')",
        "does not load with torch 2.0 (undefined symbol: x)",
    ),
    "no torch": ("raise ModuleNotFoundError('no torch')", "", "torch cannot be imported (no torch)"),
}


@pytest.fixture(params=PROBLEMS)
def broken(request, tmp_path) -> tuple[Path, str]:
    """A folder with a copy of the package whose extension or torch is broken, and what has to be said of it."""
    shutil.copytree(PACKAGE, tmp_path / "cnnkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    in_torch, in_extension, message = PROBLEMS[request.param]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"from torch import version\n__version__ = '2.0'\n{in_torch}\n")
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    (tmp_path / "cnnkern" / "_built_for.py").write_text("TORCH = '2.0'\nCPU = 'DEFAULT'\n")
    if in_extension is not None:
        (tmp_path / "cnnkern" / "_C.py").write_text(in_extension)
    return tmp_path, message


def test_doctor_says_in_one_line_what_is_broken(broken):
    folder, message = broken
    done = run("-m", "cnnkern", "doctor", folder=folder)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("cnnkern: ")
    assert message in line
    assert "run `make`" in line
    assert re.search(r"^Python +\d", done.stdout, re.M)


def test_the_library_refuses_a_broken_extension(broken):
    folder, _ = broken
    done = run("-c", "import cnnkern", folder=folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: cnnkern: the compiled extension cannot be loaded")


def test_the_library_says_that_torch_is_missing():
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import cnnkern"
    done = run_child([sys.executable, "-I", "-S", "-c", code])
    assert done.stderr.splitlines()[-1].endswith("cnnkern: PyTorch is not installed; `pip install torch` installs it")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The command line alone beside a benchmark suite that writes down its arguments and ends with status 3."""
    (tmp_path / "cnnkern").mkdir()
    (tmp_path / "benchmarks").mkdir()
    for name in ("cli.py", "doctor.py", "__main__.py", "extension.py"):
        shutil.copy(PACKAGE / name, tmp_path / "cnnkern")
    for name in ("cnnkern/__init__.py", "cnnkern/_C.py", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "torch.py").write_text("__version__ = '2.0'\n")
    (tmp_path / "cnnkern" / "_built_for.py").write_text("TORCH = '2.0'\nCPU = 'DEFAULT'\n")
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    return tmp_path


def test_bench_passes_its_arguments_on(checkout):
    done = run("-m", "cnnkern", "bench", "--quick", "--filter", "bn_act", "-h", folder=checkout)
    assert not done.stderr
    assert done.stdout == "['--quick', '--filter', 'bn_act', '-h']\n"
    assert done.returncode == 3


def test_bench_outside_a_checkout_is_the_installed_package_s(checkout):
    (checkout / "pyproject.toml").unlink()
    (checkout / "benchmarks").rename(checkout / "cnnkern" / "benchmarks")
    (checkout / "cnnkern" / "benchmarks" / "__init__.py").touch()
    done = run("-m", "cnnkern", "bench", "--quick", folder=checkout)
    assert not done.stderr
    assert done.stdout == "['--quick']\n"
    assert done.returncode == 3


def test_bench_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--quick"]) == 1
    said = "cnnkern: cnnkern bench needs pytest, pytest-benchmark, jinja2: `pip install 'cnnkern[bench]'`\n"
    assert capsys.readouterr().err == said


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--quick"])
    assert "unrecognized arguments: --quick" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seconds -5", "not below zero"),
        ("--seconds nan", "not below zero"),
        ("--compile-seconds inf", "not below zero"),
        ("--filter ,", "no row has ',' in its name"),
        ("--train", "unrecognized arguments: --train; the options of `cnnkern bench --help` need a MODEL"),
    ],
)
def test_impossible_arguments_of_bench(options, message):
    ended = run("-m", "cnnkern", "bench", *options.split(), folder=PACKAGE.parent)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m cnnkern zoo show lenet | head -1"
    ended = run_child(command, shell=True, cwd=PACKAGE.parent)
    assert ended.stderr == ""
    ended = run("-m", "cnnkern", "zoo", "show", "lenet", folder=PACKAGE.parent, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_too_large_an_input_is_one_line(capsys):
    assert cli.main(["zoo", "show", "googlenet", "--input", "99999999,8,8"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("cnnkern: googlenet does not accept an input of 99999999x8x8")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", [["train"], ["zoo", "show"]])
def test_an_unknown_model_leads_to_the_command_that_lists_them(command, capsys):
    for name, near in (("ResNet-18", "did you mean resnet18 or "), ("xyz", "")):
        assert cli.main([*command, name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"cnnkern: no model is called {name!r}: {near}")
        assert line.endswith("`cnnkern zoo` lists the models")
        assert "list_models()" not in line
