"""Power of the declared joint test: a method preserves every outcome at once, with Holm's step over
all the cells of its family.

The test of notebook 19 takes the largest p of a cell's outcomes and adjusts it over the cells, so
its power is below that of any single outcome. Studies are drawn in which nothing is harmed: each
estimate is normal about zero with its standard error, and that error is known with the degrees of
freedom of its interval. Outcomes and cells are drawn independently, which is what the tables know;
errors that they share would raise the power.
"""

import numpy as np
import pandas as pd
from scipy.special import stdtr

from driftbook.analyses import primary
from driftbook.stats import intervals, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.estimation import complete
from driftbook.stats.noninferiority import JOINTLY
from driftbook.study.study_file import Study
from driftbook.study.tables import ESTIMATES

JOINT_POWER = "power to show that all is preserved, where nothing is harmed (percent)"
DRAWS = 4_000
_CELL = ["base_model", "method"]


def joint_power(
    study: Study, estimates: pd.DataFrame, seed: int, harm: float = 0.0, **labels: str
) -> pd.DataFrame:
    """A row of `estimates` per family that tests `preserves`, method and base model, at the
    family's margin; with Wilson's interval over the studies drawn.

    `harm` is the true harm of every outcome, in points. Null where an outcome has no standard
    error. Empty where no such family is declared or none of its outcomes was estimated.
    """
    tested, _ = primary.tests(study, estimates)
    rng, parts = np.random.default_rng(seed), []
    for name, family in study.primary.items():
        own = tested[tested["member"].eq(name) & tested["margin"].eq(family.margin).fillna(False)]
        own = own[own["outcome"].ne(JOINTLY)]
        if family.test == "preserves" and len(own):
            parts.append(_of_family(rng, name, own, len(family.outcomes), harm))
    if not parts:
        return ESTIMATES.empty()
    usual = {"outcome": JOINTLY, "benchmark": "all", "contrast": JOINT_POWER, "group": "declared"}
    usual |= {"population": terms.BOTH, "study": study.name}
    return complete(pd.concat(parts, ignore_index=True).assign(**usual, **labels))


def _of_family(
    rng: np.random.Generator, name: str, rows: pd.DataFrame, n_outcomes: int, harm: float
) -> pd.DataFrame:
    numbers = rows.astype(dict.fromkeys(("se", "ci_low", "ci_high", "margin"), float))
    half = (numbers["ci_high"] - numbers["ci_low"]) / 2
    df = [
        intervals.implied_df(h / se) if se > 0 else np.nan
        for h, se in zip(half, numbers["se"], strict=True)
    ]
    cells = pd.factorize(pd.MultiIndex.from_frame(rows[_CELL]))
    measured = np.bincount(cells[0]) == n_outcomes
    margin = numbers["margin"].iloc[0]
    shown = drawn(rng, numbers["se"].to_numpy(), np.array(df), cells[0], margin - harm)
    k = np.where(measured & ~np.isnan(shown), np.nan_to_num(shown) * DRAWS, np.nan)
    low, high = intervals.wilson(k, np.full(len(k), float(DRAWS)))
    found = pd.DataFrame(list(cells[1]), columns=_CELL)
    how = f"{n_outcomes} outcomes, Holm over {len(found)} cells, {DRAWS:,} studies drawn"
    ends = {"value": 100 * k / DRAWS, "ci_low": 100 * low, "ci_high": 100 * high}
    return found.assign(member=name, margin=margin, judge="none", how=how, **ends)


def drawn(
    rng: np.random.Generator,
    se: np.ndarray,
    df: np.ndarray,
    cell: np.ndarray,
    distance: float,
    holm: bool = True,
) -> np.ndarray:
    """The share of drawn studies in which each cell preserves all its outcomes [cells]; `se`, `df`
    and `cell` are [outcomes of cells], `distance` the true distance to the margin.

    NaN for a cell with an unknown error, which counts in Holm's method as one with p = 1.
    """
    n_cells, known = cell.max() + 1, ~np.isnan(se) & ~np.isnan(df)
    value = rng.normal(size=(DRAWS, len(se)))
    spread = np.sqrt(rng.chisquare(np.where(known, df, 1), size=value.shape) / df)
    p = np.where(known, stdtr(df, (value - distance / se) / spread), 1.0)
    joint = np.stack([p[:, cell == one].max(1) for one in range(n_cells)], 1)
    if holm:
        order = joint.argsort(1)
        stepped = np.take_along_axis(joint, order, 1) * (n_cells - np.arange(n_cells))
        adjusted = np.empty_like(joint)
        np.put_along_axis(adjusted, order, np.maximum.accumulate(stepped, 1), 1)
        joint = adjusted
    unknown = np.bincount(cell, ~known) > 0
    return np.where(unknown, np.nan, (joint < ALPHA / 2).mean(0))
