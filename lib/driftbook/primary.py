"""The primary tests of a study, found among its estimates: families declared in the study file, p values adjusted within each."""

import pandas as pd

from driftbook import comparisons, stats
from driftbook.study import Family, Study
from driftbook.tables import ESTIMATES

OUTCOMES = {
    "unsafe": (stats.UNSAFE, "safety"), "over_refusal": (stats.REFUSED, "over_refusal"), "refused": (stats.REFUSED, "safety"),
    "accuracy_ambiguous": (stats.ACCURACY_AMB, "bbq"), "accuracy_disambiguated": (stats.ACCURACY_DIS, "bbq"), "bias_ambiguous": (stats.BIAS_AMB, "bbq"),
    "bias_disambiguated": (stats.BIAS_DIS, "bbq"), "loss": (stats.LOSS, "utility"), "correct": (stats.CORRECT, "utility"),
}  # fmt: skip


def tests(study: Study, estimates: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `estimates` that the families test, with p_adjusted by Holm within each, and a sentence for each test that has no p value."""
    parts, missing = [], []
    for name, family in study.primary.items():
        rows = _preserves(study, family, estimates) if family.test == "preserves" else _compared(study, family, estimates)
        if rows.empty:
            missing.append(f"{name}: there is no estimate of what it tests")
            continue
        rows = comparisons.holm(rows, name)
        missing += [f"{name}: {_named(row)} cannot be tested ({row.how})" for row in rows[rows["p"].isna()].itertuples()]
        parts.append(rows)
    return ESTIMATES.concat(parts), missing


def _named(row) -> str:
    return f"{row.method}, {row.contrast}, {row.outcome}" + ("" if row.base_model == "all" else f", {row.base_model}")


def _scope(study: Study, family: Family, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the family's methods, base models and group, by the study's first judge."""
    methods = family.methods or tuple(study.methods)
    rows = rows[rows["method"].isin(methods) & rows["group"].eq(family.group) & (rows["base_model"].eq("all") == (family.bases == "all together"))]
    return rows[~rows["judge"].isin(list(study.judges)[1:])]


def _compared(study: Study, family: Family, estimates: pd.DataFrame) -> pd.DataFrame:
    pairs = pd.MultiIndex.from_tuples([OUTCOMES[name] for name in family.outcomes])
    rows = _scope(study, family, estimates[pd.MultiIndex.from_frame(estimates[["outcome", "benchmark"]]).isin(pairs)])
    methods = family.methods or tuple(study.methods)
    contrasts = [stats.CHANGE] if family.test == "change" else [comparisons.DIFFERENCE.format(method) for method in methods]
    return rows[rows["contrast"].isin(contrasts)]
