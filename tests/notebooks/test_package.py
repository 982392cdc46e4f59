"""The package as a whole: imports go one way, every module and public object says what it is for."""

import ast

import pytest

from tuneformer.study import paths

ORDER = ["study", "data", "tokens", "trainsets", "finetune", "evaluate", "report"]
PACKAGE = paths.ASSETS.parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def imported_parts(tree):
    """Return the parts of the package that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tuneformer":
            names = [node.module] if "." in node.module else [f"tuneformer.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("tuneformer.")]
        else:
            continue
        yield from (name.split(".")[1] for name in names)


def test_the_parts_are_those_of_the_order():
    parts = {path.parent.name for path in MODULES if path.parent != PACKAGE}
    assert parts <= set(ORDER)
    assert {"study", "data", "tokens", "finetune", "evaluate", "report"} <= parts


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    if module.parent == PACKAGE:
        assert not list(imported_parts(tree))
        return
    allowed = ORDER[: ORDER.index(module.parent.name) + 1]
    assert set(imported_parts(tree)) <= set(allowed)


def test_the_check_of_imports_sees_them():
    tree = ast.parse("import tuneformer.data.splits\nfrom tuneformer import report\nfrom tuneformer.tokens.x import y")
    assert set(imported_parts(tree)) == {"data", "report", "tokens"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_for(module):
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.split("\n")[0].endswith((".", ":"))


def test_nothing_is_bound_to_one_kind_of_hardware():
    for module in MODULES:
        assert ".cuda()" not in module.read_text(encoding="utf-8"), module
