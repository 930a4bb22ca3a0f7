"""Mixed-effects models with crossed random effects: linear for rates, logistic for single verdicts.
One result for both: MixedFit.

The terms are patsy's; what the data cannot tell is dropped by name, and contrasts that need it are
null.
"""

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linprog
from scipy.special import expit, gammaln, stdtr, stdtrit

from driftbook.stats import laplace
from driftbook.stats.confidence import UPPER

NODES = 40  # of Gauss and Hermite's rule, for the mean over random effects


@dataclass(frozen=True)
class MixedFit:
    """A mixed model, fitted. `fixed` and `random` in the units of the response (logits where it is
    logistic).

    `df` counts runs less fixed terms, for both kinds: neither MixedLM nor Laplace's approximation
    has degrees of freedom of its own, and what repeats is a run. `report`: optimiser, evaluations,
    gradient_norm (largest slope of the log-likelihood in a logarithm of a standard deviation;
    logistic: per standard error of any parameter), warnings, at_zero (components), singular,
    seconds (CPU).
    """

    fixed: pd.DataFrame  # term, estimate, se
    cov: np.ndarray = field(repr=False)
    df: float
    random: pd.DataFrame  # group, term, sd
    loglik: float
    converged: bool
    notes: tuple[str, ...]
    design: "Design" = field(repr=False)
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    def at(self, rows: pd.DataFrame) -> np.ndarray:
        """The fixed terms at these rows, to be averaged or subtracted and given to `contrast`; NaN
        where a row is not estimable.
        """
        return self.design.at(rows)

    def contrast(self, weights: np.ndarray) -> pd.DataFrame:
        """Estimate, se, df, 95 % interval and p value of each row of weights over the fixed terms."""
        weights = np.atleast_2d(np.asarray(weights, float))
        return self._tested(weights @ self.fixed["estimate"].to_numpy(float), weights)

    def risk(
        self, rows: pd.DataFrame, weights: np.ndarray, alone: np.ndarray | None = None
    ) -> pd.DataFrame:
        """Contrasts [k, rows] of probabilities at `rows` in percentage points, of a logistic fit:
        estimate, se, df, 95 % interval and p.

        A probability is the mean over runs and prompts like these: the random effects are
        integrated out (Gauss and Hermite's rule). `alone` marks rows without a run effect (a base
        model itself). Standard errors by the delta method over the fixed effects, the random
        effects' spread taken as known.
        """
        at, weights = self.at(rows), np.atleast_2d(np.asarray(weights, float))
        sd = self.random.set_index("group")["sd"]
        of_runs = sd.get("run_id", 0.0) * (1.0 if alone is None else ~np.asarray(alone, bool))
        spread = np.sqrt((sd.drop("run_id", errors="ignore") ** 2).sum() + of_runs**2)
        nodes, share = np.polynomial.hermite_e.hermegauss(NODES)
        p = expit(
            (at @ self.fixed["estimate"].to_numpy(float))[:, None]
            + np.broadcast_to(spread, len(at))[:, None] * nodes
        )
        mean, slope = (p @ share / share.sum(), (p * (1 - p)) @ share / share.sum())
        used = weights != 0
        lost = (used & np.isnan(mean)).any(axis=1)
        found = self._tested(
            100 * weights @ np.nan_to_num(mean),
            100 * weights @ (np.nan_to_num(slope)[:, None] * np.nan_to_num(at)),
        )
        found.loc[lost] = np.nan
        return found

    def _tested(self, estimate: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
        se = (
            np.sqrt(np.einsum("ij,jk,ik->i", weights, self.cov, weights))
            if self.df > 0
            else np.full(len(weights), np.nan)
        )
        half, ratio = (
            stdtrit(max(self.df, 1), UPPER) * se,
            np.abs(estimate) / np.where(se > 0, se, np.nan),
        )
        p = 2 * stdtr(max(self.df, 1), -ratio)
        return pd.DataFrame(
            {
                "estimate": estimate,
                "se": se,
                "df": float(self.df),
                "ci_low": estimate - half,
                "ci_high": estimate + half,
                "p": p,
            }
        )


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


# ---- rates: linear
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
    """
    started, groups = time.process_time(), (groups,) if isinstance(groups, str) else tuple(groups)
    rates, y, right, notes = _framed(rates, formula)
    slope = _slope(rates, groups) if "|" in "".join(groups) else None
    kept, null = _estimable(right.to_numpy())
    notes += [
        f"not estimable: {name} (constant or aliased)"
        for i, name in enumerate(right.columns)
        if i not in kept
    ]
    notes += _cells_never_run(rates, formula)
    design, x, names = (
        Design(right.design_info, kept, null),
        right.to_numpy()[:, kept],
        right.columns[kept],
    )
    n_runs = rates[_column(groups[0])].nunique()
    df = n_runs - len(names)
    if df <= 0:
        notes.append(f"{n_runs} runs for {len(names)} fixed terms: no interval")
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    if rest @ rest < 1e-12 * max(y @ y, 1.0):
        return _exact(
            x,
            y,
            names,
            df,
            groups,
            [*notes, "the fixed terms leave no residual: no interval"],
            design,
        )
    if slope:
        return _fit(x, y, names, df, None, notes, design, reml, started, slope)
    indicators, dropped = _indicators(rates, groups)
    return _fit(x, y, names, df, indicators, notes + dropped, design, reml, started)


def _framed(
    rows: pd.DataFrame, formula: str
) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame, list[str]]:
    """The rows with a value for all of the formula, the response, the design, and a note on the
    rows that were left out.
    """
    import patsy  # here, since few notebooks fit models and statsmodels takes a second to import

    rows, response = rows.reset_index(drop=True), formula.partition("~")[0].strip()
    if response in rows:  # true, false and null, which patsy does not know
        rows = rows.assign(
            **{response: rows[response].astype("Float64").to_numpy(float, na_value=np.nan)}
        )
    left, right = patsy.dmatrices(
        formula, rows, NA_action=patsy.NAAction(NA_types=["None", "NaN"]), return_type="dataframe"
    )
    if right.empty:
        raise ValueError(f"no row has a value for {formula!r}: nothing to fit")
    notes = [f"{len(rows) - len(right)} rows left out: no value"] if len(right) < len(rows) else []
    return rows.loc[right.index], left.to_numpy()[:, -1], right, notes


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
    return (
        name,
        subject,
        pd.factorize(rates[subject])[0],
        np.column_stack([np.ones(len(rates)), rates[name].to_numpy(float)]),
    )


def _fit(x, y, names, df, indicators, notes, design, reml, started, slope=None) -> MixedFit:
    """MixedLM from statsmodels with crossed components or one random slope, restarted by other
    optimisers until its gradient vanishes.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    frame = pd.DataFrame(x, columns=names)
    model = (
        MixedLM(y, frame, slope[2], exog_re=slope[3])
        if slope
        else MixedLM(y, frame, np.ones(len(y)), exog_vc=_components(indicators))
    )
    result, tried, flattest = None, [], np.inf
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for optimiser in ("lbfgs", "bfgs", "powell"):
            found = model.fit(
                reml=reml,
                method=optimiser,
                start_params=None if result is None else result.params_object,
            )
            tried.append(optimiser)
            slopes = _steepness(model, found, slope is not None)
            if result is None or slopes < flattest:
                result, flattest = found, slopes
            if flattest < 1e-3:
                break
    random = (
        _slope_spread(result, slope)
        if slope
        else pd.DataFrame(
            {
                "group": [*indicators, "residual"],
                "term": "intercept",
                "sd": np.sqrt(np.append(result.vcomp, result.scale)),
            }
        )
    )
    share = random["sd"] ** 2 / (random["sd"] ** 2).sum()
    at_zero = tuple(random.loc[share.lt(1e-6) & random["group"].ne("residual"), "group"])
    told = tuple(
        dict.fromkeys(str(one.message) for one in caught if "boundary" not in str(one.message))
    )  # its bound is absolute; ours is relative
    converged = bool(flattest < 1e-2 or (result.converged and at_zero))
    notes = [
        *notes,
        *(f"component {name} is at zero" for name in at_zero),
        *([] if converged else told),
    ]
    notes.append(
        f"optimiser {tried[-1]}" if converged else f"did not converge by {', '.join(tried)}"
    )
    report = {
        "optimiser": "MixedLM " + ", ".join(tried),
        "evaluations": None,
        "gradient_norm": flattest,
        "warnings": told,
        "at_zero": at_zero,
        "singular": bool(at_zero),
        "seconds": time.process_time() - started,
    }
    cov = _covariance(x, _roots(result, indicators, slope), float(result.scale))
    fixed = pd.DataFrame(
        {
            "term": names,
            "estimate": np.asarray(result.fe_params),
            "se": np.sqrt(np.diag(cov)) if df > 0 else np.nan,
        }
    )
    return MixedFit(
        fixed,
        cov,
        df,
        random,
        float(result.llf),
        converged,
        tuple(dict.fromkeys(notes)),
        design,
        report,
    )


def _roots(result, indicators: dict[str, np.ndarray] | None, slope: tuple | None) -> np.ndarray:
    """Rows x random effects, each column scaled by its standard deviation, so that the response's
    covariance is roots @ roots.T plus the residual's.
    """
    if not slope:
        return np.hstack(
            [
                np.sqrt(variance) * part
                for variance, part in zip(result.vcomp, indicators.values(), strict=True)
            ]
            or [np.zeros((len(result.model.endog), 0))]
        )
    _, _, codes, columns = slope
    values, vectors = np.linalg.eigh(np.asarray(result.cov_re))
    effects = columns @ (vectors * np.sqrt(np.maximum(values, 0)))
    return np.hstack(
        [np.eye(codes.max() + 1)[codes] * effects[:, [i]] for i in range(effects.shape[1])]
    )


def _covariance(x: np.ndarray, roots: np.ndarray, scale: float) -> np.ndarray:
    """Covariance of the fixed effects, (X' V^-1 X)^-1 with the variances found, as lme4's;
    MixedLM's own comes from a joint Hessian, which unbalanced data make up to a tenth off or
    negative.
    """
    w = roots / np.sqrt(scale)
    inner = w.T @ x
    return scale * np.linalg.inv(
        x.T @ x - inner.T @ np.linalg.solve(np.eye(w.shape[1]) + w.T @ w, inner)
    )


def _steepness(model, result, slope: bool) -> float:
    """The largest slope of the log-likelihood in the logarithm of a component's standard deviation,
    by differences; a component at zero has none.
    """
    from statsmodels.regression.mixed_linear_model import MixedLMParams

    fixed, root, spread = (
        result.params_object.fe_params,
        np.asarray(result.cov_re) / result.scale,
        np.asarray(result.vcomp) / result.scale,
    )

    def value(i: int, step: float) -> float:
        factor = np.ones(len(spread) + len(root))
        factor[i] = np.exp(step)
        scale = factor[len(spread) :]
        given = MixedLMParams.from_components(
            fe_params=fixed,
            cov_re=scale[:, None] * root * scale,
            vcomp=spread * factor[: len(spread)] ** 2,
        )
        return model.loglike(given, profile_fe=True)

    sizes = np.append(spread, np.diag(root))
    return max(
        (
            abs(value(i, 1e-3) - value(i, -1e-3)) / 2e-3
            for i in range(len(sizes))
            if sizes[i] > 1e-8
        ),
        default=0.0,
    )


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


def _exact(
    x: np.ndarray,
    y: np.ndarray,
    names: pd.Index,
    df: float,
    groups: tuple[str, ...],
    notes: list[str],
    design: Design,
) -> MixedFit:
    """A model whose fixed terms say everything: estimates without intervals."""
    fixed = pd.DataFrame(
        {"term": names, "estimate": np.linalg.lstsq(x, y, rcond=None)[0], "se": np.nan}
    )
    random = pd.DataFrame({"group": [*groups, "residual"], "term": "intercept", "sd": 0.0})
    report = {
        "optimiser": "none",
        "evaluations": 0,
        "gradient_norm": np.nan,
        "warnings": (),
        "at_zero": tuple(groups),
        "singular": True,
        "seconds": 0.0,
    }
    return MixedFit(
        fixed,
        np.full((len(names), len(names)), np.nan),
        df,
        random,
        np.nan,
        False,
        tuple(notes),
        design,
        report,
    )


def _estimable(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the columns to keep, from the left, and a basis of the directions in which no
    row differs.
    """
    kept: list[int] = []
    basis = np.zeros((len(x), 0))
    for i in range(x.shape[1]):
        rest = x[:, i] - basis @ (basis.T @ x[:, i])
        rest -= basis @ (basis.T @ rest)
        if np.linalg.norm(rest) > 1e-8 * max(np.linalg.norm(x[:, i]), 1e-300):
            kept.append(i)
            basis = np.column_stack([basis, rest / np.linalg.norm(rest)])
    return np.array(kept), (
        np.linalg.svd(x, full_matrices=True)[2][len(kept) :].T
        if len(kept) < x.shape[1]
        else np.zeros((x.shape[1], 0))
    )


def _cells_never_run(rates: pd.DataFrame, formula: str) -> list[str]:
    """A note for each base model x method that the model speaks of and no run has."""
    if not {"base_model", "method"} <= set(rates) or "base_model" not in formula:
        return []
    counts = pd.crosstab(rates["base_model"].astype(str), rates["method"].astype(str))
    return [
        f"never run: {base} x {method}"
        for base in counts.index
        for method in counts.columns
        if not counts.loc[base, method]
    ]


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
        elif by:
            part = rates[by].astype(str).to_numpy()
            own = {level: np.unique(codes[part == level]) for level in pd.unique(part)}
            found |= {
                f"{column} of {level}": (codes[:, None] == runs) * 1.0
                for level, runs in own.items()
                if len(runs) > 1
            }
            notes += [
                f"component {column} of {level} left out: one level"
                for level, runs in own.items()
                if len(runs) == 1
            ]
        else:
            found[name] = np.eye(len(levels))[codes]
    return found, notes


def _components(indicators: dict[str, np.ndarray]):
    from statsmodels.regression.mixed_linear_model import VCSpec

    columns = [
        [[f"{name}[{i}]" for i in range(part.shape[1])]] for name, part in indicators.items()
    ]
    return VCSpec(list(indicators), columns, [[part] for part in indicators.values()])


# ---- single verdicts: logistic
def item_model(
    items: pd.DataFrame,
    formula: str,
    groups: tuple[str, ...] = ("run_id", "prompt_id"),
    trials: str | None = None,
) -> MixedFit:
    """A logistic mixed model of verdicts with crossed random intercepts, by Laplace's approximation
    (laplace.py), as lme4's glmer and glmmTMB.

    The response is true or false (or a share, with the column of its number of trials). `groups`:
    the runs, then the prompts and what is joined to them by ':' (the maximal model has prompt_id,
    prompt_id:base_model and prompt_id:method); or one group alone, within which answers may repeat
    and whose levels df then counts. A null run is a row without a run effect: a base model itself,
    which was not drawn. Rows without a verdict are left out and counted. A direction in which the
    answers separate (all safe, or all unsafe, wherever it acts) has no finite estimate: its rows
    are taken out, and it is named, as are terms that are constant or aliased (Albert and Anderson
    1984, Biometrika 71, 1).

    Raises:
        ValueError: no verdict; all verdicts alike; an answer stands twice; a group that does not
            begin with the prompts.
    """
    started = time.process_time()
    items, y, right, notes = _framed(items, formula)
    notes += _cells_never_run(items, formula)
    grid = _grid(
        items,
        y,
        right.to_numpy(),
        groups,
        None if trials is None else items[trials].to_numpy(float),
    )
    kept, null, told, grid = _told_apart(grid, right.columns)
    design, names = Design(right.design_info, kept, null), right.columns[kept]
    components, grid, dropped = _worthwhile(grid, groups)
    found = laplace.fit(grid)
    n_runs = grid.n_runs or (len(np.unique(grid.run)) if len(groups) > 1 else grid.y.shape[1])
    df = n_runs - len(names)
    random = pd.DataFrame({"group": components, "term": "intercept", "sd": found.sd})
    at_zero = tuple(random.loc[found.at_zero, "group"])
    constant = (
        0.0
        if trials is None
        else (
            gammaln(grid.trials + 1) - gammaln(grid.y + 1) - gammaln(grid.trials - grid.y + 1)
        ).sum()
    )
    converged = bool(found.gradient < 10 * laplace.TOLERANCE)
    notes = [
        *notes,
        *told,
        *dropped,
        *(f"component {name} is at zero" for name in at_zero),
        f"optimiser {found.message}" if converged else f"did not converge by {found.message}",
    ]
    if df <= 0:
        notes.append(f"{n_runs} levels of {groups[0]} for {len(names)} fixed terms: no interval")
    report = {
        "optimiser": found.message,
        "evaluations": found.evaluations,
        "gradient_norm": found.gradient,
        "warnings": (),
        "at_zero": at_zero,
        "singular": bool(at_zero),
        "seconds": time.process_time() - started,
    }
    fixed = pd.DataFrame(
        {
            "term": names,
            "estimate": found.beta,
            "se": np.sqrt(np.diag(found.cov)) if df > 0 else np.nan,
        }
    )
    return MixedFit(
        fixed,
        found.cov,
        df,
        random,
        found.loglik + constant,
        converged,
        tuple(dict.fromkeys(notes)),
        design,
        report,
    )


def _grid(
    items: pd.DataFrame,
    y: np.ndarray,
    x: np.ndarray,
    groups: tuple[str, ...],
    trials: np.ndarray | None,
) -> laplace.Grid:
    """The answers as a grid: a row for each run and set of fixed terms, a column for each prompt."""
    runs, columns = (groups[0], groups[1:]) if len(groups) > 1 else (None, groups)
    prompt = columns[0]
    if strange := [name for name in columns if name.split(":")[0] != prompt]:
        raise ValueError(
            f"group {strange[0]!r} does not begin with {prompt!r}; groups are the runs, then the"
            " prompts alone and joined to something by ':'"
        )
    parts = [
        (
            pd.factorize(
                items[name.partition(":")[2].split(":")].astype(str).agg(" ".join, axis=1)
            )[0]
            if ":" in name
            else np.zeros(len(items), int)
        )
        for name in columns
    ]
    run = pd.factorize(items[runs])[0] if runs else np.full(len(items), -1)  # -1 where null
    key = np.ascontiguousarray(np.column_stack([x + 0.0, run, *parts]))
    _, first, row = np.unique(
        key.view(np.dtype((np.void, key.itemsize * key.shape[1]))).ravel(),
        return_index=True,
        return_inverse=True,
    )
    column, names = pd.factorize(items[prompt])
    shape, place = (len(first), len(names)), row * len(names) + column
    count = np.bincount(place, minlength=shape[0] * shape[1])
    if trials is None and runs and (count > 1).any():
        raise ValueError(
            f"{(count > 1).sum()} answers stand twice (same"
            f" {' and '.join(filter(None, (runs, prompt)))}); keep one of each, or give shares with"
            " their trials"
        )
    n = np.ones(len(y)) if trials is None else trials
    yes, asked = (
        np.bincount(place, y * n, shape[0] * shape[1]).reshape(shape),
        np.bincount(place, n, shape[0] * shape[1]).reshape(shape),
    )
    return laplace.Grid(
        yes,
        asked,
        x[first],
        run[first],
        tuple(np.eye(part.max() + 1)[part[first]] for part in parts),
    )


def _told_apart(
    grid: laplace.Grid, names: pd.Index
) -> tuple[np.ndarray, np.ndarray, list[str], laplace.Grid]:
    """The estimable columns, the directions that are not, a note for each term that is left out,
    and the grid of the rows that stay.
    """
    kept, null = _estimable(grid.x)
    notes = [
        f"not estimable: {name} (constant or aliased)"
        for i, name in enumerate(names)
        if i not in kept
    ]
    yes, asked = grid.y.sum(1), grid.trials.sum(1)
    if not 0 < yes.sum() < asked.sum():
        raise ValueError(f"all {asked.sum():.0f} verdicts are alike: there is nothing to model")
    stay = np.ones(len(grid.x), bool)
    while (
        apart := _separated(
            grid.x[:, kept], np.where(yes == asked, 1, np.where(yes == 0, -1, 0)), stay
        )
    ).any():
        stay &= ~apart
    if not stay.all():
        told, null = _estimable(grid.x[stay])
        lost = [names[i] for i in kept if i not in told]
        notes += [
            f"not estimable: {name} (separated: {(~stay).sum()} of {len(stay)} rows of the design"
            " have all answers alike, and are left out)"
            for name in lost
        ]
        kept = told
        if not asked[stay].sum():
            raise ValueError(
                "the answers separate completely: every row of the design has all answers alike, so"
                " there is nothing to model"
            )
    runs, codes = np.unique(grid.run[stay], return_inverse=True)
    codes = codes - (1 if len(runs) and runs[0] == -1 else 0)
    return (
        kept,
        null,
        notes,
        laplace.Grid(
            grid.y[stay],
            grid.trials[stay],
            grid.x[stay][:, kept],
            codes,
            tuple(block[stay][:, block[stay].any(0)] for block in grid.blocks),
        ),
    )


def _separated(x: np.ndarray, sign: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """Rows that a direction separates from all others: x'd >= 0 where all answers are yes, <= 0
    where all are no, = 0 where mixed (a linear program; Konis 2007).
    """
    found = np.zeros(len(x), bool)
    pure = stay & (sign != 0)
    if not pure.any():
        return found
    signed, mixed = sign[pure, None] * x[pure], x[stay & (sign == 0)]
    equal = {"A_eq": mixed, "b_eq": np.zeros(len(mixed))} if len(mixed) else {}
    solution = linprog(
        -signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=(-1, 1), **equal
    )
    if solution.x is not None:
        found[np.flatnonzero(pure)[signed @ solution.x > 1e-6]] = True
    return found


def _worthwhile(
    grid: laplace.Grid, groups: tuple[str, ...]
) -> tuple[list[str], laplace.Grid, list[str]]:
    """The components that can be told, with their names; those of one level, or with a level for
    each row of answers, are left out with a note.
    """
    runs, columns = (groups[0], groups[1:]) if len(groups) > 1 else (None, groups)
    names, notes, run = [], [], grid.run
    if runs and grid.n_runs < 2:
        notes.append(f"component {runs} left out: {grid.n_runs} levels")
        run = np.full(len(run), -1)
    elif runs:
        names.append(runs)
    keep = [
        grid.y.shape[1] > 1 and (":" not in name or block.shape[1] > 1)
        for name, block in zip(columns, grid.blocks, strict=True)
    ]
    names += [name for name, good in zip(columns, keep, strict=True) if good]
    notes += [
        f"component {name} left out: one level"
        for name, good in zip(columns, keep, strict=True)
        if not good
    ]
    blocks = tuple(block for block, good in zip(grid.blocks, keep, strict=True) if good)
    return names, laplace.Grid(grid.y, grid.trials, grid.x, run, blocks), notes
