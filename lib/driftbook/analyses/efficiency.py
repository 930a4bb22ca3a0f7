"""Notebook 12: what each method costs and gives, as estimates; see `tradeoffs` for how."""

import pandas as pd

from driftbook.analyses import correlations, information, outcomes, starts, tradeoffs
from driftbook.stats import estimation, harm, influence, terms
from driftbook.stats.picking import in_words, picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES


def tradeoff_estimates(tables: Tables, n_draws: int, n_boot: int, seed: int) -> pd.DataFrame:
    """Every estimate of notebook 12: utility and other ratings, probabilities of the Pareto front,
    correlations of changes, starts of soft prompts, and slopes of harm on costs."""
    names = {"study": tables.study.name, "notebook": "12_tradeoffs"}
    arms = influence.arms(tables.variants, tables.runs)
    cells = influence.cells(arms)
    asked = tables.verdicts, tables.prompts, tables.answers, tables.ratings
    measured = tradeoffs.measured(*asked, arms)
    measured = information.without_silent(measured, tables.estimates, arms)
    parts = []
    for outcome in (terms.LOSS, terms.CORRECT):
        if outcome in measured:
            own = {"outcome": outcome, "benchmark": "utility", "judge": "none", **names}
            parts.append(estimation.levels_of_scores(measured[outcome][0], arms, **own))
            parts.append(estimation.of_scores(*measured[outcome], cells, **own))
    parts.append(outcomes.of_ratings(tables.ratings, arms, cells, **names))
    settings = picked(cells, group=terms.SETTINGS)
    for outcome, goals in tradeoffs.goals_of(measured).items():
        own = {"outcome": outcome, **names}
        found = tradeoffs.fronts(measured, goals, arms, settings, n_draws, seed, **own)
        parts.append(found)
    safety = harm.safety_of(measured)
    parts.append(correlations.correlations(measured, arms, safety, n_boot, seed, **names))
    judge = tables.verdicts["judge"].iloc[0] if safety in measured else "none"
    parts.append(starts.start_estimates(measured, arms, tables.runs, judge, **names))
    if safety in measured:
        own = {"outcome": safety, "benchmark": "safety", "judge": judge, **names}
        parts.append(tradeoffs.slopes(measured[safety][1], arms, tables.runs, **own))
    return ESTIMATES.concat(parts)


# ---- for reading
def utility_changes(estimates: pd.DataFrame) -> pd.DataFrame:
    """The changes in utility and in every other rating, over all base models."""
    groups = [terms.TRAINED, terms.UNTRAINED]
    own = picked(estimates, notebook="12_tradeoffs", base_model="all", contrast=terms.CHANGE)
    own = picked(own, group=groups)
    return in_words(own, ["outcome", "benchmark", "group"], places=3)


def cost_slopes(estimates: pd.DataFrame) -> pd.DataFrame:
    """The change in the rate of harm that goes with ten times each cost."""
    slopes = [tradeoffs.SLOPE, tradeoffs.SLOPE_WITHIN]
    found = picked(estimates, contrast=slopes)
    return found[
        ["base_model", "contrast", "against", "value", "ci_low", "ci_high", "n_runs", "how"]
    ]


def front_shares(estimates: pd.DataFrame) -> pd.DataFrame:
    """Percent of draws in which a setting is on its base model's Pareto front."""
    both = {terms.FRONT: "accuracy", tradeoffs.FRONT_BIAS: "bias"}
    goals = {harm.worded(name, one): goal for name, goal in both.items() for one in harm.OF_SAFETY}
    rows = picked(estimates, outcome=list(goals))
    rows = rows.assign(goal=rows["outcome"].map(goals))
    index, columns = ["method", "member"], ["goal", "base_model"]
    return rows.pivot_table(
        index=index, columns=columns, values="value", observed=True, sort=False
    ).round(0)


def correlations_of(estimates: pd.DataFrame) -> pd.DataFrame:
    """Correlations of each change with the change in the rate of harm: raw, corrected for
    attenuation, within methods, and reliabilities; columns are their contrasts."""
    ours = estimates["contrast"].str.startswith(
        (correlations.CORRELATION, correlations.RELIABILITY)
    )
    rows = estimates[ours]
    wide = rows.pivot_table(
        index=["base_model", "outcome"],
        columns=rows["contrast"].str.replace(correlations.CORRELATION, "r", regex=False),
        values="value",
        observed=True,
        sort=False,
        dropna=False,
    )
    names = ["r", "r, corrected for attenuation"]
    names += ["r, within methods", "r, within methods, corrected for attenuation"]
    columns = [*names, correlations.RELIABILITY]
    return wide.dropna(how="all").astype(float).reindex(columns=columns)
