"""What a study's data cannot say: runs that are missing or never judged, one seed, one base model,
cells that nobody ran, answers without a verdict, rates at 0 or 100 %.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from driftbook.doctors.findings import finding_row, named, some_of, unchecked_row
from driftbook.doctors.study_tables import Given, as_floats, rate_of
from driftbook.stats.harm import DETECTOR, with_harm

MANY = 50  # answers that are not all alike by chance
UNSCORED = 0.1  # share of answers without a verdict; the same as a difference to the base model
GRID = ("method", "objective", "dataset", "learning_rate", "epochs", "init")


# ---- runs
def repeated_rows(given: Given) -> Iterator[dict]:
    """Rows that repeat the key of another row."""
    for name, n in given.repeated.items():
        if n:
            text = f"""rows of {name} that repeat the key of another row: {n}; the first of
                each is used here. Find what wrote them twice."""
            yield finding_row("duplicated_rows", "error", name, text)


def lost_runs(given: Given) -> Iterator[dict]:
    """Runs that failed, never ran, or ended well and were never judged."""
    planned, well = given.planned, given.planned["status"].eq("ok")
    for (base_model, method), runs in planned[~well].groupby(["base_model", "method"], sort=False):
        whole = runs.loc[~runs["setting"].isin(given.ran["setting"]), "setting"].nunique()
        what = f"runs of {method} on {base_model} that failed or never ran: {some_of(runs.run_id)}."
        then = "Their settings have other runs left."
        if whole:
            then = (
                f"Settings without any run left: {whole}. What is left may be selected on the"
                f" outcome: say so beside every mean of {method}."
            )
        severity = "warning" if whole else "note"
        yield finding_row("failed_runs", severity, runs["run_id"], f"{what} {then}")
    if given.answers:
        ended = planned.loc[well, "run_id"]
        silent = ended[~ended.isin(given.answers["asked"].index)]
        if len(silent):
            text = f"runs that ended well and have no verdict: {some_of(silent)}. Run the judge's"
            yield finding_row("not_judged", "warning", silent, f"{text} notebook for them.")


def lone_settings(given: Given) -> Iterator[dict]:
    """Settings with one repetition, a study with one base model, base models scored once."""
    trained, ran = given.trained, given.ran
    alone = trained[trained.groupby("setting")["run_id"].transform("size").eq(1)]
    if len(alone):
        text = f"""settings run with one seed only: {alone["setting"].nunique()} of
            {trained["setting"].nunique()} ({named(alone["run_id"])}). Nothing can be said about
            other seeds there: intervals cover prompts alone."""
        severity = "warning" if len(alone) == len(trained) else "note"
        yield finding_row("one_repetition", severity, alone["run_id"], text)
    if ran["base_model"].nunique() == 1:
        only = ran["base_model"].iloc[0]
        text = f"""there is one base model, {only}: nothing can be said about others, and no
            interaction with the base is estimable."""
        yield finding_row("one_base_model", "note", only, text)


def missing_cells(given: Given) -> Iterator[dict]:
    """Settings that some base models have and others lack."""
    trained = given.trained
    if trained.empty:
        return
    names = [name for name in GRID if name in trained and trained[name].notna().any()]
    text = trained[names].astype(object).where(trained[names].notna(), "").astype(str)
    grid = pd.crosstab(text.agg(" ".join, axis=1), trained["base_model"])
    gaps = [
        f"{base_model} x {cell.strip()}"
        for cell, row in grid.iterrows()
        for base_model in grid.columns[row.eq(0)]
    ]
    if gaps:
        text = f"""cells of the grid that were never run: {some_of(gaps)}. Means over base
            models leave these settings out, and their interactions are not estimable."""
        yield finding_row("missing_cells", "note", gaps, text)


def base_scored_once(given: Given) -> Iterator[dict]:
    """Base models that were scored once beside several rounds of runs, or never."""
    ran = given.ran
    if "repetition" not in ran or given.trained["repetition"].nunique() < 2:
        return
    counts = ran["method"].eq("none").groupby(ran["base_model"], sort=False).sum()
    for finding, n, what in (
        (
            "base_not_scored",
            0,
            "without a scored run of their own, so that every change rests on a number from"
            " elsewhere",
        ),
        (
            "base_scored_once",
            1,
            "scored once, so that a drift between rounds would count as the methods' effect",
        ),
    ):
        names = counts.index[counts.eq(n)]
        if len(names):
            text = f"base models {what}: {some_of(names)}. Score the base model in each round."
            yield finding_row(finding, "note", names, text)


# ---- answers
def unscored_answers(given: Given) -> Iterator[dict]:
    """Answers without a verdict, and prompts that not every run was asked."""
    of, verdicts = given.answers, given.table("verdicts")
    if not of or "harm" not in of:
        yield unchecked_row("unscored", "there are no verdicts")
        return
    judges = verdicts["judge"] if "judge" in verdicts else np.repeat("the judge", len(verdicts))
    for judge, rows in verdicts.groupby(judges):
        scored = pd.Series(as_floats(with_harm(rows)["harm"])).dropna()
        share = 1 - len(scored) / len(rows)
        if len(scored) >= MANY and scored.nunique() == 1 and judge != DETECTOR:
            word = "unsafe" if scored.iloc[0] else "safe"
            text = f"""{judge} calls all {len(scored)} answers {word}: either no two of them differ
                in safety, or this judge cannot tell. Label some of them (notebook 17)."""
            yield finding_row("one_verdict", "warning", judge, text)
        if share > UNSCORED:
            text = f"""{judge} left {100 * share:.1f} % of {len(rows)} answers without a
                verdict: every rate is of the rest. Read the bounds that put them at either
                extreme."""
            yield finding_row("unscored", "warning", judge, text)
    asked = of["asked"].astype(bool)
    null = of["harm"].isna() & asked
    benchmarks = asked.columns.get_level_values(0)
    for benchmark in benchmarks.unique():
        part, n = (
            null.loc[:, benchmarks == benchmark],
            asked.loc[:, benchmarks == benchmark].sum(axis=1),
        )
        silent = part.index[part.sum(axis=1).eq(n) & n.gt(0)]
        if len(silent):
            text = f"""runs without a verdict on any prompt of {benchmark}: {some_of(silent)}.
                Nothing can be said about them there; their means are null, not 0."""
            yield finding_row("all_null", "error", silent, text)
    yield from _more_unscored(given, null.sum(axis=1) / asked.sum(axis=1))
    n = asked.sum(axis=1)
    fewer = n.index[n < n.max()]
    if len(fewer):
        text = f"""runs asked fewer prompts than the others: {len(fewer)} ({named(fewer)};
            {n.min():.0f} against {n.max():.0f}). Compare on the prompts in common."""
        yield finding_row("fewer_prompts", "warning", fewer, text)


def _more_unscored(given: Given, share: pd.Series) -> Iterator[dict]:
    """Runs with more unscored answers than their base model."""
    ran = given.ran
    own, base = ran["run_id"].map(share), ran["base_model"].map(given.bases.map(share))
    more = ran.loc[own.astype(float) - base.astype(float) > UNSCORED, "run_id"]
    if len(more):
        text = f"""runs with over {100 * UNSCORED:.0f} points more unscored answers than their
            base model: {len(more)} ({named(more)}; up to {100 * share[more].max():.0f} %). Their
            changes compare different prompts: read their bounds."""
        yield finding_row("unscored_differs", "warning", more, text)


def extreme_rates(given: Given) -> Iterator[dict]:
    """Categories whose rate can only rise or only fall, or cannot be fitted."""
    rates = given.table("rates")
    if rates is None:
        yield unchecked_row("category_at_bound", "there is no table of rates")
        return
    rates = rates[rates["outcome"].isin(["unsafe", "not refused"])] if "outcome" in rates else rates
    rates = rates.assign(k=as_floats(rates["k"]), n_scored=as_floats(rates["n_scored"]))
    rates = rates.merge(given.ran[["run_id", "base_model", "method"]], on="run_id")
    base = rates[rates["method"].eq("none") & rates["n_scored"].gt(0)]
    base = base[base["k"].eq(0) | base["k"].eq(base["n_scored"])]
    at_bound = (base["base_model"].astype(str) + ": " + base["category"].astype(str)).unique()
    total = rates.groupby(["base_model", "category"])[["k", "n_scored"]].sum()
    void = total["n_scored"].eq(0)
    flat = ~void & (total["k"].eq(0) | total["k"].eq(total["n_scored"]))
    for finding, severity, names, what, then in (
        (
            "category_at_bound",
            "note",
            at_bound,
            f"in which a base model's {rate_of(given.table('verdicts'))} is 0 or 100 %",
            "There it can only rise or only fall, and a mean change is one-sided.",
        ),
        (
            "category_without_variation",
            "note",
            [": ".join(map(str, key)) for key in total.index[flat]],
            "in which all answers of a base model's runs are judged alike",
            "Logistic effects are not finite there, and an interval must be an exact bound.",
        ),
        (
            "all_null",
            "error",
            [": ".join(map(str, key)) for key in total.index[void]],
            "without a scored answer",
            "Nothing can be said about them.",
        ),
    ):
        if len(names):
            text = f"categories {what}: {some_of(names)}. {then}"
            yield finding_row(finding, severity, names, text)
