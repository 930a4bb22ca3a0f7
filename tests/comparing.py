"""Verdicts of made-up runs, as tests of comparisons share them."""

import numpy as np
import pandas as pd

from driftbook.stats import influence, terms

LABELS = {
    "study": "s",
    "notebook": "n",
    "outcome": terms.UNSAFE,
    "benchmark": "safety",
    "judge": "j",
}


UNITS = ["category", "family", "prompt_id"]


def made(
    verdicts: np.ndarray, methods: list[str], settings: list[str], strata=None, family=None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Values, arms and cells of one base model (first row of verdicts) and a run per other row."""
    names = ["base", *(f"r{i}" for i in range(1, len(verdicts)))]
    n = verdicts.shape[1]
    levels = [strata or ["c"] * n, list(range(n)) if family is None else family, list(range(n))]
    values = pd.DataFrame(
        verdicts,
        index=pd.Index(names, name="run_id"),
        columns=pd.MultiIndex.from_arrays(levels, names=UNITS),
        dtype=float,
    )
    arms = pd.DataFrame(
        {
            "run_id": names,
            "base_model": "b",
            "base_run_id": "base",
            "arm": ["base", *[terms.TRAINED] * len(methods)],
        }
    )
    arms = arms.assign(method=["none", *methods], setting=["", *settings], cluster=names)
    cells = arms.iloc[1:].assign(group=terms.AS_CONFIGURED, member=terms.ALL, pool="b")[
        ["run_id", *influence.CELL, "setting", "pool", "cluster"]
    ]
    return (
        values,
        arms,
        cells.assign(weight=1 / cells.groupby("method")["run_id"].transform("size")),
    )


def draw(seed: int, runs: int = 6, n: int = 120, family: int = 1) -> np.ndarray:
    """Verdicts of a base model and runs that share prompts."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=n // family).repeat(family)
    return (
        hard + rng.normal(0, 0.7, (runs + 1, n)) + rng.normal(0, 0.3, (runs + 1, 1)) > 0.8
    ).astype(float)
