"""Numbers with their intervals: changes of each run against its own base model on the same prompts,
and means over runs.

Every estimate says over what its interval generalises. A score is kept with its influence, how much
each unit (a prompt, a question family) moves it, so that changes, means over runs and contrasts all
get their variance from the same few lines.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from driftbook.stats import intervals, terms
from driftbook.stats.confidence import UPPER
from driftbook.stats.influence import CELL, Scores, extremes, paired, shares
from driftbook.stats.intervals import Repetitions
from driftbook.stats.terms import ALL, BOTH, CATEGORY, CHANGE, LEVEL, RUN, THESE_PROMPTS, TRAINED
from driftbook.study.methods import METHODS
from driftbook.study.tables import ESTIMATES


# ---- one mean or contrast
def estimate(
    scores: Scores,
    runs: np.ndarray,
    weight: np.ndarray,
    setting: np.ndarray,
    pool: np.ndarray,
    cluster: np.ndarray | None = None,
) -> dict[str, dict]:
    """A mean or a contrast of runs, the sum of weight * score, with its interval over runs and
    units (both) and the one over runs alone (here).

    `runs` are positions in `scores`; `setting` says which runs are repetitions of each other,
    `pool` in which the spread of repetitions is taken to be the same (a method on one base model),
    `cluster` which share a seed and err together (influence.seed_clusters; each alone where not
    given). Two sources of error are estimated apart and joined by MOVER (Zou and Donner 2008,
    Statistics in Medicine 27, 1693): the interval's ends lie at the roots of the sums of squares of
    the two sources' own distances.

    Units: families within strata, CR2 (Bell and McCaffrey 2002, Survey Methodology 28, 169) with
    their degrees of freedom, see Clusters; of shares with ends that hold near 0 and 100 %, see
    intervals.over_units. Runs: what their spread holds beyond the noise of run x
    unit, which the units' variance has already; see intervals.repetitions and over_runs. Nothing is
    subtracted but inside the runs' part, so that no variance is negative; the units' is at least
    the noise, so that the interval over runs alone (the runs' part and the noise) lies within the
    other.
    """
    values, items = scores.value[runs], int(scores.n_items[runs].max())
    common = {"n_runs": len(runs), "n_items": items}
    common["n_unscored"] = int(scores.n_unscored[runs].sum())
    if np.isnan(values).any():  # the mean of the others would be another cell's
        how = "a run has no scored item: no estimate"
        nothing = {**common, "value": None, "population": BOTH, "how": how}
        return {"both": nothing, "here": nothing}
    value = weight @ values
    spread = intervals.repetitions(scores, runs, weight, setting, pool, cluster)
    both, here, population, how = _two_ways(scores, runs, weight, spread, value)
    if population == BOTH and (alike := _alike(scores, runs, weight, spread.setting)).any():
        n = len(runs[alike] if cluster is None else np.unique(cluster[alike]))
        population, how = terms.THESE_RUNS, f"{how}; {_unseen(n)}"
        here = dict(intervals.NO_INTERVAL)
    if scores.family is not None:
        population = population.replace("prompts like these", "families of prompts like these")
    both, here = (intervals.inside(one, scores.limits) for one in (both, here))
    common["value"] = value
    return {
        "both": {**common, **both, "population": population, "how": how},
        "here": {**common, **here, "population": THESE_PROMPTS, "how": terms.HERE},
    }


def _two_ways(
    scores: Scores, runs: np.ndarray, weight: np.ndarray, spread: Repetitions, value: float
) -> tuple[dict, dict, str, str]:
    """The intervals over runs and units and over runs alone, the former's population and `how`."""
    clusters = scores.clusters
    units = terms.UNITS if scores.family is None else terms.FAMILY_UNITS
    own, by_chance = spread.variance * spread.shared, spread.noise * spread.shared_noise
    noise, beyond = by_chance.sum(), max((own - by_chance).sum(), 0.0)
    by_unit = float(np.fmax(clusters.variance(weight @ scores.influence[runs])[0], noise))
    of_units = intervals.over_units(scores, runs, weight, by_unit)
    of_runs, half = (
        intervals.over_runs(scores, runs, weight, spread),
        stdtrit(clusters.df, UPPER) * noise**0.5,
    )
    here = intervals.interval(value, beyond + noise, *(np.hypot(end, half) for end in of_runs))
    ends = (np.hypot(*pair) for pair in zip(of_runs, of_units, strict=True))
    both, population, how = (
        intervals.interval(value, beyond + by_unit, *ends),
        BOTH,
        terms.TWO_WAY.format(units),
    )
    if np.isnan(spread.df):
        population, how = terms.THESE_RUNS, terms.ONE_RUN.format(units)
        both = intervals.interval(value, by_unit, *of_units)
    elif clusters.n < 2:
        both, population = here, THESE_PROMPTS
        how = f"{terms.HERE}; one unit says nothing of others"
    elif beyond == noise == 0:
        how += "; the runs are equal in every unit"
    if scores.counted is not None and by_unit == 0 and not beyond > 0 and clusters.n > 1:
        low, high = of_units  # not one unit moved: the share that would has an exact bound
        both = intervals.NO_INTERVAL | {"ci_low": value - low, "ci_high": value + high}
        how = "no unit differs from another; exact bound on the share of units that would"
    elif n := _at_an_end(scores, runs, spread.setting, 0).sum():
        how += f"; {n} of {len(runs)} runs at 0 or 100 %, where their spread cannot be seen"
    return both, here, population, how


def _at_an_end(scores: Scores, runs: np.ndarray, setting: np.ndarray, most: int) -> np.ndarray:
    """Which runs have a rate of 0 or 100 percent, or one that `most` answers keep from it."""
    rate = intervals.rate_of(scores, runs, setting)
    if rate is None:
        return np.zeros(len(runs), bool)
    scored = scores.n_items[runs] - scores.n_unscored[runs]
    return np.minimum(rate, 100.0 - rate) * scored <= 100 * most + 1e-6


def _alike(scores: Scores, runs: np.ndarray, weight: np.ndarray, setting: np.ndarray) -> np.ndarray:
    """Which runs are on a side of the contrast (or of the mean) on which all runs lie at 0 or 100
    percent, or one answer from it. Such runs look alike however much others may differ: where runs
    have a mean of 5 % and an SD of 14 points, three in a row do so in 29 of 100 sets.
    """
    ends, found = _at_an_end(scores, runs, setting, 1), np.zeros(len(runs), bool)
    for side in (weight > 0, weight < 0):
        found |= side & (side.any() and ends[side].all())
    return found


def _unseen(n: int) -> str:
    """How many other runs may be unlike n runs that are alike: the exact (Clopper and Pearson's)
    upper end of a share of which none was seen."""
    share = 100 * (1 - (1 - UPPER) ** (1 / n))
    return (
        "on a side no run is more than one answer from 0 or 100 %, so nothing is known of other"
        " seeds there:"
        f" up to {share:.0f} % of them may be elsewhere"
    )


def incomplete(positions: np.ndarray) -> dict[str, float | str | None]:
    """No estimate, for a cell or contrast of which only some runs have a score: the mean of those
    would be another cell's.
    """
    how = f"{(positions < 0).sum()} of {len(positions)} runs have no answers here: no estimate"
    return {"value": None, "n_runs": int((positions >= 0).sum()), "population": BOTH, "how": how}


# ---- many of them
def means(scores: Scores, cells: pd.DataFrame, contrast: str, **labels: str) -> pd.DataFrame:
    """An estimate per cell: the mean over its runs, its interval over runs and units, and the
    narrower one over runs alone.

    The rows have the columns of `estimates`; `labels` gives study, notebook, outcome, benchmark,
    judge.
    """
    rows = []
    frame = cells.assign(position=scores.at(cells["run_id"]), place=pd.factorize(cells["pool"])[0])
    frame["cell"] = pd.factorize(frame["setting"] + " of " + frame["pool"])[0]
    frame["together"] = pd.factorize(frame["cluster"])[0]
    for key, cell in frame.groupby(CELL, sort=False):
        at, *weights = (
            cell[name].to_numpy() for name in ("position", "weight", "cell", "place", "together")
        )
        if (at < 0).all():
            continue  # not asked
        some = None if (at >= 0).all() else incomplete(at)
        found = {"both": some, "here": some} if some else estimate(scores, at, *weights)
        names = {**labels, **dict(zip(CELL, key, strict=True))}
        rows.append({**names, "contrast": contrast, **found["both"]})
        if contrast == CHANGE and names["group"] not in (RUN, CATEGORY):
            rows.append({**names, "contrast": terms.CHANGE_HERE, **found["here"]})
    return complete(pd.DataFrame(rows))


def bounds(scores: tuple[Scores, Scores], cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The means of the lowest and highest changes, for the cells that have unscored prompts;
    without intervals.
    """
    frame = cells[cells["group"].ne(RUN)].assign(position=lambda rows: scores[0].at(rows["run_id"]))
    frame = frame[frame["position"].ge(0)].assign(n_runs=1)
    at, parts = frame["position"].to_numpy(), []
    how = {"value": "sum", "n_runs": "sum", "n_items": "max", "n_unscored": "sum"}
    for one, contrast in zip(scores, (terms.LOWEST, terms.HIGHEST), strict=True):
        counts = {"n_unscored": one.n_unscored[at], "n_items": one.n_items[at]}
        every = frame.assign(value=frame["weight"] * one.value[at], **counts)
        found = every.groupby(CELL, sort=False).agg(how).reset_index()
        parts.append(found.assign(contrast=contrast))
    rows = pd.concat(parts, ignore_index=True).query("n_unscored > 0")
    how = "unscored at the extreme; all prompts asked as denominator"
    return complete(rows.assign(**labels, population="these runs, these prompts", how=how))


def of_rate(
    values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """All estimates for one rate (runs x (category, prompt)): levels of the base models, levels and
    changes of cells, bounds; then by category.
    """
    parts = [
        levels(values, arms, **labels),
        of_scores(shares(values), paired(values, arms), cells, **labels),
        bounds(extremes(values, arms), cells, **labels),
    ]
    for category, part in values.T.groupby(level=0, sort=False):
        own = {**labels, "category": category}
        change = of_scores(shares(part.T), paired(part.T, arms), within(cells), **own)
        parts += [levels(part.T, arms, CATEGORY, **own), change]
    return ESTIMATES.concat(parts)


def of_scores(level: Scores, change: Scores, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The mean changes of all cells, and the mean levels of all but single settings and runs."""
    broad = cells[~cells["group"].isin([RUN, terms.SETTINGS])]
    return ESTIMATES.concat(
        [means(change, cells, CHANGE, **labels), means(level, broad, LEVEL, **labels)]
    )


def within(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of trained runs, for estimates within a category or dimension."""
    return cells[cells["group"].eq(TRAINED)].assign(group=CATEGORY)


def levels(
    values: pd.DataFrame, arms: pd.DataFrame, group: str = ALL, **labels: str
) -> pd.DataFrame:
    """The base models' rates in percent; null where nothing was scored."""
    return levels_of_scores(shares(values), arms, group, **labels)


def levels_of_scores(
    scores: Scores, arms: pd.DataFrame, group: str = ALL, **labels: str
) -> pd.DataFrame:
    """The base models' own scores, each from one run's answers, with intervals over units."""
    base = arms[arms["arm"].eq("base") & arms["run_id"].isin(scores.runs)]
    weight, none = np.ones(1), np.zeros(1, int)
    found = pd.DataFrame(
        [
            estimate(scores, np.array([at]), weight, none, none)["both"]
            for at in scores.at(base["run_id"])
        ],
        columns=["value", "se", "ci_low", "ci_high", "n_items", "n_unscored"],
    )
    units = terms.UNITS if scores.family is None else terms.FAMILY_UNITS
    return of_bases(found.assign(group=group, how=f"interval over {units}"), base, **labels)


def of_bases(found: pd.DataFrame, base: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Levels found for the base models themselves (rows of arms), as estimates."""
    names = {"base_model": base["base_model"].to_numpy(), "method": "none", "contrast": LEVEL}
    return complete(found.assign(**labels, **names, population=terms.THESE_RUNS, n_runs=1))


# ---- as a table
def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column of `estimates`: where not given, a row is of all members and
    categories, against none, by the primary estimator, and other columns are null.
    """
    if not len(rows):
        return ESTIMATES.empty()
    usual = {"member": ALL, "category": ALL, "against": terms.NONE, "estimator": terms.PRIMARY}
    rows = rows.assign(**{name: word for name, word in usual.items() if name not in rows})
    rows = rows.fillna(usual).reindex(columns=list(ESTIMATES.columns))
    return ESTIMATES.check(rows.replace([np.inf, -np.inf], np.nan))


def write_estimates(frame: pd.DataFrame, tables_folder: Path, notebook: str) -> Path:
    """Write one notebook's part of the table `estimates`: tables/estimates/NOTEBOOK.parquet."""
    return ESTIMATES.write(frame, tables_folder / "estimates" / f"{notebook}.parquet")


def read_estimates(tables_folder: Path) -> pd.DataFrame:
    """All parts of the table `estimates`; empty where no notebook has written one."""
    parts = sorted((tables_folder / "estimates").glob("*.parquet"))
    return ESTIMATES.concat([ESTIMATES.read(path) for path in parts])


def run_changes(estimates: pd.DataFrame, outcomes: dict[str, str]) -> pd.DataFrame:
    """Runs x outcomes: the change of each single run, for the outcomes that have one; `outcomes`
    gives the benchmark of each.
    """
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].eq(RUN)]
    rows = rows[rows["estimator"].eq(terms.PRIMARY)]
    rows = rows[rows["benchmark"].eq(rows["outcome"].map(outcomes))]
    rows = rows.drop_duplicates(["outcome", "member"]).rename(columns={"member": "run_id"})
    table = rows.pivot(index="run_id", columns="outcome", values="value").astype(float)
    return table[[name for name in outcomes if name in table and table[name].notna().any()]]


# ---- for mixed models
_SETTING_COLUMNS = [
    "run_id",
    "base_model",
    "method",
    "objective",
    "dataset",
    "epochs",
    "repetition",
]


def differences(rates: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """Run x category differences to the run's own base model in percentage points, with the run's
    settings; trained runs and no-ops only.

    log10_rate is the learning rate's logarithm centred within method, so that 0 means the method's
    own middle.
    """
    scored = rates["n_scored"].astype(float)
    share = rates[["run_id", "category", "n_scored", "n"]].assign(
        share=100 * rates["k"].astype(float) / scored.where(scored > 0)
    )
    runs = arms[arms["arm"].isin([TRAINED, terms.NO_OP])]
    rate = np.log10(runs["learning_rate"].astype(float))
    runs = runs.assign(log10_rate=rate - rate.groupby(runs["method"]).transform("mean"))
    base = share.rename(columns={"run_id": "base_run_id", "share": "base_share"})
    base = base[["base_run_id", "category", "base_share"]]
    frame = runs.merge(share, on="run_id").merge(base, on=["base_run_id", "category"])
    frame["difference"] = frame["share"] - frame["base_share"]
    for name, order in (("method", METHODS), ("base_model", arms["base_model"].unique())):
        levels = [level for level in order if level in set(frame[name])]
        frame[name] = pd.Categorical(frame[name], levels)
    for name in ("dataset", "epochs", "repetition"):
        frame[name] = frame[name].astype("string").fillna("none").astype(object)
    more = ["setting", "arm", "log10_rate", "category", "difference", "n_scored", "n"]
    return frame[[*_SETTING_COLUMNS, *more]]
