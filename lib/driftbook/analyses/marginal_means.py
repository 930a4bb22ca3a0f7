"""Marginal means of a mixed model and their contrasts, as weights over the rows of a balanced grid:
the same for a linear and a logistic fit.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from driftbook.stats.comparisons import DIFFERENCE, INTERACTION
from driftbook.stats.estimation import complete
from driftbook.stats.mixed import MixedFit
from driftbook.stats.terms import AS_CONFIGURED, CHANGE, NO_OP, NONE, TRAINED
from driftbook.study.methods import METHODS

RATES, SINGLE = (
    "runs and categories like these, these base models",
    "runs and prompts like these, these base models",
)
WITHOUT_BASE_ERROR = ", without the error of the base model's own score"
OBJECTIVE, RATE = "sft instead of dpo", "ten times the learning rate"


def items(verdicts: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """The verdicts (`harm`) of trained runs, no-ops and base models with the run's settings, for
    `stats.item_model`.

    A base model's own rows have no run_id (it was not drawn), method none, and zero for dpo (sft
    -.5, dpo .5) and log10_rate (centred within method), so that its difference to a method is the
    method's at its own middle.
    """
    runs = arms[arms["arm"].isin([TRAINED, NO_OP, "base"])]
    rate = np.log10(runs["learning_rate"].astype(float))
    runs = runs.assign(
        log10_rate=(rate - rate.groupby(runs["method"]).transform("mean")).fillna(0.0),
        dpo=runs["objective"].map({"sft": -0.5, "dpo": 0.5}).fillna(0.0),
    )
    frame = verdicts.merge(
        runs[["run_id", "base_model", "method", "dpo", "log10_rate", "arm"]], on="run_id"
    )
    frame["run_id"] = frame["run_id"].astype(object).where(frame["arm"].ne("base"), None)
    for name, order in (("method", METHODS), ("base_model", arms["base_model"].unique())):
        frame[name] = pd.Categorical(
            frame[name], [level for level in order if level in set(frame[name])]
        )
    return frame[
        ["run_id", "prompt_id", "category", "base_model", "method", "dpo", "log10_rate", "harm"]
    ]


def means_grid(frame: pd.DataFrame, settings: tuple[str, ...] = ("objective",)) -> pd.DataFrame:
    """Every base model x method that was run x every combination of settings that was run, at each
    method's middle learning rate (log10_rate 0).

    `frame` holds the rows that a model was fitted to. A row of method `none` (the base model
    itself) stands once per base model: it has no settings, and zero for those that are numbers.
    """
    trained = frame["method"].ne("none")
    cells = frame[["base_model", "method"]].drop_duplicates().astype(object)
    combinations_run = frame.loc[trained, list(settings)].drop_duplicates()
    neutral = {
        name: 0.0 if pd.api.types.is_numeric_dtype(frame[name]) else combinations_run[name].iloc[0]
        for name in settings
    }
    rows = pd.concat(
        [
            cells[cells["method"].ne("none")].merge(combinations_run, how="cross"),
            cells[cells["method"].eq("none")].assign(**neutral),
        ],
        ignore_index=True,
    )
    order = rows["method"].map(METHODS.index)
    return (
        rows.assign(log10_rate=0.0, order=order)
        .sort_values("order", kind="stable", ignore_index=True)
        .drop(columns="order")
    )


def contrasts(rows: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """What is asked of a fit: a name (base_model, method, contrast) and a row of weights over the
    grid's rows for each.

    The change of each cell (against the base model's own row where the grid has one), the mean over
    base models where all have the method, each pair of methods, and each base model's change less
    the mean over base models.
    """
    changes = {
        key: _change(rows, *key)
        for key in (
            rows.loc[rows["method"].ne("none"), ["base_model", "method"]]
            .drop_duplicates()
            .itertuples(index=False, name=None)
        )
    }
    bases, methods = (list(dict.fromkeys(key[i] for key in changes)) for i in (0, 1))
    whole = [method for method in methods if all((base, method) in changes for base in bases)]
    changes |= {
        ("all", method): np.mean([changes[base, method] for base in bases], axis=0)
        for method in whole
    }
    found = {(*key, CHANGE, NONE): weights for key, weights in changes.items()}
    for base in [*bases, "all"]:
        for method, other in combinations(
            [method for method in methods if (base, method) in changes], 2
        ):
            found[base, method, DIFFERENCE, other] = changes[base, method] - changes[base, other]
    if len(bases) > 1:
        found |= {
            (base, method, INTERACTION, NONE): changes[base, method] - changes["all", method]
            for method in whole
            for base in bases
        }
    names = pd.DataFrame(list(found), columns=["base_model", "method", "contrast", "against"])
    return names, np.array(list(found.values())).reshape(len(found), len(rows))


def _change(rows: pd.DataFrame, base_model: str, method: str) -> np.ndarray:
    """The mean over a cell's rows, less the base model's own row where there is one."""
    own = (rows["base_model"].eq(base_model) & rows["method"].eq(method)).to_numpy(float)
    none = (rows["base_model"].eq(base_model) & rows["method"].eq("none")).to_numpy(float)
    return own / own.sum() - none / max(none.sum(), 1)


def effects(
    rows: pd.DataFrame, name: str, low, high
) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """The effect of one setting within each method, over all base models: `high` instead of `low`,
    all other settings as they are in the grid.

    Gives the rows at both levels, the weights over them, and the names.
    """
    own = rows[rows["method"].ne("none")].drop(columns=name).drop_duplicates()
    both = pd.concat([own.assign(**{name: level}) for level in (high, low)], ignore_index=True)
    sign = np.repeat([1.0, -1.0], len(own))
    methods = list(dict.fromkeys(own["method"]))
    weights = np.array(
        [sign * both["method"].eq(method) / own["method"].eq(method).sum() for method in methods]
    )
    return (
        both,
        weights,
        pd.DataFrame(
            {
                "base_model": "all",
                "method": methods,
                "contrast": OBJECTIVE if name == "objective" else RATE,
            }
        ),
    )


# ---- as estimates
def of_fit(
    fit: MixedFit,
    rows: pd.DataFrame,
    names: pd.DataFrame,
    weights: np.ndarray,
    model: str,
    **labels: str,
) -> pd.DataFrame:
    """Contrasts of a linear fit as estimates, in the units of its response; `model` is the name of
    the estimator.
    """
    at = fit.at(rows)
    found = fit.contrast(
        np.where(
            (np.isnan(at).any(1) & (weights != 0)).any(1)[:, None],
            np.nan,
            weights @ np.nan_to_num(at),
        )
    )
    kept = any("base_model:category" in name for name in fit.random["group"])
    asked = set(names["base_model"])
    one = rows["base_model"].nunique() == 1 or (len(asked) == 1 and "all" not in asked)
    one = one and fit.random["group"].eq("category").any()  # which then holds it
    how = "linear mixed model (REML)" + ("" if kept or one else WITHOUT_BASE_ERROR)
    return _rows(fit, found, names, model, RATES, how, labels)


def of_risks(
    fit: MixedFit,
    rows: pd.DataFrame,
    names: pd.DataFrame,
    weights: np.ndarray,
    model: str,
    **labels: str,
) -> pd.DataFrame:
    """Contrasts of a logistic fit as estimates: differences of population-averaged probabilities in
    percentage points.
    """
    found = fit.risk(rows, weights, rows["method"].eq("none").to_numpy())
    how = "logistic mixed model (Laplace), population-averaged"
    how += ", spread of random effects taken as known"
    if not fit.random["group"].eq("prompt_id:method").any():
        how += ", without what a method does to single prompts"
    return _rows(fit, found, names, model, SINGLE, how, labels)


def _rows(
    fit: MixedFit,
    found: pd.DataFrame,
    names: pd.DataFrame,
    model: str,
    population: str,
    how: str,
    labels: dict[str, str],
) -> pd.DataFrame:
    kind = "run-level" if fit.degrees is None else "Satterthwaite's"
    end = "" if fit.converged else "; did not converge"
    known = [how if pd.isna(df) else f"{how}, {df:.0f} {kind} df" for df in found["df"]]
    words = [word + end for word in known]
    found = found.rename(columns={"estimate": "value"})[["value", "se", "ci_low", "ci_high", "p"]]
    names = names.reindex(columns=["base_model", "method", "contrast", "against"])
    names = names.fillna({"contrast": CHANGE, "against": NONE})
    frame = pd.concat([names.astype(object), found], axis=1)
    more = {"group": AS_CONFIGURED, "estimator": model, "population": population}
    return complete(frame.assign(**labels, **more, how=words))


def side_by_side(estimates: pd.DataFrame, models: dict[str, str]) -> pd.DataFrame:
    """The same change by several estimators, a row per base model and method: value, ci_low,
    ci_high of each (by the names in `models`, which gives estimators), and `word`.

    word: "agree", or what they disagree on: whether there is a change (an interval holds zero and
    another does not), or its sign.
    """
    wanted = {estimator: name for name, estimator in models.items()}
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].eq(AS_CONFIGURED)]
    rows = rows[rows["estimator"].isin(list(wanted))]
    rows = rows.assign(model=rows["estimator"].map(wanted))
    table = rows.pivot_table(
        index=["base_model", "method"],
        columns="model",
        values=["value", "ci_low", "ci_high"],
        sort=False,
        dropna=False,
    ).astype(float)
    sign = np.sign(table["ci_low"].to_numpy()) * (
        np.sign(table["ci_low"].to_numpy()) == np.sign(table["ci_high"].to_numpy())
    )
    known = ~np.isnan(table["ci_low"].to_numpy())
    told = np.where(known, sign, np.nan)
    low, high = (
        np.where(known, told, np.inf).min(axis=1, initial=np.inf),
        np.where(known, told, -np.inf).max(axis=1, initial=-np.inf),
    )
    words = [known.sum(axis=1) < 2, low == high, (low < 0) & (high > 0)]
    table["word"] = np.select(
        words,
        ["only one can tell", "agree", "sign differs"],
        "some see a change, others cannot tell",
    )
    return table
