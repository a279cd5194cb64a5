"""Plants faults in the CPU kernel one at a time, builds, and expects the battery to turn red.

`python tests/faults.py [NAME ...]`, all of them without a name.

Not collected by pytest: each fault costs a build of its own. Works on a copy of the tree in a temporary folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAULTS = {  # name -> file of csrc/cpu, what stands there, what is put there
    "wrong term in backward": (
        "batch_norm.h",
        "const double slope = -r * r * centered_sum / n;",
        "const double slope = -r * centered_sum / n;",
    ),
    "a skipped tail element": (
        "planes.h",
        "policy.map(K::broadcast(policy, c), i, n);",
        "policy.map(K::broadcast(policy, c), i, n - 1);",
    ),
    "a wrong momentum": (
        "batch_norm.h",
        "mean.set(c, momentum * batch_mean + (1 - momentum) * mean.get(c));",
        "mean.set(c, (1 - momentum) * batch_mean + momentum * mean.get(c));",
    ),
    "a tail left out of the sums": (
        "planes.h",
        "  if (i < end) policy.template term<true>(at, i, end - i, s1, s2);",
        "",
    ),
    "one channel's constants for a vector of two channels": (
        "planes.h",
        "K::joined(at, K::broadcast(policy, c), left)",
        "at",
    ),
    "biased running variance": (
        "batch_norm.h",
        "(static_cast<double>(n) / static_cast<double>(n - 1))",
        "1.0",
    ),
    "no activation in backward": (
        "batch_norm.h",
        "return act.template grad<T>(dy, at::vec::fmadd(centered, at(kCenteredScale), at(kCenteredOffset)));",
        "return dy;",
    ),
    "mean rounded without its remainder": (
        "batch_norm.h",
        "const double lost = std::isfinite(mean) ? mean - center : 0.0;",
        "const double lost = 0.0;",
    ),
    "no second look at a bad shift": (
        "batch_norm.h",
        "if (!sound && !(s1 == 0 && s2 == 0)) std::tie(m, var) = exact_moments(c);",
        "",
    ),
    "a row left out of channels_last sums": (
        "rows.h",
        "  if (i < end) columns(std::integral_constant<int, 1>{}, i, end - i);\n  flush();",
        "  flush();",
    ),
    "pieces whose sums depend on the number of threads": (
        "rows.h",
        "std::clamp<int64_t>(numel / kSerial, 1, 64);",
        "std::clamp<int64_t>(numel / kSerial, 1, 16 * at::get_num_threads());",
    ),
    "a mask byte overwritten by its other half": (
        "bits.h",
        "__atomic_fetch_or(p, static_cast<uint8_t>(shifted), __ATOMIC_RELAXED);",
        "*p = static_cast<uint8_t>(shifted);",
    ),
    "a mask read one element off": ("bits.h", "return bits >> (i - 8 * byte);", "return bits >> (i + 1 - 8 * byte);"),
    "the residual's gradient without the mask": (
        "batch_norm.h",
        "vput<kStream>(dresidual + i, g);",
        "vput<kStream>(dresidual + i, vload(dy + i));",
    ),
}


def main() -> int:
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "results", "*.egg-info", "__pycache__")
        )
        environment = {**os.environ, "CNNKERN_CUDA": "0", "PYTHONPATH": str(tree)}
        # One instruction set's copy of the kernels: the faults are in code that all have.
        setup = tree / "setup.py"
        setup.write_text(setup.read_text().replace('platform.machine() in ("x86_64", "AMD64")', "False"))
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        for name in sys.argv[1:] or FAULTS:
            file, right, wrong = FAULTS[name]
            path = tree / "csrc" / "cpu" / file
            text = path.read_text()
            assert text.count(right) == 1, f"{name}: the line to change is not there once"
            path.write_text(text.replace(right, wrong))
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, env=environment, check=True, capture_output=True)
            tests = [
                "tests/test_battery.py",
                "tests/test_numerics.py",
                "-k",
                "not compile and not opcheck and not func",
            ]
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
            path.write_text(text)
            caught = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), "")
            print(f"{'red  ' if done.returncode else 'GREEN'}  {name}: {caught}", flush=True)
            if not done.returncode:
                survived.append(name)
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
