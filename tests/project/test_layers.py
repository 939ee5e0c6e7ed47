"""The layers of the design, read from the sources: who may import whom, and that ray stays in one package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A part imports parts of lower layers, and itself. The files of layer 0 stand in import order.
LAYERS = (
    ("records",),
    ("device", "statistics"),
    ("batch",),
    ("object_store",),
    ("store",),
    ("rundir",),
    ("data", "objectives", "optim", "models"),
    ("train", "evaluate"),
    ("benchmarks", "report"),
    ("serving",),
    ("config",),
    ("settings", "plan", "grid_config"),
    ("flags", "preflight", "dry_run"),
    ("orchestration",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Neighbours in a layer that know each other all the same, and why.
NEIGHBOURS = {
    ("objectives", "models"): "a loss term is a function of models.scoring's log-probabilities",
    ("report", "benchmarks"): "a grid's page shows the grid's cells and statistics",
}
RAY_HOME = "orchestration"


def imported_modules(source: str, *, package: str = "") -> Iterator[str]:
    """Every module that `source` imports, at the top or inside a function, by its absolute name. `package` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if module == "soul")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def part_of(module: str) -> str | None:
    """The part of soul that a dotted name lies in; None outside soul and for soul itself."""
    names = module.split(".")
    return names[1] if names[0] == "soul" and len(names) > 1 else None


def complaints(part: str, source: str, *, package: str = "") -> list[str]:
    """What `source`, a file of the part `part` of soul, imports against the rules."""
    found = []
    for module in imported_modules(source, package=package):
        top, other = module.split(".")[0], part_of(module)
        if top == "ray" and part != RAY_HOME:
            found.append(f"imports {module}: only soul/{RAY_HOME} may")
        if top in ("pipelines", "perf", "tests"):
            found.append(f"imports {module}, which is above soul")
        if other not in RANK:
            continue  # not ours, or a name that soul/__init__.py exports
        if other != part and RANK[other] >= RANK[part] and (part, other) not in NEIGHBOURS:
            found.append(f"imports {module}: {part} is layer {RANK[part]}, {other} is layer {RANK[other]}")
    return found


def soul_files() -> list[Path]:
    return sorted(path for path in (ROOT / "soul").rglob("*.py") if path != ROOT / "soul" / "__init__.py")


def test_every_part_of_soul_has_a_layer() -> None:
    parts = {path.relative_to(ROOT / "soul").with_suffix("").parts[0] for path in soul_files()}
    assert parts <= RANK.keys(), f"give them a layer in {Path(__file__).name}: {sorted(parts - RANK.keys())}"


def test_soul_imports_downwards_only() -> None:
    found = []
    for path in soul_files():
        relative = path.relative_to(ROOT).with_suffix("")
        part = relative.parts[1]
        package = ".".join(relative.parts[:-1])
        found += [f"{relative}.py {text}" for text in complaints(part, path.read_text(), package=package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["pipelines", "perf"])
def test_scripts_leave_ray_to_soul(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module in imported_modules(path.read_text())
        if module.split(".")[0] == "ray"
    ]
    assert not found, "\n".join(found)


def test_soul_itself_imports_nothing_of_ours() -> None:
    assert not [name for name in imported_modules((ROOT / "soul" / "__init__.py").read_text()) if part_of(name)]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("train", "import ray"),
        ("cli", "def main():\n    from ray.train import report\n"),
        ("data", "import importlib\nimportlib.import_module('ray.data')"),
        ("records", "from soul.batch import Batch"),
        ("optim", "def late():\n    import soul.train.loop"),
        ("evaluate", "from soul.train import loop"),
        ("data", "from soul import config"),
        ("report", "from ..cli import main"),
        ("models", "from soul.objectives.terms import nll"),
        ("orchestration", "from pipelines import tofu"),
    ],
)
def test_each_breach_is_seen(part: str, source: str) -> None:
    assert complaints(part, source, package=f"soul.{part}")


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("orchestration", "import ray\nfrom soul.config import RunConfig"),
        ("rundir", "from soul.records import InputError"),
        ("train", "from . import engine\nfrom soul.optim.sophia import SophiaG"),
        ("objectives", "from soul.models.scoring import AnswerLogps"),
        ("cli", "from soul import __doc__\nimport raylib"),
    ],
)
def test_what_is_allowed_passes(part: str, source: str) -> None:
    assert not complaints(part, source, package=f"soul.{part}")
