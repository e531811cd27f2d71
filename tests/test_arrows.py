"""Imports run one way: which part of the package may import which other, held over every source file."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A part is a folder or a file right below varkern/, and kernels/; each may import itself and what stands beside it.
# "varkern" is the package's own __init__.py, the public names.
ALLOWED = {
    "kernels": set(),
    "copying": set(),
    "errors": set(),
    "extras": set(),
    "hub": set(),
    "cards": {"runs", "tables"},
    "installation": set(),
    "literals": set(),
    "runs": set(),
    "prefetching": set(),
    "progress": set(),
    "published": set(),
    "spec": set(),
    "tables": set(),
    "data": {
        "checks",
        "errors",
        "extras",
        "families",
        "runs",
        "generation",
        "models",
        "ops",
        "prefetching",
        "progress",
        "search",
        "spec",
    },
    "ops": {"kernels", "literals"},
    "models": {"runs", "published"},
    "families": {"errors", "published", "ops", "spec"},
    "fingerprints": {"families", "models"},
    "own_loop": {"checks", "draws", "errors", "families", "generation", "literals", "ops", "search", "spec"},
    "search": {"literals", "ops", "spec"},
    "draws": {"literals", "published", "ops", "spec"},
    "scorer": {"cards", "hub", "runs", "models", "scorer_layers"},
    "scorer_layers": {"ops"},
    "checks": {"errors", "families", "fingerprints", "literals", "search", "spec"},
    "exclusive": {"families"},
    "generation": {"checks", "draws", "exclusive", "families", "literals", "path_loop", "search", "spec"},
    "path_loop": {"families", "search", "spec"},
    "graphs": {"checks", "draws", "families", "generation", "ops", "search", "spec"},
    "lsrs": {"families", "fingerprints", "literals", "scorer", "search", "spec"},
    "patching": {
        "checks",
        "copying",
        "errors",
        "exclusive",
        "families",
        "fingerprints",
        "generation",
        "graphs",
        "literals",
        "lsrs",
        "own_loop",
        "search",
    },
    "varkern": {
        "checks",
        "errors",
        "generation",
        "installation",
        "own_loop",
        "models",
        "ops",
        "patching",
        "path_loop",
        "scorer",
        "search",
    },
    "training": {"cards", "data", "runs", "models", "ops", "prefetching", "progress", "scorer", "tables"},
    "metrics": {"extras", "runs", "prefetching", "progress"},
    "studies": {
        "checks",
        "extras",
        "families",
        "runs",
        "generation",
        "metrics",
        "ops",
        "progress",
        "search",
        "spec",
        "tables",
    },
    "diagnosis": {"ops"},
    "environment": {"diagnosis", "ops", "varkern"},
    "demo": {
        "data",
        "extras",
        "runs",
        "generation",
        "metrics",
        "models",
        "ops",
        "scorer",
        "search",
        "studies",
        "training",
    },
    "cli": {
        "data",
        "demo",
        "environment",
        "extras",
        "hub",
        "runs",
        "metrics",
        "models",
        "patching",
        "progress",
        "scorer",
        "search",
        "studies",
        "training",
        "varkern",
    },
}
FILES = {
    f"varkern.{'.'.join(path.relative_to(folder).with_suffix('').parts)}".removesuffix(".__init__").rstrip("."): path
    for folder, paths in ((ROOT / "varkern", (ROOT / "varkern").rglob("*.py")), (ROOT, (ROOT / "kernels").glob("*.py")))
    for path in paths
} | {"varkern": ROOT / "varkern" / "__init__.py"}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "varkern"


def imported(module: str, path: Path, source: str | None = None) -> set[str]:
    """The modules of varkern that a file imports, wherever in it the import stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            found |= {f"{base}.{n.name}" if f"{base}.{n.name}" in FILES else base for n in node.names}
    return {name for name in found if name.split(".")[0] in ("varkern", "kernels")}


def test_the_table_has_every_part_and_no_circle():
    assert {part_of(module) for module in FILES} == set(ALLOWED)
    assert set().union(*ALLOWED.values()) <= set(ALLOWED)
    TopologicalSorter(ALLOWED).prepare()  # raises for a circle


def test_the_table_keeps_the_houses_arrows():
    """What the design fixes, whatever else is added to the table."""
    above = {part: set(TopologicalSorter(ALLOWED).static_order()) & ALLOWED[part] for part in ALLOWED}
    reached = {}
    for part in TopologicalSorter(ALLOWED).static_order():
        reached[part] = above[part].union(*(reached[other] for other in above[part]))
    assert reached["kernels"] == set() and reached["ops"] == {"kernels", "literals"} and reached["literals"] == set()
    assert "families" not in reached["search"] and "search" not in reached["families"]
    assert not reached["models"] & {"families", "search"}
    assert "patching" not in reached["generation"]
    assert not any("cli" in others for others in reached.values())


def test_imports_run_one_way():
    wrong = {}
    for module, path in FILES.items():
        part = part_of(module)
        others = {part_of(other) for other in imported(module, path)} - {part}
        if not others <= ALLOWED[part]:
            wrong[module] = sorted(others - ALLOWED[part])
    assert not wrong, "these modules import what may not be imported there"


def test_no_arrow_in_the_table_is_unused():
    used = {part: set() for part in ALLOWED}
    for module, path in FILES.items():
        used[part_of(module)] |= {part_of(other) for other in imported(module, path)} - {part_of(module)}
    assert {part: ALLOWED[part] - used[part] for part in ALLOWED if ALLOWED[part] - used[part]} == {}


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("import varkern.ops.philox", "varkern.ops.philox"),
        ("import varkern", "varkern"),
        ("from varkern import generation", "varkern.generation"),
        ("from varkern import BestOfM", "varkern"),
        ("from varkern.search import Candidates", "varkern.search"),
        ("from .base import Session", "varkern.families.base"),
        ("from . import base", "varkern.families.base"),
        ("from ..search import base", "varkern.search.base"),
        ("from .. import spec", "varkern.spec"),
        ("def f():\n    from varkern.cli import main", "varkern.cli"),
        ("import kernels", "kernels"),
    ],
)
def test_every_way_of_importing_is_seen(source, wanted):
    assert imported("varkern.families.var", FILES["varkern.families.var"], source) == {wanted}
