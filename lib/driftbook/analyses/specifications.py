"""The primary family again under every choice that another analyst might have made.

A specification is one choice each of judge, threshold, wording, no-ops, weights and the unscored;
all are crossed (Simonsohn, Simmons and Nelson 2020, Nature Human Behaviour 4, 1208). The mixed
model of notebook 11 is one more, of the declared judge.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from driftbook.analyses import outcomes
from driftbook.analyses.estimands import estimands as estimands
from driftbook.stats import estimation, harm, influence, intervals, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.noninferiority import CANNOT_TELL
from driftbook.stats.picking import picked, with_minus
from driftbook.study.methods import METHOD_LABELS
from driftbook.study.opening import Tables
from driftbook.study.study_file import Study
from driftbook.study.tables import SPECIFICATIONS

CUTS = (0.3, 0.5, 0.7)  # thresholds of the judge's probability, beside its own
OWN = "the judge's own"
SETTINGS_ALIKE, RUNS_ALIKE = "settings alike", "runs alike"
WITH, WITHOUT = "with", "without"
LEFT_OUT, AT_LOWEST, AT_HIGHEST = "left out", "at the lowest", "at the highest"
BY_MODEL = "mixed model"
RISES, FALLS = "rises", "falls"
_GROUPS = {WITH: terms.AS_CONFIGURED, WITHOUT: terms.TRAINED}


class Choice(NamedTuple):
    """One specification: a choice of each kind."""

    judge: str
    threshold: str
    wording: str
    no_ops: str
    weights: str
    unscored: str
    estimator: str = terms.PRIMARY


def primary_family(study: Study) -> str | None:
    """The first declared family that tests changes in unsafe responses (without a judge in harmful
    prompts answered without refusing) over all base models; None where none does."""
    outcome = "unsafe" if study.judges else "not_refused"
    for name, family in study.primary.items():
        together = family.bases == "all together"
        if family.test == "change" and outcome in family.outcomes and together:
            return name
    return None


def curve(study: Study, tables: Tables, mixed: pd.DataFrame) -> pd.DataFrame:
    """The table `specifications`: a row per specification and method of the primary family.

    `mixed` are the estimates of notebook 11. In each specification the methods are one family, with
    Holm's adjusted p and the word that it gives. "runs alike": every run of a method weighs the
    same, whatever its setting or base model. The unscored are left out, or counted as what makes
    each change the lowest or the highest. Empty where the study declares no such family, or where
    nothing was judged or trained.
    """
    name = primary_family(study)
    if name is None:
        return SPECIFICATIONS.empty()
    family, arms = study.primary[name], influence.arms(tables.variants, tables.runs)
    methods = list(family.methods or study.methods)
    declared = next(no_ops for no_ops, group in _GROUPS.items() if group == family.group)
    asked = _asked(tables)
    judges = [judge for judge in study.judges or [harm.DETECTOR] if asked["judge"].eq(judge).any()]
    if not judges:
        return SPECIFICATIONS.empty()
    first = Choice(judges[0], OWN, "default", declared, SETTINGS_ALIKE, LEFT_OUT)
    cells = {SETTINGS_ALIKE: influence.cells(arms), RUNS_ALIKE: runs_alike(arms)}
    cells = {name: picked(own, base_model="all", method=methods) for name, own in cells.items()}
    parts = []
    for choice, change in _scored(study, judges, asked, arms):
        parts += _averaged(choice, change, cells)
    parts.append(_of_mixed(first, mixed, methods))
    if not any(map(len, parts)):
        return SPECIFICATIONS.empty()
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True)
    rows = rows.assign(study=study.name, family_of_tests=name, declared=_is(rows, first))
    return SPECIFICATIONS.check(_worded(rows)[list(SPECIFICATIONS.columns)])


def _asked(tables: Tables) -> pd.DataFrame:
    """The verdicts on greedy answers to the harmful prompts of the safety benchmark."""
    rows = picked(harm.with_harm(tables.verdicts), benchmark="safety", decoding="greedy")
    known = rows.merge(tables.prompts, on=["benchmark", "prompt_id"], validate="m:1")
    return picked(known, kind="harmful")


def _cut(rows: pd.DataFrame, own: float | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """The verdicts at the judge's own threshold and at those of CUTS, where it gave
    probabilities."""
    yield OWN, rows
    scored = rows["harm"].notna()
    if rows.loc[scored, "p_unsafe"].isna().any():
        return
    for cut in CUTS:
        if cut != own:
            above = rows["p_unsafe"].gt(cut).astype("boolean").where(scored)
            yield f"{cut:g}", rows.assign(harm=above)


# ---- the estimates
def _scored(
    study: Study, judges: list[str], asked: pd.DataFrame, arms: pd.DataFrame
) -> Iterator[tuple[Choice, influence.Scores]]:
    """The changes of runs by judge, threshold, wording and treatment of the unscored."""
    for judge in judges:
        own = picked(asked, judge=judge)
        usual = study.judges[judge].threshold if judge in study.judges else None
        wordings = sorted(own["prompt_variant"].unique(), key=lambda name: name != "default")
        for wording in wordings:
            rows = picked(own, prompt_variant=wording)
            for threshold, cut in _cut(rows, usual):
                values = influence.matrix(cut, "harm", outcomes.UNITS)
                choice = Choice(judge, threshold, wording, WITH, SETTINGS_ALIKE, LEFT_OUT)
                yield choice, influence.paired(values, arms)
                if values.isna().to_numpy().any():
                    for unscored, worst in ((AT_LOWEST, 0.0), (AT_HIGHEST, 1.0)):
                        filled = _filled(values, arms, worst)
                        yield choice._replace(unscored=unscored), influence.paired(filled, arms)


def _filled(values: pd.DataFrame, arms: pd.DataFrame, of_runs: float) -> pd.DataFrame:
    """The verdicts with the runs' unscored at this value and the base models' at the other end."""
    base = values.index.isin(arms.loc[arms["arm"].eq("base"), "run_id"])
    other = np.where(base, 1 - of_runs, of_runs)[:, None]
    return values.where(values.notna(), np.broadcast_to(other, values.shape))


def _averaged(
    choice: Choice, change: influence.Scores, cells: dict[str, pd.DataFrame]
) -> Iterator[pd.DataFrame]:
    """The means of one score over runs, with and without no-ops, by both weights."""
    labels = dict.fromkeys(("study", "notebook", "outcome", "benchmark", "judge"), "all")
    for no_ops, weights in product(_GROUPS, cells):
        own = picked(cells[weights], group=_GROUPS[no_ops])
        found = estimation.means(change, own, terms.CHANGE, **labels)
        found = picked(found, contrast=terms.CHANGE)
        yield _chosen(found, choice._replace(no_ops=no_ops, weights=weights))


def runs_alike(arms: pd.DataFrame) -> pd.DataFrame:
    """Cells over all base models in which every trained run of a method weighs the same, also those
    in settings that some base models lack; columns as of influence.cells."""
    usual = arms[arms["arm"].isin([terms.TRAINED, terms.NO_OP])]
    parts = {terms.AS_CONFIGURED: usual, terms.TRAINED: usual[usual["arm"].eq(terms.TRAINED)]}
    long = pd.concat([rows.assign(group=group) for group, rows in parts.items()])
    size = long.groupby(["group", "method"])["run_id"].transform("size")
    long = long.assign(pool=long["base_model"], base_model="all", weight=1 / size)
    names = ["run_id", *influence.CELL, "setting", "cluster", "pool", "weight"]
    return long[names].reset_index(drop=True)


def _of_mixed(choice: Choice, mixed: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """The mixed model's changes of the same judge; no-ops are in it, settings are held equal."""
    own = picked(mixed, estimator="mixed", contrast=terms.CHANGE)
    own = picked(
        own,
        outcome=harm.of_judge(choice.judge),
        base_model="all",
        method=methods,
        judge=choice.judge,
    )
    weights = "by the model"
    return _chosen(own, choice._replace(no_ops=WITH, weights=weights, estimator=BY_MODEL))


def _chosen(found: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    return found.drop(columns=["judge", "estimator"]).assign(**choice._asdict())


# ---- words
def _is(rows: pd.DataFrame, choice: Choice) -> pd.Series:
    """Which rows are of this specification."""
    return rows[list(Choice._fields)].eq(pd.Series(choice._asdict())).all(axis=1)


def _worded(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with Holm's adjusted p within each specification, and the word that it gives."""
    rows = rows.reset_index(drop=True)
    p = rows["p"].astype(float)
    specification = rows.groupby(list(Choice._fields), sort=False).ngroup()
    adjusted = p.groupby(specification).transform(_holm)
    sure, value = adjusted.lt(ALPHA), rows["value"].astype(float)
    words = np.select([sure & value.gt(0), sure & value.lt(0)], [RISES, FALLS], CANNOT_TELL)
    return rows.assign(p_adjusted=adjusted, word=words)


def _holm(p: pd.Series) -> np.ndarray:
    """Adjusted p values; a test that could not be made counts as one with p = 1."""
    return np.where(p.isna(), np.nan, intervals.holm(p.fillna(1.0).to_numpy()))


def curve_sentence(rows: pd.DataFrame) -> str:
    """By method: in how many specifications the word is the declared one, and the range of
    estimates."""
    if rows.empty:
        return "The study declares no family of changes in safety over all base models."
    parts = []
    for method, own in rows.groupby("method", sort=False):
        word = own.loc[own["declared"], "word"]
        if word.empty or own["value"].isna().all():
            continue
        same = int(own["word"].eq(word.iloc[0]).sum())
        low, high = own["value"].min(), own["value"].max()
        label, found = METHOD_LABELS[method], f'"{word.iloc[0]}" in {same} of {len(own)}'
        parts.append(with_minus(f"{label}: {found}, {low:+.1f} to {high:+.1f} points"))
    return "; ".join(parts) + "." if parts else "No specification could be estimated."
