"""What a grid of runs can tell: standard error, power and smallest detectable change of the primary
estimator, before or after the runs.

The primary estimator (stats.means) is the mean over runs of each run's change against its own base
model, on the same prompts. A unit u of a run r is taken as

    change[r, u] = mean of the setting + run[r] + unit[u] + noise[r, u]      (percentage points)

so that the mean over n runs (k seeds in each setting) and U units, in families of f, has the
variance

    (run^2 + noise^2 / U) / n  +  unit^2 / U * (1 + (f - 1) icc)

with n - settings and U / f - strata degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2,
110; the factor of families is Kish 1965, Survey Sampling, section 5.4). A base model's verdicts are
part of `unit`: they are the same for all its runs, and cancel between two methods. More seeds
shrink the first part only: what is left with any number of seeds is what the prompts alone leave
unknown.

Power is that of the non-central t with these degrees of freedom, beyond a critical value that is
the estimator's own: its interval reaches further to one side near 0 or 100 %, and further to both
where settings differ by chance in the spread of their few seeds. So the interval is asked for on a
few exemplary studies, whose runs and prompts have just the planned spread, at the estimate that
decides (O'Brien 1986, Proceedings of the Eleventh Annual SAS Users Group International Conference,
778; Lyles, Lin & Williamson 2007, Statistics in Medicine 26, 1632). With one setting, of a score
that is no share, it is the power of the t test. Of ten kinds of simulated 0/1 verdicts
(`simulated`; base rates of 5 to 50 %, three seeds in four settings, 600 studies each) nine are
within .04 of it; in the tenth, a rate of 5 % with runs 2.2 points apart and a margin of 3, studies
show twice as often that there is no increase (.39) as the formula says (.20).
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import chi2, nct

from driftbook.analyses.power_components import COLUMNS
from driftbook.stats import estimation, influence, terms
from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.influence import Scores
from driftbook.study.study_file import Study

MARGIN, TARGET = 3.0, 0.8  # points; power
MOST_UNITS, ROUNDS = (
    150,
    2,
    # units of an exemplary study: more would change little; rounds of looking for the estimate that
    # decides
)


# ---- what is planned
def planned(study: Study) -> pd.DataFrame:
    """The grid that a study file asks for, before it runs: base_model, method, n_settings, n_runs,
    of trained runs with the method's usual start.
    """
    variants = pd.DataFrame([variant.row() for variant in study.variants])
    return power_grid(
        influence.cells(
            influence.arms(
                variants,
                variants[["run_id"]].assign(
                    status="ok", no_op=pd.array([None] * len(variants), "boolean")
                ),
            )
        )
    )


def power_grid(cells: pd.DataFrame, group: str = terms.AS_CONFIGURED) -> pd.DataFrame:
    """The grid of one group of stats.cells: base_model, method, n_settings and n_runs."""
    own = cells[cells["group"].eq(group) & cells["base_model"].ne("all")]
    return (
        own.groupby(["base_model", "method"], sort=False)
        .agg(n_settings=("setting", "nunique"), n_runs=("run_id", "nunique"))
        .reset_index()
    )


def with_seeds(grid: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """The grid with so many seeds in each setting."""
    return grid.assign(n_runs=grid["n_settings"] * seeds)


PRECISION = [
    "base_model",
    "method",
    "other",
    "n_runs",
    "n_units",
    "se",
    "df",
    "df_known",
    "how",
    "example",
]


def precision(
    components: pd.DataFrame,
    grid: pd.DataFrame,
    n_units: int | None,
    family_size: float = 1.0,
    n_strata: int = 1,
    examples: int = 16,
) -> pd.DataFrame:
    """What the estimator will know of each contrast of the grid: base_model (each, and all),
    method, other, n_runs, n_units, se, df, df_known, how, example.

    se in the unit of the components; df: of the test; df_known: of se itself, known from the
    components' own degrees of freedom; example: studies of just this spread, to ask for their
    intervals (so many as `examples`; four give a power to about five in a hundred). A base model
    without components of its own gets the mean variances of the others. se, df, df_known and
    example are null where they cannot be told, and `how` says why.
    """
    table = {tuple(row[name] for name in COLUMNS[:3]): row for row in components.to_dict("records")}
    bases, rows = list(dict.fromkeys(grid["base_model"])), []
    for method, other in dict.fromkeys(key[1:] for key in table):
        own = _arms(grid, method, other)
        for name, chosen in [(base, [base]) for base in own] + (
            [("all", bases)] if len(own) == len(bases) > 1 else []
        ):
            arms = [
                {**_of(table, base, arm["method"], "none"), **arm}
                for base in chosen
                for arm in own[base]
            ]
            effects = [_of(table, base, method, other) for base in chosen]
            row = {"base_model": name, "method": method, "other": other, "n_units": n_units}
            row["n_runs"] = sum(arm["n_runs"] for arm in arms)
            if reason := _unknown(arms, n_units, family_size, n_strata):
                rows.append(row | _nothing(reason))
                continue
            known = _error(arms, effects, method, n_units, family_size, n_strata, examples)
            rows.append(row | known)
    return pd.DataFrame(rows, columns=PRECISION)


def _arms(grid: pd.DataFrame, method: str, other: str) -> dict[str, list[dict]]:
    """The grid's rows of a contrast on each base model that has all of them."""
    arms = grid[grid["method"].isin([method, other])]
    return {
        base: rows.to_dict("records")
        for base, rows in arms.groupby("base_model", sort=False)
        if len(rows) == 1 + (other != "none")
    }


def _of(table: dict, base_model: str, method: str, other: str) -> dict:
    """The components of a contrast on a base model; the mean variances of the other base models
    where it has none.

    Raises:
        ValueError: no base model has the contrast.
    """
    if (base_model, method, other) in table:
        return table[base_model, method, other]
    every = pd.DataFrame([row for key, row in table.items() if key[1:] == (method, other)])
    if every.empty:
        raise ValueError(
            f"there are no components of {method} against {other}; they come from a study's own"
            " runs, or from power.assumed"
        )
    squares = {
        name: np.sqrt((every[name].astype(float) ** 2).mean()) for name in ("run", "noise", "unit")
    }
    rest = every[["rate", "icc", "between_bases", "df_run", "df_unit"]].astype(float).mean()
    return {
        "base_model": base_model,
        "method": method,
        **squares,
        **rest,
        "how": "mean variances of the other base models",
    }


def _unknown(
    arms: list[dict], n_units: float | None, family_size: float, n_strata: int
) -> str | None:
    """Why the precision of a grid cannot be told; None where it can."""
    if n_units is None or pd.isna(n_units):
        return (
            "how many prompts are asked is not known before the benchmark is read: give their"
            " number"
        )
    if n_units / family_size <= n_strata:
        return (
            f"{n_units:g} prompts in families of {family_size:g} leave no family to compare within"
            f" {n_strata} categories"
        )
    if any(arm["n_runs"] <= arm["n_settings"] for arm in arms):
        return (
            "one seed a setting: such runs cannot tell their own spread, so no test of theirs holds"
            " for other seeds; plan two or more"
        )
    if any(pd.isna(arm["run"]) for arm in arms):
        return (
            "the spread of runs is not known, since no setting was run twice; take it from"
            " elsewhere (power.borrowed)"
        )
    return None


def _nothing(reason: str) -> dict:
    return {"se": np.nan, "df": np.nan, "df_known": np.nan, "how": reason, "example": None}


def _error(
    arms: list[dict],
    effects: list[dict],
    method: str,
    n_units: float,
    family_size: float,
    n_strata: int,
    examples: int,
) -> dict:
    """se, df, df_known and example of a contrast's mean over base models: `arms` has each method on
    each of them, `effects` the contrast on each.
    """
    by_run = [(arm["run"] ** 2 + arm["noise"] ** 2 / n_units) / arm["n_runs"] for arm in arms]
    by_unit = np.array(
        [one["unit"] ** 2 / n_units * (1 + (family_size - 1) * one["icc"]) for one in effects]
    )
    common = (
        float(np.nan_to_num(np.mean([one["between_bases"] for one in effects])))
        if len(effects) > 1
        else 0.0
    )
    prompts = (1 - common) * by_unit.sum() + common * np.sqrt(by_unit).sum() ** 2
    variance, left = np.array([*by_run, prompts]), n_units / family_size - n_strata
    if variance.sum() <= 0:
        return _nothing("no run and no prompt differs from another: nothing to plan with")
    of_test = [*(arm["n_runs"] - arm["n_settings"] for arm in arms), left]
    of_pilot = [*(arm["df_run"] for arm in arms), np.mean([one["df_unit"] for one in effects])]
    df, known = (
        variance.sum() ** 2 / (variance**2 / np.array(one, float)).sum()
        for one in (of_test, of_pilot)
    )
    how = "; ".join(dict.fromkeys(arm["how"] for arm in arms))
    example = _example(arms, np.sqrt(by_unit), common, method, n_units, int(left) + 1, examples)
    return {
        "se": np.sqrt(variance.sum()) / len(effects),
        "df": df,
        "df_known": known,
        "how": how,
        "example": example,
    }


# ---- exemplary studies
def _example(
    arms: list[dict],
    by_unit: np.ndarray,
    common: float,
    method: str,
    n_units: float,
    families: int,
    examples: int,
) -> tuple:
    """Scores of runs with the planned spread; values [examples, runs] that they may have instead;
    weights, settings, pools, and which runs the effect moves.

    What units do is laid along waves over them (the vectors of the discrete cosine transform), no
    two runs along the same.
    """
    base = np.repeat(
        pd.factorize(np.array([arm["base_model"] for arm in arms], object))[0],
        [arm["n_runs"] for arm in arms],
    )
    every = [arm for arm in arms for _ in range(arm["n_runs"])]
    n = max(min(families, MOST_UNITS), len(every) + len(by_unit) + 3)
    waves = (
        np.sqrt(2 * (n - 1)) / n * np.cos(np.pi / n * np.outer(np.arange(1, n), np.arange(n) + 0.5))
    )
    rng, moved = np.random.default_rng(0), np.array([arm["method"] == method for arm in every])
    spreads = [np.sqrt(arm["run"] ** 2 + arm["noise"] ** 2 / n_units) for arm in arms]
    values = [_deviations(*one, examples, rng) for one in zip(arms, spreads, strict=True)]
    values = np.concatenate(values, 1)
    share = np.array([arm["noise"] for arm in every])[:, None] / np.sqrt(n_units)
    noise = share * waves[len(by_unit) + 1 :][: len(every)]
    own = np.sqrt(1 - common) * waves[1 : len(by_unit) + 1]
    effect = by_unit[:, None] * (np.sqrt(common) * waves[0] + own)
    rate, none = np.array([arm["rate"] for arm in every], float), np.zeros(len(every), int)
    scores = Scores(
        pd.Index([f"run {i}" for i in range(len(every))], dtype=object),
        np.zeros(n),
        values[0],
        noise + moved[:, None] * effect[base],
        none + int(n_units),
        none,
        rate=None if np.isnan(rate).any() else rate,
    )
    weight = np.array([1 / arm["n_runs"] for arm in every]) * np.where(moved, 1, -1) / len(by_unit)
    pool = 2 * base + moved
    setting = (
        np.concatenate([np.arange(arm["n_runs"]) % arm["n_settings"] for arm in arms])
        + 10_000 * pool
    )
    return scores, values, weight, setting, pool, moved


def _deviations(arm: dict, sd: float, examples: int, rng: np.random.Generator) -> np.ndarray:
    """[examples, runs] normal differences of an arm's runs from the mean of their setting (settings
    in turn), with just this SD over all settings together.

    Each setting's own variance takes the quantiles of its chi-square in turn, in an order of its
    own (a Latin hypercube; McKay et al. 1979, Technometrics 21, 239).
    """
    setting = np.arange(arm["n_runs"]) % arm["n_settings"]
    rest = rng.normal(size=(examples, arm["n_runs"]))
    for one in range(arm["n_settings"]):
        own = setting == one
        part = rest[:, own] - rest[:, own].mean(1, keepdims=True)
        quantile = (rng.permutation(examples) + 0.5) / examples
        squares = chi2.ppf(quantile, own.sum() - 1) if own.sum() > 1 else np.zeros(examples)
        rest[:, own] = part * np.sqrt(squares / np.maximum((part**2).sum(1), 1e-300))[:, None]
    return (
        rest * sd * np.sqrt((arm["n_runs"] - arm["n_settings"]) / (rest**2).sum(1, keepdims=True))
    )


def _reach(plan: pd.DataFrame, estimate: list[np.ndarray], side: int) -> list[np.ndarray]:
    """How many standard errors the estimator's interval reaches below (side 0) or above (1) an
    estimate, in each example of each row where that is found.
    """
    return [
        np.array([np.nan]) if example is None else _reach_of(example, at, side)
        for example, at in zip(plan["example"], estimate, strict=True)
    ]


def _reach_of(example: tuple, estimate: np.ndarray, side: int) -> np.ndarray:
    scores, values, weight, setting, pool, moved = example
    found = []
    for value in values + np.broadcast_to(estimate, len(values))[:, None] * moved:
        rate = None if scores.rate is None else np.clip(scores.rate + value, 0.0, 100.0)
        one = estimation.estimate(
            replace(scores, value=value, rate=rate), np.arange(len(weight)), weight, setting, pool
        )["both"]
        found.append(
            (one["value"] - one["ci_low"] if side == 0 else one["ci_high"] - one["value"])
            / one["se"]
        )
    return np.array(found)


def _critical(plan: pd.DataFrame, side: int, at: float) -> list[np.ndarray]:
    """That reach at the estimate whose interval just ends at `at`."""
    reach, sign = [np.array([2.0])] * len(plan), 1 - 2 * side
    for _ in range(ROUNDS):
        reach = _reach(
            plan, [at + sign * one * se for one, se in zip(reach, plan["se"], strict=True)], side
        )
    return reach


def beyond_critical(
    critical: list[np.ndarray], df: pd.Series, distance: pd.Series, sign: int = 1
) -> np.ndarray:
    """The probability, in the mean over examples, that a non-central t is beyond its critical
    value, in one direction or (-1) in the other.
    """
    tail = nct.sf if sign > 0 else nct.cdf
    rows = zip(critical, df.astype(float), distance.astype(float), strict=True)
    return np.array(
        [
            np.nan if np.isnan(of) else np.nan_to_num(tail(sign * one, of, far)).mean()
            for one, of, far in rows
        ]
    )  # scipy lacks some tiniest tails


# ---- what it can tell
def power(plan: pd.DataFrame, effect: float = 0.0, margin: float | None = None) -> np.ndarray:
    """The probability (0 to 1) that each row of `precision` shows an effect, in the unit of its se;
    NaN where se is not known.

    Without a margin: that the 95 % interval leaves 0 out where `effect` is the true change (both
    ends count). With one: that its upper end is below the margin, where `effect` is the true harm
    (Chow, Shao & Wang 2008, Sample Size Calculations in Clinical Research, 3.1 and 3.2).

    Raises:
        ValueError: the margin is not positive.
    """
    if margin is not None:
        return beyond_critical(
            margin_reach(plan, margin), plan["df"], (margin - effect) / plan["se"]
        )
    toward, away = (_critical(plan, side, 0.0) for side in ((0, 1) if effect >= 0 else (1, 0)))
    far = abs(effect) / plan["se"]
    return beyond_critical(toward, plan["df"], far) + beyond_critical(away, plan["df"], far, -1)


def margin_reach(plan: pd.DataFrame, margin: float) -> list[np.ndarray]:
    if margin <= 0:
        raise ValueError(
            f"margin={margin!r}; a margin of non-inferiority is a positive number of points"
        )
    return _critical(plan, 1, margin)


def minimum_detectable(plan: pd.DataFrame, target: float = TARGET) -> pd.DataFrame:
    """value, ci_low, ci_high a row of `precision`: the smallest true increase that is found with
    probability `target`; null where se is not known.

    The interval is that of se, which was estimated with df_known degrees of freedom (chi-square;
    Browne 1995, Statistics in Medicine 14, 1933).
    """
    return _with_interval(
        plan, plan["se"] * _distances(_critical(plan, 0, 0.0), plan["df"], target)
    )


def smallest_margin(plan: pd.DataFrame, target: float = TARGET) -> pd.DataFrame:
    """value, ci_low, ci_high a row of `precision`: the smallest margin within which no increase is
    shown with probability `target`, where there is none.
    """
    reach = [np.array([2.0])] * len(plan)
    for _ in range(ROUNDS + 1):
        distance = _distances(reach, plan["df"], target)
        reach = _reach(
            plan,
            [(far - one) * se for far, one, se in zip(distance, reach, plan["se"], strict=True)],
            1,
        )
    return _with_interval(plan, plan["se"] * _distances(reach, plan["df"], target))


def _with_interval(plan: pd.DataFrame, value: pd.Series) -> pd.DataFrame:
    known = plan["df_known"].astype(float)
    return pd.DataFrame(
        {
            "value": value,
            "ci_low": value * np.sqrt(known / chi2.ppf(UPPER, known)),
            "ci_high": value * np.sqrt(known / chi2.ppf(LOWER, known)),
        }
    )


def _distances(critical: list[np.ndarray], df: pd.Series, target: float) -> np.ndarray:
    """The non-centrality at which a t is beyond its critical values with probability `target`, in
    the mean over examples.
    """
    if not 0.05 < target < 1:
        raise ValueError(
            f"target={target!r}; a power lies between the level of the test, .05, and 1"
        )

    def distance(one: np.ndarray, of: float) -> float:
        return brentq(lambda far: nct.sf(one, of, far).mean() - target, 0.0, 10 * one.max() + 10)

    return np.array(
        [
            np.nan if np.isnan(of) or np.isnan(one).any() else distance(one, of)
            for one, of in zip(critical, df.astype(float), strict=True)
        ]
    )
