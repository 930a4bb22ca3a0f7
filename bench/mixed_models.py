"""What the logistic models of single verdicts cost: CPU seconds against the number of runs and
prompts, and on the original study's own verdicts.
"""

import os
import time

import numpy as np
import pandas as pd
from bench.harness import row
from scipy.special import expit

from driftbook.rereading import original_study, original_tables
from driftbook.stats.logistic import item_model
from driftbook.study.methods import STUDIED

MODELS = {
    "crossed": ("run_id", "prompt_id"),
    "maximal": ("run_id", "prompt_id", "prompt_id:base_model", "prompt_id:method"),
}
SIZES = ((64, 110), (128, 110), (256, 110), (256, 330), (256, 990))  # runs, prompts
GOALS = {
    "crossed": 15.0,
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


def rows() -> list[dict]:
    """Every line of this benchmark."""
    return [*original(), *growth()]
