"""Which releases of torch the package works with: tries it beside each, and writes the table of docs/install.md.

    python3 tools/matrix.py                     every release below
    python3 tools/matrix.py 2.9 2.11:3.12       these alone, the second with another Python; other rows stay
    python3 tools/matrix.py --pure              the wheel without an extension alone, which needs no compiler
    python3 tools/matrix.py --cuda 2.11 2.15    builds the CUDA kernels too, from 2.11 on; they are not run

For each release a new environment outside the repository. In it, in a process each, a model that is converted,
compiled, exported, trained for an epoch: first with the wheel that has no extension, then with the extension, built
there from a copy of the checkout, together with operators' tests. That takes minutes and about 5 GB of disk a release,
which are given back; uv, where it is on the path, shares the files between them. Prints what failed, and ends with
status 1 if anything did.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elsewhere import (
    BUILD,
    ROOT,
    RUN,
    Failed,
    build_wheel,
    copy_sources,
    install_wheel,
    nvcc_for,
    processor_time,
    run,
    say,
    with_torch,
)

DOCUMENT = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- matrix: written by tools/matrix.py -->", "<!-- end of matrix -->"
# The oldest Python that a release has, the newest that it shares with most, and what lies between.
RELEASES = {
    "2.9": "3.10",
    "2.10": "3.13",
    "2.11": "3.12",
    "2.12": "3.12",
    "2.13": "3.11",
    "2.14": "3.11",
    "2.15": "3.13",
}
TESTS = "arrive_in_any_layout or memory_format or empty_batch or opcheck"
NEEDED = ("pytest", "hypothesis", "scikit-learn")
COLUMNS = ("torch", "Python", "triton", "without extension", "build, CPU time", "operators' tests", "with extension")

MODEL = """
import torch
from torch import nn
import cnnkern
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.SiLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)
x = torch.randn(4, 1, 8, 8)
"""
STEPS = {
    "convert": """
fused = cnnkern.convert(model, verify=x)
fused(x).square().mean().backward()
assert all(p.grad is not None for p in model.parameters())
assert cnnkern.conversion_report(fused).counts, cnnkern.conversion_report(fused)
folded = cnnkern.fold(fused.eval())
torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-5)
""",
    "compile": """
fused = cnnkern.convert(model)
compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")  # as Inductor traces it, and no compiler behind
torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
compiled(x).square().mean().backward()
assert all(p.grad is not None for p in model.parameters())
with torch.no_grad():
    fused.eval()
    torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), fused(x), rtol=1e-4, atol=1e-5)
""",
    "export": """
fused = cnnkern.convert(model.eval())
program = torch.export.export(fused, (x,))
assert "cnnkern" not in str(program.graph), program.graph
torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
with cnnkern.keep_operators():
    kept = torch.export.export(fused, (x,))
assert "cnnkern" in str(kept.graph), kept.graph
""",
    "train": """
from sklearn.datasets import load_digits
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
fused = cnnkern.convert(model)
optimizer = torch.optim.SGD(fused.parameters(), lr=0.1, momentum=0.9)
losses = []
for batch in torch.randperm(len(images)).split(16):
    loss = nn.functional.cross_entropy(fused(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
first, last = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
assert last < 0.7 * first, (first, last)
""",
}
VERSIONS = """
import platform, torch
from importlib import metadata
names = {d.metadata["Name"]: d.version for d in metadata.distributions()}
print(torch.__version__, platform.python_version(), names.get("triton", "none"))
"""


def operators_tests(python: Path) -> str:
    """The verdict of some of the operators' tests on the installed package."""
    folder = python.parents[1]
    script = "import sys, cnnkern, pytest; assert cnnkern.__file__.startswith(sys.prefix); sys.exit(pytest.main())"
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-q", "--tb=line"]
    # Warnings are errors with the pinned torch alone: others have deprecations of their own.
    options += ["--rootdir", folder, "-o", "pythonpath=", "-W", "default", "-k", TESTS, ROOT / "tests/test_battery.py"]
    try:
        said = run(python, "-c", script, *options, cwd=folder).stdout
    except Failed as error:
        said = str(error)
    counted = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error)", said[-300:])}
    if not counted.get("passed"):
        raise Failed(f"no test has passed: {said}")
    wrong = counted.get("failed", 0) + counted.get("error", 0)
    if wrong:
        say(said)
    return f"{wrong} of {counted['passed'] + wrong} fail" if wrong else f"{counted['passed']} pass"


def steps(python: Path, eager: bool) -> str:
    """Which of STEPS work on the installed package, which is to have CPU kernels or not; says why others do not."""
    folder, fail = python.parents[1], []
    check = f"found = cnnkern.backends.kernels_on('cpu')\nassert (found == 'eager PyTorch') is {eager}, found\n"
    for name, text in STEPS.items():
        try:
            run(python, "-W", "ignore", "-c", MODEL + check + text, cwd=folder)
        except Failed as error:
            say(f"{name}: {error}")
            fail.append(name)
    return f"{', '.join(fail)} {'fails' if len(fail) == 1 else 'fail'}" if fail else "works"


def built(python: Path, scratch: Path, cuda: bool) -> list[str]:
    """What the table says of the extension."""
    begin = processor_time()
    try:
        sources = copy_sources(scratch / "source")
        wheel = build_wheel(python, sources, scratch / "dist", CNNKERN_CUDA=str(int(cuda)), CNNKERN_EXTENSION="1")
    except Failed as error:
        say(str(error))
        return ["fails", "", ""]
    seconds = processor_time() - begin
    install_wheel(python, wheel)
    say(f"  built in {seconds:.0f} s of processor time; trying it")
    try:
        tests = operators_tests(python)
    except Failed as error:
        say(str(error))
        tests = "fail"
    return [f"{seconds:.0f} s{', with CUDA' if cuda else ''}", tests, steps(python, eager=False)]


def found(release: str, python: str, pure: bool, cuda: bool, old: list[str]) -> Iterator[list[str]]:
    """The line of the table as soon as the wheel without an extension is tried, and once more when the extension is,
    as its build takes long and may be broken off; what is not tried is as it was. Raises Failed where there is no
    environment to try it in."""
    if cuda and not nvcc_for(release):
        raise Failed("PyPI has no CUDA compiler for it")
    with tempfile.TemporaryDirectory(prefix=f"cnnkern-torch-{release}-") as folder:
        scratch = Path(folder)
        say(f"torch {release}, Python {python}: installing")
        nvcc = nvcc_for(release) if cuda else ()
        there = with_torch(scratch / "venv", release, python, *BUILD, *RUN, *NEEDED, *nvcc)
        versions = run(there, "-c", VERSIONS, cwd=scratch).stdout.split()
        wheel = build_wheel(there, copy_sources(scratch / "pure"), scratch / "pure-dist", CNNKERN_EXTENSION="0")
        install_wheel(there, wheel)
        say("  trying the wheel without an extension")
        line = [*versions, steps(there, eager=True)]
        yield [*line, *(old[4:] or ["not tried"] * 3)]
        if not pure:
            yield [*line, *built(there, scratch, cuda)]


def rows_of(text: str) -> dict[str, list[str]]:
    """The table in a document, by the release of torch. Raises Failed where it has no place for one."""
    if BEGIN not in text or END not in text:
        raise Failed(f"{DOCUMENT.name} has no lines {BEGIN} and {END}")
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {release_of(row[0]): row for row in cells}


def release_of(version: str) -> str:
    return ".".join(version.split(".")[:2])


def with_rows(text: str, rows: dict[str, list[str]]) -> str:
    """The document with this table, in the order of the releases."""
    ordered = sorted(rows.items(), key=lambda item: [int(part) for part in item[0].split(".")])
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row for _, row in ordered)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="*", metavar="TORCH[:PYTHON]", help=f"of {', '.join(RELEASES)}")
    built = parser.add_mutually_exclusive_group()
    built.add_argument("--pure", action="store_true", help="try the wheel without an extension alone")
    built.add_argument("--cuda", action="store_true", help="build the CUDA kernels too, which takes much longer")
    options = parser.parse_args(argv)
    asked = {t.partition(":")[0]: t.partition(":")[2] for t in options.torch} or dict.fromkeys(RELEASES, "")
    failed = False
    for release, python in asked.items():
        chosen = python or RELEASES.get(release, ".".join(platform.python_version_tuple()[:2]))
        try:
            old = rows_of(DOCUMENT.read_text()).get(release, [])
            for line in found(release, chosen, options.pure, options.cuda, old):
                text = DOCUMENT.read_text()  # others write into it meanwhile
                DOCUMENT.write_text(with_rows(text, {**rows_of(text), release: line}))
                say(" | ".join(line))
        except (Failed, OSError) as error:
            print(f"cnnkern: torch {release}: {error}", file=sys.stderr)
            failed = True
            continue
        failed = failed or any("fail" in cell for cell in line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
