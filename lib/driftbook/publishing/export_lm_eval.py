"""A finished study as results of lm-evaluation-harness (see driftbook.publishing.exported)."""

import json
import shutil
import subprocess
from importlib.metadata import version
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
)
from driftbook.study.files import ROOT, finite, replacing_folder
from driftbook.study.nameless import model_name
from driftbook.study.study_file import Study

# what lm_eval records and a driftbook study does not have
UNKNOWN = ("upper_git_hash", "chat_template", "chat_template_sha", "total_evaluation_time_seconds")
UNKNOWN_SETTINGS = ("model_num_parameters", "batch_size", "device", "use_cache", "limit")
UNKNOWN_SETTINGS += ("gen_kwargs",)


def to_lm_eval(study: Study, out: Path) -> list[Path]:
    """The files written: per run that is ok OUT/RUN_ID/results_DATE.json and
    samples_TASK_DATE.jsonl.

    Failed runs have none (see `failures`), and what an earlier export wrote of them is deleted.

    A metric's filter is who scored and how it was asked (JUDGE-VARIANT-DECODING; MODE-VARIANT-ORDER
    for BBQ; none). Repeated answers to a prompt are averaged in its sample. git_hash is that of the
    exporting code.

    Raises:
        ValueError: a table is missing, or a value names a folder of this machine.
    """
    from lm_eval.utils import sanitize_model_name

    runs, parts = exported_parts(study)
    commit, written = _commit(), []
    for run in runs.to_dict("records"):
        date, folder = (
            run["finished"].strftime("%Y-%m-%dT%H-%M-%S"),
            out / sanitize_model_name(run["run_id"]),
        )
        if run["status"] != "ok":
            shutil.rmtree(
                folder, ignore_errors=True
            )  # of an earlier export, when the run had not failed
            continue
        with replacing_folder(folder) as new:
            samples = {
                part.task.name: _samples(part.task, part.scores[run["run_id"]])
                for part in parts
                if run["run_id"] in part.scores
            }
            for task, rows in samples.items():
                lines = "".join(
                    json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows
                )
                (new / f"samples_{task}_{date}.jsonl").write_text(lines, encoding="utf-8")
            results = _results_file(
                study, run, [part for part in parts if part.task.name in samples], samples, commit
            )
            text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
            (new / f"results_{date}.json").write_text(text, encoding="utf-8")
        written += sorted(folder.iterdir())
    return written


# ---- lm_eval
def _filter(task: Task, row: dict[str, Any]) -> str:
    return (
        "-".join(part for part in (row["source"], *(row[name] for name in task.asked)) if part)
        or "none"
    )


def _samples(task: Task, scores: pd.DataFrame) -> list[dict]:
    """The task's samples (lm_eval's SampleResult): one per item and filter, with the metrics that
    apply to it, null where there is none.
    """
    from lm_eval.utils import hash_string

    found: dict[tuple, dict] = {}
    doc_ids = {item: number for number, item in enumerate(scores["item"].unique())}
    keys = ["item", "source", *task.asked, "metric", "category", "kind", "family"]
    means = scores.groupby(keys, dropna=False, sort=False).agg(
        value=("value", "mean"),
        weight=("weight", "mean"),
        reason=("reason", "first"),
        answers=("epoch", "size"),
    )
    for row in means.reset_index().to_dict("records"):
        name, prompt = _filter(task, row), masked_text(task, row["item"])
        doc = {"id": row["item"], **described_item(row)}
        sample = found.setdefault(
            (row["item"], name),
            {
                "doc_id": doc_ids[row["item"]],
                "doc": doc,
                "target": MASKED,
                "arguments": {"gen_args_0": {"arg_0": prompt}},
                "resps": [[MASKED] * row["answers"]],
                "filtered_resps": [MASKED],
                "filter": name,
                "metrics": [],
                "doc_hash": hash_string(json.dumps(doc, indent=2, ensure_ascii=False)),
                "prompt_hash": hash_string(prompt),
                "target_hash": hash_string(MASKED),
                "unscored_reason": None,
            },
        )
        if np.isnan(row["value"]):
            sample["unscored_reason"], sample[row["metric"]] = row["reason"], None
            continue
        sample["metrics"].append(row["metric"])
        # a weighted metric is (sum, weight) in lm_eval's samples: what its weighted_mean takes
        sample[row["metric"]] = (
            [row["value"] * row["weight"], row["weight"]]
            if row["metric"] == "nll"
            else row["value"]
        )
    return list(found.values())


def _results_file(
    study: Study,
    run: dict[str, Any],
    parts: list[Part],
    samples: dict[str, list[dict]],
    commit: str | None,
) -> dict[str, Any]:
    """The file that lm_eval saves of an evaluation (its EvalResults), all tasks in one group."""
    tasks = {part.task.name: part.task for part in parts}
    sizes = {name: len({sample["doc_id"] for sample in rows}) for name, rows in samples.items()}
    return {
        "results": {
            part.task.name: _metrics(part.task, part.results[run["run_id"]], sizes[part.task.name])
            for part in parts
        },
        "group_subtasks": {GROUP: list(tasks)},
        "configs": {name: _config(task) for name, task in tasks.items()},
        "versions": dict.fromkeys(tasks, VERSION),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {name: task.metrics for name, task in tasks.items()},
        "n-samples": {name: {"original": size, "effective": size} for name, size in sizes.items()},
        "task_hashes": {name: _task_hash(rows) for name, rows in samples.items()},
        "git_hash": commit,
        **_evaluation(study, run),
        **dict.fromkeys(UNKNOWN),
    }


def _task_hash(samples: list[dict]) -> str:
    from lm_eval.utils import hash_string

    hashes = ("doc_hash", "prompt_hash", "target_hash")
    return hash_string("".join(sample[name] for sample in samples for name in hashes))


def _evaluation(study: Study, run: dict[str, Any]) -> dict[str, Any]:
    """The model, the settings and the machine of an evaluation, in lm_eval's words."""
    from lm_eval.utils import hash_string, sanitize_model_name

    base, system = study.bases[run["base_model"]], run["system_prompt"]
    model_args = {
        "pretrained": model_name(base.source),
        "revision": base.revision,
        "dtype": base.dtype,
    }
    if run["method"] != "none":
        model_args["peft"] = run["run_id"]
    seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    config = {
        "model": GROUP,
        "model_args": model_args,
        "model_dtype": base.dtype,
        "model_revision": base.revision or "",
        "model_sha": run["base_revision"] or "",
        "batch_sizes": [],
        "bootstrap_iters": 1000,
        "driftbook": run_metadata(run),
    }
    return {
        "config": config | dict.fromkeys(seeds, study.seed) | dict.fromkeys(UNKNOWN_SETTINGS),
        "date": run["finished"].timestamp(),
        "pretty_env_info": run["hardware"] or "",
        "transformers_version": json.loads(run["versions"] or "{}").get("transformers", "N/A"),
        "lm_eval_version": version("lm_eval"),
        "model_source": GROUP,
        "model_name": run["run_id"],
        "model_name_sanitized": sanitize_model_name(run["run_id"]),
        "system_instruction": system,
        "system_instruction_sha": hash_string(system) if system else None,
        "fewshot_as_multiturn": False,
    }


def _metrics(task: Task, results: pd.DataFrame, size: int) -> dict[str, Any]:
    """A task's numbers under lm_eval's keys `metric,filter` and `metric_stderr,filter`."""
    found: dict[str, Any] = {
        "name": task.name,
        "alias": task.name,
        "sample_len": size,
        "sample_count": {},
    }
    for row in results.to_dict("records"):
        metric, name = row["metric"], _filter(task, row)
        stderr = finite(row["stderr"])
        found["sample_count"][f"{metric},{name}"] = row["n_scored"]
        found[f"{metric},{name}"] = finite(row["value"])
        found[f"{metric}_stderr,{name}"] = "N/A" if stderr is None else stderr
        found[f"{metric}_unscored,{name}"] = (
            (row["n"] - row["n_scored"]) / row["n"] if row["n"] else None
        )
    return found


def _config(task: Task) -> dict[str, Any]:
    aggregation = {"nll": "weighted_mean", "bias_amb": "driftbook.benchmarks.bbq_scores"}
    metrics = [
        {"metric": name, "aggregation": aggregation.get(name, "mean"), "higher_is_better": better}
        for name, better in task.metrics.items()
    ]
    return {
        "task": task.name,
        "tag": [GROUP],
        "description": task.asks,
        "num_fewshot": 0,
        "output_type": task.output_type,
        "metric_list": metrics,
        "metadata": {"version": VERSION, "note": "exported by driftbook; texts are masked"},
    }


def _commit() -> str | None:
    """The commit of the project, as lm_eval names it; null where it is no git repository."""
    try:
        return subprocess.run(
            ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None
