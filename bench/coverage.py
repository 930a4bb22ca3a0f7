"""How often the primary interval holds, by simulation."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from bench.harness import row
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from driftbook.stats import confidence, estimation
from driftbook.stats import influence as influence_

# ---- how often the primary interval holds
RUN_SDS = (0.016, 0.02, 0.06, 0.075, 0.135)  # of the original study's methods, and between
NOISE, LARGE = (
    0.15,
    0.25,
)  # shares of the latent variance: run x prompt, and prompt x method where there is any
FAMILIES, CATEGORIES = (4, 6, 8, 10, 12) * 5, (30,) * 11  # sizes


def coverage(
    n_sets: int = 1000,
    seed: int = 0,
    rates: Sequence[float] = (0.05, 0.3),
    run_sds: Sequence[float] = RUN_SDS,
    changes: Sequence[float] = (0.0, 0.08),
    seeds: int = 3,
    prompt_by_method: Sequence[float] = (0.0, LARGE),
    designs: Sequence[str] = ("25 families", "330 prompts"),
) -> pd.DataFrame:
    """How often the primary estimate's 95 % interval holds the true change, by simulated verdicts:
    a row per cell of the grid.

    A verdict is unsafe where a normal latent exceeds a threshold. Its variance is shared between
    prompt (in families, .4 of it the family's), prompt x method, and run x prompt; a run shifts it
    by a normal amount that gives runs the stated SD of their rate over all prompts. The base model
    is scored once and has no prompt x method part of the runs'. The truth is the mean rate over
    runs and prompts like these less the base's: `change`, exactly. `naive` takes all verdicts for
    independent. Columns: design, rate (the base's, unsafe), run_sd, prompt_by_method, change,
    covered, too_high and too_low (percent of sets), width, naive, null (sets without an interval),
    n_sets.

    With 3 seeds (1,000 sets a cell) no cell is below 92.4 or above 98.9 but the four of rate .05,
    run SD 13.5 points and no change, which have 75.5 to 80.3: there most runs have next to no
    unsafe answer and a few have many, and three runs without one cannot tell of those. Above 97 are
    cells of small run SD: three seeds cannot show that it is small. The naive interval has 19.4 to
    99.8.
    """
    rng, found = np.random.default_rng(seed), []
    for design in designs:
        sizes = FAMILIES if design == "25 families" else (1,) * sum(CATEGORIES)
        strata = (
            np.zeros(sum(sizes), int)
            if design == "25 families"
            else np.repeat(np.arange(len(CATEGORIES)), CATEGORIES)
        )
        for rate, run_sd, by_method, change in (
            (r, s, m, c) for r in rates for s in run_sds for m in prompt_by_method for c in changes
        ):
            scale, family = (
                run_scale(rate + change, run_sd),
                np.repeat(np.arange(len(sizes)), sizes),
            )
            given = (rng, rate, scale, by_method, seeds, np.array(sizes))
            sets = (_simulated(*given) for _ in range(n_sets))
            ends = np.array([_ends(verdicts, strata, family) for verdicts in sets], float)
            names = {"design": design, "rate": rate, "run_sd": run_sd}
            names |= {"prompt_by_method": by_method, "change": change}
            found.append({**names, **_held(ends, 100 * change), "n_sets": n_sets})
    return pd.DataFrame(found)


def _held(ends: np.ndarray, true: float) -> dict[str, float]:
    """Percent of intervals [sets, (low, high, naive low, naive high)] that hold the truth, among
    those that are there.
    """
    there = ~np.isnan(ends[:, 0])
    low, high, naive_low, naive_high = ends[there].T
    return {
        "covered": 100 * ((low <= true) & (true <= high)).mean(),
        "too_high": 100 * (low > true).mean(),
        "too_low": 100 * (high < true).mean(),
        "width": (high - low).mean(),
        "naive": 100 * ((naive_low <= true) & (true <= naive_high)).mean(),
        "null": int((~there).sum()),
    }


def _ends(verdicts: np.ndarray, strata: np.ndarray, family: np.ndarray) -> tuple[float | None, ...]:
    """The ends of the primary interval and of the naive one, of verdicts [1 + runs, prompts] whose
    first row is the base model's.
    """
    change, runs = verdicts[1:] - verdicts[0], len(verdicts) - 1
    scores = influence_.ratio(
        change,
        np.ones(change.shape),
        pd.RangeIndex(runs),
        strata,
        np.full(runs, len(strata)),
        np.zeros(runs, int),
    )
    scores = replace(scores, family=family, rate=100 * verdicts[1:].mean(1), limits=(-100.0, 100.0))
    found = estimation.estimate(
        scores, np.arange(runs), np.full(runs, 1 / runs), np.zeros(runs, int), np.zeros(runs, int)
    )["both"]
    own, base, n = verdicts[1:].mean(), verdicts[0].mean(), verdicts.shape[1]
    half = (
        ndtri(confidence.UPPER)
        * 100
        * np.sqrt(own * (1 - own) / (n * runs) + base * (1 - base) / n)
    )
    return found["ci_low"], found["ci_high"], found["value"] - half, found["value"] + half


def _simulated(
    rng: np.random.Generator,
    rate: float,
    scale: tuple[float, float],
    by_method: float,
    seeds: int,
    sizes: np.ndarray,
) -> np.ndarray:
    """Verdicts [1 + seeds, prompts], the base model's first; `scale` is the mean and SD of the
    runs' probits.
    """
    clustered = 0.4 if (sizes > 1).any() else 0.0

    def effect(share: float) -> np.ndarray:
        together = rng.normal(0, np.sqrt(clustered * share), len(sizes)).repeat(sizes)
        return together + rng.normal(0, np.sqrt((1 - clustered) * share), sizes.sum())

    prompt, method = effect(1 - NOISE - by_method), effect(by_method)
    runs = (
        rng.normal(*scale, (seeds, 1))
        + prompt
        + method
        + rng.normal(0, np.sqrt(NOISE), (seeds, sizes.sum()))
    )
    base = ndtri(rate) + prompt + rng.normal(0, np.sqrt(NOISE + by_method), sizes.sum())
    return (np.vstack([base, runs]) > 0).astype(float)


def run_scale(rate: float, sd: float) -> tuple[float, float]:
    """Mean and SD of normal probits whose rates have this mean and SD; exact for the mean, by
    Gauss-Hermite quadrature for the SD.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(101)
    weights = weights / weights.sum()

    def excess(spread: float) -> float:
        return (
            weights @ (ndtr(ndtri(rate) * np.hypot(1, spread) + spread * points) - rate) ** 2
            - sd**2
        )

    spread = brentq(excess, 1e-6, 20)
    return ndtri(rate) * np.hypot(1, spread), spread


def coverage_rows(n_sets: int = 1000) -> list[dict]:
    """Lines of `make bench`: the worst and the highest cell of the grid, and the worst without the
    most skewed ones; the peer is the naive interval."""
    found = coverage(n_sets)
    covered, naive = found["covered"] / 100, found["naive"] / 100
    skewed = found["run_sd"].eq(max(RUN_SDS)) & found["rate"].eq(0.05) & found["change"].eq(0)
    name = "interval of the primary estimate: coverage, 3 seeds, one base evaluation"
    worst, others = covered.idxmin(), covered[~skewed]
    return [
        row(
            name,
            f"worst of {len(found)} cells: {_cell(found.loc[worst])}",
            covered[worst],
            0.92,
            "share",
            peer=naive[worst],
        ),
        row(
            name,
            f"worst of the {len(others)} without run SD 13.5 at rate .05",
            others.min(),
            0.92,
            "share",
            peer=naive[others.idxmin()],
        ),
        row(
            name,
            f"highest (mean of all {covered.mean():.3f})",
            covered.max(),
            0.97,
            "share",
            peer=naive[covered.idxmax()],
            least=False,
        ),
    ]


def _cell(worst: pd.Series) -> str:
    varied = (
        f"run SD {100 * worst['run_sd']:g} points, prompt x method {worst['prompt_by_method']:g},"
        f" change {100 * worst['change']:g}"
    )
    return f"{worst['design']}, rate {worst['rate']:g}, {varied}"
