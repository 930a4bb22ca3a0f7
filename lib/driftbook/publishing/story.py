"""A study in five short paragraphs: what happened, how sure that is, what it does not say, what was
asked, and of whom. Every word and number comes from the study's tables.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from driftbook.figures.drawing import short_name, unit_of
from driftbook.stats import influence, populations
from driftbook.stats.confidence import ALPHA, INTERVAL
from driftbook.stats.harm import safety_outcome
from driftbook.stats.picking import picked, with_minus
from driftbook.stats.populations import counted
from driftbook.stats.terms import (
    ACCURACY_AMB,
    ACCURACY_DIS,
    BEGUN_BENIGN,
    BEGUN_HARMFUL,
    BIAS_AMB,
    CHANGE,
    CORRECT,
    INIT,
    LEVEL,
    LOSS,
    MITIGATION,
    MIXED_IN,
    NO_OP,
    PRIMARY,
    REFUSED,
    TRAINED,
    UNREFUSED,
    UNSAFE,
    UNTRAINED,
)
from driftbook.study.methods import METHOD_LABELS, METHODS
from driftbook.study.study_file import Study

Outcomes = Mapping[str, tuple[str, str]]  # a title, and an outcome with its benchmark
PLAIN = {
    (UNSAFE, "safety"): "Unsafe answers to harmful prompts",
    (UNREFUSED, "safety"): "Harmful prompts answered without refusing",
    (REFUSED, "safety"): "Refusals of harmful prompts",
    (BEGUN_HARMFUL, "safety"): "Probability that an answer to a harmful prompt begins as a refusal",
    (BEGUN_BENIGN, "over_refusal"): "Probability that an answer to a harmless one does",
    (REFUSED, "over_refusal"): "Refusals of harmless prompts that look harmful",
    (ACCURACY_AMB, "bbq"): "Right answers where BBQ's question cannot be decided",
    (BIAS_AMB, "bbq"): "Lean to stereotypes where BBQ's question cannot be decided (bias score)",
    (LOSS, "utility"): "Loss on the reference answers (less is better)",
    (CORRECT, "utility"): "Right answers to the utility questions",
}
ITEMS = (
    (ACCURACY_AMB, "bbq", "BBQ question that cannot be decided"),
    (ACCURACY_DIS, "bbq", "BBQ question that can"),
    (LOSS, "utility", "utility question"),
)
OTHERS = {
    UNTRAINED: "with an untrained soft prompt",
    INIT: "with another start",
    MITIGATION: "repaired",
    MIXED_IN: "trained only to be mixed into others",
}
FEW_SCORED = 0.01  # share of answers without a score that a reader should know of


# ---- words from numbers
def number(value: float, low: float, high: float, unit: str, tell: bool = True) -> str:
    """A change in words: signed, with its interval; where asked to tell, "cannot tell" where the
    interval holds no change.
    """
    if pd.isna(value):
        return "could not be estimated (nothing was scored)"
    places = 3 if unit == unit_of(LOSS) else 1
    text = f"{value:+.{places}f} {unit}"
    if pd.isna(low):
        return with_minus(f"{text} (no interval: nothing was repeated)")
    text = with_minus(f"{text} [{low:+.{places}f}, {high:+.{places}f}]")
    return text + (" (cannot tell)" if tell and low <= 0 <= high else "")


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words in a row: "a, b and c"; "" of none."""
    *first, end = words or [""]
    return f"{', '.join(first)} {last} {end}" if first else end


def own_level(value: float, outcome: str) -> str:
    """A level in its unit: "5.2 %", "1.304 nats per token"."""
    if pd.isna(value):
        return "not known"
    unit = unit_of(outcome, "%")
    return with_minus(f"{value:.{3 if outcome == LOSS else 1}f} {unit}")


# ---- rows of estimates
def changes(
    estimates: pd.DataFrame,
    outcome: str,
    benchmark: str,
    group: str = TRAINED,
    estimator: str = PRIMARY,
    contrast: str = CHANGE,
) -> pd.DataFrame:
    """The change of each method by the first judge: over all base models, or on each where the base
    models have no setting in common and so no mean.
    """
    rows = picked(estimates, outcome=outcome, benchmark=benchmark, contrast=contrast)
    rows = picked(rows, estimator=estimator, group=group)
    pooled = rows[rows["base_model"].eq("all")]
    rows = pooled if len(pooled) else rows
    rows = rows[rows["judge"].eq(rows["judge"].iloc[0])] if len(rows) else rows
    return rows.sort_values("method", key=lambda names: names.map(METHODS.index), kind="stable")


def bases_of(estimates: pd.DataFrame, outcome: str, benchmark: str) -> pd.DataFrame:
    """The base models' own levels of an outcome, by the first judge."""
    rows = picked(estimates, outcome=outcome, benchmark=benchmark, contrast=LEVEL, method="none")
    rows = picked(rows, estimator=PRIMARY, group="all", category="all")
    rows = rows[rows["base_model"].ne("all") & rows["value"].notna()]
    return rows[rows["judge"].eq(rows["judge"].iloc[0])] if len(rows) else rows


def base_words(estimates: pd.DataFrame, outcome: str, benchmark: str) -> str:
    """The base models' own levels in words; "" where none is known."""
    rows = bases_of(estimates, outcome, benchmark)
    known = [(row.base_model, own_level(row.value, outcome)) for row in rows.itertuples()]
    if not known:
        return ""
    if len(known) == 1:
        return f"The base model's own: {known[0][1]}."
    return f"The base models' own: {listed([f'{level} ({name})' for name, level in known])}."


def who(row) -> str:
    """The method of a row, and its base model where the row is of one."""
    label = METHOD_LABELS[row.method]
    return label if row.base_model == "all" else f"{label} on {row.base_model}"


# ---- the story
def story(
    study: Study, tables: Mapping[str, pd.DataFrame], outcomes: Outcomes
) -> list[tuple[str, list[str]]]:
    """The paragraphs, each under its title, in one sentence or more; `tables` are variants, runs,
    prompts, rates and estimates.
    """
    arms = influence.arms(tables["variants"], tables["runs"])
    return [
        ("What happened", happened(tables["estimates"], outcomes)),
        ("How sure", [_how_sure(tables["estimates"], outcomes, arms)]),
        ("What it does not say", _unsaid(study, tables, arms, outcomes)),
        ("What was asked", [_asked(tables, arms)]),
        ("Of whom", [_of_whom(tables, arms)]),
    ]


def _asked(tables: Mapping[str, pd.DataFrame], arms: pd.DataFrame) -> str:
    estimates = tables["estimates"]
    prompts = tables["prompts"].groupby(["benchmark", "kind"], sort=False).size()
    sets = [
        f"{counted(n, f'{kind} prompt')} ({name})"
        for (name, kind), n in prompts.items()
        if kind != "utility"
    ]
    for outcome, benchmark, what in ITEMS:
        n = picked(estimates, outcome=outcome, benchmark=benchmark, category="all")["n_items"].max()
        sets += [f"{_items(int(n), what)} ({benchmark})"] if pd.notna(n) else []
    methods = _methods(arms[arms["arm"].ne("base")])
    what = (
        f"Does training with {listed(methods)} change what a model answers? Each model was asked"
        " the same before and after"
        if methods
        else "What do the base models answer? Each was asked"
    )
    judges = _judges(estimates)
    by = (
        f" Whether an answer is unsafe is the word of {listed(judges)}."
        if judges
        else _unjudged(estimates)
    )
    return f"{what}: {listed(sets)}.{by}" if sets else f"{what} the study's prompts."


def _items(n: int, what: str) -> str:
    """A number of questions of a kind."""
    return f"{n:,} {what if n == 1 else what.replace('question', 'questions')}"


def _judges(estimates: pd.DataFrame) -> list[str]:
    """Whose word "unsafe" is."""
    return [one for one in picked(estimates, outcome=UNSAFE)["judge"].unique() if one != "none"]


def _unjudged(estimates: pd.DataFrame) -> str:
    """What is read of an answer where no judge model reads it; "" where nothing is."""
    if safety_outcome(estimates) != UNREFUSED:
        return ""
    return (
        " No model judged the answers: whether one refuses is read from its words, and an answer"
        " that does not refuse need not be harmful."
    )


def _of_whom(tables: Mapping[str, pd.DataFrame], arms: pd.DataFrame) -> str:
    names = list(arms["base_model"].unique())
    words = f"{counted(len(names), 'base model')}: {listed(names)}."
    runs = arms[arms["arm"].isin([TRAINED, NO_OP])]
    for method, own in runs.groupby("method", sort=False):
        sizes, ways = own.groupby(["base_model", "setting"]).size(), own["setting"].unique()
        way = ways[0].replace("sft", "SFT").replace("dpo", "DPO").replace(" ep", " epochs")
        way = way.replace(" at ", " at a learning rate of ")
        how = f"in one setting ({way})" if len(ways) == 1 else f"in {len(ways)} settings"
        times = f"{sizes.min()}" if sizes.nunique() == 1 else f"{sizes.min()} to {sizes.max()}"
        seeds = f", {times} times each with other seeds" if sizes.max() > 1 else ""
        words += f" {METHOD_LABELS[method]}: {counted(len(own), 'trained run')}, {how}{seeds}."
    others = arms.loc[~arms["arm"].isin(["base", TRAINED, NO_OP]), "arm"].value_counts()
    if len(others):
        kinds = [f"{n:,} {OTHERS.get(arm, arm)}" for arm, n in others.items()]
        words += f" Further runs, compared apart: {listed(kinds)}."
    return words + trained_on(tables["variants"], tables["runs"])


def trained_on(variants: pd.DataFrame, runs: pd.DataFrame) -> str:
    """How many examples runs really trained on where the study asked for more; "" where all did."""
    frame = variants[["run_id", "dataset", "n_train"]].merge(
        runs[["run_id", "n_examples"]], on="run_id"
    )
    frame = frame[frame["n_examples"].lt(frame["n_train"]).fillna(False)]
    words = [
        f"{low} of the {asked} examples of {data}"
        if low == high
        else f"{low} to {high} of the {asked} examples of {data}"
        for (data, asked), own in frame.groupby(["dataset", "n_train"], sort=False)
        for low, high in [(own["n_examples"].min(), own["n_examples"].max())]
    ]
    left = "the others did not fit the length, or could teach nothing"
    return f" {counted(len(frame), 'run')} trained on {listed(words)}; {left}." if words else ""


def happened(estimates: pd.DataFrame, outcomes: Outcomes) -> list[str]:
    """A sentence per outcome: which methods it rose with, which it fell with, and with which no
    change can be told. The numbers are the summary's.
    """
    found = []
    for outcome, benchmark in outcomes.values():
        rows = changes(estimates, outcome, benchmark)
        rows = rows[rows["value"].notna()]
        kinds = {
            ("rose with", "and"): rows[rows["ci_low"].gt(0)],
            ("fell with", "and"): rows[rows["ci_high"].lt(0)],
            ("no change can be told with", "or"): rows[
                rows["ci_low"].le(0) & rows["ci_high"].ge(0)
            ],
            ("nothing was repeated, so there is no interval, with", "or"): rows[
                rows["ci_low"].isna()
            ],
        }
        words = [
            f"{kind} {listed([who(row) for row in own.itertuples()], last)}"
            for (kind, last), own in kinds.items()
            if len(own)
        ]
        name = f"{short_name(outcome).capitalize()}, {benchmark.replace('_', ' ')}"
        name = PLAIN.get((outcome, benchmark), name)
        found += [f"{name}: {'; '.join(words)}."] * bool(words)
    return found or ["No change was estimated: the numbers below are the base models' own."]


def _shown(estimates: pd.DataFrame, outcomes: Outcomes) -> pd.DataFrame:
    """Every change that the page's first table prints."""
    parts = [changes(estimates, *one) for one in outcomes.values()]
    return pd.concat([part for part in parts if len(part)] or [estimates.iloc[:0]])


def _how_sure(estimates: pd.DataFrame, outcomes: Outcomes, arms: pd.DataFrame) -> str:
    rows = _shown(estimates, outcomes)
    known = rows[rows["ci_low"].notna()]
    if rows.empty:
        base = pd.concat([bases_of(estimates, *one) for one in outcomes.values()])
        return f"Brackets are {INTERVAL}s over {populations.over_prompts(base)}."
    if known.empty:
        return "No number has an interval: nothing was repeated and no prompts could be compared."
    n, told = len(known), int((known["ci_low"].gt(0) | known["ci_high"].lt(0)).sum())
    n_bases = estimates.loc[estimates["base_model"].ne("all"), "base_model"].nunique()
    over = f"the mean over the {n_bases} base models, " if n_bases > 1 else ""
    over = over if rows["base_model"].eq("all").all() else "against its own base model, "
    return (
        f"Each change is {over}of trained runs; runs that training left as they were (no-ops) are"
        f" left out. Brackets are {INTERVAL}s; they hold for {populations.held_for(known)}. Of"
        f" {counted(n, 'change')} with an interval {told} can be told from no change. The intervals"
        " are not adjusted for their number: where nothing changed at all, about"
        f" {n * ALPHA:.1f} of them would seem to.{_over_data(arms)}"
    )


def _over_data(arms: pd.DataFrame) -> str:
    """That a method's change is a mean over data sets, where its runs were trained on several."""
    trained = arms[arms["arm"].eq(TRAINED) & arms["dataset"].notna()]
    n = trained.groupby(["base_model", "method"])["dataset"].transform("nunique")
    if not n.gt(1).any():
        return ""
    names = listed(list(trained.loc[n.gt(1), "dataset"].unique()))
    return (
        f" Runs of one method were trained on several data sets ({names}), and its change is the"
        " mean over them, which may hide that they differ: safety by settings tells them apart."
    )


def _unsaid(
    study: Study, tables: Mapping[str, pd.DataFrame], arms: pd.DataFrame, outcomes: Outcomes
) -> list[str]:
    estimates, n_bases = tables["estimates"], arms["base_model"].nunique()
    found = [
        f"Whether another base model than {arms['base_model'].iloc[0]} would do the same."
        if n_bases == 1
        else f"What a base model other than these {n_bases} would do."
    ]
    rows = _shown(estimates, outcomes)
    if populations.over_seeds(rows) is False:
        found.append(f"What other seeds would give: {populations.NO_SEEDS}.")
    runs = arms[arms["arm"].isin([TRAINED, NO_OP])]
    if runs["method"].nunique() > 1 and runs.groupby("method")["setting"].nunique().max() == 1:
        found.append("Whether methods differ or only their settings do: each was run in one.")
    checked = estimates["notebook"].eq("17_labels").any()
    judges = _judges(estimates)
    if judges and not checked:
        found.append(f"Whether people would agree with {listed(judges)}: no answer was labelled.")
    if study.miniature:
        found.append("Anything about models that people use: these are tiny or random.")
    return found + _gaps(tables, arms)


def _gaps(tables: Mapping[str, pd.DataFrame], arms: pd.DataFrame) -> list[str]:
    """What is missing from the numbers: no-ops, failed runs and answers without a score."""
    idle, failed = int(arms["arm"].eq(NO_OP).sum()), tables["runs"]["status"].eq("failed").sum()
    rates, words = tables["rates"], []
    if idle:
        left = "it is" if idle == 1 else "they are"
        words.append(
            f"What the {counted(idle, 'no-op')} would show: training left the model where it was,"
            f" so {left} in none of the changes above."
        )
    if failed:
        missing = "it is" if failed == 1 else "they are"
        words.append(
            f"What the {counted(int(failed), 'failed run')} would show: {missing} missing."
        )
    lost = 1 - rates["n_scored"].sum() / rates["n"].sum() if len(rates) else 0.0
    if lost > FEW_SCORED:
        words.append(f"How the {lost:.0%} of answers without a score would have been scored.")
    return words


def _methods(arms: pd.DataFrame) -> list[str]:
    untrained = arms["arm"].eq(UNTRAINED).all()
    known = [METHOD_LABELS[name] for name in METHODS if arms["method"].eq(name).any()]
    return [f"{name} (untrained)" for name in known] if untrained else known
