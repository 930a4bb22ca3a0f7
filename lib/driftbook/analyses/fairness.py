"""Notebook 10: BBQ's accuracy and bias of every run, by dimension, wording and order of options."""

from collections.abc import Callable, Iterator

import pandas as pd

from driftbook.analyses import information, outcomes
from driftbook.benchmarks import bbq_orders, bbq_scores, data, stereoset
from driftbook.stats import estimation, influence, terms
from driftbook.stats.picking import in_words, picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES

WHO = ["run_id", "base_model", "method"]


def official_answers(tables: Tables) -> pd.DataFrame:
    """The answers that are scored (options in the file's order, read from probabilities), with the
    run's base model, method and arm."""
    arms = influence.arms(tables.variants, tables.runs)
    return bbq_orders.official(tables.answers).merge(arms[[*WHO, "arm"]], on="run_id")


def base_scores(tables: Tables, by: list[str], n_boot: int, seed: int) -> pd.DataFrame:
    """The base models' own scores by base model and the columns `by`, as `bbq_scores.scores`."""
    arms = influence.arms(tables.variants, tables.runs)
    asked = official_answers(tables)
    own = asked[asked["run_id"].isin(arms["base_run_id"])]
    return bbq_scores.scores(own, by=("base_model", *by), n_boot=n_boot, seed=seed)


def fairness_estimates(tables: Tables, n_boot: int, seed: int) -> pd.DataFrame:
    """Every estimate of notebook 10: the base models' levels, and the changes of accuracy and bias
    over all items, by dimension, by wording, and of the share of answers that flip; the same
    without the prior of each place; and whether answers hold information at all. Bias scores of
    base models whose answers do not tell persons apart stand under terms.UNREADABLE."""
    usual = {"study": tables.study.name, "notebook": "10_fairness"}
    names = {**usual, "benchmark": "bbq", "judge": "none"}
    arms = influence.arms(tables.variants, tables.runs)
    cells, asked = influence.cells(arms), official_answers(tables)
    items = information.items_asked(tables)
    held = information.held(tables, items, seed)
    silent = information.silent_bases(held)
    parts, apart = [information.information_estimates(held, **names)], []
    for found in (base_scores(tables, by, n_boot, seed) for by in ([], ["dimension"])):
        found = found if "dimension" in found else found.assign(dimension=None)
        levels = bbq_scores.base_levels(found, **names)
        quiet = levels["outcome"].isin(information.BIAS) & levels["base_model"].isin(silent)
        parts.append(levels[~quiet])
        apart.append(levels[quiet].assign(estimator=terms.UNREADABLE))
    for outcome, made in _changes(asked, tables.answers, usual):
        read, no_finding = information.apart(outcome, arms, silent, made)
        parts.append(read)
        apart.append(no_finding)
    if (flips := bbq_orders.flip_rate(tables.answers)) is not None:
        own = {"outcome": terms.FLIPS, **names}
        parts.append(estimation.of_scores(flips, influence.changes(flips, arms), cells, **own))
        parts.append(estimation.levels_of_scores(flips, arms, **own))
    apart.append(information.debiased_estimates(tables, items, arms, silent, **names))
    return ESTIMATES.concat([outcomes.completed(ESTIMATES.concat(parts)), *apart])


def _changes(
    asked: pd.DataFrame, answers: pd.DataFrame, usual: dict[str, str]
) -> Iterator[tuple[str, Callable[[pd.DataFrame], pd.DataFrame]]]:
    """Each outcome, and what makes its estimates from arms: over all items, by dimension, and in
    each other wording.
    """
    names = {**usual, "benchmark": "bbq", "judge": "none"}
    for outcome, scores in bbq_scores.by_run(asked).items():
        own = {"outcome": outcome, **names}
        yield (
            outcome,
            lambda arms, scores=scores, own=own: outcomes.score_estimates(
                scores, arms, influence.cells(arms), **own
            ),
        )
    for dimension, rows in asked.groupby("dimension", sort=False):
        for outcome, scores in bbq_scores.by_run(rows).items():
            own = {"outcome": outcome, "category": dimension, **names}
            yield (
                outcome,
                lambda arms, scores=scores, own=own: estimation.of_scores(
                    scores,
                    influence.changes(scores, arms),
                    estimation.within(influence.cells(arms)),
                    **own,
                ),
            )

    other = answers["prompt_variant"].ne("default") & answers["answer_mode"].isin(bbq_orders.READ)
    for wording, rows in answers[other].groupby("prompt_variant", sort=False):
        for outcome, scores in bbq_scores.by_run(rows).items():
            own = {**names, "outcome": outcome, "benchmark": f"bbq, wording {wording}"}
            yield (
                outcome,
                lambda arms, scores=scores, own=own: estimation.of_scores(
                    scores, influence.changes(scores, arms), influence.cells(arms), **own
                ),
            )


# ---- checks of the same findings
def by_order(tables: Tables) -> pd.DataFrame:
    """By base model and method: how often answers flip with the order of the options, the prior of
    each place, and the agreement of written answers with probabilities."""
    arms = influence.arms(tables.variants, tables.runs)
    order = bbq_orders.by_letter(tables.answers).merge(arms[WHO], on="run_id")
    return order.drop(columns="run_id").groupby(WHO[1:], sort=False).mean()


def fairness_checks(tables: Tables, estimates: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """{question: table}: other conventions and readings, other wordings, and StereoSet."""
    worded = picked(estimates, contrast=terms.CHANGE, group=terms.AS_CONFIGURED, base_model="all")
    worded = worded[worded["benchmark"].str.startswith("bbq, wording ")]
    ways = [terms.PRIMARY, terms.WITHOUT_PRIOR, terms.OVER_ORDERS]
    levels = picked(
        estimates, contrast=terms.LEVEL, group=terms.ALL, benchmark="bbq", estimator=ways
    )
    levels = picked(levels, outcome=list(bbq_scores.OUTCOMES.values()))
    return {
        "Does the place of an option decide? Base models as asked, without the prior of places, and"
        " by the mean of three orders (permuted items)": in_words(
            levels, ["outcome", "estimator"], "base_model", 1
        ),
        "Does the convention or the reading of answers decide? Scores by method": _read(
            tables, estimates
        ),
        "Does the wording decide? Changes, in points": in_words(worded, ["outcome", "benchmark"]),
        "Does StereoSet agree? ss 50: no stereotype; lms 100: always sense; icat: both": _stereoset(
            tables, seed
        ),
    }


def _read(tables: Tables, estimates: pd.DataFrame) -> pd.DataFrame:
    """The four scores by method: three conventions for unread answers and empty denominators, the
    answers without the prior of each place (debiased), and those read from text (generated); of
    base models whose bias scores are findings, and of their runs."""
    official = bbq_orders.official(tables.answers)
    ways = {name: (official, name) for name in bbq_scores.CONVENTIONS}
    for mode, part in tables.answers.groupby("answer_mode"):
        if mode in ("debiased", "generated"):
            ways[mode] = part, "reference"
    arms = influence.arms(tables.variants, tables.runs)[WHO]
    arms = arms[~arms["base_model"].isin(information.unread_in(estimates))]
    found = {}
    for name, (part, convention) in ways.items():
        if len(told := part.merge(arms, on="run_id")):
            scores = bbq_scores.scores(told, ("method",), convention, n_boot=0)
            found[name] = scores.set_index("method")[list(bbq_scores.SCORES)]
    return pd.concat(found) if found else pd.DataFrame()


def _stereoset(tables: Tables, seed: int) -> pd.DataFrame:
    """StereoSet's scores by set, base model and method; empty where the study does not ask it."""
    arms, found = influence.arms(tables.variants, tables.runs)[WHO], []
    for name in tables.study.asked(("stereoset",)):
        rows = picked(tables.ratings, benchmark=name)
        found.append(stereoset.stereoset_scores(rows, data.items(name, tables.study), seed=seed))
    if not found:
        return pd.DataFrame()
    scores = picked(pd.concat(found).merge(arms, on="run_id"), bias_type="all")
    return scores.groupby(["benchmark", *WHO[1:]], sort=False)[["lms", "ss", "icat"]].mean()
