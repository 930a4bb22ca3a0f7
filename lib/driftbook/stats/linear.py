"""Linear mixed models of rates with crossed random intercepts, by statsmodels' MixedLM."""

import time
import warnings
from typing import Any

import numpy as np
import pandas as pd

from driftbook.stats.mixed import Design, MixedFit, estimable, fitted, framed, never_run, reported


def rate_model(
    rates: pd.DataFrame,
    formula: str,
    groups: str | tuple[str, ...] = ("run_id", "category"),
    reml: bool = True,
) -> MixedFit:
    """A linear mixed model of rates in percentage points with crossed random intercepts
    (statsmodels' MixedLM), by REML or maximum likelihood.

    `formula` names the response and the fixed terms. Each name in `groups` is a column, or columns
    joined by ':'; "run_id by method" gives the runs of each method a variance of their own; a
    single "days | subject" is an intercept and a slope, correlated. Rows with a null in the formula
    are left out and counted in the notes, as are terms that are constant or aliased, and cells that
    were never run.

    Raises:
        ValueError: there is no row with a value, or no column that the formula or a group names.
    """
    started, groups = time.process_time(), (groups,) if isinstance(groups, str) else tuple(groups)
    rates, y, right, notes = framed(rates, formula, groups)
    slope = _slope(rates, groups) if "|" in "".join(groups) else None
    kept, null, lost = estimable(right.to_numpy(), right.columns)
    notes += lost + never_run(rates, formula)
    design, names = Design(right.design_info, kept, null), right.columns[kept]
    x, n_runs = right.to_numpy()[:, kept], rates[_column(groups[0])].nunique()
    df = n_runs - len(names)
    if df <= 0:
        notes.append(f"{n_runs} runs for {len(names)} fixed terms: no interval")
    exact = np.linalg.lstsq(x, y, rcond=None)[0]
    rest = y - x @ exact
    if rest @ rest < 1e-12 * max(y @ y, 1.0):
        random = pd.DataFrame({"group": [*groups, "residual"], "term": "intercept", "sd": 0.0})
        notes.append("the fixed terms leave no residual: no interval")
        report, cov = reported("none", 0, np.nan, groups, None), np.full((len(names),) * 2, np.nan)
        return fitted(design, names, exact, cov, df, random, np.nan, False, notes, report)
    indicators, dropped = (None, []) if slope else _indicators(rates, groups)
    frame = pd.DataFrame(x, columns=names)
    return _fit(frame, y, df, indicators, notes + dropped, design, reml, started, slope)


def _column(group: str) -> str:
    """The column that a group counts: of "run_id by method" and "days | subject", run_id and
    subject.
    """
    return group.partition(" by ")[0].rpartition("|")[2].strip().split(":")[0]


def _slope(rates: pd.DataFrame, groups: tuple[str, ...]) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Of a single group "days | subject": its names, the levels' codes and the columns of the
    random effects.
    """
    name, _, subject = (part.strip() for part in groups[0].partition("|"))
    if len(groups) > 1:
        raise ValueError(
            f"a random slope ({groups[0]}) must be the only group; give the others as fixed terms"
            " or fit without it"
        )
    effects = np.column_stack([np.ones(len(rates)), rates[name].to_numpy(float)])
    return name, subject, pd.factorize(rates[subject])[0], effects


def _indicators(
    rates: pd.DataFrame, groups: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Rows x levels for each grouping, and a note for each that cannot be told from the residual or
    has one level.
    """
    found, notes = {}, []
    for name in groups:
        column, _, by = name.partition(" by ")
        codes, levels = pd.factorize(rates[column.split(":")].astype(str).agg(" ".join, axis=1))
        if len(levels) in (1, len(rates)):
            notes.append(f"component {name} left out: {len(levels)} levels in {len(rates)} rows")
            continue
        if not by:
            found[name] = np.eye(len(levels))[codes]
            continue
        part = rates[by].astype(str).to_numpy()
        for level in pd.unique(part):
            own, of_level = np.unique(codes[part == level]), f"{column} of {level}"
            if len(own) > 1:
                found[of_level] = (codes[:, None] == own) * 1.0
            else:
                notes.append(f"component {of_level} left out: one level")
    return found, notes


# ---- the fit
def _fit(
    x: pd.DataFrame, y: np.ndarray, df: float, indicators, notes, design, reml, started, slope
) -> MixedFit:
    """The model with crossed components or one random slope."""
    result, tried, gradient, told = _optimised(x, y, indicators, slope, reml)
    if slope:
        random = _slope_spread(result, slope)
    else:
        sd = np.sqrt(np.append(result.vcomp, result.scale))
        random = pd.DataFrame({"group": [*indicators, "residual"], "term": "intercept", "sd": sd})
    share = random["sd"] ** 2 / (random["sd"] ** 2).sum()
    at_zero = tuple(random.loc[share.lt(1e-6) & random["group"].ne("residual"), "group"])
    converged = bool(gradient < 1e-2 or (result.converged and at_zero))
    notes = [*notes, *(f"component {name} is at zero" for name in at_zero)]
    if converged:
        notes.append(f"optimiser {tried[-1]}")
    else:
        notes += [*told, f"did not converge by {', '.join(tried)}"]
    report = reported("MixedLM " + ", ".join(tried), None, gradient, at_zero, started, told)
    cov = _covariance(x.to_numpy(), _roots(result, indicators, slope), float(result.scale))
    found, loglik = np.asarray(result.fe_params), float(result.llf)
    return fitted(design, x.columns, found, cov, df, random, loglik, converged, notes, report)


def _optimised(
    x: pd.DataFrame, y: np.ndarray, indicators: dict | None, slope: tuple | None, reml: bool
) -> tuple[Any, list[str], float, tuple[str, ...]]:
    """MixedLM's result of the optimiser that leaves the flattest slope, restarted by others until
    it vanishes; the optimisers tried, the slope, and the warnings.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    if slope:
        model = MixedLM(y, x, slope[2], exog_re=slope[3])
    else:
        model = MixedLM(y, x, np.ones(len(y)), exog_vc=_components(indicators))
    result, start, tried, flattest = None, None, [], np.inf
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for optimiser in ("lbfgs", "bfgs", "powell"):
            found = model.fit(reml=reml, method=optimiser, start_params=start)
            tried.append(optimiser)
            slopes = _steepness(model, found)
            if result is None or slopes < flattest:
                result, start, flattest = found, found.params_object, slopes
            if flattest < 1e-3:
                break
    messages = dict.fromkeys(str(one.message) for one in caught)
    told = tuple(one for one in messages if "boundary" not in one)  # absolute; ours is relative
    return result, tried, flattest, told


def _components(indicators: dict[str, np.ndarray]):
    from statsmodels.regression.mixed_linear_model import VCSpec

    columns = [
        [[f"{name}[{i}]" for i in range(part.shape[1])]] for name, part in indicators.items()
    ]
    return VCSpec(list(indicators), columns, [[part] for part in indicators.values()])


def _roots(result, indicators: dict[str, np.ndarray] | None, slope: tuple | None) -> np.ndarray:
    """Rows x random effects, each column scaled by its standard deviation, so that the response's
    covariance is roots @ roots.T plus the residual's.
    """
    if not slope:
        parts = zip(result.vcomp, indicators.values(), strict=True)
        none = np.zeros((len(result.model.endog), 0))
        return np.hstack([np.sqrt(variance) * part for variance, part in parts] or [none])
    _, _, codes, columns = slope
    values, vectors = np.linalg.eigh(np.asarray(result.cov_re))
    effects, levels = columns @ (vectors * np.sqrt(np.maximum(values, 0))), np.eye(codes.max() + 1)
    return np.hstack([levels[codes] * effects[:, [i]] for i in range(effects.shape[1])])


def _covariance(x: np.ndarray, roots: np.ndarray, scale: float) -> np.ndarray:
    """Covariance of the fixed effects, (X' V^-1 X)^-1 with the variances found, as lme4's;
    MixedLM's own comes from a joint Hessian, which unbalanced data make up to a tenth off or
    negative.
    """
    w = roots / np.sqrt(scale)
    inner = w.T @ x
    taken = inner.T @ np.linalg.solve(np.eye(w.shape[1]) + w.T @ w, inner)
    return scale * np.linalg.inv(x.T @ x - taken)


def _steepness(model, result) -> float:
    """The largest slope of the log-likelihood in the logarithm of a component's standard deviation,
    by differences; a component at zero has none.
    """
    from statsmodels.regression.mixed_linear_model import MixedLMParams

    fixed = result.params_object.fe_params
    root, spread = (np.asarray(part) / result.scale for part in (result.cov_re, result.vcomp))

    def value(i: int, step: float) -> float:
        factor = np.ones(len(spread) + len(root))
        factor[i] = np.exp(step)
        scale, own = factor[len(spread) :], factor[: len(spread)]
        cov_re, vcomp = scale[:, None] * root * scale, spread * own**2
        given = MixedLMParams.from_components(fe_params=fixed, cov_re=cov_re, vcomp=vcomp)
        return model.loglike(given, profile_fe=True)

    sizes = np.append(spread, np.diag(root))
    slopes = (abs(value(i, 1e-3) - value(i, -1e-3)) / 2e-3 for i in np.flatnonzero(sizes > 1e-8))
    return max(slopes, default=0.0)


def _slope_spread(result, slope: tuple) -> pd.DataFrame:
    """Standard deviations of a random intercept and slope, their correlation in the row
    `correlation`.
    """
    name, subject, *_ = slope
    cov = np.asarray(result.cov_re)
    sd = np.sqrt(np.diag(cov))
    rows = [
        (subject, "intercept", sd[0]),
        (subject, name, sd[1]),
        (subject, "correlation", cov[0, 1] / sd.prod()),
        ("residual", "intercept", np.sqrt(result.scale)),
    ]
    return pd.DataFrame(rows, columns=["group", "term", "sd"])
