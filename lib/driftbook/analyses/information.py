"""Whether a study's answers to BBQ hold information about its questions, and which bias scores can
therefore be read.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from driftbook.benchmarks import bbq_information, bbq_orders, bbq_scores, data
from driftbook.stats import estimation, influence, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.influence import Scores
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES

BIAS = (terms.BIAS_AMB, terms.BIAS_DIS)
FAMILIES = {True: "information, base models", False: "information, runs"}
HOW = (
    "{} against answers shuffled among the items of a context; studentised by question families,"
    " {} shuffles"
)
WAYS = {"debiased": terms.WITHOUT_PRIOR, "averaged": terms.OVER_ORDERS}


def held(tables: Tables, items: pd.DataFrame | None, seed: int = 0) -> pd.DataFrame:
    """bbq_information.held_information of every run, with base_model, method and arm; base models
    are one family of tests, the runs made from them another. Empty without the items.
    """
    arms = influence.arms(tables.variants, tables.runs)
    answers = bbq_orders.official(tables.answers)
    answers = answers[answers["run_id"].isin(arms["run_id"])]
    families = arms.set_index("run_id")["arm"].eq("base").map(FAMILIES)
    if items is None:
        columns = ["run_id", "base_model", "method", "arm"]
        return pd.DataFrame(columns=[*columns, *bbq_information.COUNTED, *bbq_information.FOUND])
    found = bbq_information.held_information(answers, items, families, seed=seed)
    return found.merge(arms[["run_id", "base_model", "method", "arm"]], on="run_id")


def items_asked(tables: Tables) -> pd.DataFrame | None:
    """BBQ's items as the study asked them; None, with a warning, where they are not to be had, or
    are not those that were answered.
    """
    try:
        items = data.items("bbq", tables.study)
        absent = set(tables.answers["item_id"]) - set(items["item_id"])
        if not absent:
            return items
        why = f"{len(absent)} answered items are not in the study's BBQ file"
    except ValueError as error:
        why = str(error)
    warnings.warn(f"not checked whether answers to BBQ hold information: {why}", stacklevel=3)
    return None


def information_estimates(found: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The result of `held` as rows of `estimates`: right answers of each run and of its shuffled
    control, and both tests.
    """
    if found.empty:
        return ESTIMATES.empty()
    of_runs = found.rename(columns={"run_id": "member"})[["member", "base_model", "method"]]
    of_runs = of_runs.assign(group=terms.RUN, contrast=terms.LEVEL, n_runs=1, **labels)
    of_runs = of_runs.assign(n_items=found["n_items"], population=terms.THESE_RUNS)
    mean = "expected over shuffles of answers within contexts"
    parts = [
        of_runs.assign(outcome=terms.RIGHT, value=100 * found["accuracy"], how="share of read"),
        of_runs.assign(
            outcome=terms.RIGHT, estimator=terms.SHUFFLED, value=100 * found["control"], how=mean
        ),
    ]
    tests = {"all": terms.INFORMED, "persons": terms.INFORMED_ON_PERSONS}
    contrasts = (bbq_information.CONTRASTS, bbq_information.PERSONS)
    for (name, outcome), tested in zip(tests.items(), contrasts, strict=True):
        how = HOW.format(" and ".join(tested), bbq_information.SHUFFLES)
        numbers = {"p": found[f"p_{name}"], "p_adjusted": found[f"p_{name}_adjusted"]}
        family = found["arm"].eq("base").map(FAMILIES)
        numbers |= {"value": found[f"t_{name}"], "family_of_tests": family}
        parts.append(of_runs.assign(outcome=outcome, how=how, **numbers))
    return ESTIMATES.concat([estimation.complete(part) for part in parts])


def silent_bases(found: pd.DataFrame) -> list[str]:
    """The base models whose answers do not tell one person from the other, as far as the test of
    `held` can see at the level of the intervals: their bias scores say nothing.
    """
    base = found[found["arm"].eq("base")]
    return base.loc[base["p_persons_adjusted"].gt(ALPHA), "base_model"].tolist()


def apart(
    outcome: str,
    arms: pd.DataFrame,
    silent: list[str],
    made: Callable[[pd.DataFrame], pd.DataFrame],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The estimates `made` from arms: those to read, and those that are no finding. The latter are
    bias scores of the silent base models and their runs: each of one base model alone, under
    estimators that say so. Means over base models are then over the others.
    """
    quiet = arms["base_model"].isin(silent)
    if outcome not in BIAS or not quiet.any():
        return made(arms), ESTIMATES.empty()
    rows = made(arms[quiet])
    rows = rows[rows["base_model"].ne("all")]
    usual = rows["estimator"].eq(terms.PRIMARY)
    named = (terms.UNREADABLE + ", " + rows["estimator"]).mask(usual, terms.UNREADABLE)
    read = made(arms[~quiet]) if (~quiet).any() else ESTIMATES.empty()
    return read, rows.assign(estimator=named)


def unread_in(estimates: pd.DataFrame) -> list[str]:
    """The base models whose bias scores the estimates hold under terms.UNREADABLE."""
    return list(picked(estimates, estimator=terms.UNREADABLE)["base_model"].unique())


def without_silent(
    measured: dict[str, tuple[Scores, Scores]], estimates: pd.DataFrame, arms: pd.DataFrame
) -> dict[str, tuple[Scores, Scores]]:
    """Levels and changes by outcome in which bias scores of base models under terms.UNREADABLE in
    the estimates, and of their runs, are not scored.
    """
    quiet = arms.loc[arms["base_model"].isin(unread_in(estimates)), "run_id"]

    def read(scores: Scores) -> Scores:
        return replace(scores, value=np.where(scores.runs.isin(quiet), np.nan, scores.value))

    return {
        outcome: tuple(map(read, both)) if outcome in BIAS and len(quiet) else both
        for outcome, both in measured.items()
    }


def debiased_estimates(
    tables: Tables, items: pd.DataFrame | None, arms: pd.DataFrame, silent: list[str], **labels: str
) -> pd.DataFrame:
    """Accuracy and bias without the prior of each place (PriDe; all items), and by the mean of
    three orders (the permuted items, its check): levels of base models and of methods, and changes.
    """
    asked = {"debiased": tables.answers[tables.answers["answer_mode"].eq("debiased")]}
    if items is not None:
        asked["averaged"] = bbq_information.averaged(tables.answers, items)
    parts = []
    for way, answers in asked.items():
        answers = answers[answers["run_id"].isin(arms["run_id"])]
        if answers.empty:
            continue
        for outcome, scores in bbq_scores.by_run(answers).items():
            own = {"outcome": outcome, "estimator": WAYS[way], **labels}

            def made(arms: pd.DataFrame, scores=scores, own=own) -> pd.DataFrame:
                cells = influence.cells(arms)
                cells = cells[~cells["group"].isin([terms.RUN, terms.SETTINGS])]
                change = influence.changes(scores, arms)
                levels = estimation.levels_of_scores(scores, arms, **own)
                return ESTIMATES.concat(
                    [levels, estimation.of_scores(scores, change, cells, **own)]
                )

            parts += apart(outcome, arms, silent, made)
    return ESTIMATES.concat(parts)


# ---- in words
def examined(tables: Tables) -> pd.DataFrame:
    """`base_information` from the answers themselves, for the study check; empty where BBQ was not
    asked or its items are not to be had.
    """
    if "bbq" not in tables.study.benchmarks or tables.answers.empty:
        return base_information(ESTIMATES.empty())
    names = {"study": tables.study.name, "notebook": "10_fairness"}
    found = held(tables, items_asked(tables))
    return base_information(information_estimates(found, benchmark="bbq", judge="none", **names))


def base_information(estimates: pd.DataFrame) -> pd.DataFrame:
    """A row per base model that was asked BBQ: n_items, accuracy and control (percent), p_all and
    p_persons (adjusted over base models), and n_runs of its runs, n_hold of which hold information.
    """
    rows = picked(estimates, outcome=[terms.RIGHT, terms.INFORMED, terms.INFORMED_ON_PERSONS])
    found = []
    for base_model, own in rows.groupby("base_model", sort=False):
        base, runs = own[own["method"].eq("none")], own[own["method"].ne("none")]
        one = {(row.outcome, row.estimator): row for row in base.itertuples()}
        tested = runs.loc[runs["outcome"].eq(terms.INFORMED), "p_adjusted"]
        if (terms.INFORMED, terms.PRIMARY) in one:
            found.append(
                {
                    "base_model": base_model,
                    "n_items": one[terms.RIGHT, terms.PRIMARY].n_items,
                    "accuracy": one[terms.RIGHT, terms.PRIMARY].value,
                    "control": one[terms.RIGHT, terms.SHUFFLED].value,
                    "p_all": one[terms.INFORMED, terms.PRIMARY].p_adjusted,
                    "p_persons": one[terms.INFORMED_ON_PERSONS, terms.PRIMARY].p_adjusted,
                    "n_runs": len(tested),
                    "n_hold": int(tested.le(ALPHA).sum()),
                }
            )
    columns = ["base_model", "n_items", "accuracy", "control", "p_all", "p_persons"]
    return pd.DataFrame(found, columns=[*columns, "n_runs", "n_hold"])


def silent_sentences(estimates: pd.DataFrame) -> list[str]:
    """A sentence for each base model whose bias scores are no finding; nothing where there is none.
    One sentence where it was not checked.
    """
    known = base_information(estimates)
    if known.empty and estimates["outcome"].isin(BIAS).any():
        return ["Whether the answers to BBQ hold information about its questions was not checked."]
    return [silent_sentence(row) for row in known[known["p_persons"].gt(ALPHA)].itertuples()]


def silent_sentence(row) -> str:
    """What can be learned of a silent base model, from its row of `base_information`."""
    known = "hold no information about the question here"
    if row.p_all <= ALPHA:
        known = "do not tell one person from the other here, only UNKNOWN from persons"
    runs = ""
    if row.n_runs:
        runs = (
            f" Of its {row.n_runs} runs {row.n_hold} hold information; changes in accuracy are"
            " counted as they are."
        )
    return (
        f"{row.base_model}: answers {known}: {row.n_items} items, accuracy {row.accuracy:.1f} %"
        f" (control of shuffled answers {row.control:.1f} %; p {_p_of(row)}). Bias scores, and"
        f" changes in them, are no findings.{runs}"
    )


def _p_of(row) -> str:
    return f"{row.p_persons if row.p_all <= ALPHA else row.p_all:.2f}"
