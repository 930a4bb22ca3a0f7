"""Marginal means of a mixed model and their contrasts, as weights over the rows of a balanced grid: the same for a linear and a logistic fit."""

from itertools import combinations

import numpy as np
import pandas as pd

from driftbook.comparisons import DIFFERENCE, INTERACTION
from driftbook.stats import CHANGE
from driftbook.study import METHODS


def grid(frame: pd.DataFrame, settings: tuple[str, ...] = ("objective",)) -> pd.DataFrame:
    """Every base model x method that was run x every level of the settings, at each method's middle learning rate (log10_rate 0).

    `frame` holds the rows that a model was fitted to. A row of method `none` (the base model itself) stands once per base model, at the first level of
    each setting: a base model has no settings.
    """
    cells = frame[["base_model", "method"]].drop_duplicates().astype(object)
    levels = pd.MultiIndex.from_product([sorted(frame.loc[frame["method"].ne("none"), name].unique()) for name in settings], names=settings).to_frame(index=False)
    trained = cells[cells["method"].ne("none")].merge(levels, how="cross")
    bases = cells[cells["method"].eq("none")].assign(**{name: levels[name].iloc[0] for name in settings})
    rows = pd.concat([trained, bases], ignore_index=True).assign(log10_rate=0.0)
    order = rows["method"].map(METHODS.index)
    return rows.assign(order=order).sort_values(["order", "base_model"], kind="stable", ignore_index=True).drop(columns="order")


def contrasts(rows: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """What is asked of a fit: a name (base_model, method, contrast) and a row of weights over the grid's rows for each.

    The change of each cell (against the base model's own row where the grid has one), the mean over base models where all have the method, each
    pair of methods, and each base model's change less the mean over base models.
    """
    changes = {key: _change(rows, *key) for key in rows.loc[rows["method"].ne("none"), ["base_model", "method"]].drop_duplicates().itertuples(index=False, name=None)}
    bases, methods = (list(dict.fromkeys(key[i] for key in changes)) for i in (0, 1))
    whole = [method for method in methods if all((base, method) in changes for base in bases)]
    changes |= {("all", method): np.mean([changes[base, method] for base in bases], axis=0) for method in whole}
    found = {(*key, CHANGE): weights for key, weights in changes.items()}
    for base in [*bases, "all"]:
        for method, other in combinations([method for method in methods if (base, method) in changes], 2):
            found[base, method, DIFFERENCE.format(other)] = changes[base, method] - changes[base, other]
    if len(bases) > 1:
        found |= {(base, method, INTERACTION): changes[base, method] - changes["all", method] for method in whole for base in bases}
    names = pd.DataFrame(list(found), columns=["base_model", "method", "contrast"])
    return names, np.array(list(found.values())).reshape(len(found), len(rows))


def _change(rows: pd.DataFrame, base_model: str, method: str) -> np.ndarray:
    """The mean over a cell's rows, less the base model's own row where there is one."""
    own = (rows["base_model"].eq(base_model) & rows["method"].eq(method)).to_numpy(float)
    none = (rows["base_model"].eq(base_model) & rows["method"].eq("none")).to_numpy(float)
    return own / own.sum() - none / max(none.sum(), 1)


def slopes(rows: pd.DataFrame, name: str, low, high) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """The effect of one setting within each method, over all base models: `high` instead of `low`, all other settings as in the grid.

    Gives the rows at both levels, the names and the weights.
    """
    own = rows[rows["method"].ne("none")]
    others = [column for column in own if column != name]
    own = own[others].drop_duplicates()
    both = pd.concat([own.assign(**{name: level}) for level in (high, low)], ignore_index=True)
    sign = np.repeat([1.0, -1.0], len(own))
    methods = list(dict.fromkeys(own["method"]))
    weights = np.array([sign * both["method"].eq(method) / own["method"].eq(method).sum() for method in methods])
    return both, weights, pd.DataFrame({"base_model": "all", "method": methods})
