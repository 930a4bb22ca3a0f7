"""A study of a few runs with all that a table can hold, for tests of what is exported."""

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
