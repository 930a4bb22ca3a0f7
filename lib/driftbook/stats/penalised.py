"""Penalised least squares for linear mixed models: the profiled deviance of Bates et al. (2015, J.
Stat. Softw. 67, 1, equations 15 to 42), and its maximum.

y = X b + Z L u + e with u standard normal times sigma, L the relative standard deviations. The
levels of the first grouping meet in no row, so that their part of Z'Z is block diagonal and is
eliminated level by level; what stays is one dense matrix over the levels of the other groupings,
the fixed terms and y, whose Cholesky factor holds everything (equation 18). Its size is known
before any memory is taken. No sparse Cholesky factorisation is needed, which scipy lacks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize

COPIES = 4  # of the dense matrix: the products, what is taken from them, the rest, its factor
STEP = 2e-3  # in the logarithm of a relative standard deviation, for derivatives
FLAT, CONVERGED = 1e-4, 1e-3  # slope per standard error at which Newton's steps end; which will do
LEAST, TRIED = 0.02, (0.003, 0.01, 0.03, 0.1, 0.3)  # relative standard deviations: the search's
# lowest, and where a component at zero is tried once more
SPARSE = 0.2  # share of cells with rows below which two groupings' table is kept sparse


@dataclass(frozen=True)
class Grouping:
    """A grouping of the rows: the level of each (-1: none), which component each level belongs to,
    and the effects of a level (an intercept, or an intercept and a slope).
    """

    level: np.ndarray  # [rows]
    component: np.ndarray  # [levels] number among the grouping's own components
    effects: np.ndarray  # [rows, effects]

    @property
    def n_levels(self) -> int:
        return len(self.component)

    @property
    def n_parameters(self) -> int:
        """Relative standard deviations, and for two effects the lower triangle of their factor."""
        e = self.effects.shape[1]
        return int(self.component.max(initial=-1)) + 1 if e == 1 else e * (e + 1) // 2

    def columns(self) -> sparse.csr_array:
        """Its part of Z [rows, levels x effects]."""
        e, has = self.effects.shape[1], self.level >= 0
        row = np.repeat(np.flatnonzero(has), e)
        column = (e * self.level[has, None] + np.arange(e)).ravel()
        shape = (len(self.level), e * self.n_levels)
        return sparse.csr_array((self.effects[has].ravel(), (row, column)), shape=shape)


@dataclass(frozen=True)
class At:
    """The model at given relative standard deviations."""

    log_det: float  # of the random part, plus that of the fixed terms if REML
    rest: float  # penalised residual sum of squares
    root: np.ndarray = field(repr=False)  # lower Cholesky factor of the fixed terms' information
    score: np.ndarray = field(repr=False)  # root' b = score


class Crossed:
    """Cross-products of a model, kept once, and the profiled deviance from them.

    The fixed terms are orthogonal columns (a QR factor) and y their residual, so that nothing is
    lost to cancellation.
    """

    def __init__(self, q: np.ndarray, rest: np.ndarray, groupings: list[Grouping], reml: bool):
        fixed = np.column_stack([q, rest])
        self.n, self.p, self.reml = *q.shape, reml
        self.free = self.n - (self.p if reml else 0)
        groupings = sorted(groupings, key=lambda one: -one.n_levels * one.effects.shape[1])
        self.first, others = (groupings[0], groupings[1:]) if groupings else (None, [])
        start = self.first.n_parameters if groupings else 0
        parts = []
        for one in others:
            parts.append(start + one.component)
            start += one.n_parameters
        self.part, self.n_parameters = np.concatenate([*parts, []]).astype(int), start
        self.groupings = groupings
        size = len(self.part) + self.p + 1
        self.own, self.across = None, None
        other = sparse.hstack([one.columns() for one in others], format="csr") if others else None
        self.inside = np.zeros((size, size))
        z = len(self.part)
        self.inside[z:, z:] = fixed.T @ fixed
        if others:
            self.inside[:z, :z] = (other.T @ other).toarray()
            self.inside[:z, z:] = other.T @ fixed
            self.inside[z:, :z] = self.inside[:z, z:].T
        if self.first is not None:
            self._eliminated(other, fixed)

    def _eliminated(self, other: sparse.csr_array | None, fixed: np.ndarray) -> None:
        """The first grouping's blocks, and its products with the others and the fixed terms."""
        first, z = self.first.columns(), len(self.part)
        e, levels = self.first.effects.shape[1], self.first.n_levels
        has, level = self.first.level >= 0, self.first.level[self.first.level >= 0]
        pairs = self.first.effects[has, :, None] * self.first.effects[has, None, :]
        self.own = np.zeros((levels, e, e))
        for i, j in np.ndindex(e, e):
            self.own[:, i, j] = np.bincount(level, pairs[:, i, j], levels)
        self.across = first.T @ fixed
        self.table = (first.T @ other).tocsr() if z else None
        if z and self.table.nnz > SPARSE * np.prod(self.table.shape):
            self.table = self.table.toarray()

    def at(self, theta: np.ndarray) -> At:
        """The model at relative standard deviations `theta`, the first grouping's before those of
        the others.
        """
        z, log_det = len(self.part), 0.0
        inside = self.inside.copy()
        if self.first is not None:
            factor = self._factor(theta)
            inner = np.swapaxes(factor, 1, 2) @ self.own @ factor + np.eye(factor.shape[1])
            log_det = np.linalg.slogdet(inner)[1].sum()
            weight = factor @ np.linalg.solve(inner, np.swapaxes(factor, 1, 2))
            weight = _block_diagonal(weight)
            taken = weight @ self.across
            inside[z:, z:] -= self.across.T @ taken
            if z:
                inside[:z, z:] -= self.table.T @ taken
                product = self.table.T @ (weight @ self.table)
                inside[:z, :z] -= product.toarray() if sparse.issparse(product) else product
        scale = np.append(theta[self.part], np.ones(self.p + 1))
        inside *= scale
        inside *= scale[:, None]
        inside[z:, :z] = inside[:z, z:].T
        inside[np.arange(z), np.arange(z)] += 1
        root = cholesky(inside, lower=True, overwrite_a=True, check_finite=False)
        log_det += 2 * np.log(np.diag(root)[:z]).sum()
        own = root[z:-1, z:-1].copy()
        if self.reml:
            log_det += 2 * np.log(np.diag(own)).sum()
        return At(log_det, root[-1, -1] ** 2, own, root[-1, z:-1].copy())

    def _factor(self, theta: np.ndarray) -> np.ndarray:
        """The relative Cholesky factor of each level of the first grouping [levels, e, e]."""
        e = self.first.effects.shape[1]
        if e == 1:
            return theta[self.first.component][:, None, None]
        lower = np.zeros((e, e))
        lower[np.tril_indices(e)] = theta[: self.first.n_parameters]
        return np.broadcast_to(lower, self.own.shape)

    def deviance(self, at: At) -> float:
        """Minus twice the profiled log-likelihood (equations 35 and 42)."""
        return at.log_det + self.free * (1 + np.log(2 * np.pi * at.rest / self.free))

    def in_order(self, random: dict[tuple[str, ...], Grouping]) -> list[tuple[str, ...]]:
        """The names of groupings in the order of the parameters."""
        place = {id(one): i for i, one in enumerate(self.groupings)}
        return sorted(random, key=lambda names: place[id(random[names])])

    @property
    def diagonal(self) -> np.ndarray:
        """Which parameters are standard deviations; the others are free of sign."""
        if self.first is None or self.first.effects.shape[1] == 1:
            return np.ones(self.n_parameters, bool)
        row, column = np.tril_indices(self.first.effects.shape[1])
        return np.append(row == column, np.ones(self.n_parameters - len(row), bool))


def _block_diagonal(blocks: np.ndarray) -> sparse.csr_array:
    """A sparse matrix with these blocks [levels, e, e] on its diagonal."""
    n, e, _ = blocks.shape
    if e == 1:
        return sparse.diags_array(blocks[:, 0, 0], format="csr")
    return sparse.bsr_array((blocks, np.arange(n), np.arange(n + 1))).tocsr()


def bytes_needed(groupings: list[Grouping], n_terms: int) -> int:
    """Memory of the matrices over what is not eliminated, and of the first grouping's products with
    the fixed terms.
    """
    sizes = sorted((one.n_levels * one.effects.shape[1] for one in groupings), reverse=True)
    return 8 * (COPIES * (sum(sizes[1:]) + n_terms + 1) ** 2 + 2 * sum(sizes[:1]) * (n_terms + 1))


# ---- the fit
@dataclass(frozen=True)
class Around:
    """Derivatives about the maximum, in the free parameters (logarithms of standard deviations):
    of the profiled deviance, and of what Satterthwaite's degrees of freedom need.
    """

    gradient: np.ndarray
    hessian: np.ndarray
    joint: np.ndarray  # Hessian of the deviance in the free parameters and log sigma^2
    roots: list[np.ndarray] = field(repr=False)  # of the fixed terms' information at each -h, +h

    @property
    def steepest(self) -> float:
        """The largest slope of the log-likelihood per standard error of a parameter."""
        bend = np.maximum(np.diag(self.hessian), 1e-12)
        return float(np.abs(self.gradient / np.sqrt(2 * bend)).max(initial=0))


@dataclass(frozen=True)
class Maximum:
    """The maximum of the (restricted) likelihood."""

    theta: np.ndarray
    at: At
    around: Around
    gradient: float  # largest slope of the log-likelihood per standard error of a parameter
    evaluations: int
    message: str


def maximum(model: Crossed) -> Maximum:
    """Minimise the deviance over logarithms of relative standard deviations by L-BFGS-B, then
    Newton's steps with differenced derivatives; a component at which zero is no worse is put there.
    """
    diagonal, calls = model.diagonal, [0]
    theta, free = np.where(diagonal, 1.0, 0.0), np.ones(model.n_parameters, bool)

    def evaluated(z: np.ndarray) -> At:
        calls[0] += 1
        return model.at(_theta(theta, free, diagonal, z))

    message = "no random effect"
    for _ in range(2 * model.n_parameters + 1):
        z = np.where(diagonal, np.log(np.where(free & diagonal, theta, 1.0)), theta)[free]
        if len(z):
            z, message = _searched(lambda z: model.deviance(evaluated(z)), z, diagonal[free])
        z, around = _newton(model, evaluated, z)
        theta = _theta(theta, free, diagonal, z)
        better = _elsewhere(model, theta, diagonal)
        if better is None:
            break
        theta, free = better, (better != 0) | ~diagonal
    return Maximum(theta, model.at(theta), around, around.steepest, calls[0], message)


def _theta(theta: np.ndarray, free: np.ndarray, diagonal: np.ndarray, z: np.ndarray) -> np.ndarray:
    found = theta.copy()
    found[free] = np.where(diagonal[free], np.exp(np.where(diagonal[free], z, 0.0)), z)
    return found


def _searched(
    deviance: Callable[[np.ndarray], float], z: np.ndarray, logarithm: np.ndarray
) -> tuple[np.ndarray, str]:
    lowest = np.minimum(np.log(LEAST), z - np.log(10))  # below, the logarithm's slope vanishes
    limits = [
        (low, 7.0) if one else (-1e3, 1e3) for low, one in zip(lowest, logarithm, strict=True)
    ]
    options = {"eps": 1e-6, "ftol": 1e-13, "gtol": 1e-4}
    found = minimize(deviance, z, method="L-BFGS-B", bounds=limits, options=options)
    return found.x, f"L-BFGS-B ({found.nit} iterations), Newton"


def _elsewhere(model: Crossed, theta: np.ndarray, diagonal: np.ndarray) -> np.ndarray | None:
    """The best place with one component at zero that is no worse, or with one that is at zero moved
    off it where that is better; None if there is none.
    """
    here = model.deviance(model.at(theta))
    places = [_with(theta, i, 0.0) for i in np.flatnonzero(diagonal & (theta != 0))]
    least = [here + 1e-7] * len(places)
    for i in np.flatnonzero(diagonal & (theta == 0)):
        places += [_with(theta, i, value) for value in TRIED]
        least += [here - 1e-6] * len(TRIED)
    gain = np.array(least) - [model.deviance(model.at(one)) for one in places]
    return places[int(gain.argmax())] if len(gain) and gain.max() >= 0 else None


def _with(theta: np.ndarray, i: int, value: float) -> np.ndarray:
    return np.where(np.arange(len(theta)) == i, value, theta)


def _newton(
    model: Crossed, evaluated: Callable[[np.ndarray], At], z: np.ndarray
) -> tuple[np.ndarray, Around]:
    """Newton's steps from z while they lower the deviance."""
    around = _around(model, evaluated, z)
    for _ in range(4):
        if around.steepest < FLAT or np.linalg.eigvalsh(around.hessian).min() <= 0:
            break
        new = z - np.linalg.solve(around.hessian, around.gradient)
        if model.deviance(evaluated(new)) > model.deviance(evaluated(z)) + 1e-8:
            break
        z, around = new, _around(model, evaluated, new)
    return z, around


def _around(model: Crossed, evaluated: Callable[[np.ndarray], At], z: np.ndarray) -> Around:
    """First and second derivatives by central differences (Abramowitz and Stegun 25.3.24, 25.3.27).

    The deviance before sigma is profiled is log_det + free log(2 pi s) + rest / s, s = sigma^2, so
    that its derivatives in log s are known from `rest` (Bates et al. 2015, equation 31).
    """
    m, h = len(z), STEP
    middle, unit = evaluated(z), np.eye(m)
    sides = [[evaluated(z + sign * h * one) for sign in (-1, 1)] for one in unit]
    roots = [at.root for pair in sides for at in pair]

    def differenced(value: Callable[[At], float]) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array([[value(at) for at in pair] for pair in sides]).reshape(m, 2).T
        second = np.diag(high + low - 2 * value(middle)) / h**2
        for (i, j), (one, other) in corners.items():
            mixed = value(one) + value(other) - high[i] - low[i] - high[j] - low[j]
            second[i, j] = second[j, i] = (mixed + 2 * value(middle)) / (2 * h**2)
        return (high - low) / (2 * h), second

    corners = {
        (i, j): tuple(evaluated(z + sign * h * (unit[i] + unit[j])) for sign in (1, -1))
        for i in range(m)
        for j in range(i)
    }
    gradient, hessian = differenced(model.deviance)
    variance = middle.rest / model.free
    slope, _ = differenced(lambda at: at.rest / variance)
    _, inner = differenced(lambda at: at.log_det + at.rest / variance)
    joint = np.block([[inner, -slope[:, None]], [-slope[None], np.full((1, 1), model.free)]])
    return Around(gradient, hessian, joint, roots)


def covariance(root: np.ndarray, variance: float) -> np.ndarray:
    """Of the fixed terms, from the lower Cholesky factor of their information."""
    half = solve_triangular(root, np.eye(len(root)), lower=True)
    return variance * half.T @ half
