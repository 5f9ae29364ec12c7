"""ops <- pipelines <- jobs, and no arrow back: read off the imports of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "ops": {"ray", "mlflow", "pipelines", "jobs", "logging", "webdataset"},
    "pipelines": {"mlflow", "jobs"},
    "jobs": set(),
}
# The packages of pipelines/ in the order in which data flow: each imports from those before it only.
PACKAGES = ("runs", "corpus", "curation", "neighbors", "training", "evaluation", "confusion", "report", "planning")
MODULES = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    """pipelines.report.page"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Full names of what a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_layer_imports_nothing_of_the_layers_above(path):
    tops = {name.partition(".")[0] for name in imported(path)}
    assert not tops & FORBIDDEN[name_of(path).partition(".")[0]]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_from_those_before_it(package):
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    for path in (ROOT / "pipelines" / package).glob("*.py"):
        entered = {name.split(".")[1] for name in imported(path) if name.startswith("pipelines.")}
        assert not entered & set(later), f"{path}: {entered & set(later)}"


def test_every_package_has_its_place_in_that_order():
    assert {path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_cupy_is_imported_in_one_place(path):
    if path.name != "arrays.py":
        assert not {name for name in imported(path) if name.startswith("cupy")}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_re_export_nothing(package):
    assert not imported(ROOT / package / "__init__.py")


def test_of_a_command_only_main_is_imported():
    shared = {
        "command",
        "options",
        "session",
        "tracking",
        "mlflow_process",
        "stage_command",
        "stages",
        "hardset",
        "__init__",
    }
    commands = {path.stem for path in (ROOT / "jobs").glob("*.py")} - shared
    for path in MODULES:
        inside = {name for name in imported(path) if name.startswith(tuple(f"jobs.{c}." for c in commands))}
        assert all(name.endswith(".main") for name in inside), f"{path}: {inside}"
