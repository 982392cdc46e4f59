"""What starts loads what it uses: each heavy module that is loaded too early costs every job of a batch."""

import json
import subprocess
import sys

import pytest

from tuneformer import paths

BODY = {"torch", "transformers", "peft", "onnx", "onnxruntime", "joblib", "numba"}
ANALYSIS = {"scanpy", "sklearn", "statsmodels.stats", "papermill", "nbconvert", "rfc3987_syntax"}
TABLES = {"numpy", "pandas", "scipy", "anndata", "datasets", "pyarrow", "h5py", "requests", "matplotlib", "seaborn"}


def first_cells(notebook):
    """Return the code of the parameters of a notebook, and of the cell after it, which has the imports."""
    cells = json.loads((paths.NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in [cell for cell in cells if cell["cell_type"] == "code"][:2])


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import tuneformer", BODY | ANALYSIS | TABLES | {"pydantic", "yaml"}),
        ("import tuneformer.study", BODY | ANALYSIS | TABLES),  # Snakemake reads studies at each start
        ("import tuneformer.run", BODY | ANALYSIS | TABLES),  # the job itself happens in the kernel that this starts
        (first_cells("05_finetune_strategies"), BODY | ANALYSIS),
        (first_cells("06_figures"), BODY | {"scanpy", "statsmodels.stats", "papermill"}),
    ],
    ids=["tuneformer", "study", "run", "05", "06"],
)
def test_nothing_heavy_is_loaded_before_it_is_used(code, heavy):
    code += f"\nimport sys; print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.NOTEBOOKS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1] == "[]"
