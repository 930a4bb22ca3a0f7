"""Logistic mixed models of single verdicts with crossed random effects, by Laplace's approximation
(laplace.py).
"""

import time

import numpy as np
import pandas as pd
from scipy.optimize import linprog
from scipy.special import gammaln

from driftbook.stats import laplace
from driftbook.stats.laplace import Grid
from driftbook.stats.mixed import (
    Design,
    MixedFit,
    estimable,
    fitted,
    framed,
    never_run,
    reported,
    small_enough,
)

ARRAYS, BLOCKS = 14, 5  # rows x prompts and prompts x effects x runs that are there at one time


def item_model(
    items: pd.DataFrame,
    formula: str,
    groups: str | tuple[str, ...] = ("run_id", "prompt_id"),
    trials: str | None = None,
) -> MixedFit:
    """A logistic mixed model of verdicts with crossed random intercepts, by Laplace's approximation
    (laplace.py), as lme4's glmer and glmmTMB.

    The response is true or false (or a share, with the column of its number of trials). `groups`:
    the runs ("run_id by method" gives those of each method a variance of their own), then the
    prompts and what is joined to them by ':' (the maximal model has prompt_id, prompt_id:base_model
    and prompt_id:method); or one group alone, within which answers may repeat and whose levels df
    then counts. A null run is a row without a run effect: a base model itself, which was not drawn.
    Rows without a verdict are left out and counted. A direction in which the
    answers separate (all safe, or all unsafe, wherever it acts) has no finite estimate: its rows
    are taken out, and it is named, as are terms that are constant or aliased (Albert and Anderson
    1984, Biometrika 71, 1).

    Raises:
        ValueError: no verdict; one that is no share; all verdicts alike; an answer stands twice; a
            group that does not begin with the prompts; no column that the formula or a group
            names; more memory than mixed.MOST_BYTES.
    """
    started, groups = time.process_time(), (groups,) if isinstance(groups, str) else tuple(groups)
    items, y, right, notes = framed(items, formula, groups)
    notes += never_run(items, formula)
    n = _trials(items, y, formula, trials)
    grid, kinds = _grid(items, y, right.to_numpy(), groups, n)
    kept, null, lost, grid = _told_apart(grid, right.columns)
    design, names = Design(right.design_info, kept, null), right.columns[kept]
    components, grid, dropped = _worthwhile(grid, groups, kinds)
    found = laplace.fit(grid)
    n_runs = grid.n_runs or (len(np.unique(grid.run)) if len(groups) > 1 else grid.y.shape[1])
    df = n_runs - len(names)
    random = pd.DataFrame({"group": components, "term": "intercept", "sd": found.sd})
    at_zero = tuple(random.loc[found.at_zero, "group"])
    converged = bool(found.gradient < 10 * laplace.TOLERANCE)
    notes += [*lost, *dropped, *(f"component {name} is at zero" for name in at_zero)]
    notes.append(("optimiser " if converged else "did not converge by ") + found.message)
    if df <= 0:
        notes.append(f"{n_runs} levels of {groups[0]} for {len(names)} fixed terms: no interval")
    report = reported(found.message, found.evaluations, found.gradient, at_zero, started)
    loglik = found.loglik + (0.0 if trials is None else _ways(grid))
    by = groups[0].partition(" by ")[2] if len(groups) > 1 else ""
    return fitted(
        design, names, found.beta, found.cov, df, random, loglik, converged, notes, report, by=by
    )


def _trials(
    items: pd.DataFrame, y: np.ndarray, formula: str, trials: str | None
) -> np.ndarray | None:
    """The number of trials of each row, or none; a response that cannot be a share of them is
    refused.
    """
    name = formula.partition("~")[0].strip()
    if (outside := (y < 0) | (y > 1)).any():
        raise ValueError(
            f"{outside.sum()} values of {name!r} lie outside 0 to 1 (the first is"
            f" {y[outside][0]:g}); give verdicts (true or false) or shares between 0 and 1"
        )
    if trials is None:
        if (between := (y > 0) & (y < 1)).any():
            raise ValueError(
                f"{between.sum()} values of {name!r} lie between 0 and 1 (the first is"
                f" {y[between][0]:g}); a share needs trials=, the column of its number of trials"
            )
        return None
    if trials not in items:
        raise ValueError(f"trials={trials!r}: there is no such column")
    n = items[trials].astype("Float64").to_numpy(float, na_value=np.nan)
    if (strange := ~(n >= 0)).any():
        raise ValueError(f"{strange.sum()} values of trials={trials!r} are null or below 0")
    return n


def _ways(grid: Grid) -> float:
    """The logarithm of the number of orders in which the answers could have been given."""
    no = grid.trials - grid.y
    return (gammaln(grid.trials + 1) - gammaln(grid.y + 1) - gammaln(no + 1)).sum()


def _grid(
    items: pd.DataFrame,
    y: np.ndarray,
    x: np.ndarray,
    groups: tuple[str, ...],
    trials: np.ndarray | None,
) -> tuple[Grid, pd.Index]:
    """The answers as a grid: a row for each run and set of fixed terms, a column a prompt; and the
    names of the runs' kinds.
    """
    runs, columns = (groups[0], groups[1:]) if len(groups) > 1 else (None, groups)
    prompt = columns[0]
    if strange := [name for name in columns if name.split(":")[0] != prompt]:
        raise ValueError(
            f"group {strange[0]!r} does not begin with {prompt!r}; groups are the runs, then the"
            " prompts alone and joined to something by ':'"
        )
    parts = [_codes(items, name) for name in columns]
    run, kind, kinds = _runs(items, runs)
    key = np.ascontiguousarray(np.column_stack([x + 0.0, run, *parts]))
    whole = key.view(np.dtype((np.void, key.itemsize * key.shape[1]))).ravel()
    _, first, row = np.unique(whole, return_index=True, return_inverse=True)
    column, names = pd.factorize(items[prompt])
    shape, place = (len(first), len(names)), row * len(names) + column
    _small_enough(shape, parts, len(np.unique(run[run >= 0])), (runs, prompt))
    count = np.bincount(place, minlength=shape[0] * shape[1])
    if trials is None and runs and (count > 1).any():
        raise ValueError(
            f"{(count > 1).sum()} answers stand twice (same"
            f" {' and '.join(filter(None, (runs, prompt)))}); keep one of each, or give shares with"
            " their trials"
        )
    n = np.ones(len(y)) if trials is None else trials
    yes, asked = (np.bincount(place, one, shape[0] * shape[1]).reshape(shape) for one in (y * n, n))
    blocks = tuple(np.eye(part.max() + 1)[part[first]] for part in parts)
    return Grid(yes, asked, x[first], run[first], blocks, kind), kinds


def _runs(items: pd.DataFrame, runs: str | None) -> tuple[np.ndarray, np.ndarray, pd.Index]:
    """The run of each item (-1 where null, or where there are no runs), the kind of each run (what
    follows "by"), and the names of the kinds.
    """
    if runs is None:
        return np.full(len(items), -1), np.zeros(0, int), pd.Index([])
    column, _, by = runs.partition(" by ")
    if not by:
        run, levels = pd.factorize(items[column])
        return run, np.zeros(len(levels), int), pd.Index([""])
    has = items[column].notna().to_numpy()
    pairs = pd.MultiIndex.from_frame(items.loc[has, [column, by]].astype(str))
    run = np.full(len(items), -1)
    run[has], levels = pd.factorize(pairs)
    return run, *pd.factorize(levels.get_level_values(1))


def _small_enough(
    shape: tuple[int, int], parts: list[np.ndarray], n_runs: int, names: tuple[str | None, str]
) -> None:
    """Refuse a grid that needs too much memory, before any is taken."""
    k = sum(int(part.max(initial=-1)) + 1 for part in parts)
    needed = 8 * shape[1] * (shape[0] * (ARRAYS + k) + BLOCKS * k * (n_runs + k))
    rows = f"{shape[0]:,} rows of {names[0] or 'one design'} x {shape[1]:,} of {names[1]}"
    small_enough(f"the model is fitted on a grid, {rows} with {k} effects", needed)


def _codes(items: pd.DataFrame, name: str) -> np.ndarray:
    """The level of each item in what is joined to the prompts; one level for the prompts alone."""
    if ":" not in name:
        return np.zeros(len(items), int)
    joined = items[name.partition(":")[2].split(":")].astype(str)
    return pd.factorize(joined.agg(" ".join, axis=1))[0]


def _told_apart(grid: Grid, names: pd.Index) -> tuple[np.ndarray, np.ndarray, list[str], Grid]:
    """The estimable columns, the directions that are not, a note for each term that is left out,
    and the grid of the rows that stay.
    """
    kept, null, notes = estimable(grid.x, names)
    yes, asked = grid.y.sum(1), grid.trials.sum(1)
    if not 0 < yes.sum() < asked.sum():
        raise ValueError(f"all {asked.sum():.0f} verdicts are alike: there is nothing to model")
    sign, stay = np.where(yes == asked, 1, np.where(yes == 0, -1, 0)), np.ones(len(grid.x), bool)
    while (apart := _separated(grid.x[:, kept], sign, stay)).any():
        stay &= ~apart
    if not stay.all():
        told, null, _ = estimable(grid.x[stay], names)
        why = f"(separated: {(~stay).sum()} of {len(stay)} rows of the design have all answers"
        why += " alike, and are left out)"
        notes += [f"not estimable: {names[i]} {why}" for i in kept if i not in told]
        kept = told
        if not asked[stay].sum():
            raise ValueError(
                "the answers separate completely: every row of the design has all answers alike, so"
                " there is nothing to model"
            )
    codes, kind = _numbered(grid.run[stay], grid.kind)
    blocks = tuple(block[stay][:, block[stay].any(0)] for block in grid.blocks)
    left = Grid(grid.y[stay], grid.trials[stay], grid.x[stay][:, kept], codes, blocks, kind)
    return kept, null, notes, left


def _numbered(run: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs numbered without gaps (-1 stays), and their kinds."""
    levels, codes = np.unique(run, return_inverse=True)
    without = int(len(levels) > 0 and levels[0] == -1)
    return codes - without, kind[levels[without:]]


def _separated(x: np.ndarray, sign: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """Rows that a direction separates from all others: x'd >= 0 where all answers are yes, <= 0
    where all are no, = 0 where mixed (a linear program; Konis 2007).
    """
    found, pure = np.zeros(len(x), bool), stay & (sign != 0)
    if not pure.any():
        return found
    signed, mixed = sign[pure, None] * x[pure], x[stay & (sign == 0)]
    limits = {"A_ub": -signed, "b_ub": np.zeros(len(signed)), "bounds": (-1, 1)}
    if len(mixed):
        limits |= {"A_eq": mixed, "b_eq": np.zeros(len(mixed))}
    solution = linprog(-signed.sum(0), **limits)
    if solution.x is not None:
        found[np.flatnonzero(pure)[signed @ solution.x > 1e-6]] = True
    return found


def _worthwhile(
    grid: Grid, groups: tuple[str, ...], kinds: pd.Index
) -> tuple[list[str], Grid, list[str]]:
    """The components that can be told, with their names; those of one level, or with a level for
    each row of answers, are left out with a note.
    """
    runs, columns = (
        (groups[0].partition(" by ")[0], groups[1:]) if len(groups) > 1 else ("", groups)
    )
    names, notes, blocks, run = [], [], [], grid.run
    for i, one in enumerate(kinds):
        name, n = f"{runs} of {one}" if one else runs, (grid.kind == i).sum()
        if n > 1:
            names.append(name)
        else:
            notes.append(f"component {name} left out: {n} levels")
            run = np.where(np.append(grid.kind == i, False)[run], -1, run)
    run, kind = _numbered(run, grid.kind)
    kind = np.unique(kind, return_inverse=True)[1]
    for name, block in zip(columns, grid.blocks, strict=True):
        if grid.y.shape[1] > 1 and (":" not in name or block.shape[1] > 1):
            names.append(name)
            blocks.append(block)
        else:
            notes.append(f"component {name} left out: one level")
    return names, Grid(grid.y, grid.trials, grid.x, run, tuple(blocks), kind), notes
