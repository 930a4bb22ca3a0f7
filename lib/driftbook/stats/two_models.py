"""Is a candidate model better, worse or as good as its base on the same items? One call for logs of
lm-evaluation-harness and inspect_ai, and for tables.

Columns of the answer: task, metric, n_items (scored by both), n_unpaired (asked of one side only),
n_unscored (no score on one side or on both), n_base_runs, n_candidate_runs; base_rate and
candidate_rate in percent, difference, ci_low and ci_high in points; p (no difference), p_adjusted
(Holm over the tasks) and p_margin (a loss of the margin or more; one-sided, Holm); margin, word,
population, how and sentence.

The word is one of: better (p_adjusted below ALPHA, toward better), preserves (a loss of the margin
is excluded at half of ALPHA; a smaller loss may be there), worse (p_adjusted below ALPHA, toward
worse), cannot tell. So over all tasks of a call a false "better" or "worse" has probability ALPHA
at most, and a false "preserves" half of that. A word that the unscored answers could overturn,
taken at their worst, is not said. Intervals are those of driftbook.stats.estimation, and the
margin's test that of driftbook.stats.noninferiority.preserves.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from driftbook.stats import (
    comparisons,
    estimation,
    influence,
    intervals,
    noninferiority,
    picking,
    terms,
)
from driftbook.stats.confidence import ALPHA, INTERVAL, UPPER
from driftbook.stats.lm_eval_logs import HIGHER_BETTER, LOWER_BETTER, NEITHER_BETTER, UNKNOWN
from driftbook.stats.noninferiority import CANNOT_TELL, PRESERVES
from driftbook.stats.paired_logs import SIDES, PairedTable, Source, by_run, paired_tables
from driftbook.stats.terms import AS_CONFIGURED, CHANGE
from driftbook.stats.words import BETTER, WORSE, robust_word, word_of

# preserves() takes a fall for harm where an outcome is an accuracy, else a rise
OUTCOMES = {HIGHER_BETTER: "accuracy (percent)", LOWER_BETTER: "rate of failures (percent)"}
FAMILY = "tasks compared"
_LABELS = {"study": "compare", "notebook": "compare", "judge": "none"}
_LABELS |= {"base_model": SIDES[0], "method": SIDES[1], "group": AS_CONFIGURED, "contrast": CHANGE}


def compare(
    base: Source,
    candidate: Source,
    margin: float | Mapping[str, float] = 3.0,
    cluster: str | None = None,
    metric: str | Mapping[str, str] | None = None,
    stratum: str | None = None,
    higher_is_better: bool | None = None,
) -> pd.DataFrame:
    """The candidate's change against its base on the items of both: a row per task.

    A side is a folder or file of lm-eval (results_*.json, samples_*.jsonl) or of inspect_ai (.eval,
    .json), a list of them if they are repetitions with other seeds, or a table with a row per
    answer: item, score (0 to 1, true or false, null if unscored), and task, seed, sample (a further
    answer of the same run), cluster and stratum where there are any. One base run serves every
    candidate run; equal seeds on both sides are paired.

    `metric` names one where a task has several, `acc` or with its filter
    `exact_match,strict-match`; a mapping names it by task, and compares these tasks only. `cluster`
    and `stratum` name a column, or a field of lm-eval's documents or inspect_ai's metadata: items
    drawn together, and groups of items that were fixed. `margin` is in percentage points, one for
    all tasks or one each by name.
    `higher_is_better` decides where the logs do not say.

    The columns and the words are those of this module's docstring.

    Raises:
        ValueError: a log that cannot be read or paired: other tasks, items, documents or prompts,
            several metrics or filters, answers that stand twice, scores that are not from 0 to 1.
    """
    tables = paired_tables(base, candidate, metric, cluster, stratum)
    margins = _margins(margin, [table.task for table in tables])
    directions = [_direction(table, higher_is_better) for table in tables]
    as_scored = _words(tables, directions, margins)
    at_ends = [as_scored] * 2
    if any(side.isna().any(axis=None) for one in tables for side in (one.base, one.candidate)):
        at_ends = [_at_end(tables, directions, margins, end) for end in (WORSE, BETTER)]
    rows = []
    for table, better, found, *ends in zip(tables, directions, as_scored, *at_ends, strict=True):
        word = robust_word(found["word"], *(end["word"] for end in ends))
        own = {**found, "word": word, "overturned": word != found["word"]}
        assumed = table.better == UNKNOWN and higher_is_better is None
        sentence = _sentence(own, better, assumed, len(tables))
        rows.append({**own, "sentence": sentence})
    return pd.DataFrame(rows).drop(columns="overturned")


def _margins(margin: float | Mapping[str, float], tasks: list[str]) -> list[float]:
    """The margin of each task."""
    given = margin if isinstance(margin, Mapping) else dict.fromkeys(tasks, margin)
    if missing := [task for task in tasks if task not in given]:
        raise ValueError(f"margin has no entry for the task {missing[0]!r}; give one for each")
    for one in given.values():
        if not one > 0:
            raise ValueError(f"margin={one!r}: give percentage points above 0, such as 3.0")
    return [given[task] for task in tasks]


def _direction(table: PairedTable, higher_is_better: bool | None) -> str:
    """Which is better; where nobody says, higher is."""
    if higher_is_better is not None:
        return HIGHER_BETTER if higher_is_better else LOWER_BETTER
    if table.better == NEITHER_BETTER:
        raise ValueError(
            f"{table.task}: its log says that neither more nor less of {table.metric} is better;"
            " say higher_is_better=True or False"
        )
    return HIGHER_BETTER if table.better == UNKNOWN else table.better


# ---- numbers
def _estimated(table: PairedTable) -> dict:
    """The row of numbers of one task, and its estimate as `estimates` has it."""
    values = pd.concat([table.base, table.candidate])
    pairs = list(by_run(table))
    change, weight, setting, rates = _paired(values, pairs) if pairs else _apart(values, table)
    pool = np.zeros(len(weight), int)
    found = estimation.estimate(change, np.arange(len(weight)), weight, setting, pool)["both"]
    there = values.notna().to_numpy().all(0)
    return {
        "task": table.task,
        "metric": table.metric,
        "n_items": int(there.sum()),
        "n_unpaired": table.n_unpaired,
        "n_unscored": int((~there).sum()),
        "n_base_runs": len(table.base),
        "n_candidate_runs": len(table.candidate),
        "base_rate": rates[0],
        "candidate_rate": rates[1],
        "estimate": found,
    }


def _paired(values: pd.DataFrame, pairs: list[tuple[str, str]]) -> tuple:
    """The changes of the candidate's runs against their own base runs, their weights and settings,
    and both mean rates on the items that the two of a pair have scored.
    """
    frame = pd.DataFrame(pairs, columns=["base_run_id", "run_id"]).assign(arm=terms.TRAINED)
    change = influence.paired(values, frame)
    own = float(np.mean(change.rate))
    n = len(change.runs)
    return change, np.full(n, 1 / n), np.zeros(n, int), (own - float(np.mean(change.value)), own)


def _apart(values: pd.DataFrame, table: PairedTable) -> tuple:
    """As _paired, where the sides' seeds differ: runs are independent, items that all scored are
    paired.
    """
    level = influence.shares(values.loc[:, values.notna().all()])
    change = replace(level, limits=(-100.0, 100.0), rate=level.value)
    sides = np.repeat([0, 1], [len(table.base), len(table.candidate)])
    weight = np.where(sides, 1.0, -1.0) / np.bincount(sides)[sides]
    rates = (float(level.value[sides == side].mean()) for side in (0, 1))
    return change, weight, sides, tuple(rates)


# ---- words
def _words(tables: list[PairedTable], directions: list[str], margins: list[float]) -> list[dict]:
    """The numbers and the word of each task, from tests adjusted over all of them."""
    found = [_estimated(table) for table in tables]
    names = [
        {**_LABELS, "outcome": OUTCOMES[better], "benchmark": one["task"]}
        for one, better in zip(found, directions, strict=True)
    ]
    rows = [{**label, **one.pop("estimate")} for label, one in zip(names, found, strict=True)]
    estimates = comparisons.declared(estimation.complete(pd.DataFrame(rows)), FAMILY)
    kept, below = _preserved(estimates, margins)
    numbers = estimates[["value", "ci_low", "ci_high", "p", "p_adjusted"]].astype(float)
    numbers = numbers.rename(columns={"value": "difference"}).to_dict("records")
    how = estimates[["population", "how"]].to_dict("records")
    for place, (one, better) in enumerate(zip(found, directions, strict=True)):
        one |= numbers[place] | {"p_margin": below[place], "margin": margins[place]}
        one |= how[place]
        gain = one["difference"] if better == HIGHER_BETTER else -one["difference"]
        differs = one["p_adjusted"] < ALPHA  # never where it is null
        one["word"] = word_of(differs and gain > 0, kept[place], differs and gain < 0)
    return found


def _preserved(estimates: pd.DataFrame, margins: list[float]) -> tuple[list[bool], np.ndarray]:
    """Whether each task's loss is below its margin, by `preserves` and Holm's step over
    the tasks, and the adjusted p.
    """
    outcomes = list(zip(estimates["outcome"], estimates["benchmark"], strict=True))
    levels = tuple(dict.fromkeys(margins))
    harms = noninferiority.preserves(estimates, levels, outcomes, AS_CONFIGURED)
    harms = harms[harms["outcome"].ne(noninferiority.JOINTLY)]
    wanted = [(*outcome, margin) for outcome, margin in zip(outcomes, margins, strict=True)]
    harms = harms.set_index(["outcome", "benchmark", "margin"]).loc[wanted]
    below = intervals.holm(harms["p"].astype(float).fillna(1.0).to_numpy())
    said = harms["how"].str.startswith(PRESERVES).to_numpy()
    return list(said & (below <= 1 - UPPER)), below


def _at_end(
    tables: list[PairedTable], directions: list[str], margins: list[float], end: str
) -> list[dict]:
    """What would be said if every missing score were the worst, or the best, for the candidate."""
    filled = []
    for table, better in zip(tables, directions, strict=True):
        own = float((end == BETTER) == (better == HIGHER_BETTER))
        sides = {"base": table.base.fillna(1 - own), "candidate": table.candidate.fillna(own)}
        filled.append(replace(table, **sides))
    return _words(filled, directions, margins)


def _sentence(row: dict, better: str, assumed: bool, n_tasks: int) -> str:
    """The row in words."""
    name = row["task"] if row["metric"] == "score" else f"{row['task']} ({row['metric']})"
    ends = ""
    if not pd.isna(row["ci_low"]):
        ends = f" ({INTERVAL} {row['ci_low']:.1f} to {row['ci_high']:.1f})"
    change = picking.with_minus(f"{row['difference']:+.1f} points{ends}")
    text = (
        f"{name}: the candidate has {row['candidate_rate']:.1f} %, the base"
        f" {row['base_rate']:.1f} %, {change} on {row['n_items']:,} items of both"
    )
    said = {
        PRESERVES: f"preserves at the margin of {row['margin']:g} points",
        CANNOT_TELL: f"cannot tell at the margin of {row['margin']:g} points",
    }
    text += f": {said.get(row['word'], row['word'])}"
    text += f", tests adjusted over {n_tasks} tasks" if n_tasks > 1 else ""
    notes = [f"for {row['population']}"]
    if assumed:
        notes.append("nothing says which is better, so higher is taken to be")
    elif better == LOWER_BETTER:
        notes.append("lower is better")
    if row["n_unpaired"]:
        notes.append(f"{row['n_unpaired']:,} items were asked of one side only and are left out")
    if row["n_unscored"]:
        more = ", which could overturn the word" if row["overturned"] else ""
        notes.append(f"{row['n_unscored']:,} items lack a score{more}")
    return f"{text}; {'; '.join(notes)}."
