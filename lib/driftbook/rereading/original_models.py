"""Mixed models of the original study's runs and verdicts, as estimates."""

from itertools import combinations

import numpy as np
import pandas as pd

from driftbook.rereading import original_study
from driftbook.rereading.original_analysis import EQUAL, LABELS, RATES_MEMBER, SAFETY, SETTING
from driftbook.stats import estimation


# ---- mixed models
def category_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Run x category changes in points for stats.rate_model; log10_rate is the true rate's
    logarithm, centred within method.
    """
    keys = ["run_id", "base_model", "method", *SETTING, "rate", "round"]
    long = rows.melt(
        id_vars=keys,
        value_vars=list(original_study.HEX_PHI),
        var_name="category",
        value_name="difference",
    )
    centre = np.log10(rows["rate"]).groupby(rows["method"]).mean()
    return long.assign(
        log10_rate=np.log10(long["rate"]) - long["method"].map(centre),
        round=long["round"].astype(str),
    )


def item_rows(rows: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """One row per verdict of the runs whose true rate is known, with the run's settings, for
    stats.item_model; low: 1 where that rate is 2e-5.
    """
    known = (
        rows[["run_id", "base_model", "method", *SETTING, "rate"]]
        .dropna(subset="rate")
        .assign(low=lambda part: part["rate"].lt(1e-4).astype(int))
    )
    return items[["run_id", "prompt_id", "safe"]].merge(known, on="run_id")


def of_model(
    fit, weights: np.ndarray, names: pd.DataFrame, outcome: str, model: str, contrast: str
) -> pd.DataFrame:
    """Contrasts of a mixed model as estimates; `names` gives base_model, method and, where they
    apply, member and against of each row of weights.
    """
    found = fit.contrast(weights).rename(columns={"estimate": "value"})[
        ["value", "se", "ci_low", "ci_high", "p"]
    ]
    what = "categories" if outcome == SAFETY else "prompts"
    how = (
        ("linear mixed model, REML" if outcome == SAFETY else "logistic mixed model, Laplace")
        + "; one run variance for all methods"
        + ("" if fit.converged else "; did not converge")
    )
    names = names.reindex(columns=["base_model", "method", "member", "against"])
    frame = pd.concat([names.astype(object).reset_index(drop=True), found], axis=1)
    return estimation.complete(
        frame.assign(
            **LABELS,
            outcome=outcome,
            group=EQUAL,
            estimator=model,
            contrast=contrast,
            population=f"runs and {what} like these, these base models",
            how=how,
        )
    )


def contrast_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per base model and method at one and the same setting, for contrasts in which all else
    is equal.
    """
    cells = (
        rows[["base_model", "method"]]
        .drop_duplicates()
        .astype(object)
        .sort_values(["method", "base_model"], ignore_index=True)
    )
    return cells.assign(
        objective="sft",
        dataset="ultrafeedback_binarized",
        epochs=5,
        round="2",
        log10_rate=0.0,
        low=0,
    )


def pairs_of_methods(fit, at: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """A mixed model's differences between methods, mean over base models: weights and names."""
    terms = {
        method: fit.at(at[at["method"].eq(method)]).mean(axis=0)
        for method in original_study.METHOD_SETTINGS
    }
    pairs = list(combinations(terms, 2))
    names = pd.DataFrame(pairs, columns=["method", "against"]).assign(base_model="all")
    return np.array([terms[one] - terms[other] for one, other in pairs]), names


def effect_of_rate(
    fit, at: pd.DataFrame, column: str, low: float, high: float
) -> tuple[np.ndarray, pd.DataFrame]:
    """2e-5 instead of 1e-3 within each method, by a mixed model: weights and names; `column` takes
    the values `low` and `high` there.
    """
    own = at.drop_duplicates("method")
    return fit.at(own.assign(**{column: low})) - fit.at(own.assign(**{column: high})), own[
        ["method"]
    ].assign(base_model="all", member=RATES_MEMBER.format("true"))
