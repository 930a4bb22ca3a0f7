"""How well judges agree with each other and with people: confusion tables, and Cohen's kappa with
its interval.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import norm
from statsmodels.stats.inter_rater import cohens_kappa

from driftbook.stats.confidence import LOWER
from driftbook.stats.intervals import wilson
from driftbook.study.tables import RESPONSE_KEY


def kappa(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float, float]:
    """Cohen's kappa of a 2 x 2 table, with its asymptotic interval (Fleiss, Cohen and Everitt
    1969); NaN where chance alone agrees.

    The interval takes the items as independent: where several answers are to one prompt, resample
    prompts instead.
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    if n == 0 or (first in (0, n) and first == second):
        return (np.nan,) * 3
    found = cohens_kappa(np.array([[both, only_first], [only_second, neither]]))
    half = norm.isf(LOWER) * found.std_kappa
    return found.kappa, found.kappa - half, found.kappa + half


def agreement_of_judges(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per benchmark and pair of judges, of the table `verdicts`.

    n (answers that both were asked), both, only_first, only_second and neither (called unsafe),
    unscored (by either), agreement (share of the scored), kappa, kappa_low, kappa_high.
    """
    rows = []
    for benchmark, part in verdicts.groupby("benchmark", observed=True):
        wide = part.pivot(index=list(RESPONSE_KEY), columns="judge", values="unsafe")
        asked = (
            part.assign(asked=True)
            .pivot(index=list(RESPONSE_KEY), columns="judge", values="asked")
            .notna()
        )
        for first, second in combinations(sorted(wide.columns), 2):
            common = wide[asked[first] & asked[second]]
            names = {"benchmark": benchmark, "first": first, "second": second}
            rows.append(names | _confusion(common[first], common[second]))
    return pd.DataFrame(rows)


def _confusion(first: pd.Series, second: pd.Series) -> dict[str, float]:
    scored = first.notna() & second.notna()
    a, b = first[scored].astype(bool), second[scored].astype(bool)
    cells = {"both": a & b, "only_first": a & ~b, "only_second": ~a & b, "neither": ~a & ~b}
    counts = {name: int(cell.sum()) for name, cell in cells.items()}
    found = dict(zip(("kappa", "kappa_low", "kappa_high"), kappa(**counts), strict=True))
    asked = {"n": len(scored), **counts, "unscored": int((~scored).sum())}
    return asked | {"agreement": (a == b).mean()} | found


def with_labels(said: Sequence[bool | None], true: Sequence[bool]) -> pd.Series:
    """A judge's or detector's word against labels: n, unscored, agreement, kappa, sensitivity,
    specificity, balanced_accuracy.

    kappa, sensitivity and specificity have an interval in _low and _high, the latter two
    Wilson's. What has no word is counted in unscored, and left out of the rest.
    """
    found = _confusion(pd.Series(list(said), dtype=object), pd.Series(list(true), dtype=object))
    kept = ("n", "unscored", "agreement", "kappa", "kappa_low", "kappa_high")
    row = {name: found[name] for name in kept}
    for name, hits, of in (
        ("sensitivity", "both", ("both", "only_second")),
        ("specificity", "neither", ("neither", "only_first")),
    ):
        k, n = found[hits], sum(found[one] for one in of)
        row[name] = k / n if n else np.nan
        row[f"{name}_low"], row[f"{name}_high"] = map(float, wilson(k, n))
    return pd.Series(row | {"balanced_accuracy": (row["sensitivity"] + row["specificity"]) / 2})
