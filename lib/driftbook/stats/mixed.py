"""A mixed-effects model, fitted: one result for linear.py and logistic.py.

The terms are patsy's; what the data cannot tell is dropped by name, and contrasts that need it are
null.
"""

import re
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy.special import expit, stdtr, stdtrit

from driftbook.stats.confidence import UPPER

MOST_BYTES = 2 * 2**30  # of a model's largest matrix with its copies
MATRICES = 4  # the frame, its values, the columns kept, and the basis that finds aliased ones
NODES = 40  # of Gauss and Hermite's rule, for the mean over random effects


@dataclass(frozen=True)
class Design:
    """The fixed part of a model: patsy's own terms, and which of them the data can tell apart."""

    info: Any  # patsy's DesignInfo
    kept: np.ndarray  # positions of the columns that stay
    null: np.ndarray  # directions in which the data do not vary

    def at(self, rows: pd.DataFrame) -> np.ndarray:
        import patsy

        full = np.asarray(patsy.build_design_matrices([self.info], rows, NA_action="raise")[0])
        strange = np.abs(full @ self.null).max(axis=1, initial=0) > 1e-6
        return np.where(strange[:, None], np.nan, full[:, self.kept])


@dataclass(frozen=True)
class Satterthwaite:
    """What the degrees of freedom of a linear fit's contrasts need: how the covariance of the fixed
    terms moves with each variance parameter, and the parameters' own covariance.
    """

    moves: np.ndarray  # [parameters, terms, terms]
    spread: np.ndarray  # [parameters, parameters]

    def df(self, weights: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """2 v^2 / Var(v) for each row of weights with its variance v (Giesbrecht and Burns 1985,
        Biometrics 41, 477; Kuznetsova et al. 2017, J. Stat. Softw. 82, 13, equation 6).
        """
        slope = np.einsum("ij,mjk,ik->im", weights, self.moves, weights, optimize=True)
        return 2 * variance**2 / np.einsum("im,mn,in->i", slope, self.spread, slope)


@dataclass(frozen=True)
class MixedFit:
    """A mixed model, fitted. `fixed` and `random` in the units of the response (logits where it is
    logistic).

    `df` counts runs less fixed terms: Laplace's approximation has no degrees of freedom, and what
    repeats is a run; where it is not positive nothing has an interval. A linear fit's contrasts
    have Satterthwaite's instead (`degrees`). `report`: optimiser, evaluations,
    gradient_norm (largest slope of the log-likelihood per standard error of a parameter), warnings,
    at_zero (components), singular, seconds (CPU).
    """

    fixed: pd.DataFrame  # term, estimate, se
    cov: np.ndarray = field(repr=False)
    df: float
    random: pd.DataFrame  # group, term, sd
    loglik: float
    converged: bool
    notes: tuple[str, ...]
    design: Design = field(repr=False)
    report: dict[str, Any] = field(default_factory=dict, repr=False)
    degrees: Satterthwaite | None = field(default=None, repr=False)
    by: str = ""  # the column by which a logistic fit's runs differ in their spread

    def at(self, rows: pd.DataFrame) -> np.ndarray:
        """The fixed terms at these rows, to be averaged or subtracted and given to `contrast`; NaN
        where a row is not estimable.
        """
        return self.design.at(rows)

    def contrast(self, weights: np.ndarray) -> pd.DataFrame:
        """Estimate, se, df, interval and p value of each row of weights over the fixed terms."""
        weights = np.atleast_2d(np.asarray(weights, float))
        return self._tested(weights @ self.fixed["estimate"].to_numpy(float), weights)

    def risk(
        self, rows: pd.DataFrame, weights: np.ndarray, alone: np.ndarray | None = None
    ) -> pd.DataFrame:
        """Contrasts [k, rows] of probabilities at `rows` in percentage points, of a logistic fit:
        estimate, se, df, interval and p.

        A probability is the mean over runs and prompts like these: the random effects are
        integrated out (Gauss and Hermite's rule). `alone` marks rows without a run effect (a base
        model itself). Standard errors by the delta method over the fixed effects, the random
        effects' spread taken as known.
        """
        at, weights = self.at(rows), np.atleast_2d(np.asarray(weights, float))
        sd = self.random.set_index("group")["sd"]
        names = "run_id of " + rows[self.by].astype(str) if self.by else ["run_id"] * len(rows)
        of_runs = sd.reindex(names).fillna(0.0).to_numpy()
        of_runs = np.where(False if alone is None else alone, 0.0, of_runs)
        others = sd[[not name.startswith("run_id") for name in sd.index]]
        spread = np.sqrt((others**2).sum() + of_runs**2)
        nodes, share = np.polynomial.hermite_e.hermegauss(NODES)
        middle = (at @ self.fixed["estimate"].to_numpy(float))[:, None]
        p = expit(middle + spread[:, None] * nodes)
        mean, slope = p @ share / share.sum(), (p * (1 - p)) @ share / share.sum()
        lost = ((weights != 0) & np.isnan(mean)).any(axis=1)
        moved = np.nan_to_num(slope)[:, None] * np.nan_to_num(at)
        found = self._tested(100 * weights @ np.nan_to_num(mean), 100 * weights @ moved)
        found.loc[lost] = np.nan
        return found

    def _tested(self, estimate: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
        df, se = np.full(len(weights), float(self.df)), np.full(len(weights), np.nan)
        if self.df > 0:
            variance = np.einsum("ij,jk,ik->i", weights, self.cov, weights)
            se = np.sqrt(variance)
            if self.degrees is not None:
                with np.errstate(invalid="ignore", divide="ignore"):
                    df = self.degrees.df(weights, variance)
        half = stdtrit(np.maximum(df, 1), UPPER) * se
        p = 2 * stdtr(np.maximum(df, 1), -(np.abs(estimate) / np.where(se > 0, se, np.nan)))
        ends = {"ci_low": estimate - half, "ci_high": estimate + half}
        return pd.DataFrame({"estimate": estimate, "se": se, "df": df, **ends, "p": p})


# ---- for both kinds
def fitted(
    design: Design,
    names: pd.Index,
    estimate: np.ndarray,
    cov: np.ndarray,
    df: float,
    random: pd.DataFrame,
    loglik: float,
    converged: bool,
    notes: list[str],
    report: dict[str, Any],
    **more: Any,
) -> MixedFit:
    """The result, with standard errors where there are degrees of freedom."""
    se = np.sqrt(np.diag(cov)) if df > 0 else np.nan
    fixed = pd.DataFrame({"term": names, "estimate": estimate, "se": se})
    notes = tuple(dict.fromkeys(notes))
    return MixedFit(fixed, cov, df, random, loglik, converged, notes, design, report, **more)


def reported(
    optimiser: str,
    evaluations: int | None,
    gradient: float,
    at_zero: tuple[str, ...],
    started: float | None,
    warnings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """How the fit went, as MixedFit.report."""
    return {
        "optimiser": optimiser,
        "evaluations": evaluations,
        "gradient_norm": gradient,
        "warnings": warnings,
        "at_zero": at_zero,
        "singular": bool(at_zero),
        "seconds": 0.0 if started is None else time.process_time() - started,
    }


def framed(
    rows: pd.DataFrame, formula: str, groups: tuple[str, ...]
) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame, list[str]]:
    """The rows with a value for all of the formula, the response, the design, and a note on the
    rows that were left out.

    Raises:
        ValueError: there is no row, or no column that the formula or a group names.
    """
    import patsy  # here, since few notebooks fit models and statsmodels takes a second to import

    if rows.empty:
        raise ValueError(f"there is no row to fit {formula!r} to")
    named = [part.strip() for group in groups for part in re.split(r" by |[|:]", group)]
    if absent := [name for name in named if name not in rows]:
        raise ValueError(f"groups={groups!r}: there is no column {absent[0]!r}")
    rows, response = rows.reset_index(drop=True), formula.partition("~")[0].strip()
    if response in rows:  # true, false and null, which patsy does not know
        known = rows[response].astype("Float64").to_numpy(float, na_value=np.nan)
        rows = rows.assign(**{response: known})
    missing = patsy.NAAction(NA_types=["None", "NaN"])
    try:
        _few_levels(rows, formula)
        both = patsy.incr_dbuilders(formula, lambda: iter([rows]), NA_action=missing)
        _narrow_enough(len(rows), both[1].column_names, formula)
        left, right = patsy.build_design_matrices(both, rows, missing, return_type="dataframe")
    except patsy.PatsyError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"formula={formula!r} does not fit the columns ({said})") from None
    if right.empty:
        raise ValueError(f"no row has a value for {formula!r}: nothing to fit")
    notes = [f"{len(rows) - len(right)} rows left out: no value"] if len(right) < len(rows) else []
    return rows.loc[right.index], left.to_numpy()[:, -1], right, notes


def _narrow_enough(n_rows: int, columns: list[str], formula: str) -> None:
    """Refuse fixed terms that need more memory than there should be, before any is taken."""
    what = f"{n_rows:,} rows and the {len(columns):,} columns of {formula!r} are a dense matrix"
    small_enough(what, 8 * MATRICES * n_rows * len(columns))


def _few_levels(rows: pd.DataFrame, formula: str) -> None:
    """Refuse a factor whose columns alone need more than there should be: patsy makes the contrasts
    of its levels, levels x levels, before it names a column.
    """
    import patsy

    terms = patsy.ModelDesc.from_formula(formula).rhs_termlist
    for name in sorted({factor.name() for term in terms for factor in term.factors}):
        column = re.sub(r"^C\((\w+)\)$", r"\1", name)
        if column in rows and (column != name or not is_numeric_dtype(rows[column])):
            n_levels = rows[column].nunique()
            what = f"the contrasts of the {n_levels:,} levels of {name} in {formula!r} are a matrix"
            small_enough(what, 8 * MATRICES * n_levels**2)


def small_enough(what: str, needed: int) -> None:
    """Refuse, before any is taken, what needs more bytes of memory than MOST_BYTES."""
    if needed > MOST_BYTES:
        raise ValueError(
            f"{what} of {needed / 2**30:,.1f} GB with its copies, and the limit is"
            f" {MOST_BYTES / 2**30:.1f} GB; nothing was fitted. Leave out a group or a term,"
            " average over one, or model a part of the rows"
        )


def never_run(rows: pd.DataFrame, formula: str) -> list[str]:
    """A note for each base model x method that the model has a term for and no run."""
    if not {"base_model", "method"} <= set(rows) or "base_model" not in formula:
        return []
    counts = pd.crosstab(rows["base_model"].astype(str), rows["method"].astype(str)).stack()
    return [f"never run: {base} x {method}" for (base, method), n in counts.items() if not n]


def estimable(x: np.ndarray, names: pd.Index) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Positions of the columns to keep, from the left, a basis of the directions in which no row
    differs, and a note for each column that is left out.
    """
    kept, basis = [], np.zeros((len(x), 0))
    for i in range(x.shape[1]):
        rest = x[:, i] - basis @ (basis.T @ x[:, i])
        rest -= basis @ (basis.T @ rest)
        if np.linalg.norm(rest) > 1e-8 * max(np.linalg.norm(x[:, i]), 1e-300):
            kept.append(i)
            basis = np.column_stack([basis, rest / np.linalg.norm(rest)])
    null = np.zeros((x.shape[1], 0))
    if len(kept) < x.shape[1]:
        null = np.linalg.svd(x, full_matrices=True)[2][len(kept) :].T
    lost = [f"not estimable: {names[i]} (constant or aliased)" for i in range(x.shape[1])]
    return np.array(kept), null, [note for i, note in enumerate(lost) if i not in kept]
