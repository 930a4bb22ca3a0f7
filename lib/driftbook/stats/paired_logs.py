"""Two models' answers to the same items, from logs of lm-evaluation-harness or inspect_ai or from
tables, as one paired table per task.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.stats.influence import matrix
from driftbook.stats.inspect_logs import inspect_rows
from driftbook.stats.lm_eval_logs import LOG_COLUMNS, RESULTS, SAMPLES, UNKNOWN, lm_eval_rows
from driftbook.study.reading import json_value

Source = str | Path | pd.DataFrame | list[str | Path]
SIDES = ("base", "candidate")
_UNITS = ["stratum", "prompt_id"]
_OPTIONAL = {"task": "the table", "metric": "score", "seed": "1", "sample": 0, "better": UNKNOWN}
_OPTIONAL |= dict.fromkeys(("cluster", "stratum", "document", "prompt"))


@dataclass(frozen=True)
class PairedTable:
    """Both models' scores (0 to 1) of the items that both were asked, in one task.

    `base` and `candidate` are [runs, units], the units in the same order, with levels stratum,
    family where items are clustered, and prompt_id; NaN where a run has no score.
    """

    task: str
    metric: str
    better: str  # higher, lower, neither or unknown
    base: pd.DataFrame
    candidate: pd.DataFrame
    n_unpaired: int  # items that only one of the two was asked


def paired_tables(
    base: Source,
    candidate: Source,
    metric: str | Mapping[str, str] | None = None,
    cluster: str | None = None,
    stratum: str | None = None,
) -> list[PairedTable]:
    """The paired table of each task that both sides have; see two_models.compare for the sources.

    Raises:
        ValueError: see two_models.compare.
    """
    sides = [
        _rows(source, side, cluster, stratum)
        for source, side in zip((base, candidate), SIDES, strict=True)
    ]
    tasks = _shared_tasks(*(list(dict.fromkeys(side["task"])) for side in sides), metric)
    return [
        _paired(task, [side[side["task"].eq(task)] for side in sides], _wanted(metric, task))
        for task in tasks
    ]


# ---- sources
def _rows(source: Source, side: str, cluster: str | None, stratum: str | None) -> pd.DataFrame:
    """The answers of one model, with a seed each."""
    if isinstance(source, pd.DataFrame):
        return _of_table(source, side, cluster, stratum)
    paths = source if isinstance(source, list | tuple) else [source]
    if not paths:
        raise ValueError(f"{side}: the list of logs is empty; give at least one")
    parts = [
        _logged(Path(path), cluster, stratum).assign(seed=str(number))
        for number, path in enumerate(paths, 1)
    ]
    found = pd.concat(parts, ignore_index=True)
    if found.empty:
        raise ValueError(f"{side}: {paths[0]} has no scored answer")
    return found


def _of_table(
    frame: pd.DataFrame, side: str, cluster: str | None, stratum: str | None
) -> pd.DataFrame:
    """The rows of a table, under the names of LOG_COLUMNS and seed."""
    wanted = {"cluster": cluster or "cluster", "stratum": stratum or "stratum"}
    needed = ["item", "score", *(name for name in (cluster, stratum) if name is not None)]
    if missing := [name for name in needed if name not in frame]:
        has = ", ".join(map(str, frame.columns))
        raise ValueError(
            f"{side}: the table has no column {missing[0]!r} (it has {has}); a row is an answer,"
            " with item, score and, where there are any, task, seed, sample and cluster"
        )
    if frame.empty or frame["item"].isna().any():
        what = "is empty" if frame.empty else "has a row without an item"
        raise ValueError(f"{side}: the table {what}; a row is the answer to an item")
    usual = {name: value for name, value in _OPTIONAL.items() if name not in frame}
    named = {column: frame[name] for column, name in wanted.items() if name in frame}
    found = frame.assign(**(usual | named))
    text = {name: [*map(str, found[name])] for name in ("task", "metric", "seed", "item")}
    return found.assign(**text)[[*LOG_COLUMNS, "seed"]].reset_index(drop=True)


def _logged(path: Path, cluster: str | None, stratum: str | None) -> pd.DataFrame:
    """The answers in a log or a folder of logs, by whichever format it has."""
    if not path.exists():
        raise ValueError(f"{path} is not there; give a log or folder of lm-eval or inspect_ai")
    path = _one_folder(path) if path.is_dir() else path
    read = lm_eval_rows if _is_lm_eval(path) else inspect_rows
    return read(path, cluster, stratum)


def _one_folder(path: Path) -> Path:
    """The folder itself where it holds logs, else its one folder that does, as lm-eval makes one
    for each model.
    """

    def holds(folder: Path) -> bool:
        return any(next(folder.glob(name), None) for name in (SAMPLES, RESULTS, "*.eval", "*.json"))

    found = [path] if holds(path) else [one for one in sorted(path.iterdir()) if one.is_dir()]
    found = [one for one in found if holds(one)]
    if len(found) != 1:
        names = ", ".join(one.name for one in found[:4])
        said = f"has logs in several folders ({names}); name one" if found else "holds no log"
        raise ValueError(f"{path} {said}; expected lm-eval's samples_*.jsonl or logs of inspect_ai")
    return found[0]


def _is_lm_eval(path: Path) -> bool:
    if path.is_dir():
        return any(next(path.glob(name), None) for name in (SAMPLES, RESULTS))
    if path.suffix not in (".jsonl", ".json", ".eval"):
        raise ValueError(
            f"{path}: expected a .jsonl or .json of lm-eval, or a .eval or .json of"
            " inspect_ai; read any other table yourself and give it as a DataFrame"
        )
    if path.suffix != ".json":
        return path.suffix == ".jsonl"
    value = json_value(path)
    return isinstance(value, dict) and "results" in value and "eval" not in value


# ---- what is compared
def _wanted(metric: str | Mapping[str, str] | None, task: str) -> str | None:
    return metric.get(task) if isinstance(metric, Mapping) else metric


def _shared_tasks(
    base: list[str], candidate: list[str], metric: str | Mapping[str, str] | None
) -> list[str]:
    """The tasks of both, or those that `metric` names."""
    shared = [task for task in base if task in candidate]
    if isinstance(metric, Mapping):
        if missing := [task for task in metric if task not in shared]:
            raise ValueError(
                f"metric names the task {missing[0]!r}, which not both sides have; both"
                f" have {', '.join(shared) or 'none'}"
            )
        return [task for task in shared if task in metric]
    if not shared or set(base) != set(candidate):
        one, other = (
            ", ".join(task for task in of if task not in shared) or "none"
            for of in (base, candidate)
        )
        way = f"; name those to compare, metric={{{shared[0]!r}: ...}}" if shared else ""
        raise ValueError(
            f"the two sides have different tasks: the base alone has {one}, the candidate alone"
            f" {other}{way}"
        )
    return shared


def _metric(task: str, sides: list[pd.DataFrame], wanted: str | None) -> str:
    """The metric of a task that both sides have: the wanted one, or the only one."""
    names = [list(dict.fromkeys(side["metric"])) for side in sides]
    shared = [name for name in names[0] if name in names[1]]
    if wanted is None:
        fits = shared
    else:
        fits = [name for name in shared if name == wanted] or [
            name for name in shared if name.partition(",")[0] == wanted
        ]
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(map(repr, fits or shared)) or "none"
    if not fits:
        asked = "metric in common" if wanted is None else f"metric {wanted!r} on both sides"
        raise ValueError(f"{task} has no {asked}; both have {listed}")
    raise ValueError(f"{task} has several metrics or filters, {listed}: choose one with metric=")


def _paired(task: str, sides: list[pd.DataFrame], wanted: str | None) -> PairedTable:
    metric = _metric(task, sides, wanted)
    where = f"{task} ({_shown(metric)})"
    sides = [_scored(side[side["metric"].eq(metric)], where) for side in sides]
    items = [side["item"].drop_duplicates() for side in sides]
    both = items[0][items[0].isin(items[1])]
    if both.empty:
        ids = ", ".join(repr(one.iloc[0]) for one in items)
        raise ValueError(f"{where}: the two sides have no item in common (the first are {ids})")
    every = pd.concat(side[side["item"].isin(both)] for side in sides)
    _check_same(where, every)
    described = every.groupby("item", sort=False)[["stratum", "cluster"]].first()
    values = [_values(side, name, described) for side, name in zip(sides, SIDES, strict=True)]
    there = [side.notna().any().to_numpy() for side in values]
    if not (there[0] & there[1]).any():
        raise ValueError(f"{where}: no item has a score on both sides")
    better = [one for one in every["better"].unique() if one != UNKNOWN]
    return PairedTable(
        task,
        _shown(metric),
        better[0] if len(better) == 1 else UNKNOWN,
        *values,
        sum(map(len, items)) - 2 * len(both),
    )


def _shown(metric: str) -> str:
    return metric.removesuffix(",none")


def _scored(side: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows with their score as a number from 0 to 1."""
    odd = [one for one in side["score"] if not _is_number(one)]
    if odd:
        raise ValueError(
            f"{where}: a score is a {type(odd[0]).__name__}, not one number; only means of single"
            " numbers can be compared"
        )
    null = side["score"].isna()
    score = side["score"].astype(object).mask(null, np.nan).astype(float)
    if ((score < 0) | (score > 1)).any():
        raise ValueError(
            f"{where}: scores lie from {score.min():g} to {score.max():g}, and rates need"
            " 0 to 1; divide a bounded score by its largest value and give tables"
        )
    return side.assign(score=score, item=side["item"].astype(object))  # faster than texts in Arrow


def _is_number(value: object) -> bool:
    return value is None or value is pd.NA or isinstance(value, Real | np.bool_)


def _check_same(where: str, every: pd.DataFrame) -> None:
    """Raise a ValueError where an item is not the same question in all runs, asked the same way, in
    the same cluster and stratum.
    """
    said = {
        "document": "different documents under one id, so the data sets differ; compare logs of the"
        " same version of the task",
        "prompt": "different prompts (a chat template, system message or examples); ask both models"
        " the same way, or give tables to compare them as they are",
        "cluster": "different clusters in different runs; an item belongs to one",
        "stratum": "different strata in different runs; an item belongs to one",
    }
    for name, what in said.items():
        known = every.loc[every[name].notna(), ["item", name]].astype({name: str})
        differ = known.groupby("item")[name].nunique().gt(1)
        if differ.any():
            raise ValueError(f"{where}: {differ.sum()} of {len(differ)} items have {what}")


def _values(side: pd.DataFrame, name: str, described: pd.DataFrame) -> pd.DataFrame:
    """Runs x units of one side, on the described items; every run has every unit."""
    rows = side[side["item"].isin(described.index)].rename(columns={"item": "prompt_id"})
    stratum = described["stratum"].astype(object).where(described["stratum"].notna(), "all")
    clustered = described["cluster"].notna().any()
    units = ["stratum", "family", "prompt_id"] if clustered else _UNITS
    at = rows["prompt_id"]
    rows = rows.assign(
        run_id=f"{name} " + rows["seed"],
        stratum=at.map(stratum).astype(str),
        family=at.map(described["cluster"].map(str, na_action="ignore")),
    )
    return matrix(rows[["run_id", *units, "sample", "score"]], "score", units)


def by_run(table: PairedTable) -> Iterator[tuple[str, str]]:
    """The base run and the candidate run of each pair of runs: one base run for all, or the two of
    each seed; none where the seeds differ.
    """
    seeds = [
        [name.partition(" ")[2] for name in side.index] for side in (table.base, table.candidate)
    ]
    if len(table.base) == 1:
        yield from ((table.base.index[0], name) for name in table.candidate.index)
    elif sorted(seeds[0]) == sorted(seeds[1]):
        yield from ((f"{SIDES[0]} {seed}", f"{SIDES[1]} {seed}") for seed in seeds[0])
