"""What each printed number stands for: which runs, with what weights, over which seeds, prompts and
base models, and what its word needs.

Everything is derived from rows of `estimates`: their group, population and family of tests. The
attributes are those of an estimand as the addendum E9(R1) of the ICH guideline (2019) asks for
them: the treatment (runs), the variable (number), the population, and the summary (weights).
"""

import re

import pandas as pd

from driftbook.analyses.primary import DECLARED
from driftbook.stats import terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.noninferiority import JOINTLY
from driftbook.stats.populations import counted
from driftbook.study.study_file import Study

ATTRIBUTES = (
    "Number",
    "Of",
    "Runs",
    "Weights",
    "Seeds",
    "Prompts",
    "Base models",
    "n runs",
    "n prompts",
    "The word needs",
)
AVERAGED = {
    # settings that all base models have (influence.cells)
    terms.AS_CONFIGURED: "trained in shared settings, with no-ops",
    terms.TRAINED: "trained in shared settings, without no-ops",
    terms.UNTRAINED: "soft prompts as initialised",
    terms.NO_OP: "no-ops",
    terms.STOPPED: "stopped early",
    terms.MIXED_IN: "trained only to be mixed into others",
    terms.SETTINGS: "one setting",
    terms.CATEGORY: "trained in shared settings, without no-ops",
    terms.RUN: "one run",
    terms.ALL: "the base model",
}
_NOUNS = {"Seeds": ("seeds", "runs"), "Prompts": ("prompts",), "Base models": ("base model",)}
_KIND = ["contrast", "runs", "of", "estimator", "family_of_tests", "sensitivity"]


def estimands(study: Study, rows: pd.DataFrame, estimates: pd.DataFrame) -> pd.DataFrame:
    """A line for each kind of number among these rows of `estimates` (ATTRIBUTES): outcomes that
    share everything else stand in one line.

    A mean over base models is over those of which `estimates` (all that the study has) holds its
    methods: not every base model of the study file needs to have run.
    A row of the declared tests has the runs of its family; n are the fewest and the most of a
    number.
    """
    margins = {name: family.margin for name, family in study.primary.items()}
    groups = {name: family.group for name, family in study.primary.items()}
    tested = rows["group"].eq(DECLARED)
    group = rows["group"].mask(tested, rows["member"].map(groups))
    alone = rows["margin"].notna() & rows["family_of_tests"].isna()
    kinds = rows.assign(
        runs=group.map(AVERAGED).fillna(group),
        of=rows["base_model"].eq("all").map({True: "mean", False: "each"}),
        sensitivity=alone & rows["margin"].ne(rows["member"].map(margins).astype("Float64")),
        family_of_tests=rows["family_of_tests"].fillna(rows["member"].where(tested)).fillna(""),
    )
    kinds.loc[alone & ~kinds["sensitivity"], "contrast"] += ", one outcome"
    found = [
        {**dict(zip(_KIND, key, strict=True)), "rows": part}
        for key, part in kinds.groupby(_KIND, sort=False)
    ]
    return pd.DataFrame([_line(one, estimates) for one in found], columns=list(ATTRIBUTES))


def _line(kind: dict, estimates: pd.DataFrame) -> dict[str, str]:
    """The line of one kind of number."""
    rows, of_mean = kind["rows"], kind["of"] == "mean"
    n = _averaged(rows, estimates) if of_mean else rows["base_model"].nunique()
    of = counted(n, "base model")
    return {
        "Number": f"{kind['contrast']}: {'; '.join(_outcomes(rows))}",
        "Of": "the one base model" if n == 1 else f"mean of {of}" if of_mean else f"each of {of}",
        "Runs": kind["runs"],
        "Weights": _weights(kind, of_mean),
        **_population(rows["population"]),
        "n runs": _ends(rows["n_runs"]),
        "n prompts": _ends(rows["n_items"]),
        "The word needs": _needs(kind),
    }


def _averaged(rows: pd.DataFrame, estimates: pd.DataFrame) -> int:
    """How many base models a mean is over: those of its methods' own estimates; those of any,
    where its methods have none by base model."""
    own = estimates[estimates["base_model"].ne("all")]
    of_methods = own[own["method"].isin(rows["method"])]
    return (of_methods if len(of_methods) else own)["base_model"].nunique()


def _outcomes(rows: pd.DataFrame) -> list[str]:
    """The outcomes of a kind, with the benchmark and its judge."""
    names = []
    for row in rows.itertuples():
        outcome = re.sub(r" \(.*\)$", "", row.outcome)
        asked = "" if row.outcome == JOINTLY else f" ({row.benchmark}"
        by = "" if row.judge == "none" or not asked else f", {row.judge}"
        names.append(outcome + asked + by + (")" if asked else ""))
    return list(dict.fromkeys(names))


def _weights(kind: dict, of_mean: bool) -> str:
    """Who weighs the same in the mean (influence.cells)."""
    if kind["runs"] in (AVERAGED[terms.ALL], AVERAGED[terms.RUN]):
        return "one run"
    parts = ["base models", "settings", "seeds"] if of_mean else ["settings", "seeds"]
    if kind["estimator"] != terms.PRIMARY:
        return f"{' and '.join(parts[:-1])} alike, runs by the model ({kind['estimator']})"
    return f"{', '.join(parts[:-1])} and {parts[-1]} alike"


def _population(populations: pd.Series) -> dict[str, str]:
    """What the interval generalises to: seeds, prompts and base models, each as the estimates say
    it; "or" where they differ within the kind."""
    parts = [part.strip() for text in populations.unique() for part in re.split("[;,]", text)]
    found = {
        name: [part for part in parts if any(noun in part for noun in nouns)]
        for name, nouns in _NOUNS.items()
    }
    return {
        name: " or ".join(dict.fromkeys(map(_short, said))) or "not said"
        for name, said in found.items()
    }


def _short(part: str) -> str:
    """A part of a population without the noun that heads its column."""
    part = part.replace("families of prompts", "families").replace("base model ", "one ")
    return " ".join(re.sub(r"seeds and prompts|\b(seeds|prompts|base models)\b", "", part).split())


def _ends(counts: pd.Series) -> str:
    known = counts.dropna().astype(int)
    if known.empty:
        return "none"
    low, high = known.min(), known.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _needs(kind: dict) -> str:
    """The rule that gives the word, with its level and the tests that share it."""
    rows = kind["rows"]
    n_cells = len(rows[["base_model", "method"]].drop_duplicates())
    margins = ", ".join(f"{margin:g}" for margin in sorted(rows["margin"].dropna().unique()))
    if margins:
        joint = rows["outcome"].eq(JOINTLY).any()
        all_of = "every outcome: " if joint else ""
        holm = f"one-sided p below {ALPHA / 2:g} by Holm, {n_cells} cells"
        return f"{all_of}harm below {margins} points, {holm}"
    if kind["family_of_tests"]:
        return f"p below {ALPHA:g} by Holm, {counted(len(rows), 'test')}"
    if rows["ci_low"].isna().all():
        return "no interval, no word"
    if kind["contrast"] == terms.LEVEL:
        return "no word"
    return f"{1 - ALPHA:.0%} interval without 0, not adjusted"
