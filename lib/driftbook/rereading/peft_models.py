"""Mixed models of PEFT's published runs: methods, settings, and the curves of training."""

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from driftbook.rereading.peft_results import (
    ACCURACY,
    BY_METHOD,
    CLASS,
    DOUBLING,
    FACTOR,
    FASTER,
    FORGETTING,
    GROWTH,
    HIGHEST,
    LIKE_THESE,
    LOWEST,
    MIXED,
    N_QUESTIONS,
    ONE_STAGE,
    POOLED,
    RATE,
    SIZE,
    SPREAD,
    TEST,
    THESE_METHODS,
    TWO_STAGES,
    VALIDATION,
    labelled_rows,
)
from driftbook.stats.confidence import UPPER
from driftbook.stats.linear import rate_model
from driftbook.stats.mixed import MixedFit
from driftbook.stats.terms import LEVEL
from driftbook.study.tables import ESTIMATES


# ---- mixed models of single runs
def modelled(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs with what models need: accuracy in percent, log10 of forgetting (null where
    nothing was forgotten), settings centred.

    size is log10 of the trainable parameters less its mean; rate is log10 of the learning rate less
    the mean of the run's method, since each method has its own scale.

    Raises:
        ValueError: no run finished.
    """
    done = runs[runs["ok"]].copy()
    if done.empty:
        raise ValueError(f"none of {len(runs)} runs finished: there is nothing to model")
    lost = done["forgetting"].astype(float)
    size, rate = (
        np.log10(done["n_trainable"].astype(float)),
        np.log10(done["learning_rate"].astype(float)),
    )
    done["accuracy"] = 100 * done["k"].astype(float) / N_QUESTIONS[TEST]
    done["log_forgetting"] = np.log10(lost.where(lost > 0))
    return done.assign(
        size=size - size.mean(), rate=rate - rate.groupby(done["method"]).transform("mean")
    )


SCALES = {
    ACCURACY: ("accuracy", ACCURACY, None),
    FORGETTING: ("log_forgetting", FACTOR, 10.0),
}  # column, outcome of differences, base of the logarithm
LIMITS = {ACCURACY: (0.0, 100.0), FORGETTING: (0.0, np.inf)}  # what an outcome can be
_SETTINGS = "size + rate + method_class"


def means_of_methods(rows: pd.DataFrame, outcome: str) -> tuple[pd.DataFrame, MixedFit]:
    """The mean of each method by three models (pooled, by method, mixed) as estimates, and the
    mixed model: a random intercept for each method.
    """
    column, _, base = SCALES[outcome]
    rows = rows[rows[column].notna()]
    fit = rate_model(rows, f"{column} ~ 1", "method")
    table = pooling(
        rows.groupby("method")[column].agg(["mean", "size"]), *_spread(rows, column), fit
    )
    parts = [
        _model(table, model, outcome, base, rows["base_model"].iloc[0])
        for model in (POOLED, BY_METHOD, MIXED)
    ]
    return ESTIMATES.concat(parts), fit


def _spread(rows: pd.DataFrame, column: str) -> tuple[float, int]:
    """Standard deviation of runs within their methods, pooled over methods, and its df; NaN where
    no method has two runs.
    """
    rest = rows[column] - rows.groupby("method")[column].transform("mean")
    df = len(rows) - rows["method"].nunique()
    return (float(np.sqrt((rest**2).sum() / df)) if df else np.nan), df


def pooling(means: pd.DataFrame, sd: float, df: float, fit: MixedFit) -> pd.DataFrame:
    """For each method (rows of mean and size): its own mean, the pooled one and the best linear
    unbiased prediction, each with se and df; and the weight of its own.

    The prediction mu + w (mean - mu), w = t2 / (t2 + s2 / n), has the error variance t2 (1 - w) +
    (1 - w)^2 Var(mu) (Robinson 1991, Statistical Science 6:15), with the variances t2 between and
    s2 within methods taken as known. Null where there is one method, or one run of each: then the
    two cannot be told apart.
    """
    between, within = fit.random.set_index("group")["sd"].reindex(["method", "residual"])
    mu, var_mu, n = fit.fixed["estimate"].iloc[0], fit.cov[0, 0], means["size"]
    weight = between**2 / (between**2 + within**2 / n) if between != 0 else 0.0 * n
    return means.assign(
        weight=weight,
        **{BY_METHOD: means["mean"], POOLED: mu, MIXED: mu + weight * (means["mean"] - mu)},
        **{
            f"se {BY_METHOD}": sd / np.sqrt(n),
            f"se {POOLED}": np.sqrt(var_mu),
            f"se {MIXED}": np.sqrt(between**2 * (1 - weight) + (1 - weight) ** 2 * var_mu),
        },
        **{f"df {BY_METHOD}": df, f"df {POOLED}": fit.df, f"df {MIXED}": fit.df},
    )


def _model(
    table: pd.DataFrame, model: str, outcome: str, base: float | None, base_model: str
) -> pd.DataFrame:
    """One model's means of methods as estimates, back on the outcome's own scale."""
    value, se, df = (table[f"{name}{model}"].astype(float) for name in ("", "se ", "df "))
    half = pd.Series(stdtrit(np.maximum(df, 1), UPPER), table.index).where(df > 0) * se
    frame = pd.DataFrame(
        {"value": value, "se": se.where(df > 0), "ci_low": value - half, "ci_high": value + half}
    ).where(np.isfinite)
    shrunk = (
        "best linear unbiased prediction (REML, variances as known); own mean weighs "
        + table["weight"].map("{:.0%}".format)
    ).where(
        table["weight"].notna(),
        "one method, or one run of each: methods and settings cannot be told apart",
    )
    hows = {
        POOLED: "mean of all methods, linear mixed model (REML)",
        BY_METHOD: "mean of the method's own runs; one spread within methods for all",
        MIXED: shrunk,
    }
    frame = frame.assign(
        method=table.index, how=hows[model], n_runs=table["size"], base_model=base_model
    )
    frame = _back(frame, base).assign(
        outcome=outcome,
        group="all",
        contrast=LEVEL,
        estimator=model,
        population=LIKE_THESE if model == POOLED else THESE_METHODS,
    )
    return labelled_rows(
        frame.assign(
            ci_low=frame["ci_low"].clip(lower=LIMITS[outcome][0]),
            ci_high=frame["ci_high"].clip(upper=LIMITS[outcome][1]),
        )
    )


def _back(frame: pd.DataFrame, base: float | None) -> pd.DataFrame:
    """The estimates from a logarithm back to the scale itself: geometric means and factors, whose
    se stays unsaid.
    """
    if base is None:
        return frame
    names = ["value", "ci_low", "ci_high"]
    return frame.assign(**(base ** frame[names]), se=None, how=frame["how"] + "; of the logarithm")


def terms(rows: pd.DataFrame, outcome: str) -> tuple[pd.DataFrame, MixedFit]:
    """What settings go with: ten times the parameters, ten times the learning rate within a method,
    prompt-based against adapter-based; and the model.
    """
    column, differences, base = SCALES[outcome]
    formula = (
        f"{column} ~ {_SETTINGS}"
        if rows["method_class"].nunique() > 1
        else f"{column} ~ size + rate"
    )
    fit = rate_model(rows, formula, "method")
    found = _contrasts(fit, rows)
    without = {
        method: _contrasts(rate_model(part, formula, "method"), part)["value"]
        for method, part in _without_one(rows, formula)
    }
    frame = pd.concat([found, _extremes(found, pd.DataFrame(without))], ignore_index=True)
    frame = frame.assign(
        base_model=rows["base_model"].iloc[0],
        method="all",
        group="all",
        outcome=differences,
        population=LIKE_THESE,
        n_runs=int(rows[column].notna().sum()),
    )
    return labelled_rows(_back(frame, base)), fit


def _contrasts(fit: MixedFit, rows: pd.DataFrame) -> pd.DataFrame:
    """The model's contrasts of settings; a row each, null where the data cannot tell."""
    settings = {SIZE: {"size": 1.0}, RATE: {"rate": 1.0}} | (
        {CLASS: {"method_class": "prompt"}}
        if {"prompt", "adapter"} <= set(rows["method_class"])
        else {}
    )
    zero = {
        "size": 0.0,
        "rate": 0.0,
        "method_class": rows["method_class"].iloc[0] if CLASS not in settings else "adapter",
    }
    weights = [
        fit.at(pd.DataFrame([zero | setting]))[0] - fit.at(pd.DataFrame([zero]))[0]
        for setting in settings.values()
    ]
    found = fit.contrast(np.array(weights)).rename(columns={"estimate": "value"})[
        ["value", "se", "ci_low", "ci_high", "p"]
    ]
    how = "linear mixed model with a random intercept of methods, REML, Satterthwaite's df" + (
        "" if fit.converged else "; did not converge"
    )
    return found.assign(contrast=list(settings), how=how)


def _without_one(rows: pd.DataFrame, formula: str) -> list[tuple[str, pd.DataFrame]]:
    """The rows without each method in turn, where enough is left to fit the same model."""
    parts = [(method, rows[rows["method"].ne(method)]) for method in rows["method"].unique()]
    classes = rows["method_class"].nunique()
    return [
        (method, part)
        for method, part in parts
        if part["method"].nunique() > 4
        and (_SETTINGS not in formula or part["method_class"].nunique() == classes)
    ]


def _extremes(found: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    """The lowest and highest estimate of each contrast when one method is left out; without
    intervals, and no rows where no method can be.
    """
    known = without.dropna(how="all")
    if known.empty:
        return found[:0]
    contrast = found.loc[known.index, "contrast"]
    ends = {
        LOWEST: (known.min(axis=1), known.idxmin(axis=1)),
        HIGHEST: (known.max(axis=1), known.idxmax(axis=1)),
    }
    parts = [
        pd.DataFrame(
            {
                "contrast": contrast,
                "estimator": ending,
                "value": value,
                "how": "the same model without " + which,
            }
        )
        for ending, (value, which) in ends.items()
    ]
    return pd.concat(parts, ignore_index=True)


def spreads(rows: pd.DataFrame, outcome: str, fits: dict[str, MixedFit]) -> pd.DataFrame:
    """Standard deviations between methods and between runs of a method, by model, and what the
    questions alone would give; estimates without intervals.
    """
    _, differences, base = SCALES[outcome]
    names = {"method": "between methods", "residual": "between runs of a method"}
    parts = [
        fit.random.assign(
            member=fit.random["group"].map(names), how=f"REML, {model}", group=model
        ).rename(columns={"sd": "value"})
        for model, fit in fits.items()
    ]
    if outcome == ACCURACY:
        sd = np.sqrt((rows["accuracy"] * (100 - rows["accuracy"])).mean() / N_QUESTIONS[TEST])
        parts.append(
            pd.DataFrame(
                {
                    "member": "other questions",
                    "value": sd,
                    "how": "binomial, mean over runs",
                    "group": list(fits),
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)[["group", "member", "value", "how"]]
    frame = frame.dropna(subset="member").assign(
        contrast=SPREAD,
        outcome=differences,
        base_model=rows["base_model"].iloc[0],
        method="all",
        population="these runs",
        n_runs=len(rows),
        ci_low=None,
        ci_high=None,
    )
    return labelled_rows(_back(frame, base))


# ---- mixed models of curves
def slopes(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the slope of each run's validation accuracy: percentage points for each doubling
    of the steps, by least squares over its own points.
    """
    curve = doublings(points, rows)
    middle = curve.groupby("run_id")["doubling"].transform("mean")
    curve = curve.assign(
        top=(curve["doubling"] - middle) * curve["percent"],
        bottom=(curve["doubling"] - middle) ** 2,
    )
    sums = curve.groupby("run_id")[["top", "bottom"]].sum()
    return rows.assign(
        slope=rows["run_id"].map(sums["top"] / sums["bottom"].where(sums["bottom"] > 0))
    )


def doublings(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The points of finished runs with method and size, percent correct, and the step as its binary
    logarithm less that of the last.
    """
    curve = points.merge(rows[["run_id", "method", "size", "base_model"]], on="run_id")
    return curve.assign(
        doubling=np.log2(curve["step"] / curve["step"].max()), percent=100 * curve["k"] / curve["n"]
    )


def growth(points: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, MixedFit]]:
    """How validation accuracy grows with the steps, and whether larger adapters grow faster, by two
    models; and the models.

    First the slopes of single runs, modelled with a random intercept of methods: valid whatever
    else runs differ in (a summary measure of repeated measures, Matthews et al. 1990, BMJ 300:230).
    Then all points, with random intercepts of methods and runs: it takes runs of a size to have one
    slope.
    """
    two = rate_model(slopes(points, rows), "slope ~ size", "method")
    groups = (
        ("method", "run_id") if rows["method"].duplicated().any() else ("run_id",)
    )  # with one run of each method the two are one
    one = rate_model(doublings(points, rows), "percent ~ doubling * size", groups)
    weights = {
        TWO_STAGES: (two, two.at(_sizes({}))),
        ONE_STAGE: (one, one.at(_sizes({"doubling": 1.0})) - one.at(_sizes({"doubling": 0.0}))),
    }
    parts = []
    for group, (fit, at) in weights.items():
        found = fit.contrast(np.array([at[0], at[1] - at[0]])).rename(
            columns={"estimate": "value"}
        )[["value", "se", "ci_low", "ci_high", "p"]]
        how = "linear mixed model, REML, Satterthwaite's df" + (
            "" if fit.converged else "; did not converge"
        )
        parts.append(found.assign(contrast=[DOUBLING, FASTER], group=group, how=how))
    frame = pd.concat(parts, ignore_index=True).assign(
        outcome=GROWTH, benchmark=VALIDATION, base_model=rows["base_model"].iloc[0], method="all"
    )
    frame = frame.assign(
        population=LIKE_THESE + "; these questions",
        n_runs=points["run_id"].nunique(),
        n_items=N_QUESTIONS[VALIDATION],
    )
    return labelled_rows(frame), {TWO_STAGES: two, ONE_STAGE: one}


def _sizes(more: dict[str, float]) -> pd.DataFrame:
    """The mean size, and ten times it."""
    return pd.DataFrame([{"size": 0.0, **more}, {"size": 1.0, **more}])
