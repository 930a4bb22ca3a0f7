"""Correlations of changes over runs, corrected for attenuation."""

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from driftbook.analyses.tradeoffs import has_score, same_units, scaled
from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.influence import Scores
from driftbook.stats.terms import TRAINED

CORRELATION, WITHIN_METHODS, UNATTENUATED = (
    "correlation of changes",
    ", within methods",
    ", corrected for attenuation",
)
RELIABILITY = "reliability over runs"
_FEWEST, LEAST_RELIABLE = (
    4,
    0.2,
)  # runs for a correlation; below such a reliability the correction is made of noise
RUNS = "settings and runs like these, prompts like these, these base models"


# ---- does one change follow another
def correlations(
    measured: dict[str, tuple[Scores, Scores]],
    arms: pd.DataFrame,
    x: str,
    n_boot: int,
    seed: int,
    **labels: str,
) -> pd.DataFrame:
    """Pearson's correlation of each change with the change in `x`, over the trained runs of a base
    model: as it is, and without the noise of the prompts.

    The noise of a run's change, over prompts like these, is what each unit moves it from the mean
    of the runs; what moves all runs of a base model alike, such as the base model's own answers, is
    no noise between them. Its mean square over runs is taken off the runs' variance (off their
    covariance too, where both scores have the same units): the rest over the whole is the
    reliability, and r / sqrt(reliability x reliability) the correlation of what is measured without
    error (Spearman 1904, American Journal of Psychology 15, 72). Both are given once more within
    methods, whose means differ in everything; reliabilities beside them. Intervals: Fisher's z; of
    a corrected one, percentiles of `n_boot` resamples of runs within methods, with noise and
    reliabilities found anew in each. Of 250 simulated sets of 40 or 48 runs with reliabilities of
    .7 and .9 they held the true correlation in 89 to 93 %, a little less than they should. What
    cannot be given is null, and `how` says why: fewer than 4 runs, no spread, a reliability below
    .2, a corrected value beyond 1.
    """
    rng, rows = np.random.default_rng(seed), []
    for base_model, own in arms[arms["arm"].eq(TRAINED)].groupby("base_model", sort=False):
        for outcome in measured if x in measured else ():
            one, other = measured[x][1], measured[outcome][1]
            runs = own[has_score(one, own["run_id"]) & has_score(other, own["run_id"])]
            method, setting = _settings(runs)
            counts = _resampled(method, setting, n_boot, rng)
            found = _reliability(other, runs, counts)
            if outcome != x:
                found += _correlated(one, other, runs, counts, x)
            own_labels = {"base_model": base_model, "outcome": outcome, "n_runs": len(runs)}
            rows += [own_labels | row for row in found]
    if not rows:
        return complete(pd.DataFrame())
    labels |= {"benchmark": "all", "judge": "none", "method": "all"}
    return complete(pd.DataFrame(rows).assign(**labels, group=TRAINED, population=RUNS))


def _settings(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The method of each run, and its setting within it."""
    setting = runs["method"].astype(str) + " " + runs["setting"].astype(str)
    return pd.factorize(runs["method"])[0], pd.factorize(setting)[0]


def _units(method: np.ndarray, setting: np.ndarray) -> np.ndarray:
    """What is drawn within a method: its settings, or its runs where it has one setting."""
    units = setting.copy()
    for name in np.unique(method):
        own = np.flatnonzero(method == name)
        if len(np.unique(setting[own])) == 1:
            units[own] = len(setting) + own
    return units


def _resampled(
    method: np.ndarray, setting: np.ndarray, n_boot: int, rng: np.random.Generator
) -> np.ndarray:
    """The weight of each run [1 + n_boot, runs]: one in the first row, which is what was found;
    then as chance has it, which draws settings within a method, or runs where it has one setting.

    One unit less than there are is drawn, and their weights are raised to the number there is, so
    that few do not look less spread than they are (Rao & Wu 1988, Journal of the American
    Statistical Association 83, 231). The one run of a method stays.
    """
    counts, units = np.ones((1 + n_boot, len(method))), _units(method, setting)
    for name in np.unique(method):
        own = np.flatnonzero(method == name)
        unit = np.unique(units[own], return_inverse=True)[1]
        if (n := unit.max() + 1) > 1:
            drawn = rng.multinomial(n - 1, np.full(n, 1 / n), n_boot) * n / (n - 1)
            counts[1:, own] = drawn[:, unit]
    return counts


def _moments(
    one: Scores, other: Scores, runs: pd.DataFrame, counts: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The covariance of two scores over runs within groups, and the part of it that is noise of the
    units, in each row of `counts`.
    """
    at, bt = one.at(runs["run_id"]), other.at(runs["run_id"])
    noise = (
        scaled(one, one.influence[at]) @ scaled(other, other.influence[bt]).T
        if same_units(one, other)
        else np.zeros((len(runs), len(runs)))
    )
    return _within_groups(np.outer(one.value[at], other.value[bt]), counts, group), _within_groups(
        noise, counts, group
    )


def _within_groups(products: np.ndarray, counts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """From products of runs [runs, runs], the mean product of their differences from the mean of
    their group, in each row of `counts` [draws, runs].
    """
    total = counts @ np.diag(products)
    for name in np.unique(group):
        own = counts * (group == name)
        total = total - ((own @ products) * own).sum(1) / np.maximum(own.sum(1), 1e-300)
    return total / (counts.sum(1) - len(np.unique(group)))


def _reliability(scores: Scores, runs: pd.DataFrame, counts: np.ndarray) -> list[dict]:
    if len(runs) < _FEWEST:
        return [
            {
                "contrast": RELIABILITY,
                "value": None,
                "how": f"{len(runs)} runs: a reliability needs {_FEWEST}",
            }
        ]
    seen, noise = _moments(scores, scores, runs, counts, np.zeros(len(runs), int))
    if seen[0] <= 0:
        return [{"contrast": RELIABILITY, "value": None, "how": "no run differs from another"}]
    share = 1 - noise / np.where(seen > 0, seen, np.nan)
    low, high = np.nanquantile(share, [LOWER, UPPER])
    how = (
        "share of the variance over runs that is no noise of the prompts or question families;"
        " percentiles of resampled runs"
    )
    return [
        {
            "contrast": RELIABILITY,
            "value": share[0],
            "ci_low": low,
            "ci_high": high,
            "how": how + ("; below 0: all of it can be noise" if share[0] < 0 else ""),
        }
    ]


def _correlated(
    one: Scores, other: Scores, runs: pd.DataFrame, counts: np.ndarray, x: str
) -> list[dict]:
    """The raw and the corrected correlation, over all runs and within methods: contrast, value,
    ci_low, ci_high, how.
    """
    (method, setting), rows = _settings(runs), []
    contrast = CORRELATION
    whole = "", np.zeros_like(method), setting
    for words, group, unit in (whole, (WITHIN_METHODS, method, _units(method, setting))):
        spare = len(runs) - group.max(initial=0)  # as many as there would be without groups
        if spare < _FEWEST:
            how = (
                f"{len(runs)} runs"
                + (f" of {group.max() + 1} methods" if words and len(runs) else "")
                + ": too few for a correlation"
            )
            rows += [
                {"contrast": contrast + words + more, "value": None, "how": how}
                for more in ("", UNATTENUATED)
            ]
            continue
        pairs = (one, one), (other, other), (one, other)
        seen, noise = zip(*(_moments(*pair, runs, counts, group) for pair in pairs), strict=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            reliable = [1 - part / whole for part, whole in zip(noise[:2], seen, strict=False)]
            raw = seen[2] / np.sqrt(seen[0] * seen[1])
            corrected = (seen[2] - noise[2]) / np.sqrt((seen[0] - noise[0]) * (seen[1] - noise[1]))
        without = 1.0 - (np.unique(unit)[:, None] == unit)
        each = [_moments(*pair, runs, without, group)[0] for pair in pairs]
        with np.errstate(invalid="ignore", divide="ignore"):
            left = each[2] / np.sqrt(each[0] * each[1])
        rows.append({"contrast": contrast + words, **_raw(raw[0], left)})
        rows.append(
            {
                "contrast": contrast + words + UNATTENUATED,
                **_corrected(raw[0], corrected, np.stack(reliable)),
            }
        )
    return [{**row, "against": x} for row in rows]


def _raw(r: float, left: np.ndarray) -> dict:
    """A correlation with its interval; `left` holds it without each unit (a setting, or a run)
    in turn.
    """
    if np.isnan(r):
        return {
            "value": None,
            "how": "no correlation: one of the two changes is the same in all runs",
        }
    k, how = len(left), "Pearson; "
    if abs(r) > 1 - 1e-12:
        return {"value": r, "how": how + "runs on one line have no interval"}
    if k < _FEWEST or not (np.abs(left) < 1 - 1e-12).all():
        how += f"no interval: {k} settings" if k < _FEWEST else "no interval without one setting"
        return {"value": r, "how": how}
    z = np.arctanh(left)
    half = stdtrit(k - 1, UPPER) * np.sqrt((k - 1) / k * ((z - z.mean()) ** 2).sum())
    how += f"Fisher's z, jackknife over {k} settings; the noise of the prompts draws it to zero"
    low, high = np.tanh(np.arctanh(r) + np.array([-1, 1]) * half)
    return {"value": r, "ci_low": low, "ci_high": high, "how": how}


def _corrected(raw: float, corrected: np.ndarray, reliable: np.ndarray) -> dict:
    """The first of the corrected correlations with percentiles of the others; `reliable` [2,
    draws].
    """
    words = f"reliabilities {reliable[0, 0]:.2f} and {reliable[1, 0]:.2f}"
    if np.isnan(raw):
        return {
            "value": None,
            "how": "cannot be corrected: one of the two changes is the same in all runs",
        }
    if reliable[:, 0].min() < LEAST_RELIABLE:
        return {
            "value": None,
            "how": (
                f"cannot be corrected: {words}, and below {LEAST_RELIABLE:g} what runs differ in is"
                " mostly the noise of their prompts"
            ),
        }
    if abs(corrected[0]) > 1:
        return {
            "value": None,
            "how": (
                f"cannot be corrected: {raw:.2f} with {words} gives {corrected[0]:.2f}, beyond 1"
            ),
        }
    how, usable = (
        f"corrected for attenuation (Spearman 1904), {words}; percentiles of resampled runs",
        reliable[:, 1:].min(0) >= LEAST_RELIABLE,
    )
    if usable.mean() < 0.95:
        return {
            "value": corrected[0],
            "how": (
                f"{how}; no interval: in {100 - 100 * usable.mean():.0f}% of them a reliability is"
                f" below {LEAST_RELIABLE:g}"
            ),
        }
    low, high = np.quantile(corrected[1:][usable], [LOWER, UPPER])
    how += "".join(
        f"; its end at {end:.2f} is beyond {limit}, where it is cut"
        for end, limit in ((low, -1), (high, 1))
        if abs(end) > 1
    )
    return {"value": corrected[0], "ci_low": max(low, -1.0), "ci_high": min(high, 1.0), "how": how}
