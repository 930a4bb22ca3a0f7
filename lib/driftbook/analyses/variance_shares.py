"""The share of the variance between runs that each factor has."""

from math import factorial

import numpy as np
import pandas as pd

from driftbook.analyses.factors import (
    FACTOR,
    POPULATION,
    SEED,
    SHARED,
    cell_codes,
    checked_runs,
    ordered_levels,
    partner_factors,
    run_variance,
    usual_runs,
)
from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.estimation import complete

SHARE = "share of the variance between runs (percent)"


# ---- shares of the variance
def variance_shares(
    runs: pd.DataFrame, n_boot: int = 1000, seed: int = 0, **labels: str
) -> pd.DataFrame:
    """The share of the variance between runs that each factor has, in percent, as estimates; they
    and the share of seeds sum to 100.

    The model of a coalition of factors is saturated: a mean for each combination of their levels
    that was run, so all interactions among them where the grid allows. Its worth is the sum of
    squares between these means, less what noise alone would give (the trace of its projection times
    the variance of runs, each cell's own, of a cell run once its method's): an adjustment for
    degrees of freedom that holds when methods differ in variance. A factor's share is the mean of
    what it adds over all orders of entry (Lindeman, Merenda & Gold 1980, p. 119; Grömping 2007; as
    Shapley values Owen 2014), so that an interaction is shared evenly by its factors. What is left
    is the noise of seeds. The learning rate enters as its place among the method's own rates
    (lowest, second, ...), since rates themselves would tell the methods apart; runs have their
    method's usual init.

    Shares depend on the levels tried and on how often: a wider range of rates has a larger share. A
    share below zero is noise about none. Factors that change only together have one share; a factor
    of one level has none. Intervals: 2.5 and 97.5 % of `n_boot` redraws of runs within cells (see
    `redrawn`), from which the noise that the redraw adds is taken off. All null where some method
    has no repetition: then seeds have no share of their own.
    """
    frame = usual_runs(checked_runs(runs)).reset_index(drop=True)
    frame["learning_rate"] = frame.groupby("method")["learning_rate"].transform(
        lambda rates: rates.map(ordered_levels(set(rates)).index)
    )
    names = _distinct(frame)
    found = _shares(frame, list(names), n_boot, seed)
    rows = [
        {"group": FACTOR, "member": name, **one}
        for name, one in zip([*names.values(), SEED], found, strict=True)
    ]
    base = frame["base_model"].iloc[0] if frame["base_model"].nunique() == 1 else "all"
    return complete(
        pd.DataFrame(rows).assign(
            **labels,
            base_model=base,
            method="all",
            contrast=SHARE,
            population=POPULATION,
            n_runs=len(frame),
        )
    )


def _distinct(frame: pd.DataFrame) -> dict[str, str]:
    """The factors that vary and can be told apart, with what they are called."""
    found: dict[str, str] = {}
    for name in SHARED:
        partners = partner_factors(frame, name, list(SHARED))
        if frame[name].nunique() > 1 and not set(partners) & set(found):
            found[name] = " and ".join(SHARED[one] for one in (name, *partners))
    return found


def _shares(frame: pd.DataFrame, names: list[str], n_boot: int, seed: int) -> list[dict]:
    """value, se, interval and how of each factor's share and, last, of the seeds'."""
    cell, own = cell_codes(frame), frame["method"].to_numpy()
    alone = frame.loc[
        frame["method"].map(run_variance(frame)["variance"]).isna(), "method"
    ].unique()
    if len(alone):
        return [
            {
                "value": None,
                "how": (
                    f"no cell of {', '.join(alone)} was repeated: seeds cannot be told from"
                    " settings"
                ),
            }
        ] * (len(names) + 1)
    values = frame["value"].to_numpy()
    drawn = redrawn(values[:, None], cell, own, n_boot, np.random.default_rng(seed))[..., 0]
    worth, noise, total = _worth(frame, names, cell, np.vstack([values, drawn]))
    signal = worth - noise
    signal[:, 1:] -= noise[:, :1]
    parts = np.vstack([_shapley(signal, len(names)), total])
    if parts[:, 0].sum() <= 0:
        return [{"value": None, "how": "the runs do not differ: there is no variance to share"}] * (
            len(names) + 1
        )
    share = 100 * parts / parts.sum(0)
    low, high = np.quantile(share[:, 1:], (LOWER, UPPER), axis=1)
    how = (
        f"Shapley (LMG) share of adjusted sums of squares, saturated cells; percentiles of {n_boot}"
        " redraws of runs within cells; depends on the levels tried"
    )
    columns = zip(share[:, 0], share[:, 1:].std(1, ddof=1), low, high, strict=True)
    return [
        {"value": value, "se": se, "ci_low": min(a, value), "ci_high": max(b, value), "how": how}
        for value, se, a, b in columns
    ]


def _worth(
    frame: pd.DataFrame, names: list[str], cell: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each coalition (bit i of its number: names[i]) and each row of values: sum of squares
    between its means, and the noise in it; then all noise.
    """
    n, at = np.bincount(cell), np.unique(cell, return_index=True)[1]
    to_cell = np.eye(len(n))[cell]
    sums = values @ to_cell
    squares = np.maximum(values**2 @ to_cell - sums**2 / n, 0.0)
    to_method = (frame["method"].to_numpy()[at][:, None] == frame["method"].unique()).astype(float)
    pooled = squares @ to_method / ((n - 1) @ to_method) @ to_method.T
    variance = n * np.where(
        n > 1, squares / np.maximum(n - 1, 1), pooled
    )  # [rows, cells]: summed over the runs of a cell
    worth, noise = np.zeros((2, 2 ** len(names), len(values)))
    for coalition in range(2 ** len(names)):
        inside = [name for i, name in enumerate(names) if coalition >> i & 1]
        code = (
            frame.iloc[at].groupby(inside, sort=False).ngroup().to_numpy()
            if inside
            else np.zeros(len(n), int)
        )
        group = np.eye(code.max() + 1)[code]
        worth[coalition], noise[coalition] = (
            ((sums @ group) ** 2 / (n @ group)).sum(1),
            (variance @ group / (n @ group)).sum(1),
        )
    return worth - worth[0], noise - noise[0], variance.sum(1) - noise[0]


def _shapley(worth: np.ndarray, k: int) -> np.ndarray:
    """The Shapley value of each of k players; `worth` is [2**k, ...], bit i of a coalition's number
    standing for player i.
    """
    coalitions, found = np.arange(2**k), []
    size = np.array([int(coalition).bit_count() for coalition in coalitions])
    weight = np.array([factorial(s) * factorial(max(k - s - 1, 0)) / factorial(k) for s in size])
    for i in range(k):
        without = coalitions[(coalitions >> i & 1) == 0]
        found.append(
            np.tensordot(weight[without], worth[without | 1 << i] - worth[without], axes=1)
        )
    return np.array(found).reshape(k, *worth.shape[1:])


def redrawn(
    values: np.ndarray, cell: np.ndarray, pool: np.ndarray, n_boot: int, rng: np.random.Generator
) -> np.ndarray:
    """Values of runs redrawn with replacement within their cells: [n_boot, runs, columns] from
    [runs, columns].

    The distances to the cell's mean are stretched by sqrt(n / (n - 1)), without which few
    repetitions give too little variance (Rao & Wu 1988). A run whose cell has no other gets the
    distance of any run of its pool's repeated cells; where the pool has none, it stays as it is.
    """
    n = np.bincount(cell)[cell]
    mean = np.stack([np.bincount(cell, column) for column in values.T], 1)[cell] / n[:, None]
    rest = (values - mean) * np.sqrt(n / np.maximum(n - 1, 1))[:, None]
    taken = np.tile(np.arange(len(values)), (n_boot, 1))
    for i in range(len(values)):
        others = (
            np.flatnonzero(cell == cell[i])
            if n[i] > 1
            else np.flatnonzero((pool == pool[i]) & (n > 1))
        )
        if len(others):
            taken[:, i] = others[rng.integers(len(others), size=n_boot)]
    return mean + rest[taken]
