"""Whether the power formula holds: simulated studies through the estimator itself."""

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from driftbook.analyses.power import power, precision
from driftbook.analyses.power_components import COLUMNS
from driftbook.stats import estimation, influence, terms
from driftbook.stats.influence import Scores


# ---- does the formula hold
def simulated(
    n_sets: int,
    seed: int,
    rate: float,
    shift: float,
    run: float,
    agree: float,
    seeds: int = 3,
    settings: int = 4,
    n_units: int = 330,
    margin: float | None = None,
) -> dict:
    """How often the primary estimator finds the change in simulated 0/1 verdicts, and how often
    `power` says that it will.

    A prompt is answered unsafely where a normal score is above a threshold. The base's score of a
    prompt and a run's share `agree` of their variance; half of the rest is the method's own, half
    is noise. The run's threshold is `shift` lower than the base's, and differs between runs by the
    SD `run`, in SDs of the score. Keys: change (true, points), run_sd, unit_sd, noise_sd (true,
    points), nominal, simulated (shares), error (standard error of the latter).

    Raises:
        ValueError: fewer than two seeds.
    """
    if seeds < 2:
        raise ValueError(
            f"seeds={seeds}; one run says nothing about other runs, so there is no test to simulate"
        )
    rng, n_runs = np.random.default_rng(seed), settings * seeds
    change, truth = _truth(rng, rate, shift, run, agree)
    plan = precision(
        pd.DataFrame([truth])[COLUMNS],
        pd.DataFrame([{**truth, "n_settings": settings, "n_runs": n_runs}]),
        n_units,
    )
    names = dict.fromkeys(("study", "notebook", "outcome", "benchmark", "judge"), "simulated")
    found = []
    for _ in range(n_sets):
        verdicts = _verdicts(rng, n_units, n_runs, rate, shift, run, agree)
        means = estimation.means(*_paired(verdicts, settings), terms.CHANGE, **names)
        found.append(_shown(means.iloc[0], margin))
    nominal = float(power(plan, change, margin)[0])
    return {
        "change": change,
        **{f"{name}_sd": truth[name] for name in ("run", "unit", "noise")},
        "nominal": nominal,
        "simulated": float(np.mean(found)),
        "error": float(np.sqrt(nominal * (1 - nominal) / n_sets)),
    }


def _verdicts(
    rng: np.random.Generator,
    n_units: int,
    n_runs: int,
    rate: float,
    shift: float,
    run: float,
    agree: float,
) -> np.ndarray:
    """[1 + runs, units] of 0 and 1: the base's verdicts, then each run's."""
    threshold, own = -ndtri(rate), np.sqrt((1 - agree) / 2)
    base = rng.normal(size=n_units)
    drawn = rng.normal(size=n_units) + rng.normal(size=(n_runs, n_units))
    score = np.sqrt(agree) * base + own * drawn
    lower = shift + run * rng.normal(size=(n_runs, 1))
    return np.vstack([base > threshold, score > threshold - lower]).astype(float)


def _truth(
    rng: np.random.Generator, rate: float, shift: float, run: float, agree: float, n: int = 500_000
) -> tuple[float, dict]:
    """The true change in points and the components of these verdicts: integrals over the scores of
    prompts and over runs, by that many draws of each.
    """
    threshold, own = -ndtri(rate), np.sqrt((1 - agree) / 2)
    base, method = rng.normal(size=(2, n))
    answered = ndtr(
        (np.sqrt(agree) * base + own * method - threshold + shift) / np.hypot(own, run)
    )  # unsafely, over runs and their noise
    change = float(ndtr((shift - threshold) / np.hypot(1, run)) - rate)
    unit, by_run = (
        (answered - (base > threshold)).var(),
        ndtr(shift - threshold + run * rng.normal(size=n)).var(),
    )
    whole = np.where(base > threshold, 1 - answered, answered).mean() - change**2
    sd = {
        name: 100 * float(np.sqrt(part))
        for name, part in (("run", by_run), ("unit", unit), ("noise", whole - unit - by_run))
    }
    where = {
        "base_model": "simulated",
        "method": "lora",
        "other": "none",
        "rate": 100 * rate,
        "icc": 0.0,
        "between_bases": np.nan,
    }
    return 100 * change, {**where, **sd, "df_run": 1e9, "df_unit": 1e9, "how": "integrals"}


def _paired(verdicts: np.ndarray, settings: int) -> tuple[Scores, pd.DataFrame]:
    """The changes of runs [1.., units] against the first row, and the one cell that they make."""
    names = ["base", *(f"run {i}" for i in range(1, len(verdicts)))]
    values = pd.DataFrame(
        verdicts,
        index=pd.Index(names, dtype=object),
        columns=pd.MultiIndex.from_product([["all"], range(verdicts.shape[1])]),
    )
    arms = pd.DataFrame(
        {
            "run_id": names,
            "base_run_id": "base",
            "arm": ["base", *[terms.TRAINED] * (len(names) - 1)],
        }
    )
    cells = pd.DataFrame(
        {
            "run_id": names[1:],
            "base_model": "simulated",
            "method": "lora",
            "group": terms.AS_CONFIGURED,
            "member": terms.ALL,
            "pool": "simulated",
            "cluster": names[1:],
        }
    )
    return influence.paired(values, arms), cells.assign(
        weight=1 / len(cells), setting=[f"setting {i % settings}" for i in range(len(cells))]
    )


def _shown(row: pd.Series, margin: float | None) -> bool:
    if margin is not None:
        return bool(row["ci_high"] < margin)
    return bool(row["ci_low"] > 0 or row["ci_high"] < 0)
