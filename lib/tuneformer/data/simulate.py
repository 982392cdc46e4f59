r"""Simulated cells and bulk samples: what the demo studies and the demo checkpoint are made of.

In: a size and a seed. Out: AnnData with raw counts and labels; a table of bulk samples. Nothing here is biology: gene
identifiers start with SIMG, and every document that shows a number made from these cells says "simulated". The genes
are as few as in a panel, so that the demo checkpoint reads most of those that a cell detects.

Model
-----
Genes g, co-expressed gene programs p, cells c, wells w, drugs d.

.. math::

   \log r_{cg} &= b_g + \sum_p W_{gp} A_{cp} + v_{w(c)g} \\
   A_{cp} &= B_{cp} + G_c\, s_c\, e_{d(c)p}\, h_d(x_c), \qquad
   B_{cp} = a_{t(c)p} + k_{cp} + z_{w(c)p} + \epsilon_{cp} \\
   G_c &= 1 \ \text{(additive)} \quad\text{or}\quad \mathrm{sign}(B_{cg(d)} - a_{t(c)g(d)}) \ \text{(interacting)} \\
   h_d(x) &= x^{n_d} / (x^{n_d} + \mathrm{EC50}_d^{n_d}) \\
   \mu_{cg} &= L_c \, (1 - m_c) \, r_{cg} / \textstyle\sum_{g'} r_{cg'} \quad\text{(mitochondrial: } L_c m_c) \\
   Y_{cg} &\sim \mathrm{Poisson}(\Gamma), \quad \Gamma \sim \mathrm{Gamma}(1/\phi_g,\ \phi_g \mu_{cg}), \quad
   \phi_g = \phi_0 + \phi_1 / \bar\mu_g

b: base expression (normal on the log scale); W: non-negative program loadings; a: activities of the cell type; k: cell
cycle, two programs in quadrature; s: response of the single cell (gamma, mean 1); e: drug effect on a program; h: Hill
curve of the dose x in uM; z, v: well effects on programs and on genes; epsilon: variation between cells; L: library
size (log-normal); m: mitochondrial share (beta); Y: counts, gamma-Poisson with a dispersion that falls with the mean.
Drugs also kill: the expected number of cells in a well falls with the dose along a Hill curve of its own.

The mechanism (``demo_mechanism``) decides what a drug does in which cell. Additive: in each cell the same, and a linear
model of log expression is nearly the true one. Interacting: a program of the cell cycle, g(d), is the gate of the drug;
what moves up in one half of the cycle moves down in the other, so that no mean shifts, and who looks at one gene at a
time sees nothing. All else is the same in both.

Every constant below was fixed before any model was trained on the cells: effects so that a classifier that knows this
model and the activities of a cell (`tuneformer.data.simulate_truth`) has a macro-F1 of about 0.88 in either mechanism
on cells of demo_seed 99, the others by what cells look like. None is fitted to sciplex2: EC50s are of the order at
which these compounds are used in cell culture, and class sizes follow from the viability curves.

Sources
-------
Gamma-Poisson counts and dispersion trend: Anders and Huber 2010 (doi:10.1186/gb-2010-11-10-r106), Love et al. 2014
(doi:10.1186/s13059-014-0550-8). Log-normal library sizes and base expression, batch effects: Zappia et al. 2017,
Splatter (doi:10.1186/s13059-017-1305-0). Design of plates, wells, drugs and doses: Srivatsan et al. 2020
(doi:10.1126/science.aax6234), GEO GSM4150377.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

N_GENES = 900
N_MITO = 13  # the last genes
N_PROGRAMS = 36
Mechanism = Literal["additive", "interacting"]
UNIVERSE_SEED = 20191205  # genes and programs are the same in every data set made here
CHUNK = 2000  # cells drawn at once

DOSES = (0.0, 0.1, 0.5, 1.0, 5.0, 10.0, 50.0, 100.0)  # % of the maximum dose of the drug
CELL_LINE = -1  # "cell type" of the demo cells; the corpus uses 0, 1, 2, ... and so never contains it

BASE_SD = 1.8  # of log base expression
TYPE_SHARE = 0.3  # share of programs that a cell type regulates
TYPE_SD = 1.2  # of their activities, natural-log units at loading 1
CELL_SD = 0.4  # of program activity between cells of one type
WELL_PROGRAM_SD = 0.1
WELL_GENE_SD = 0.05
WELL_LIBRARY_SD = 0.1
LIBRARY_MEDIAN = 1600.0  # UMI
LIBRARY_SD = 0.55  # of the natural log
DISPERSION = (0.1, 0.1)  # phi_0, phi_1
MITO_BETA = (2.0, 23.0)  # mitochondrial share of a healthy cell, mean 0.08
RESPONSE_SHAPE = 10.0  # gamma shape of the single cell's response, mean 1, sd 0.32

LIBRARY_FACTORS = ((0.03, 0.1), (0.015, 6.0))  # share of cells, and by what factor their library is wrong
DAMAGED = 0.02  # share of cells that are mostly mitochondrial
DAMAGED_BETA = (12.0, 6.0)  # their mitochondrial share, mean 0.67
UNLABELLED = 0.03  # share of cells whose well is unknown

BULK_CELLS = 10_000  # simulated and lysed, about 50 in each of the 192 wells
BULK_SEED_STEP = 7001  # from the seed of the single cells to that of the bulk samples, which share no cell with them


@dataclass(frozen=True)
class Drug:
    """One drug: doses in uM, effect on programs, and toxicity.

    ``programs`` programs get an effect of ``effect`` times a random sign (natural-log units at loading 1); the Hill
    curve has half-maximum ``ec50`` (uM) and steepness ``hill``. ``killed`` is the share of cells lost far above
    ``lc50`` (uM). ``gate`` is the program on whose state the effect depends where the mechanism is interacting.
    """

    name: str
    max_dose: float
    programs: int
    effect: float
    ec50: float
    hill: float
    killed: float
    lc50: float
    gate: int


DRUGS = (
    Drug("BMS", max_dose=1000.0, programs=6, effect=0.55, ec50=10.0, hill=1.5, killed=0.9, lc50=60.0, gate=0),
    Drug("Dex", max_dose=50.0, programs=6, effect=0.7, ec50=0.03, hill=1.0, killed=0.1, lc50=10.0, gate=1),
    Drug("Nutlin", max_dose=250.0, programs=6, effect=0.7, ec50=10.0, hill=2.0, killed=0.9, lc50=120.0, gate=0),
    Drug("SAHA", max_dose=1000.0, programs=12, effect=0.55, ec50=2.0, hill=1.5, killed=0.5, lc50=20.0, gate=1),
)


@dataclass(frozen=True)
class Universe:
    """Genes and programs shared by all simulated data sets.

    ``base`` (genes,) is log base expression, ``loadings`` (genes, programs), ``dispersion`` (genes,); the mitochondrial
    genes belong to no program.
    """

    base: np.ndarray
    loadings: np.ndarray
    dispersion: np.ndarray

    @property
    def var(self) -> pd.DataFrame:
        """The genes: ``ensembl_id`` (simulated identifiers, also the index) and ``symbol``."""
        ids = [f"SIMG{number:011d}" for number in range(1, N_GENES + 1)]
        symbols = [f"SIM{number}" for number in range(1, N_GENES - N_MITO + 1)]
        symbols += [f"MT-SIM{number}" for number in range(1, N_MITO + 1)]
        return pd.DataFrame({"ensembl_id": ids, "symbol": symbols}, index=pd.Index(ids, name="gene"))


def make_universe() -> Universe:
    """Draw genes and programs, always the same."""
    rng = np.random.default_rng(UNIVERSE_SEED)
    base = rng.normal(0, BASE_SD, N_GENES)
    loadings = np.zeros((N_GENES, N_PROGRAMS))
    for program in range(N_PROGRAMS):
        members = rng.choice(N_GENES - N_MITO, size=rng.integers(20, 51), replace=False)
        loadings[members, program] = rng.uniform(0.5, 1.5, len(members))
    mean_count = LIBRARY_MEDIAN * np.exp(base) / np.exp(base).sum()
    return Universe(base=base, loadings=loadings, dispersion=DISPERSION[0] + DISPERSION[1] / mean_count)


@dataclass(frozen=True)
class Latent:
    """What the counts of the demo cells are drawn from, and the generator that draws them.

    ``wells``: one row per well; ``well_of`` (cells,); ``activity`` (cells, programs); ``log_library`` and
    ``mito_share`` (cells,).
    """

    wells: pd.DataFrame
    well_of: np.ndarray
    activity: np.ndarray
    log_library: np.ndarray
    mito_share: np.ndarray
    rng: np.random.Generator


def draw_latent(n_cells: int, *, seed: int, mechanism: Mechanism = "additive") -> Latent:
    """Draw wells, activities and library sizes of the cells that `simulate_sciplex2` makes of the same arguments."""
    rng = np.random.default_rng([seed, 2])
    wells = make_wells()
    viability = wells["viability"].to_numpy()
    well_of = rng.choice(len(wells), size=n_cells, p=viability / viability.sum())
    drug_of = wells["drug_index"].to_numpy()[well_of]
    response = rng.gamma(RESPONSE_SHAPE, 1 / RESPONSE_SHAPE, n_cells) * wells["hill"].to_numpy()[well_of]
    activity = cell_type_activity(CELL_LINE) + cell_variation(n_cells, rng)
    activity += rng.normal(0, WELL_PROGRAM_SD, (len(wells), N_PROGRAMS))[well_of]
    if mechanism == "interacting":
        response *= gate_state(activity)[np.arange(n_cells), drug_of]
    activity += response[:, None] * drug_effects()[drug_of]

    log_library = rng.normal(np.log(LIBRARY_MEDIAN), LIBRARY_SD, n_cells)
    log_library += rng.normal(0, WELL_LIBRARY_SD, len(wells))[well_of] + log_yield(viability)[well_of]
    quality = rng.uniform(size=n_cells)
    for share, factor in LIBRARY_FACTORS:
        log_library[(quality >= 0) & (quality < share)] += np.log(factor)
        quality -= share
    mito_share = rng.beta(*MITO_BETA, n_cells)
    damaged = rng.uniform(size=n_cells) < DAMAGED
    mito_share[damaged] = rng.beta(*DAMAGED_BETA, damaged.sum())
    return Latent(wells, well_of, activity, log_library, mito_share, rng)


def gate_state(activity: np.ndarray) -> np.ndarray:
    """Return in which half of its cycle a cell is for each drug, from its activities: 1 or -1, (cells, drugs)."""
    gates = [drug.gate for drug in DRUGS]  # programs that no drug moves
    return np.where(activity[:, gates] > cell_type_activity(CELL_LINE)[gates], 1.0, -1.0)


def log_yield(viability: np.ndarray) -> np.ndarray:
    """Return what a well of dying cells takes from the log library of each: at most ln 2."""
    return np.log(0.5 + 0.5 * viability)


def simulate_sciplex2(n_cells: int, *, seed: int, mechanism: Mechanism = "additive") -> ad.AnnData:
    """Simulate a sci-Plex 2 look-alike: one cell line, four drugs, eight doses, two plates, three replicates.

    `n_cells` counts the cells before quality control; `seed` draws everything but genes, programs and drug effects.

    Returns
    -------
    AnnData (`n_cells`, 900): raw counts in ``X`` (CSR, float32); ``var`` ensembl_id, symbol; ``obs`` top_oligo
    (``<drug>_<dose>_<well>``, missing without label), drug, dose (% of maximum), dose_um (uM), dose_label, treatment
    (drug, or Untreated at dose 0), plate, well, replicate.
    """
    universe, latent = make_universe(), draw_latent(n_cells, seed=seed, mechanism=mechanism)
    rng, well_of = latent.rng, latent.well_of
    counts = draw_counts(
        universe,
        latent.activity,
        np.exp(latent.log_library),
        latent.mito_share,
        rng,
        gene_shift=rng.normal(0, WELL_GENE_SD, (len(latent.wells), N_GENES)),
        shift_of=well_of,
    )
    obs = _obs(latent.wells.iloc[well_of], unlabelled=rng.uniform(size=n_cells) < UNLABELLED)
    return ad.AnnData(counts, obs=obs, var=universe.var)


def simulate_corpus(n_cells: int, *, n_types: int, seed: int) -> ad.AnnData:
    """Simulate unperturbed cells of `n_types` cell types of about the same size, for pre-training.

    They share genes and programs with `simulate_sciplex2`, but no cell type, no drug, no well and no cell. Returns
    AnnData (`n_cells`, 900): raw counts in ``X`` (CSR, float32), ``obs["cell_type"]``, ``var`` as the demo cells.
    """
    universe = make_universe()
    rng = np.random.default_rng([seed, 1])
    cell_type = rng.integers(n_types, size=n_cells)
    types = np.stack([cell_type_activity(number) for number in range(n_types)])
    parts = []
    for start in range(0, n_cells, CHUNK):
        part = cell_type[start : start + CHUNK]
        activity = types[part] + cell_variation(len(part), rng)
        library = np.exp(rng.normal(np.log(LIBRARY_MEDIAN), LIBRARY_SD, len(part)))
        mito_share = rng.beta(*MITO_BETA, len(part))
        parts.append(draw_counts(universe, activity, library, mito_share, rng))
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type{number}" for number in cell_type])})
    obs.index = [f"corpus{number}" for number in range(n_cells)]
    return ad.AnnData(sparse.vstack(parts, format="csr"), obs=obs, var=universe.var)


def simulate_bulk(*, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Simulate a bulk experiment beside the cells of `seed`: one sample per well, all its cells added up.

    Drugs, genes and doses are those of `simulate_sciplex2`; cells, library sizes and well effects are drawn anew.

    Returns
    -------
    Counts, genes x samples, whole numbers; and the wells, indexed by sample: ``obs`` of the simulated cells as far as
    it has one value per well.
    """
    cells = simulate_sciplex2(BULK_CELLS, seed=seed + BULK_SEED_STEP)
    cells = cells[cells.obs["well"].notna()]
    codes, wells = pd.factorize(cells.obs["well"].astype(str), sort=True)
    gather = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    counts = (gather @ cells.X.astype(np.float64)).toarray().T.astype(np.int64)
    _, first = np.unique(codes, return_index=True)
    sheet = cells.obs.iloc[first].set_axis(wells).rename_axis("sample")
    return pd.DataFrame(counts, index=cells.var["ensembl_id"].rename("gene"), columns=wells), sheet


def drug_effects() -> np.ndarray:
    """Draw which programs each drug moves, and up or down, (drugs, programs), always the same."""
    rng = np.random.default_rng([UNIVERSE_SEED, 3])
    effects = np.zeros((len(DRUGS), N_PROGRAMS))
    for index, drug in enumerate(DRUGS):
        moved = rng.choice(np.arange(2, N_PROGRAMS), size=drug.programs, replace=False)  # 0 and 1 are the cell cycle
        effects[index, moved] = drug.effect * rng.choice([-1, 1], size=drug.programs)
    return effects


def cell_type_activity(number: int) -> np.ndarray:
    """Draw the program activities of cell type `number`, (programs,), always the same."""
    rng = np.random.default_rng([UNIVERSE_SEED, 4, number + 1])
    return rng.normal(0, TYPE_SD, N_PROGRAMS) * (rng.uniform(size=N_PROGRAMS) < TYPE_SHARE)


def cell_variation(n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Draw how cells of one type differ, (cells, programs); programs 0 and 1 follow the cell cycle."""
    variation = rng.normal(0, CELL_SD, (n_cells, N_PROGRAMS))
    phase = rng.uniform(0, 2 * np.pi, n_cells)
    variation[:, 0] += np.cos(phase)
    variation[:, 1] += np.sin(phase)
    return variation


def draw_counts(
    universe: Universe,
    activity: np.ndarray,
    library: np.ndarray,
    mito_share: np.ndarray,
    rng: np.random.Generator,
    *,
    gene_shift: np.ndarray | None = None,
    shift_of: np.ndarray | None = None,
) -> sparse.csr_matrix:
    """Draw gamma-Poisson counts, (cells, genes).

    `gene_shift` (wells, genes) is added to the log rates of the cells of each well; `shift_of` (cells,) names the well.
    All in float64: one last digit that another processor rounds otherwise could flip a draw and shift all later ones.
    """
    parts = []
    mito = slice(N_GENES - N_MITO, N_GENES)
    nuclear = slice(0, N_GENES - N_MITO)
    for start in range(0, len(library), CHUNK):
        rows = slice(start, start + CHUNK)
        log_rate = universe.base + activity[rows] @ universe.loadings.T  # (cells, genes)
        if gene_shift is not None:
            log_rate += gene_shift[shift_of[rows]]
        rate = np.exp(log_rate)
        rate[:, nuclear] *= (1 - mito_share[rows, None]) / rate[:, nuclear].sum(axis=1, keepdims=True)
        rate[:, mito] *= mito_share[rows, None] / rate[:, mito].sum(axis=1, keepdims=True)
        mean = library[rows, None] * rate
        gamma = rng.standard_gamma(1 / universe.dispersion, size=mean.shape)
        counts = rng.poisson(gamma * (universe.dispersion * mean))
        parts.append(sparse.csr_matrix(counts.astype(np.float32)))
    return sparse.vstack(parts, format="csr")


def make_wells() -> pd.DataFrame:
    """Lay out 192 wells as in GSM4150377: plates A and B, 8 rows by 12 columns.

    Two rows per drug, doses falling from 100 % and repeated; columns 01, 04, 07, 10 are replicate 1, and so on.
    """
    rows = []
    for plate, (drug_index, drug), place in product("AB", enumerate(DRUGS), range(24)):
        row, column = "ABCDEFGH"[2 * drug_index + place // 12], place % 12 + 1
        dose = DOSES[::-1][place % len(DOSES)]
        dose_um = dose / 100 * drug.max_dose
        rows.append(
            {
                "drug": drug.name,
                "drug_index": drug_index,
                "dose": dose,
                "dose_um": dose_um,
                "hill": _hill(dose_um, drug.ec50, drug.hill),
                "viability": 1 - drug.killed * _hill(dose_um, drug.lc50, 2.0),
                "plate": plate,
                "well": f"{plate}{row}{column:02d}",
                "replicate": (column - 1) % 3 + 1,
            }
        )
    return pd.DataFrame(rows)


def _hill(dose: float, half: float, steepness: float) -> float:
    """Return the Hill curve at `dose`: 0 without drug, 0.5 at `half`, 1 far above."""
    return dose**steepness / (dose**steepness + half**steepness)


def well_table(wells: pd.DataFrame) -> pd.DataFrame:
    """Return what the ``obs`` of a cell says of its well, one row for each row of `wells`."""
    table = wells.drop(columns=["drug_index", "hill", "viability"]).reset_index(drop=True)
    table["top_oligo"] = table["drug"] + "_" + table["dose"].map("{:g}".format) + "_" + table["well"]
    table["treatment"] = table["drug"].where(table["dose"] > 0, "Untreated")
    table["dose_label"] = table["dose_um"].map("{:g} uM".format)
    return table


def _obs(wells: pd.DataFrame, *, unlabelled: np.ndarray) -> pd.DataFrame:
    """Make the cell table from the well of every cell; an unlabelled cell has no value in any column."""
    obs = well_table(wells).astype({"replicate": float})
    obs.loc[unlabelled] = np.nan
    for column in ("drug", "plate", "well", "top_oligo", "treatment", "dose_label"):
        obs[column] = obs[column].astype("category")
    obs.index = [f"cell{number}" for number in range(len(obs))]
    return obs
