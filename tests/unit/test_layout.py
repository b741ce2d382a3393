"""The order of the folders: imports point downwards, modules form no circles, and the roots stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("protocol", "plm_owner_server", "data_owner_client")
BESIDE = ("tests", "benchmarks", "demo", "harness")
# From top to bottom: a folder or module may import from those below it.
ORDER = {
    "plm_owner_server": (
        *("cli", "transports", "admission", "tenants", "operations", "service", "engines"),
        *("settings", "setting_values", "logs"),
    ),
    "data_owner_client": (
        *("cli", "gateway", "evaluation", "training", "decoding", "adapter"),
        *("memory", "scoring", "data", "plm", "runtime"),
    ),
}
# Which of our packages each may import from, beside itself.
MAY_IMPORT = {
    "protocol": set[str](),
    "plm_owner_server": {"protocol"},
    "data_owner_client": {"protocol"},
    "harness": {*SHIPPED},
    "demo": {*SHIPPED, "harness"},
    "benchmarks": {*SHIPPED, "harness"},
    "tests": {*SHIPPED, "harness"},
}
# Tests of what a package beside the shipped ones does.
ABOUT = dict.fromkeys((f"tests.unit.test_{name}" for name in ("gpu", "soak", "weights", "sensitivity")), "benchmarks")
MOST_ENTRIES = 11
NO_ENTRIES = {"__init__.py", "py.typed", "__pycache__"}


@cache
def modules(package: str) -> dict[str, Path]:
    """Source files of a package by module name."""
    paths = (ROOT / package).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports(package: str) -> dict[str, frozenset[str]]:
    """Names of our modules that each module of a package imports, also under TYPE_CHECKING or in a function."""
    return {name: frozenset(_imported(name, path)) for name, path in modules(package).items()}


def _imported(name: str, path: Path) -> Iterator[str]:
    ours = {module for package in (*SHIPPED, *BESIDE) for module in modules(package)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ours)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in ours:
                    yield inner
                elif source in ours:
                    yield source


def folder_of(module: str) -> str:
    """The folder or module at its package's root that a module belongs to; empty for the root itself."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down(package: str) -> None:
    order = {name: level for level, name in enumerate(ORDER[package])}
    assert {folder_of(module) for module in modules(package)} <= {*order, ""}, "a folder that the order does not have"
    wrong = [
        f"{module} imports {other}"
        for module, others in imports(package).items()
        for other in others
        if other.split(".")[0] == package
        and folder_of(module) != folder_of(other)
        and folder_of(module)  # the package's root offers what is below it
        and (not folder_of(other) or order[folder_of(other)] < order[folder_of(module)])
    ]
    assert not wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_what_they_may(package: str) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports(package).items()
        for other in others
        if (source := other.split(".")[0]) != package
        and source not in MAY_IMPORT[package]
        and ABOUT.get(module) != source
    ]
    assert not wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_modules_form_no_circle(package: str) -> None:
    graph = {name: {other for other in others if other != name} for name, others in imports(package).items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", ORDER)
def test_roots_have_few_entries(package: str) -> None:
    entries = {path.name for path in (ROOT / package).iterdir() if path.name not in NO_ENTRIES}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    assert {Path(name).stem for name in entries} <= {*ORDER[package]}
