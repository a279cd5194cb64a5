"""Sets up .venv: a virtual environment, the pins of requirements.txt, the extension built in place.

    python3 tools/bootstrap.py           what `make` and `make test` need
    python3 tools/bootstrap.py --bench   what `make bench` needs: no CUDA kernels where there is no GPU to run them
    python3 tools/bootstrap.py --lint    what `make lint` needs: ruff alone

A step runs only where something that it depends on has changed, judged by content, for git changes modification times
at will. What goes wrong is told in one line; everything that pip and the compiler said is in .venv/setup.log.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PYTHONS = ((3, 10), (3, 13))  # also in the Makefile, which looks for one, and in pyproject.toml
PYTHON_RANGE = "Python 3.10 to 3.13"
GB = 1 << 30
SPACE = {"venv": 10 * GB, "pins": GB, "build": GB, "lint": GB // 4}
SOURCES = (".cpp", ".h", ".cu", ".cuh")
SETTINGS = ("CNNKERN_CUDA", "CNNKERN_WERROR", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CC", "CXX", "CFLAGS", "CXXFLAGS")


class SetupError(Exception):
    """One line that says what is wrong and what to do."""


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


logs: set[Path] = set()  # that this call has begun


def condense_pip(line: str) -> str | None:
    if match := re.search(r"(Downloading|Using cached) (\S+?)-(\d[^-]*)-\S+\.whl \((\d\d+[\d.]* MB|\S+ GB)\)", line):
        return f"{match[1].lower()} {match[2]} {match[3]} ({match[4]})"
    if match := re.search(r"Installing collected packages: (.*)", line):
        return f"installing {len(match[1].split(', '))} packages"
    return "no answer from the package index: trying again" if "WARNING: Retrying" in line else None


def condense_build(line: str) -> str | None:
    match = re.search(r"(\[\d+/\d+\]) .* -c (?:\S*?/(?=csrc/))?(\S+)", line)
    capability = re.search(r"-DCPU_CAPABILITY=(\w+)", line)
    return match and f"{match[1]} {match[2]}" + (f" ({capability[1]})" if capability else "")


class Progress:
    """One line per piece of work; on a terminal the last line also counts the seconds."""

    def __init__(self, title: str, usually: str):
        self.said = self.started = time.monotonic()
        self.terminal = sys.stdout.isatty()
        print(f"{title} (usually {usually})", flush=True)

    def show(self, text: str) -> None:
        self.said = time.monotonic()
        print(f"{self.clear()}  [{self.said - self.started:3.0f} s] {text}", flush=True)

    def tick(self) -> None:
        now = time.monotonic()
        if self.terminal:
            print(f"{self.clear()}  [{now - self.started:3.0f} s] ...", end="", flush=True)
        elif now - self.said > 30:
            self.show("still at work")

    def clear(self) -> str:
        return "\r\033[K" if self.terminal else ""


def run_step(
    title: str, usually: str, command: list, log: Path, condense: Callable[[str], str | None], env: dict | None = None
) -> None:
    """Runs `command` with its output in `log`, shows the condensed lines; SetupError says why it failed."""
    progress, lines = Progress(title, usually), queue.Queue()
    log.parent.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # What the user's shell points to must not count as installed in .venv.
        env={k: v for k, v in {**os.environ, **(env or {})}.items() if k not in ("PYTHONPATH", "PYTHONHOME")},
        cwd=log.parents[1],
    )

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output = []
    with process, log.open("a" if log in logs else "w") as file:
        logs.add(log)
        file.write(f"$ {' '.join(map(str, command))}\n")
        while True:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                progress.tick()
                continue
            if line is None:
                break
            output.append(line)
            file.write(line)
            file.flush()
            if short := condense(line):
                progress.show(short)
    failed = process.returncode != 0
    progress.show("failed" if failed else "done")
    if failed:
        raise SetupError(f"{diagnose(''.join(output))}; the whole output is in {log}")


NO_NETWORK = (
    "NewConnectionError|NameResolutionError|Temporary failure in name resolution|Max retries exceeded|ConnectTimeout"
    "|ReadTimeout|Connection refused|Connection reset|Network is unreachable|ProxyError|CERTIFICATE_VERIFY_FAILED"
)


def diagnose(output: str) -> str:
    """What to do about a step that ended with this output, without a line break."""
    if re.search(r"No space left on device|Errno 28\b|Disk quota exceeded", output):
        return "no space left on the disk: free about 10 GB, or clone into a larger file system"
    if re.search(r"Killed signal terminated|cannot allocate memory|virtual memory exhausted", output, re.IGNORECASE):
        return "the compiler ran out of memory: `MAX_JOBS=1 make` compiles one file at a time"
    if re.search(r"Python\.h: No such file", output):
        return "Python.h is missing: `apt-get install python3-dev`, or PYTHON=... for another interpreter"
    if match := re.search(r"^.*?(\S+: (?:fatal )?error: .*|\S+\(\d+\): (?:catastrophic )?error.*)$", output, re.M):
        return f"compiler error: {match[1].strip()}"
    if match := re.search(r"^\s*(cnnkern: .*)$", output, re.M):  # setup.py's own words
        return match[1]
    if re.search(NO_NETWORK, output):
        return (
            "the package index cannot be reached: check the network, proxy and pip's index settings, then run it again"
        )
    if match := re.search(r"No matching distribution found for (\S+)", output):
        return f"the package index has no {match[1]} for this interpreter and machine: try another of {PYTHON_RANGE}"
    if re.search(r"ResolutionImpossible|conflicting dependencies|conflict is caused by", output):
        return "the pins of requirements.txt conflict with each other or with a constraints file (`pip config list`)"
    if re.search(r"No module named '?(pip|ensurepip|venv)\b", output):
        return NO_PIP
    said = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in said if re.match(r"(ERROR|error|\w*Error)\b", line)]
    return (errors or said or ["it said nothing"])[-1]


NO_PIP = "this Python has no pip: `apt-get install python3-pip`, or PYTHON=... for another interpreter"


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
    """`bench`: without CUDA kernels where no GPU runs them. An extension that has them will do for that too."""
    inputs, built = build_inputs(root, venv), extension(root, venv)
    old, new = stamps.values.get("build", {}), {**inputs, "the built extension": built}
    if built and old == new:
        return
    spared = bench and not inputs["CNNKERN_CUDA"] and not has_gpu()
    if spared:
        inputs["CNNKERN_CUDA"] = new["CNNKERN_CUDA"] = "0"
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
    env["CNNKERN_CUDA"] = inputs["CNNKERN_CUDA"]
    stamps.write("build", inputs)
    title = f"Building the extension{', without CUDA kernels as there is no GPU' if spared else ''} ({why})"
    run_step(title, "3-8 minutes from scratch", command, venv.folder / "setup.log", condense_build, env)
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
    parser.add_argument("--bench", action="store_true", help="build no CUDA kernels where there is no GPU")
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
