"""A finished study as logs of inspect_ai (see driftbook.publishing.exported)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftbook.publishing.exported import (
    GROUP,
    MASKED,
    VERSION,
    Part,
    Task,
    described_item,
    exported_parts,
    masked_text,
    run_metadata,
    ways_of_asking,
)
from driftbook.study.files import digest, replacing_folder
from driftbook.study.study_file import Study

# what a value is called in inspect_ai: mean, where its own metric of that name gives the same, from
# the samples
NAMES = {"bias_amb": "bias", "nll": "mean_per_token"}
REASONS = {
    "unsafe": "grader_failed",
    "refused": "no_response",
}  # inspect_ai's words for why a score is null; else scoring_failed


def to_inspect(study: Study, out: Path) -> list[Path]:
    """The logs written, OUT/RUN_ID/DATE_TASK_ID.json: one per run, task and way of asking (its task
    arguments).

    The format is JSON, not .eval: a zip of one small file per sample takes ten times as long to
    write (3 ms a sample). An answer is a sample whose epoch is the number of the repetition. A
    failed run has for each task a log with the status "error" and the reason.

    Raises:
        ValueError: a table is missing, or a value names a folder of this machine.
    """
    from inspect_ai.log import write_eval_log

    runs, parts = exported_parts(study)
    written = []
    for run in runs.to_dict("records"):
        folder = out / run["run_id"]
        with replacing_folder(folder) as new:
            for log in _logs(run, parts):
                task, date = (
                    log.eval.task.replace("_", "-"),
                    run["finished"].strftime("%Y-%m-%dT%H-%M-%S+00-00"),
                )
                write_eval_log(log, str(new / f"{date}_{task}_{log.eval.task_id}.json"))
        written += sorted(folder.iterdir())
    return written


# ---- inspect_ai
def _logs(run: dict[str, Any], parts: list[Part]) -> Iterator[Any]:
    """The EvalLog of each task and way of asking; of a failed run, one of each task, with the
    reason.
    """
    from inspect_ai.log import EvalDataset, EvalLog, EvalResults, EvalStats

    stats = EvalStats(
        started_at=run["finished"].isoformat(), completed_at=run["finished"].isoformat()
    )
    for part in parts:
        if run["status"] != "ok":
            yield EvalLog(
                status="error",
                eval=_spec(run, part.task, {}, EvalDataset(name=part.task.benchmark)),
                stats=stats,
                error=_error(run["failure"]),
            )
            continue
        results = {
            tuple(way.values()): rows
            for way, rows in ways_of_asking(
                part.task, part.results.get(run["run_id"], pd.DataFrame(columns=part.task.asked))
            )
        }
        for way, scores in (
            ways_of_asking(part.task, part.scores[run["run_id"]])
            if run["run_id"] in part.scores
            else ()
        ):
            samples = _eval_samples(part.task, scores)
            rates = [
                _eval_score(row, scores["epoch"].max(), part.task)
                for row in results[tuple(way.values())].to_dict("records")
            ]
            ids = list(scores["item"].unique())
            spec = _spec(
                run,
                part.task,
                way,
                EvalDataset(name=part.task.benchmark, samples=len(ids), sample_ids=ids),
                rates,
                int(scores["epoch"].max()),
            )
            totals = EvalResults(
                total_samples=len(samples), completed_samples=len(samples), scores=rates
            )
            yield EvalLog(status="success", eval=spec, results=totals, stats=stats, samples=samples)


def _spec(
    run: dict[str, Any],
    task: Task,
    way: dict[str, str],
    dataset: Any,
    rates: list = (),
    epochs: int = 1,
) -> Any:
    """The EvalSpec of a run's task; its ids follow from run, task and way."""
    from inspect_ai.log import EvalConfig, EvalSpec

    own = digest([run["run_id"], task.name, way], 22)
    metrics = [{"name": f"inspect_ai/{name}"} for name in ("mean", "stderr")]
    return EvalSpec(
        created=run["finished"].isoformat(),
        eval_id=own,
        task_id=own,
        run_id=run["run_id"],
        task=task.name,
        task_version=str(VERSION),
        task_args=way,
        task_description=task.asks,
        dataset=dataset,
        model=f"{GROUP}/{run['run_id']}",
        config=EvalConfig(epochs=epochs, epochs_reducer=["mean"]),
        packages=json.loads(run["versions"] or "{}"),
        metadata=run_metadata(run),
        tags=[run["base_model"], run["method"], run["objective"]],
        scorers=[{"name": rate.name, "metrics": metrics} for rate in rates],
    )


def _error(reason: str) -> Any:
    from inspect_ai.log import EvalError

    return EvalError(message=reason, traceback="", traceback_ansi="")


def _score_name(row: dict[str, Any]) -> str:
    """unsafe_JUDGE, since a sample has one of each judge; all others have one scorer, and the
    metric's name.
    """
    return f"{row['metric']}_{row['source']}" if row["metric"] == "unsafe" else row["metric"]


def _eval_samples(task: Task, scores: pd.DataFrame) -> list[Any]:
    """An EvalSample per item and epoch, with the scores that apply to it."""
    from inspect_ai.log import EvalSample

    found: dict[tuple, Any] = {}
    for row in scores.to_dict("records"):
        key = row["item"], int(row["epoch"])
        if key not in found:
            found[key] = EvalSample(
                id=key[0],
                epoch=key[1],
                input=masked_text(task, row["item"]),
                target=MASKED,
                scores={},
                metadata=described_item(row),
            )
        found[key].scores[_score_name(row)] = _score(row)
    return list(found.values())


def _score(row: dict[str, Any]) -> Any:
    """The Score of an answer; a loss has what inspect_ai's perplexity metrics read."""
    from inspect_ai.scorer import Score

    if np.isnan(row["value"]):
        return Score.unscored(
            reason=REASONS.get(row["metric"], "scoring_failed"), explanation=row["reason"]
        )
    weighted = (
        {"num_tokens": int(row["weight"]), "sum_log_probs": -row["value"] * row["weight"]}
        if row["metric"] == "nll"
        else None
    )
    return Score(value=row["value"], answer=row["answer"], metadata=weighted)


def _eval_score(row: dict[str, Any], epochs: int, task: Task) -> Any:
    """The EvalScore of a result, and which way is better; NaN where inspect_ai has no null."""
    from inspect_ai.log import EvalMetric, EvalScore

    metrics = {
        name: EvalMetric(name=name, value=float(value), metadata={"how": row["how"]})
        for name, value in (
            (NAMES.get(row["metric"], "mean"), row["value"]),
            ("stderr", row["stderr"]),
        )
    }
    return EvalScore(
        name=_score_name(row),
        scorer=row["source"] or GROUP,
        reducer="mean" if epochs > 1 else None,
        scored_samples=int(row["n_scored"]),
        unscored_samples=int(row["n"] - row["n_scored"]),
        metrics=metrics,
        metadata={"higher_is_better": task.metrics[row["metric"]]},
    )
