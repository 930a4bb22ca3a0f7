"""Answers logged by inspect_ai (.eval or .json), one row per sample and score.

A log is opened by inspect_ai itself, which knows its older forms. Texts are compared, by a hash of
input and target, and never kept.
"""

import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pandas as pd

from driftbook.stats.lm_eval_logs import DIRECTIONS, HIGHER_BETTER, LOG_COLUMNS, UNKNOWN
from driftbook.study.files import digest

# inspect_ai's words for a score, as its own accuracy counts them (value_to_float)
WORDS = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_SKIPPED = {"messages", "events", "store", "output", "attachments"}  # of a sample: large, unused


def inspect_rows(path: Path, cluster: str | None, stratum: str | None) -> pd.DataFrame:
    """The scored answers of a log, or of a folder with one log of each task, as LOG_COLUMNS.

    Epochs are repeated answers to one item. A metric is a scorer's name, with the key where its
    value is a table. C, P, I and N count as in inspect_ai's accuracy: 1, 0.5, 0, 0. NaN, and a
    sample that ended in an error, were not scored; a score that a sample lacks does not apply to
    it. `cluster` and `stratum` name fields of a sample's metadata. A task that was given arguments
    is named with them where the folder has several of its name.

    Raises:
        ValueError: the log cannot be read, is not of a finished evaluation, or a field is missing.
    """
    files = [path] if path.is_file() else sorted([*path.glob("*.eval"), *path.glob("*.json")])
    logs = [(file, _read(file)) for file in files]
    names = _task_names([(file, log.eval) for file, log in logs])
    rows = [
        {"task": task} | row
        for (file, log), task in zip(logs, names, strict=True)
        for row in _log_rows(file, log, cluster, stratum)
    ]
    return pd.DataFrame(rows, columns=LOG_COLUMNS)


def _log_rows(path: Path, log: Any, cluster: str | None, stratum: str | None) -> list[dict]:
    """A row per sample and score; null in every score where the sample ended in an error."""
    said, rows, lost, better = _directions(log), [], [], {}
    for sample in log.samples or ():
        common = _described(sample, f"{path}: sample {sample.id}", cluster, stratum)
        if sample.error is not None:
            lost.append(common)
            continue
        for metric, value in _scores(sample).items():
            if value in ("C", "I"):
                better[metric] = HIGHER_BETTER
            rows.append(common | {"metric": metric, "score": _number(value)})
    metrics = dict.fromkeys(row["metric"] for row in rows)
    rows += [one | {"metric": metric, "score": None} for one in lost for metric in metrics]
    better |= {metric: said[metric] for metric in metrics if said.get(metric, UNKNOWN) != UNKNOWN}
    return [row | {"better": better.get(row["metric"], UNKNOWN)} for row in rows]


def _read(path: Path) -> Any:
    """The EvalLog of a finished evaluation."""
    try:
        from inspect_ai.log import read_eval_log
    except ImportError:
        raise ValueError(f"{path} is a log of inspect_ai: pip install inspect-ai") from None
    try:
        log = read_eval_log(str(path), exclude_fields=_SKIPPED)
    except (ValueError, OSError, KeyError, BadZipFile, NotImplementedError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a log of inspect_ai ({said})") from None
    if log.status != "success":
        raise ValueError(
            f"{path} is of an evaluation that ended as {log.status!r}, so which items it has may"
            " depend on their answers; finish it with `inspect eval-retry`"
        )
    return log


def _task_names(specs: list[tuple[Path, Any]]) -> list[str]:
    """The name of each log's task, with its arguments where tasks of that name differ in them."""
    tasks = [spec.task for _, spec in specs]
    found: dict[str, Path] = {}
    for file, spec in specs:
        name = spec.task
        if tasks.count(name) > 1:
            of = ", ".join(f"{key}={value}" for key, value in sorted(spec.task_args.items()))
            name = f"{name} ({of})" if of else name
        if name in found:
            raise ValueError(
                f"{file.parent} holds more than one log of {name} ({found[name].name},"
                f" {file.name}); name one file, or give a list of them if they are repetitions"
            )
        found[name] = file
    return list(found)


def _directions(log: Any) -> dict[str, str]:
    """By score, which is better, where the log says so, as our own export does."""
    scores = log.results.scores if log.results else []
    known = {score.name: (score.metadata or {}) for score in scores}
    return {
        name: DIRECTIONS[said["higher_is_better"]] if "higher_is_better" in said else UNKNOWN
        for name, said in known.items()
    }


def _scores(sample: Any) -> dict[str, Any]:
    """The sample's values by metric."""
    found: dict[str, Any] = {}
    for name, score in (sample.scores or {}).items():
        keyed = isinstance(score.value, dict)
        found |= {f"{name},{key}": one for key, one in score.value.items()} if keyed else {}
        found |= {} if keyed else {name: score.value}
    return found


def _number(value: Any) -> Any:
    """The value as a number where inspect_ai's accuracy reads it as one; any other value as it is,
    for who chooses the metric to refuse.
    """
    if not isinstance(value, str):
        return value
    word = WORDS.get(value, WORDS.get(value.lower()))
    if word is not None:
        return word
    try:
        return float(value)
    except ValueError:
        return value


def _described(sample: Any, where: str, cluster: str | None, stratum: str | None) -> dict[str, Any]:
    """What a sample is about: its item, its epoch, and a hash of what it asks."""
    found: dict[str, Any] = {"item": str(sample.id), "sample": sample.epoch}
    for column, name in (("cluster", cluster), ("stratum", stratum)):
        if name is not None and name not in sample.metadata:
            has = sorted(sample.metadata)
            raise ValueError(f"{where}: its metadata has no field {name!r}; it has {has}")
        found[column] = None if name is None else sample.metadata[name]
    asked = sample.input
    if not isinstance(asked, str):  # a message's id differs from run to run
        asked = [json.loads(one.model_dump_json(include={"role", "content"})) for one in asked]
    document = digest([sample.target, sample.choices, asked])
    return found | {"document": document, "prompt": None}
