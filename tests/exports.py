"""A study of a few runs with all that a table can hold, for tests of what is exported."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.study.study_file import load
from driftbook.study.tables import RESPONSE_KEY, TABLES
from simulated import simulate

SECRET = "grumbling violet umbrella"  # in every response and in every judge's reply


def few(tables: Path, n: int) -> None:
    """Keep the first runs of a study: the base model, the one that failed where one did, and
    others.
    """
    run_ids = TABLES["variants"].read(tables)["run_id"][:n]
    for name in ("variants", "runs", "verdicts", "answers", "ratings"):
        frame = TABLES[name].read(tables)
        TABLES[name].write(frame[frame["run_id"].isin(run_ids)], tables)


def everything():
    """A study with what a table can hold: two judges, unscored and repeated answers, BBQ asked in
    several ways, a failed run.
    """
    study = load("miniature").model_copy(update={"name": "exported"})
    tables = simulate(study.folder, bases=["mini-llama"], seeds=(1,), unscored=0.05) / "tables"
    few(tables, 4)
    rng = np.random.default_rng(1)
    verdicts = TABLES["verdicts"].read(tables).assign(reply=SECRET)
    other = verdicts.assign(
        judge="mini-other", unsafe=verdicts["unsafe"].mask(rng.random(len(verdicts)) < 0.3)
    )
    again = verdicts[
        verdicts["run_id"].eq(verdicts["run_id"].iloc[0]) & verdicts["benchmark"].eq("safety")
    ]
    again = again.assign(sample=1, unsafe=rng.random(len(again)) < 0.5)
    verdicts = pd.concat([verdicts, other, again])
    answers = TABLES["answers"].read(tables)
    permuted = answers[answers["option_order"].eq("ABC") & (rng.random(len(answers)) < 0.2)].assign(
        option_order="CBA", correct=True
    )
    ratings = TABLES["ratings"].read(tables)
    ratings = ratings.assign(
        weight=ratings["weight"].mask(
            ratings["metric"].eq("nll"), rng.integers(3, 40, len(ratings))
        )
    )
    ratings.loc[ratings.index[5], ["value", "unscored_reason"]] = [None, "not finite"]
    responses = verdicts.drop_duplicates(list(RESPONSE_KEY))[
        [*RESPONSE_KEY, "n_tokens", "finish_reason"]
    ]
    responses = responses.assign(
        response=[f"{SECRET} {number}" for number in range(len(responses))]
    )
    for name, frame in {
        "verdicts": verdicts,
        "answers": pd.concat([answers, permuted]),
        "ratings": ratings,
        "responses": responses,
    }.items():
        TABLES[name].write(frame, tables)
    return study


def lm_eval_run(folder: Path) -> Path:
    """The folder that lm_eval itself writes for a model of random numbers on a task of four
    questions.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.metrics import mean  # noqa: F401  # registers the metrics
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{n} + 1 =", "a": n % 2}) + "\n" for n in range(4))
    )
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "a",
        "doc_to_choice": ["1", "2"],
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0},
    }
    tracker = EvaluationTracker(output_path=str(folder / "out"))
    (folder / "tasks").mkdir()
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model="dummy",
        model_args={"pretrained": "toy"},
        tasks=[task],
        task_manager=manager,
        evaluation_tracker=tracker,
        bootstrap_iters=10,
    )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    tracker.save_results_samples(task_name="toy", samples=samples["toy"])
    return folder / "out"
