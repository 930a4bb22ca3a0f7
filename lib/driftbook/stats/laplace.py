"""Laplace's approximation for a logistic model with crossed random effects on a grid of rows (runs)
and columns (prompts).

logit P(y_ij = 1) = x_i'beta + s_r(i) v_r(i) + a_i' L w_j with v, w independent standard normal: v
of the runs, whose standard deviation s can differ by kind (a method); w_j of column j, one for
each column of a_i (an intercept, a base model, a method), L the diagonal of their standard
deviations. Standard deviations multiply, so that zero is a value like any other (Bates et al. 2015,
J. Stat. Softw. 67, section 2). Each column's few effects are eliminated, and what stays is one
matrix over the runs: the cost is that of rows^2 x columns, not of (rows + columns)^3.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import expit

SMALLEST = 1e-3  # standard deviation in logits that the search does not go below
DOUBTFUL = 0.1  # share of the largest standard deviation below which a component is tried at zero
TOLERANCE = 1e-4  # of the gradient, in log-likelihood per standard error


@dataclass(frozen=True)
class Grid:
    """Answers on a grid. A cell without trials is missing; a row whose `run` is -1 has no run
    effect.
    """

    y: np.ndarray  # [rows, columns] counts of yes
    trials: np.ndarray  # [rows, columns]
    x: np.ndarray  # [rows, terms]
    run: np.ndarray  # [rows] number of the run
    blocks: tuple[np.ndarray, ...]  # [rows, levels] each: which of a column's effects a row has
    kind: np.ndarray | None = None  # [runs] number of the run's kind; none: runs of one kind

    @property
    def n_runs(self) -> int:
        return int(self.run.max(initial=-1)) + 1

    @property
    def kinds(self) -> np.ndarray:
        """The number of each run's kind [runs]."""
        return np.zeros(self.n_runs, int) if self.kind is None else self.kind

    @property
    def n_kinds(self) -> int:
        return int(self.kinds.max(initial=-1)) + 1

    @property
    def columns(self) -> np.ndarray:
        """All blocks side by side [rows, effects of a column]."""
        return np.concatenate(self.blocks, axis=1) if self.blocks else np.zeros((len(self.x), 0))


@dataclass
class State:
    """Where the last evaluation stood: modes of v [runs] and w [columns, effects]; the next one
    starts there.
    """

    v: np.ndarray
    w: np.ndarray


@dataclass(frozen=True)
class Mode:
    """The modes of the random effects at given parameters, and what the Laplace approximation needs
    there.
    """

    eta: np.ndarray = field(repr=False)  # [rows, columns]
    weight: np.ndarray = field(repr=False)  # [rows, columns]
    rest: np.ndarray = field(repr=False)  # [rows, columns] y - trials * mu
    joint: float  # log joint density, without constants
    factor: tuple = field(repr=False)  # Cholesky factor of the Schur complement [runs, runs]
    inverse: np.ndarray = field(repr=False)  # [columns, k, k] of each column's own block
    transfer: np.ndarray = field(repr=False)  # [columns, k, runs]
    log_det: float

    @property
    def solver(self) -> tuple:
        return self.factor, self.inverse, self.transfer


def _spread(grid: Grid, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The standard deviation of each run, and that of each column effect."""
    sizes = [block.shape[1] for block in grid.blocks]
    return sd[: grid.n_kinds][grid.kinds], np.repeat(sd[grid.n_kinds :], sizes)


def _predictor(
    grid: Grid, fixed: np.ndarray, su: np.ndarray, a: np.ndarray, v: np.ndarray, w: np.ndarray
) -> np.ndarray:
    return (fixed + np.append(su * v, 0.0)[grid.run])[:, None] + a @ w.T


def _by_run(grid: Grid, rows: np.ndarray) -> np.ndarray:
    """Sums of [rows, ...] over the rows of each run [runs, ...]; rows without a run effect are left
    out.
    """
    if grid.n_runs == len(rows) and (grid.run == np.arange(len(rows))).all():
        return rows
    found = np.zeros((grid.n_runs + 1, *rows.shape[1:]))
    np.add.at(found, grid.run, rows)
    return found[:-1]


def _factors(grid: Grid, weight: np.ndarray, su: np.ndarray, a: np.ndarray) -> tuple:
    """Schur complement's factor, blocks' inverses, transfers, and the log-determinant of the
    negative Hessian in (v, w).
    """
    k = a.shape[1]
    pairs = (a[:, :, None] * a[:, None, :]).reshape(len(a), k * k)
    own = (weight.T @ pairs).reshape(weight.shape[1], k, k) + np.eye(k)
    chol = np.linalg.cholesky(own)
    inverse = np.linalg.inv(own)
    of_runs = _by_run(grid, weight[:, :, None] * a[:, None, :])
    across = su * of_runs.transpose(1, 2, 0)  # [columns, k, runs]
    transfer = inverse @ across
    schur = -np.tensordot(across, transfer, axes=([0, 1], [0, 1]))
    schur[np.diag_indices_from(schur)] += su**2 * _by_run(grid, weight.sum(1)) + 1
    factor = cho_factor(schur, lower=True) if grid.n_runs else (schur, True)
    log_det = 2 * np.log(np.diagonal(chol, axis1=1, axis2=2)).sum()
    log_det += 2 * np.log(np.diag(factor[0])).sum()
    return factor, inverse, transfer, log_det


def _solve(solver: tuple, gv: np.ndarray, gw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The negative Hessian's inverse times (gv [runs], gw [columns, k])."""
    factor, inverse, transfer = solver
    v = gv - np.einsum("jkr,jk->r", transfer, gw, optimize=True)
    v = cho_solve(factor, v) if len(v) else v
    return v, np.einsum("jkl,jl->jk", inverse, gw) - transfer @ v


def mode(
    grid: Grid,
    beta: np.ndarray,
    sd: np.ndarray,
    state: State,
    tolerance: float = 1e-14,
    most: int = 100,
) -> Mode:
    """Newton's method with halved steps, from the state's modes; the state is moved to the new
    ones.
    """
    su, spread = _spread(grid, sd)
    a, fixed = grid.columns * spread, grid.x @ beta
    v, w = state.v, state.w

    def density(v: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, float]:
        eta = _predictor(grid, fixed, su, a, v, w)
        return eta, float(
            (grid.y * eta - grid.trials * np.logaddexp(0, eta)).sum() - (v @ v + (w * w).sum()) / 2
        )

    eta, value = density(v, w)
    for _ in range(most):
        mu = expit(eta)
        weight, rest = grid.trials * mu * (1 - mu), grid.y - grid.trials * mu
        factor, inverse, transfer, log_det = _factors(grid, weight, su, a)
        gv, gw = su * _by_run(grid, rest.sum(1)) - v, rest.T @ a - w
        dv, dw = _solve((factor, inverse, transfer), gv, gw)
        gain = gv @ dv + (gw * dw).sum()
        if gain < tolerance:
            break
        size = 1.0
        while True:
            found, new = density(v + size * dv, w + size * dw)
            if new >= value or size < 1e-6:
                break
            size /= 2
        v, w, eta, value = v + size * dv, w + size * dw, found, new
    state.v, state.w = v, w
    return Mode(eta, weight, rest, value, factor, inverse, transfer, log_det)


def log_likelihood(
    grid: Grid, beta: np.ndarray, sd: np.ndarray, state: State
) -> tuple[float, np.ndarray, np.ndarray, Mode]:
    """Laplace's log-likelihood, its gradient in beta [terms] and in the logarithms of the standard
    deviations, and the mode.

    The gradient is exact: the modes move with the parameters (implicit function theorem), and the
    weights with the modes (Tierney and Kadane 1986, JASA 81, 82; as automatic differentiation has
    it in TMB, Kristensen et al. 2016).
    """
    found = mode(grid, beta, sd, state)
    su, spread = _spread(grid, sd)
    a = grid.columns * spread
    runs = np.eye(grid.n_runs)
    covered = cho_solve(found.factor, runs) if grid.n_runs else runs  # of v
    moved = found.transfer @ covered  # [columns, k, runs]
    of_w = found.inverse + moved @ found.transfer.transpose(0, 2, 1)  # [columns, k, k]
    leverage = _leverage(grid, a, su, covered, moved, of_w)
    third = found.weight * (1 - 2 * expit(found.eta))
    pull = leverage * third / 2
    zv, zw = _solve(found.solver, su * _by_run(grid, pull.sum(1)), pull.T @ a)
    # added by the modes' move
    shift = found.weight * _predictor(grid, np.zeros(len(a)), su, a, zv, zw) - pull
    in_beta = grid.x.T @ (found.rest + shift).sum(1)
    in_sd = []
    v = state.v
    by_run = v * v - (1 - np.diag(covered)) + su * _by_run(grid, shift.sum(1)) * v - zv * v
    in_sd += np.bincount(grid.kinds, by_run, grid.n_kinds).tolist()
    start, by_effect = 0, shift.T @ a
    traces = np.diagonal(of_w, axis1=1, axis2=2)
    for block in grid.blocks:
        own = slice(start, start := start + block.shape[1])
        w = state.w[:, own]
        known = (w * w).sum() - (w.size - traces[:, own].sum())
        in_sd.append(known + (by_effect[:, own] * w).sum() - (zw[:, own] * w).sum())
    return found.joint - found.log_det / 2, in_beta, np.array(in_sd), found


def _leverage(
    grid: Grid,
    a: np.ndarray,
    su: np.ndarray,
    covered: np.ndarray,
    moved: np.ndarray,
    of_w: np.ndarray,
) -> np.ndarray:
    """The variance of each cell's predictor given the data [rows, columns]."""
    k = a.shape[1]
    pairs = (a[:, :, None] * a[:, None, :]).reshape(len(a), k * k)
    found = pairs @ of_w.reshape(len(of_w), k * k).T
    if grid.n_runs:
        own = grid.run >= 0
        run = grid.run[own]
        across = moved.transpose(2, 1, 0)[run]  # [rows, k, columns]
        shared = 2 * su[run, None] * np.einsum("ik,ikj->ij", a[own], across)
        found[own] += (su**2 * np.diag(covered))[run, None] - shared
    return found


def information(grid: Grid, found: Mode, sd: np.ndarray) -> np.ndarray:
    """The information about beta at given standard deviations [terms, terms]: the weights less what
    the random effects take.
    """
    su, spread = _spread(grid, sd)
    a = grid.columns * spread
    rows = []
    for column in grid.x.T:
        weighted = found.weight * column[:, None]
        zv, zw = _solve(found.solver, su * _by_run(grid, weighted.sum(1)), weighted.T @ a)
        taken = found.weight * _predictor(grid, np.zeros(len(a)), su, a, zv, zw)
        rows.append(grid.x.T @ (weighted - taken).sum(1))
    return (np.array(rows) + np.array(rows).T) / 2


# ---- the fit
@dataclass(frozen=True)
class Fit:
    """Laplace's maximum of the likelihood; standard deviations in logits, of each kind of runs and
    then of each block.
    """

    beta: np.ndarray
    sd: np.ndarray
    cov: np.ndarray = field(repr=False)  # of beta
    loglik: float
    gradient: float  # largest slope of the log-likelihood per standard error of a parameter
    at_zero: np.ndarray  # [components] true where the maximum is at a standard deviation of zero
    evaluations: int
    message: str


def fit(grid: Grid) -> Fit:
    """Maximise Laplace's log-likelihood over fixed effects and standard deviations: BFGS with the
    exact gradient, then Newton's steps with a differenced one.

    The covariance of beta is the inverse of the whole negative Hessian (standard deviations
    included), as lme4's and glmmTMB's. A component whose maximum is at zero is taken out of the
    maximisation, and said.
    """
    n_sd = len(grid.blocks) + grid.n_kinds
    state = State(np.zeros(grid.n_runs), np.zeros((grid.y.shape[1], grid.columns.shape[1])))
    free, calls = np.ones(n_sd, bool), [0]
    sd = np.full(n_sd, 0.5)
    beta = _start(grid, state, sd)
    for _ in range(n_sd + 1):
        beta, sd, hessian, value, slope, message = _maximum(grid, state, beta, sd, free, calls)
        at_zero = free & [_no_worse_at_zero(grid, state, beta, sd, i, value) for i in range(n_sd)]
        if not at_zero.any():
            break
        free &= ~at_zero
        sd = np.where(free, sd, 0.0)
    cov = np.linalg.inv(hessian)[: len(beta), : len(beta)]
    return Fit(beta, sd, cov, value, slope, ~free, calls[0], message)


def _no_worse_at_zero(
    grid: Grid, state: State, beta: np.ndarray, sd: np.ndarray, i: int, value: float
) -> bool:
    """Whether a doubtful component may be zero: the log-likelihood there is at least that of the
    maximum found.
    """
    if sd[i] > DOUBTFUL * sd.max():
        return False
    there = np.where(np.arange(len(sd)) == i, 0.0, sd)
    found = mode(grid, beta, there, state)
    return found.joint - found.log_det / 2 >= value - 1e-5


def _start(grid: Grid, state: State, sd: np.ndarray) -> np.ndarray:
    """Fixed effects by a few scoring steps at given standard deviations, from zero."""
    beta = np.zeros(grid.x.shape[1])
    for _ in range(8):
        found = mode(grid, beta, sd, state, tolerance=1e-4)
        score = grid.x.T @ found.rest.sum(1)  # of the joint density, the modes moving along
        step = np.linalg.solve(information(grid, found, sd), score)
        most = np.abs(grid.x @ step).max(initial=0)
        beta = beta + step * min(1.0, 4 / max(most, 1e-300))
        if most < 0.05:
            break
    return beta


def _maximum(
    grid: Grid, state: State, beta: np.ndarray, sd: np.ndarray, free: np.ndarray, calls: list[int]
) -> tuple:
    """The maximum over beta and the free standard deviations; in coordinates in which the
    information about beta is the identity.
    """
    found, n = mode(grid, beta, sd, state), len(beta)
    root = np.linalg.inv(np.linalg.cholesky(information(grid, found, sd))).T
    sizes = np.bincount(grid.kinds, minlength=grid.n_kinds).tolist()
    sizes += [block.shape[1] * grid.y.shape[1] for block in grid.blocks]
    scale = 1 / np.sqrt(2 * np.array(sizes)[free])

    def parameters(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        full = sd.copy()
        full[free] = np.exp(np.clip(np.log(sd[free]) + scale * z[n:], np.log(SMALLEST), np.log(50)))
        return beta + root @ z[:n], full

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        calls[0] += 1
        value, in_beta, in_sd, _ = log_likelihood(grid, *parameters(z), state)
        return -value, -np.concatenate([root.T @ in_beta, scale * in_sd[free]])

    z = np.zeros(n + free.sum())
    result = minimize(objective, z, jac=True, method="BFGS", options={"gtol": 1e-2, "maxiter": 200})
    z, value, slope, hessian = _newton(
        objective, result.x, lambda z: parameters(z)[1][free].min(initial=1) < 2 * SMALLEST
    )
    none = np.zeros((n, len(scale)))
    back = np.block([[np.linalg.inv(root), none], [none.T, np.diag(1 / scale)]])
    message = f"BFGS ({result.nit} iterations), Newton"
    steepest = float(np.abs(slope).max(initial=0))
    return *parameters(z), back.T @ hessian @ back, -value, steepest, message


def _newton(objective, z: np.ndarray, at_edge) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Newton's steps from z, with a differenced Hessian: the last point with its value, slope and
    Hessian.
    """
    value, slope = objective(z)
    for _ in range(3):
        hessian = _differenced(lambda at: objective(at)[1], z)
        flat, bent = np.abs(slope).max() < TOLERANCE, np.linalg.eigvalsh(hessian).min() <= 0
        if at_edge(z) or flat or bent:
            break
        new = z - np.linalg.solve(hessian, slope)
        after, slope_after = objective(new)
        if after > value + 1e-9:
            break
        z, value, slope = new, after, slope_after
        if np.abs(slope).max() < TOLERANCE:
            break
    return z, value, slope, hessian


def _differenced(gradient, z: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """The Hessian by differences of the exact gradient."""
    steps = step * np.eye(len(z))
    rows = np.array([(gradient(z + one) - gradient(z - one)) / (2 * step) for one in steps])
    return (rows + rows.T) / 2
