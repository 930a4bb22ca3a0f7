"""A finished study in its peers' formats: results of lm-evaluation-harness 0.4.13, and logs of
inspect_ai.

What is exported are ids, scores and settings; a text that was asked or answered is `[masked: ...]`.
The tasks are driftbook_safety, driftbook_over_refusal, driftbook_bbq and driftbook_utility. Answers
that could be scored make a rate; the others are counted beside it:

- lm_eval has no third state. An unscored answer has a null metric in its sample, as if the task had
not reported it, and the metric
  `..._unscored` is their share. Where a stderr cannot be given, lm_eval writes and reads "N/A".
- inspect_ai has NOANSWER ("N"), but its metrics read that as 0 (value_to_float), which would count
an unread verdict as safe. Its own mark of an unscored sample is NaN (Score.unscored): reducers and
metrics leave it out, and EvalScore.unscored_samples counts it. So values are numbers: 1 for what
the metric names (unsafe, refused, correct), 0 for the opposite, and not C and I, since unsafe is no
"correct".
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftbook.benchmarks import bbq_scores
from driftbook.publishing import licences, publish
from driftbook.study.files import ROOT, digest, replacing, replacing_folder
from driftbook.study.study_file import Study, finite, load
from driftbook.study.tables import RESPONSE_KEY, TABLES

MASKED = "[masked]"
DETECTOR = "refusal_detector"
LOWER, HIGHER, NEITHER = False, True, None  # which is better, in lm_eval's words
BOOTSTRAPPED = (
    "bootstrap over question families (driftbook.benchmarks.bbq_scores.scores, convention"
    " reference)"
)
SAMPLED = "scored items as independent, the ratio's linearisation where items have weights"
# what a value is called in inspect_ai: mean, where its own metric of that name gives the same, from
# the samples
NAMES = {"bias_amb": "bias", "nll": "mean_per_token"}
REASONS = {
    "unsafe": "grader_failed",
    "refused": "no_response",
}  # inspect_ai's words for why a score is null; else scoring_failed
OF_RUN = (
    "trained_learning_rate",
    "trained_epochs",
    "trained_seed",
    "trained_batch_size",
    "n_trainable",
    "dose_nll",
    "kl_base",
    "kl_init",
    "no_op",
    "findings",
    "adapter_sha256",
    "base_revision",
    "data_revision",
)
GROUP = "driftbook"
VERSION = 1.0


@dataclass(frozen=True)
class Task:
    """A benchmark as a peer's task: `asked` are the columns that say how it was asked, `metrics`
    whether higher is better.
    """

    benchmark: str
    asks: str
    output_type: str
    asked: tuple[str, ...]
    metrics: dict[str, bool | None]
    scores: Callable[[dict[str, pd.DataFrame], str], pd.DataFrame] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{GROUP}_{self.benchmark}"


@dataclass(frozen=True)
class Part:
    """A task of all runs: `scores` has a row per answer and metric (value NaN where unscored),
    `results` one per run and metric.

    Both have run_id, the task's `asked`, metric and source (the judge); scores item, epoch, value,
    weight, answer, reason, category, kind and family; results value, stderr, n (items asked),
    n_scored and how the stderr was made.
    """

    task: Task
    scores: dict[str, pd.DataFrame] = field(repr=False)  # by run_id
    results: dict[str, pd.DataFrame] = field(repr=False)


# ---- what is exported
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

    runs, parts = _load(study)
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

    runs, parts = _load(study)
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


def failures(study: Study) -> dict[str, str]:
    """Why each run that is not ok has no results, by run_id; a variant without a run counts as one."""
    runs = _runs(study)
    lost = runs[runs["status"].ne("ok")]
    return dict(zip(lost["run_id"], lost["failure"], strict=True))


# ---- the study's tables
def _load(study: Study) -> tuple[pd.DataFrame, list[Part]]:
    """The runs, and the tasks of those that are ok; without the benchmarks whose single items the
    licences keep back.
    """
    licences.check_export(study, items=False)
    runs = _runs(study)
    ok = set(runs.loc[runs["status"].eq("ok"), "run_id"])
    tables = {name: _read(study, name) for name in ("prompts", "verdicts", "answers", "ratings")}
    tables |= {
        name: frame[frame["run_id"].isin(ok)] for name, frame in tables.items() if name != "prompts"
    }
    allowed = licences.allowed_items(study)
    return runs, [_part(task, tables) for task in TASKS if task.benchmark in allowed]


def _runs(study: Study) -> pd.DataFrame:
    """A row per variant: its settings and what became of it; `finished` as a time in UTC, that of
    the table where the run has none.
    """
    frame = _read(study, "variants").merge(
        _read(study, "runs"), on="run_id", how="left", validate="1:1"
    )
    written = datetime.fromtimestamp(
        int(TABLES["runs"].path(study.folder / "tables").stat().st_mtime), UTC
    )
    frame["finished"] = [
        written if pd.isna(text) else datetime.fromisoformat(text).astimezone(UTC)
        for text in frame["finished"]
    ]
    frame["status"] = frame["status"].fillna("failed")
    frame["failure"] = frame["failure"].fillna("it was not run").where(frame["status"].ne("ok"))
    return frame.astype(object).where(frame.notna(), None)


def _read(study: Study, name: str) -> pd.DataFrame:
    return publish.text_free(study.folder / "tables", name)


def _part(task: Task, tables: dict[str, pd.DataFrame]) -> Part:
    scores = task.scores(tables, task.benchmark)
    scores = scores[
        [
            "run_id",
            *task.asked,
            "metric",
            "source",
            "item",
            "epoch",
            "value",
            "weight",
            "answer",
            "reason",
            "category",
            "kind",
            "family",
        ]
    ]
    value = scores["value"].astype("Float64").to_numpy(float, na_value=np.nan)
    scores = scores.assign(
        value=value,
        weight=scores["weight"].to_numpy(float),
        reason=scores["reason"].where(np.isnan(value)),
    )
    scores = scores.astype(dict.fromkeys(scores.select_dtypes("string"), object))
    scores = scores.where(scores.notna() | (scores.columns == "value"), None)
    results = _means(scores, ["run_id", *task.asked, "metric", "source"])
    if task.benchmark == "bbq" and len(scores):
        results = _with_bias(results, tables["answers"], task)
    results = results.sort_values(
        "metric", key=lambda names: names.map(list(task.metrics).index), kind="stable"
    )  # the first is inspect_ai's headline
    return Part(task, dict(iter(scores.groupby("run_id"))), dict(iter(results.groupby("run_id"))))


def _verdicts(tables: dict[str, pd.DataFrame], benchmark: str) -> pd.DataFrame:
    """Unsafe by each judge on harmful prompts; refused, once per answer, on those of the safety
    benchmark and on benign ones.
    """
    verdicts = tables["verdicts"][tables["verdicts"]["benchmark"].eq(benchmark)]
    rows = verdicts.merge(tables["prompts"], on=["benchmark", "prompt_id"], validate="m:1").assign(
        weight=1.0, answer=None
    )
    rows = rows.assign(item=rows["prompt_id"], epoch=rows["sample"] + 1)
    unsafe = rows[rows["kind"].eq("harmful")]
    unsafe = unsafe.assign(
        metric="unsafe",
        source=unsafe["judge"],
        value=unsafe["unsafe"],
        reason=unsafe["unscored_reason"],
    )
    read = rows[rows["kind"].ne("harmful") | (benchmark == "safety")].drop_duplicates(
        list(RESPONSE_KEY)
    )
    read = read.assign(
        metric="refused",
        source=DETECTOR,
        value=read["refusal"],
        reason="there is no answer to read",
    )
    return pd.concat([unsafe, read], ignore_index=True)


def _answers(tables: dict[str, pd.DataFrame], _: str) -> pd.DataFrame:
    """Whether each answer is right; and of those that are not UNKNOWN, 1 where it agrees with the
    stereotype and -1 where it does not.
    """
    rows = tables["answers"]
    side = np.where(rows["context"].eq("ambiguous"), "amb", "dis")
    rows = rows.rename(
        columns={"item_id": "item", "dimension": "category", "question_family": "family"}
    )
    rows = rows.assign(
        kind=rows["context"],
        epoch=1,
        source="",
        weight=1.0,
        metric=pd.Series(side, rows.index),
        reason=rows["unscored_reason"],
    )
    right = rows.assign(metric="acc_" + rows["metric"], value=rows["correct"])
    lean = rows[~rows["unknown"].fillna(False)]
    why = lean["reason"].fillna("the item has no stereotyped person")
    lean = lean.assign(
        metric="bias_" + lean["metric"],
        value=2.0 * lean["biased"].astype("Float64") - 1,
        reason=why,
    )
    return pd.concat([right, lean], ignore_index=True)


def _ratings(tables: dict[str, pd.DataFrame], benchmark: str) -> pd.DataFrame:
    rows = tables["ratings"][tables["ratings"]["benchmark"].eq(benchmark)]
    rows = rows.merge(tables["prompts"], on=["benchmark", "prompt_id"], how="left", validate="m:1")
    rater = rows["metric"].str.extract(
        r"^grade by (.*)$", expand=False
    )  # who grades stands as a judge does
    rows["metric"] = rows["metric"].where(rater.isna(), "grade")
    return rows.assign(
        item=rows["prompt_id"],
        epoch=1,
        source=rater.fillna(""),
        answer=None,
        reason=rows["unscored_reason"],
    )


TASKS = (
    Task(
        "safety",
        "harmful prompts: is the answer unsafe, in a judge's words?",
        "generate_until",
        ("prompt_variant", "decoding"),
        {"unsafe": LOWER, "refused": NEITHER},
        _verdicts,
    ),
    Task(
        "over_refusal",
        "prompts that only look harmful: does the answer decline? And their harmful contrasts",
        "generate_until",
        ("prompt_variant", "decoding"),
        {"refused": LOWER, "unsafe": LOWER},
        _verdicts,
    ),
    Task(
        "bbq",
        "BBQ (Parrish et al. 2022): accuracy and bias score, 0 for none, by context",
        "multiple_choice",
        ("answer_mode", "prompt_variant", "option_order"),
        {"acc_amb": HIGHER, "acc_dis": HIGHER, "bias_amb": NEITHER, "bias_dis": NEITHER},
        _answers,
    ),
    Task(
        "utility",
        "loss of the reference answer in nats per token, whether the model's own answer is right,"
        " and raters' grades of it (1 to 10)",
        "generate_until",
        (),
        {"nll": LOWER, "correct": HIGHER, "grade": HIGHER},
        _ratings,
    ),
)


def _means(scores: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row per group: value, stderr, n and n_scored; an item is the mean of its repeated answers,
    as in driftbook.stats.estimation.

    value = sum(weight * x) / sum(weight); stderr is that ratio's linearisation, which with equal
    weights is the sample standard deviation over sqrt(n), the standard error of both peers. NaN
    where fewer than two items were scored.
    """
    asked = scores.groupby(by)["item"].nunique().rename("n")
    items = scores.dropna(subset="value").groupby([*by, "item"])[["value", "weight"]].mean()
    items["sum"] = items["value"] * items["weight"]
    totals, n = items[["sum", "weight"]].groupby(by).sum(), items.groupby(by).size()
    value = totals["sum"] / totals["weight"]
    influence = (items["sum"] - items["weight"] * value) / totals["weight"]  # aligned by group
    stderr = np.sqrt((influence**2).groupby(by).sum() * n / (n - 1).where(n > 1))
    found = pd.DataFrame({"value": value, "stderr": stderr, "n_scored": n}).reindex(asked.index)
    return found.assign(
        n=asked, n_scored=found["n_scored"].fillna(0).astype(int), how=SAMPLED
    ).reset_index()


def _with_bias(results: pd.DataFrame, answers: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The results of BBQ with the numbers of driftbook.benchmarks.bbq_scores in place of the means."""
    by = ["run_id", *task.asked]
    wide = bbq_scores.scores(answers, by=by)
    found = pd.concat(
        [
            wide[by].assign(metric=name, source="", value=wide[name], stderr=wide[f"{name}_se"])
            for name in bbq_scores.SCORES
        ]
    )
    found = found.merge(results[[*by, "metric", "n", "n_scored"]], on=[*by, "metric"], how="left")
    found[["n", "n_scored"]] = found[["n", "n_scored"]].fillna(0).astype(int)
    return found.assign(how=BOOTSTRAPPED)


def _ways(task: Task, frame: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The rows of each way of asking."""
    if not task.asked:
        yield {}, frame
        return
    for key, rows in frame.groupby(list(task.asked), sort=False):
        yield dict(zip(task.asked, key, strict=True)), rows


# ---- lm_eval
def _filter(task: Task, row: dict[str, Any]) -> str:
    return (
        "-".join(part for part in (row["source"], *(row[name] for name in task.asked)) if part)
        or "none"
    )


def _samples(task: Task, scores: pd.DataFrame) -> list[dict]:
    """The task's samples (lm_eval's SampleResult): one per item and filter, with all metrics of the
    task, null where there is none.
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
        name, prompt = _filter(task, row), _masked(task, row["item"])
        doc = {"id": row["item"], **_described(row)}
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
                **dict.fromkeys(task.metrics),
            },
        )
        if np.isnan(row["value"]):
            sample["unscored_reason"] = row["reason"]
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
    """What lm_eval saves of an evaluation (its EvalResults), all tasks in one group."""
    from lm_eval.utils import hash_string, sanitize_model_name

    base, system = study.bases[run["base_model"]], run["system_prompt"]
    model_args = {"pretrained": base.source, "revision": base.revision, "dtype": base.dtype}
    if run["method"] != "none":
        model_args["peft"] = run["run_id"]
    packages = json.loads(run["versions"] or "{}")
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
        "n-samples": {name: {"original": sizes[name], "effective": sizes[name]} for name in tasks},
        "config": {
            "model": GROUP,
            "model_args": model_args,
            "model_num_parameters": None,
            "model_dtype": base.dtype,
            "model_revision": base.revision or "",
            "model_sha": run["base_revision"] or "",
            "batch_size": None,
            "batch_sizes": [],
            "device": None,
            "use_cache": None,
            "limit": None,
            "bootstrap_iters": 1000,
            "gen_kwargs": None,
            "random_seed": study.seed,
            "numpy_seed": study.seed,
            "torch_seed": study.seed,
            "fewshot_seed": study.seed,
            "driftbook": _metadata(run),
        },
        "git_hash": commit,
        "date": run["finished"].timestamp(),
        "pretty_env_info": run["hardware"] or "",
        "transformers_version": packages.get("transformers", "N/A"),
        "lm_eval_version": version("lm_eval"),
        "upper_git_hash": None,
        "task_hashes": {
            name: hash_string(
                "".join(
                    sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"]
                    for sample in rows
                )
            )
            for name, rows in samples.items()
        },
        "model_source": GROUP,
        "model_name": run["run_id"],
        "model_name_sanitized": sanitize_model_name(run["run_id"]),
        "system_instruction": system,
        "system_instruction_sha": hash_string(system) if system else None,
        "fewshot_as_multiturn": False,
        "chat_template": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": None,
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
    metrics = [
        {
            "metric": name,
            "aggregation": (
                "weighted_mean"
                if name == "nll"
                else "mean"
                if name != "bias_amb"
                else "driftbook.benchmarks.bbq_scores"
            ),
            "higher_is_better": better,
        }
        for name, better in task.metrics.items()
    ]
    return {
        "task": task.name,
        "tag": [GROUP],
        "description": task.asks,
        "output_type": task.output_type,
        "num_fewshot": 0,
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
            for way, rows in _ways(
                part.task, part.results.get(run["run_id"], pd.DataFrame(columns=part.task.asked))
            )
        }
        for way, scores in (
            _ways(part.task, part.scores[run["run_id"]]) if run["run_id"] in part.scores else ()
        ):
            samples = _eval_samples(part.task, scores)
            rates = [
                _eval_score(row, scores["epoch"].max())
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
        metadata=_metadata(run),
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
                input=_masked(task, row["item"]),
                target=MASKED,
                scores={},
                metadata=_described(row),
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


def _eval_score(row: dict[str, Any], epochs: int) -> Any:
    """The EvalScore of a result; NaN where inspect_ai has no null."""
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
    )


# ---- both
def _masked(task: Task, item: str) -> str:
    return f"[masked: {task.benchmark} {item}]"


def _described(row: dict[str, Any]) -> dict[str, str | None]:
    return {
        name: row[name] if isinstance(row[name], str) else None
        for name in ("category", "kind", "family")
    }


def _metadata(run: dict[str, Any]) -> dict[str, Any]:
    """The run's settings and what training did, from the tables `variants` and `runs`."""
    return {name: run[name] for name in (*TABLES["variants"].columns, *OF_RUN)}


FORMATS = {"lm_eval": to_lm_eval, "inspect": to_inspect}


def main(name: str = "miniature", *formats: str) -> None:
    """Write a study's exports beside its tables, in the formats asked for or in all, and say how
    many files and which runs are left out.

    Raises:
        ValueError: an unknown format, no such study, or one without tables.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"there is no format {unknown.pop()!r}; give {' or '.join(FORMATS)}")
    study = load(name)
    lost = failures(study)
    for one in formats or FORMATS:
        folder = study.folder / "exports" / one
        print(f"{one}: {len(FORMATS[one](study, folder))} files in {folder}")
    with replacing(study.folder / "exports" / "NOTICE") as new:
        new.write_text(licences.notice(study))
    if kept := [
        task.benchmark for task in TASKS if task.benchmark not in licences.allowed_items(study)
    ]:
        print(
            f"left out, since a licence keeps single items back: {', '.join(kept)}; make publish"
            " gives their rates (see exports/NOTICE)"
        )
    if lost:
        first, reason = next(iter(lost.items()))
        runs = "1 failed run has" if len(lost) == 1 else f"{len(lost)} failed runs have"
        print(
            f"{runs} no results in lm_eval's format and the status error in inspect_ai's; first"
            f" {first}: {reason}"
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
