"""Notebook 15: changes with and without no-ops, and methods at equal dose; see `doses`."""

import pandas as pd

from driftbook.analyses import doses
from driftbook.stats import estimation, harm, influence, terms
from driftbook.stats.picking import in_words, picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES

DOSED = {**dict.fromkeys(harm.OF_SAFETY, "safety"), terms.REFUSED: "over_refusal"}


class Doses:
    """A study's runs as configured (`usual`), with their doses, and what notebook 15 estimates."""

    def __init__(self, tables: Tables):
        self.tables, self.arms = tables, influence.arms(tables.variants, tables.runs)
        self.usual = doses.dose_runs(self.arms, tables.runs)
        self.earlier = tables.estimates_of("09_safety")
        self.safety = harm.safety_outcome(self.earlier)

    def estimates(self, n_boot: int, seed: int) -> pd.DataFrame:
        """Pairs of methods as configured and at equal dose, for unsafe responses (without a judge
        answers that do not refuse) and refusals."""
        earlier, parts = self.earlier, []
        dosed = {
            name: asked for name, asked in DOSED.items() if name in (self.safety, terms.REFUSED)
        }
        changes = estimation.run_changes(earlier, dosed)
        for outcome in changes.columns:
            judge = picked(earlier, outcome=outcome, benchmark=DOSED[outcome])["judge"].iloc[0]
            own = {"outcome": outcome, "benchmark": DOSED[outcome], "judge": judge}
            names = {"study": self.tables.study.name, "notebook": "15_dose", **own}
            value = self.usual["run_id"].map(changes[outcome]).astype(float)
            runs = self.usual.assign(value=value)
            parts.append(doses.as_configured(runs, n_boot, seed, **names))
            parts += [doses.matched(runs, one, n_boot, seed, **names) for one in doses.DOSES]
        return ESTIMATES.concat(parts)

    # ---- for reading
    def with_and_without_no_ops(self) -> pd.DataFrame:
        """Runs, no-ops, and the mean change with and without them, by method and base model."""
        own = {"outcome": self.safety, "contrast": terms.CHANGE, "benchmark": "safety"}
        rows = picked(self.earlier, **own, estimator=terms.PRIMARY)
        rows = picked(rows, judge=rows["judge"].iloc[:1].tolist())
        rows = rows.astype(dict.fromkeys(("value", "se", "ci_low", "ci_high"), float))
        return doses.with_and_without_no_ops(rows, self.arms)

    def worse_than_base(self) -> pd.DataFrame:
        """How many runs end worse on held-out answers than their base model."""
        found = doses.below_base(self.usual)
        return found.pivot(index="method", columns="base_model", values="worse")

    def rates_for(self, preset_kl: list[float]) -> pd.DataFrame:
        """The learning rates that would reach each dose, interpolated between those that ran."""
        rates = doses.rates_for_dose(self.usual, preset_kl)
        several = rates["dataset"].nunique(dropna=False) > 1 or rates["epochs"].nunique() > 1
        index = ["method", "objective", *(["dataset", "epochs"] if several else [])]
        columns = ["dose", "base_model"]
        wide = rates.pivot(index=index, columns=columns, values="learning_rate").astype(float)
        return wide.map("{:.2g}".format, na_action="ignore")

    def sentence(self, estimates: pd.DataFrame) -> str:
        """Which pairs of methods differ, as configured and at equal dose, in one sentence."""
        rows, name = picked(estimates, outcome=self.safety), self.safety.partition(" (")[0]
        return doses.doses_sentence(rows, self.arms, f"the {name}")


def pairs_of_methods(estimates: pd.DataFrame) -> pd.DataFrame:
    """Differences of methods in the rate of harm, as configured and at equal dose."""
    rows = picked(estimates, outcome=harm.safety_outcome(estimates))
    usual = rows["group"].eq(terms.AS_CONFIGURED) | rows["member"].eq(doses.MEAN_DOSE)
    return in_words(rows[usual], ["method", "against", "contrast"], "base_model", places=1)
