"""The package as a whole: imports go one way, files are short, every module and public object says what it is for."""

import ast
import graphlib

import pytest

from tuneformer import paths

PACKAGE = paths.ASSETS.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ORDER = ["study", "data", "tokens", "cells", "model", "evaluate", "report"]  # each imports itself and those before it
BELOW = {
    "artifacts",
    "cluster",
    "keys",
    "paths",
    "params",
    "arms",
    "study",
}  # modules of the first part, which are in no folder
ABOVE = {"batch", "run"}  # start what a user asked for, and are imported by none
NAMED_BY_STUDIES = ("keys", "model.strategies")  # so that a new strategy is written in one place; it imports no torch
LONGEST = 400  # lines of a file
SHORTER = {"study": 300, "arms": 300, "keys": 300, "params": 300}


def name_of(module):
    """Return the name of a module below the package: ``data.splits``, or ``data`` for its ``__init__``."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name):
    """Return the part of the package that a module belongs to."""
    first = name.split(".")[0]
    return "study" if first in BELOW else first


def imported(tree, known):
    """Return the modules of the package that a module imports, wherever in it the import is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for types only: nothing is imported when it runs
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tuneformer":
            module = node.module.removeprefix("tuneformer").removeprefix(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".removeprefix(".")
                yield whole if whole in known else module
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("tuneformer.")]
            yield from (name.removeprefix("tuneformer.") for name in names)


def parsed(module):
    return ast.parse(module.read_text(encoding="utf-8"))


KNOWN = {name_of(module) for module in MODULES}
GRAPH = {name_of(module): set(imported(parsed(module), KNOWN)) - {name_of(module), ""} for module in MODULES}


def test_the_parts_are_those_of_the_order():
    assert {part_of(name) for name in KNOWN if name} == {*ORDER, *ABOVE}


@pytest.mark.parametrize("name", sorted(KNOWN - {""}))
def test_imports_go_one_way(name):
    if part_of(name) not in ABOVE:
        allowed = ORDER[: ORDER.index(part_of(name)) + 1]
        others = {other for other in GRAPH[name] if (name, other) != NAMED_BY_STUDIES}
        assert {other for other in others if part_of(other) not in allowed} == set()
    assert GRAPH[name] <= KNOWN


def test_no_modules_import_each_other_in_a_circle():
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the circle


def test_the_check_of_imports_sees_them():
    text = """
import tuneformer.data.splits
from tuneformer import __version__, paths
from tuneformer.tokens.encode import encode
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from tuneformer.report import page
def late():
    from tuneformer.model import fit
"""
    found = set(imported(ast.parse(text), {"paths", "model.fit"}))
    assert found == {"data.splits", "", "paths", "tokens.encode", "model.fit"}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_module_is_short_and_says_what_it_is_for(module):
    docstring = ast.get_docstring(parsed(module))
    assert docstring
    assert docstring.split("\n")[0].endswith((".", ":"))
    assert len(module.read_text(encoding="utf-8").splitlines()) <= SHORTER.get(name_of(module), LONGEST)
    assert not [node for node in ast.walk(parsed(module)) if isinstance(node, ast.ImportFrom) and node.level]


def test_nothing_is_bound_to_one_kind_of_hardware():
    for module in MODULES:
        assert ".cuda()" not in module.read_text(encoding="utf-8"), module
