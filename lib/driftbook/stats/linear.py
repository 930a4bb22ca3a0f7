"""Linear mixed models of rates with crossed random intercepts, or one random intercept and slope,
by penalised least squares (penalised.py), as R's lme4; degrees of freedom as its lmerTest.
"""

import time

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular

from driftbook.stats import penalised
from driftbook.stats.mixed import (
    Design,
    MixedFit,
    Satterthwaite,
    estimable,
    fitted,
    framed,
    never_run,
    reported,
    small_enough,
)
from driftbook.stats.penalised import Crossed, Grouping, Maximum


def rate_model(
    rates: pd.DataFrame,
    formula: str,
    groups: str | tuple[str, ...] = ("run_id", "category"),
    reml: bool = True,
) -> MixedFit:
    """A linear mixed model of rates in percentage points with crossed random intercepts, by REML or
    maximum likelihood; contrasts have Satterthwaite's degrees of freedom.

    `formula` names the response and the fixed terms. Each name in `groups` is a column, or columns
    joined by ':'; "run_id by method" gives the runs of each method a variance of their own; a
    single "days | subject" is an intercept and a slope, correlated. A row whose group is null has
    no effect of it. Rows with a null in the formula are left out and counted in the notes, as are
    terms that are constant or aliased, and cells that were never run.

    Raises:
        ValueError: there is no row with a value, no column that the formula or a group names, or
            the model needs more memory than mixed.MOST_BYTES.
    """
    started, groups = time.process_time(), (groups,) if isinstance(groups, str) else tuple(groups)
    rates, y, right, notes = framed(rates, formula, groups)
    kept, null, lost = estimable(right.to_numpy(), right.columns)
    notes += lost + never_run(rates, formula)
    design, names = Design(right.design_info, kept, null), right.columns[kept]
    random, dropped = _slope(rates, groups) if "|" in "".join(groups) else _random(rates, groups)
    _small_enough(random, len(names))
    x, n_runs = right.to_numpy()[:, kept], rates[_column(groups[0])].nunique()
    df = n_runs - len(names)
    if df <= 0:
        notes.append(f"{n_runs} runs for {len(names)} fixed terms: no interval")
    exact = np.linalg.lstsq(x, y, rcond=None)[0]
    rest = y - x @ exact
    if rest @ rest < 1e-12 * max(y @ y, 1.0):
        return _exact(design, names, exact, df, groups, notes)
    q, r = np.linalg.qr(x)
    model = Crossed(q, rest, list(random.values()), reml)
    found, slope = penalised.maximum(model), "|" in groups[0]
    spread = (
        _slope_spread(model, found, groups[0], rates) if slope else _spread(model, found, random)
    )
    found_terms, loglik = _fixed(model, found, r), -model.deviance(found.at) / 2
    if reml:
        loglik -= np.log(np.abs(np.diag(r))).sum()
    notes, report = _told(found, spread, notes + dropped, started)
    estimate, cov, degrees = exact + found_terms[0], *found_terms[1:]
    converged = found.gradient < penalised.CONVERGED
    return fitted(
        design, names, estimate, cov, df, spread, loglik, converged, notes, report, degrees=degrees
    )


def _exact(
    design: Design,
    names: pd.Index,
    estimate: np.ndarray,
    df: float,
    groups: tuple[str, ...],
    notes: list[str],
) -> MixedFit:
    """The result where the fixed terms leave no residual."""
    random = pd.DataFrame({"group": [*groups, "residual"], "term": "intercept", "sd": 0.0})
    notes = [*notes, "the fixed terms leave no residual: no interval"]
    report, cov = reported("none", 0, np.nan, groups, None), np.full((len(names),) * 2, np.nan)
    return fitted(design, names, estimate, cov, df, random, np.nan, False, notes, report)


def _column(group: str) -> str:
    """The column that a group counts: of "run_id by method" and "days | subject", run_id and
    subject.
    """
    return group.partition(" by ")[0].rpartition("|")[2].strip().split(":")[0]


# ---- random effects
def _slope(
    rates: pd.DataFrame, groups: tuple[str, ...]
) -> tuple[dict[tuple[str, ...], Grouping], list[str]]:
    """The one grouping of "days | subject": an intercept and a slope for each subject."""
    name, _, subject = (part.strip() for part in groups[0].partition("|"))
    if len(groups) > 1:
        raise ValueError(
            f"a random slope ({groups[0]}) must be the only group; give the others as fixed terms"
            " or fit without it"
        )
    effects = np.column_stack([np.ones(len(rates)), rates[name].to_numpy(float)])
    effects[:, 1] /= _size(rates, name)
    level, levels = pd.factorize(rates[subject])
    return {(subject,): Grouping(level, np.zeros(len(levels), int), effects)}, []


def _size(rates: pd.DataFrame, name: str) -> float:
    """The root mean square of a column, in which its slopes are sought; 1 where it is zero."""
    return float(np.sqrt((rates[name].to_numpy(float) ** 2).mean())) or 1.0


def _random(
    rates: pd.DataFrame, groups: tuple[str, ...]
) -> tuple[dict[tuple[str, ...], Grouping], list[str]]:
    """The groupings by the names of their components, and a note for each component that cannot be
    told from the residual or another one, or has one level.
    """
    found, notes, one = {}, [], np.ones((len(rates), 1))
    for name in groups:
        column, _, by = name.partition(" by ")
        level, n = _levels(rates, column)
        if n in (1, len(rates)):
            notes.append(f"component {name} left out: {n} levels in {len(rates)} rows")
            continue
        if same := [of[0] for of, other in found.items() if not by and _same(level, n, other)]:
            notes.append(f"component {name} left out: its levels are those of {same[0]}")
            continue
        if not by:
            found[name,] = Grouping(level, np.zeros(n, int), one)
            continue
        own, kept, dropped = _by(rates[by].astype(str).to_numpy(), level, column)
        notes += dropped
        if kept:
            found[kept] = Grouping(*own, one)
    return found, notes


def _levels(rates: pd.DataFrame, name: str) -> tuple[np.ndarray, int]:
    """The level of each row in a column or joined ones (-1 where null), and the number of them."""
    number = rates.groupby(name.split(":"), observed=True, sort=False).ngroup()
    level = number.fillna(-1).to_numpy(int)
    return level, int(level.max(initial=-1)) + 1


def _same(level: np.ndarray, n: int, other: Grouping) -> bool:
    """Whether two groupings part the rows alike."""
    if n != other.n_levels or ((level < 0) != (other.level < 0)).any():
        return False
    return len(np.unique(np.stack([level, other.level]), axis=1).T) == n + (level < 0).any()


def _by(
    part: np.ndarray, level: np.ndarray, column: str
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...], list[str]]:
    """Levels apart by what `part` says of their rows: new levels and their components; the
    components' names; a note for each that has one level.
    """
    new, component, names, notes = np.full(len(level), -1), [], [], []
    for value in pd.unique(part):
        own = (part == value) & (level >= 0)
        codes, levels = pd.factorize(level[own])
        if len(levels) > 1:
            new[own] = len(component) + codes
            component += [len(names)] * len(levels)
            names.append(f"{column} of {value}")
        else:
            notes.append(f"component {column} of {value} left out: one level")
    return (new, np.array(component, int)), tuple(names), notes


def _small_enough(random: dict[tuple[str, ...], Grouping], n_terms: int) -> None:
    """Refuse a model that needs too much memory, before any is taken."""
    sizes = {" and ".join(names): one.n_levels for names, one in random.items()}
    largest = max(sizes, key=sizes.get, default="none")
    others = ", ".join(f"{n:,} of {name}" for name, n in sizes.items() if name != largest)
    small_enough(
        f"the levels of all groups but the largest ({largest}: {sizes.get(largest, 0):,}) and"
        f" {n_terms} fixed terms share a dense matrix ({others or 'no other group'})",
        penalised.bytes_needed(list(random.values()), n_terms),
    )


# ---- what was found
def _fixed(
    model: Crossed, found: Maximum, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Satterthwaite]:
    """The fixed terms less their least-squares values, their covariance (X' V^-1 X)^-1 with the
    variances found, as lme4's, and what their degrees of freedom need; `r` is X's own QR factor.
    """
    variance, back = found.at.rest / model.free, np.linalg.inv(r)
    estimate = back @ solve_triangular(found.at.root, found.at.score, lower=True, trans="T")
    cov, *sides = (
        back @ penalised.covariance(root, variance) @ back.T
        for root in (found.at.root, *found.around.roots)
    )
    moves = [
        (high - low) / (2 * penalised.STEP)
        for low, high in zip(sides[::2], sides[1::2], strict=True)
    ]
    values, vectors = np.linalg.eigh(found.around.joint)
    kept = values > 1e-8 * values.max()  # as lmerTest, where a direction is flat
    spread = 2 * (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return estimate, cov, Satterthwaite(np.array([*moves, cov]), spread)


def _spread(
    model: Crossed, found: Maximum, random: dict[tuple[str, ...], Grouping]
) -> pd.DataFrame:
    """Standard deviations of the components, in the order of the groups, and of the residual."""
    sigma, by_group = np.sqrt(found.at.rest / model.free), {}
    start = 0
    for names in model.in_order(random):
        by_group[names] = sigma * found.theta[start : start + len(names)]
        start += len(names)
    names = [name for one in random for name in one]
    sd = np.concatenate([*(by_group[one] for one in random), [sigma]])
    return pd.DataFrame({"group": [*names, "residual"], "term": "intercept", "sd": sd})


def _slope_spread(model: Crossed, found: Maximum, group: str, rates: pd.DataFrame) -> pd.DataFrame:
    """Standard deviations of a random intercept and slope, their correlation in the row
    `correlation`.
    """
    name, _, subject = (part.strip() for part in group.partition("|"))
    lower, sigma = np.zeros((2, 2)), np.sqrt(found.at.rest / model.free)
    lower[np.tril_indices(2)] = found.theta
    lower[1] /= _size(rates, name)
    cov = lower @ lower.T
    sd = np.sqrt(np.diag(cov))
    rows = [
        (subject, "intercept", sigma * sd[0]),
        (subject, name, sigma * sd[1]),
        (subject, "correlation", cov[0, 1] / sd.prod() if sd.all() else np.nan),
        ("residual", "intercept", sigma),
    ]
    return pd.DataFrame(rows, columns=["group", "term", "sd"])


def _told(
    found: Maximum, spread: pd.DataFrame, notes: list[str], started: float
) -> tuple[list[str], dict]:
    """The notes with those on the fit, and its report."""
    sd = spread.loc[spread["term"].ne("correlation")]
    share = sd["sd"] ** 2 / (sd["sd"] ** 2).sum()
    at_zero = tuple(sd.loc[share.lt(1e-6) & sd["group"].ne("residual"), "group"])
    notes = [*notes, *(f"component {name} is at zero" for name in at_zero)]
    told = "optimiser " if found.gradient < penalised.CONVERGED else "did not converge by "
    notes.append(told + found.message)
    report = reported(found.message, found.evaluations, found.gradient, at_zero, started)
    return notes, report
