"""PEFT's own published runs (its MetaMathQA comparison) as our tables, what they say about methods,
and what one seed a run cannot say.

Each file is one run. PEFT's `forgetting` is the rise of the mean next-token loss on a hundred
Wikipedia texts over the base model's (as corrected in its pull request 3419, after which these runs
were made); its `train_time` holds the answering of the test questions too, so seconds are summed
over training steps here.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftbook.rereading.places import published_files
from driftbook.stats.estimation import complete
from driftbook.stats.intervals import wilson
from driftbook.stats.terms import RUN as RUN_GROUP
from driftbook.study.files import OUTPUTS, ROOT, digest, read_json, write_json
from driftbook.study.sections import Source
from driftbook.study.tables import CURVES, ESTIMATES, PROMPTS, RATES, RUNS, TABLES, VARIANTS

PEFT_NAME = "peft_results"
NOTEBOOK = f"22_{PEFT_NAME}"
PEFT_NOTE = "PEFT's published runs: one base model, one seed a run"
FOLDER = OUTPUTS / PEFT_NAME
REGISTRY = ROOT / "data" / PEFT_NAME / "files.csv"
SOURCE, PEFT_COMMIT = "github:huggingface/peft/method_comparison/MetaMathQA/results", "5d602fdbff"
# the default local folder, where the variable is set
TEST, VALIDATION = "gsm8k", "gsm8k validation"
N_QUESTIONS = {
    TEST: 1319,
    VALIDATION: 50,
}  # GSM8K's test part; VALID_SIZE of PEFT's data.py, drawn from GSM8K's training part
CORRECT, ANSWER_KEY = "correct", "final number"
FAMILIES = ("llama", "qwen2", "mistral", "gemma")  # words in the names of base models

ACCURACY, FORGETTING, FACTOR = (
    "test accuracy (percent)",
    "forgetting (nats per token)",
    "forgetting (factor)",
)
FILE, RESERVED, REPORTED, SPEED = (
    "adapter file (MB)",
    "memory reserved, mean (GB)",
    "PEFT's train_time (s)",
    "speed (tokens per second)",
)
BEST = "most accurate of all runs (percent)"
GROWTH = "validation accuracy (percent)"
RUN = "level of a run"
POOLED, BY_METHOD, MIXED = "pooled", "by method", "mixed"  # estimators of a method's level
SIZE, RATE, CLASS = (
    "ten times the trainable parameters",
    "ten times the learning rate",
    "prompt-based instead of adapter-based",
)
DOUBLING, FASTER = (
    "twice the steps",
    "twice the steps, how much more at ten times the trainable parameters",
)
SPREAD, LOWEST, HIGHEST = "spread", "lowest without one method", "highest without one method"
TWO_STAGES, ONE_STAGE = "slopes of single runs", "all points, one slope for all runs of a size"
GOALS = {
    "peak memory": "memory_max",
    "trainable parameters": "n_trainable",
    "training time": "seconds",
}
AS_PUBLISHED, QUESTIONS, CORRELATED, RERUN = (
    "as published",
    "other questions",
    "other questions, errors of runs correlated",
    "other questions and another run",
)
THIS_RUN = "this run (seed 0, this base model), questions like these"
THESE_METHODS = "settings like those tried of each method; seed 0, this base model"
LIKE_THESE = "methods like these, settings like those tried; seed 0, this base model"


# ---- where it is
def located(folder: str = "") -> Path:
    """The folder of result files of PEFT's method comparison; see `published_files`."""
    known = registry()
    source = Source(
        source=SOURCE, revision=PEFT_COMMIT, files=tuple(known.index), sha256=known.to_dict()
    )
    return published_files(folder, PEFT_NAME, "result files of PEFT's method comparison", [source])


def registry() -> pd.Series:
    """SHA-256 of each result file of the pinned commit, by name."""
    return pd.read_csv(REGISTRY, index_col="file")["sha256"]


def provenance(folder: Path) -> str:
    """A sentence: how many result files of the folder are those of the pinned commit, byte for
    byte.
    """
    known = registry()
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.json"))
    }
    same = sum(known.get(name) == sha256 for name, sha256 in found.items())
    missing = len(set(known.index) - set(found))
    words = f"{same} of {len(found)} files are those of huggingface/peft at {PEFT_COMMIT}"
    words += ", byte for byte"
    return words + (f"; {missing} files of that commit are missing" if missing else "") + "."


# ---- reading
FIELDS: dict[str, tuple[str, Any]] = {  # column: where it stands in a result file, and its kind
    "experiment": ("run_info.experiment_name", str),
    "model": ("run_info.train_config.model_id", str),
    "seed": ("run_info.train_config.seed", int),
    "max_steps": ("run_info.train_config.max_steps", int),
    "batch_size": ("run_info.train_config.batch_size", int),
    "learning_rate": ("run_info.train_config.optimizer_kwargs.lr", (int, float)),
    "optimizer": ("run_info.train_config.optimizer_type", str),
    "started": ("run_info.created_at", str),
    "error": ("run_info.error_msg", str),
    "status": ("train_info.status", str),
    "n_trainable": ("train_info.num_trainable_params", int),
    "file_size": ("train_info.file_size", int),
    "reported_seconds": ("train_info.train_time", (int, float)),
    "memory_max": ("train_info.accelerator_memory_max", int),
    "memory_reserved": ("train_info.accelerator_memory_reserved_avg", (int, float)),
    "hardware": ("meta_info.system_info.accelerator", str),
    "base_revision": ("meta_info.model_info.sha", str),
    "data_revision": ("meta_info.dataset_info.metamath.sha", str),
}
ALIKE = {  # what must be equal for runs to be compared
    "base model": "run_info.train_config.model_id",
    "prompt template": "run_info.train_config.query_template",
    "training data": "meta_info.dataset_info.metamath.sha",
    "test data": "meta_info.dataset_info.gsm8k.sha",
}


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per run, and a row per run and step of its curve, from a folder of result files.

    Raises:
        ValueError: there is no file, one is torn or lacks a field, an accuracy is no count of the
            questions, or not all are of one comparison.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no result file of PEFT's method comparison (*.json)")
    records = {path.name: read_json(path) for path in paths}
    for what, place in ALIKE.items():
        values = {name: _at(record, place, str, name) for name, record in records.items()}
        if len(set(values.values())) > 1:
            usual = pd.Series(values).mode()[0]
            other = next(name for name, value in values.items() if value != usual)
            raise ValueError(
                f"{folder} mixes comparisons: {other} has another {what} than most files; keep the"
                " files of one comparison together"
            )
    runs = pd.DataFrame([_run(name, record) for name, record in records.items()])
    runs = runs.sort_values(["settings_hash", "seed", "started"], kind="stable").assign(
        repetition=lambda rows: rows.groupby("settings_hash").cumcount() + 1
    )
    runs = runs.sort_values("file", ignore_index=True)
    runs.insert(0, "run_id", [_run_id(row) for row in runs.itertuples()])
    points = [
        point
        for name, run_id in zip(runs["file"], runs["run_id"], strict=True)
        for point in _points(name, records[name], run_id)
    ]
    return runs, pd.DataFrame(points, columns=["run_id", "step", "k", "n", "loss", "seconds"])


def _at(record: Any, place: str, kind: Any, name: str) -> Any:
    """The value at a dotted place of a result file, of this kind."""
    value = record
    for key in place.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"{name} has no field {place}: it is no result file of PEFT's method comparison, or"
                " of another version"
            )
        value = value[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{name}: the field {place} holds a {type(value).__name__}, which it should not"
        )
    return value


def _count(entry: dict, field: str, n: int, name: str) -> int:
    """How many of n questions an accuracy counts."""
    k = _at(entry, field, (int, float), name) * n
    if not 0 <= k <= n or abs(k - round(k)) > 1e-6:
        raise ValueError(
            f"{name}: a {field} of {k / n:.6g} is no count of {n} questions; other questions were"
            " asked than in PEFT's comparison"
        )
    return round(k)


def _run(name: str, record: dict) -> dict:
    """One result file as a row; what a failed run did not reach is null."""
    row = {column: _at(record, place, kind, name) for column, (place, kind) in FIELDS.items()}
    metrics, config = (
        _at(record, "train_info.metrics", list, name),
        record["run_info"].get("peft_config") or {},
    )
    training = {
        key: value for key, value in record["run_info"]["train_config"].items() if key != "seed"
    }
    settings = {key: value for key, value in config.items() if key != "peft_version"}
    last = metrics[-1] if metrics and row["status"] == "success" else {}
    curve = [entry for entry in metrics if "valid accuracy" in entry]
    row |= {
        "file": name,
        "ok": row["status"] == "success",
        "base_model": row["model"].rpartition("/")[2],
        "rank": config.get("r"),
        "method": config.get("peft_type", "full_finetuning").lower(),
        "method_class": _class(config),
        "init": config.get("prompt_tuning_init"),
        "n_virtual_tokens": config.get("num_virtual_tokens"),
        "settings_hash": digest([training, settings]),
        "versions": json.dumps(record["meta_info"].get("package_info")),
        "n_steps": metrics[-1].get("step") if metrics else None,
        "n_examples": metrics[-1].get("train samples") if metrics else None,
        "loss_first": curve[0].get("train loss") if curve else None,
        "loss_last": curve[-1].get("train loss") if curve else None,
        "seconds": sum(_at(entry, "train time", (int, float), name) for entry in curve) or None,
        "k": None,
        "forgetting": None,
        "n_tokens": None,
    }
    row["variant"] = _variant(row["experiment"], row["base_model"])
    if row["ok"]:
        row["k"] = _count(last, "test accuracy", N_QUESTIONS[TEST], name)
        row["forgetting"] = float(_at(last, "forgetting", (int, float), name))
        row["n_tokens"] = _at(last, "train total tokens", int, name)
    return row


def _class(config: dict) -> str:
    """full, prompt (PEFT's prompt-learning methods, and adaption prompts) or adapter."""
    return (
        "full"
        if not config
        else "prompt"
        if {"num_virtual_tokens", "adapter_len"} & set(config)
        else "adapter"
    )


def _variant(experiment: str, base_model: str) -> str:
    """The experiment's name without method and base model."""
    variant = experiment.rpartition("/")[2]
    return (
        variant[len(base_model) :].lstrip("-")
        if variant.lower().startswith(base_model.lower())
        else variant
    )


def _run_id(row: Any) -> str:
    own = digest([row.settings_hash, row.seed, row.repetition], 8)
    return f"{row.base_model}.{row.method}.{row.variant}.s{row.seed}.{own}"


def _points(name: str, record: dict, run_id: str) -> list[dict]:
    """The evaluations during training of one run."""
    n = N_QUESTIONS[VALIDATION]
    return [
        {
            "run_id": run_id,
            "step": _at(entry, "step", int, name),
            "k": _count(entry, "valid accuracy", n, name),
            "n": n,
            "loss": entry.get("train loss"),
            "seconds": entry["train time"],
        }
        for entry in record["train_info"]["metrics"]
        if "valid accuracy" in entry
    ]


# ---- as our tables
def declared(runs: pd.DataFrame, points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The declared tables: variants, runs, curves (training loss), rates (correct answers to test
    and validation questions); no prompts, their ids are unknown.
    """
    return {
        "variants": _variants(runs),
        "runs": _runs(runs),
        "curves": _curves(points),
        "prompts": PROMPTS.empty(),
        "rates": _rates(runs, points),
    }


def write_peft(tables: dict[str, pd.DataFrame], folder: Path = FOLDER) -> Path:
    """The folder of the tables, written with the name and note of what they are."""
    for name, frame in tables.items():
        TABLES[name].write(frame, folder / "tables")
    write_json(folder / "study.json", {"name": PEFT_NAME, "note": PEFT_NOTE})
    return folder / "tables"


def _variants(runs: pd.DataFrame) -> pd.DataFrame:
    columns = ["variant", "rank", "n_virtual_tokens", "optimizer"]
    settings = runs[columns].astype(object).where(runs[columns].notna(), None).to_dict("records")
    family = runs["model"].map(
        lambda model: next((family for family in FAMILIES if family in model.lower()), "other")
    )
    frame = runs.assign(
        family=family,
        objective="sft",
        dataset="MetaMathQA",
        n_train=runs["max_steps"] * runs["batch_size"],
        template="of the comparison",
    )
    return VARIANTS.check(
        frame.assign(settings=[json.dumps(one) for one in settings]).reindex(
            columns=list(VARIANTS.columns)
        )
    )


def _runs(runs: pd.DataFrame) -> pd.DataFrame:
    failure = runs["error"].str.split("\n").str[0].where(~runs["ok"], None)
    frame = runs.assign(
        status=np.where(runs["ok"], "ok", "failed"),
        failure=failure,
        steps=runs["n_steps"],
        gpu_seconds=runs["seconds"],
        peak_memory=runs["memory_max"],
    )
    return RUNS.check(frame.reindex(columns=list(RUNS.columns)))


def _curves(points: pd.DataFrame) -> pd.DataFrame:
    return CURVES.check(points.assign(split="train").reindex(columns=list(CURVES.columns)))


def _rates(runs: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    test = runs[runs["ok"]].assign(benchmark=TEST, category="all", n=N_QUESTIONS[TEST])
    during = points.assign(benchmark=VALIDATION, category="step " + points["step"].astype(str))
    both = pd.concat([test, during], ignore_index=True)[
        ["run_id", "benchmark", "category", "k", "n"]
    ]
    return RATES.check(both.assign(judge=ANSWER_KEY, outcome=CORRECT, n_scored=both["n"]))


# ---- what each run measured
def measured(runs: pd.DataFrame) -> pd.DataFrame:
    """Estimates of single runs: accuracy with Wilson's interval over questions; all else as
    published, without an interval.
    """
    done = runs[runs["ok"]]
    low, high = wilson(done["k"], N_QUESTIONS[TEST])
    accuracy = {
        "value": 100 * done["k"] / N_QUESTIONS[TEST],
        "ci_low": 100 * low,
        "ci_high": 100 * high,
        "n_items": N_QUESTIONS[TEST],
    }
    others = {
        FORGETTING: done["forgetting"],
        FILE: done["file_size"] / 1e6,
        RESERVED: done["memory_reserved"] / 1e9,
        REPORTED: done["reported_seconds"],
        SPEED: done["n_tokens"] / done["seconds"],
    }
    parts = [
        estimates_of_runs(
            done,
            ACCURACY,
            population=THIS_RUN,
            how="share of the test questions, Wilson interval",
            **accuracy,
        )
    ]
    how = "as published; no spread over texts or seeds is published: no interval"
    parts += [
        estimates_of_runs(done, outcome, value=value, population="this run", how=how)
        for outcome, value in others.items()
    ]
    return ESTIMATES.concat(parts)


def estimates_of_runs(
    runs: pd.DataFrame, outcome: str, contrast: str = RUN, **columns
) -> pd.DataFrame:
    """An estimate per run."""
    frame = runs[["base_model", "method"]].assign(
        group=RUN_GROUP,
        member=runs["run_id"],
        outcome=outcome,
        contrast=contrast,
        n_runs=1,
        **columns,
    )
    return labelled_rows(frame)


def labelled_rows(rows: pd.DataFrame) -> pd.DataFrame:
    labels = {"study": PEFT_NAME, "notebook": NOTEBOOK, "benchmark": TEST, "judge": "none"}
    return complete(
        rows.assign(**{name: label for name, label in labels.items() if name not in rows})
    )


def on(goal: str) -> str:
    """The outcome of being on the front with this cost."""
    return f"on the Pareto front (percent): more test accuracy, less forgetting, less {goal}"
