"""Notebook 11: linear mixed models of changes by category, logistic ones of single verdicts, and
which factor is secondary.
"""

import pandas as pd

from driftbook.analyses import factors, marginal_means
from driftbook.stats import estimation, influence, terms
from driftbook.stats.mixed import MixedFit, item_model, rate_model
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES, greedy

SETTINGS = ("objective", "dataset", "epochs", "repetition")
SIMPLE = "difference ~ base_model * method + method:objective + method:log10_rate"
BY_METHOD = ("run_id by method", "category")
LOGISTIC = "unsafe ~ base_model * method + method:dpo + method:log10_rate"
CROSSED = {
    "crossed": ("run_id", "prompt_id"),
    "maximal": ("run_id", "prompt_id", "prompt_id:base_model", "prompt_id:method"),
}
MIXED = ("mixed", "mixed, one run variance")
POOLED, BY_BASE = "pooled", "by base model"
COMPARED = {
    "primary": terms.PRIMARY,
    "linear mixed": "mixed",
    "logistic, crossed": "crossed",
    "logistic, maximal": "maximal",
}


def first_judge(tables: Tables) -> str:
    """The first judge of the unsafe rates."""
    return picked(tables.rates, outcome="unsafe", benchmark="safety")["judge"].iloc[0]


def differences_of(tables: Tables, judge: str) -> pd.DataFrame:
    """A row per run and category: the change of the unsafe rate in points, with the run's settings
    (`estimation.differences`)."""
    arms = influence.arms(tables.variants, tables.runs)
    unsafe = picked(tables.rates, outcome="unsafe", benchmark="safety", judge=judge)
    return estimation.differences(unsafe, arms)


def verdict_items(tables: Tables, judge: str) -> pd.DataFrame:
    """A row per run and harmful prompt, for a logistic model; empty where all verdicts are alike or
    nothing was trained."""
    arms = influence.arms(tables.variants, tables.runs)
    rows = greedy(tables.verdicts).merge(
        tables.prompts, on=["benchmark", "prompt_id"], validate="m:1"
    )
    rows = picked(rows, benchmark="safety", kind="harmful", judge=judge)
    items = marginal_means.items(rows, arms)
    usable = items["unsafe"].nunique() == 2 and items["method"].ne("none").any()
    return items if usable else items.iloc[:0]


def logistic_fits(tables: Tables, judge: str) -> dict[str, MixedFit]:
    """The crossed and the maximal logistic model of single verdicts; none where all are alike."""
    items = verdict_items(tables, judge)
    models = CROSSED.items() if len(items) else ()
    return {name: item_model(items, LOGISTIC, groups) for name, groups in models}


def mixed_estimates(
    tables: Tables, fits: dict[str, MixedFit], judge: str, n_boot: int, seed: int
) -> pd.DataFrame:
    """Every estimate of notebook 11 from its fits (by "pooled", base model, "mixed", "mixed, one run
    variance", "crossed", "maximal"), and the shares and contrasts of factors."""
    own = {"notebook": "11_mixed_effects", "outcome": terms.UNSAFE, "benchmark": "safety"}
    names = {"study": tables.study.name, "judge": judge, **own}
    rows = differences_of(tables, judge)
    scored = rows[rows["difference"].notna()]
    parts = [*_linear(scored, rows, fits, names), *_of_factors(tables, judge, n_boot, seed, names)]
    if any(name in fits for name in CROSSED):
        items = verdict_items(tables, judge)
        cells = marginal_means.grid(items[items["unsafe"].notna()], ("dpo",))
        asked = marginal_means.contrasts(cells)
        for name in CROSSED:
            parts.append(marginal_means.of_risks(fits[name], cells, *asked, name, **names))
    return ESTIMATES.concat(parts)


def _linear(
    scored: pd.DataFrame, rows: pd.DataFrame, fits: dict[str, MixedFit], names: dict[str, str]
) -> list[pd.DataFrame]:
    """The contrasts of the linear fits: changes over all base models from the pooled one, of each
    base model from its own, all of them from the mixed ones; then the effects of settings."""
    if scored.empty:
        return []
    grid = marginal_means.grid(scored, SETTINGS)
    asked, weights = marginal_means.contrasts(grid)
    changes = asked["contrast"].eq(terms.CHANGE)

    def of(name: str, keep: pd.Series, estimator: str) -> pd.DataFrame:
        kept = asked[keep].reset_index(drop=True)
        return marginal_means.of_fit(fits[name], grid, kept, weights[keep], estimator, **names)

    parts = [of(POOLED, changes & asked["base_model"].eq("all"), POOLED)]
    for base_model in scored["base_model"].unique():
        parts.append(of(base_model, changes & asked["base_model"].eq(base_model), BY_BASE))
    parts += [of(name, asked["contrast"].notna(), name) for name in MIXED]
    return [*parts, *_of_settings(rows, names)]


def _of_settings(rows: pd.DataFrame, names: dict[str, str]) -> list[pd.DataFrame]:
    """What objective and learning rate do within a method."""
    steps = [("log10_rate", 0.0, 1.0)]
    if {"sft", "dpo"} <= set(rows["objective"]):
        steps.insert(0, ("objective", "dpo", "sft"))
    simple = rate_model(rows, SIMPLE, BY_METHOD)
    parts = []
    for step in steps:
        both, weights, methods = marginal_means.effects(
            marginal_means.grid(rows, ("objective",)), *step
        )
        parts.append(marginal_means.of_fit(simple, both, methods, weights, "mixed", **names))
    return parts


def _earlier(tables: Tables, judge: str) -> pd.DataFrame:
    """Notebook 09's estimates of the safety benchmark."""
    return picked(tables.estimates, notebook="09_safety", benchmark="safety", judge=judge)


def _of_factors(
    tables: Tables, judge: str, n_boot: int, seed: int, names: dict[str, str]
) -> list[pd.DataFrame]:
    """The largest contrasts of factors (by cell and by mean) and their shares of the variance."""
    change = estimation.run_changes(_earlier(tables, judge), {terms.UNSAFE: "safety"})
    if terms.UNSAFE not in change:
        return []
    arms = influence.arms(tables.variants, tables.runs)
    trained = factors.runs_of(arms, change[terms.UNSAFE])
    contrasts = [
        factors.matched_contrasts(trained, grain, seed=seed)
        for grain in (factors.CELL, factors.MEAN)
    ]
    largest = [factors.largest_contrasts(one, **names) for one in contrasts]
    return [*largest, factors.variance_shares(trained, n_boot, seed, **names)]


# ---- for reading
def spreads(fits: dict[str, MixedFit]) -> pd.DataFrame:
    """The standard deviations of the random effects, a column per fit."""
    parts = {name: fit.random.set_index("group")["sd"] for name, fit in fits.items()}
    return pd.concat(parts, axis=1) if parts else pd.DataFrame()


def convergence(fits: dict[str, MixedFit]) -> pd.DataFrame:
    """A row per fit: whether it converged, the optimiser's report, and its notes."""
    rows = {
        name: {"converged": fit.converged, **fit.report, "notes": "; ".join(fit.notes)}
        for name, fit in fits.items()
    }
    return pd.DataFrame(rows).T


def estimators_compared(tables: Tables, estimates: pd.DataFrame) -> pd.DataFrame:
    """The change of each method and base model by each estimator, and whether they agree."""
    judge = picked(estimates, outcome=terms.UNSAFE)["judge"].drop_duplicates()
    known = ESTIMATES.concat([_earlier(tables, one) for one in judge] + [estimates])
    table = marginal_means.side_by_side(picked(known, outcome=terms.UNSAFE), COMPARED)
    return table["value"].reindex(columns=list(COMPARED)).assign(agreement=table["word"])


def secondary_factors(estimates: pd.DataFrame) -> pd.DataFrame:
    """Factors x methods: "secondary", "not secondary" or "cannot tell"; empty where no contrast."""
    has = estimates["contrast"].eq(factors.EXCESS).any()
    return factors.verdicts(estimates) if has else pd.DataFrame()
