"""Notebook 14: repairs at their chosen levels against their parents and controls; see `repairs`."""

from functools import cached_property

import pandas as pd

from driftbook.analyses import information, joint, repairs, rescaling, second_tuning
from driftbook.stats import harm
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES


class Repaired:
    """A study's repairs, their parents and controls (`runs`), scored from `own` tables.

    `report` holds the tables with the half of the safety prompts and held-out answers that is
    reported on; `points` is the table `frontier`, the numbers of each run on either half.

    Raises:
        ValueError: the study repairs no runs.
    """

    def __init__(self, tables: Tables):
        self.study, self.spectra = tables.study, tables.spectra
        self.own = repairs.Tables(*(getattr(tables, name) for name in repairs.Tables._fields))
        self.silent = information.unread_in(tables.estimates)
        self.runs = repairs.repairs(tables.variants, tables.runs)
        if self.runs.empty:
            raise ValueError(
                f"the study {self.study.name} repairs no runs; give it mitigations, as"
                " studies/safe_lora.yaml does"
            )

    @cached_property
    def points(self) -> pd.DataFrame:
        return repairs.points(self.own, self.runs, self.study.seed)

    @cached_property
    def report(self) -> repairs.Tables:
        return repairs.halves(self.own, self.study.seed)[repairs.REPORT]

    def levels(self, keep: float) -> pd.DataFrame:
        """The level of each repair on each base model, chosen on the calibration half."""
        return repairs.chosen(self.points, self.runs, keep)

    def at(self, levels: pd.DataFrame) -> pd.DataFrame:
        """The runs of every repair and of its controls at the chosen level."""
        return repairs.at_chosen(self.runs, levels)

    def estimates(self, levels: pd.DataFrame) -> pd.DataFrame:
        """Every estimate of notebook 14: repairs against parents, base models and controls, against
        rescaling that keeps as much, in each BBQ dimension, and in all goals at once; and what is
        left of them after a second tuning."""
        names = {"study": self.study.name, "notebook": "14_safe_lora"}
        chosen = (self.own, self.runs, levels)
        pairs = repairs.repairs_compared(*chosen, self.study.seed, self.silent, **names)
        leading = filter(None, (repairs.leading(self.runs), repairs.leading(self.runs, "rescale")))
        dimensions = repairs.by_dimension(*chosen, leading, self.silent, **names)
        beside = rescaling.beside_rescaling(self.points, self.runs, levels, **names)
        at_once = joint.joint(*chosen, pairs, self.study.seed, self.silent, **names)
        parts = [pairs, dimensions, beside, at_once]
        if len(self.again):
            again = (self.own, self.again, self.worst_rates, self.study.seed)
            parts.append(second_tuning.defences_compared(*again, **names))
        return ESTIMATES.concat(parts)

    # ---- second tunings
    @cached_property
    def again(self) -> pd.DataFrame:
        """The second tunings of the study; see `second_tuning`."""
        return second_tuning.second_tunings(self.own.variants, self.own.runs)

    @cached_property
    def again_levels(self) -> pd.DataFrame:
        """Unsafe answers and gain of the runs behind them, on either half."""
        return second_tuning.levels(self.own, self.again, self.study.seed)

    @cached_property
    def worst_rates(self) -> pd.DataFrame:
        """The rate at which each defence is judged on each base model."""
        return second_tuning.worst_rates(second_tuning.at_each_rate(self.again, self.again_levels))

    def held(self, estimates: pd.DataFrame) -> pd.DataFrame:
        """What holds once and what holds twice; empty where the study tunes nothing again."""
        if self.again.empty:
            return self.again
        return second_tuning.what_holds(estimates, self.worst_rates)

    def held_sentences(self, estimates: pd.DataFrame) -> str:
        """The same in words."""
        outcome = harm.safety_outcome(estimates)
        plain = second_tuning.plain_sentence(self.again, self.again_levels, outcome)
        return f"{plain} {second_tuning.held_sentence(self.held(estimates))}"

    # ---- for reading
    def counts(self) -> pd.DataFrame:
        """How many runs each repair and each of its controls has, by level."""
        kept = {"values": "run_id", "aggfunc": "count", "dropna": False, "sort": False}
        runs = self.runs.assign(control=self.runs["control"].fillna("itself"))
        counts = runs.pivot_table(index=["name", "value"], columns="control", **kept)
        return counts.dropna(how="all").fillna(0).astype(int)

    def shape_of_v(self) -> pd.DataFrame:
        """By base model and pair: the norm of V, its effective rank, and its share of full."""
        rows = self.spectra.drop_duplicates(["base_model", "pair", "module"])
        smaller = rows[["out_features", "in_features"]].min(axis=1)
        rows = rows.assign(share=rows["effective_rank_v"] / smaller)
        columns = ["norm_v", "effective_rank_v", "share"]
        return rows.groupby(["base_model", "pair"], sort=False)[columns].mean().astype(float)

    def sentence(self, estimates: pd.DataFrame) -> str:
        """What the leading Safe LoRA repair did at its chosen level, whether any arm gains in
        everything at once, and where the study tunes its runs again, what holds.
        """
        name = repairs.leading(self.runs)
        own = [repairs.repairs_sentence(estimates, name)] if name else []
        own.append(joint.joint_sentence(estimates))
        return " ".join([*own, *([self.held_sentences(estimates)] if len(self.again) else [])])

    @staticmethod
    def at_once(estimates: pd.DataFrame) -> pd.DataFrame:
        """Arms x what was found in all goals over all base models, with words and costs."""
        return joint.arms_shown(estimates)

    @staticmethod
    def levels_shown(levels: pd.DataFrame) -> pd.DataFrame:
        """Repairs x base models: the chosen level, and on how many base models it keeps enough."""
        which = repairs.LEVEL_OF[1:]
        table = levels.set_index([*which, "base_model"])["value"].unstack()
        return table.assign(
            **{"keeps enough on": levels.groupby(which, dropna=False)["enough"].sum()}
        )


def tested(estimates: pd.DataFrame) -> pd.DataFrame:
    """The tests of safety's outcome over all base models, with Holm's adjusted p values."""
    rows = picked(estimates, base_model="all", outcome=harm.safety_outcome(estimates))
    columns = [
        "member",
        "contrast",
        "against",
        "value",
        "ci_low",
        "ci_high",
        "p_adjusted",
        "n_runs",
    ]
    return rows.loc[rows["family_of_tests"].notna(), columns]


def published_numbers() -> pd.DataFrame:
    """Hsu et al. 2024, Tables 1 to 4: utility and attack success rate, as published."""
    wide = {"index": ["setting", "base_model"], "columns": "method", "values": ["utility", "asr"]}
    return repairs.published().pivot(**wide).fillna("")
