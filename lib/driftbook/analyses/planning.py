"""Notebook 16: what a grid of runs can show, and what more runs or prompts would add."""

import pandas as pd

from driftbook.analyses import (
    outcomes,
    power,
    power_components,
    power_joint,
    power_rows,
    power_simulation,
    tradeoffs,
)
from driftbook.stats import estimation, harm, influence, terms
from driftbook.stats.influence import Scores
from driftbook.stats.picking import picked
from driftbook.study.methods import METHOD_LABELS
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES, greedy

TRIALS = (
    {"rate": 0.15, "shift": 0.15, "run": 0.05, "agree": 0.8},
    {"rate": 0.3, "shift": 0.0, "run": 0.05, "agree": 0.9, "margin": 4.0},
)


class Grid:
    """A study's grid of runs with the components of variance of its changes, for planning.

    `single` are the components of each method against its base model, `own` those and the pairs of
    methods; `here` the runs of each method on each base model; `values` the verdicts, runs x
    prompts.
    """

    def __init__(self, tables: Tables, judge: str):
        self.study, self.judge, self.tables = tables.study, judge, tables
        rows = harm.with_harm(greedy(tables.verdicts)).merge(
            tables.prompts, on=["benchmark", "prompt_id"], validate="m:1"
        )
        rows = picked(rows, benchmark="safety", judge=judge)
        self.arms = influence.arms(tables.variants, tables.runs)
        self.cells = influence.cells(self.arms)
        self.values = influence.matrix(rows, "harm", outcomes.UNITS)
        self.here = power.power_grid(self.cells)
        self.n_prompts = self.values.shape[1]
        change = influence.paired(self.values, self.arms)
        self.units = {
            "family_size": power_components.family_size(change),
            "n_strata": self._n_strata(),
        }
        self.own = self._components(change)
        self.single = picked(self.own, other="none")

    def _n_strata(self) -> int:
        return self.values.columns.get_level_values(0).nunique()

    def _components(self, change: Scores) -> pd.DataFrame:
        """The components of this study's changes; spreads that it cannot know are borrowed."""
        found = power_components.components(change, picked(self.cells, group=terms.AS_CONFIGURED))
        rates = found.drop_duplicates("base_model").set_index("base_model")["rate"]
        likely = rates.clip(0.5, 99.5).to_dict()  # at 0 or 100 percent no prompt could vary
        return power_components.borrowed(
            found, power_components.assumed(likely, list(self.here["method"].unique()))
        )

    def planned(self) -> pd.DataFrame:
        """The runs and settings that the study file asked for, and those that ran."""
        keys = ["base_model", "method"]
        wanted = power.planned(self.study).merge(
            self.here, on=keys, how="left", suffixes=("_asked", "_ran")
        )
        wide = wanted.set_index(keys).unstack("base_model").astype("Int64")
        return wide.reindex(self.here["method"].unique()).T

    def plan(
        self, components: pd.DataFrame, grid: pd.DataFrame, n: int, examples: int = 4
    ) -> pd.DataFrame:
        """What the estimator will know of each contrast of such a grid (`power.precision`)."""
        return power.precision(components, grid, n, **self.units, examples=examples)

    def pairs(self) -> pd.DataFrame:
        """The plan of the differences between methods, with the smallest difference seen."""
        between = self.plan(self.own, self.here, self.n_prompts)
        return between[between["other"].ne("none")]

    def by_category(self, margin: float) -> pd.DataFrame:
        """What the runs can show in each category (`power.by_category`)."""
        return power_rows.by_category(self.values, self.arms, self.cells, margin)

    def expected(self, base_rate: float) -> pd.DataFrame:
        """The same plan before any work: from the study file, the original study's spread of runs
        and an expected rate of the base models."""
        rates = dict.fromkeys(self.study.bases, base_rate)
        assumed = power_components.assumed(rates, list(self.here["method"].unique()))
        n = self.study.benchmarks["safety"].n or self.n_prompts
        return self.plan(picked(assumed, other="none"), power.planned(self.study), n)

    def estimates(
        self, margin: float, seeds: list[int], more_prompts: int, base_rate: float, seed: int = 0
    ) -> pd.DataFrame:
        """Every estimate of notebook 16: what this grid shows, its components, pairs of methods,
        larger grids, what was expected before it ran, and the power of the declared joint test
        (drawn with `seed`)."""
        own = {"outcome": harm.of_judge(self.judge), "benchmark": "safety", "judge": self.judge}
        names = {"study": self.study.name, "notebook": "16_power", **own}
        plan = self.plan(self.single, self.here, self.n_prompts, examples=8)
        usual = terms.AS_CONFIGURED
        parts = [
            power_rows.of_plan(plan, usual, margin, **names),
            power_rows.of_components(self.single, usual, **names),
            power_rows.of_plan(self.pairs(), usual, margin, **names),
            estimation.complete(self._tried(seeds, more_prompts).assign(**names)),
            power_rows.of_plan(self.expected(base_rate), power_rows.PLANNED, margin, **names),
            self._jointly(seed, notebook=names["notebook"]),
        ]
        return ESTIMATES.concat(parts)

    def _jointly(self, seed: int, **labels: str) -> pd.DataFrame:
        """The power of the declared joint test, with this study as its pilot."""
        tables = self.tables
        asked = tables.verdicts, tables.prompts, tables.answers, tables.ratings
        pilot = power_joint.Pilot(tradeoffs.measured(*asked, self.arms), self.cells)
        return power_joint.joint_power(self.study, tables.estimates, seed, pilot=pilot, **labels)

    def _tried(self, seeds: list[int], more_prompts: int) -> pd.DataFrame:
        """The smallest increase seen with so many seeds a setting, and with more prompts."""
        parts = []
        for n in (self.n_prompts, more_prompts * self.n_prompts):
            for k in seeds:
                plan = self.plan(self.single, power.with_seeds(self.here, k), n)
                own = {
                    "group": power_rows.GRID,
                    "member": str(k),
                    "category": f"{n} prompts",
                    "n_items": n,
                }
                found = plan.assign(**own, against=plan["other"], contrast=power_rows.SMALLEST)
                found = found.assign(population=terms.BOTH, **power.minimum_detectable(plan))
                parts.append(found.drop(columns=["se", "example"]))
        return pd.concat(parts, ignore_index=True)

    # ---- for reading
    def original_spread(self) -> pd.DataFrame:
        """The spread of runs with equal settings in the original study, and here."""
        spread = self.single.groupby("method", sort=False)["run"].mean().rename("run, here")
        known = power_components.ORIGINAL.set_index("method")[["run", "df_run"]]
        return known.merge(spread, left_index=True, right_index=True)

    def category_table(self, by_category: pd.DataFrame) -> pd.DataFrame:
        """The smallest margin over all base models by category, and the prompts needed."""
        overall = power_rows.over_all(by_category).astype({"needs": float})
        values = {"values": ["smallest", "needs"], "sort": False, "dropna": False}
        return overall.pivot_table(index="category", columns="method", **values)

    def category_sentence(self, by_category: pd.DataFrame, margin: float) -> str:
        """In how many pairs of category and method these runs cannot tell, in one sentence."""
        n = self.values.T.groupby(level=0).size().median()
        single = by_category[by_category["base_model"].ne("all")]
        words = []
        overall = power_rows.over_all(by_category)
        parts = [("over all base models", overall), ("on a single base model", single)]
        if single["base_model"].nunique() == 1:
            parts = [("on the one base model", single)]
        for name, part in parts:
            unsure, unknown = (part["says"].eq(word).sum() for word in ("cannot tell", "not known"))
            words.append(
                f"{name}, {unsure} of {len(part)} pairs of category and method cannot tell,"
                f" {unknown} are not known (nothing varied, or no setting was run twice)"
            )
        return f"**With {n:.0f} prompts a category, at {margin:g} points:** {'; '.join(words)}."

    @staticmethod
    def jointly(estimates: pd.DataFrame) -> pd.DataFrame:
        """The power of the declared joint test in percent, by family, margin and method; empty
        where none is declared or its outcomes have no estimates yet."""
        rows = picked(estimates, contrast=power_joint.JOINT_POWER)
        rows = rows.astype({"value": float, "margin": float})
        rows = rows.rename(columns={"member": "family"})
        by = ["family", "margin", "method", "base_model"]
        return rows.set_index(by)["value"].unstack("base_model", sort=False)

    def sentence(self, estimates: pd.DataFrame, margin: float) -> str:
        """What this grid could show, in one sentence."""
        return power_rows.power_sentence(estimates, METHOD_LABELS, margin)


# ---- for reading
def shown(estimates: pd.DataFrame, group: str, **wanted: str) -> pd.DataFrame:
    """The estimates of one group of plans by method and base model."""
    rows = picked(estimates, group=group, **wanted).astype({"value": float})
    index = ["contrast", "against", "method"]
    kept = {"columns": "base_model", "values": "value", "sort": False, "dropna": False}
    return rows.pivot_table(index=index, **kept).dropna(how="all")


def formula_checked(n_sets: int, seed: int) -> pd.DataFrame:
    """The power by simulated verdicts beside the formula's, for two kinds of studies."""
    rows = [
        {
            "rate": trial["rate"],
            "margin": trial.get("margin"),
            **power_simulation.simulated(n_sets, seed, **trial),
        }
        for trial in TRIALS
    ]
    return pd.DataFrame(rows)
