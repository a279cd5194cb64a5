"""Sets up .venv: a virtual environment, the pins of requirements.txt, the extension built in place.

    python3 tools/bootstrap.py           what `make` and `make test` need
    python3 tools/bootstrap.py --bench   what `make bench` needs: the kernels that run on this machine
    python3 tools/bootstrap.py --lint    what `make lint` needs: ruff alone

A step runs only if something that it depends on has changed. Content decides, because git changes modification times.
Errors are reported in one line; the whole output of pip and the compiler is in .venv/setup.log.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setup_step import NO_PIP, PYTHON_RANGE, SetupError, condense_build, condense_pip, diagnose, run_step

PYTHONS = ((3, 10), (3, 13))  # also in the Makefile, which looks for one, and in pyproject.toml
GB = 1 << 30
SPACE = {"venv": 10 * GB, "pins": GB, "build": 2 * GB, "lint": GB // 4}
SOURCES = (".cpp", ".h", ".cu", ".cuh")
SETTINGS = (
    "CNNKERN_CUDA",
    "CNNKERN_CPU",
    "CNNKERN_WERROR",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
)
PROBE = """import json, sys, sysconfig
print(json.dumps([sys.version_info[:2], sys.base_prefix, sysconfig.get_path("purelib"), sysconfig.get_path("include"),
                  sysconfig.get_config_var("EXT_SUFFIX")]))"""


class Venv:
    """The virtual environment of `root`, if it works: `found` says whether."""

    def __init__(self, root: Path):
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.found = False
        try:
            probe = subprocess.run([self.python, "-I", "-c", PROBE], capture_output=True, text=True)
        except OSError:  # no such file, or a link to an interpreter that is gone
            return
        if probe.returncode == 0:
            version, self.base, purelib, include, self.ext_suffix = json.loads(probe.stdout)
            self.version, self.packages, self.include = tuple(version), Path(purelib), Path(include)
            self.found = (self.packages / "pip").is_dir()

    def installed(self) -> dict[str, str]:
        """The version of every installed distribution."""
        names = (path.name[: -len(".dist-info")] for path in self.packages.glob("*-*.dist-info"))
        return {normal(name): version for name, _, version in (n.partition("-") for n in names)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(root: Path) -> dict[str, str]:
    """The exact pins of requirements.txt, but for those that hold under a condition only."""
    lines = (root / "requirements.txt").read_text().splitlines()
    pins = (re.fullmatch(r"\s*([\w.-]+)==([^\s;#]+)\s*(#.*)?", line) for line in lines)
    return {normal(pin[1]): pin[2] for pin in pins if pin}


def unmet(pins: dict[str, str], installed: dict[str, str]) -> list[str]:
    """The pins that are not installed. A local version (2.14.1+cu130) meets a pin that names none."""
    return [
        f"{name}=={version}"
        for name, version in pins.items()
        if version not in (installed.get(name), installed.get(name, "").partition("+")[0])
    ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def has_gpu() -> bool:
    """Whether the driver lists an NVIDIA GPU."""
    try:
        return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout
    except OSError:  # no driver
        return False


def processor() -> str:
    """A hash of the instruction sets of this machine's processor, as Linux reports them."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^(flags|Features)\s*:.*$", path.read_text(), re.M) if path.exists() else None
    return hashlib.sha256((found[0] if found else "").encode()).hexdigest()


def build_inputs(root: Path, venv: Venv) -> dict[str, str]:
    """Everything that the extension depends on, by name: a hash of the content, or the setting's value."""
    files = [root / "setup.py", root / "tools" / "build_extension.py", root / "pyproject.toml"]
    files += sorted(path for path in (root / "csrc").rglob("*") if path.suffix in SOURCES)
    inputs = {str(path.relative_to(root)): digest(path) for path in files}
    inputs.update({name: os.environ.get(name, "") for name in SETTINGS})
    inputs["the installed torch"] = digest(venv.packages / "torch" / "version.py")
    inputs["the compiler"] = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    inputs["the interpreter"] = f"{venv.base} {venv.ext_suffix}"
    inputs["the checkout's place"] = str(root)  # an editable install holds absolute paths
    return inputs


def extension(root: Path, venv: Venv) -> str:
    """A hash of the extension as it lies in the source tree and is installed; empty where either is not so."""
    path = root / "cnnkern" / f"_C{venv.ext_suffix}"
    return digest(path) if path.exists() and "cnnkern" in venv.installed() else ""


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


class Stamps:
    """What the last completed steps had before them, kept in .venv."""

    def __init__(self, venv: Venv):
        self.path = venv.folder / "setup-stamps.json"
        self.values: dict = json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, step: str, value: dict[str, str] | str | None) -> None:
        self.values[step] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1))
        partial.replace(self.path)


def check_space(folder: Path, needed: int, purpose: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{purpose} needs about {needed / GB:.2g} GB, and {folder} has {free / GB:.1f} GB free: "
            "free some, or clone into a larger file system"
        )


def ensure_venv(root: Path) -> Venv:
    venv, here = Venv(root), (sys.version_info[:2], os.path.realpath(sys.base_prefix))
    asked = bool(os.environ.get("PYTHON"))
    if venv.found and PYTHONS[0] <= venv.version <= PYTHONS[1]:
        if not asked or (venv.version, os.path.realpath(venv.base)) == here:
            return venv
        print(f".venv has Python {venv.version[0]}.{venv.version[1]} of {venv.base}: it is made anew")
    if not importlib.util.find_spec("venv"):
        raise SetupError(
            "this Python has no venv: `apt-get install python3-venv`, or PYTHON=... for another interpreter"
        )
    # Debian's interpreter comes without ensurepip: pip then installs itself from its own wheel, whatever its release.
    bundled = importlib.util.find_spec("ensurepip") is not None
    if not bundled and not importlib.util.find_spec("pip"):
        raise SetupError(NO_PIP)
    check_space(root, SPACE["lint"], "the virtual environment")
    log = root / "build" / "setup.log"
    command = [sys.executable, "-m", "venv", "--clear", *([] if bundled else ["--without-pip"]), venv.folder]
    run_step("Making .venv", "5 s", command, log, lambda line: None)
    if not bundled:
        wheels = root / "build" / "pip"
        shutil.rmtree(wheels, ignore_errors=True)
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            wheels,
            "pip",
        ]
        run_step("Downloading pip", "5 s", download, log, condense_pip)
        wheel = next(wheels.glob("pip-*.whl"))
        install = [venv.python, wheel / "pip", "install", "--no-index", wheel]
        run_step("Installing pip into .venv", "5 s", install, log, condense_pip)
    venv = Venv(root)
    if not venv.found:
        raise SetupError(
            f"{sys.executable} made a .venv that does not work; see {log}, or PYTHON=... for another interpreter"
        )
    return venv


def pip_install(venv: Venv, title: str, usually: str, arguments: list) -> None:
    # Wheels are downloaded beside .venv's packages: /tmp is often a small file system in memory.
    temporary = venv.folder / "tmp"
    temporary.mkdir(exist_ok=True)
    command = [
        venv.python,
        "-m",
        "pip",
        "install",
        "--no-input",
        "--progress-bar=off",
        "--only-binary=:all:",
        "--no-compile",  # Python compiles what is imported, which is a small part
        *arguments,
    ]
    env = {"TMPDIR": os.environ.get("TMPDIR") or str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run_step(title, usually, command, venv.folder / "setup.log", condense_pip, env)
    shutil.rmtree(temporary)


def ensure_pins(root: Path, venv: Venv, stamps: Stamps) -> None:
    stamp, missing = digest(root / "requirements.txt"), unmet(read_pins(root), venv.installed())
    if stamps.values.get("pins") == stamp and not missing:
        return
    fresh = any(pin.startswith("torch==") for pin in missing)
    check_space(venv.folder, SPACE["venv" if fresh else "pins"], "installing the packages of requirements.txt")
    usually = "2-10 minutes, 3 GB to download" if fresh else "5-60 s"
    stamps.write("pins", None)
    pip_install(
        venv, f"Installing {len(missing) or 'all'} pins of requirements.txt", usually, ["-r", root / "requirements.txt"]
    )
    stamps.write("pins", stamp)


def ensure_linter(root: Path, venv: Venv) -> None:
    pins = read_pins(root)
    if missing := unmet({"ruff": pins["ruff"]}, venv.installed()):
        check_space(venv.folder, SPACE["lint"], "installing ruff")
        pip_install(venv, f"Installing {missing[0]}", "5 s", missing)


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def check_compiler() -> None:
    if not shutil.which(compiler()[0]):
        raise SetupError(f"there is no {compiler()[0]} to build the extension with: `apt-get install g++`")


def check_headers(venv: Venv) -> None:
    if not (venv.include / "Python.h").exists():
        package = f"python{venv.version[0]}.{venv.version[1]}-dev"
        raise SetupError(
            f"{venv.include}/Python.h is missing: `apt-get install python3-dev` (or {package}), or PYTHON=... for "
            "another interpreter"
        )


def ensure_build(root: Path, venv: Venv, stamps: Stamps, bench: bool) -> None:
    """`bench`: without CUDA kernels where no GPU runs them, and for this CPU's instruction set alone. An extension that
    has all will do for that too."""
    inputs, built = build_inputs(root, venv), extension(root, venv)
    old, new = stamps.values.get("build", {}), {**inputs, "the built extension": built}
    if built and old == new:
        return
    # Benchmarks need the kernels that run here, and tests need all.
    spared: dict[str, str] = {}
    if bench and not inputs["CNNKERN_CPU"]:
        spared["CNNKERN_CPU"] = "native"
    if bench and not inputs["CNNKERN_CUDA"] and not has_gpu():
        spared["CNNKERN_CUDA"] = "0"
    if "native" in (inputs["CNNKERN_CPU"], spared.get("CNNKERN_CPU")):
        spared["the processor"] = processor()
    if spared:
        inputs.update(spared)
        new.update(spared)
        if built and old == new:
            return
    (root / "build").mkdir(exist_ok=True)
    check_space(root / "build", SPACE["build"], "building the extension")
    changed = changes(old, new if "the built extension" in old else inputs)
    # ninja goes by modification times, and knows neither the compiler's release nor torch's.
    if not old or {"the installed torch", "the compiler", "the interpreter"} & {*changed}:
        for folder in (root / "build").glob("cpython-*"):
            shutil.rmtree(folder)
    for name in changed:
        if (path := root / name).is_file() and path.suffix in SOURCES:
            path.touch()
    why = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "") + " changed" if old and changed else "none yet"
    command = [venv.python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-input", "-e", root]
    # ninja is found only where .venv's programs are on the path.
    env = {"PATH": f"{venv.python.parent}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env.update({name: inputs[name] for name in ("CNNKERN_CUDA", "CNNKERN_CPU")})
    stamps.write("build", inputs)
    title = f"Building the extension{', with the kernels that run on this machine' if spared else ''} ({why})"
    run_step(title, "3-10 minutes from scratch", command, venv.folder / "setup.log", condense_build, env)
    built = extension(root, venv)
    if not built:
        raise SetupError(f"pip has built nothing that {venv.python} could load; see {venv.folder / 'setup.log'}")
    stamps.write("build", {**inputs, "the built extension": built})


def set_up(root: Path, lint: bool, bench: bool = False) -> None:
    (root / "build").mkdir(exist_ok=True)
    with (root / "build" / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this checkout to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if lint:
            return ensure_linter(root, ensure_venv(root))
        # Before minutes of downloads.
        check_compiler()
        venv = ensure_venv(root)
        if not extension(root, venv):
            check_headers(venv)
        stamps = Stamps(venv)
        ensure_pins(root, venv, stamps)
        ensure_build(root, venv, stamps, bench)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sets up .venv; a second call does only what has changed.")
    parser.add_argument("--lint", action="store_true", help="install ruff and nothing else")
    parser.add_argument("--bench", action="store_true", help="build the kernels that run on this machine alone")
    options = parser.parse_args(arguments)
    try:
        if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
            raise SetupError(
                f"{PYTHON_RANGE} is needed, {sys.executable} is {sys.version.split()[0]}: choose one with PYTHON=..."
            )
        set_up(Path(__file__).resolve().parents[1], options.lint, options.bench)
    except KeyboardInterrupt:
        print("cnnkern: set-up interrupted; the next call goes on from here", file=sys.stderr)
        return 130
    except (SetupError, OSError) as error:
        reason = diagnose(str(error)) if isinstance(error, OSError) else str(error)
        print(f"cnnkern: {' '.join(reason.split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
