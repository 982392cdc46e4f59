"""Pickles from other people, read without running anything that they may carry.

In: a pickle file. Out: its dictionaries, lists, text and numbers; or a `PickleError` that names what else it holds.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import scalar as numpy_scalar

PLAIN = (str, int, float, bool, type(None))


class PickleError(ValueError):
    """A pickle that is damaged, or holds more than text and numbers; the message says where and what."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds what the pickle language has of its own, and numpy scalars; nothing else is imported."""

    allowed = {  # noqa: RUF012 (read only)
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "scalar"): numpy_scalar,
        ("numpy._core.multiarray", "scalar"): numpy_scalar,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the allowed constructors; refuse any other without importing it."""
        if (module, name) not in self.allowed:
            msg = f"it asks for {module}.{name}, and only text and numbers are read from a pickle"
            raise pickle.UnpicklingError(msg)
        return self.allowed[module, name]


def read_pickle(path: Path) -> Any:
    """Read a pickle of dict, list, str, int, float, bool, None and numpy scalars, without running what it may carry.

    Raises
    ------
    PickleError
        The file is damaged or holds anything else; the message names the first such thing.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            content = _PlainUnpickler(handle).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        msg = f"{path} was not read as a pickle of text and numbers: {error}; take the file from its own source."
        raise PickleError(msg) from error
    _refuse_others(path, content)
    return content


def _refuse_others(path: Path, content: Any) -> None:
    """Walk through dictionaries and lists, each once, as one may contain itself."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if type(value) in PLAIN or (isinstance(value, np.generic) and value.dtype.kind in "biufU"):
            continue
        if type(value) not in (dict, list):
            msg = (
                f"{path} holds a {type(value).__name__}, and only dict, list, text and numbers are read from a pickle; "
                "take the file from its own source."
            )
            raise PickleError(msg)
        if id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.keys(), *value.values()] if type(value) is dict else value
