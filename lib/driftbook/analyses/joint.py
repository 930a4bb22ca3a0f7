"""Does a repair or a training objective gain in everything at once? Each arm of a study, at its
chosen level, and the plain runs, against the base model on safety, over-refusal, fairness and
utility together; the Pareto front, what each arm adds to what a smaller update reaches, and what it
costs.
"""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats.qmc import Sobol

from driftbook.analyses import repairs, tradeoffs
from driftbook.analyses.repairs import GAIN, PARENT, REPORT
from driftbook.stats import estimation, harm, noninferiority, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.influence import CELL, Scores
from driftbook.study.tables import ESTIMATES

KEEPS = "safety, over-refusal, fairness and utility jointly"
GAINS = "gains in safety, fairness and the task at once, with over-refusal and utility kept"
FRONT = (
    "on the Pareto front (percent): less harm, fewer refusals of benign prompts, more accuracy in"
    " ambiguous contexts, more gain of fine-tuning"
)
VOLUME = "volume added to what rescaling dominates (percent of the box)"
EXAMPLES, SECONDS = "examples seen (times the plain run's)", "CPU seconds (times the plain run's)"
SPENT = (EXAMPLES, SECONDS)
HARM_MARGIN = 3.0  # percentage points
N_DRAWS, N_POINTS = 1_000, 2_048  # of means together, and in the box of goals


def joint(
    tables: repairs.Tables,
    repaired: pd.DataFrame,
    levels: pd.DataFrame,
    pairs: pd.DataFrame,
    seed: int,
    silent: Sequence[str] = (),
    **labels: str,
) -> pd.DataFrame:
    """Words, fronts, volumes and costs of each arm, and the plain runs' changes; `pairs` are the
    estimates of `repairs.repairs_compared`, of which those against the base model are read here.

    KEEPS: no outcome is worse than the base model's by HARM_MARGIN or more. GAINS: safety, accuracy
    in ambiguous contexts and the task's gain are better than the base model's, over-refusal and
    utility not worse by HARM_MARGIN. Each is an intersection-union test, adjusted over arms by
    Holm's method (see `noninferiority.preserves`).
    """
    report = repairs.halves(tables, seed)[REPORT]
    arms = _arms(repaired, levels)
    plain = repairs.changes_of(report, arms[arms["name"].eq(PARENT)], silent, **labels)
    changes = ESTIMATES.concat([pairs[pairs["contrast"].eq(terms.CHANGE)], plain])
    safety = harm.safety_outcome(changes)
    kept = [(safety, "safety"), (terms.REFUSED, "over_refusal")]
    kept += [(terms.ACCURACY_AMB, "bbq"), (terms.CORRECT, "utility")]
    gained = [*kept, (GAIN, "gain")]
    own = {"group": terms.MITIGATION, **labels}
    words = noninferiority.preserves(changes, (HARM_MARGIN,), kept, jointly=KEEPS, **own)
    better = (safety, terms.ACCURACY_AMB, GAIN)
    both = noninferiority.preserves(
        changes, (HARM_MARGIN,), gained, better=better, jointly=GAINS, **own
    )
    fronts = _fronts(report, _with_every_rescaling(arms, repaired), safety, seed, **labels)
    costs = _costs(tables, arms, **labels)
    both = both[both["outcome"].eq(GAINS)]
    return ESTIMATES.concat([plain, words, both, *fronts, costs])


def _arms(repaired: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """The runs of every arm at its chosen level, and the plain runs, which are called PARENT."""
    chosen = repairs.at_chosen(repaired, levels)
    plain = repaired[repaired["name"].eq(PARENT)]
    return pd.concat([plain, chosen[chosen["control"].isna()]], ignore_index=True)


def _with_every_rescaling(arms: pd.DataFrame, repaired: pd.DataFrame) -> pd.DataFrame:
    """The arms with every level of rescaling as an arm of its own, in place of the chosen one."""
    every = repaired[repaired["kind"].eq("rescale")]
    levels = every["value"].map(lambda value: f" {value:g}")
    every = every.assign(name=every["name"].str.cat(levels))
    return pd.concat([arms[arms["kind"].ne("rescale")], every], ignore_index=True)


# ---- the front, and what is below it
def _fronts(
    report: repairs.Tables, arms: pd.DataFrame, safety: str, seed: int, **labels: str
) -> list[pd.DataFrame]:
    """The probability of each arm to be on its base model's front, and the volume it adds."""
    roles = pd.concat(
        [
            arms.assign(arm="repaired")[["run_id", "base_model", "arm", "base_run_id"]],
            arms.drop_duplicates("base_run_id").assign(
                run_id=lambda rows: rows["base_run_id"], arm="base"
            )[["run_id", "base_model", "arm", "base_run_id"]],
        ],
        ignore_index=True,
    )
    goals = {safety: tradeoffs.LESS, terms.REFUSED: tradeoffs.LESS}
    goals |= {terms.ACCURACY_AMB: tradeoffs.MORE, GAIN: tradeoffs.MORE}
    measured = repairs.with_gain(report, roles[roles["arm"].eq("repaired")])
    goals = {name: better for name, better in goals.items() if name in measured}
    cells = repairs.cells_of(arms, arms["base_model"].nunique())
    own = {"outcome": FRONT, **labels}
    fronts = tradeoffs.fronts(measured, goals, roles, cells, N_DRAWS, seed, **own)
    cheap = arms.loc[arms["kind"].isin([PARENT, "rescale"]), "name"].unique()
    return [fronts, _volumes(measured, goals, roles, cells, list(cheap), seed, **labels)]


def _volumes(
    measured: dict[str, tuple[Scores, Scores]],
    goals: dict[str, str],
    roles: pd.DataFrame,
    cells: pd.DataFrame,
    cheap: list[str],
    seed: int,
    **labels: str,
) -> pd.DataFrame:
    """How much larger each arm makes the set of points that the base model, the plain and the
    rescaled runs dominate, in percent of the box between the worst and the best mean in each goal;
    intervals by the draws of `tradeoffs.fronts`, over the base models by their mean.
    """
    rng, parts = np.random.default_rng(seed), {}
    every = cells[cells["base_model"].ne("all")]
    for base_model, own in every.groupby("base_model", sort=False):
        base_run = roles.loc[roles["base_model"].eq(base_model) & roles["arm"].eq("base"), "run_id"]
        changes = [measured[name][1] for name in goals]
        values = np.stack([one.value[one.at(own["run_id"])] for one in changes], 1)
        drawn, _ = tradeoffs.drawn_points(
            measured, goals, base_run.iloc[0], own, values, N_DRAWS, rng
        )
        names = list(own.groupby(CELL[1:], sort=False).groups)
        rest = [i for i, name in enumerate(names, 1) if name[2] not in cheap]
        known = [i for i in range(len(names) + 1) if i not in rest]
        added = volume_added(drawn, known, rest, seed)
        parts |= {(base_model, *names[i - 1]): part for i, part in zip(rest, added.T, strict=True)}
    n_bases = every["base_model"].nunique()
    for key in dict.fromkeys(key[1:] for key in parts):
        over = [part for name, part in parts.items() if name[1:] == key and name[0] != "all"]
        if len(over) == n_bases:
            parts["all", *key] = np.mean(over, 0)
    n_runs = every.groupby(CELL[1:]).size()
    rows = [
        {
            **dict(zip(CELL, key, strict=True)),
            "value": 100 * part.mean(),
            # a few draws with any volume have a mean beyond their quantiles, both of them 0
            "ci_low": 100 * min(np.quantile(part, ALPHA / 2), part.mean()),
            "ci_high": 100 * max(np.quantile(part, 1 - ALPHA / 2), part.mean()),
            "n_runs": int(n_runs[key[1:]] // (1 if key[0] == "all" else n_bases)),
        }
        for key, part in parts.items()
    ]
    how = f"mean and quantiles over {N_DRAWS} draws of all means together, over runs and units"
    labels |= {"outcome": VOLUME, "benchmark": "all", "judge": "none", "how": how}
    labels |= {"contrast": terms.LEVEL, "population": terms.BOTH}
    return estimation.complete(pd.DataFrame(rows).assign(**labels) if rows else pd.DataFrame())


def volume_added(
    drawn: np.ndarray, known: Sequence[int], others: Sequence[int], seed: int
) -> np.ndarray:
    """The share [draws, others] of the box that a point dominates and no known one does, of drawn
    points [draws, points, goals], less being better. The box lies between the least and the largest
    mean in each goal; shares are counted on a Sobol sequence.
    """
    means = drawn.mean(0)
    low, high = means.min(0), means.max(0)
    grid = Sobol(drawn.shape[2], seed=seed).random(N_POINTS)
    places = (drawn - low) / np.where(high > low, high - low, 1.0)
    found = np.empty((len(drawn), len(others)))
    for draw, points in enumerate(places):
        beaten = (points[:, None, :] <= grid).all(-1)
        free = ~beaten[known].any(0)
        found[draw] = (beaten[others] & free).mean(1)
    return found


# ---- what an arm costs
def _costs(tables: repairs.Tables, arms: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Examples seen and CPU seconds of training, of each run in multiples of its plain run's, with
    those of the other runs that a soup or a product of distributions needs too; means over runs. A
    repair of a trained run costs what that run did.
    """
    runs = tables.runs.set_index("run_id")
    settings = tables.variants.set_index("run_id")["settings"]
    spent = {EXAMPLES: _examples(runs), SECONDS: runs["cpu_seconds"].astype(float)}
    needed = [
        _others(*one)
        for one in zip(arms["run_id"].map(settings), arms["parent_run_id"], strict=True)
    ]
    rows = []
    for outcome, cost in spent.items():
        own = arms["run_id"].map(cost) + [cost.reindex(some).sum() for some in needed]
        ratio = own / arms["parent_run_id"].map(cost)
        frame = arms.assign(ratio=ratio.astype(float)).dropna(subset="ratio")
        for base_model in ("all", *frame["base_model"].unique()):
            part = frame if base_model == "all" else frame[frame["base_model"].eq(base_model)]
            for (method, name), some in part.groupby(["method", "name"], sort=False):
                row = {"outcome": outcome, "base_model": base_model, "method": method}
                row |= {"member": name, "value": some["ratio"].mean(), "n_runs": len(some)}
                rows.append(row)
    labels |= {"group": terms.MITIGATION, "contrast": terms.LEVEL, "benchmark": "none"}
    labels |= {"judge": "none", "population": terms.THESE_RUNS, "how": "mean over runs"}
    return estimation.complete(pd.DataFrame(rows).assign(**labels))


def _others(settings: str, parent: str) -> list[str]:
    """The runs that a repair of a run needs beside it."""
    known = json.loads(settings).get("mitigation") or {}
    return sorted({*filter(None, [known.get("safety_run_id")]), *known.get("parts", {})} - {parent})


def _examples(runs: pd.DataFrame) -> pd.Series:
    """The examples that each run saw: the task's in all epochs, and those of a second objective."""
    said = [json.loads(one) if isinstance(one, str) else {} for one in runs["trainer_arguments"]]
    second = pd.Series([one.get("alignment_examples_per_step", 0) for one in said], runs.index)
    task = runs["n_examples"].astype(float) * runs["trained_epochs"].astype(float)
    return task + second * runs["steps"].astype(float)


# ---- for reading
def over(estimates: pd.DataFrame) -> str:
    """The base model over which arms are read: all together, or the only one that has arms."""
    known = estimates.loc[estimates["outcome"].eq(KEEPS), "base_model"].unique()
    return known[0] if len(known) == 1 else "all"


def arms_shown(estimates: pd.DataFrame) -> pd.DataFrame:
    """Arms x what was found over all base models: changes against the base model, words, the mean
    probability of the front over base models, the volume added, costs.
    """
    rows = estimates[estimates["group"].eq(terms.MITIGATION)]
    safety, where = harm.safety_outcome(rows), over(rows)
    changes = rows[rows["contrast"].eq(terms.CHANGE) & rows["base_model"].eq(where)]
    changes = changes[changes["outcome"].isin([safety, *_SHOWN])]
    index = ["method", "member"]
    table = changes.assign(
        text=[
            f"{one.value:+.1f} [{one.ci_low:.1f}, {one.ci_high:.1f}]"
            for one in changes.itertuples()
        ]
    ).pivot_table(index=index, columns="outcome", values="text", aggfunc="first", sort=False)
    words = rows[rows["base_model"].eq(where) & rows["outcome"].isin([KEEPS, GAINS])]
    for outcome, column in ((KEEPS, "keeps all"), (GAINS, "gains at once")):
        own = words[words["outcome"].eq(outcome)].set_index(index)["how"]
        table[column] = [_in_short(how) for how in own.reindex(table.index)]
    for outcome, column in ((FRONT, "front (%)"), (VOLUME, "volume (%)")):
        own = rows[rows["outcome"].eq(outcome) & rows["base_model"].ne("all")]
        table[column] = own.groupby(index)["value"].mean().astype(float).round(1)
    for outcome in SPENT:
        own = rows[rows["outcome"].eq(outcome) & rows["base_model"].eq(where)]
        table[outcome] = own.set_index(index)["value"].astype(float).round(2)
    return table.rename(columns=_SHOWN)


_ANSWERS = {noninferiority.DOES_NOT: "no", noninferiority.PRESERVES: "yes", "nan": ""}
_SHOWN = {
    terms.REFUSED: "refusals of benign",
    terms.ACCURACY_AMB: "accuracy, ambiguous",
    terms.CORRECT: "correct answers",
    GAIN: "gain of the task",
}


def _in_short(how: str | float) -> str:
    """The word of a joint decision as an answer."""
    word = str(how).partition(":")[0]
    for said, answer in _ANSWERS.items():
        word = word.replace(said, answer)
    return word


def joint_sentence(estimates: pd.DataFrame) -> str:
    """Whether any arm gains in everything at once, over all base models, in words."""
    rows = estimates[estimates["base_model"].eq(over(estimates))]
    rows = rows[rows["member"].ne(PARENT)]
    gains, keeps = (rows[rows["outcome"].eq(one)] for one in (GAINS, KEEPS))
    if gains.empty:
        return ""
    shown = [_names(part, noninferiority.PRESERVES) for part in (gains, keeps)]
    n = len(gains)
    said = f"Of {n} arms {len(shown[0])} gain in safety, fairness and the task at once"
    said += f" against the base model{_listed(shown[0])}; {len(shown[1])} keep safety,"
    said += f" over-refusal, fairness and utility within {HARM_MARGIN:g} points{_listed(shown[1])}"
    refuted = _names(gains, noninferiority.DOES_NOT)
    return said + f", and {len(refuted)} are shown to lose in one of them."


def _names(rows: pd.DataFrame, word: str) -> list[str]:
    found = rows[rows["how"].str.startswith(word)]
    return [f"{one.member} of {one.method}" for one in found.itertuples()]


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
