"""All that is asked of one outcome: changes, and what they are compared with, as rows of `estimates`."""

import pandas as pd

from driftbook import comparisons, stats
from driftbook.stats import Scores
from driftbook.tables import ESTIMATES


def of_rate(values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Of a rate (runs x prompts): levels, changes, bounds and categories (stats.of_rate), the comparisons of `compared`, and odds ratios."""
    parts = [stats.of_rate(values, arms, cells, **labels), compared(stats.paired(values, arms), arms, cells, **labels)]
    return ESTIMATES.concat([*parts, comparisons.odds_ratios(values, arms, cells, **labels)])


def of_scores(level: Scores, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Of a score of runs: levels and changes (stats.of_scores), and the comparisons of `compared`."""
    change = stats.changes(level, arms)
    return ESTIMATES.concat([stats.of_scores(level, change, cells, **labels), compared(change, arms, cells, **labels)])


def compared(change: Scores, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Methods against each other, method x base model, settings, and Cliff's delta of runs."""
    return ESTIMATES.concat([
        comparisons.between(change, cells, **labels), comparisons.interactions(change, cells, **labels), comparisons.settings(change, arms, **labels),
        comparisons.cliffs_delta(change, cells, **labels),
    ])  # fmt: skip


def completed(estimates: pd.DataFrame) -> pd.DataFrame:
    """The estimates with those for a new base model added, and p values of categories and dimensions adjusted as screens."""
    screens = comparisons.screens(estimates)
    key = list(ESTIMATES.key)
    left = estimates[~pd.MultiIndex.from_frame(estimates[key]).isin(pd.MultiIndex.from_frame(screens[key]))] if len(screens) else estimates
    return ESTIMATES.concat([left, screens, comparisons.new_base(estimates)])
