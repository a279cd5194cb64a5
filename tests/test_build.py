"""What setup.py builds and for which torch, and that nothing is installed or loaded beside another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnkern
from cnnkern import _C
from tests.child import run_child
from tests.programs import from_tools

ROOT = Path(__file__).parent.parent
RELEASE = ".".join(torch.__version__.split(".")[:2])


def run_setup(folder: Path, version: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` with a torch that has this version and nothing else, or that cannot be imported."""
    (folder / "torch").mkdir()
    text = f"__version__ = {version!r}\n" if version else "raise ImportError('libtorch.so: cannot open')\n"
    (folder / "torch" / "__init__.py").write_text(text)
    return run_child(
        [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(folder / "built")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
    )


@pytest.mark.parametrize("version", ["2.8.0+cu128", "2.9.0a0+git1234", "2.16.0", "2.16.0.dev20261201", "3.0"])
def test_a_torch_that_is_not_supported_is_refused_at_once(tmp_path, version):
    done = run_setup(tmp_path, version)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"cnnkern: torch {version} is not supported: the extension needs torch<2.16,>=2.9, to build")
    assert "`pip install 'torch<2.16,>=2.9'` first" in line
    assert not (tmp_path / "built").exists()


def test_no_torch_is_a_sentence_too(tmp_path):
    done = run_setup(tmp_path, None)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("cnnkern: torch cannot be imported (libtorch.so: cannot open), and is needed to build: `pip")


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.14.0", "2.15.0.dev20261101"])
def test_a_torch_that_is_supported_goes_on(tmp_path, version):
    """Up to the part of torch that compiles, which is not there."""
    done = run_setup(tmp_path, version)
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named 'torch.utils'")
    assert "not supported" not in done.stderr


def metadata_of(folder: Path, *command: str, **environment: str) -> str:
    """What a distribution that setup.py makes would say of itself."""
    done = run_child(
        [sys.executable, str(ROOT / "setup.py"), "-q", *command, "egg_info", "--egg-base", str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "cnnkern.egg-info" / "PKG-INFO").read_text()


def test_what_is_built_says_which_torch_it_is_for(tmp_path):
    said = metadata_of(tmp_path, CNNKERN_EXTENSION="1", CNNKERN_CUDA="0")
    assert f"\nVersion: {cnnkern.__version__}+torch{RELEASE}\n" in said
    assert f"\nRequires-Dist: torch=={RELEASE}.*\n" in said


def test_without_an_extension_every_torch_will_do_and_none_is_needed_to_build(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not to be imported')")
    said = metadata_of(tmp_path, CNNKERN_EXTENSION="0", PYTHONPATH=str(tmp_path))
    assert f"\nVersion: {cnnkern.__version__}\n" in said
    assert "\nRequires-Dist: torch>=2.9\n" in said


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_on_other_systems_than_linux_there_is_no_extension(tmp_path, system):
    """setup.py, told where it is after all that it imports has been imported: Python's own modules believe it too."""
    program = "import runpy, sys, urllib.request, setuptools, setuptools.command.egg_info\n"
    program += f"sys.platform, sys.argv[0] = {system!r}, 'setup.py'\nrunpy.run_path('setup.py', run_name='__main__')"

    def say(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "-q", "egg_info", "--egg-base", str(tmp_path)]
        return run_child(command, cwd=ROOT, env=os.environ | environment)

    done = say()
    assert done.returncode == 0, done.stderr
    assert "\nRequires-Dist: torch>=2.9\n" in (tmp_path / "cnnkern.egg-info" / "PKG-INFO").read_text()
    refused = say(CNNKERN_EXTENSION="1")
    assert (
        refused.stderr
        == f"cnnkern: the extension is built on Linux alone, and this is {system}: unset CNNKERN_EXTENSION\n"
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with a copy of the package, its extension with it."""
    shutil.copytree(ROOT / "cnnkern", tmp_path / "cnnkern", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "cnnkern" / "triton_kernels")
    return tmp_path


def imported(folder: Path) -> str:
    """The last line of what `import cnnkern` there says; nothing where it works."""
    code = f"import cnnkern; assert cnnkern.__file__.startswith({str(folder)!r}), cnnkern.__file__"
    done = run_child([sys.executable, "-c", code], cwd=folder)
    return done.stderr.splitlines()[-1] if done.returncode else ""


def test_an_extension_for_another_torch_is_not_loaded(copy):
    assert imported(copy) == ""
    (copy / "cnnkern" / "_built_for.py").write_text('TORCH = "2.11.0+cu130"\nCPU = "DEFAULT"')
    said = imported(copy)
    assert "it was built for torch 2.11.0+cu130, and" in said
    assert f"torch {torch.__version__} is installed" in said
    assert "install the wheel that names its release" in said
    assert "`pip install --no-build-isolation .`" in said


def test_a_patch_release_of_the_same_torch_will_do(copy):
    (copy / "cnnkern" / "_built_for.py").write_text(f'TORCH = "{RELEASE}.99"\nCPU = "DEFAULT"')
    assert imported(copy) == ""


def test_an_extension_for_another_instruction_set_is_not_loaded(copy, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    lines = (copy / "cnnkern" / "_built_for.py").read_text().splitlines()
    (torch_line,) = (line for line in lines if line.startswith("TORCH"))
    for built, refused in (("DEFAULT", False), ("DEFAULT AVX2 AVX512", False), ("AVX512", True)):
        (copy / "cnnkern" / "_built_for.py").write_text(f'{torch_line}\nCPU = "{built}"')
        said = imported(copy)
        assert bool(said) is refused, said
    assert "it was built with CNNKERN_CPU=native for AVX512 alone, and torch uses DEFAULT here" in said


def test_an_extension_of_an_older_build_is_not_loaded(copy):
    (copy / "cnnkern" / "_built_for.py").write_text(f'TORCH = "{RELEASE}.0"')
    assert "nothing says which instruction sets it was built for" in imported(copy)


def test_what_csrc_is_compiled_for():
    setting = from_tools("build_extension")
    assert _C.build_info()["cpu_capabilities"].split() == list(setting.CPU_CAPABILITIES)


@pytest.mark.parametrize("value", ["native", "all", "", "avx2"])
def test_instruction_sets_of_a_build(value, monkeypatch):
    setting = from_tools("build_extension")
    everything = list(setting.CPU_CAPABILITIES)
    monkeypatch.setenv("CNNKERN_CPU", value)
    if value == "avx2":
        with pytest.raises(SystemExit, match="CNNKERN_CPU must be all, native or unset; got 'avx2'"):
            setting.cpu_capabilities()
    elif value == "native":
        assert list(setting.cpu_capabilities()) == [_C.cpu_capability()]
    else:
        assert list(setting.cpu_capabilities()) == everything


def test_an_extension_that_does_not_say_is_not_loaded(copy):
    (copy / "cnnkern" / "_built_for.py").unlink()
    assert "nothing says which torch it was built for" in imported(copy)


@pytest.fixture
def two_wheels(tmp_path, monkeypatch) -> Path:
    """A folder with wheels for two releases of torch."""
    for release in ("2.11", "2.13"):
        wheel(tmp_path / "dist", "cnnkern", f"0.1.0+torch{release}", f"torch=={release}.*")
    return tmp_path / "dist"


def wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    import zipfile

    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize(
    ("there", "taken"), [("2.11.0", "0.1.0+torch2.11"), ("2.13.1+cpu", "0.1.0+torch2.13"), ("2.14.1", None)]
)
def test_pip_takes_the_wheel_for_the_torch_that_is_there_or_none(two_wheels, tmp_path, there, taken):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-index"]
    run_child([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    pip[3:3] = ["--python", str(tmp_path / "venv" / "bin" / "python")]
    torch_there = wheel(site, "torch", there)
    assert run_child([*pip, str(torch_there)]).returncode == 0
    done = run_child([*pip, "--find-links", str(two_wheels), "cnnkern"])
    if taken:
        assert f"Successfully installed cnnkern-{taken}" in done.stdout, done.stderr
    else:
        assert done.returncode == 1
        assert "cnnkern 0.1.0+torch2.13 depends on torch==2.13.*" in done.stdout + done.stderr


def test_a_build_takes_all_cores_within_memory(monkeypatch):
    jobs = from_tools("build_extension").jobs
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert jobs(2, 24 << 30) == 2
    assert jobs(64, 12 << 30) == 8
    assert jobs(4, 1 << 30) == 1
    monkeypatch.setenv("MAX_JOBS", "5")
    assert jobs(2, 1 << 30) == 5
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match="MAX_JOBS must be a whole number from 1 on, or unset; got 'all'"):
        jobs(2, 24 << 30)
