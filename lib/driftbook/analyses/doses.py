"""Did a method preserve, or did it do nothing? Changes with and without no-ops, methods at matched
dose, and rates that would reach a preset dose.

A dose comes after treatment: runs were not randomised to it, so whatever made a run's dose small
can also have made its change small. Methods at matched dose are therefore described, not tested.
Only rates that were set on pilot seeds to reach a preset dose, and did reach it on fresh seeds,
make an experiment of it: `rates_for_dose` sets them, `confirmed` checks them, `experiment` compares
the methods.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtr, stdtrit

from driftbook.analyses.variance_shares import redrawn
from driftbook.stats.confidence import INTERVAL, LOWER, UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.populations import counted
from driftbook.stats.terms import AS_CONFIGURED, CHANGE, NO_OP, THESE_PROMPTS, TRAINED
from driftbook.study.methods import METHODS

DOSES = {
    "dose_nll": "gain on held-out answers",
    "kl_base": "KL to the base model",
}  # columns of `runs`; KL is compared on the log scale
PLAIN = "difference, as configured, these prompts"
MATCHED = {measure: f"difference at equal {name}" for measure, name in DOSES.items()}
EXPERIMENT = {measure: f"difference at preset {name}" for measure, name in DOSES.items()}
DOSE, PRESET = "dose", "preset dose"  # groups; the member is which dose
MEAN_DOSE = "mean of the three"
QUARTILES = {"lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75}
DESCRIPTIVE = "descriptive, dose comes after treatment: " + THESE_PROMPTS
SPAN, _FEWEST = (
    0.75,
    4,
)  # share of a method's runs that a local line is fitted to; runs that it needs


# ---- as configured, with and without no-ops
def with_and_without_no_ops(estimates: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """Method by base model (and all): how many runs were configured and how many of them are
    no-ops, and the mean change with and without those.

    `estimates` are the rows of one outcome, benchmark and judge. A method whose runs are all no-ops
    has no change without them: null.
    """
    rows = estimates[
        estimates["contrast"].eq(CHANGE) & estimates["group"].isin([AS_CONFIGURED, TRAINED])
    ]
    usual = arms[arms["arm"].isin([TRAINED, NO_OP])]
    usual = pd.concat([usual, usual.assign(base_model="all")])
    keys, columns = ["base_model", "method"], ["value", "ci_low", "ci_high"]
    table = usual.groupby(keys, sort=False)["arm"].agg(
        runs="size", no_ops=lambda arm: arm.eq(NO_OP).sum()
    )
    for group in (AS_CONFIGURED, TRAINED):
        own = rows[rows["group"].eq(group)].set_index(keys)[columns]
        table = table.join(
            own.rename(
                columns={"value": group} | {name: f"{name} ({group})" for name in columns[1:]}
            )
        )
    return table.reset_index()


def below_base(runs: pd.DataFrame) -> pd.DataFrame:
    """Method by base model: runs, those that end worse on held-out answers than their base model
    (negative dose_nll), and the lowest dose.
    """
    groups = runs.groupby(["base_model", "method"], sort=False)["dose_nll"]
    return groups.agg(runs="count", worse=lambda dose: dose.lt(0).sum(), lowest="min").reset_index()


def dose_runs(
    arms: pd.DataFrame, runs: pd.DataFrame, values: pd.Series | None = None
) -> pd.DataFrame:
    """The runs as configured (trained and no-ops, the methods' usual inits) with setting, seed,
    doses and, where given, `value` (by run_id).
    """
    frame = arms[arms["arm"].isin([TRAINED, NO_OP])]
    frame = frame[
        [
            "run_id",
            "base_model",
            "method",
            "objective",
            "dataset",
            "epochs",
            "learning_rate",
            "setting",
            "seed",
        ]
    ]
    frame = frame.merge(runs[["run_id", *DOSES]].astype(dict.fromkeys(DOSES, float)), on="run_id")
    return (
        frame if values is None else frame.assign(value=frame["run_id"].map(values).astype(float))
    )


# ---- methods against each other
def as_configured(
    runs: pd.DataFrame, n_boot: int = 1000, seed: int = 0, **labels: str
) -> pd.DataFrame:
    """The difference in mean change of each pair of methods within a base model, over all runs as
    configured, as estimates (see `matched` for intervals).
    """
    rows = []
    for base_model, (a, b), drawn in _pairs(
        runs[runs["value"].notna()].assign(x=0.0), n_boot, seed
    ):
        means, df = (
            [side[..., 1].mean(1) for side in drawn],
            [_df(side, np.full(len(side), 1 / len(side))) for side in (a, b)],
        )
        found = _welch([mean[0] for mean in means], [mean[1:].var(ddof=1) for mean in means], df)
        how = "difference of mean changes over runs; redraws of runs within settings, t interval"
        rows.append(
            {
                **_names(base_model, a, b),
                **found,
                "group": AS_CONFIGURED,
                "contrast": PLAIN,
                "population": THESE_PROMPTS,
                "how": how,
            }
        )
    return complete(pd.DataFrame(rows).assign(**labels))


def matched(
    runs: pd.DataFrame, measure: str, n_boot: int = 1000, seed: int = 0, **labels: str
) -> pd.DataFrame:
    """The difference in change of each pair of methods within a base model at equal dose, as
    estimates: at three preset doses and their mean.

    `runs` comes from dose_runs with values; `measure` is one of DOSES. The doses are the quartiles
    of the doses that runs of both methods have within the range that both reached; they come from
    the doses alone, never from a change. Change on dose is smoothed within method and base model by
    a local line (lowess without its robust steps; Cleveland 1979; span 0.75), because it is exact
    where change is linear in dose, bends with it where it is not, and needs no direction: a gain on
    held-out answers can fall while the model moves on. There is no extrapolation: without a common
    range, or without a run of both methods in it, the row is null and `how` says so. Runs worse
    than their base model (negative gain) count like any other.

    Intervals: spread over `n_boot` redraws of runs (dose and change together) within settings, and
    t with the df of settings that were repeated, each with its own variance (Satterthwaite); over
    seeds, on these prompts, at the doses preset. Not adjusted for the number of pairs.
    """
    if measure not in DOSES:
        raise ValueError(f"measure={measure!r}; expected one of {tuple(DOSES)}")
    frame, rows = _on_scale(runs, measure), []
    for base_model, sides, drawn in _pairs(frame, n_boot, seed):
        lost = sum(
            (runs["base_model"].eq(base_model) & runs["method"].eq(_method(side))).sum() - len(side)
            for side in sides
        )
        names = {
            **_names(base_model, *sides),
            "group": DOSE,
            "contrast": MATCHED[measure],
            "population": DESCRIPTIVE,
        }
        left_out = f"; {lost} runs without a change or this dose left out" if lost else ""
        rows += [
            {**names, **row, "how": f"descriptive; {row['how']}{left_out}"}
            for row in _at_doses(*sides, drawn, measure)
        ]
    return complete(pd.DataFrame([*rows, *_without_dose(runs, frame, measure)]).assign(**labels))


def _without_dose(runs: pd.DataFrame, frame: pd.DataFrame, measure: str) -> list[dict]:
    """Null rows for the pairs of which a method has runs on a base model and none with a change and
    this dose.
    """
    rows, known = [], set(zip(frame["base_model"], frame["method"], strict=True))
    for base_model, own in runs.groupby("base_model", sort=False):
        for method, other in combinations(
            [method for method in METHODS if own["method"].eq(method).any()], 2
        ):
            lacking = [name for name in (method, other) if (base_model, name) not in known]
            how = f"descriptive; no run of {' or '.join(lacking)} has a change and this dose"
            names = {
                "base_model": base_model,
                "method": method,
                "group": DOSE,
                "contrast": MATCHED[measure],
                "against": other,
                "population": DESCRIPTIVE,
                "how": how,
            }
            rows += (
                [{**names, "value": None, "member": dose} for dose in (*QUARTILES, MEAN_DOSE)]
                if lacking
                else []
            )
    return rows


def _on_scale(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The runs with a value and a dose, and the dose's scale x: as it is, or the log10 of a KL that
    is above zero.
    """
    frame = runs[runs["value"].notna() & runs[measure].notna()]
    frame = frame[frame[measure].gt(0)] if measure == "kl_base" else frame
    return frame.assign(x=np.log10(frame[measure]) if measure == "kl_base" else frame[measure])


def _pairs(frame: pd.DataFrame, n_boot: int, seed: int) -> Iterator[tuple[str, tuple, tuple]]:
    """Each pair of methods of each base model: their runs and their redraws."""
    for number, (base_model, own) in enumerate(frame.groupby("base_model", sort=False)):
        sides = [
            own[own["method"].eq(method)] for method in METHODS if own["method"].eq(method).any()
        ]
        drawn = [
            _drawn(
                side, n_boot, np.random.default_rng([seed, number, METHODS.index(_method(side))])
            )
            for side in sides
        ]
        for i, j in combinations(range(len(sides)), 2):
            yield base_model, (sides[i], sides[j]), (drawn[i], drawn[j])


def _drawn(side: pd.DataFrame, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """x and value of a method's runs on one base model: [1 + n_boot, runs, 2], the runs themselves
    first, then their redraws within settings.
    """
    values = side[["x", "value"]].to_numpy(float)
    cell = pd.factorize(side["setting"])[0]
    return np.concatenate(
        [values[None], redrawn(values, cell, np.zeros(len(cell), int), n_boot, rng)]
    )


def _method(side: pd.DataFrame) -> str:
    return side["method"].iloc[0]


def _names(base_model: str, a: pd.DataFrame, b: pd.DataFrame) -> dict:
    sides = {"method": _method(a), "against": _method(b)}
    return {"base_model": base_model, **sides, "n_runs": len(a) + len(b)}


def _at_doses(a: pd.DataFrame, b: pd.DataFrame, drawn: tuple, measure: str) -> list[dict]:
    """member, how and the number for each preset dose and their mean; null where the methods share
    no dose.
    """
    at, why = preset_doses(a["x"].to_numpy(), b["x"].to_numpy())
    if why:
        return [{"value": None, "member": dose, "how": why} for dose in (*QUARTILES, MEAN_DOSE)]
    words = [f"{10**x if measure == 'kl_base' else x:.2g}" for x in at]
    levels = [
        [local_line(side[..., 0], side[..., 1], dose) for dose in at] for side in drawn
    ]  # of both methods, at each dose
    parts = [
        [local_line(side["x"].to_numpy(), np.eye(len(side)), dose) for dose in at]
        for side in (a, b)
    ]  # what a run's change weighs in them
    one_by_one = zip(QUARTILES, words, *levels, *parts, strict=True)
    rows = [
        {
            **_interval(one, other, [_df(a, own), _df(b, its)]),
            "member": member,
            "how": f"local lines at {dose}",
        }
        for member, dose, one, other, own, its in one_by_one
    ]
    low, high = common_range(a["x"], b["x"])
    inside = [f"{_method(side)} {side['x'].between(low, high).sum()}" for side in (a, b)]
    how = (
        f"local lines, mean over the doses {', '.join(words)}; runs in the common range:"
        f" {', '.join(inside)}"
    )
    df = [_df(side, np.mean(part, axis=0)) for side, part in zip((a, b), parts, strict=True)]
    return [
        *rows,
        {
            **_interval(*(np.mean(side, axis=0) for side in levels), df),
            "member": MEAN_DOSE,
            "how": how,
        },
    ]


def common_range(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """From the higher of two lowest doses to the lower of two highest; empty where the first is
    above the second.
    """
    return max(np.min(a), np.min(b)), min(np.max(a), np.max(b))


def preset_doses(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, str]:
    """The quartiles of both methods' doses within their common range, and "" or a sentence why
    there are none.
    """
    low, high = common_range(a, b)
    inside = [side[(side >= low) & (side <= high)] for side in (a, b)]
    if low >= high or not min(map(len, inside)):
        return np.array([]), "no common dose"
    if min(len(a), len(b)) < _FEWEST:
        return np.array([]), f"fewer than {_FEWEST} runs of a method: too few for a line"
    return np.quantile(np.concatenate(inside), list(QUARTILES.values())), ""


def local_line(x: np.ndarray, y: np.ndarray, at: float, span: float = SPAN) -> np.ndarray:
    """The local linear fit of y on x at one point, for each row of [..., runs]: tricube weights
    over the nearest `span` of the runs (lowess, no robust steps).

    Where the weighted x hardly differ, the weighted mean of y.
    """
    distance = np.abs(x - at)
    k = max(int(span * x.shape[-1] + 1e-10), 2)
    radius = np.partition(distance, k - 1, axis=-1)[..., k - 1 : k]
    weight = np.clip(1 - (distance / np.where(radius > 0, radius, 1.0)) ** 3, 0, None) ** 3
    weight = weight / weight.sum(-1, keepdims=True)
    centre = (weight * x).sum(-1)
    spread = (weight * (x - centre[..., None]) ** 2).sum(-1)
    usable = np.sqrt(spread) > 1e-3 * np.ptp(x, axis=-1)
    slope = (weight * (x - centre[..., None]) * y).sum(-1) / np.where(usable, spread, 1.0)
    return (weight * y).sum(-1) + np.where(usable, slope, 0.0) * (at - centre)


def _df(side: pd.DataFrame, weights: np.ndarray) -> float:
    """The degrees of freedom of a weighted sum of runs whose variance is each setting's own
    (Satterthwaite 1946); 0 where no setting was repeated.
    """
    cell, value = pd.factorize(side["setting"])[0], side["value"].to_numpy(float)
    n = np.bincount(cell)
    rest = value - (np.bincount(cell, value) / n)[cell]
    part, df = (
        np.bincount(cell, weights**2) * np.bincount(cell, rest**2) / np.maximum(n - 1, 1),
        n - 1,
    )
    return (
        part.sum() ** 2 / (part**2 / np.maximum(df, 1)).sum()
        if part.sum() > 1e-18
        else float(df.sum())
    )


def _interval(a: np.ndarray, b: np.ndarray, df: list[float]) -> dict[str, float | None]:
    """The difference of two independent estimates, each with its redraws behind it; no interval
    where a side has no repeated setting or no spread.

    The standard error of each comes from the width of the middle 95 % of its redraws: in a few of
    them doses coincide, and a line is then arbitrarily steep.
    """
    spread = [
        np.diff(np.quantile(side[1:], (LOWER, UPPER)))[0] / (2 * ndtri(UPPER)) for side in (a, b)
    ]
    return _welch([a[0], b[0]], [one**2 for one in spread], df)


def _welch(values: list[float], variances: list[float], df: list[float]) -> dict[str, float | None]:
    """The difference of two independent estimates with Satterthwaite's t interval; null where a
    side has no df or neither varies.
    """
    value, variance = values[0] - values[1], np.array(variances)
    if min(df) < 1 or not variance.sum() > 1e-18:
        return {"value": value, "se": None, "ci_low": None, "ci_high": None, "p": None}
    dof, se = variance.sum() ** 2 / (variance**2 / np.array(df)).sum(), np.sqrt(variance.sum())
    half = stdtrit(dof, UPPER) * se
    return {
        "value": value,
        "se": se,
        "ci_low": value - half,
        "ci_high": value + half,
        "p": 2 * stdtr(dof, -abs(value) / se),
    }


# ---- at preset dose: an experiment
def rates_for_dose(
    pilot: pd.DataFrame, doses: list[float], measure: str = "kl_base"
) -> pd.DataFrame:
    """The learning rate at which each method would reach each preset dose, from pilot runs: a row
    per base model, method, objective, epochs and dose.

    `pilot` comes from dose_runs. The mean dose over seeds at each rate is interpolated linearly
    between the logarithms of rate and dose; the first rate from below that reaches the dose is
    taken. Beyond the rates that ran nothing is said: learning_rate is null and `reason` says why.
    Columns besides: measure, pilot_seeds (the seeds that set the rate, and so cannot confirm it).
    """
    keys, rows = ["base_model", "method", "objective", "dataset", "epochs"], []
    for key, own in pilot.dropna(subset=[measure, "learning_rate"]).groupby(
        keys, sort=False, dropna=False
    ):
        reached = own.groupby("learning_rate")[measure].mean()
        seeds = ", ".join(str(seed) for seed in sorted(own["seed"].dropna().unique()))
        for dose in doses:
            rate, reason = _rate(reached.index.to_numpy(float), reached.to_numpy(float), dose)
            rows.append(
                {
                    **dict(zip(keys, key, strict=True)),
                    "measure": measure,
                    "dose": dose,
                    "learning_rate": rate,
                    "reason": reason,
                    "pilot_seeds": seeds,
                }
            )
    return pd.DataFrame(
        rows, columns=[*keys, "measure", "dose", "learning_rate", "reason", "pilot_seeds"]
    )


def _rate(rates: np.ndarray, reached: np.ndarray, dose: float) -> tuple[float | None, str]:
    """The lowest rate that reaches the dose, and how it was found; None where the pilot does not
    enclose it. Rates ascend.
    """
    if dose <= 0:
        return None, f"a dose of {dose:g} has no logarithm; preset a dose above zero"
    sides = np.log(np.where(reached > 0, reached, np.nan) / dose)
    exact = np.isclose(sides, 0, atol=1e-12)
    if exact.any():
        return float(rates[exact][0]), "reached in the pilot"
    crossing = np.flatnonzero((sides[:-1] < 0) & (sides[1:] > 0))
    lacking = (
        "; not above zero at " + ", ".join(f"{rate:g}" for rate in rates[reached <= 0])
        if (reached <= 0).any()
        else ""
    )
    if not len(crossing):
        return (
            None,
            (
                "no rising pair of neighbouring rates in the pilot encloses it (reached"
                f" {reached.min():.3g} to {reached.max():.3g}{lacking}): no extrapolation"
            ),
        )
    i = crossing[0]
    share = sides[i] / (sides[i] - sides[i + 1])
    how = (
        f"between {rates[i]:g} and {rates[i + 1]:g}"
        + (f", the first of {len(crossing)} crossings" if len(crossing) > 1 else "")
        + lacking
    )
    return float(np.exp((1 - share) * np.log(rates[i]) + share * np.log(rates[i + 1]))), how


def confirmed(runs: pd.DataFrame, preset: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Whether fresh seeds landed on the preset doses: `preset` (from rates_for_dose) with n_runs,
    lowest, highest, confirmed and a sentence in `reason`.

    A row is confirmed if at least two runs of this base model, method, objective, data and epochs
    at its rate (to a relative 1e-6) have seeds that the pilot did not, and the dose of each of them
    is within `tolerance` of the preset one, relative to it.
    """
    found = []
    for row in preset.to_dict("records"):
        own = _at_preset(runs, row)
        fresh = own[~own["seed"].astype(str).isin(row["pilot_seeds"].split(", "))]
        off = fresh[(fresh[row["measure"]] - row["dose"]).abs() > tolerance * row["dose"]]
        dose = fresh[row["measure"]]
        reason = (
            row["reason"]
            if pd.isna(row["learning_rate"])
            else (
                f"{len(fresh)} fresh seeds ran at this rate: two are needed"
                if len(fresh) < 2
                else (
                    f"{len(off)} of {len(fresh)} fresh seeds are more than {tolerance:.0%} off"
                    if len(off)
                    else f"all {len(fresh)} fresh seeds are within {tolerance:.0%}"
                )
            )
        )
        told = {
            "n_runs": len(fresh),
            "lowest": dose.min(),
            "highest": dose.max(),
            "confirmed": len(fresh) >= 2 and not len(off),
            "reason": reason,
        }
        found.append({**row, **told})
    return pd.DataFrame(
        found,
        columns=list(
            dict.fromkeys([*preset.columns, "n_runs", "lowest", "highest", "confirmed", "reason"])
        ),
    )


def _at_preset(runs: pd.DataFrame, row: dict) -> pd.DataFrame:
    """The runs at a preset rate, with a dose."""
    if pd.isna(row["learning_rate"]):
        return runs[:0]
    keys = ("base_model", "method", "objective", "dataset", "epochs")
    same = np.logical_and.reduce(
        [
            runs[name].isna() if pd.isna(row[name]) else runs[name].eq(row[name]).fillna(False)
            for name in keys
        ]
    )
    rate = np.isclose(runs["learning_rate"].astype(float), row["learning_rate"], rtol=1e-6, atol=0)
    return runs[same & rate & runs[row["measure"]].notna()]


def experiment(runs: pd.DataFrame, checked: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The differences in change of methods at the same preset dose, over fresh seeds, where
    `confirmed` said so of both; no rows where of none.

    Welch's t interval over runs (seeds like these, these prompts). `runs` comes from dose_runs with
    values.
    """
    rows, keys = [], ["base_model", "objective", "dataset", "epochs", "measure", "dose"]
    for key, own in checked[checked["confirmed"]].groupby(keys, sort=False, dropna=False):
        fresh = [
            _at_preset(runs, row)[
                lambda frame, row=row: (
                    ~frame["seed"].astype(str).isin(row["pilot_seeds"].split(", "))
                )
            ]
            for row in own.to_dict("records")
        ]
        for a, b in combinations(fresh, 2):
            means, n = (
                [getattr(side["value"], what)() for side in (a, b)] for what in ("mean", "count")
            )
            spread = [
                side["value"].var() / max(size, 1) for side, size in zip((a, b), n, strict=True)
            ]
            rows.append(
                {
                    "base_model": key[0],
                    "method": a["method"].iloc[0],
                    "group": PRESET,
                    "member": f"{key[1]}, {key[3]} ep, dose {key[5]:g}",
                    "contrast": EXPERIMENT[key[4]],
                    "against": b["method"].iloc[0],
                    **_welch(means, spread, [size - 1 for size in n]),
                    "n_runs": sum(n),
                    "population": THESE_PROMPTS,
                    "how": (
                        "matched-dose experiment: rates set on pilot seeds, confirmed on these"
                        " fresh ones; Welch's t interval"
                    ),
                }
            )
    return complete(pd.DataFrame(rows).assign(**labels)) if rows else complete(pd.DataFrame())


# ---- in words
def doses_sentence(estimates: pd.DataFrame, arms: pd.DataFrame, what: str) -> str:
    """How many runs did nothing, and how many pairs of methods differ in `what`, as configured and
    at matched dose.
    """
    usual = arms[arms["arm"].isin([TRAINED, NO_OP])]
    idle = f"{usual['arm'].eq(NO_OP).sum()} of {counted(len(usual), 'run')} did nothing (no-ops)."
    if not usual.groupby("base_model")["method"].nunique().gt(1).any():
        return f"{idle} No base model was trained by two methods, so no methods are compared."
    words = [
        f"{idle} Pairs of methods within a base model whose {INTERVAL}s of the difference in"
        f" {what} exclude zero (not adjusted):"
        f" as configured {_differing(estimates[estimates['group'].eq(AS_CONFIGURED)])}"
    ]
    means = estimates[estimates["member"].eq(MEAN_DOSE)]
    for measure, name in DOSES.items():
        found = _differing(means[means["contrast"].eq(MATCHED[measure])])
        words.append(f"at equal {name} {found}")
    return "; ".join(words) + ". The last are descriptions: dose comes after treatment."


def _differing(rows: pd.DataFrame) -> str:
    told = rows.dropna(subset=["ci_low", "ci_high"])
    out = (
        f" ({rows['value'].isna().sum()} more share no dose)" if rows["value"].isna().any() else ""
    )
    return f"{(told['ci_low'].gt(0) | told['ci_high'].lt(0)).sum()} of {len(told)}{out}"
