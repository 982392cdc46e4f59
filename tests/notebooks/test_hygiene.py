"""The notebooks as documents: same sections, short cells, executed in order, nothing of the machine in them."""

import ast
import re
import subprocess

import nbformat
import pytest

from tuneformer import paths
from tuneformer.study import Study

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
SECTIONS = ["Question", "Parameters", "Data", "Method", "Result", "Record"]
EXERCISES = "Try it"  # may follow
LONGEST_CELL, LONGEST_FUNCTION = 20, 12  # lines
FORBIDDEN = (ast.ClassDef, ast.AsyncFunctionDef, ast.Try, ast.While, ast.Lambda)
LITERALS = (str, int, float, bool, list, type(None))
HOME = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|var|usr|private)/|[A-Z]:\\")


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameter_cells(notebook):
    return [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]


def test_there_are_notebooks_and_each_has_its_number():
    assert len(NOTEBOOKS) >= 5
    numbers = [path.stem.split("_")[0] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in NOTEBOOKS)


def test_it_is_a_valid_notebook_for_any_python_3_kernel(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata


def test_the_sections_are_the_same_in_each(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert found in (SECTIONS, [*SECTIONS, EXERCISES])
    assert len(re.findall(r"^# .+$", text, flags=re.MULTILINE)) == 1


def test_the_parameters_are_one_cell_of_literals_and_come_first(notebook):
    assert parameter_cells(notebook) == code_cells(notebook)[:1]
    statements = ast.parse(parameter_cells(notebook)[0].source).body
    assert statements
    assert all(isinstance(statement, ast.Assign) for statement in statements)
    values = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    assert set(values) <= set(Study.model_fields)
    assert all(isinstance(value, LITERALS) for value in values.values())


def test_the_study_is_resolved_before_anything_is_computed(notebook):
    second = code_cells(notebook)[1].source
    body = ast.parse(second).body
    imports = [statement for statement in body if isinstance(statement, ast.Import | ast.ImportFrom)]
    assert body[: len(imports)] == imports
    assert ast.unparse(body[len(imports)]) == "settings = from_notebook(globals())"


def test_its_cells_are_short(notebook):
    """Loops and short functions show the method; what is longer, or has a second caller, belongs into the package."""
    for cell in code_cells(notebook):
        assert cell.source.strip(), "an empty cell"
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
        nodes = list(ast.walk(ast.parse(cell.source)))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        long = [node for node in functions if node.end_lineno - node.lineno >= LONGEST_FUNCTION]
        found = [*long, *(node for node in nodes if isinstance(node, FORBIDDEN))]
        assert not found, f"belongs into the package: {ast.unparse(found[0])}"


def test_no_function_is_written_twice():
    """One that two notebooks need belongs into the package."""
    names = [
        node.name
        for path in NOTEBOOKS
        for cell in code_cells(nbformat.read(path, as_version=4))
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(set(names)) == len(names)


def test_it_was_executed_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_its_outputs_show_no_error_no_stderr_and_no_path_of_a_machine(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
            texts = (
                [output.text]
                if output.output_type == "stream"
                else [text for kind, text in output.data.items() if not kind.startswith("image/")]
            )
            assert not any(HOME.search(str(text)) for text in texts), cell.source
        assert not HOME.search(cell.source), cell.source


def test_cell_ids_are_stable_and_unique(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


def test_it_is_small_enough_for_git(notebook):
    size = len(nbformat.writes(notebook))
    assert size < 1_500_000, f"{size} bytes; draw fewer points or a smaller figure"


def test_the_path_check_sees_paths():
    assert HOME.search("saved to /home/someone/cells.h5ad")
    assert HOME.search("PosixPath('/root/x')")
    assert not HOME.search("runs/tiny/drug_5class/cells.h5ad https://example.org/home/x a/b/tmp/c")


def test_the_package_is_in_git():
    """A standard Python .gitignore leaves out lib/, and with it the package."""
    listed = subprocess.run(
        ["git", "ls-files", "lib"], cwd=paths.ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "lib/tuneformer/__init__.py" in listed
    assert "lib/tuneformer/study.py" in listed
    ignored = subprocess.run(
        ["git", "check-ignore", *(str(path) for path in (paths.ROOT / "lib").rglob("*.py"))],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
    )
    assert ignored.returncode == 1, ignored.stdout
