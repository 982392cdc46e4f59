"""Which genes a model knows: their tokens, their non-zero medians, and other names of the same genes.

In: a checkpoint's folder (``vocabulary.parquet``, or Geneformer's official pickles), or training cells. Out: a
`Vocabulary`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError, atomic_path, key, remembered
from tuneformer.data import counts
from tuneformer.data.unpickle import read_pickle

if TYPE_CHECKING:
    from anndata import AnnData

FILE = "vocabulary.parquet"
SPECIALS_V1 = {"<pad>": 0, "<mask>": 1}
TARGET_SUM = 10_000  # counts of a cell are scaled to this total before medians are taken


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Genes and special tokens of a model.

    ``genes`` has one row per gene, sorted by token: ``ensembl_id``, ``token_id`` and ``median``, which is that of
    count / n_counts x 10,000 over the cells with a count. ``specials`` are the tokens that are not genes: ``<pad>`` and
    ``<mask>``, and in V2 ``<cls>`` and ``<eos>``. ``aliases`` gives the gene for other names of it, in capitals.

    Raises
    ------
    UserError
        A gene or a token occurs twice, a median is not a positive number, or ``<pad>`` or ``<mask>`` is missing.
    """

    genes: pd.DataFrame
    specials: Mapping[str, int]
    aliases: Mapping[str, str]

    def __post_init__(self) -> None:
        """Check that genes and tokens pair off."""
        for name in SPECIALS_V1:
            if name not in self.specials:
                msg = f"The vocabulary has no {name} token; take the token dictionary that belongs to the checkpoint."
                raise UserError(msg)
        tokens = pd.Series([*self.specials.values(), *self.genes["token_id"]])
        for what, values in {"gene": self.genes["ensembl_id"], "token": tokens}.items():
            twice = values[values.duplicated()]
            if len(twice):
                msg = f"The vocabulary has the {what} {twice.iloc[0]} twice; every gene needs one token of its own."
                raise UserError(msg)
        unusable = self.genes[~(np.isfinite(self.genes["median"]) & (self.genes["median"] > 0))]
        if len(unusable):
            first = unusable.iloc[0]
            msg = (
                f"The median of {len(unusable)} genes of the vocabulary is not a positive number (first: "
                f"{first['ensembl_id']}, {first['median']}); take the median dictionary that belongs to the checkpoint."
            )
            raise UserError(msg)

    @property
    def size(self) -> int:
        """Rows that an embedding of these tokens needs: the largest token plus one."""
        return max(*self.specials.values(), *self.genes["token_id"].tail(1)) + 1

    @property
    def begins_with(self) -> tuple[int, ...]:
        """Tokens before the genes of every cell: ``<cls>`` in V2, none in V1."""
        return (self.specials["<cls>"],) if "<cls>" in self.specials else ()

    @property
    def ends_with(self) -> tuple[int, ...]:
        """Tokens after the genes of every cell: ``<eos>`` in V2, none in V1."""
        return (self.specials["<eos>"],) if "<eos>" in self.specials else ()

    @property
    def n_framing(self) -> int:
        """Number of special tokens that every cell has: 2 in V2, none in V1."""
        return len(self.begins_with) + len(self.ends_with)

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change with any gene, token, median, special token or alias."""
        text = self._table().to_csv(index=False, float_format="%.17g")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def resolve(self, ids: pd.Index) -> pd.Index:
        """Name genes as the vocabulary does; an identifier that it does not know stays as it is.

        V2 looks identifiers up in capitals and by their aliases (previous identifiers, symbols), V1 by their aliases
        only and has none in the official files.
        """
        if not self.begins_with:
            return pd.Index([self.aliases.get(name, name) for name in ids])
        known = {name: name for name in self.genes["ensembl_id"]} | dict(self.aliases)
        return pd.Index([known.get(name.upper(), name) for name in ids])

    def codes(self, adata: "AnnData") -> np.ndarray:
        """Return the row of ``genes`` for every gene of `adata`, -1 where the vocabulary does not know it."""
        return pd.Index(self.genes["ensembl_id"]).get_indexer(self.resolve(gene_ids(adata)))

    @classmethod
    def read(cls, folder: Path) -> "Vocabulary":
        """Read ``vocabulary.parquet`` or else the official dictionaries of a checkpoint.

        Official: ``token_dictionary*.pkl``, ``gene_median_dictionary*.pkl`` and, where there is one,
        ``ensembl_mapping_dict*.pkl`` (Geneformer, Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9). Below the
        downloads folder the vocabulary is then kept as ``vocabulary.parquet``.

        A file that is missing, ambiguous or has anything but the table it should is a UserError. What was read is
        remembered until a file changes.
        """
        folder = Path(folder)
        files = sorted(file for pattern in (FILE, "*dict*.pkl") for file in folder.glob(pattern))
        state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return remembered(f"vocabulary {folder}", key(state), lambda: cls._read(folder))

    @classmethod
    def _read(cls, folder: Path) -> "Vocabulary":
        if (folder / FILE).is_file():
            return cls._from_table(folder / FILE)
        tokens = read_dictionary(_the_file(folder, "token_dictionary*.pkl"))
        medians = read_dictionary(_the_file(folder, "gene_median_dictionary*.pkl"))
        mapping = {}
        if list(folder.glob("ensembl_mapping_dict*.pkl")):
            mapping = read_dictionary(_the_file(folder, "ensembl_mapping_dict*.pkl"))
        specials = {name: int(token) for name, token in tokens.items() if name.startswith("<")}
        ids = [name for name in tokens if name not in specials]
        genes = _gene_table(ids, [tokens[name] for name in ids], pd.Series(medians, dtype=float).reindex(ids))
        known = set(ids)
        aliases = {name: gene for name, gene in mapping.items() if gene in known and name != gene}
        vocabulary = cls(genes=genes, specials=specials, aliases=aliases)
        if folder.is_relative_to(paths.DOWNLOADS):
            vocabulary.write(folder)
        return vocabulary

    def write(self, folder: Path) -> None:
        """Write ``vocabulary.parquet`` into `folder`, whole or not at all.

        Columns: ``ensembl_id`` (special tokens: their name), ``token_id``, ``median`` (special tokens: missing),
        ``aliases`` (list).
        """
        with atomic_path(Path(folder) / FILE) as partial:
            self._table().to_parquet(partial, index=False)

    @classmethod
    def fit(cls, adata: "AnnData", base: "Vocabulary | None" = None) -> "Vocabulary":
        """Fit the non-zero medians on cells, which must be training cells only.

        Genes of `base` (the checkpoint's vocabulary) keep their token, other genes get new tokens after its last. Genes
        of it without a count in `adata` are left out, for they have no median; that none has one is a UserError.
        """
        base = base or cls(genes=_gene_table([], [], []), specials=SPECIALS_V1, aliases={})
        medians = nonzero_medians(adata, names=base.resolve(gene_ids(adata)))
        if medians.empty:
            msg = f"None of the {adata.n_vars} genes has a count in the {adata.n_obs} training cells: no median to fit."
            raise UserError(msg)
        tokens = base.genes.set_index("ensembl_id")["token_id"].reindex(medians.index)
        unknown = tokens.isna().to_numpy()
        tokens[unknown] = base.size + np.arange(unknown.sum(), dtype=tokens.dtype)  # float while some are missing
        aliases = {name: gene for name, gene in base.aliases.items() if gene in medians.index}
        return cls(genes=_gene_table(medians.index, tokens, medians), specials=base.specials, aliases=aliases)

    def _table(self) -> pd.DataFrame:
        """Return the table that is written: special tokens and genes, sorted by token."""
        names: dict[str, list[str]] = {}
        for alias, gene in sorted(self.aliases.items()):
            names.setdefault(gene, []).append(alias)
        specials = _gene_table(list(self.specials), list(self.specials.values()), [np.nan] * len(self.specials))
        table = pd.concat([specials, self.genes]).sort_values("token_id", ignore_index=True)
        table["aliases"] = [names.get(gene, []) for gene in table["ensembl_id"]]
        return table

    @classmethod
    def _from_table(cls, path: Path) -> "Vocabulary":
        try:
            table = pd.read_parquet(path)
            special = table["ensembl_id"].str.startswith("<")
            genes = table.loc[~special, ["ensembl_id", "token_id", "median"]].reset_index(drop=True)
            specials = {name: int(token) for name, token in table.loc[special, ["ensembl_id", "token_id"]].to_numpy()}
            named = table[["ensembl_id", "aliases"]].itertuples(index=False)
            aliases = {alias: gene for gene, names in named for alias in names}
        except (OSError, ValueError, KeyError) as error:
            msg = f"{path} is not a vocabulary of tuneformer ({error}); copy it again from the checkpoint's source."
            raise UserError(msg) from error
        return cls(genes=genes, specials=specials, aliases=aliases)


def gene_ids(adata: "AnnData") -> pd.Index:
    """Return ``adata.var["ensembl_id"]``; UserError if there is no such column."""
    if "ensembl_id" not in adata.var:
        msg = (
            f'The cells have no var["ensembl_id"] (columns: {", ".join(adata.var.columns) or "none"}); '
            "set ensembl_id in the params file to the column with the gene identifiers."
        )
        raise UserError(msg)
    return pd.Index(adata.var["ensembl_id"].astype(str))


def counts_by_gene(adata: "AnnData", codes: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Sum the raw counts of genes as `genes_summed`, of all cells at once."""
    return genes_summed(sparse.csr_matrix(adata.X), codes, n_genes)


def genes_summed(values: sparse.csr_matrix, codes: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Sum the raw counts of the genes that share a code (genes,); -1 leaves a gene out.

    Returns (cells, `n_genes`), float64 without stored zeros; a negative or not finite count is a UserError.
    """
    if values.nnz and not (np.isfinite(values.data).all() and values.data.min() >= 0):
        msg = "X has negative or missing values: tokens are made from raw counts; give the cells before normalisation."
        raise UserError(msg)
    summed = values.astype(np.float64) @ counts.gather(codes, n_genes, np.float64)
    summed.eliminate_zeros()
    return summed


def nonzero_medians(adata: "AnnData", *, names: pd.Index | None = None) -> pd.Series:
    """Take the median of count / n_counts x 10,000 over the cells in which a gene has a count, some genes at a time.

    The total of a cell is ``obs["n_counts"]``, or else the sum of ``X``. `names` are the names of the genes, if not
    ``var["ensembl_id"]``; counts of genes with the same name are summed. Genes without a count are left out; a cell
    without one, or a negative or missing value, is a UserError. Source: Theodoris et al. 2023
    (doi:10.1038/s41586-023-06139-9), Methods, "Rank value encoding".
    """
    codes, genes = pd.factorize(gene_ids(adata) if names is None else names)
    known = adata.obs["n_counts"].to_numpy(float) if "n_counts" in adata.obs else None
    n_empty = 0

    def scaled() -> Iterator[counts.Entries]:
        nonlocal n_empty
        for part, raw in counts.chunks(adata):
            values = genes_summed(raw, codes, len(genes))
            totals = values.sum(axis=1).A1 if known is None else known[part]
            n_empty += int((~(totals > 0)).sum())
            with np.errstate(divide="ignore"):  # refused below
                data = np.repeat(TARGET_SUM / totals, np.diff(values.indptr)) * values.data
            yield values.indices, np.repeat(np.arange(part.start, part.stop), np.diff(values.indptr)), data

    parts = []
    for first, of_genes in counts.by_row(scaled(), (len(genes), adata.n_obs), n_cells=adata.n_obs):
        gene = np.repeat(np.arange(of_genes.shape[0]), np.diff(of_genes.indptr))
        parts.append(pd.Series(of_genes.data).groupby(gene + first).median())
    if n_empty:
        msg = f"{n_empty} of {adata.n_obs} cells have no count; drop them (min_counts in the params file)."
        raise UserError(msg)
    medians = pd.concat(parts)
    return medians.set_axis(genes[medians.index]).rename("median").rename_axis("ensembl_id")


def read_dictionary(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of text to text or number, running nothing; anything else is a UserError."""
    content = read_pickle(path)
    plain = (str, int, float, np.integer, np.floating)
    is_table = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, plain) for key, value in content.items()
    )
    if not is_table:
        msg = f"{path} is not a dictionary of gene to text or number; take the file from the checkpoint's own source."
        raise UserError(msg)
    return content


def _gene_table(ids: Any, tokens: Any, medians: Any) -> pd.DataFrame:
    """Return ensembl_id, token_id and median as columns, sorted by token."""
    table = pd.DataFrame(
        {
            "ensembl_id": np.asarray(ids, dtype=object),
            "token_id": np.asarray(tokens, dtype=np.int32),
            "median": np.asarray(medians, dtype=np.float64),
        }
    )
    return table.sort_values("token_id", ignore_index=True)


def _the_file(folder: Path, pattern: str) -> Path:
    """Return the one file of `folder` that matches `pattern`."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = "no folder" if not folder.is_dir() else f"{len(found)} files {pattern}, where one is needed"
        msg = (
            f"{folder}: {what}; set checkpoint to a folder that has the weights beside {FILE}, or beside one "
            "token_dictionary*.pkl and one gene_median_dictionary*.pkl of Geneformer."
        )
        raise UserError(msg)
    return found[0]
