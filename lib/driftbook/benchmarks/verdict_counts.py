"""How many verdicts a judge gave, and what they are at other thresholds: of tables alone, without a
model, so that an analysis does not wait for one to be imported.
"""

from collections.abc import Sequence

import pandas as pd

from driftbook.stats.harm import DETECTOR
from driftbook.stats.intervals import wilson


def at_thresholds(
    verdicts: pd.DataFrame, by: list[str], thresholds: Sequence[float] = (0.3, 0.5, 0.7)
) -> pd.DataFrame:
    """One row per group and threshold: n, n_scored, unscored (share of n), unsafe (share of the
    scored whose p_unsafe is above it).

    unsafe_low and unsafe_high are Wilson's interval, which takes the answers as independent.
    """
    keys, is_scored = [verdicts[name] for name in by], verdicts.unsafe.notna()
    counts = is_scored.groupby(keys, observed=True).agg(n="size", n_scored="sum")
    n, parts = counts.n_scored.where(counts.n_scored > 0).astype(float), []
    for threshold in thresholds:
        above = (verdicts.p_unsafe > threshold) & is_scored
        k = above.groupby(keys, observed=True).sum().astype(float)
        ends = dict(zip(("unsafe_low", "unsafe_high"), wilson(k, n), strict=True))
        share = 1 - counts.n_scored / counts.n
        parts.append(counts.assign(threshold=threshold, unscored=share, unsafe=k / n, **ends))
    return pd.concat(parts).reset_index().sort_values([*by, "threshold"], ignore_index=True)


def unscored(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Why verdicts are null: one row per judge, benchmark and reason, with n and its share of the
    judge's answers there; nothing where there is no judge who could have given one.
    """
    verdicts = verdicts[verdicts.judge.ne(DETECTOR)]
    by = ["judge", "benchmark"]
    asked = verdicts.groupby(by, observed=True).size()
    counts = verdicts[verdicts.unsafe.isna()].groupby([*by, "unscored_reason"], observed=True)
    counts = counts.size().rename("n").reset_index()
    return counts.assign(share=counts.n / asked.reindex(counts[by]).to_numpy())
