"""Gene names: which are Ensembl identifiers, which are of mouse, and which identifier belongs to a symbol.

In: the names that a data set has for its genes, and the folder of a checkpoint with Geneformer's dictionary of gene
names. Out: Ensembl identifiers where there is one, and a report of how many there are.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tuneformer.data.pickles import read_pickle

DICTIONARY = "gene_name_id_dict*.pkl"
ENSEMBL = re.compile(r"^ENS([A-Z]*)G[0-9]{11}(\.[0-9]+)?(_PAR_Y)?$")
MOUSE_SYMBOL = re.compile(r"^(mt-)?[A-Z][a-z][A-Za-z0-9.-]*$")  # Gapdh, mt-Nd1; human symbols are capitals: GAPDH
MOST = 0.5  # of the names have to be of a kind before all are taken to be


@dataclass(frozen=True)
class SymbolReport:
    """How symbols were mapped: ``given``, ``mapped`` and ``already`` (Ensembl identifiers among them), in genes."""

    given: int
    mapped: int
    already: int

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.mapped:,} of {self.given:,} to Ensembl identifiers"


def to_ensembl(symbols: Iterable[str], folder: Path) -> tuple[np.ndarray, SymbolReport]:
    """Replace gene symbols by the Ensembl identifiers that Geneformer's dictionary has for them.

    A symbol is looked up as it is, and else in capitals (no two symbols of the official dictionaries differ in case
    only). A name that is an Ensembl identifier stays, and so does a symbol that is not found: its counts belong to the
    total of a cell.

    Parameters
    ----------
    symbols
        Gene symbols, (genes,).
    folder
        Folder of a checkpoint with ``gene_name_id_dict*.pkl`` (Geneformer V1: gc30M; V2: gc104M).

    Returns
    -------
    Identifiers, (genes,), of which several can be the same; and how many were mapped.

    Raises
    ------
    FileNotFoundError
        The folder has no such dictionary.
    PickleError
        The dictionary is damaged.
    """
    known = read_names(folder)
    in_capitals = {name.upper(): gene for name, gene in known.items()}
    symbols = np.asarray(list(symbols), dtype=object)
    found = [known.get(name) or in_capitals.get(name.upper()) for name in symbols]
    ids = np.array([gene or name for gene, name in zip(found, symbols, strict=True)], dtype=str)
    already = int(sum(gene is None and bool(ENSEMBL.match(name)) for gene, name in zip(found, symbols, strict=True)))
    return ids, SymbolReport(given=len(symbols), mapped=int(sum(gene is not None for gene in found)), already=already)


def read_names(folder: Path) -> dict[str, str]:
    """Read the dictionary of gene symbol to Ensembl identifier of a checkpoint; see `to_ensembl`."""
    found = dictionary_of(folder)
    if found is None:
        msg = f"{folder} has no {DICTIONARY}; copy Geneformer's dictionary of gene names into it."
        raise FileNotFoundError(msg)
    return read_pickle(found)


def dictionary_of(folder: Path) -> Path | None:
    """Return the dictionary of gene names in the folder of a checkpoint; None where there is none."""
    return next(iter(sorted(Path(folder).glob(DICTIONARY))), None)


def are_ensembl(names: pd.Series) -> bool:
    """Return whether at least half of the names are Ensembl gene identifiers, with or without version."""
    return bool(len(names)) and names.astype(str).str.match(ENSEMBL).mean() >= MOST


def foreign_species(ids: Iterable[str], symbols: Iterable[str]) -> tuple[str, str] | None:
    """Say of which species the genes are, if most of them are not human ones.

    Ensembl identifiers tell (ENSMUSG...: mouse); without them, symbols in mixed case (Gapdh, mt-Nd1) are those of mouse
    or rat.

    Returns
    -------
    Species and the first gene by which it was recognised; None for human genes and for names that tell nothing.
    """
    ids, symbols = (pd.Series(list(names), dtype=str) for names in (ids, symbols))
    species = ids.str.extract(ENSEMBL)[0].dropna()
    if len(species) >= MOST * len(ids):
        foreign = species[species != ""]
        if len(foreign) <= MOST * len(species):
            return None
        return ("mouse" if foreign.iloc[0] == "MUS" else "another species", ids[foreign.index[0]])
    mouse = symbols[symbols.str.match(MOUSE_SYMBOL)]
    return ("mouse or rat", mouse.iloc[0]) if len(mouse) > MOST * len(symbols) else None
