"""What mixed models cost: logistic ones of single verdicts against the number of runs and prompts,
and on the original study's own verdicts; linear ones beside R's lme4, where it is installed.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from bench.harness import row
from scipy.special import expit

from driftbook.rereading import original_study, original_tables
from driftbook.stats.linear import rate_model
from driftbook.stats.logistic import item_model
from driftbook.study.methods import STUDIED

MODELS = {
    "crossed": ("run_id", "prompt_id"),
    "maximal": ("run_id", "prompt_id", "prompt_id:base_model", "prompt_id:method"),
}
SIZES = ((64, 110), (128, 110), (256, 110), (256, 330), (256, 990))  # runs, prompts
GOALS = {
    "crossed": 5.0,
    "maximal": 60.0,
}  # CPU seconds; glmmTMB took 28 s for the crossed model of such data
FIGURE = "logistic model of single verdicts, CPU seconds"


def simulated(n_runs: int, n_prompts: int, seed: int = 0) -> pd.DataFrame:
    """Verdicts of four base models x four methods on the same prompts, with run, prompt and prompt
    x method effects.
    """
    rng = np.random.default_rng(seed)
    runs = pd.DataFrame(
        {
            "run_id": np.arange(n_runs),
            "base_model": np.arange(n_runs) % 4,
            "method": np.array(STUDIED)[np.arange(n_runs) // 4 % 4],
            "dpo": rng.integers(0, 2, n_runs),
        }
    )
    frame = runs.merge(pd.DataFrame({"prompt_id": np.arange(n_prompts)}), how="cross")
    prompts, kinds = rng.normal(0, 1.5, n_prompts), rng.normal(0, 0.7, (4, n_prompts))
    eta = (
        -1
        + rng.normal(0, 0.8, n_runs)[frame["run_id"]]
        + prompts[frame["prompt_id"]]
        + kinds[frame["method"].map(STUDIED.index), frame["prompt_id"]]
    )
    return frame.assign(
        unsafe=rng.random(len(frame)) < expit(eta), base_model=frame["base_model"].astype(str)
    )


def _seconds(items: pd.DataFrame, formula: str, groups: tuple[str, ...]) -> float:
    started = time.process_time()
    fit = item_model(items, formula, groups)
    if not fit.converged:
        raise ValueError(f"the model did not converge: {'; '.join(fit.notes)}")
    return time.process_time() - started


def growth(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[dict]:
    """Seconds of both models for each size of a simulated study."""
    return [
        row(
            FIGURE,
            f"{model}, {runs} runs x {prompts} prompts, simulated",
            _seconds(simulated(runs, prompts), "unsafe ~ base_model * method + dpo", groups),
            None,
            "CPU s",
            least=False,
        )
        for runs, prompts in sizes
        for model, groups in MODELS.items()
    ]


def original() -> list[dict]:
    """Seconds for the original study's verdicts with 19 fixed terms; nothing where they are not
    there.
    """
    if "DRIFTBOOK_SHARED" not in os.environ:
        print(
            "the original study's verdicts are not measured: set DRIFTBOOK_SHARED to the folder"
            " that has them"
        )
        return []
    runs, verdicts = original_study.load()
    settings = runs.assign(run_id=original_tables.run_ids(runs).to_numpy())[
        ["run_id", "base_model", "method", "objective", "learning_rate_true", "epochs"]
    ]
    items = original_tables.items(runs, verdicts).merge(settings, on="run_id")
    name = f"{len(items):,} verdicts of the original study"
    formula = "safe ~ base_model * method + objective + C(learning_rate_true) + C(epochs)"
    return [
        row(
            FIGURE,
            f"{model}, {name}",
            _seconds(items, formula, groups),
            GOALS[model],
            "CPU s",
            least=False,
        )
        for model, groups in MODELS.items()
    ]


# ---- linear models, beside lme4
LINEAR = "linear mixed model, CPU seconds beside lme4's"
SLOWER = 1.5  # times lme4's seconds, at most
RATED_SECONDS = 60.0  # for as many ratings as lme4's data set InstEval has
LME4 = """
args <- commandArgs(TRUE)
suppressMessages(library(lme4))
rows <- read.csv(args[1], stringsAsFactors = TRUE)
used <- system.time(fit <- lmer(as.formula(args[2]), rows))
cat(sprintf("%.3f %.6f", sum(used[1:2]), as.numeric(logLik(fit))))
"""


def of_categories(n_runs: int = 2115, n_categories: int = 11, seed: int = 0) -> pd.DataFrame:
    """Rates of runs by category, with run and category effects."""
    rng = np.random.default_rng(seed)
    run, category = np.divmod(np.arange(n_runs * n_categories), n_categories)
    y = rng.normal(0, 6, n_runs)[run] + rng.normal(0, 4, n_categories)[category]
    frame = pd.DataFrame({"y": y + rng.normal(0, 7, len(run)), "run": run, "category": category})
    return frame.assign(base=run % 4, method=np.array(STUDIED)[run // 4 % 4]).astype({"base": str})


def of_ratings(seed: int = 0) -> pd.DataFrame:
    """Ratings in the shape of lme4's InstEval: 73,421 of 1,128 lecturers by 2,972 students, some of
    whom rate and are rated far more than others.
    """
    rng, n = np.random.default_rng(seed), 73_421
    student = rng.choice(2972, n, p=rng.dirichlet(np.full(2972, 2.0)))
    lecturer = rng.choice(1128, n, p=rng.dirichlet(np.full(1128, 0.8)))
    y = rng.normal(0, 0.3, 2972)[student] + rng.normal(0, 0.5, 1128)[lecturer]
    frame = pd.DataFrame({"y": y + rng.normal(0, 1.2, n), "s": student, "d": lecturer})
    return frame.assign(service=rng.choice(["no", "yes"], n), dept=lecturer % 14)


def lme4_seconds(frame: pd.DataFrame, formula: str) -> tuple[float, float] | None:
    """CPU seconds and log-likelihood of lme4 on these rows; None where R or lme4 is missing."""
    if shutil.which("Rscript") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path, script = Path(folder) / "rows.csv", Path(folder) / "fit.R"
        grouped = frame.assign(
            **{name: "g" + frame[name].astype(str) for name in frame if name != "y"}
        )
        grouped.to_csv(path, index=False)
        script.write_text(LME4)
        command = ["Rscript", str(script), str(path), formula]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return None
    seconds, loglik = map(float, ended.stdout.split()[-2:])
    return seconds, loglik


def linear() -> list[dict]:
    """Seconds of two linear models, and lme4's where it is installed; their likelihoods agree."""
    cases = [
        (of_categories(), "y ~ base * method", ("run", "category"), None),
        (of_ratings(), "y ~ service", ("s", "d", "dept:service"), RATED_SECONDS),
    ]
    found = []
    for frame, formula, groups, goal in cases:
        started = time.process_time()
        fit = rate_model(frame, formula, groups)
        ours = time.process_time() - started
        theirs = lme4_seconds(frame, formula + "".join(f" + (1 | {name})" for name in groups))
        if theirs and abs(theirs[1] - fit.loglik) > 0.01:
            raise ValueError(f"log-likelihoods differ: {fit.loglik:.4f}, lme4's {theirs[1]:.4f}")
        name = f"{len(frame):,} rows, {' + '.join(groups)}, simulated"
        peer = theirs[0] if theirs else None
        if goal is None and peer:
            goal = SLOWER * peer
        found.append(row(LINEAR, name, ours, goal, "CPU s", ours, peer, least=False))
    return found


def rows() -> list[dict]:
    """Every line of this benchmark."""
    return [*linear(), *original(), *growth()]
