"""Answers logged by lm-evaluation-harness (`--log_samples`), one row per item and metric.

It writes OUT/MODEL/results_DATE.json and samples_TASK_DATE.jsonl, a line per item and filter; see
its EvaluationTracker and SampleResult. Texts are not read: items are told apart by doc_id and
compared by the hashes that it writes.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.study.reading import json_lines, json_value

SAMPLES, RESULTS = "samples_*.jsonl", "results_*.json"
# which is better
HIGHER_BETTER, LOWER_BETTER = "higher", "lower"
NEITHER_BETTER, UNKNOWN = "neither", "unknown"
DIRECTIONS = {True: HIGHER_BETTER, False: LOWER_BETTER, None: NEITHER_BETTER}
# columns of every log that is read, of this format or another
LOG_COLUMNS = ["task", "metric", "item", "sample", "score", "cluster", "stratum", "document"]
LOG_COLUMNS += ["prompt", "better"]
_TEXTS = {"target", "arguments", "resps", "filtered_resps"}
_NO_METRICS = {"doc_id", "doc", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash"}
_NO_METRICS |= {"unscored_reason"}


def lm_eval_rows(path: Path, cluster: str | None, stratum: str | None) -> pd.DataFrame:
    """The logged answers in a samples file, of the run of a results file, or in a folder with one
    run of each task, as LOG_COLUMNS.

    A metric is named as in lm-eval's results, `acc,none` or `exact_match,strict-match`: an item has
    a row per filter. A metric that is null was not scored; one that a sample lacks does not apply
    to it. `cluster` and `stratum` name fields of the document.

    Raises:
        ValueError: no samples were logged, a task was run twice, a line is no sample, a field is
            missing.
    """
    better, rows = _directions(path), []
    for task, file in _sample_files(path).items():
        own = better.get(task, {})
        samples = [(number, _sample(file, number, line)) for number, line in json_lines(file)]
        if not samples:
            raise ValueError(f"{file} holds no samples: was the evaluation stopped before its end?")
        names = _metric_names([sample for _, sample in samples])
        for number, sample in samples:
            where = f"{file}: line {number}"
            common = _described(sample, where, cluster, stratum) | {"task": task, "sample": 0}
            for name in names[_filter(sample)]:
                if name not in sample:
                    continue  # it does not apply to this item
                direction = DIRECTIONS.get(own[name], UNKNOWN) if name in own else UNKNOWN
                metric = f"{name},{_filter(sample)}"
                score = {"metric": metric, "score": sample.get(name), "better": direction}
                rows.append(common | score)
    return pd.DataFrame(rows, columns=LOG_COLUMNS)


def _filter(sample: dict[str, Any]) -> str:
    return sample.get("filter") or "none"


def _sample(path: Path, number: int, line: Any) -> dict[str, Any]:
    """A line without its texts, which may be large."""
    if not isinstance(line, dict) or "doc_id" not in line:
        raise ValueError(
            f"{path}: line {number} is no sample of lm-eval (it has no doc_id); give a file"
            " samples_TASK_DATE.jsonl that lm-eval wrote with --log_samples"
        )
    return {name: value for name, value in line.items() if name not in _TEXTS}


def _metric_names(samples: list[dict[str, Any]]) -> dict[str, list[str]]:
    """By filter, the metrics that some sample has; older versions do not list them."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for sample in samples:
        names = sample.get("metrics", [name for name in sample if name not in _NO_METRICS])
        found[_filter(sample)].update(dict.fromkeys(names))
    return {name: list(metrics) for name, metrics in found.items()}


def _described(
    sample: dict[str, Any], where: str, cluster: str | None, stratum: str | None
) -> dict[str, Any]:
    """What a sample is about: its item, and the hashes of what it asks."""
    doc = sample.get("doc") if isinstance(sample.get("doc"), dict) else {}
    found: dict[str, Any] = {"item": str(sample["doc_id"])}
    for column, name in (("cluster", cluster), ("stratum", stratum)):
        if name is not None and name not in doc:
            raise ValueError(f"{where}: the document has no field {name!r}; it has {sorted(doc)}")
        found[column] = None if name is None else doc[name]
    hashes = [sample.get("doc_hash"), sample.get("target_hash")]
    found["document"] = None if None in hashes else "".join(hashes)
    return found | {"prompt": sample.get("prompt_hash")}


# ---- files
def _sample_files(path: Path) -> dict[str, Path]:
    """The samples file of each task."""
    if path.suffix == ".jsonl":
        return {_task(path): path}
    files = sorted(path.glob(SAMPLES)) if path.is_dir() else []
    if path.suffix == ".json":
        date = path.stem.rpartition("_")[2]
        files = sorted(path.parent.glob(f"samples_*_{date}.jsonl"))
    if not files:
        raise ValueError(f"{path} has no samples beside it; run lm-eval with --log_samples")
    found: dict[str, Path] = {}
    for file in files:
        if other := found.get(_task(file)):
            raise ValueError(
                f"{path} holds more than one run of {_task(file)} ({other.name}, {file.name}); name"
                " one results_DATE.json, or give a list of them if they are repetitions"
            )
        found[_task(file)] = file
    return found


def _task(path: Path) -> str:
    """The task in samples_TASK_DATE.jsonl; the file's own name where it has another."""
    inner = path.stem.removeprefix("samples_").rpartition("_")[0]
    return inner if path.stem.startswith("samples_") and inner else path.stem


def _directions(path: Path) -> dict[str, dict[str, bool | None]]:
    """By task and metric, whether higher is better, from the results beside the samples."""
    if path.suffix == ".jsonl":
        date = path.stem.rpartition("_")[2]
        files = list(path.parent.glob(f"results_{date}.json"))
    else:
        files = sorted(path.glob(RESULTS)) if path.is_dir() else [path]
    found: dict[str, dict[str, bool | None]] = {}
    for file in files:
        value = json_value(file)
        if isinstance(value, dict) and isinstance(value.get("higher_is_better"), dict):
            found |= value["higher_is_better"]
    return {task: names for task, names in found.items() if isinstance(names, dict)}
