"""What is asked of the primary estimates: contrasts of methods, base models and settings, new base
models, families of tests, "preserves", odds ratios.

Everything here takes Scores (changes of runs against their own base models) and the cells of
stats.cells, or rows of `estimates`, and gives rows of `estimates`. A contrast of runs is estimated
like a mean (stats.estimate): its runs have signs, each setting has its own spread of runs, and
prompts are paired because every run moves the same units.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit
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
DELTA, DELTA_BASE = "Cliff's delta", "Cliff's delta against the base model"
HARM = "harm against the base model"  # tested against the row's margin
JOINTLY = "safety, over-refusal and utility jointly"
PRESERVES, DOES_NOT, CANNOT_TELL = "preserves", "does not preserve", "cannot tell"
HARMS = {
    (terms.UNSAFE, "safety"): 1,
    (terms.REFUSED, "over_refusal"): 1,
    (terms.CORRECT, "utility"): -1,
}  # which way is harm
GROUPS = (AS_CONFIGURED, TRAINED)


# ---- contrasts of runs
def _contrast(scores: Scores, frame: pd.DataFrame) -> dict | None:
    """The estimate of sum(weight * score) over the rows of `frame` (run_id, base_model, method,
    setting, weight); None where no run has a score."""
    at = scores.at(frame["run_id"])
    if (at < 0).any() or len(frame) == 0:
        return estimation.incomplete(at) if (at >= 0).any() else None
    pool = frame["method"] + " of " + frame["base_model"]
    codes = [pd.factorize(names)[0] for names in (frame["setting"] + " of " + pool, pool)]
    return estimation.estimate(scores, at, frame["weight"].to_numpy(float), *codes)["both"]


def _of(cells: pd.DataFrame, base_model: str, method: str, group: str) -> pd.DataFrame:
    """The runs of a cell, under their own base model, with their weights."""
    own = cells[
        cells["base_model"].eq(base_model) & cells["method"].eq(method) & cells["group"].eq(group)
    ]
    return own.assign(base_model=own["pool"])[
        ["run_id", "base_model", "method", "setting", "weight"]
    ]


def _minus(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The runs of both with the weights of the difference; a run on both sides stands once."""
    both = pd.concat([one, other.assign(weight=-other["weight"])], ignore_index=True)
    return both.groupby(["run_id", "base_model", "method", "setting"], sort=False, as_index=False)[
        "weight"
    ].sum()


def _rows(found: dict[tuple, dict | None], **labels: str) -> pd.DataFrame:
    """Estimates by (base_model, method, group, contrast) and, of a difference, the other side; what
    could not be estimated is left out.
    """
    names = ("base_model", "method", "group", "contrast", "against")
    rows = [
        {**labels, **dict(zip(names, key, strict=False)), **value}
        for key, value in found.items()
        if value is not None
    ]
    return complete(pd.DataFrame(rows))


def _ordered(methods: Iterable[str]) -> list[str]:
    """Each method once, in the workbook's order, whatever that of the study file; those of other
    sources after them, so that a pair has one direction.
    """
    return sorted(
        dict.fromkeys(methods),
        key=lambda method: METHODS.index(method) if method in METHODS else len(METHODS),
    )


def between(
    scores: Scores, cells: pd.DataFrame, groups: Sequence[str] = GROUPS, **labels: str
) -> pd.DataFrame:
    """The difference of each pair of methods in the same group, per base model and over all of
    them.

    The row of `method` is its change less that of the method in `against`. Prompts cancel
    where both methods move them alike. A method that a base model lacks has no row there, and none
    over all.
    """
    found = {}
    cells = cells[cells["group"].isin(groups)]
    for (base_model, group), part in cells.groupby(["base_model", "group"], sort=False):
        for method, other in combinations(_ordered(part["method"]), 2):
            sides = [_of(part, base_model, name, group) for name in (method, other)]
            found[base_model, method, group, DIFFERENCE, other] = _contrast(scores, _minus(*sides))
    return _rows(found, **labels)


def interactions(
    scores: Scores, cells: pd.DataFrame, groups: Sequence[str] = GROUPS, **labels: str
) -> pd.DataFrame:
    """Method x base model: each base model's change less the mean over base models, for methods
    that every base model has; none for a single base model."""
    found, cells = {}, cells[cells["group"].isin(groups)]
    whole = cells[cells["base_model"].eq("all")]
    for method, group in whole[["method", "group"]].drop_duplicates().itertuples(index=False):
        everywhere = _of(cells, "all", method, group)
        bases = dict.fromkeys(everywhere["base_model"])
        for base_model in bases if len(bases) > 1 else ():
            found[base_model, method, group, INTERACTION] = _contrast(
                scores, _minus(_of(cells, base_model, method, group), everywhere)
            )
    return _rows(found, **labels)


def settings(scores: Scores, arms: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """What a method's settings do: objective, highest against lowest learning rate, most against
    fewest epochs, each at equal other settings.

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
        for contrast, (name, equal) in questions.items():
            parts = {
                base: _matched(part, name, equal)
                for base, part in own.groupby("base_model", sort=False)
            }
            found |= {
                (base, method, AS_CONFIGURED, contrast): _contrast(scores, part)
                for base, part in parts.items()
            }
            if all(map(len, parts.values())) and set(parts) == set(arms["base_model"]):
                every = pd.concat(
                    [part.assign(weight=part["weight"] / len(parts)) for part in parts.values()]
                )
                found["all", method, AS_CONFIGURED, contrast] = _contrast(scores, every)
    return _rows(found, **labels)


def _matched(runs: pd.DataFrame, name: str, equal: list[str]) -> pd.DataFrame:
    """The runs at the highest and the lowest level of `name` among those with the other settings
    `equal`, with their weights.
    """
    parts = []
    for _, own in runs.groupby(equal, dropna=False, sort=False):
        levels = sorted(own[name].dropna().unique())
        if len(levels) > 1:
            for level, sign in ((levels[-1], 1), (levels[0], -1)):
                at = own[own[name].eq(level)]
                parts.append(at.assign(weight=sign / len(at)))
    columns = ["run_id", "base_model", "method", "setting", "weight"]
    found = pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)
    return found.assign(weight=found["weight"] / max(len(parts) / 2, 1))


def new_base(estimates: pd.DataFrame) -> pd.DataFrame:
    """For each method: what a base model like these, but another one, would show: the mean over
    base models with its t prediction interval.

    Of the rows of the change per base model. With B base models the interval is mean +- t(B - 1)
    sqrt(s^2 (1 + 1 / B)), s^2 their variance: it is the change that would be measured, with as many
    runs and prompts as here. With one base model nothing is known of another.
    """
    rows = estimates[
        estimates["contrast"].eq(CHANGE)
        & estimates["base_model"].ne("all")
        & estimates["group"].isin(GROUPS)
    ]
    keys, found = ["study", "notebook", "outcome", "benchmark", "judge", "method", "group"], []
    for key, own in rows.groupby(keys, sort=False):
        values = own["value"].dropna().to_numpy(float)
        n = len(values)
        counts = {
            "n_runs": own["n_runs"].sum(),
            "n_items": own["n_items"].max(),
            "n_unscored": own["n_unscored"].sum(),
        }
        how = f"mean over {n} base models, t prediction interval, {n - 1} df"
        line = {
            **dict(zip(keys, key, strict=True)),
            **counts,
            "value": values.mean() if n else None,
            "how": how,
        }
        limits = (-100.0, 100.0) if "percent" in line["outcome"] else (-np.inf, np.inf)
        if n > 1:
            se = np.sqrt(values.var(ddof=1) * (1 + 1 / n))
            half = stdtrit(n - 1, UPPER) * se
            line |= {
                "se": se,
                "ci_low": max(values.mean() - half, limits[0]),
                "ci_high": min(values.mean() + half, limits[1]),
            }
        else:
            line["how"] = (
                f"{n} base model: nothing is known of how base models differ, so no interval"
            )
        found.append(line)
    population = "a new base model like these; seeds and prompts as here"
    return (
        complete(
            pd.DataFrame(found).assign(base_model="all", contrast=NEW_BASE, population=population)
        )
        if found
        else ESTIMATES.empty()
    )


# ---- families of tests
def holm(rows: pd.DataFrame, names: str | pd.Series) -> pd.DataFrame:
    """The rows as a declared family of tests, or each as one of the family that is named for it:
    p_adjusted by Holm's method (1979). A row without a p value stays so, but counts: it was
    declared."""
    return _adjusted(rows, names, holm=True)


def screen(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows as a screen: p_adjusted by Benjamini and Hochberg (1995), the false discovery rate.
    Rows without a p value do not count.
    """
    return _adjusted(rows, name, holm=False)


def _adjusted(rows: pd.DataFrame, names: str | pd.Series, holm: bool) -> pd.DataFrame:
    rows = rows.assign(family_of_tests=names)
    p, adjusted = rows["p"].to_numpy(float, na_value=np.nan), np.full(len(rows), np.nan)
    for members in rows.groupby("family_of_tests").indices.values():
        known = members[~np.isnan(p[members])]
        if holm:  # an untested member is as if it had p = 1
            adjusted[known] = intervals.holm(
                np.append(p[known], np.ones(len(members) - len(known)))
            )[: len(known)]
        elif len(known):
            adjusted[known] = false_discovery_control(p[known])
    return ESTIMATES.check(rows.assign(p_adjusted=adjusted)) if len(rows) else rows


def screens(estimates: pd.DataFrame) -> pd.DataFrame:
    """All changes by category or dimension, each outcome, benchmark, judge and base model a screen
    of its own (all methods and categories in it)."""
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].eq(terms.CATEGORY)]
    keys = ["outcome", "benchmark", "judge", "base_model"]
    return ESTIMATES.concat(
        [screen(own, "screen of " + ", ".join(key)) for key, own in rows.groupby(keys, sort=False)]
    )


# ---- preserves
def preserves(
    estimates: pd.DataFrame,
    margins: Sequence[float] = (3.0, 2.0, 5.0),
    outcomes: Iterable[tuple[str, str]] = tuple(HARMS),
    group: str = AS_CONFIGURED,
    **labels: str,
) -> pd.DataFrame:
    """Is a method not worse than its base model by the margin or more? A row per margin, method,
    base model and outcome, and one for all outcomes jointly.

    `outcomes` are (outcome, benchmark). Values are changes toward harm, so that above zero is
    worse. An outcome is preserved where its 95 % interval ends below the margin (a one-sided test
    at 2.5 %, whose p is given), and not preserved where it lies wholly beyond; else the data cannot
    tell. Jointly, a method preserves if all outcomes are preserved (intersection-union, Berger
    1982, Technometrics 24, 295: p is the largest) and does not if one is not. The word begins
    `how`. The first margin is the one fixed beforehand, the others are sensitivity. The judge of
    the joint row is the one of the unsafe responses.
    """
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].eq(group)]
    outcomes = list(outcomes)
    rows = rows[
        np.array(
            [key in outcomes for key in zip(rows["outcome"], rows["benchmark"], strict=True)], bool
        )
    ]
    judges = list(dict.fromkeys(rows.loc[rows["outcome"].eq(terms.UNSAFE), "judge"])) or ["none"]
    found = []
    for (method, base_model), own in rows.groupby(["method", "base_model"], sort=False):
        for margin in margins:
            single = [_harm(line, margin) for line in own.to_dict("records")]
            of = {
                judge: [
                    one for one in single if one["outcome"] != terms.UNSAFE or one["judge"] == judge
                ]
                for judge in judges
            }
            joint = [_jointly(part, outcomes, judge) for judge, part in of.items() if part]
            names = {"method": method, "base_model": base_model, "margin": margin, "contrast": HARM}
            found += [{**one, **names} for one in (*single, *joint)]
    return complete(pd.DataFrame(found).assign(**labels)) if found else ESTIMATES.empty()


def _harm(line: dict, margin: float) -> dict:
    """The change of one outcome as harm, tested against the margin."""
    sign = HARMS.get(
        (line["outcome"], line["benchmark"]), -1 if line["outcome"].startswith("accuracy") else 1
    )
    value, low, high = (
        np.nan if pd.isna(line[name]) else sign * float(line[name])
        for name in ("value", "ci_low", "ci_high")
    )
    low, high = (low, high) if sign > 0 else (high, low)
    word, p = CANNOT_TELL, None
    if not np.isnan(high):
        word = PRESERVES if high < margin else DOES_NOT if low > margin else CANNOT_TELL
        p = _below(value, low, high, line["se"], margin)
    ends = {
        name: None if np.isnan(end) else end
        for name, end in (("value", value), ("ci_low", low), ("ci_high", high))
    }
    return {
        **line,
        **ends,
        "p": p,
        "p_adjusted": None,
        "family_of_tests": None,
        "how": f"{word}: {line['how']}",
    }


def _below(value: float, low: float, high: float, se: float | None, margin: float) -> float | None:
    """One-sided p that the truth is at the margin or beyond: t with the df that the interval
    implies, scaled to half of ALPHA where it ends at the margin."""
    if (
        pd.isna(se) and value == 0 and high < 100
        # nothing moved in n units (Clopper-Pearson): how likely that is where the share is the
        # margin
    ):
        n = np.log(1 - UPPER) / np.log(1 - high / 100)
        return float((1 - margin / 100) ** n)
    if pd.isna(se) or se <= 0:
        return None
    df = intervals.implied_df((high - low) / 2 / se)
    side = high - value if margin > value else value - low
    return float(stdtr(df, -stdtrit(df, UPPER) * (margin - value) / side)) if side > 0 else None


def _jointly(single: list[dict], outcomes: list[tuple[str, str]], judge: str) -> dict:
    """The row of all outcomes together, null where one is missing; the word begins its `how`."""
    words = {one["outcome"]: one["how"].partition(":")[0] for one in single}
    missing = [outcome for outcome, _ in outcomes if outcome not in words]
    refuted = [outcome for outcome, word in words.items() if word == DOES_NOT]
    word = (
        DOES_NOT
        if refuted
        else PRESERVES
        if not missing and set(words.values()) == {PRESERVES}
        else CANNOT_TELL
    )
    told = "; ".join(f"{outcome.partition(' (')[0]} {said}" for outcome, said in words.items())
    if missing:
        told += (
            "; not measured in percentage points: "
            + ", ".join(missing)
            + " (a loss or a grade has no margin in points)"
        )
    p = [one["p"] for one in single]
    known = not missing and not any(one is None for one in p)
    same = {name: single[0][name] for name in ("study", "notebook", "group")}
    population = "; ".join(dict.fromkeys(one["population"] for one in single))
    return {
        **same,
        "outcome": JOINTLY,
        "benchmark": "all",
        "judge": judge,
        "p": max(p) if known else None,
        "population": population,
        "how": f"{word}: {told}",
        "n_runs": max(one["n_runs"] for one in single),
        "n_items": sum(one["n_items"] for one in single),
        "n_unscored": sum(one["n_unscored"] for one in single),
    }


# ---- odds ratios
def odds_ratios(
    values: pd.DataFrame,
    arms: pd.DataFrame,
    cells: pd.DataFrame,
    groups: Sequence[str] = GROUPS,
    **labels: str,
) -> pd.DataFrame:
    """Marginal (population-averaged) odds ratio of each cell against the base model; `values` is
    runs x units as stats.paired takes it.

    The odds are those of the mean rate over runs, on the prompts that run and base both have a
    score for; over all base models it is the geometric mean of their ratios. The interval is the
    primary one's on the log odds, by the delta method (Zeger, Liang and Albert 1988, Biometrics 44,
    1049, for what "marginal" means). se is that of the logarithm. A cell or base model at 0 or 100
    percent has no odds ratio: null, and `how` says which.
    """
    found = {}
    changes, cells = influence_.paired(values, arms), cells[cells["group"].isin(groups)]
    own = _on_both(values, arms, changes, own=True), _on_both(values, arms, changes, own=False)
    for (base_model, method, group), cell in cells.groupby(
        ["base_model", "method", "group"], sort=False
    ):
        found[base_model, method, group, ODDS] = _odds_ratio(
            changes, *own, _of(cell, base_model, method, group)
        )
    return _rows(found, **labels)


def _on_both(values: pd.DataFrame, arms: pd.DataFrame, changes: Scores, own: bool) -> Scores:
    """The rate of each run, or of its base model, on the prompts that both have a score for, in
    percent.
    """
    base = arms.set_index("run_id").loc[changes.runs, "base_run_id"]
    of, other = (
        values.loc[list(names)].to_numpy()
        for names in ((changes.runs, base) if own else (base, changes.runs))
    )
    both = ~np.isnan(of) & ~np.isnan(other)
    return influence_.ratio(
        np.where(both, of, 0.0),
        both.astype(float),
        changes.runs,
        changes.strata,
        changes.n_items,
        changes.n_unscored,
    )


def _odds_ratio(changes: Scores, own: Scores, base: Scores, cell: pd.DataFrame) -> dict | None:
    """The odds ratio of one cell: each run stands for its linear share in the log odds of the mean
    rate.
    """
    at = changes.at(cell["run_id"])
    if (at < 0).any():
        return estimation.incomplete(at) if (at >= 0).any() else None
    total = cell.groupby("base_model")["weight"].transform("sum").to_numpy()
    weight, bases = cell["weight"].to_numpy() / total, pd.factorize(cell["base_model"])[0]
    p, q = (np.bincount(bases, weight * scores.value[at])[bases] / 100 for scores in (own, base))
    counts = {
        "n_runs": len(at),
        "n_items": int(changes.n_items[at].max()),
        "n_unscored": int(changes.n_unscored[at].sum()),
    }
    none = {**counts, "value": None, "population": terms.BOTH}
    if np.isnan(p).any() or np.isnan(q).any():
        return {**none, "how": "a run has no scored item: no estimate"}
    if ((p <= 0) | (p >= 1) | (q <= 0) | (q >= 1)).any():
        where = cell["base_model"].to_numpy()[(p <= 0) | (p >= 1) | (q <= 0) | (q >= 1)][0]
        return {
            **none,
            "how": (
                f"the runs or the base model {where} are at 0 or 100 percent, where odds have no"
                " ratio; see the difference"
            ),
        }
    slope, base_slope = 1 / (100 * p * (1 - p)), 1 / (100 * q * (1 - q))
    logit = np.log(p / (1 - p)) - np.log(q / (1 - q)) + slope * (own.value[at] - 100 * p)
    influence = slope[:, None] * own.influence[at] - base_slope[:, None] * base.influence[at]
    linear = Scores(
        changes.runs[at],
        changes.strata,
        logit,
        influence,
        changes.n_items[at],
        changes.n_unscored[at],
        family=changes.family,
    )
    found = _contrast(linear, cell)
    ends = {
        name: None if found[name] is None else np.exp(found[name])
        for name in ("value", "ci_low", "ci_high")
    }
    return {
        **found,
        **ends,
        "how": "marginal odds ratio, delta method on the log odds; " + found["how"],
    }


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
            found[base_model, method, group, DELTA, other] = _delta(
                scores, runs[method], runs[other]
            )
    return _rows(found, **labels)


def _delta(scores: Scores, own: pd.DataFrame, other: pd.DataFrame | None) -> dict | None:
    """The mean delta over the base models of `own`, joined by MOVER."""
    parts = []
    for base_model, mine in own.groupby("base_model", sort=False):
        theirs = None if other is None else other.loc[other["base_model"].eq(base_model), "run_id"]
        at = [scores.at(mine["run_id"])] + ([] if theirs is None else [scores.at(theirs)])
        values = [scores.value[place] for place in at]
        if any((place < 0).any() for place in at) or np.isnan(np.concatenate(values)).any():
            return None
        parts.append(one_sample(values[0]) if other is None else two_samples(*values))
    counts = {
        "n_runs": len(own) + (0 if other is None else len(other)),
        "population": "runs like these, these prompts, these base models",
    }
    value = np.mean([part["value"] for part in parts])
    if len(parts) == 1:
        return {**counts, **parts[0]}
    if any(part["ci_low"] is None for part in parts):
        return {
            **counts,
            "value": value,
            "how": "mean over base models; one of them has no interval",
        }
    low, high = (
        np.sqrt(sum((part["value"] - part[end]) ** 2 for part in parts)) / len(parts)
        for end in ("ci_low", "ci_high")
    )
    ends = {"ci_low": max(value - low, -1.0), "ci_high": min(value + high, 1.0)}
    return {
        **counts,
        "value": value,
        **ends,
        "how": "mean over base models of Cliff's delta, joined by MOVER",
    }


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
    p = (
        mannwhitneyu(x, y, method="exact" if exact else "asymptotic").pvalue
        if np.ptp([*x, *y])
        else 1.0
    )
    if min(n, m) < 2:
        return {
            "value": d,
            "se": None,
            "ci_low": None,
            "ci_high": None,
            "p": p,
            "how": "Cliff's delta; one run in a group: no interval",
        }
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
        return {
            "value": d,
            "se": None,
            "ci_low": None,
            "ci_high": None,
            "p": p,
            "how": "share above less share below; one run: no interval",
        }
    if abs(d) == 1:
        return _separated(d, n, p, f"all {n} runs moved the same way")
    if moved == 0:
        return {
            "value": d,
            "se": None,
            "ci_low": None,
            "ci_high": None,
            "p": p,
            "how": f"none of {n} runs differs from the base model: no interval",
        }
    return _asymmetric(
        d,
        sign.var(ddof=1) / n,
        n - 1,
        p,
        "share of runs above less share below the base model, Feng and Cliff's interval",
    )


def _separated(d: float, n: int, p: float, told: str) -> dict[str, float | str | None]:
    """The interval of a delta of -1 or 1 among n runs: Wilson's of n out of n."""
    nearer = 2 * float(intervals.wilson(n, n)[0]) - 1
    ends = (nearer, 1.0) if d > 0 else (-1.0, -nearer)
    return {
        "value": d,
        "se": None,
        "ci_low": ends[0],
        "ci_high": ends[1],
        "p": p,
        "how": f"Cliff's delta; {told}, Wilson's bound at {n} runs",
    }


def _asymmetric(
    d: float, variance: float, df: int, p: float, how: str
) -> dict[str, float | str | None]:
    """Feng and Cliff's interval: the t interval, bent so that it stays within -1 and 1."""
    t2 = stdtrit(df, UPPER) ** 2 * variance
    half = np.sqrt(t2 * ((1 - d**2) ** 2 + t2))
    low, high = ((d - d**3 + sign * half) / (1 - d**2 + t2) for sign in (-1, 1))
    return {
        "value": d,
        "se": np.sqrt(variance),
        "ci_low": max(low, -1.0),
        "ci_high": min(high, 1.0),
        "p": p,
        "how": how,
    }
