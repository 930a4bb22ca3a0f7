"""Comparisons from the primary estimates: contrasts of methods, base models and settings, new base
models, families of tests, odds ratios, Cliff's delta; "preserves" is in noninferiority.

Everything here takes Scores (changes of runs against their own base models) and influence.cells, or
rows of `estimates`, and gives rows of `estimates`. A contrast of runs is estimated like a mean
(estimation.estimate): its runs have signs, each setting has its own spread of runs, and prompts are
paired because every run moves the same units.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from scipy.stats import binomtest, false_discovery_control, mannwhitneyu

from driftbook.stats import estimation, intervals, terms
from driftbook.stats import influence as influence_
from driftbook.stats.confidence import UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.influence import Scores
from driftbook.stats.terms import AS_CONFIGURED, CHANGE, TRAINED
from driftbook.study.methods import METHODS
from driftbook.study.tables import ESTIMATES

DIFFERENCE, INTERACTION = "difference", "difference to the mean over base models"
OBJECTIVE = "sft instead of dpo, at equal learning rate and epochs"
RATE = "highest instead of lowest learning rate, at equal objective and epochs"
EPOCHS = "most instead of fewest epochs, at equal objective and learning rate"
NEW_BASE = "change against the base model, a new base model"
ODDS = "odds ratio against the base model"
FEWEST = 5  # answers of the rarer kind, below which the delta method's interval does not hold
DELTA, DELTA_BASE = "Cliff's delta", "Cliff's delta against the base model"
GROUPS = (AS_CONFIGURED, TRAINED)
RUN_COLUMNS = [
    "run_id",
    "base_model",
    "method",
    "setting",
    "cluster",
]  # what a contrast knows of a run
SAME = ["study", "notebook", "outcome", "benchmark", "judge"]


# ---- contrasts of runs
def contrast_of(scores: Scores, frame: pd.DataFrame) -> dict | None:
    """The estimate of sum(weight * score) over the rows of `frame` (RUN_COLUMNS and weight); None
    where no run has a score.
    """
    at = scores.at(frame["run_id"])
    if (at < 0).any() or len(frame) == 0:
        return estimation.incomplete(at) if (at >= 0).any() else None
    pool = frame["method"] + " of " + frame["base_model"]
    names = (frame["setting"] + " of " + pool, pool, frame["cluster"])
    codes = [pd.factorize(name)[0] for name in names]
    return estimation.estimate(scores, at, frame["weight"].to_numpy(float), *codes)["both"]


def _of(cells: pd.DataFrame, base_model: str, method: str, group: str) -> pd.DataFrame:
    """The runs of a cell, under their own base model, with their weights."""
    own = cells["base_model"].eq(base_model) & cells["method"].eq(method) & cells["group"].eq(group)
    return cells[own].assign(base_model=cells["pool"])[[*RUN_COLUMNS, "weight"]]


def _minus(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The runs of both with the weights of the difference; a run of both sides has one row."""
    both = pd.concat([one, other.assign(weight=-other["weight"])], ignore_index=True)
    return both.groupby(RUN_COLUMNS, sort=False, as_index=False)["weight"].sum()


def _rows(found: dict[tuple, dict | None], **labels: str) -> pd.DataFrame:
    """Estimates by (base_model, method, group, contrast) and, of a difference, the other side; what
    could not be estimated is left out.
    """
    names = ("base_model", "method", "group", "contrast", "against")
    keyed = (
        {**labels, **dict(zip(names, key, strict=False)), **value}
        for key, value in found.items()
        if value is not None
    )
    return complete(pd.DataFrame(keyed))


def _ordered(methods: Iterable[str]) -> list[str]:
    """Each method once, in the workbook's order, whatever that of the study file; those of other
    sources after them, so that a pair has one direction.
    """
    places = {method: place for place, method in enumerate(METHODS)}
    return sorted(dict.fromkeys(methods), key=lambda method: places.get(method, len(places)))


def between(
    scores: Scores, cells: pd.DataFrame, groups: Sequence[str] = GROUPS, **labels: str
) -> pd.DataFrame:
    """The difference of each pair of methods in the same group, per base model and over all of
    them.

    The row of `method` is its change less that of the method in `against`. Prompts cancel where
    both methods move them alike. A method that a base model lacks has no row there, and none over
    all.
    """
    found, cells = {}, cells[cells["group"].isin(groups)]
    for (base_model, group), part in cells.groupby(["base_model", "group"], sort=False):
        for method, other in combinations(_ordered(part["method"]), 2):
            runs = _minus(*(_of(part, base_model, name, group) for name in (method, other)))
            found[base_model, method, group, DIFFERENCE, other] = contrast_of(scores, runs)
    return _rows(found, **labels)


def interactions(
    scores: Scores, cells: pd.DataFrame, groups: Sequence[str] = GROUPS, **labels: str
) -> pd.DataFrame:
    """Method x base model: each base model's change less the mean over base models, for methods
    that every base model has; none for a single base model.
    """
    found, cells = {}, cells[cells["group"].isin(groups)]
    whole = cells[cells["base_model"].eq("all")]
    for method, group in whole[["method", "group"]].drop_duplicates().itertuples(index=False):
        everywhere = _of(cells, "all", method, group)
        bases = dict.fromkeys(everywhere["base_model"])
        for base_model in bases if len(bases) > 1 else ():
            runs = _minus(_of(cells, base_model, method, group), everywhere)
            found[base_model, method, group, INTERACTION] = contrast_of(scores, runs)
    return _rows(found, **labels)


def settings(scores: Scores, arms: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The effects of a method's settings: objective, highest against lowest learning rate, most
    against fewest epochs, each at equal other settings.

    Per base model, and over all of them where each has the contrast. Matched pairs of settings
    weigh the same, and so do the runs of a setting.
    """
    runs, found = arms[arms["arm"].isin([TRAINED, terms.NO_OP])], {}
    questions = {
        OBJECTIVE: ("objective", ["learning_rate", "epochs"]),
        RATE: ("learning_rate", ["objective", "epochs"]),
        EPOCHS: ("epochs", ["objective", "learning_rate"]),
    }
    for method, own in runs.groupby("method", sort=False):
        bases = list(own.groupby("base_model", sort=False))
        for contrast, question in questions.items():
            parts = {base: _matched(part, *question) for base, part in bases}
            every = [part.assign(weight=part["weight"] / len(parts)) for part in parts.values()]
            if all(map(len, every)) and set(parts) == set(arms["base_model"]):
                parts["all"] = pd.concat(every)
            for base, part in parts.items():
                found[base, method, AS_CONFIGURED, contrast] = contrast_of(scores, part)
    return _rows(found, **labels)


def _matched(runs: pd.DataFrame, name: str, equal: list[str]) -> pd.DataFrame:
    """The runs at the highest and the lowest level of `name` among those with the other settings
    `equal`, with their weights.
    """
    parts = [runs[:0].assign(weight=0.0)]
    for _, own in runs.groupby(equal, dropna=False, sort=False):
        levels = sorted(own[name].dropna().unique())
        for level, sign in ((levels[-1], 1), (levels[0], -1)) if len(levels) > 1 else ():
            at = own[own[name].eq(level)]
            parts.append(at.assign(weight=sign / len(at)))
    found = pd.concat(parts)[[*RUN_COLUMNS, "weight"]]
    return found.assign(weight=found["weight"] / max((len(parts) - 1) / 2, 1))


def new_base(estimates: pd.DataFrame) -> pd.DataFrame:
    """For each method, the change to expect on another base model like these: the mean over base
    models with its t prediction interval.

    With B base models the interval is mean +- t(B - 1) sqrt(s^2 (1 + 1 / B)), s^2 their variance:
    of the change that would be measured, with as many runs and prompts as here. With one base model
    nothing is known of another.
    """
    own = estimates["base_model"].ne("all") & estimates["group"].isin(GROUPS)
    rows, keys = estimates[own & estimates["contrast"].eq(CHANGE)], [*SAME, "method", "group"]
    found = [
        dict(zip(keys, key, strict=True)) | _predicted(part)
        for key, part in rows.groupby(keys, sort=False)
    ]
    population = "a new base model like these; seeds and prompts as here"
    names = {"base_model": "all", "contrast": NEW_BASE, "population": population}
    return complete(pd.DataFrame(found).assign(**names)) if found else ESTIMATES.empty()


def _predicted(own: pd.DataFrame) -> dict:
    """The mean of the base models' changes with its prediction interval."""
    values = own["value"].dropna().to_numpy(float)
    n, limit = len(values), 100.0 if "percent" in own["outcome"].iloc[0] else np.inf
    counts = {name: own[name].sum() for name in ("n_runs", "n_unscored")}
    line = {**counts, "n_items": own["n_items"].max(), "value": values.mean() if n else None}
    if n < 2:
        how = f"{n} base model: nothing is known of how base models differ, so no interval"
        return line | {"how": how}
    se = np.sqrt(values.var(ddof=1) * (1 + 1 / n))
    half, mean = stdtrit(n - 1, UPPER) * se, values.mean()
    ends = {"ci_low": max(mean - half, -limit), "ci_high": min(mean + half, limit)}
    how = f"mean over {n} base models, t prediction interval, {n - 1} df"
    return line | {"se": se, **ends, "how": how}


# ---- families of tests
def declared(rows: pd.DataFrame, names: str | pd.Series) -> pd.DataFrame:
    """The rows as a declared family of tests, or each as one of the family that is named for it:
    p_adjusted by Holm's method (1979). A row without a p value stays so, but counts: it was
    declared.
    """

    def adjusted(p: np.ndarray, untested: int) -> np.ndarray:  # as if those had p = 1
        return intervals.holm(np.append(p, np.ones(untested)))[: len(p)]

    return _adjusted(rows, names, adjusted)


def screen(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows as a screen: p_adjusted by Benjamini and Hochberg (1995), the false discovery rate.
    Rows without a p value do not count.
    """
    return _adjusted(rows, name, lambda p, _: false_discovery_control(p) if len(p) else p)


def _adjusted(rows: pd.DataFrame, names: str | pd.Series, adjust) -> pd.DataFrame:
    rows = rows.assign(family_of_tests=names)
    p, adjusted = rows["p"].to_numpy(float, na_value=np.nan), np.full(len(rows), np.nan)
    for members in rows.groupby("family_of_tests").indices.values():
        known = members[~np.isnan(p[members])]
        adjusted[known] = adjust(p[known], len(members) - len(known))
    return ESTIMATES.check(rows.assign(p_adjusted=adjusted)) if len(rows) else rows


def screens(estimates: pd.DataFrame) -> pd.DataFrame:
    """All changes by category or dimension; each outcome, benchmark, judge and base model is one
    screen, with all methods and categories in it.
    """
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].eq(terms.CATEGORY)]
    of_each = rows.groupby(["outcome", "benchmark", "judge", "base_model"], sort=False)
    return ESTIMATES.concat([screen(own, "screen of " + ", ".join(key)) for key, own in of_each])


# ---- odds ratios
def odds_ratios(
    values: pd.DataFrame,
    arms: pd.DataFrame,
    cells: pd.DataFrame,
    groups: Sequence[str] = GROUPS,
    **labels: str,
) -> pd.DataFrame:
    """Marginal (population-averaged) odds ratio of each cell against the base model; `values` is
    runs x units as for influence.paired.

    The odds are those of the mean rate over runs, on the prompts that run and base both have a
    score for; over all base models it is the geometric mean of their ratios. The interval is the
    primary one's on the log odds, by the delta method (Zeger, Liang and Albert 1988, Biometrics 44,
    1049, for what "marginal" means). se is that of the logarithm. A cell or base model at 0 or 100
    percent has no odds ratio, nor has one with fewer than FEWEST answers of a kind: null, and `how`
    says which.
    """
    found, changes = {}, influence_.paired(values, arms)
    own, base = (_on_both(values, arms, changes, own=own) for own in (True, False))
    keys, cells = ["base_model", "method", "group"], cells[cells["group"].isin(groups)]
    for key, cell in cells.groupby(keys, sort=False):
        found[*key, ODDS] = _odds_ratio(changes, own, base, _of(cell, *key))
    return _rows(found, **labels)


def _on_both(values: pd.DataFrame, arms: pd.DataFrame, changes: Scores, own: bool) -> Scores:
    """The rate of each run, or of its base model, on the prompts that both have a score for, in
    percent.
    """
    base = arms.set_index("run_id").loc[changes.runs, "base_run_id"]
    names = (changes.runs, base) if own else (base, changes.runs)
    of, other = (values.loc[list(one)].to_numpy() for one in names)
    both = ~np.isnan(of) & ~np.isnan(other)
    kept = (changes.runs, changes.strata, changes.n_items, changes.n_unscored)
    return influence_.ratio(np.where(both, of, 0.0), both.astype(float), *kept)


def _odds_ratio(changes: Scores, own: Scores, base: Scores, cell: pd.DataFrame) -> dict | None:
    """The odds ratio of one cell; each run has its linear share in the log odds."""
    at = changes.at(cell["run_id"])
    if (at < 0).any():
        return estimation.incomplete(at) if (at >= 0).any() else None
    total = cell.groupby("base_model")["weight"].transform("sum").to_numpy()
    weight, bases = cell["weight"].to_numpy() / total, pd.factorize(cell["base_model"])[0]
    p, q = (np.bincount(bases, weight * scores.value[at])[bases] / 100 for scores in (own, base))
    how, end = None, (p <= 0) | (p >= 1) | (q <= 0) | (q >= 1)
    if np.isnan(p).any() or np.isnan(q).any():
        how = "a run has no scored item: no estimate"
    elif end.any():
        where = cell["base_model"].to_numpy()[end][0]
        how = (
            f"the runs or the base model {where} are at 0 or 100 percent, where odds have no ratio"
        )
        how += "; see the difference"
    elif _rarest(changes, at, bases, p, q) < FEWEST:
        how = f"fewer than {FEWEST} answers of one kind, too few for odds; see the difference"
    if how:
        n_items, n_unscored = int(changes.n_items[at].max()), int(changes.n_unscored[at].sum())
        counts = {"n_runs": len(at), "n_items": n_items, "n_unscored": n_unscored}
        return {**counts, "value": None, "population": terms.BOTH, "how": how}
    slope, base_slope = 1 / (100 * p * (1 - p)), 1 / (100 * q * (1 - q))
    logit = np.log(p / (1 - p)) - np.log(q / (1 - q)) + slope * (own.value[at] - 100 * p)
    moved = slope[:, None] * own.influence[at] - base_slope[:, None] * base.influence[at]
    counts = (changes.n_items[at], changes.n_unscored[at])
    linear = Scores(changes.runs[at], changes.strata, logit, moved, *counts, family=changes.family)
    found, names = contrast_of(linear, cell), ("value", "ci_low", "ci_high")
    ends = {name: None if found[name] is None else np.exp(found[name]) for name in names}
    how = "marginal odds ratio, delta method on the log odds; " + found["how"]
    return {**found, **ends, "how": how}


def _rarest(
    changes: Scores, at: np.ndarray, bases: np.ndarray, own: np.ndarray, base: np.ndarray
) -> float:
    """The smallest number of answers of the rarer kind among the runs of a base model, taken
    together, and among its own answers.
    """
    n = changes.n_items[at] - changes.n_unscored[at]
    counts = [
        np.minimum(own, 1 - own) * np.bincount(bases, n)[bases],
        np.minimum(base, 1 - base) * n,
    ]
    return float(np.min(counts))


# ---- Cliff's delta
def cliffs_delta(
    scores: Scores, cells: pd.DataFrame, groups: Sequence[str] = GROUPS, **labels: str
) -> pd.DataFrame:
    """How often a run of one method lies above a run of another, less how often below (-1 to 1);
    and of each method above less below its base model.

    Per base model; over all, the mean of the base models' deltas, since runs of different base
    models are not compared. Runs are what varies: the prompts are these.
    """
    found, cells = {}, cells[cells["group"].isin(groups)]
    for (base_model, group), part in cells.groupby(["base_model", "group"], sort=False):
        runs = {method: _of(part, base_model, method, group) for method in _ordered(part["method"])}
        for method, own in runs.items():
            found[base_model, method, group, DELTA_BASE] = _delta(scores, own, None)
        for method, other in combinations(runs, 2):
            delta = _delta(scores, runs[method], runs[other])
            found[base_model, method, group, DELTA, other] = delta
    return _rows(found, **labels)


def _delta(scores: Scores, own: pd.DataFrame, other: pd.DataFrame | None) -> dict | None:
    """The mean delta over the base models of `own`, joined by MOVER."""
    sides, parts = [own] if other is None else [own, other], []
    for base_model in dict.fromkeys(own["base_model"]):
        runs = [side.loc[side["base_model"].eq(base_model), "run_id"] for side in sides]
        values = [scores.of(some) for some in runs]
        if np.isnan(np.concatenate(values)).any():
            return None
        parts.append(one_sample(*values) if other is None else two_samples(*values))
    population = "runs like these, these prompts, these base models"
    found = {"n_runs": sum(map(len, sides)), "population": population}
    if len(parts) == 1:
        return found | parts[0]
    found["value"] = value = np.mean([part["value"] for part in parts])
    if any(part["ci_low"] is None for part in parts):
        return found | {"how": "mean over base models; one of them has no interval"}
    low, high = (
        np.sqrt(sum((part["value"] - part[end]) ** 2 for part in parts)) / len(parts)
        for end in ("ci_low", "ci_high")
    )
    ends = {"ci_low": max(value - low, -1.0), "ci_high": min(value + high, 1.0)}
    return found | ends | {"how": "mean over base models of Cliff's delta, joined by MOVER"}


def two_samples(x: np.ndarray, y: np.ndarray) -> dict[str, float | str | None]:
    """Cliff's delta of two groups of runs: value, se, ci_low, ci_high, p (of the Mann-Whitney test,
    exact without ties) and how.

    Unbiased variance and asymmetric interval of Feng and Cliff (2004, Journal of Modern Applied
    Statistical Methods 3, 322; Cliff 1996), with t at n + m - 2. Where all runs of one lie above
    all of the other the variance is zero whatever is true; the interval is then Wilson's of n out
    of n runs of the smaller group, delta being 2 p - 1.
    """
    n, m, sign = len(x), len(y), np.sign(x[:, None] - y[None, :])
    d = sign.mean()
    exact = comb(n + m, n) < 1e6 and len({*x, *y}) == n + m  # no ties
    method = "exact" if exact else "asymptotic"
    p = mannwhitneyu(x, y, method=method).pvalue if np.ptp([*x, *y]) else 1.0
    if min(n, m) < 2:
        return _no_delta_interval(d, p, "Cliff's delta; one run in a group: no interval")
    if abs(d) == 1:
        return _separated(d, min(n, m), p, f"all {n} runs lie on one side of all {m}")
    rows, columns = sign.mean(1) - d, sign.mean(0) - d
    variance = (m**2 * (rows**2).sum() + n**2 * (columns**2).sum() - ((sign - d) ** 2).sum()) / (
        n * m * (n - 1) * (m - 1)
    )
    variance = max(variance, (1 - d**2) / (n * m - 1))
    return _asymmetric(d, variance, n + m - 2, p, "Cliff's delta, Feng and Cliff's interval")


def one_sample(x: np.ndarray) -> dict[str, float | str | None]:
    """The share of runs above zero less the share below: value, se, ci_low, ci_high, p (of the
    exact sign test) and how.
    """
    n, sign = len(x), np.sign(x)
    d, moved = sign.mean(), int((sign != 0).sum())
    p = binomtest(int((sign > 0).sum()), moved).pvalue if moved else 1.0
    if n < 2:
        return _no_delta_interval(d, p, "share above less share below; one run: no interval")
    if abs(d) == 1:
        return _separated(d, n, p, f"all {n} runs moved the same way")
    if moved == 0:
        how = f"none of {n} runs differs from the base model: no interval"
        return _no_delta_interval(d, p, how)
    how = "share of runs above less share below the base model, Feng and Cliff's interval"
    return _asymmetric(d, sign.var(ddof=1) / n, n - 1, p, how)


def _no_delta_interval(d: float, p: float, how: str) -> dict[str, float | str | None]:
    return intervals.NO_INTERVAL | {"value": d, "p": p, "how": how}


def _separated(d: float, n: int, p: float, why: str) -> dict[str, float | str | None]:
    """The interval of a delta of -1 or 1 among n runs: Wilson's of n out of n."""
    nearer = 2 * float(intervals.wilson(n, n)[0]) - 1
    low, high = (nearer, 1.0) if d > 0 else (-1.0, -nearer)
    how = f"Cliff's delta; {why}, Wilson's bound at {n} runs"
    return {"value": d, "se": None, "ci_low": low, "ci_high": high, "p": p, "how": how}


def _asymmetric(
    d: float, variance: float, df: int, p: float, how: str
) -> dict[str, float | str | None]:
    """Feng and Cliff's interval: the t interval, bent so that it stays within -1 and 1."""
    t2 = stdtrit(df, UPPER) ** 2 * variance
    half = np.sqrt(t2 * ((1 - d**2) ** 2 + t2))
    low, high = ((d - d**3 + sign * half) / (1 - d**2 + t2) for sign in (-1, 1))
    ends = {"ci_low": max(low, -1.0), "ci_high": min(high, 1.0)}
    return {"value": d, "se": np.sqrt(variance), **ends, "p": p, "how": how}
