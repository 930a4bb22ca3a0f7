"""Notebook 11: linear mixed models of changes by category, logistic ones of single verdicts, and
which factor is secondary.
"""

from functools import cached_property

import pandas as pd

from driftbook.analyses import factors, marginal_means, variance_shares
from driftbook.stats import estimation, harm, influence, terms
from driftbook.stats.linear import rate_model
from driftbook.stats.logistic import item_model
from driftbook.stats.mixed import MixedFit
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES, greedy

HELD_EQUAL = ("objective", "dataset", "epochs", "repetition")
SIMPLE = "difference ~ base_model * method + method:objective + method:log10_rate"
# A base model's one score in a category is in all its runs' changes, and its error with it.
SHARED_ERRORS = ("category", "base_model:category", "method:category")
BY_METHOD = ("run_id by method", *SHARED_ERRORS)
LOGISTIC = "harm ~ base_model * method + method:dpo + method:log10_rate"
# Methods answer other prompts, and a difference of methods has that error whatever the runs.
CROSSED = {
    "crossed": ("run_id by method", "prompt_id", "prompt_id:method"),
    "maximal": ("run_id by method", "prompt_id", "prompt_id:method", "prompt_id:base_model"),
}
MIXED = ("mixed", "mixed, one run variance")
POOLED, BY_BASE = "pooled", "by base model"
COMPARED = {
    "primary": terms.PRIMARY,
    "linear mixed": "mixed",
    "logistic, crossed": "crossed",
    "logistic, maximal": "maximal",
}


class MixedModels:
    """The rows that notebook 11 models, its fits by name, and the estimates from them.

    `rows` has a row per run and category (the change of the rate of harm in points, with the run's
    settings), `scored` those with a change. `fits` holds "pooled", each base model, "mixed",
    "mixed, one run variance", and after `fit_verdicts` "crossed" and "maximal".
    """

    by_method = BY_METHOD  # the groups of the mixed model: a run variance for each method

    def __init__(self, tables: Tables, judge: str = ""):
        self.tables, self.fits = tables, {}
        counted = picked(tables.rates, outcome=["unsafe", "not refused"], benchmark="safety")
        self.judge = judge or counted["judge"].iloc[0]
        self.outcome = harm.of_judge(self.judge)
        self.arms = influence.arms(tables.variants, tables.runs)
        self.rows = estimation.differences(picked(counted, judge=self.judge), self.arms)
        self.scored = self.rows[self.rows["difference"].notna()]
        own = {"notebook": "11_mixed_effects", "outcome": self.outcome, "benchmark": "safety"}
        self.names = {"study": tables.study.name, "judge": self.judge, **own}

    @staticmethod
    def converged(fit: MixedFit) -> bool:
        """Whether a fit converged, or had nothing to converge to: no residual, so no interval."""
        return fit.converged or any("no residual" in note for note in fit.notes)

    @cached_property
    def items(self) -> pd.DataFrame:
        """A row per run and harmful prompt; empty where all verdicts are alike or nothing was
        trained."""
        rows = harm.with_harm(greedy(self.tables.verdicts)).merge(
            self.tables.prompts, on=["benchmark", "prompt_id"], validate="m:1"
        )
        rows = picked(rows, benchmark="safety", kind="harmful", judge=self.judge)
        items = marginal_means.items(rows, self.arms)
        usable = items["harm"].nunique() == 2 and items["method"].ne("none").any()
        return items if usable else items.iloc[:0]

    def fit_verdicts(self) -> dict[str, MixedFit]:
        """The crossed and the maximal logistic model of single verdicts, added to the fits."""
        models = CROSSED.items() if len(self.items) else ()
        found = {name: item_model(self.items, LOGISTIC, groups) for name, groups in models}
        self.fits |= found
        return found

    def estimates(self, n_boot: int, seed: int) -> pd.DataFrame:
        """Every estimate of notebook 11 from its fits, and the shares and contrasts of factors."""
        parts = [*self._linear(), *self._of_factors(n_boot, seed)]
        known = self.items[self.items["harm"].notna()]
        for name in (name for name in CROSSED if name in self.fits):
            cells = marginal_means.means_grid(known, ("dpo",))
            asked = marginal_means.contrasts(cells)
            fit = self.fits[name]
            parts.append(marginal_means.of_risks(fit, cells, *asked, name, **self.names))
        return ESTIMATES.concat(parts)

    def _linear(self) -> list[pd.DataFrame]:
        """The contrasts of the linear fits: changes over all base models from the pooled one, of
        each base model from its own, all of them from the mixed ones; then effects of settings."""
        if self.scored.empty:
            return []
        grid = marginal_means.means_grid(self.scored, HELD_EQUAL)
        asked, weights = marginal_means.contrasts(grid)
        changes, of = asked["contrast"].eq(terms.CHANGE), asked["base_model"]
        wanted = [(POOLED, changes & of.eq("all"), POOLED)]
        for base_model in self.scored["base_model"].unique():
            wanted.append((base_model, changes & of.eq(base_model), BY_BASE))
        wanted += [(name, asked["contrast"].notna(), name) for name in MIXED]
        parts = []
        for name, keep, estimator in wanted:
            kept, fit = asked[keep].reset_index(drop=True), self.fits[name]
            parts.append(
                marginal_means.of_fit(fit, grid, kept, weights[keep], estimator, **self.names)
            )
        return [*parts, *self._of_settings()]

    def _of_settings(self) -> list[pd.DataFrame]:
        """What objective and learning rate do within a method."""
        steps = [("log10_rate", 0.0, 1.0)]
        if {"sft", "dpo"} <= set(self.rows["objective"]):
            steps.insert(0, ("objective", "dpo", "sft"))
        simple, grid = (
            rate_model(self.rows, SIMPLE, BY_METHOD),
            marginal_means.means_grid(self.rows, ("objective",)),
        )
        parts = []
        for step in steps:
            both, weights, methods = marginal_means.effects(grid, *step)
            found = marginal_means.of_fit(simple, both, methods, weights, "mixed", **self.names)
            parts.append(found)
        return parts

    @property
    def _earlier(self) -> pd.DataFrame:
        """Notebook 09's estimates of the safety benchmark."""
        own = {"notebook": "09_safety", "benchmark": "safety", "judge": self.judge}
        return picked(self.tables.estimates, **own)

    def _of_factors(self, n_boot: int, seed: int) -> list[pd.DataFrame]:
        """The largest contrasts of factors (by cell and by mean) and their shares of variance; of
        runs of which no two differ in one factor alone the shares, which say so.
        """
        change = estimation.run_changes(self._earlier, {self.outcome: "safety"})
        if self.outcome not in change:
            return []
        trained = factors.factor_runs(self.arms, change[self.outcome])
        if trained["value"].isna().all():  # nothing was trained, or nothing of it was scored
            return []
        grains = factors.CELL, factors.MEAN
        contrasts = [factors.matched_contrasts(trained, grain, seed=seed) for grain in grains]
        known = [one for one in contrasts if len(one)]  # one without rows does not say its grain
        largest = [factors.largest_contrasts(one, **self.names) for one in known]
        return [*largest, variance_shares.variance_shares(trained, n_boot, seed, **self.names)]

    # ---- for reading
    def convergence(self) -> pd.DataFrame:
        """A row per fit: whether it converged, the optimiser's report, and its notes."""
        rows = {
            name: {"converged": fit.converged, **fit.report, "notes": "; ".join(fit.notes)}
            for name, fit in self.fits.items()
        }
        return pd.DataFrame(rows).T

    def compared(self, estimates: pd.DataFrame) -> pd.DataFrame:
        """The change of each method and base model by each estimator, and whether they agree; no
        row where nothing was trained.
        """
        known = picked(ESTIMATES.concat([self._earlier, estimates]), outcome=self.outcome)
        if picked(known, contrast=terms.CHANGE, group=terms.AS_CONFIGURED).empty:
            return pd.DataFrame(columns=[*COMPARED, "agreement"])
        table = marginal_means.side_by_side(known, COMPARED)
        return table["value"].reindex(columns=list(COMPARED)).assign(agreement=table["word"])


def spreads(fits: dict[str, MixedFit]) -> pd.DataFrame:
    """The standard deviations of the random effects, a column per fit."""
    parts = {name: fit.random.set_index("group")["sd"] for name, fit in fits.items()}
    return pd.concat(parts, axis=1) if parts else pd.DataFrame()


def secondary_factors(estimates: pd.DataFrame) -> pd.DataFrame:
    """Factors x methods: "secondary", "not secondary" or "cannot tell"; empty where no contrast."""
    has = estimates["contrast"].eq(factors.EXCESS).any()
    return factors.verdicts(estimates) if has else pd.DataFrame()
