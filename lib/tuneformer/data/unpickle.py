"""Pickles from other people, read without running anything that they may carry.

In: a pickle file. Out: its dictionaries, lists, text and numbers; or one sentence that names what else it holds.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import scalar as numpy_scalar

from tuneformer.artifacts import UserError

PLAIN = (str, int, float, bool, type(None))
ALLOWED = {
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): numpy_scalar,
    ("numpy._core.multiarray", "scalar"): numpy_scalar,
}


class _PlainUnpickler(pickle.Unpickler):
    """Builds what the pickle language has of its own, and numpy scalars; nothing else is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the allowed constructors; refuse any other without importing it."""
        if (module, name) not in ALLOWED:
            msg = f"it asks for {module}.{name}, and only text and numbers are read from a pickle"
            raise pickle.UnpicklingError(msg)
        return ALLOWED[module, name]


def read_pickle(path: Path) -> Any:
    """Read a pickle of dict, list, str, int, float, bool, None and numpy scalars, without running what it may carry.

    Raises
    ------
    UserError
        The file is damaged or holds anything else; the message names the first such thing.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            content = _PlainUnpickler(handle).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        msg = f"{path} was not read as a pickle of text and numbers: {error}; take the file from its own source."
        raise UserError(msg) from error
    waiting, seen = [content], set()
    while waiting:  # dictionaries and lists are visited once each, as one may contain itself
        value = waiting.pop()
        if type(value) in PLAIN or (isinstance(value, np.generic) and value.dtype.kind in "biufU"):
            continue
        if type(value) not in (dict, list):
            msg = (
                f"{path} holds a {type(value).__name__}, and only dict, list, text and numbers are read from a pickle; "
                "take the file from its own source."
            )
            raise UserError(msg)
        if id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.keys(), *value.values()] if type(value) is dict else value
    return content
