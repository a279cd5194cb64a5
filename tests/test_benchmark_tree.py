"""The packages of the benchmarks, suite, show and studies: imports have no cycles, and show imports suite."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
# What modules of a room may import from, the package's own files apart.
ALLOWED = {
    "suite": {"suite"},
    "show": {"show", "suite"},
    "studies": {"studies", "suite"},
    "gpu_minutes": {"gpu_minutes", "studies", "suite"},
}


def imports(module: Path) -> set[Path]:
    """The benchmarks' modules that this one imports, wherever in it. All of those imports have to be relative: an
    installed package has another name."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "benchmarks" for name in node.names), module
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] != "benchmarks", f"{module}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            base = module.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in node.names:
                inner, itself = base / f"{name.name}.py", base.with_suffix(".py")
                found.add(inner if inner in MODULES else itself if itself in MODULES else base / "__init__.py")
    return found


def test_imports_have_no_circle():
    order = list(graphlib.TopologicalSorter({m: imports(m) for m in MODULES}).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_downwards_only(room):
    for module in MODULES:
        if module.parts[0] == room:
            strays = {str(m) for m in imports(module) if m.parts[0] not in ALLOWED[room]}
            assert not strays, f"{module} imports {strays}"


def test_every_module_stands_in_a_room():
    assert {m.parts[0] for m in MODULES if len(m.parts) > 1} == set(ALLOWED)
    assert {m.name for m in MODULES if len(m.parts) == 1} == {"__init__.py", "__main__.py", "conftest.py"}
