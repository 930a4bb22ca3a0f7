"""How often the intervals of BBQ's scores hold, by simulation."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit

from driftbook.benchmarks.bbq_scores import ICC, SCORES, score_intervals

AGE_FAMILIES = (
    8,
    8,
    8,
    18,
    18,
    18,
    18,
    24,
    24,
    24,
    24,
    32,
    32,
    32,
    32,
    40,
    40,
    40,
    50,
    50,
    70,
    70,
    72,
    84,
    84,
)  # sets of 2 x 2 items in Age.jsonl


# ---- how often the intervals hold
def coverage(
    n_sets: int = 400,
    families: int = 25,
    seed: int = 0,
    accuracies: Sequence[float] = (0.3, 0.6, 0.8, 0.9, 0.95),
    leans: Sequence[float] = (0.0, 0.3, 0.57),
    icc: float = ICC,
) -> pd.DataFrame:
    """How often the 95 % interval holds the true score: a row per cell (ambiguous accuracy x lean)
    and score, over simulated sets of answers.

    A set has families of the sizes of Age.jsonl, drawn with replacement, of 2 x 2 items; families'
    logits are normal, with the deviation at which two answers of a family (in different item sets)
    correlate by `icc`, and item sets within a family differ by .7 in logits. At 25 families no cell
    is below 94.6 (mean 96.6; 2,000 sets). At 12 one of 60 is below 93: the ambiguous accuracy of
    .95 at lean .3, 92.6 (mean of all 96.5). At .98 none is below 96.2 (25) and 97.4 (12). At `icc`
    .45 none of 25 families is below 94.1 (1,200 sets). Columns: acc_amb, lean, score, true, covered
    (percent), too_high and too_low (percent of sets whose interval is), width, n_sets.
    """
    rng, rows = np.random.default_rng(seed), []
    for accuracy in accuracies:
        for lean in leans:
            part, true = _simulated(rng, n_sets, families, accuracy, lean, icc)
            low, high = score_intervals(part)
            found = {
                "covered": 100 * ((low <= true) & (true <= high)).mean(0),
                "too_high": 100 * (low > true).mean(0),
                "too_low": 100 * (high < true).mean(0),
                "width": (high - low).mean(0),
            }
            rows.append(
                pd.DataFrame(
                    {
                        "acc_amb": accuracy,
                        "lean": lean,
                        "score": SCORES,
                        "true": true,
                        **found,
                        "n_sets": n_sets,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


def _simulated(
    rng: np.random.Generator, n_sets: int, families: int, accuracy: float, lean: float, icc: float
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [sets, families, contexts, COUNTS] of a model, and its true scores [4].

    Of a set's two disambiguated items one has the biased answer as the right one; a wrong answer is
    UNKNOWN half of the time.
    """
    sizes = rng.choice(AGE_FAMILIES, (n_sets, families))
    there = np.arange(sizes.max()) < sizes[..., None]

    def happens(p: float, n: int) -> np.ndarray:
        logits = rng.normal(
            rng.normal(*_family_logits(p, icc), (n_sets, families, 1)), 0.7, there.shape
        )
        return rng.random((*there.shape, n)) < expit(logits)[..., None]

    margin = 0.42 * lean
    right = min(max(accuracy, 0.6), 0.99 - margin)
    unknown, toward = happens(accuracy, 2), happens((1 + lean) / 2, 2)
    with_bias, against = happens(right + margin, 1), happens(right - margin, 1)
    lost, gone = rng.random((2, *there.shape, 1)) < 0.5  # UNKNOWN where the answer is wrong
    columns = [
        [np.ones_like(unknown)] * 3 + [unknown, ~unknown, ~unknown & toward],
        [np.ones_like(unknown)] * 3
        + [
            np.concatenate(pair, -1)
            for pair in (
                (with_bias, against),
                (with_bias | ~lost, against | ~gone),
                (with_bias, ~against & ~gone),
            )
        ],
    ]
    part = np.stack(
        [
            np.stack([(flag & there[..., None]).sum((2, 3)) for flag in side], -1)
            for side in columns
        ],
        2,
    ).astype(float)
    biased, named = right + margin + (1 - right + margin) / 2, 1 + right
    return part, np.array([accuracy, right, (1 - accuracy) * lean, 2 * biased / named - 1])


def _family_logits(p: float, icc: float) -> tuple[float, float]:
    """Mean and deviation of families' normal logits at which answers average p and correlate by
    `icc` within a family.
    """
    points, (inner, inner_weights) = np.linspace(-8, 8, 801), np.polynomial.hermite_e.hermegauss(15)
    weights = np.exp(-(points**2) / 2) / np.exp(-(points**2) / 2).sum()

    def mean(deviation: float) -> float:
        return brentq(
            lambda middle: weights @ expit(middle + np.hypot(deviation, 0.7) * points) - p, -99, 99
        )

    def excess(deviation: float) -> float:
        shares = (
            expit(mean(deviation) + deviation * points[:, None] + 0.7 * inner)
            @ inner_weights
            / inner_weights.sum()
        )
        return weights @ (shares - p) ** 2 / (p * (1 - p)) - icc

    deviation = brentq(excess, 1e-3, 20)
    return mean(deviation), deviation
