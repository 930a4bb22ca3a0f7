"""How often an audit errs: `python -m bench audit_errors RECORD`, of an audit.json that asked all.

False alarms: base and candidate change places by a fair coin, cluster by cluster, so that no area
has a difference and everything else is as it was (clusters, levels, what is unscored); an audit
that then says worse or better of any area errs. Power and prompts asked: sides are drawn with a
loss of so many points, of which the discordant pairs are a given share.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from driftbook.analyses import audit
from driftbook.stats import monitor
from driftbook.stats.confidence import ALPHA
from driftbook.stats.words import BETTER, WORSE

SEEN = (WORSE, BETTER)
N_AREAS = 5  # of an audit without probes


def scores_of(record: dict) -> pd.DataFrame:
    """The scores of a record's items, both sides."""
    items = pd.DataFrame(record["items"])
    parts = [items.assign(side=side, score=items[side].astype("Float64")) for side in audit.SIDES]
    return pd.concat(parts, ignore_index=True)


def swapped(scores: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """The scores with sides changed for half of the clusters, in all areas of a benchmark alike."""
    unit = scores["benchmark"] + " " + scores["cluster"].fillna(scores["item"])
    names = unit.unique()
    turned = unit.isin(names[rng.random(len(names)) < 0.5])
    other = scores["side"].map(dict(zip(audit.SIDES, audit.SIDES[::-1], strict=True)))
    return scores.assign(side=scores["side"].where(~turned, other))


def false_alarms(record: dict, n_sets: int, seed: int = 0) -> pd.DataFrame:
    """The share of swapped sets in which any area is called worse or better, decided once and
    watched at every look.
    """
    scores, margin = scores_of(record), record["how"]["margin"]
    rows = []
    for number in range(n_sets):
        drawn = swapped(scores, np.random.default_rng([seed, number]))
        told = {
            "decided once": audit.decided(drawn, margin),
            "watched": audit.watched(drawn, margin, scores["area"].nunique()),
        }
        rows += [
            {"how": how, "alarm": found["word"].isin(SEEN).any()} for how, found in told.items()
        ]
    each = pd.DataFrame(rows).groupby("how")["alarm"].agg(["mean", "size"])
    return each.rename(columns={"mean": "false alarms", "size": "sets"})


def pairs(n: int, loss: float, discordant: float, rng: np.random.Generator) -> np.ndarray:
    """Scores [2, n] of base and candidate: a share `discordant` of items differs, so that the
    candidate loses `loss` (a share) on the whole; the others are right on both sides.
    """
    only_base, only_candidate = (discordant + loss) / 2, (discordant - loss) / 2
    u = rng.random(n)
    base, candidate = np.ones(n), np.ones(n)
    candidate[u < only_base] = 0
    base[(u >= only_base) & (u < only_base + only_candidate)] = 0
    return np.array([base, candidate])


def power(loss: float, discordant: float, most: int, n_sets: int, seed: int = 0) -> dict:
    """Of a fixed design of the smallest size with power .8 in one area of five (two-sided exact
    sign test at its Bonferroni share): that size; and the mean number of items that watching asks
    to be as sure, at most `most`, with the share of sets in which it says worse.
    """
    from scipy.stats import binom

    alpha = ALPHA / N_AREAS
    rng = np.random.default_rng([seed, int(1e4 * loss), int(1e4 * discordant)])

    def fixed_power(n: int) -> float:
        d = np.arange(n + 1)
        share = (discordant + loss) / 2 / discordant
        cut = binom.isf(alpha / 2, d, 0.5)  # reject above
        return float(binom.pmf(d, n, discordant) @ binom.sf(cut, d, share))

    sizes = range(20, most, 10)
    fixed = next((n for n in sizes if fixed_power(n) >= 0.8), None)
    asked, found = [], []
    for _ in range(n_sets):
        base, candidate = pairs(most, loss, discordant, rng)
        looks = monitor(base, candidate, looks=range(25, most + 1, 25), alpha=alpha)
        worse = looks.index[looks["word"].eq(WORSE)]
        found.append(len(worse) > 0)
        asked.append(looks["n_items"].iloc[worse[0]] if len(worse) else most)
    return {
        "loss": 100 * loss,
        "discordant": 100 * discordant,
        "fixed size, power .8": fixed,
        "watched: asked on average": np.mean(asked),
        "watched: median": np.median(asked),
        "watched: power": np.mean(found),
    }


def main(path: str, n_sets: str = "2000") -> None:
    """Print both tables."""
    record = json.loads(Path(path).read_text())
    print(false_alarms(record, int(n_sets)).round(4).to_string())
    grid = [(0.05, 0.1), (0.05, 0.2), (0.1, 0.2), (0.2, 0.3), (0.4, 0.5)]
    rows = [power(loss, share, 2_000, int(n_sets) // 10) for loss, share in grid]
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
