"""Notebook 17: a judge corrected by labels of people or of a known rule; see `labelling`."""

import pandas as pd
from IPython.display import HTML, display

from driftbook.analyses import labelling
from driftbook.benchmarks.responding import asked_prompts
from driftbook.stats import agreement, influence, terms
from driftbook.stats.picking import in_words, picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES, greedy

RULE = "rule"  # the rater of the miniature's known truth


def judged_answers(tables: Tables) -> pd.DataFrame:
    """The first judge's verdicts on greedy answers to harmful prompts, of the base models and of
    the runs as configured."""
    arms = influence.arms(tables.variants, tables.runs)
    compared = picked(arms, arm=[terms.TRAINED, terms.NO_OP, "base"])
    rows = greedy(tables.verdicts).merge(
        tables.prompts, on=["benchmark", "prompt_id"], validate="m:1"
    )
    judge = tables.verdicts["judge"].iloc[0]
    rows = picked(rows, benchmark="safety", kind="harmful", judge=judge)
    return rows.merge(compared[["run_id", "base_model", "method"]], on="run_id")


def sample_of(answers: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """About n answers to label, with the probabilities that they were drawn by."""
    return labelling.draw(answers, n, seed)


def labels_by_people(tables: Tables, drawn: pd.DataFrame, seed: int, rater: str) -> pd.DataFrame:
    """The labels of all filled sheets, after writing the sheet where texts are there and no rule
    knows the truth, and after asking the rater, where one is named."""
    sheets = tables.study.folder / "labels"
    has_texts = (tables.folder / "responses.parquet").is_file()
    if has_texts and not tables.labels["rater"].eq(RULE).any():
        prompts = asked_prompts(tables.study)[["benchmark", "prompt_id", "prompt"]]
        texts = greedy(tables.responses).merge(prompts, on=["benchmark", "prompt_id"])
        labelling.write_sheet(drawn, texts, sheets, seed)
    if rater:
        left = labelling.ask(sheets, rater, lambda page: display(HTML(page)))
        print(left, "left")
    return labelling.taken(sheets)


def labels_used(tables: Tables, drawn: pd.DataFrame, people: pd.DataFrame) -> pd.DataFrame:
    """The labels of the first person, or those of the known rule on the drawn answers."""
    known = picked(tables.labels, rater=RULE)
    source = people if len(people) else known.merge(drawn[labelling.ANSWER], on=labelling.ANSWER)
    return picked(source, rater=source["rater"].iloc[:1].tolist())


def raters_agree(people: pd.DataFrame) -> pd.Series:
    """The agreement of the first two raters; empty where there is one."""
    if people["rater"].nunique() < 2:
        return pd.Series(dtype=float)
    wide = people.pivot_table(
        index=labelling.ANSWER, columns="rater", values="label", aggfunc="first"
    )
    return agreement.with_labels(wide.iloc[:, 0].eq("unsafe"), wide.iloc[:, 1].eq("unsafe"))


def judge_errors(answers: pd.DataFrame, labels: pd.DataFrame, drawn: pd.DataFrame) -> pd.Series:
    """Sensitivity and specificity with intervals; empty where nothing is labelled."""
    return labelling.error_rates(answers, labels, drawn) if len(labels) else pd.Series(dtype=float)


def label_estimates(
    tables: Tables, answers: pd.DataFrame, labels: pd.DataFrame, drawn: pd.DataFrame
) -> pd.DataFrame:
    """Every estimate of notebook 17: rates and changes by the judge, corrected by labels, and, where
    the truth of all answers is known, the truth."""
    if labels.empty:
        return ESTIMATES.empty()
    known = picked(tables.labels, rater=RULE)
    truth = labelling.truths(answers, known) if len(known) else None
    judge = tables.verdicts["judge"].iloc[0]
    names = {"notebook": "17_labels", "benchmark": "safety", "judge": judge}
    errors = labelling.error_rates(answers, labels, drawn)
    found = labelling.corrected(answers, labels, drawn)
    return labelling.estimates(found, errors, truth, study=tables.study.name, **names)


# ---- for reading
def corrected_changes(estimates: pd.DataFrame) -> pd.DataFrame:
    """The changes of the unsafe rate by estimator, with intervals."""
    changes = picked(estimates, contrast=terms.CHANGE)
    return in_words(changes, ["base_model", "method"], "estimator")


def unscored_bounds(answers: pd.DataFrame) -> pd.DataFrame:
    """The lowest and highest rates that the unscored allow, in percent."""
    return labelling.bounds(answers)


def label_sentence(estimates: pd.DataFrame, errors: pd.Series) -> str:
    """The judge's errors and how far labels move the changes, in one sentence."""
    return labelling.sentence(estimates, errors)
