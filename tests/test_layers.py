"""The arrows between the rooms of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "diffperception"

# What each room may import of the others; rooms are the folders and the files at the top of the package.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "files": set(),
    "devices": set(),
    "echo": {"devices"},
    "table": set(),
    "memory": set(),
    "doctor": {"memory"},
    "configuration": {"files"},
    "resumable": {"files", "devices", "echo", "configuration"},
    "diffusion": set(),
    "models": {"diffusion", "files", "devices"},
    "data": {"files", "devices", "table"},
    "visualization": {"files", "data"},
}
BESIDE = {"files", "devices", "echo", "table", "doctor", "configuration", "resumable", "data", "visualization"}
TASKS = {"detection", "generation", "segmentation"}
for task in TASKS:
    ALLOWED[task] = {*BESIDE, "models", "diffusion"}
ALLOWED["training"] = {*BESIDE, *TASKS, "models", "diffusion"}
ALLOWED["benchmarks"] = {*ALLOWED["training"], "training"}
ALLOWED["cli"] = {*ALLOWED["benchmarks"], "benchmarks", "memory"}
ALLOWED["integrations"] = {*ALLOWED["cli"], "cli"}
CORE_LIBRARIES = {"torch", "numpy"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it."""
    names = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names |= {".".join([*above, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def rooms_used(names: set[str]) -> set[str]:
    """Rooms among imported names; `from diffperception import __version__` uses none."""
    inside = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
    return {name for name in inside if (ROOT / PACKAGE / name).is_dir() or (ROOT / PACKAGE / f"{name}.py").is_file()}


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_rooms_import_only_along_the_arrows(path):
    assert room(path) in ALLOWED, "a new room: say above what it may import"
    forbidden = rooms_used(imports(path)) - ALLOWED[room(path)] - {room(path)}
    assert not forbidden, f"{room(path)} must not import {', '.join(sorted(forbidden))}"


def test_the_arrows_have_no_circle():
    left = dict(ALLOWED)
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"a circle among {', '.join(left)}"
        left = {name: used for name, used in left.items() if name not in free}


def test_only_training_imports_lightning():
    users = {room(path) for path in FILES if {name.split(".")[0] for name in imports(path)} & LIGHTNING}
    assert users <= {"training"}


def test_the_core_needs_torch_and_numpy_alone():
    used = {name.split(".")[0] for path in FILES if room(path) == "diffusion" for name in imports(path)}
    assert used - sys.stdlib_module_names - {PACKAGE} <= CORE_LIBRARIES


def test_tools_hold_nothing_but_a_call_of_the_command():
    for path in (ROOT / "tools").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
        assert outside == {PACKAGE}, path
        assert rooms_used(imports(path)) == {"cli"}, path


def test_a_turned_arrow_is_seen(tmp_path, monkeypatch):
    """The checks above see imports in functions, relative ones, and those of several names."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for name in ("models", "detection", "data", "diffusion"):
        (tmp_path / PACKAGE / name).mkdir(parents=True)
    file = tmp_path / PACKAGE / "models" / "x.py"
    file.write_text(
        "from ..detection import boxes\nfrom diffperception import data, __version__\n"
        "def f():\n    import diffperception.diffusion.schedule as s\n"
    )
    assert rooms_used(imports(file)) == {"detection", "data", "diffusion"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (PACKAGE, {"torch", "numpy"}),
        (f"{PACKAGE}.cli.main", {"torch", "numpy", "jsonargparse"}),
        (f"{PACKAGE}.training", {"torch", *LIGHTNING}),
        (f"{PACKAGE}.cli.predict", {"matplotlib", *LIGHTNING}),  # it imports detection and visualization
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not absent & set(loaded.split())


def test_a_public_name_has_one_meaning():
    """Of the classes and functions; every command of one function calls it `command`."""
    bodies = (ast.parse(path.read_text(encoding="utf-8")).body for path in FILES)
    defined = [node.name for body in bodies for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names = [name for name in defined if not name.startswith("_")]
    assert {name for name in names if names.count(name) > 1} == {"command"}
