r"""The best that anyone could do on the demo cells: class probabilities by a classifier that knows how they were made.

In: a study on demo cells, and names of cells. Out: the probability of each class, given the true activities and the
true library size of a cell, which no reader of its counts can know as well.

The wells of each drug and dose :math:`j` have a density. An activity that drug d moves has the variance
:math:`\tau^2`, of cells and wells; all others, gates included, have the same density under every j and cancel. With
:math:`r_c` the distance of the activities from those of the cell type, and G, e, h, s as in `tuneformer.data.simulate`,

.. math::

   \frac{p(A_c \mid j)}{p(A_c \mid \text{untreated})} = \int \exp\Big(
   \frac{u\, r_c^\top e_d - u^2 \lVert e_d \rVert^2 / 2}{\tau^2}\Big) p(s)\, ds,
   \qquad u = s\, h_j\, G_{cd}

as the mean over equally probable responses s. The library size is a mixture of three log-normals, whose median depends
on the viability. Quality control looks at counts, which depend on the class by activities and library size alone, so
that it changes nothing. What a well does to its cells counts as unknown: the classifier is the best one for a cell of
a well that it has not seen, and 300 training cells in 192 wells tell little about any.
"""

import numpy as np
from scipy import stats
from scipy.special import logsumexp

from tuneformer.artifacts import UserError
from tuneformer.data import simulate
from tuneformer.study import Study

RESPONSES = 200  # equally probable ones; 800 change none of 15,000 probabilities by more than 0.001


def class_probabilities(settings: Study, names: list[str], classes: list[str]) -> np.ndarray:
    """Return P(class | activities, library size) of demo cells by name, (cells, classes).

    Raises
    ------
    UserError
        The cells are not those of the demo, or the classes are not given by drug and dose.
    """
    if settings.dataset != "demo":
        msg = f"strategy: bayes knows how demo cells were made, but dataset is {settings.dataset}; leave the arm out."
        raise UserError(msg)
    wells = simulate.well_table(simulate.make_wells())
    columns = [column for column in (settings.label, settings.select_column) if column]
    unknown = [column for column in columns if column not in wells]
    if unknown:
        msg = f"strategy: bayes knows {', '.join(wells.columns)}, and not {unknown[0]}; leave the arm out."
        raise UserError(msg)
    label = wells[settings.label].astype(str).to_numpy()
    if settings.select_column is not None:
        label[~wells[settings.select_column].astype(str).isin(settings.select_values).to_numpy()] = ""
    log_joint = well_densities(settings, names)  # (cells, wells)
    each = [logsumexp(log_joint[:, label == name], axis=1) for name in classes]
    return np.exp(np.stack(each, axis=1) - logsumexp(each, axis=0)[:, None])


def well_densities(settings: Study, names: list[str]) -> np.ndarray:
    """Return log p(cell, well) up to a constant of each cell, (cells, wells); an unknown name is a UserError."""
    positions = {f"cell{number}": number for number in range(settings.demo_cells)}
    if not set(names) <= positions.keys():
        msg = "strategy: bayes knows single demo cells only; leave made train sets out of its arm."
        raise UserError(msg)
    rows = [positions[name] for name in names]
    latent = simulate.draw_latent(settings.demo_cells, seed=settings.demo_seed, mechanism=settings.demo_mechanism)
    away = latent.activity[rows] - simulate.cell_type_activity(simulate.CELL_LINE)  # (cells, programs)
    effects, variance = simulate.drug_effects(), simulate.CELL_SD**2 + simulate.WELL_PROGRAM_SD**2
    along, length = away @ effects.T, (effects**2).sum(axis=1)  # (cells, drugs), (drugs,)
    if settings.demo_mechanism == "interacting":
        along = along * simulate.gate_state(latent.activity[rows])
    shape = simulate.RESPONSE_SHAPE
    response = stats.gamma.ppf((np.arange(RESPONSES) + 0.5) / RESPONSES, shape, scale=1 / shape)
    kinds = latent.wells.groupby(["drug_index", "hill", "viability"]).indices
    found = np.empty((len(rows), len(latent.wells)))
    for (drug, hill, viability), places in kinds.items():
        moved = response * hill
        ratio = (along[:, [drug]] * moved - length[drug] * moved**2 / 2) / variance  # (cells, responses)
        log_density = logsumexp(ratio, axis=1) + _log_library_density(latent.log_library[rows], viability)
        found[:, places] = (log_density + np.log(viability))[:, None]
    return found


def _log_library_density(log_library: np.ndarray, viability: float) -> np.ndarray:
    """Return the log density of log library sizes in wells of one viability."""
    wrong = [*simulate.LIBRARY_FACTORS, (1 - sum(share for share, _ in simulate.LIBRARY_FACTORS), 1.0)]
    shares, factors = np.array(wrong).T
    centre = np.log(simulate.LIBRARY_MEDIAN * factors) + simulate.log_yield(viability)
    spread = np.hypot(simulate.LIBRARY_SD, simulate.WELL_LIBRARY_SD)
    return logsumexp(stats.norm.logpdf(log_library[:, None], centre, spread), b=shares, axis=1)
