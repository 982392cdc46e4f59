"""Parameter files: YAML without surprises, and what is wrong with a file in one sentence.

In: ``params/<name>.yaml``, or one value from a command line. Out: plain values; ``python -m tuneformer.params`` writes
``params/_base.yaml``, which lists every key with its default, from `tuneformer.keys`.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tuneformer import keys, paths
from tuneformer.artifacts import UserError, write_text

EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may be given only once and 1e-4 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping; refuse a second value for a key."""
        given = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in given:
            if given.count(key) > 1:
                msg = f"the key {key!r} is given {given.count(key)} times; keep one"
                raise UserError(msg)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("!exponent", EXPONENT, list("-+0123456789"))
_Loader.add_constructor("!exponent", lambda loader, node: float(loader.construct_scalar(node)))


def read_value(text: str) -> Any:
    """Read one value as a params file would (``1e-4`` is a number, ``null`` is None); no YAML is a UserError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        msg = f"{text!r} is no value that a params file could hold: {' '.join(str(error).split())}."
        raise UserError(msg) from error


def file_of(name: str) -> Path:
    """Return the file of a study or task; a UserError lists what there is where there is no such file."""
    if not isinstance(name, str) or not re.fullmatch(keys.NAME_PATTERN, name):
        msg = f"{name!r} is not a study name: use at most 64 letters, digits, _ . and -, the first a letter or digit."
        raise UserError(msg)
    path = paths.PARAMS / f"{name}.yaml"
    if not path.is_file():
        available = sorted(file.stem for file in paths.PARAMS.glob("[!_]*.yaml"))
        msg = f"{paths.shown(path)} does not exist.{_near(name, available)} Studies here: {', '.join(available)}."
        raise UserError(msg)
    return path


def read(path: Path) -> dict[str, Any]:
    """Read one parameter file; one that is no UTF-8 YAML, no mapping, or gives a key twice is a UserError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, UserError) as error:
        msg = f"{paths.shown(path)}: {' '.join(str(error).split())}"
        raise UserError(msg) from error
    if not isinstance(content, dict) or not content:
        found = "nothing" if not content else f"a {type(content).__name__}"
        msg = f"{paths.shown(path)}: expected lines of the form `key: value`, found {found}."
        raise UserError(msg)
    return content


def refuse_unknown(content: Iterable[str], where: str, valid: Iterable[str]) -> None:
    """Raise a `UserError` that names the nearest valid key if there is an unknown one."""
    known = [name for name in valid if name != "study"]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            msg = f"{where}: unknown key {name!r}; the nearest valid key is {near[0]!r} (params/_base.yaml lists all)."
            raise UserError(msg)


def require_choice(value: Any, choices: Iterable[str], where: str, what: str) -> None:
    """Raise a `UserError` that lists the choices and the nearest one if `value` is none of them."""
    choices = list(map(str, choices))
    if value not in choices:
        hint = _near(str(value), choices)
        msg = f"{where}: {what} {value!r} is not one of {', '.join(choices)}.{hint}"
        raise UserError(msg)


def require_list(value: Any, where: str, what: str) -> None:
    """Raise a `UserError` unless `value` is a list without repetitions and with at least one value."""
    if not isinstance(value, list):
        msg = f"{where}: {what}: write a list, such as [{value}] (it is {value!r})."
        raise UserError(msg)
    repeated = [one for one in value if value.count(one) > 1]
    if repeated or not value:
        fault = f"names {repeated[0]!r} more than once; keep one" if repeated else "is empty; name at least one"
        msg = f"{where}: {what} {fault}."
        raise UserError(msg)


def base_text() -> str:
    """Return the text of ``params/_base.yaml``: every key with its default and one line on it, section by section."""
    lines = [
        "# Every key of a study, its default and its unit; params/<study>.yaml holds only what differs.",
        "# Written by `make params` from lib/tuneformer/keys.py. Recipe values: the four studies named in the README.",
    ]
    seen: set[str] = set()
    for section in keys.SECTIONS:
        lines += ["", f"# --- {section.__doc__.splitlines()[0].rstrip('.')} ---"]
        for name, field in section.model_fields.items():
            if name in seen:
                continue
            seen.add(name)
            written = yaml.safe_dump(field.default, default_flow_style=True, width=10_000, sort_keys=False)
            value = f"{name}: {written.splitlines()[0]}"
            lines.append(f"{value:<30}# {field.description}" if len(value) < 29 else f"{value}  # {field.description}")
    return "\n".join(lines) + "\n"


def _near(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    write_text(paths.PARAMS / "_base.yaml", base_text())
