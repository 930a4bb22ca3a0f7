"""Trade-offs between what a variant does to safety, over-refusal, fairness and utility, and what it
costs: the Pareto front and how sure it is, correlations over runs without the noise of the prompts,
and cost against change.

All of it is made from scores with influences (stats.Scores): a change of each run against its own
base model, and how much each prompt or question family moves it. So the noise of prompts is known
for every number, and two settings of one base model share it, as they share the base model itself.
"""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import stdtr, stdtrit

from driftbook.benchmarks import bbq_orders, bbq_scores
from driftbook.stats import harm, terms
from driftbook.stats import influence as influence_
from driftbook.stats.confidence import UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.influence import CELL, Scores
from driftbook.stats.pareto import front
from driftbook.stats.terms import (
    ACCURACY_AMB,
    BIAS_AMB,
    BIAS_DIS,
    CORRECT,
    FRONT,
    LOSS,
    NO_OP,
    REFUSED,
    TRAINED,
    UNREFUSED,
    UNSAFE,
)
from driftbook.study import tables

LESS, MORE, NEARER_ZERO = "less", "more", "nearer zero"
FRONT_BIAS = (
    "on the Pareto front (percent): fewer unsafe responses, fewer refusals of benign prompts, bias"
    " scores nearer zero in ambiguous and in disambiguated contexts, less utility loss"
)
# accuracy and bias in fronts of their own: the ambiguous bias is scaled by the error rate, so
# together they would count one thing twice
GOALS = {
    FRONT: {UNSAFE: LESS, REFUSED: LESS, ACCURACY_AMB: MORE, LOSS: LESS},
    FRONT_BIAS: {
        UNSAFE: LESS,
        REFUSED: LESS,
        BIAS_AMB: NEARER_ZERO,
        BIAS_DIS: NEARER_ZERO,
        LOSS: LESS,
    },
}
ASKED = {
    UNSAFE: "safety",
    UNREFUSED: "safety",
    REFUSED: "over_refusal",
    LOSS: "utility",
    CORRECT: "utility",
}  # all others: bbq
# factor between the cheapest and the dearest run, below which "ten times the cost" would be a guess
LEAST_SPAN = 1.5
COSTS = {
    "n_trainable": "trainable parameters",
    "seconds": "seconds of training",
    "peak_memory": "peak memory of training",
}
SLOPE, SLOPE_WITHIN = "ten times the cost, over runs", "ten times the cost, within methods"


# ---- what is traded
def goals_of(measured: dict[str, tuple[Scores, Scores]]) -> dict[str, dict[str, str]]:
    """GOALS with the outcome that tells of safety among those measured."""
    safety = harm.safety_of(measured)
    return {
        harm.worded(name, safety): {safety if one == UNSAFE else one: it for one, it in own.items()}
        for name, own in GOALS.items()
    }


def measured(
    verdicts: pd.DataFrame,
    prompts: pd.DataFrame,
    answers: pd.DataFrame,
    ratings: pd.DataFrame,
    arms: pd.DataFrame,
) -> dict[str, tuple[Scores, Scores]]:
    """The level and the change of each run by outcome: harm (harmful prompts, first judge, see
    `harm.with_harm`), refused (benign look-alikes), BBQ's four, utility's two.

    An outcome that nothing was asked for is left out.
    """
    rows = harm.with_harm(tables.greedy(verdicts)).merge(
        prompts, on=["benchmark", "prompt_id"], validate="m:1"
    )
    rows = rows[rows["judge"].eq(rows["judge"].iloc[0])] if len(rows) else rows
    safety, found = harm.of_judge(rows["judge"].iloc[0]) if len(rows) else UNSAFE, {}
    for outcome, column, kind in (
        (safety, "harm", "harmful"),
        (REFUSED, "refusal", "benign look-alike"),
    ):
        values = influence_.matrix(
            rows[rows["benchmark"].eq(ASKED[outcome]) & rows["kind"].eq(kind)],
            column,
            ["category", "family", "prompt_id"],
        )
        found |= (
            {outcome: (influence_.shares(values), influence_.paired(values, arms))}
            if len(values)
            else {}
        )
    levels = bbq_scores.by_run(bbq_orders.official(answers)) if len(answers) else {}
    ratings = ratings[ratings["benchmark"].eq("utility")]
    found |= {
        outcome: (level, influence_.changes(level, arms))
        for outcome, level in levels.items()
        if level is not None
    }
    for outcome, metric, scale in ((LOSS, "nll", 1.0), (CORRECT, "correct", 100.0)):
        rows = ratings[ratings["metric"].eq(metric)]
        found |= (
            {outcome: (influence_.rated(rows, scale), influence_.rated_changes(rows, arms, scale))}
            if len(rows)
            else {}
        )
    return found


def run_changes(measured: dict[str, tuple[Scores, Scores]]) -> pd.DataFrame:
    """Runs x outcomes: the change of each run."""
    return pd.DataFrame(
        {
            outcome: pd.Series(change.value, index=change.runs)
            for outcome, (_, change) in measured.items()
        }
    )


def fronts(
    measured: dict[str, tuple[Scores, Scores]],
    goals: dict[str, str],
    arms: pd.DataFrame,
    cells: pd.DataFrame,
    n_draws: int,
    seed: int,
    **labels: str,
) -> pd.DataFrame:
    """The probability (percent) that each cell is on the Pareto front of its base model's cells,
    for seeds and prompts like these.

    `goals` says of each outcome whether less, more or nearer zero is better; outcomes that were not
    measured are left out, and `how` names those that count. The base model is a point of the front:
    its change is zero by definition, and what its own prompts leave unknown is in all changes
    against it, in common. Means of cells are drawn together from the normal distribution around
    what was found: over runs (the covariance between cells and goals of runs that share their
    random numbers, influence.seed_clusters, t by a chi-square of the degrees of freedom of the
    settings that do) and over units (covariance between cells and between
    goals with the same units, without the noise of single runs). It is a bootstrap's probability
    (Efron & Tibshirani 1998, Annals of Statistics 26, 1687): of what is on the front, given what
    was found, and no test. A cell with a run that has no score in a goal takes no part and is null;
    one of a method that ran no setting twice is drawn over units alone.
    """
    goals = {
        outcome: better
        for outcome, better in goals.items()
        if outcome in measured and not np.isnan(measured[outcome][1].value).all()
    }
    rng, parts = np.random.default_rng(seed), []
    for base_model, own in cells[cells["base_model"].ne("all")].groupby("base_model", sort=False):
        base_run = arms.loc[arms["base_model"].eq(base_model) & arms["arm"].eq("base"), "run_id"]
        parts.append(
            _front_of(measured, goals, base_run.iloc[0], own, n_draws, rng).assign(
                base_model=base_model
            )
            if len(goals) and len(base_run)
            else pd.DataFrame()
        )
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return (
        complete(rows.assign(**labels, benchmark="all", judge="none", contrast=terms.LEVEL))
        if len(rows)
        else complete(rows)
    )


def _front_of(
    measured: dict,
    goals: dict[str, str],
    base_run: str,
    cells: pd.DataFrame,
    n_draws: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """method, group, member, value, n_runs, population and how of one base model and its cells."""
    changes = [measured[outcome][1] for outcome in goals]
    values = np.stack([change.of(cells["run_id"]) for change in changes], 1)
    keys = pd.MultiIndex.from_frame(cells[CELL[1:]])
    lacking = [key for key in keys.unique() if np.isnan(values[keys == key]).any()]
    own, values = cells[~keys.isin(lacking)], values[~keys.isin(lacking)]
    why = "a run has no score in one of the goals: the cell takes no part"
    empty = [(*key, int((keys == key).sum()), None, why, terms.BOTH) for key in lacking]
    columns, base = [*CELL[1:], "n_runs", "value", "how", "population"], ("none", "all", "all", 1)
    if own.empty:
        why = "no cell has a score in all goals: there is no front"
        return pd.DataFrame([(*base, None, why, terms.BOTH), *empty], columns=columns)
    names = [base, *((*key, len(rows)) for key, rows in own.groupby(CELL[1:], sort=False))]
    drawn, single = drawn_points(measured, goals, base_run, own, values, n_draws, rng)
    share = 100 * front(drawn).mean(0)
    what = "; ".join(f"{better} {outcome}" for outcome, better in goals.items())
    how = f"share of {n_draws} draws of all means together, over runs and units; goals: {what}"
    rows = pd.DataFrame(names, columns=[*CELL[1:], "n_runs"]).assign(
        value=share, how=how, population=terms.BOTH
    )
    rows.loc[rows["method"].isin(single), "population"] = terms.THESE_RUNS
    return pd.concat([rows, pd.DataFrame(empty, columns=columns)]) if empty else rows


def drawn_points(
    measured: dict,
    goals: dict[str, str],
    base_run: str,
    cells: pd.DataFrame,
    values: np.ndarray,
    n_draws: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[str]]:
    """Drawn points [draws, 1 + cells, goals], less being better, the base model first; and the
    methods of which no setting was run twice.
    """
    cell = cells.groupby(CELL[1:], sort=False).ngroup().to_numpy()
    weights = np.zeros((cell.max(initial=-1) + 1, len(cells)))
    weights[cell, np.arange(len(cells))] = cells["weight"]
    setting, cluster = (
        pd.factorize(names)[0]
        for names in (cells["method"] + ": " + cells["setting"], cells["cluster"])
    )
    method = cells["method"].to_numpy(object)
    runs, single = _over_runs(values, method, setting, cluster, weights, n_draws, rng)
    units = _over_units(measured, goals, base_run, cells, weights, setting, n_draws, rng)
    bases = [
        measured[outcome][0].value[measured[outcome][0].at([base_run])[0]] for outcome in goals
    ]
    changes = np.concatenate(
        [np.zeros((n_draws, 1, len(goals))), weights @ values + runs + units[:, 1:]], 1
    )
    sides = {
        LESS: changes,
        MORE: -changes,
        NEARER_ZERO: np.abs(changes + np.array(bases) + units[:, :1]),
    }
    points = np.stack([sides[better][..., j] for j, better in enumerate(goals.values())], -1)
    return (
        np.round(points, 9),
        single,
    )  # so that what is equal stays equal, whatever the last bits of a draw


def _over_runs(
    values: np.ndarray,
    method: np.ndarray,
    setting: np.ndarray,
    cluster: np.ndarray,
    weights: np.ndarray,
    n_draws: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[str]]:
    """Draws [draws, cells, goals] of what other runs with the same settings would add; and the
    methods that cannot say, of which no setting was run twice.

    Runs of a cluster err together: their deviations from their settings' means add up before they
    are squared, so that cells are drawn with the covariance that shared seeds give them. A setting
    with one run has the spread of its method, by itself.
    """
    drawn, single = np.zeros((n_draws, len(weights), values.shape[1])), []
    rest, again = scaled_rest(values, setting), np.bincount(setting, minlength=1)[setting] > 1
    for own in _err_together(setting, cluster, again):
        df = np.bincount(setting[own])[setting[own]].min() - 1
        of = np.unique(cluster[own], return_inverse=True)[1]
        parts = np.zeros((of.max() + 1, *drawn.shape[1:]))
        np.add.at(parts, of, weights.T[own][:, :, None] * rest[own][:, None, :])
        size = np.sqrt(df / rng.chisquare(df, (n_draws, 1, 1)))
        drawn += size * np.tensordot(rng.normal(size=(n_draws, len(parts))), parts, 1)
    for one in np.unique(setting[~again]):
        own = setting == one
        pool = again & (method == method[own][0])
        if not pool.any():
            single.append(method[own][0])
            continue
        df = pool.sum() - len(np.unique(setting[pool]))
        within, amount = _within(values, setting)[pool], np.abs(weights[:, own]).sum(1)
        spread = root(within.T @ within / df)
        normal = rng.normal(size=(n_draws, 1, values.shape[1])) @ spread.T
        drawn += amount[:, None] * normal * np.sqrt(df / rng.chisquare(df, (n_draws, 1, 1)))
    return drawn, single


def _err_together(setting: np.ndarray, cluster: np.ndarray, again: np.ndarray) -> list[np.ndarray]:
    """The runs [runs, true or false] of each group of settings that clusters of runs join, of
    settings that were run twice or more (`again`)."""
    n = setting.max(initial=-1) + 1
    size = n + cluster.max(initial=-1) + 1
    pairs = (setting[again], n + cluster[again])
    joined = coo_array((np.ones(again.sum()), pairs), (size, size))
    group = connected_components(joined, directed=False)[1][setting]
    return [again & (group == one) for one in np.unique(group[again])]


def scaled_rest(values: np.ndarray, setting: np.ndarray) -> np.ndarray:
    """Values [runs, k] less the mean of their setting, scaled so that the sum of their squares
    estimates the variance of a run as often as there are runs; 0 where a setting has one run."""
    size = np.bincount(setting, minlength=1)[setting]
    scale = np.where(size > 1, size / np.maximum(size - 1, 1), 0.0)
    return _within(values, setting) * np.sqrt(scale)[:, None]


def _within(values: np.ndarray, setting: np.ndarray) -> np.ndarray:
    """Values [runs, k] less the mean of their setting."""
    means = (
        np.stack([values[setting == one].mean(0) for one in range(setting.max(initial=-1) + 1)])
        if len(values)
        else values
    )
    return values - means[setting]


def _over_units(
    measured: dict,
    goals: dict[str, str],
    base_run: str,
    cells: pd.DataFrame,
    weights: np.ndarray,
    setting: np.ndarray,
    n_draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws [draws, 1 + cells, goals] of what other units would add: to the base model's own level
    (first), and to the changes of cells.
    """
    outcomes, rows, noise = list(goals), [], []
    for outcome in outcomes:
        level, change = measured[outcome]
        influence = scaled(change, change.influence[change.at(cells["run_id"])])
        rows.append(
            np.vstack([scaled(level, level.influence[level.at([base_run])]), weights @ influence])
        )
        noise.append(scaled_rest(influence, setting))
    n = len(weights) + 1
    covariance = np.zeros((n, len(outcomes), n, len(outcomes)))
    for i, j in (
        (i, j)
        for i in range(len(outcomes))
        for j in range(len(outcomes))
        if same_units(*(measured[outcomes[k]][1] for k in (i, j)))
    ):
        covariance[:, i, :, j] = rows[i] @ rows[j].T
        covariance[range(1, n), i, range(1, n), j] -= weights**2 @ (noise[i] * noise[j]).sum(1)
    whole = root(covariance.reshape(n * len(outcomes), -1))
    return (rng.normal(size=(n_draws, len(whole))) @ whole.T).reshape(n_draws, n, len(outcomes))


def root(covariance: np.ndarray) -> np.ndarray:
    """A matrix whose product with its transpose is the covariance, or the nearest one that can be:
    without the negative part that subtracted noise leaves.
    """
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0)) * (np.diag(covariance) > 0)[:, None]


def scaled(scores: Scores, influence: np.ndarray) -> np.ndarray:
    """Influences [rows, units] of a score's units as one number a family [rows, families], so that
    the dot product of two rows is the covariance of their sums over families like these (less their
    mean within strata, with CR2's factor: stats.Clusters).
    """
    clusters = scores.clusters
    rows = influence[:, clusters.order]
    rest = (
        rows - np.add.reduceat(rows, clusters.strata, axis=1)[:, clusters.stratum] / clusters.size
    )
    return np.add.reduceat(rest, clusters.starts, axis=1) * np.sqrt(clusters.inflate)


def same_units(one: Scores, other: Scores) -> bool:
    """Whether two scores were made from the same prompts or question families, in one order."""
    return np.array_equal(one.strata, other.strata) and one.clusters.n == other.clusters.n


def has_score(scores: Scores, run_ids: pd.Series) -> np.ndarray:
    """Which of these runs have a score."""
    at = scores.at(run_ids)
    return (at >= 0) & ~np.isnan(np.append(scores.value, np.nan)[at])


# ---- cost against change
def slopes(change: Scores, arms: pd.DataFrame, runs: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """What ten times the cost goes with, in the unit of the change: the slope on the logarithm of
    each cost, over the runs of a base model as configured.

    Over all runs (clustered by method, since runs of a method cost and do alike), and within
    methods (clustered by setting): with few clusters the interval is wide, and holds as far as they
    are like others (cluster-robust CR2 with its own degrees of freedom, see `slope`). Null where
    the costs are all alike. Descriptive: methods differ in more than in cost.
    """
    frame = arms[arms["arm"].isin([TRAINED, NO_OP])].merge(runs[["run_id", *COSTS]], on="run_id")
    frame, rows = frame[has_score(change, frame["run_id"])], []
    for base_model, own in frame.groupby("base_model", sort=False):
        for column, name in COSTS.items():
            known = own[own[column].gt(0).fillna(False).to_numpy(bool)]
            y, x = change.value[change.at(known["run_id"])], np.log10(known[column].to_numpy(float))
            method, setting = (
                pd.factorize(key)[0]
                for key in (known["method"], known["method"] + known["setting"])
            )
            for contrast, group, cluster, what in (
                (SLOPE, np.zeros_like(method), method, "methods"),
                (SLOPE_WITHIN, method, setting, "settings"),
            ):
                rows.append(
                    {
                        "base_model": base_model,
                        "contrast": contrast,
                        "against": name,
                        "n_runs": len(known),
                        **slope(x, y, group, cluster, what),
                    }
                )
    return (
        complete(
            pd.DataFrame(rows).assign(
                **labels,
                method="all",
                group=terms.AS_CONFIGURED,
                population="runs and methods like these, these prompts",
            )
        )
        if rows
        else complete(pd.DataFrame())
    )


def slope(
    x: np.ndarray, y: np.ndarray, group: np.ndarray, cluster: np.ndarray, what: str = "clusters"
) -> dict:
    """value, se, ci_low, ci_high, p and how: the slope of y on x (a decimal logarithm) within
    groups, by least squares, with errors robust to clusters.

    CR2 with Satterthwaite's degrees of freedom under independent errors (Bell & McCaffrey 2002,
    Survey Methodology 28, 169; Imbens & Kolesar 2016, Review of Economics and Statistics 98, 701),
    made for few clusters. Null where x hardly differs within groups or there are fewer than three
    clusters.
    """
    n_clusters, rest = len(np.unique(cluster)), _within(x[:, None], group)[:, 0]
    span = 10 ** np.ptp(rest) if len(x) else 1.0
    if span < LEAST_SPAN:
        where = " within methods" if group.any() else ""
        how = f"the costs{where} differ by a factor of {span:.2g} at most: too little for a slope"
        return {"value": None, "how": how}
    if n_clusters < 3:
        return {"value": None, "how": f"{n_clusters} {what}: a slope needs three"}
    design = np.column_stack([x, np.eye(group.max() + 1)[group]])
    inverse = np.linalg.pinv(design.T @ design)
    maker = np.eye(len(x)) - design @ inverse @ design.T
    value, error = inverse[0] @ design.T @ y, maker @ y
    parts = [cluster == name for name in np.unique(cluster)]
    roots = [_inverse_root(maker[np.ix_(own, own)]) for own in parts]
    # [runs, clusters]: how much y moves each cluster's part of the slope
    moved = [
        maker[:, own] @ root @ design[own] @ inverse[0]
        for own, root in zip(parts, roots, strict=True)
    ]
    moved = np.stack(moved, 1)
    variance, weights = ((moved.T @ error) ** 2).sum(), np.linalg.eigvalsh(moved.T @ moved)
    df = weights.sum() ** 2 / (weights**2).sum()
    how = (
        f"least squares over costs that differ by a factor of {span:.2g}, errors clustered by"
        f" {n_clusters} {what}, CR2, {df:.1f} degrees of freedom"
    )
    how += "; few clusters, so a wide interval" if df < 5 else ""
    if variance <= 0:
        return {"value": value, "how": "the changes lie on a line: no interval"}
    se = np.sqrt(variance)
    return {
        "value": value,
        "se": se,
        "ci_low": value - stdtrit(df, UPPER) * se,
        "ci_high": value + stdtrit(df, UPPER) * se,
        "p": 2 * stdtr(df, -abs(value) / se),
        "how": how,
    }


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric inverse square root, of what has one: directions that the fit leaves no error
    in stay out.
    """
    values, vectors = np.linalg.eigh(matrix)
    return (
        vectors * np.where(values > 1e-10, 1 / np.sqrt(np.maximum(values, 1e-10)), 0.0) @ vectors.T
    )
