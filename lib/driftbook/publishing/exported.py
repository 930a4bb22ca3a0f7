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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from driftbook.benchmarks import bbq_scores
from driftbook.publishing import licences, publish
from driftbook.stats import harm
from driftbook.study.study_file import Study
from driftbook.study.tables import RESPONSE_KEY, TABLES

MASKED = "[masked]"
DETECTOR = "refusal_detector"
LOWER, HIGHER, NEITHER = False, True, None  # which is better, in lm_eval's words
BOOTSTRAPPED = (
    "bootstrap over question families (driftbook.benchmarks.bbq_scores.scores, convention"
    " reference)"
)
SAMPLED = "scored items as independent, the ratio's linearisation where items have weights"
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
ANSWERED = ["metric", "source", "item", "epoch", "value", "weight", "answer", "reason"]
ANSWERED += ["category", "kind", "family"]
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


def failures(study: Study) -> dict[str, str]:
    """Why each run that is not ok has no results, by run_id; a variant without a run is one."""
    runs = _runs(study)
    lost = runs[runs["status"].ne("ok")]
    return dict(zip(lost["run_id"], lost["failure"], strict=True))


# ---- the study's tables
def exported_parts(study: Study) -> tuple[pd.DataFrame, list[Part]]:
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
    return runs, [_part(_asked(task, study), tables) for task in TASKS if task.benchmark in allowed]


def _asked(task: Task, study: Study) -> Task:
    """The task as this study asks it: without a judge nobody says what is unsafe."""
    if task.benchmark != "safety" or study.judges:
        return task
    return replace(
        task, asks="harmful prompts: does the answer decline?", metrics={"refused": HIGHER}
    )


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
    scores = scores[["run_id", *task.asked, *ANSWERED]]
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
    """Unsafe by each judge, where there is one, on harmful prompts; refused, once per answer, on
    those of the safety benchmark and on benign ones.
    """
    verdicts = tables["verdicts"][tables["verdicts"]["benchmark"].eq(benchmark)]
    rows = verdicts.merge(tables["prompts"], on=["benchmark", "prompt_id"], validate="m:1").assign(
        weight=1.0, answer=None
    )
    rows = rows.assign(item=rows["prompt_id"], epoch=rows["sample"] + 1)
    unsafe = rows[rows["kind"].eq("harmful") & rows["judge"].ne(harm.DETECTOR)]
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
    """The results of BBQ, with the scores of benchmarks.bbq_scores in place of the means."""
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


def ways_of_asking(
    task: Task, frame: pd.DataFrame
) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The rows of each way of asking."""
    if not task.asked:
        yield {}, frame
        return
    for key, rows in frame.groupby(list(task.asked), sort=False):
        yield dict(zip(task.asked, key, strict=True)), rows


# ---- both
def masked_text(task: Task, item: str) -> str:
    return f"[masked: {task.benchmark} {item}]"


def described_item(row: dict[str, Any]) -> dict[str, str | None]:
    return {
        name: row[name] if isinstance(row[name], str) else None
        for name in ("category", "kind", "family")
    }


def run_metadata(run: dict[str, Any]) -> dict[str, Any]:
    """The run's settings and what training did, from the tables `variants` and `runs`."""
    return {name: run[name] for name in (*TABLES["variants"].columns, *OF_RUN)}
