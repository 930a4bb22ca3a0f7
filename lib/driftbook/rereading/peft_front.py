"""Which of PEFT's published runs are on the front of accuracy, forgetting and cost."""

import numpy as np
import pandas as pd
from scipy.special import betaincinv, ndtr

from driftbook.rereading.peft_results import (
    ACCURACY,
    AS_PUBLISHED,
    BEST,
    CORRELATED,
    FACTOR,
    GOALS,
    N_QUESTIONS,
    QUESTIONS,
    RERUN,
    SIZE,
    TEST,
    THIS_RUN,
    estimates_of_runs,
    on,
)
from driftbook.stats.pareto import front
from driftbook.study.tables import ESTIMATES


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
    k, lost = done["k"].to_numpy(float), done["forgetting"].to_numpy(float)
    n, rng = N_QUESTIONS[TEST], np.random.default_rng(seed)
    other, correlated = draws(k, n, n_draws, rng), draws(k, n, n_draws, rng, correlation)
    again, forgotten = rng.standard_normal((2, n_draws, len(k)))
    same = f"errors of runs correlated {correlation:g}, since the questions are the same"
    spread = f"standard deviations of {rerun[0]:g} points and {rerun[1]:.0%} of forgetting"
    moved = other + rerun[0] * again, lost * (1 + rerun[1] * forgotten)
    scenarios = {
        AS_PUBLISHED: (100 * k[None] / n, lost, "as published"),
        QUESTIONS: (other, lost, f"{n_draws} draws of the accuracies, independent (Jeffreys)"),
        CORRELATED: (correlated, lost, f"the same, {same}: assumed"),
        RERUN: (*moved, f"the same, independent, and {spread}: assumed"),
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
            estimates_of_runs(
                done, outcome, contrast, value=value, how=how, population=population, n_items=n
            )
            for outcome, value in shares.items()
        ]
    return ESTIMATES.concat(parts)


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


def peft_summary(estimates: pd.DataFrame, goal: str = "peak memory") -> str:
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
