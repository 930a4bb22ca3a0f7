"""Does it matter what a soft prompt begins as? The starts of each method against each other: before
any training, after it, and in what training changed.

An untrained prompt moves a model by itself, so each trained run is read beside the untrained prompt
of its own start. With shared_seeds both begin as the same numbers, and runs that share a seed count
as one; else each start's runs are draws of their own. Starts are compared on each base model in the
settings that both have, which weigh the same, as base models do.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from driftbook.stats import comparisons, harm, influence, terms
from driftbook.stats.comparisons import RUN_COLUMNS
from driftbook.stats.confidence import ALPHA, BELOW
from driftbook.stats.estimation import complete
from driftbook.stats.influence import Scores
from driftbook.stats.picking import picked, with_minus
from driftbook.study.methods import INITS, METHOD_LABELS, METHODS
from driftbook.study.tables import ESTIMATES

AT_START, AFTER, BY_TRAINING = (
    "untrained prompt, less another start's",
    "trained prompt, less another start's",
    "trained less untrained prompt, less another start's",
)
USUAL, TEXT, NULL = "random", "safety_text", "safety_permuted"
TESTED = (
    *harm.OF_SAFETY,
    terms.REFUSED,
    terms.ACCURACY_AMB,
    terms.BIAS_AMB,
    terms.CORRECT,
)  # a family for each method; doses say how far a training went, and are not in it
DOSE_GAIN, KL = "gain on held-out answers (nats per token)", "KL to the base model (nats per token)"
DOSE_OUTCOMES = {"dose_nll": DOSE_GAIN, "kl_base": KL}
BENCHMARK_OF = {
    **dict.fromkeys(harm.OF_SAFETY, "safety"),
    terms.REFUSED: "over_refusal",
    terms.CORRECT: "utility",
    terms.LOSS: "utility",
    **dict.fromkeys((DOSE_GAIN, KL), "heldout"),
}  # all others: bbq


def pairs(inits: set[str]) -> list[tuple[str, str]]:
    """Which starts are compared with which: each with the random one, the safety text with itself
    permuted.
    """
    known = [init for init in INITS if init in inits]
    found = [(init, USUAL) for init in known if USUAL in inits and init != USUAL]
    return found + [(TEXT, NULL)] * ({TEXT, NULL} <= inits)


def started(arms: pd.DataFrame) -> pd.DataFrame:
    """The runs of soft prompts, repairs apart, each start's settings by themselves; `cluster` names
    the runs that share a seed, whatever their start and whether they were trained.
    """
    frame = arms[arms["init"].notna() & arms["mitigation"].isna()]
    setting = frame["init"] + ", " + frame["setting"]
    cluster = influence.seed_clusters(frame.assign(objective=""), setting)
    untrained = frame["objective"].eq("untrained")
    return frame.assign(
        training=frame["setting"], setting=setting, cluster=cluster, untrained=untrained
    )


def start_estimates(
    measured: dict[str, tuple[Scores, Scores]],
    arms: pd.DataFrame,
    runs: pd.DataFrame,
    judge: str,
    **labels: str,
) -> pd.DataFrame:
    """The contrasts of starts in every outcome and dose, by method, in the mean over the base
    models that have both starts, and BY_TRAINING on each; `measured` as of tradeoffs.measured.

    The member is the start, `against` the other one. BY_TRAINING over all base models is a family
    of tests for each method, over the outcomes of TESTED, adjusted by Holm's method.
    """
    frame, found = started(arms), []
    scores = {outcome: change for outcome, (_, change) in measured.items()}
    scores |= {outcome: _of_record(runs, column) for column, outcome in DOSE_OUTCOMES.items()}
    for outcome, change in scores.items():
        judged = {"judge": judge if outcome in harm.OF_SAFETY else "none"}
        names = {
            "outcome": outcome,
            "benchmark": BENCHMARK_OF.get(outcome, "bbq"),
            **judged,
            **labels,
        }
        low, high = change.limits  # a difference of two differences may be twice as large
        twice = replace(change, limits=(2 * low, 2 * high))
        for key, weighed in _weighed(frame):
            value = comparisons.contrast_of(
                twice if key["contrast"] == BY_TRAINING else change, weighed
            )
            if value is not None:
                of = weighed["base_model"].unique()
                where = "" if key["base_model"] != "all" else f"; mean over {', '.join(of)}"
                found.append({**names, **key, **value, "how": f"{value['how']}{where}"})
    rows = complete(pd.DataFrame(found))
    tested = rows["contrast"].eq(BY_TRAINING) & rows["base_model"].eq("all")
    tested &= rows["outcome"].isin(TESTED)
    families = "starts of " + rows.loc[tested, "method"].astype(str)
    return ESTIMATES.concat([comparisons.declared(rows[tested], families), rows[~tested]])


def _of_record(runs: pd.DataFrame, column: str) -> Scores:
    """A number of the record of each run as its score, of one unit: nothing is said of others."""
    known = runs[runs[column].notna()]
    n, one = len(known), np.zeros((len(known), 1))
    counts = np.ones(n, int), np.zeros(n, int)
    return Scores(
        pd.Index(known["run_id"]), np.zeros(1), known[column].to_numpy(float), one, *counts
    )


def _weighed(frame: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Every contrast: its names, and the runs of both sides with their weights."""
    for method, own in frame.groupby("method", sort=False):
        for start, other in pairs(set(own["init"])):
            by_base = {
                base: _on_base(part, start, other)
                for base, part in own.groupby("base_model", sort=False)
            }
            for contrast in (AT_START, AFTER, BY_TRAINING):
                parts = {base: one[contrast] for base, one in by_base.items() if contrast in one}
                names = {"method": method, "group": terms.INIT, "member": start, "against": other}
                for base, part in parts.items() if contrast == BY_TRAINING else ():
                    yield {**names, "base_model": base, "contrast": contrast}, part
                every = [part.assign(weight=part["weight"] / len(parts)) for part in parts.values()]
                if len(every):
                    yield {**names, "base_model": "all", "contrast": contrast}, pd.concat(every)


def _on_base(own: pd.DataFrame, start: str, other: str) -> dict[str, pd.DataFrame]:
    """The contrasts of two starts of a method on one base model: runs with their weights."""
    sides = [own[own["init"].eq(init)] for init in (start, other)]
    both = [set(side.loc[~side["untrained"], "training"]) for side in sides]
    same = sorted(both[0] & both[1])
    found = {}
    if all(side["untrained"].any() for side in sides):
        found[AT_START] = _difference(*(side[side["untrained"]] for side in sides))
    if same:
        found[AFTER] = _difference(*(side[side["training"].isin(same)] for side in sides))
    if len(found) == 2:
        less = found[AT_START].assign(weight=-found[AT_START]["weight"])
        found[BY_TRAINING] = pd.concat([found[AFTER], less])
    return found


def _difference(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([_mean(one), _mean(other).assign(weight=lambda rows: -rows["weight"])])


def _mean(side: pd.DataFrame) -> pd.DataFrame:
    """The runs of a start with weights, of which settings have the same, and their runs."""
    size = side.groupby("setting")["run_id"].transform("size")
    return side[RUN_COLUMNS].assign(weight=1 / size / side["setting"].nunique())


# ---- for reading
def told(estimates: pd.DataFrame, contrast: str = BY_TRAINING) -> pd.DataFrame:
    """The contrasts of starts over all base models, of the methods in their order."""
    rows = picked(estimates, group=terms.INIT, contrast=contrast, base_model="all")
    return rows.sort_values("method", key=lambda names: names.map(METHODS.index), kind="stable")


def start_sentence(estimates: pd.DataFrame) -> str:
    """Whether the start of a soft prompt matters for safety, as this study can tell; "" where it
    compares no starts.
    """
    safety = harm.safety_outcome(estimates)
    rows = told(estimates)
    rows = rows[rows["outcome"].eq(safety)]
    if rows.empty or rows["value"].isna().all():
        return ""
    sure = rows[rows["p_adjusted"].lt(ALPHA).fillna(False)]
    size = rows["value"].astype(float).abs().to_numpy()
    words = [
        _worded(row)
        for row in (sure if len(sure) else rows.iloc[[np.nanargmax(size)]]).itertuples()
    ]
    answer = (
        f"What a soft prompt begins as matters for safety: {len(sure)} of {len(rows)} comparisons"
        f" of starts have an adjusted p {BELOW} ({'; '.join(words)})"
        if len(sure)
        else f"That it matters for safety what a soft prompt begins as is not shown: of {len(rows)}"
        f" comparisons of starts none has an adjusted p {BELOW}; the largest is {words[0]}"
    )
    null, after = (
        [_worded(row) for row in found[found["against"].eq(NULL)].itertuples()]
        for found in (rows, picked(told(estimates, AFTER), outcome=safety))
    )
    beside = f" The text against itself permuted: {'; '.join(null)}" if null else ""
    beside += f"; as trained: {'; '.join(after)}." if null else ""
    return (
        f"{answer}, in points of {harm.COUNTED[safety]}, each start's change by training less the"
        f" other's.{beside}"
    )


def _worded(row) -> str:
    low, high = float(row.ci_low), float(row.ci_high)
    interval = "" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
    names = f"{named(row.member)} less {named(row.against)}"
    return with_minus(f"{METHOD_LABELS[row.method]}, {names}: {row.value:+.1f}{interval}")


def named(init: str) -> str:
    """A start in words."""
    return "DRO" if init == "dro" else init.replace("_", " ")
