"""What people write into a study, checked against what is there; one sentence says what to change.

In: a path, a column or a value of a params file, or an error of a library that reads a file. Out: the path or table; or
a `UserError`.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from tuneformer import paths
from tuneformer.artifacts import UserError

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
MAKE_VARIABLES = ("DATA", "LABEL")  # what make hands on to params/own_data.yaml
UNREADABLE = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError)


@contextmanager
def explained(what: object, form: str, remedy: str) -> Iterator[None]:
    """Turn an error of a library that reads a file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. ")[:200]
        msg = f"{what} could not be read as {form} ({reason}); {remedy}."
        raise UserError(msg) from error


def expanded_path(key: str, written: str, remedy: str = "a file that does, or to null") -> Path:
    """Return a path that the params file states for `key`; an unset $VARIABLE, or nothing there, is a UserError."""
    refuse_unset(key, written)
    path = paths.user_path(written)
    if not path.exists():
        msg = f"{key}: {path} does not exist; set it to {remedy}."
        raise UserError(msg)
    return path


def refuse_unset(key: str, written: str) -> None:
    """Raise if the value of a parameter names a $VARIABLE that is not set, or empty."""
    unset = [name for pair in VARIABLE.findall(written) for name in pair if name and not os.environ.get(name)]
    if unset:
        remedy = f"type export {unset[0]}=/folder/of/the/data before you start"
        if unset[0] in MAKE_VARIABLES:
            remedy = "say it to make, as in make report STUDY=own_data DATA=cells.h5ad LABEL=celltype"
        what = "name" if key == "label" else "path"
        msg = (
            f"{key}: {written} needs the variable {unset[0]}, which is not set; {remedy}, or write the whole {what} "
            "into the params file."
        )
        raise UserError(msg)


def require_column(obs: pd.DataFrame, key: str, column: str | None) -> None:
    """Raise a `UserError` if a key names an obs column that is not there."""
    if column is not None and column not in obs:
        refuse_unset(key, column)
        remedy = nearest(column, obs.columns)
        if obs.columns.empty:
            remedy = "there are none at all: set obs_table to a csv or tsv with one, cell names in the first column"
        msg = f"{key}: the cells have no obs column {column!r}; {remedy}."
        raise UserError(msg)


def require_values(key: str, wanted: Iterable[str], column: str, values: pd.Series, when: str = "") -> None:
    """Raise a `UserError` if a key names a value that no cell has."""
    present = sorted(values.unique())
    for value in wanted:
        if value not in present:
            msg = f"{key}: no cell has {value!r} in obs column {column!r}{when}; {nearest(value, present)}."
            raise UserError(msg)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "choose one of ..." with a hint at the choice most like `name`, for error messages."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    shown = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f"choose one of: {shown or 'none, there is no other'}{hint}"


def read_table(key: str, path: Path, **options: object) -> pd.DataFrame:
    """Read a csv, or a tsv where the name says so (.tsv, .txt), also gzipped; what is no table is a UserError."""
    separator = "\t" if {".tsv", ".txt"} & set(path.suffixes) else ","
    with explained(f"{key}: {path}", "a table", "write it as csv or tsv with a header"):
        return pd.read_csv(path, sep=separator, **options)
