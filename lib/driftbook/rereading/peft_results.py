"""PEFT's own published runs (its MetaMathQA comparison) as our tables, what they say about methods,
and what one seed a run cannot say.

Each file is one run. PEFT's `forgetting` is the rise of the mean next-token loss on a hundred
Wikipedia texts over the base model's (as corrected in its pull request 3419, after which these runs
were made); its `train_time` holds the answering of the test questions too, so seconds are summed
over training steps here.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import betaincinv, ndtr, stdtrit

from driftbook.stats.confidence import UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.intervals import wilson
from driftbook.stats.mixed import MixedFit, rate_model
from driftbook.stats.pareto import front
from driftbook.stats.terms import LEVEL
from driftbook.stats.terms import RUN as RUN_GROUP
from driftbook.study.files import OUTPUTS, ROOT, digest, read_json, write_json
from driftbook.study.methods import FAMILIES
from driftbook.study.sections import Source
from driftbook.study.sources import locate
from driftbook.study.tables import CURVES, ESTIMATES, PROMPTS, RATES, RUNS, TABLES, VARIANTS

NAME = "peft_results"
NOTEBOOK = f"22_{NAME}"
NOTE = "PEFT's published runs: one base model, one seed a run"
FOLDER = OUTPUTS / NAME
REGISTRY = ROOT / "data" / NAME / "files.csv"
SOURCE, COMMIT = "github:huggingface/peft/method_comparison/MetaMathQA/results", "5d602fdbff"
LOCAL = f"${{DRIFTBOOK_SHARED}}/data/{NAME}"  # the default local folder, where the variable is set
TEST, VALIDATION = "gsm8k", "gsm8k validation"
N_QUESTIONS = {
    TEST: 1319,
    VALIDATION: 50,
}  # GSM8K's test part; VALID_SIZE of PEFT's data.py, drawn from GSM8K's training part
CORRECT, ANSWER_KEY = "correct", "final number"

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
    """The folder of result files: the one given, or the local one that DRIFTBOOK_SHARED leads to,
    or PEFT's own at the pinned commit, fetched once.

    Raises:
        ValueError: it is not there, and cannot be fetched.
    """
    path = Path(os.path.expandvars(folder or LOCAL)).expanduser()
    if folder and not path.is_dir():
        raise ValueError(
            f"there is no folder {folder}; give one with result files of PEFT's method comparison,"
            " or none to fetch them"
        )
    if path.is_dir():
        return path
    known = registry()
    try:
        return Path(
            locate(
                Source(
                    source=SOURCE, revision=COMMIT, files=tuple(known.index), sha256=known.to_dict()
                ),
                None,
            )
        )
    except ValueError as error:
        raise ValueError(
            f"no result files of PEFT here: {error}".replace(
                "path:", "the parameter folder, or set DRIFTBOOK_SHARED"
            )
        ) from None


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
    words = f"{same} of {len(found)} files are those of huggingface/peft at {COMMIT}, byte for byte"
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
    return f"{row.base_model}.{row.method}.{row.variant}.s{row.seed}.{digest([row.settings_hash, row.seed, row.repetition], 8)}"


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


def write(tables: dict[str, pd.DataFrame], folder: Path = FOLDER) -> Path:
    """Write the declared tables and the name and note of what they are; the folder of the tables."""
    for name, frame in tables.items():
        TABLES[name].write(frame, folder / "tables")
    write_json(folder / "study.json", {"name": NAME, "note": NOTE})
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
        _of_runs(
            done,
            ACCURACY,
            population=THIS_RUN,
            how="share of the test questions, Wilson interval",
            **accuracy,
        )
    ]
    how = "as published; no spread over texts or seeds is published: no interval"
    parts += [
        _of_runs(done, outcome, value=value, population="this run", how=how)
        for outcome, value in others.items()
    ]
    return ESTIMATES.concat(parts)


def _of_runs(runs: pd.DataFrame, outcome: str, contrast: str = RUN, **columns) -> pd.DataFrame:
    """An estimate per run."""
    frame = runs[["base_model", "method"]].assign(
        group=RUN_GROUP,
        member=runs["run_id"],
        outcome=outcome,
        contrast=contrast,
        n_runs=1,
        **columns,
    )
    return _labelled(frame)


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    labels = {"study": NAME, "notebook": NOTEBOOK, "benchmark": TEST, "judge": "none"}
    return complete(
        rows.assign(**{name: label for name, label in labels.items() if name not in rows})
    )


# ---- mixed models of single runs
def modelled(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs with what models need: accuracy in percent, log10 of forgetting (null where
    nothing was forgotten), settings centred.

    size is log10 of the trainable parameters less its mean; rate is log10 of the learning rate less
    the mean of the run's method, since each method has its own scale.

    Raises:
        ValueError: no run finished.
    """
    done = runs[runs["ok"]].copy()
    if done.empty:
        raise ValueError(f"none of {len(runs)} runs finished: there is nothing to model")
    lost = done["forgetting"].astype(float)
    size, rate = (
        np.log10(done["n_trainable"].astype(float)),
        np.log10(done["learning_rate"].astype(float)),
    )
    done["accuracy"] = 100 * done["k"].astype(float) / N_QUESTIONS[TEST]
    done["log_forgetting"] = np.log10(lost.where(lost > 0))
    return done.assign(
        size=size - size.mean(), rate=rate - rate.groupby(done["method"]).transform("mean")
    )


SCALES = {
    ACCURACY: ("accuracy", ACCURACY, None),
    FORGETTING: ("log_forgetting", FACTOR, 10.0),
}  # column, outcome of differences, base of the logarithm
LIMITS = {ACCURACY: (0.0, 100.0), FORGETTING: (0.0, np.inf)}  # what an outcome can be
SETTINGS = "size + rate + method_class"


def means_of_methods(rows: pd.DataFrame, outcome: str) -> tuple[pd.DataFrame, MixedFit]:
    """The mean of each method by three models (pooled, by method, mixed) as estimates, and the
    mixed model: a random intercept for each method.
    """
    column, _, base = SCALES[outcome]
    rows = rows[rows[column].notna()]
    fit = rate_model(rows, f"{column} ~ 1", "method")
    table = pooling(
        rows.groupby("method")[column].agg(["mean", "size"]), *_spread(rows, column), fit
    )
    parts = [
        _model(table, model, outcome, base, rows["base_model"].iloc[0])
        for model in (POOLED, BY_METHOD, MIXED)
    ]
    return ESTIMATES.concat(parts), fit


def _spread(rows: pd.DataFrame, column: str) -> tuple[float, int]:
    """Standard deviation of runs within their methods, pooled over methods, and its df; NaN where
    no method has two runs.
    """
    rest = rows[column] - rows.groupby("method")[column].transform("mean")
    df = len(rows) - rows["method"].nunique()
    return (float(np.sqrt((rest**2).sum() / df)) if df else np.nan), df


def pooling(means: pd.DataFrame, sd: float, df: float, fit: MixedFit) -> pd.DataFrame:
    """For each method (rows of mean and size): its own mean, the pooled one and the best linear
    unbiased prediction, each with se and df; and the weight of its own.

    The prediction mu + w (mean - mu), w = t2 / (t2 + s2 / n), has the error variance t2 (1 - w) +
    (1 - w)^2 Var(mu) (Robinson 1991, Statistical Science 6:15), with the variances t2 between and
    s2 within methods taken as known. Null where there is one method, or one run of each: then the
    two cannot be told apart.
    """
    between, within = fit.random.set_index("group")["sd"].reindex(["method", "residual"])
    mu, var_mu, n = fit.fixed["estimate"].iloc[0], fit.cov[0, 0], means["size"]
    weight = between**2 / (between**2 + within**2 / n) if between != 0 else 0.0 * n
    return means.assign(
        weight=weight,
        **{BY_METHOD: means["mean"], POOLED: mu, MIXED: mu + weight * (means["mean"] - mu)},
        **{
            f"se {BY_METHOD}": sd / np.sqrt(n),
            f"se {POOLED}": np.sqrt(var_mu),
            f"se {MIXED}": np.sqrt(between**2 * (1 - weight) + (1 - weight) ** 2 * var_mu),
        },
        **{f"df {BY_METHOD}": df, f"df {POOLED}": fit.df, f"df {MIXED}": fit.df},
    )


def _model(
    table: pd.DataFrame, model: str, outcome: str, base: float | None, base_model: str
) -> pd.DataFrame:
    """One model's means of methods as estimates, back on the outcome's own scale."""
    value, se, df = (table[f"{name}{model}"].astype(float) for name in ("", "se ", "df "))
    half = pd.Series(stdtrit(np.maximum(df, 1), UPPER), table.index).where(df > 0) * se
    frame = pd.DataFrame(
        {"value": value, "se": se.where(df > 0), "ci_low": value - half, "ci_high": value + half}
    ).where(np.isfinite)
    shrunk = (
        "best linear unbiased prediction (REML, variances as known); own mean weighs "
        + table["weight"].map("{:.0%}".format)
    ).where(
        table["weight"].notna(),
        "one method, or one run of each: methods and settings cannot be told apart",
    )
    hows = {
        POOLED: "mean of all methods, linear mixed model (REML)",
        BY_METHOD: "mean of the method's own runs; one spread within methods for all",
        MIXED: shrunk,
    }
    frame = frame.assign(
        method=table.index, how=hows[model], n_runs=table["size"], base_model=base_model
    )
    frame = _back(frame, base).assign(
        outcome=outcome,
        group="all",
        contrast=LEVEL,
        estimator=model,
        population=LIKE_THESE if model == POOLED else THESE_METHODS,
    )
    return _labelled(
        frame.assign(
            ci_low=frame["ci_low"].clip(lower=LIMITS[outcome][0]),
            ci_high=frame["ci_high"].clip(upper=LIMITS[outcome][1]),
        )
    )


def _back(frame: pd.DataFrame, base: float | None) -> pd.DataFrame:
    """The estimates from a logarithm back to the scale itself: geometric means and factors, whose
    se stays unsaid.
    """
    if base is None:
        return frame
    names = ["value", "ci_low", "ci_high"]
    return frame.assign(**(base ** frame[names]), se=None, how=frame["how"] + "; of the logarithm")


def terms(rows: pd.DataFrame, outcome: str) -> tuple[pd.DataFrame, MixedFit]:
    """What settings go with: ten times the parameters, ten times the learning rate within a method,
    prompt-based against adapter-based; and the model.
    """
    column, differences, base = SCALES[outcome]
    formula = (
        f"{column} ~ {SETTINGS}"
        if rows["method_class"].nunique() > 1
        else f"{column} ~ size + rate"
    )
    fit = rate_model(rows, formula, "method")
    found = _contrasts(fit, rows)
    without = {
        method: _contrasts(rate_model(part, formula, "method"), part)["value"]
        for method, part in _without_one(rows, formula)
    }
    frame = pd.concat([found, _extremes(found, pd.DataFrame(without))], ignore_index=True)
    frame = frame.assign(
        base_model=rows["base_model"].iloc[0],
        method="all",
        group="all",
        outcome=differences,
        population=LIKE_THESE,
        n_runs=int(rows[column].notna().sum()),
    )
    return _labelled(_back(frame, base)), fit


def _contrasts(fit: MixedFit, rows: pd.DataFrame) -> pd.DataFrame:
    """The model's contrasts of settings; a row each, null where the data cannot tell."""
    settings = {SIZE: {"size": 1.0}, RATE: {"rate": 1.0}} | (
        {CLASS: {"method_class": "prompt"}}
        if {"prompt", "adapter"} <= set(rows["method_class"])
        else {}
    )
    zero = {
        "size": 0.0,
        "rate": 0.0,
        "method_class": rows["method_class"].iloc[0] if CLASS not in settings else "adapter",
    }
    weights = [
        fit.at(pd.DataFrame([zero | setting]))[0] - fit.at(pd.DataFrame([zero]))[0]
        for setting in settings.values()
    ]
    found = fit.contrast(np.array(weights)).rename(columns={"estimate": "value"})[
        ["value", "se", "ci_low", "ci_high", "p"]
    ]
    how = "linear mixed model with a random intercept of methods, REML, df of methods" + (
        "" if fit.converged else "; did not converge"
    )
    return found.assign(contrast=list(settings), how=how)


def _without_one(rows: pd.DataFrame, formula: str) -> list[tuple[str, pd.DataFrame]]:
    """The rows without each method in turn, where enough is left to fit the same model."""
    parts = [(method, rows[rows["method"].ne(method)]) for method in rows["method"].unique()]
    classes = rows["method_class"].nunique()
    return [
        (method, part)
        for method, part in parts
        if part["method"].nunique() > 4
        and (SETTINGS not in formula or part["method_class"].nunique() == classes)
    ]


def _extremes(found: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    """The lowest and highest estimate of each contrast when one method is left out; without
    intervals, and no rows where no method can be.
    """
    known = without.dropna(how="all")
    if known.empty:
        return found[:0]
    contrast = found.loc[known.index, "contrast"]
    ends = {
        LOWEST: (known.min(axis=1), known.idxmin(axis=1)),
        HIGHEST: (known.max(axis=1), known.idxmax(axis=1)),
    }
    parts = [
        pd.DataFrame(
            {
                "contrast": contrast,
                "estimator": ending,
                "value": value,
                "how": "the same model without " + which,
            }
        )
        for ending, (value, which) in ends.items()
    ]
    return pd.concat(parts, ignore_index=True)


def spreads(rows: pd.DataFrame, outcome: str, fits: dict[str, MixedFit]) -> pd.DataFrame:
    """Standard deviations between methods and between runs of a method, by model, and what the
    questions alone would give; estimates without intervals.
    """
    _, differences, base = SCALES[outcome]
    names = {"method": "between methods", "residual": "between runs of a method"}
    parts = [
        fit.random.assign(
            member=fit.random["group"].map(names), how=f"REML, {model}", group=model
        ).rename(columns={"sd": "value"})
        for model, fit in fits.items()
    ]
    if outcome == ACCURACY:
        sd = np.sqrt((rows["accuracy"] * (100 - rows["accuracy"])).mean() / N_QUESTIONS[TEST])
        parts.append(
            pd.DataFrame(
                {
                    "member": "other questions",
                    "value": sd,
                    "how": "binomial, mean over runs",
                    "group": list(fits),
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)[["group", "member", "value", "how"]]
    frame = frame.dropna(subset="member").assign(
        contrast=SPREAD,
        outcome=differences,
        base_model=rows["base_model"].iloc[0],
        method="all",
        population="these runs",
        n_runs=len(rows),
        ci_low=None,
        ci_high=None,
    )
    return _labelled(_back(frame, base))


# ---- mixed models of curves
def slopes(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the slope of each run's validation accuracy: percentage points for each doubling
    of the steps, by least squares over its own points.
    """
    curve = doublings(points, rows)
    middle = curve.groupby("run_id")["doubling"].transform("mean")
    curve = curve.assign(
        top=(curve["doubling"] - middle) * curve["percent"],
        bottom=(curve["doubling"] - middle) ** 2,
    )
    sums = curve.groupby("run_id")[["top", "bottom"]].sum()
    return rows.assign(
        slope=rows["run_id"].map(sums["top"] / sums["bottom"].where(sums["bottom"] > 0))
    )


def doublings(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The points of finished runs with method and size, percent correct, and the step as its binary
    logarithm less that of the last.
    """
    curve = points.merge(rows[["run_id", "method", "size", "base_model"]], on="run_id")
    return curve.assign(
        doubling=np.log2(curve["step"] / curve["step"].max()), percent=100 * curve["k"] / curve["n"]
    )


def growth(points: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, MixedFit]]:
    """How validation accuracy grows with the steps, and whether larger adapters grow faster, by two
    models; and the models.

    First the slopes of single runs, modelled with a random intercept of methods: valid whatever
    else runs differ in (a summary measure of repeated measures, Matthews et al. 1990, BMJ 300:230).
    Then all points, with random intercepts of methods and runs: it takes runs of a size to have one
    slope.
    """
    two = rate_model(slopes(points, rows), "slope ~ size", "method")
    groups = (
        ("method", "run_id") if rows["method"].duplicated().any() else ("run_id",)
    )  # with one run of each method the two are one
    one = rate_model(doublings(points, rows), "percent ~ doubling * size", groups)
    weights = {
        TWO_STAGES: (two, two.at(_sizes({}))),
        ONE_STAGE: (one, one.at(_sizes({"doubling": 1.0})) - one.at(_sizes({"doubling": 0.0}))),
    }
    parts = []
    for group, (fit, at) in weights.items():
        found = fit.contrast(np.array([at[0], at[1] - at[0]])).rename(
            columns={"estimate": "value"}
        )[["value", "se", "ci_low", "ci_high", "p"]]
        how = "linear mixed model, REML, df of methods" + (
            "" if fit.converged else "; did not converge"
        )
        parts.append(found.assign(contrast=[DOUBLING, FASTER], group=group, how=how))
    frame = pd.concat(parts, ignore_index=True).assign(
        outcome=GROWTH, benchmark=VALIDATION, base_model=rows["base_model"].iloc[0], method="all"
    )
    frame = frame.assign(
        population=LIKE_THESE + "; these questions",
        n_runs=points["run_id"].nunique(),
        n_items=N_QUESTIONS[VALIDATION],
    )
    return _labelled(frame), {TWO_STAGES: two, ONE_STAGE: one}


def _sizes(more: dict[str, float]) -> pd.DataFrame:
    """The mean size, and ten times it."""
    return pd.DataFrame([{"size": 0.0, **more}, {"size": 1.0, **more}])


# ---- the Pareto front
def draws(
    k: np.ndarray, n: int, n_draws: int, rng: np.random.Generator, correlation: float = 0.0
) -> np.ndarray:
    """[n_draws, runs]: accuracies in percent that other questions could have shown, by Jeffreys'
    posterior, Beta(k + 1/2, n - k + 1/2).

    `correlation` is that of the runs' errors, on the normal scale: all answered the same questions.
    """
    k = np.asarray(k, float)
    z = np.sqrt(correlation) * rng.standard_normal((n_draws, 1)) + np.sqrt(
        1 - correlation
    ) * rng.standard_normal((n_draws, len(k)))
    return 100 * betaincinv(k + 0.5, n - k + 0.5, ndtr(z))


def on_front(
    runs: pd.DataFrame, n_draws: int, seed: int, correlation: float, rerun: tuple[float, float]
) -> pd.DataFrame:
    """How often each run is on the Pareto front of accuracy, forgetting and a cost, and how often
    the most accurate: as published, and for other questions.

    Costs are taken as published, and so is forgetting, but for another run: `rerun` gives the
    standard deviations that are then assumed, of accuracy in points and of forgetting as a share. A
    run that lacks one of the numbers takes no part.
    """
    done = runs[runs["ok"]].dropna(subset=["k", "forgetting", *GOALS.values()])
    k, n, lost, rng = (
        done["k"].to_numpy(float),
        N_QUESTIONS[TEST],
        done["forgetting"].to_numpy(float),
        np.random.default_rng(seed),
    )
    other, correlated, again, forgotten = (
        draws(k, n, n_draws, rng),
        draws(k, n, n_draws, rng, correlation),
        *rng.standard_normal((2, n_draws, len(k))),
    )
    scenarios = {
        AS_PUBLISHED: (100 * k[None] / n, lost, "as published"),
        QUESTIONS: (other, lost, f"{n_draws} draws of the accuracies, independent (Jeffreys)"),
        CORRELATED: (
            correlated,
            lost,
            (
                f"the same, errors of runs correlated {correlation:g}, since the questions are the"
                " same: assumed"
            ),
        ),
        RERUN: (
            other + rerun[0] * again,
            lost * (1 + rerun[1] * forgotten),
            (
                f"the same, independent, and standard deviations of {rerun[0]:g} points and"
                f" {rerun[1]:.0%} of forgetting: assumed"
            ),
        ),
    }
    parts = []
    for contrast, (accuracy, forgetting, how) in scenarios.items():
        shares = {
            on(goal): _share(accuracy, forgetting, done[column].to_numpy(float))
            for goal, column in GOALS.items()
        }
        shares[BEST] = 100 * (accuracy == accuracy.max(1, keepdims=True)).mean(0)
        population = "this run" if contrast == AS_PUBLISHED else THIS_RUN
        parts += [
            _of_runs(
                done, outcome, contrast, value=value, how=how, population=population, n_items=n
            )
            for outcome, value in shares.items()
        ]
    return ESTIMATES.concat(parts)


def on(goal: str) -> str:
    """The outcome of being on the front with this cost."""
    return f"on the Pareto front (percent): more test accuracy, less forgetting, less {goal}"


def _share(accuracy: np.ndarray, forgetting: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """How often, in percent, each run is on the front, over the draws; in parts, since each draw
    compares all pairs of runs.
    """
    points = np.stack(np.broadcast_arrays(-accuracy, forgetting, cost), axis=-1)
    counts = sum(front(part).sum(0) for part in np.array_split(points, max(1, len(points) // 250)))
    return 100 * counts / len(points)


# ---- in words
def repeated(runs: pd.DataFrame) -> str:
    """A sentence: how often settings were repeated, and what follows."""
    n, again = runs["settings_hash"].nunique(), int(runs["repetition"].max())
    if again == 1:
        return (
            f"None of {n} settings was run twice, and all have seed"
            f" {', '.join(map(str, sorted(runs['seed'].unique())))}: what another seed would change"
            " cannot be known from these files."
        )
    return f"{(runs['repetition'] > 1).sum()} runs of {n} settings repeat an earlier one."


def summary(estimates: pd.DataFrame, goal: str = "peak memory") -> str:
    """What the runs say, computed from the estimates: who is on the front, how surely, which is
    most accurate, and what size goes with.
    """
    of = {
        contrast: estimates[estimates["outcome"].eq(on(goal)) & estimates["contrast"].eq(contrast)]
        for contrast in (AS_PUBLISHED, QUESTIONS)
    }
    there, sure = (
        of[contrast]["value"].ge(least).to_numpy(bool)
        for contrast, least in ((AS_PUBLISHED, 100), (QUESTIONS, 95))
    )
    best = estimates[estimates["outcome"].eq(BEST) & estimates["contrast"].eq(QUESTIONS)][
        "value"
    ].max()
    words = [
        (
            f"{there.sum()} of {len(there)} runs are on the front of accuracy, forgetting and"
            f" {goal} as published, {(there & sure).sum()} of these in at least 95% of draws of"
            " other questions"
        ),
        f"the run that is most often the most accurate is so in {best:.0f}% of draws",
    ]
    sizes = []
    for outcome, text in (
        (ACCURACY, "{0:+.1f} points of accuracy [{1:+.1f}, {2:+.1f}]"),
        (FACTOR, "{0:.2f} times the forgetting [{1:.2f}, {2:.2f}]"),
    ):
        row = estimates[estimates["outcome"].eq(outcome) & estimates["contrast"].eq(SIZE)][
            ["value", "ci_low", "ci_high"]
        ].dropna()
        sizes += [text.format(*row.iloc[0])] if len(row) else []
    words += (
        ["ten times the trainable parameters goes with " + " and ".join(sizes)] if sizes else []
    )
    return "; ".join(words) + "."
