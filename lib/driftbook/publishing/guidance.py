"""What follows from a study for who fine-tunes: what to start from, by which method and rate, what
to audit and how to repair, each with its evidence, or "Not shown".

The rules are the same for every study. A difference is shown where its family of tests (all pairs
of methods, all methods, all outcomes and methods, all repairs or defences), adjusted by Holm's
method, says so at ALPHA; one of base models where the intervals of what their runs end with lie
apart, whatever the method. Why models drift is answered by the rules of analyses/mechanisms.py.
"""

from collections.abc import Callable, Collection
from itertools import permutations
from typing import NamedTuple

import pandas as pd

from driftbook.analyses import mechanisms, second_tuning
from driftbook.analyses.factors import CANNOT_TELL
from driftbook.analyses.repairs import AGAINST_PARENT, MINUS
from driftbook.figures.drawing import short_name, unit_of
from driftbook.publishing.story import Outcomes, changes, listed, number, who
from driftbook.stats import comparisons
from driftbook.stats.confidence import ALPHA
from driftbook.stats.harm import safety_outcome
from driftbook.stats.picking import picked
from driftbook.stats.terms import ALL, AS_CONFIGURED, LEVEL, LOSS, MITIGATION, PRIMARY, TRAINED
from driftbook.study.methods import METHOD_LABELS, METHODS
from driftbook.study.opening import Tables

NOT_SHOWN = "Not shown"
WORDED = {
    comparisons.RATE: ("Highest instead of lowest learning rate", "at two rates"),
    comparisons.OBJECTIVE: ("SFT instead of DPO", "by both"),
}
SIDES = {
    comparisons.RATE: ("the lower one", "the higher one"),
    comparisons.OBJECTIVE: ("DPO", "SFT"),
}


class Advice(NamedTuple):
    """An answer to a practitioner's question, and what it rests on."""

    question: str
    advice: str
    evidence: str


def guidance(
    estimates: pd.DataFrame, outcomes: Outcomes, tables: Tables | None = None
) -> list[Advice]:
    """The practical questions with their answers, as far as a study's estimates go; `outcomes` are
    those that are told, with their benchmarks. With `tables`, what was found inside the runs too.
    """
    asked: dict[str, Callable[[], tuple[str, str]]] = {
        "Which base model to start from?": lambda: _base(estimates),
        "Which method?": lambda: _method(estimates),
        "Which learning rate?": lambda: _setting(estimates, comparisons.RATE),
        "SFT or DPO?": lambda: _setting(estimates, comparisons.OBJECTIVE),
        "Why does it drift?": lambda: _why(tables),
        "What to audit?": lambda: _audit(estimates, outcomes),
        "How to repair?": lambda: _repair(estimates),
        "What outlasts a second tuning?": lambda: _outlasts(estimates),
    }
    return [Advice(question, *answer()) for question, answer in asked.items()]


def _safety(estimates: pd.DataFrame, **wanted: str) -> pd.DataFrame:
    """The estimates of safety's outcome by the first judge."""
    own = picked(estimates, outcome=safety_outcome(estimates), benchmark="safety", category=ALL)
    own = picked(own, estimator=PRIMARY, **wanted)
    return own[own["judge"].eq(own["judge"].iloc[0])] if len(own) else own


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """The known rows over all base models, or of each where these have no setting in common."""
    rows = rows[rows["value"].notna()]
    pooled = rows[rows["base_model"].eq("all")]
    return pooled if len(pooled) else rows


def _unbeaten(names: Collection[str], better: set[tuple[str, str]]) -> list[str]:
    """Those that none is shown to be better than; `better` are pairs (the better, the worse)."""
    worse = {other for _, other in better}
    return [name for name in names if name not in worse]


def _points(row) -> str:
    return number(row.value, row.ci_low, row.ci_high, unit_of(row.outcome, "points"), tell=False)


def _tested(row) -> str:
    """The points of a row with its adjusted p value; without where nothing was repeated."""
    if pd.isna(row.p_adjusted):
        return _points(row)
    p = float(row.p_adjusted)
    said = "Holm p < .001" if p < 0.001 else f"Holm p {p:.3f}".replace("0.", ".")
    return f"{_points(row)}, {said}"


def _on(row) -> str:
    """On which base model, where a row is of one."""
    return "" if row.base_model == "all" else f" on {row.base_model}"


# ---- the questions
def _base(estimates: pd.DataFrame) -> tuple[str, str]:
    rows = _safety(estimates, contrast=LEVEL, group=TRAINED)
    rows = rows[rows["base_model"].ne("all") & rows["ci_low"].notna()]
    names = list(dict.fromkeys(rows["base_model"]))
    if len(names) < 2:
        return NOT_SHOWN, "One base model was tuned." if names else "No base model was tuned."
    value, low, high = (
        rows.pivot(index="method", columns="base_model", values=one).astype(float)
        for one in ("value", "ci_low", "ci_high")
    )
    better = {
        (one, other)
        for one, other in permutations(names, 2)
        if (both := high[one].notna() & low[other].notna()).any()
        and (high.loc[both, one] < low.loc[both, other]).all()
    }
    rate = short_name(safety_outcome(estimates))
    ends = [(name, f"{value[name].min():.1f}", f"{value[name].max():.1f}") for name in names]
    spans = [f"{name} {low}{'' if low == high else f' to {high}'} %" for name, low, high in ends]
    evidence = f"The {rate} after training, over methods: {'; '.join(spans)}."
    found = _unbeaten(names, better)
    if len(found) == len(names):
        return NOT_SHOWN, f"{evidence} The intervals of no two lie apart with every method."
    return listed(found, "or"), evidence


def _method(estimates: pd.DataFrame) -> tuple[str, str]:
    own = picked(estimates, notebook="09_safety")
    rows = _pooled(_safety(own, contrast=comparisons.DIFFERENCE, group=TRAINED))
    if rows.empty:
        return NOT_SHOWN, "No two methods were compared."
    rows = comparisons.declared(rows, "guidance: methods")
    shown, found = rows[rows["p_adjusted"].lt(ALPHA)], []
    if shown.empty:
        return NOT_SHOWN, f"Of {len(rows)} differences of methods in safety none is told from zero."
    for _, part in shown.groupby("base_model", sort=False):
        better = {
            (row.method, row.against) if row.value < 0 else (row.against, row.method)
            for row in part.itertuples()
        }
        every = rows[rows["base_model"].eq(part["base_model"].iloc[0])]
        names = [name for name in METHODS if name in {*every["method"], *every["against"]}]
        best = [METHOD_LABELS[name] for name in _unbeaten(names, better)]
        found.append(f"{listed(best, 'or')}{_on(part.iloc[0])}")
    words = [
        f"{METHOD_LABELS[row.method]} against {METHOD_LABELS[row.against]}{_on(row)} {_tested(row)}"
        for row in shown.itertuples()
    ]
    evidence = f"{'; '.join(words)}. {_price(estimates)}".strip()
    return f"{'; '.join(found)}, for safety and at the rates of this study", evidence


def _price(estimates: pd.DataFrame) -> str:
    """What each method did to the loss: one that does little harm may do little at all."""
    rows = changes(estimates, LOSS, "utility")
    words = [f"{who(row)} {_points(row)}" for row in rows.itertuples() if pd.notna(row.value)]
    return f"Change in the loss on utility: {'; '.join(words)}." if words else ""


def _setting(estimates: pd.DataFrame, contrast: str) -> tuple[str, str]:
    """For which methods the lower rate, or SFT instead of DPO, is shown to be safer."""
    said, how = WORDED[contrast]
    rows = _pooled(_safety(estimates, contrast=contrast, group=AS_CONFIGURED))
    if rows.empty:
        return NOT_SHOWN, f"No method was trained {how}, all else equal."
    rows = comparisons.declared(rows, f"guidance: {contrast}")
    words = [f"{who(row)} {_tested(row)}" for row in rows.itertuples()]
    shown = rows[rows["p_adjusted"].lt(ALPHA)]
    of_side = zip(SIDES[contrast], (shown["value"] > 0, shown["value"] < 0), strict=True)
    told = [
        f"{side} with {listed([who(row) for row in shown[which].itertuples()])}"
        for side, which in of_side
        if which.any()
    ]
    advice = "; ".join(told)
    return advice[:1].upper() + advice[
        1:
    ] or NOT_SHOWN, f"{said}, all else equal: {'; '.join(words)}."


def _why(tables: Tables | None) -> tuple[str, str]:
    """The mechanisms with a verdict, by the rules of notebook 13."""
    if tables is None or tables.probes.empty:
        return NOT_SHOWN, "No run was looked into."
    inside = mechanisms.Mechanisms(tables)
    rows = inside.verdicts()
    words = [f"{row.base_model}, {row.mechanism}: {row.because}." for row in rows.itertuples()]
    told = inside.sentence(rows[rows["verdict"].ne(CANNOT_TELL)])
    return told or NOT_SHOWN, "\n".join(words)


def _audit(estimates: pd.DataFrame, outcomes: Outcomes) -> tuple[str, str]:
    parts = {title: changes(estimates, *pair) for title, pair in outcomes.items()}
    rows = pd.concat([own.assign(title=title) for title, own in parts.items()])
    rows = rows[rows["value"].notna()].reset_index(drop=True)
    if rows.empty:
        return NOT_SHOWN, "No change was estimated."
    tested = comparisons.declared(rows.drop(columns="title"), "guidance: outcomes")
    shown = tested.assign(title=rows["title"])[tested["p_adjusted"].lt(ALPHA)]
    moved = {
        title: "; ".join(f"{who(row)} {_points(row)}" for row in own.itertuples())
        for title, own in shown.groupby("title", sort=False)
    }
    words = [f"{title}: {said}." for title, said in moved.items()]
    if still := [title.lower() for title in rows["title"].unique() if title not in moved]:
        words.append(f"Nothing was shown to move in: {'; '.join(still)}.")
    return "; ".join(moved) or NOT_SHOWN, " ".join(words)


def _repair(estimates: pd.DataFrame) -> tuple[str, str]:
    own = _safety(estimates, notebook="14_safe_lora", group=MITIGATION)
    against = _pooled(picked(own, contrast=AGAINST_PARENT))
    if against.empty:
        return NOT_SHOWN, "No repair was tried."
    safer = against[against["p_adjusted"].lt(ALPHA) & against["value"].lt(0)]
    if safer.empty:
        return NOT_SHOWN, f"Of {len(against)} repairs none is shown to lower harm."
    controls = _pooled(picked(own, contrast=MINUS))
    beaten = controls["p_adjusted"].lt(ALPHA) & controls["value"].lt(0)
    all_beaten = beaten.groupby(controls["member"]).all()
    names = list(dict.fromkeys(safer["member"]))
    proven = [name for name in names if all_beaten.get(name, False)]
    words = [f"{row.member}{_on(row)} {_tested(row)}" for row in safer.itertuples()]
    evidence = f"Against the parents: {'; '.join(words)}."
    if proven:
        return listed(proven, "or"), f"{evidence} More than each of its controls."
    controlled = [name for name in names if name in all_beaten.index]
    if not controlled:
        return f"{listed(names, 'or')}, which have no control", evidence
    evidence += f" Not shown to do more than each of its controls: {listed(controlled)}."
    return f"Any of {len(names)}, of which none is shown to do more than its controls", evidence


def _outlasts(estimates: pd.DataFrame) -> tuple[str, str]:
    every = _safety(estimates, notebook="14_safe_lora", group=second_tuning.GROUP)
    if every.empty:
        return NOT_SHOWN, "Nothing was tuned a second time."
    rows = pd.concat([_pooled(own) for _, own in every.groupby(["method", "member"], sort=False)])
    said: dict[str, list[str]] = {word: [] for word in second_tuning.HELD}
    held = []
    for (_, method, name), own in rows.groupby(["base_model", "method", "member"], sort=False):
        by = own.set_index("contrast", drop=False)
        ends = [
            _points(next(by.loc[[when]].itertuples())) if when in by.index else "not known"
            for when in second_tuning.TIMES
        ]
        word = second_tuning.word(by)
        of = second_tuning.with_method(name, method, rows["method"]) + _on(own.iloc[0])
        said[word].append(f"{of} ({' once, '.join(ends)} twice)")
        held += [of] * (word == second_tuning.HOLDS_TWICE)
    words = [f"{word.capitalize()}: {'; '.join(found)}." for word, found in said.items() if found]
    against = (
        "Against plain runs tuned alike, at the worst rate at which that tuning worked (where it"
        " worked at none, at the nearest)."
    )
    return listed(held) or NOT_SHOWN, " ".join([against, *words])
