"""Notebook 17: a judge corrected by labels of people or of a known rule; see `labelling`."""

from functools import cached_property

import pandas as pd
from IPython.display import HTML, clear_output, display

from driftbook import benchmarks
from driftbook.analyses import labelling
from driftbook.stats import agreement, influence, terms
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES, TABLES, greedy

RULE = "rule"  # the rater of the miniature's known truth


def _show(page: str) -> None:
    """Show an answer in place of the one before, so that a notebook that is saved keeps none."""
    clear_output()
    display(HTML(page))


class Labelled:
    """A study's answers to harmful prompts by its first judge (`answers`: of the base models and of
    the runs as configured), those `drawn` to be labelled, and the `labels` that were given.

    `people` holds the labels of all filled sheets; `labels` those of the first person, or of the
    known rule where nobody has labelled; `errors` the judge's sensitivity and specificity.
    """

    def __init__(self, tables: Tables, n: int, seed: int):
        self.tables, self.judge = tables, tables.verdicts["judge"].iloc[0]
        self.answers, self.seed = self._answers(), seed
        self.drawn = labelling.draw(self.answers, n, seed)
        self.truth = picked(tables.labels, rater=RULE)

    def _answers(self) -> pd.DataFrame:
        arms = influence.arms(self.tables.variants, self.tables.runs)
        compared = picked(arms, arm=[terms.TRAINED, terms.NO_OP, "base"])
        rows = greedy(self.tables.verdicts).merge(
            self.tables.prompts, on=["benchmark", "prompt_id"], validate="m:1"
        )
        rows = picked(rows, benchmark="safety", kind="harmful", judge=self.judge)
        return rows.merge(compared[["run_id", "base_model", "method"]], on="run_id")

    def collect(self, rater: str) -> pd.DataFrame:
        """The labels of all filled sheets, after writing the sheet where texts are there and no
        rule knows the truth, and after asking the rater, where one is named."""
        sheets = self.tables.study.folder / "labels"
        has_texts = TABLES["responses"].path(self.tables.folder).is_file()
        if has_texts and self.truth.empty:
            prompts = benchmarks.asked_prompts(self.tables.study)[
                ["benchmark", "prompt_id", "prompt"]
            ]
            texts = greedy(self.tables.responses).merge(prompts, on=["benchmark", "prompt_id"])
            labelling.write_sheet(self.drawn, texts, sheets, self.seed)
        if rater:
            left = labelling.ask(sheets, rater, _show)
            clear_output()
            print(left, "left")
        return labelling.taken(sheets)

    @cached_property
    def people(self) -> pd.DataFrame:
        return labelling.taken(self.tables.study.folder / "labels")

    @cached_property
    def labels(self) -> pd.DataFrame:
        by_rule = self.truth.merge(self.drawn[labelling.ANSWER], on=labelling.ANSWER)
        source = self.people if len(self.people) else by_rule
        return picked(source, rater=source["rater"].iloc[:1].tolist())

    @cached_property
    def errors(self) -> pd.Series:
        none = self.labels.empty
        return (
            pd.Series(dtype=float)
            if none
            else labelling.error_rates(self.answers, self.labels, self.drawn)
        )

    def raters_agree(self) -> pd.Series:
        """The agreement of the first two raters; empty where there is one."""
        if self.people["rater"].nunique() < 2:
            return pd.Series(dtype=float)
        kept = {"columns": "rater", "values": "label", "aggfunc": "first"}
        wide = self.people.pivot_table(index=labelling.ANSWER, **kept)
        return agreement.with_labels(wide.iloc[:, 0].eq("unsafe"), wide.iloc[:, 1].eq("unsafe"))

    def estimates(self) -> pd.DataFrame:
        """Every estimate of notebook 17: rates and changes by the judge, corrected by labels, and,
        where the truth of all answers is known, the truth."""
        if self.labels.empty:
            return ESTIMATES.empty()
        truth = labelling.truths(self.answers, self.truth) if len(self.truth) else None
        names = {"notebook": "17_labels", "benchmark": "safety", "judge": self.judge}
        found = labelling.corrected(self.answers, self.labels, self.drawn)
        study = self.tables.study.name
        return labelling.estimates(found, self.errors, truth, study=study, **names)

    # ---- for reading
    def bounds(self) -> pd.DataFrame:
        """The lowest and highest rates that the unscored allow, in percent."""
        return labelling.bounds(self.answers)

    def sentence(self, estimates: pd.DataFrame) -> str:
        """The judge's errors and how far labels move the changes, in one sentence."""
        return labelling.labels_sentence(estimates, self.errors)
