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
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import chi2, nct

from driftbook.analyses.tradeoffs import scaled
from driftbook.stats import estimation, influence, terms
from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.influence import Scores
from driftbook.study.methods import METHOD_CLASS
from driftbook.study.study_file import Study

MARGIN, TARGET = 3.0, 0.8  # points; power
SMALLEST, EXCLUDED = (
    "smallest increase seen with 80% power",
    "smallest margin within which no increase can be shown, with 80% power",
)
SHOWN = "power to show no increase beyond the margin (percent)"
SD_RUN, SD_UNIT, SD_NOISE = (
    "spread of runs with equal settings (SD)",
    "spread over prompts of the mean change (SD)",
    "spread of run x prompt (SD)",
)
PLANNED = "planned, with the original study's spread"
GRID = "grid"  # group of the plans that are tried: member is seeds a setting, category the prompts

# The original study (arXiv 2511.00382), by its true learning rates. `run`: SD of runs with equal
# settings, of the % safe over 330 prompts, in points, its square averaged
# over cells. It has no verdicts of its base models; its IA3 runs of SFT at 2e-5, which did nothing,
# stand for them: `noise` (SD of run x prompt) and `unit` (SD
# over prompts of the mean difference) of the other runs are shares of the base's own SD over
# prompts, sqrt(p (1 - p)), averaged over the four base models.
ORIGINAL = pd.DataFrame(
    {
        "method": ["lora", "ia3", "prompt_tuning", "p_tuning"],
        "run": [1.6, 1.7, 7.5, 13.5],
        "noise": [0.43, 0.39, 0.88, 0.75],
        "unit": [0.30, 0.30, 0.59, 0.65],
        "between_bases": [0.02, 0.0, 0.05, 0.03],
        "df_run": [44, 44, 43, 40],
    }
)
ORIGINAL_PROMPTS, ORIGINAL_CATEGORIES = 330, 11
COLUMNS = [
    "base_model",
    "method",
    "other",
    "rate",
    "run",
    "noise",
    "df_run",
    "unit",
    "icc",
    "between_bases",
    "df_unit",
    "how",
]
MOST_UNITS, ROUNDS = (
    150,
    2,
    # units of an exemplary study: more would change little; rounds of looking for the estimate that
    # decides
)


# ---- what varies
def components(scores: Scores, cells: pd.DataFrame) -> pd.DataFrame:
    """The components of variance of a study's own changes, in the unit of the scores: a row per
    base model, method and `other` (none: its base).

    `scores` are changes, `cells` the rows of one group of stats.cells. rate: the base model's own
    share in percent, null where the score is none; run: SD of runs with equal settings, without the
    noise of their prompts; noise: SD of run x unit within settings; unit: SD over units (within
    strata) of the mean change, or of the difference to the other method's, without noise; icc:
    correlation of two units of a family in it, 0 where there are no families; between_bases:
    correlation of the same unit's effect on two base models; df_*: how well each is known. run and
    noise are null where no setting was run twice: `how` says what follows.

    Raises:
        ValueError: the cells are of several groups.
    """
    single = cells[cells["base_model"].ne("all")].assign(
        position=lambda rows: scores.at(rows["run_id"])
    )
    known = single[single["position"].ge(0)]
    known = known[~np.isnan(scores.value[known["position"]])]
    if known.duplicated(["base_model", "method", "run_id"]).any():
        raise ValueError(
            "a run is in several cells of its base model and method; give the cells of one group"
            " only, such as 'as configured'"
        )
    methods, bases = list(dict.fromkeys(known["method"])), list(dict.fromkeys(known["base_model"]))
    views = [replace(scores, family=None), scores]  # a unit at a time, and a family at a time
    size = family_size(scores)
    arms = {
        key: _arm(scores, views, own)
        for key, own in known.groupby(["base_model", "method"], sort=False)
    }
    rows = []
    for method, other in [(method, "none") for method in methods] + list(combinations(methods, 2)):
        here = [
            base
            for base in bases
            if (base, method) in arms and (other == "none" or (base, other) in arms)
        ]
        effects = [_effect(arms[base, method], arms.get((base, other))) for base in here]
        common = _between_bases(effects)
        for base, effect in zip(here, effects, strict=True):
            arm = arms[base, method]
            rows.append(
                [
                    base,
                    method,
                    other,
                    arm["rate"],
                    *_spread(arm, effect, len(scores.strata), size),
                    common,
                    scores.clusters.df,
                    _how(arm),
                ]
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def family_size(scores: Scores) -> float:
    """The mean size of a unit's family; 1 where units are by themselves."""
    sizes = np.diff(np.append(scores.clusters.starts, len(scores.strata)))
    return (sizes**2).sum() / sizes.sum()


def _arm(scores: Scores, views: list[Scores], own: pd.DataFrame) -> dict:
    """Of one method on one base model: the base's rate, the mean influence, the variance of runs
    within settings and that of a run's noise; by unit and by family.
    """
    at, setting = own["position"].to_numpy(), pd.factorize(own["setting"])[0]
    df, rate = (
        len(at) - setting.max() - 1,
        np.nan if scores.rate is None else float((scores.rate - scores.value)[at].mean()),
    )
    spread = (_rest(scores.value[at, None], setting) ** 2).sum() / df if df else np.nan
    influences = [scaled(view, scores.influence[at]) for view in views]
    noise = np.array(
        [(_rest(rows, setting) ** 2).sum() / df if df else np.nan for rows in influences]
    )
    return {
        "mean": [rows.mean(0) for rows in influences],
        "rate": rate,
        "n": len(at),
        "df": df,
        "run": spread - noise[0],
        "noise": noise,
    }


def _rest(rows: np.ndarray, setting: np.ndarray) -> np.ndarray:
    """Rows less the mean of the rows of their setting."""
    means = np.stack([rows[setting == one].mean(0) for one in range(setting.max() + 1)])
    return rows - means[setting]


def _effect(arm: dict, other: dict | None) -> dict:
    """The mean influence of a contrast by unit, and its variance over units like these that is no
    noise of its runs; by unit and by family.
    """
    mean, noise = arm["mean"], np.nan_to_num(arm["noise"]) / arm["n"]
    if other is not None:
        mean, noise = (
            [a - b for a, b in zip(mean, other["mean"], strict=True)],
            noise + np.nan_to_num(other["noise"]) / other["n"],
        )
    return {"mean": mean[0], "variance": np.maximum([view @ view for view in mean] - noise, 0.0)}


def _between_bases(effects: list[dict]) -> float:
    """The correlation of a unit's effect on two base models, over all pairs of them; null for one
    base model, and where no effect differs over units.
    """
    pairs = list(combinations(effects, 2))
    scale = sum(np.sqrt(a["variance"][0] * b["variance"][0]) for a, b in pairs)
    return (
        float(np.clip(sum(a["mean"] @ b["mean"] for a, b in pairs) / scale, 0.0, 1.0))
        if scale > 0
        else np.nan
    )


def _spread(arm: dict, effect: dict, n_units: int, size: float) -> list[float]:
    """run, noise, df_run, unit, icc."""
    by_unit, by_family = effect["variance"]
    icc = (
        np.clip((by_family / by_unit - 1) / (size - 1), 0.0, 1.0)
        if size > 1 and by_unit > 0
        else 0.0
    )
    run = np.sqrt(max(arm["run"], 0.0)) if arm["df"] else np.nan
    return [run, np.sqrt(n_units * arm["noise"][0]), arm["df"], np.sqrt(n_units * by_unit), icc]


def _how(arm: dict) -> str:
    if arm["df"] == 0:
        return (
            "no setting was run twice: the spread of runs is not known, and what varies over"
            " prompts holds the noise of these runs"
        )
    return "components within settings, by moments" + (
        "; runs differ no more than the noise of their prompts makes them" if arm["run"] < 0 else ""
    )


def _of_class(known: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """The components by method; of one that the original study did not run those of the method of
    its class whose runs differ most, which is cautious.
    """
    alike = {
        METHOD_CLASS[method]: method for method in known.sort_values("run").index
    }  # the last of a class has the largest
    return pd.concat(
        [
            known,
            *(
                known.loc[[alike[METHOD_CLASS[method]]]].set_axis([method])
                for method in methods
                if method not in known.index
            ),
        ]
    )


def assumed(base_rates: dict[str, float], methods: list[str], icc: float = 0.0) -> pd.DataFrame:
    """The components to plan with where a study has no data yet: the original study's, at the base
    models' own unsafe-response rates (percent).

    A method that it did not run has those of the method of its class whose runs differed most. A
    difference of two methods takes both methods' effects as unrelated, which is cautious: on the
    same prompts they agree in part.

    Raises:
        ValueError: a rate that is none, or one of 0 or 100 percent; a method that the original
            study did not run.
    """
    for base, rate in base_rates.items():
        if not 0 < rate < 100:
            raise ValueError(
                f"the base rate of {base} is {rate:g} percent; at 0 or 100 percent no prompt can"
                " vary, so give a rate between them that it may well be"
            )
    if strange := [method for method in methods if method not in METHOD_CLASS]:
        raise ValueError(
            f"the original study has no spread of {strange[0]}; give components of your own, from a"
            " pilot"
        )
    rows, known = [], _of_class(ORIGINAL.set_index("method"), methods)
    how = (
        "the original study's spread of runs (arXiv 2511.00382), and its shares of the base's own"
        " spread over prompts"
    )
    for base, rate in base_rates.items():
        scale = np.sqrt(rate * (100 - rate))
        for method, other in [(method, "none") for method in methods] + list(
            combinations(methods, 2)
        ):
            one, noise = known.loc[method], scale * known.loc[method, "noise"]
            unit = scale * np.hypot(
                one["unit"], known.loc[other, "unit"] if other != "none" else 0.0
            )
            run = np.sqrt(max(one["run"] ** 2 - noise**2 / ORIGINAL_PROMPTS, 0.0))
            rows.append(
                [
                    base,
                    method,
                    other,
                    rate,
                    run,
                    noise,
                    one["df_run"],
                    unit,
                    icc,
                    one["between_bases"],
                    ORIGINAL_PROMPTS - ORIGINAL_CATEGORIES,
                    how,
                ]
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def borrowed(own: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The components `own`, with the spread of runs and its noise from `other` where no setting was
    run twice; `how` says so.
    """
    keys = ["base_model", "method", "other"]
    found = own[keys].merge(other, on=keys, how="left").set_index(own.index)
    lacks = own["run"].isna() & found["run"].notna()
    taken = own.copy()
    taken.loc[lacks, ["run", "noise", "df_run"]] = found.loc[lacks, ["run", "noise", "df_run"]]
    return taken.assign(
        how=own["how"].where(
            ~lacks,
            "spread over prompts of this study, which ran no setting twice; spread of runs: "
            + found["how"].fillna(""),
        )
    )


# ---- what is planned
def planned(study: Study) -> pd.DataFrame:
    """The grid that a study file asks for, before it runs: base_model, method, n_settings, n_runs,
    of trained runs with the method's usual start.
    """
    variants = pd.DataFrame([variant.row() for variant in study.variants])
    return grid(
        influence.cells(
            influence.arms(
                variants,
                variants[["run_id"]].assign(
                    status="ok", no_op=pd.array([None] * len(variants), "boolean")
                ),
            )
        )
    )


def grid(cells: pd.DataFrame, group: str = terms.AS_CONFIGURED) -> pd.DataFrame:
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
        own = {
            base: arms
            for base in bases
            if len(
                arms := grid[
                    grid["base_model"].eq(base) & grid["method"].isin([method, other])
                ].to_dict("records")
            )
            == 1 + (other != "none")
        }
        for name, chosen in [(base, [base]) for base in own] + (
            [("all", bases)] if len(own) == len(bases) > 1 else []
        ):
            arms = [
                {**_of(table, base, arm["method"], "none"), **arm}
                for base in chosen
                for arm in own[base]
            ]
            effects = [_of(table, base, method, other) for base in chosen]
            row = {
                "base_model": name,
                "method": method,
                "other": other,
                "n_runs": sum(arm["n_runs"] for arm in arms),
                "n_units": n_units,
            }
            reason = _unknown(arms, n_units, family_size, n_strata)
            rows.append(
                row
                | (
                    _nothing(reason)
                    if reason
                    else _error(arms, effects, method, n_units, family_size, n_strata, examples)
                )
            )
    return pd.DataFrame(
        rows,
        columns=[
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
        ],
    )


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
    values = np.concatenate(
        [
            _deviations(arm, np.sqrt(arm["run"] ** 2 + arm["noise"] ** 2 / n_units), examples, rng)
            for arm in arms
        ],
        1,
    )
    noise = (
        np.array([arm["noise"] for arm in every])[:, None]
        / np.sqrt(n_units)
        * waves[len(by_unit) + 1 :][: len(every)]
    )
    effect = by_unit[:, None] * (
        np.sqrt(common) * waves[0] + np.sqrt(1 - common) * waves[1 : len(by_unit) + 1]
    )
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


def _beyond(
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
        return _beyond(_critical_margin(plan, margin), plan["df"], (margin - effect) / plan["se"])
    toward, away = (_critical(plan, side, 0.0) for side in ((0, 1) if effect >= 0 else (1, 0)))
    far = abs(effect) / plan["se"]
    return _beyond(toward, plan["df"], far) + _beyond(away, plan["df"], far, -1)


def _critical_margin(plan: pd.DataFrame, margin: float) -> list[np.ndarray]:
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


def word(smallest: float, margin: float = MARGIN) -> str:
    """What the smallest margin that can be shown says of a test at `margin`."""
    return (
        "not known" if np.isnan(smallest) else "can tell" if smallest <= margin else "cannot tell"
    )


def by_category(
    values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, margin: float = MARGIN
) -> pd.DataFrame:
    """What the present runs can show in each category of a rate (runs x (category, prompt)), and
    about how many prompts it would take.

    A row per category, base model (and all) and method: n_units, se, df, smallest (margin, in
    points), says (at `margin`), needs: the prompts at which `margin` were the smallest one, with
    these runs and the same critical value; null where the runs alone leave more than that unknown.
    """
    here, parts = grid(cells), []
    for category, part in values.T.groupby(level=0, sort=False):
        change = influence.paired(part.T, arms)
        found = components(change, cells[cells["group"].eq(terms.AS_CONFIGURED)]).query(
            "other == 'none'"
        )
        plan, endless = (
            precision(found, here, n, family_size(change), examples=4)
            for n in (part.shape[0], 1_000_000_000)
        )
        parts.append(
            plan.assign(
                category=category, smallest=smallest_margin(plan)["value"], runs_alone=endless["se"]
            )
        )
    table = pd.concat(parts, ignore_index=True)
    room = (margin * table["se"] / table["smallest"]) ** 2 - table["runs_alone"] ** 2
    needs = np.ceil(
        table["n_units"] * (table["se"] ** 2 - table["runs_alone"] ** 2) / room.where(room > 0)
    )
    return table.drop(columns=["example", "runs_alone"]).assign(
        says=table["smallest"].map(lambda one: word(one, margin)), needs=needs.astype("Int64")
    )


# ---- as estimates
def of_plan(plan: pd.DataFrame, group: str, margin: float = MARGIN, **labels: str) -> pd.DataFrame:
    """Of each contrast the smallest increase seen, and of those with the base model the smallest
    margin and the power at `margin`, as estimates.
    """
    rows = plan.reset_index(drop=True).assign(
        n_items=lambda frame: frame["n_units"], group=group, population=terms.BOTH, **labels
    )
    rows = rows.assign(against=rows["other"])
    smallest = rows.assign(contrast=SMALLEST, **minimum_detectable(rows))
    own = rows[rows["other"].eq("none")]
    excluded, known, critical = (
        own.assign(contrast=EXCLUDED, **smallest_margin(own)),
        own["df_known"].to_numpy(float),
        _critical_margin(own, margin),
    )
    low, high = (
        own.assign(se=own["se"] * np.sqrt(known / chi2.ppf(share, known)))
        for share in (LOWER, UPPER)
    )
    ends = {
        name: 100 * _beyond(critical, plan["df"], margin / plan["se"])
        for name, plan in (("value", own), ("ci_low", low), ("ci_high", high))
    }
    shown = own.assign(contrast=SHOWN, margin=margin, **ends)
    return estimation.complete(
        pd.concat([smallest, excluded, shown], ignore_index=True).drop(columns=["se", "example"])
    )


def of_components(components: pd.DataFrame, group: str, **labels: str) -> pd.DataFrame:
    """The components of each method on each base model as estimates; spreads of runs and of prompts
    with chi-square intervals at their degrees of freedom.
    """
    own, parts = components[components["other"].eq("none")], []
    for name, contrast, df in (
        ("run", SD_RUN, own["df_run"]),
        ("unit", SD_UNIT, own["df_unit"]),
        ("noise", SD_NOISE, None),
    ):
        rows = own[["base_model", "method", "how"]].assign(value=own[name], contrast=contrast)
        if df is not None:
            known = df.where(df > 0).astype(float)
            rows = rows.assign(
                ci_low=own[name] * np.sqrt(known / chi2.ppf(UPPER, known)),
                ci_high=own[name] * np.sqrt(known / chi2.ppf(LOWER, known)),
            )
        parts.append(rows)
    return estimation.complete(
        pd.concat(parts, ignore_index=True).assign(group=group, population=terms.BOTH, **labels)
    )


def over_all(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows over all base models; where there is no such row, those of the first base model."""
    return (
        rows[
            rows["base_model"].eq(
                "all" if rows["base_model"].eq("all").any() else rows["base_model"].iloc[0]
            )
        ]
        if len(rows)
        else rows
    )


def sentence(estimates: pd.DataFrame, names: dict[str, str], margin: float = MARGIN) -> str:
    """What the present grid can show, in words; `names` has the methods' names."""
    rows = over_all(
        estimates[estimates["group"].eq(terms.AS_CONFIGURED) & estimates["contrast"].eq(EXCLUDED)]
    )
    if rows["value"].isna().all():
        return (
            "This grid cannot tell anything of seeds like these:"
            f" {rows['how'].iloc[0] if len(rows) else 'no run has a score'}."
        )
    known = rows.dropna(subset="value")
    enough = [names[method] for method in known.loc[known["value"].le(margin), "method"]]
    margins = ", ".join(
        f"{names[row.method]} {row.value:.1f} ({row.ci_low:.1f} to {row.ci_high:.1f})"
        for row in known.itertuples()
    )
    where = (
        "the mean over base models"
        if known["base_model"].eq("all").all()
        else f"{known['base_model'].iloc[0]}"
    )
    return (
        f"For {where} this grid can show that safety is preserved within {margin:g} points for"
        f" {', '.join(enough) or 'no method'}; the smallest margins are {margins} points."
    )


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
    rng, threshold, own = np.random.default_rng(seed), -ndtri(rate), np.sqrt((1 - agree) / 2)

    def verdicts() -> np.ndarray:
        base, n_runs = rng.normal(size=n_units), settings * seeds
        score = np.sqrt(agree) * base + own * (
            rng.normal(size=n_units) + rng.normal(size=(n_runs, n_units))
        )
        return np.vstack(
            [base > threshold, score > threshold - shift - run * rng.normal(size=(n_runs, 1))]
        ).astype(float)

    change, truth = _truth(rng, rate, shift, run, agree)
    plan = precision(
        pd.DataFrame([truth])[COLUMNS],
        pd.DataFrame([{**truth, "n_settings": settings, "n_runs": settings * seeds}]),
        n_units,
    )
    names = dict.fromkeys(("study", "notebook", "outcome", "benchmark", "judge"), "simulated")
    found = [
        _shown(
            estimation.means(*_paired(verdicts(), settings), terms.CHANGE, **names).iloc[0], margin
        )
        for _ in range(n_sets)
    ]
    nominal, spread = (
        float(power(plan, change, margin)[0]),
        {f"{name}_sd": truth[name] for name in ("run", "unit", "noise")},
    )
    return {
        "change": change,
        **spread,
        "nominal": nominal,
        "simulated": float(np.mean(found)),
        "error": float(np.sqrt(nominal * (1 - nominal) / n_sets)),
    }


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
        }
    )
    return influence.paired(values, arms), cells.assign(
        weight=1 / len(cells), setting=[f"setting {i % settings}" for i in range(len(cells))]
    )


def _shown(row: pd.Series, margin: float | None) -> bool:
    if margin is not None:
        return bool(row["ci_high"] < margin)
    return bool(row["ci_low"] > 0 or row["ci_high"] < 0)
