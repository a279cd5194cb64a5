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
FAULTS = {
    "wrong term in backward": (
        "bn_act.cpp",
        "const double slope = -r * r * centered_sum / n;",
        "const double slope = -r * centered_sum / n;",
    ),
    "a skipped tail element": (
        "batch_norm.h",
        "if (i < n) vstore(out + i, policy.point(at, begin + i, n - i), n - i);",
        "if (i + 1 < n) vstore(out + i, policy.point(at, begin + i, n - i), n - i - 1);",
    ),
    "a tail left out of the sums": (
        "batch_norm.h",
        "if (i < end) policy.template term<true>(at, i, end - i, d1, d2);",
        "",
    ),
    "a wrong momentum": (
        "bn_act.cpp",
        "mean.set(c, momentum * batch_mean + (1 - momentum) * mean.get(c));",
        "mean.set(c, (1 - momentum) * batch_mean + momentum * mean.get(c));",
    ),
    "biased running variance": ("bn_act.cpp", "(static_cast<double>(n) / static_cast<double>(n - 1))", "1.0"),
    "no mask in backward": (
        "bn_act.cpp",
        "return Act::template grad<T>(g, at::vec::fmadd(centered, at(kScale), at(kOffset)));",
        "return g;",
    ),
    "mean rounded without its remainder": (
        "bn_act.cpp",
        "const double lost = std::isfinite(mean) ? mean - center : 0.0;",
        "const double lost = 0.0;",
    ),
    "no second look at a bad shift": (
        "bn_act.cpp",
        "if (!sound && !(s1 == 0 && s2 == 0)) std::tie(m, var) = exact_moments(c);",
        "",
    ),
    "a row left out of channels_last sums": (
        "batch_norm.h",
        "  if (i < end) columns(std::integral_constant<int, 1>{}, i, end - i);\n  flush();",
        "  flush();",
    ),
    "pieces whose sums depend on the number of threads": (
        "batch_norm.h",
        "std::clamp<int64_t>(numel / kSerial, 1, 64);",
        "std::clamp<int64_t>(numel / kSerial, 1, 16 * at::get_num_threads());",
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
