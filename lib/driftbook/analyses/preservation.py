"""Notebook 15: changes with and without no-ops, and methods at equal dose; see `doses`."""

import pandas as pd

from driftbook.analyses import doses
from driftbook.stats import estimation, influence, terms
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES

OUTCOMES = {terms.UNSAFE: "safety", terms.REFUSED: "over_refusal"}


def configured(tables: Tables) -> pd.DataFrame:
    """The runs as configured, with their settings and doses."""
    return doses.runs_of(influence.arms(tables.variants, tables.runs), tables.runs)


def dose_estimates(tables: Tables, n_boot: int, seed: int) -> pd.DataFrame:
    """Every estimate of notebook 15: pairs of methods as configured and at equal dose, for unsafe
    responses and refusals."""
    earlier, usual, parts = tables.estimates_of("09_safety"), configured(tables), []
    changes = estimation.run_changes(earlier, OUTCOMES)
    for outcome in changes.columns:
        rows = picked(earlier, outcome=outcome, benchmark=OUTCOMES[outcome])
        own = {"outcome": outcome, "benchmark": OUTCOMES[outcome], "judge": rows["judge"].iloc[0]}
        names = {"study": tables.study.name, "notebook": "15_dose", **own}
        changed = usual.assign(value=usual["run_id"].map(changes[outcome]).astype(float))
        parts.append(doses.as_configured(changed, n_boot, seed, **names))
        parts += [doses.matched(changed, measure, n_boot, seed, **names) for measure in doses.DOSES]
    return ESTIMATES.concat(parts)


# ---- for reading
def no_ops_compared(tables: Tables) -> pd.DataFrame:
    """Runs, no-ops, and the mean change with and without them, by method and base model."""
    rows = picked(tables.estimates, outcome=terms.UNSAFE, contrast=terms.CHANGE, benchmark="safety")
    rows = picked(rows, estimator=terms.PRIMARY, judge=rows["judge"].iloc[:1].tolist())
    rows = rows.astype(dict.fromkeys(("value", "se", "ci_low", "ci_high"), float))
    return doses.with_and_without_no_ops(rows, influence.arms(tables.variants, tables.runs))


def worse_than_base(tables: Tables) -> pd.DataFrame:
    """How many runs end worse on held-out answers than their base model."""
    found = doses.below_base(configured(tables))
    return found.pivot(index="method", columns="base_model", values="worse")


def pairs_of_methods(estimates: pd.DataFrame) -> pd.DataFrame:
    """Differences of methods in the unsafe rate, as configured and at equal dose."""
    rows = picked(estimates, outcome=terms.UNSAFE)
    usual = rows["group"].eq(terms.AS_CONFIGURED) | rows["member"].eq(doses.MEAN_DOSE)
    index, columns = ["method", "against", "contrast"], "base_model"
    return rows[usual].pivot_table(index=index, columns=columns, values="value", sort=False)


def rates_for(tables: Tables, preset_kl: list[float]) -> pd.DataFrame:
    """The learning rates that would reach each dose, interpolated between those that ran."""
    rates = doses.rates_for_dose(configured(tables), preset_kl)
    index, columns = ["method", "objective"], ["dose", "base_model"]
    wide = rates.pivot(index=index, columns=columns, values="learning_rate").astype(float)
    return wide.map("{:.2g}".format, na_action="ignore")


def dose_sentence(tables: Tables, estimates: pd.DataFrame) -> str:
    """Which pairs of methods differ, as configured and at equal dose, in one sentence."""
    arms = influence.arms(tables.variants, tables.runs)
    unsafe = picked(estimates, outcome=terms.UNSAFE)
    return doses.sentence(unsafe, arms, "the unsafe-response rate")
