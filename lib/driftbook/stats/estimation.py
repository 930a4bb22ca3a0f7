"""Numbers with their intervals: changes of each run against its own base model on the same prompts,
means over runs, mixed models.

Every estimate says over what its interval generalises. A score is kept with its influence, how much
each unit (a prompt, a question family) moves it, so that changes, means over runs and contrasts all
get their variance from the same few lines.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from driftbook.stats.confidence import UPPER
from driftbook.stats.influence import CELL, Scores, extremes, paired, shares
from driftbook.stats.intervals import (
    Repetitions,
    _inside,
    _interval,
    _over_runs,
    _rate,
    _spread,
    _t_interval,
    _within,
    wilson,
)
from driftbook.stats.terms import (
    ALL,
    BOTH,
    CATEGORY,
    CHANGE,
    CHANGE_HERE,
    FAMILY_UNITS,
    HERE,
    HIGHEST,
    LEVEL,
    LOWEST,
    NO_OP,
    NONE,
    ONE_RUN,
    PRIMARY,
    RUN,
    SETTINGS,
    THESE_PROMPTS,
    THESE_RUNS,
    TRAINED,
    TWO_WAY,
    UNITS,
)
from driftbook.study.methods import METHODS
from driftbook.study.tables import ESTIMATES


# ---- means over runs
def means(scores: Scores, cells: pd.DataFrame, contrast: str, **labels: str) -> pd.DataFrame:
    """An estimate per cell: the mean over its runs, its interval over runs and units, and the
    narrower one over runs alone.

    The rows have the columns of `estimates`; `labels` gives study, notebook, outcome, benchmark,
    judge.
    """
    rows = []
    frame = cells.assign(position=scores.at(cells["run_id"]), place=pd.factorize(cells["pool"])[0])
    frame["cell"] = pd.factorize(frame["setting"] + " of " + frame["pool"])[0]
    for key, cell in frame.groupby(CELL, sort=False):
        at, *weights = (cell[name].to_numpy() for name in ("position", "weight", "cell", "place"))
        if (at < 0).all():
            continue  # not asked
        found = (
            estimate(scores, at, *weights)
            if (at >= 0).all()
            else dict.fromkeys(("both", "here"), incomplete(at))
        )
        names = dict(zip(CELL, key, strict=True))
        rows.append({**labels, **names, "contrast": contrast, **found["both"]})
        if contrast == CHANGE and names["group"] not in (RUN, CATEGORY):
            rows.append({**labels, **names, "contrast": CHANGE_HERE, **found["here"]})
    return complete(pd.DataFrame(rows))


def incomplete(positions: np.ndarray) -> dict[str, float | str | None]:
    """No estimate, for a cell or contrast of which only some runs have a score: the mean of those
    would be another cell's.
    """
    how = f"{(positions < 0).sum()} of {len(positions)} runs have no answers here: no estimate"
    return {"value": None, "n_runs": int((positions >= 0).sum()), "population": BOTH, "how": how}


def bounds(scores: tuple[Scores, Scores], cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The means of the lowest and highest changes, for the cells that have unscored prompts;
    without intervals.
    """
    frame = cells[cells["group"].ne(RUN)].assign(position=lambda rows: scores[0].at(rows["run_id"]))
    frame = frame[frame["position"].ge(0)]
    at, parts = frame["position"].to_numpy(), []
    for one, contrast in zip(scores, (LOWEST, HIGHEST), strict=True):
        every = frame.assign(
            value=frame["weight"] * one.value[at],
            n_unscored=one.n_unscored[at],
            n_items=one.n_items[at],
            n_runs=1,
        )
        found = every.groupby(CELL, sort=False).agg(
            value=("value", "sum"),
            n_runs=("n_runs", "sum"),
            n_items=("n_items", "max"),
            n_unscored=("n_unscored", "sum"),
        )
        parts.append(found.reset_index().assign(contrast=contrast))
    rows = (
        pd.concat(parts, ignore_index=True)
        .query("n_unscored > 0")
        .assign(**labels, population="these runs, these prompts")
    )
    return complete(rows.assign(how="unscored at the extreme; all prompts asked as denominator"))


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column of `estimates`: where not given, a row is of all members and
    categories, against none, by the primary estimator, and other columns are null.
    """
    if not len(rows):
        return ESTIMATES.empty()
    usual = {"member": ALL, "category": ALL, "against": NONE, "estimator": PRIMARY}
    rows = rows.assign(**{name: word for name, word in usual.items() if name not in rows})
    rows = rows.fillna(usual).reindex(columns=list(ESTIMATES.columns))
    return ESTIMATES.check(rows.replace([np.inf, -np.inf], np.nan))


def estimate(
    scores: Scores, runs: np.ndarray, weight: np.ndarray, setting: np.ndarray, pool: np.ndarray
) -> dict[str, dict]:
    """A mean or a contrast of runs, the sum of weight * score, with its interval over runs and
    units (both) and the one over runs alone (here).

    `runs` are positions in `scores`; `setting` says which runs are repetitions of each other,
    `pool` in which the spread of repetitions is taken to be the same (a method on one base model).
    Two sources of error are estimated apart and joined by MOVER (Zou and Donner 2008, Statistics in
    Medicine 27, 1693): the interval's ends lie at the roots of the sums of squares of the two
    sources' own distances.

    Units: families within strata, CR2 (Bell and McCaffrey 2002, Survey Methodology 28, 169) with
    their degrees of freedom; see Clusters. Runs: what their spread holds beyond the noise of run x
    unit, which the units' variance has already; see _repetitions and _over_runs. Nothing is
    subtracted but inside the runs' part, so that no variance is negative; the units' is at least
    the noise, so that the interval over runs alone (the runs' part and the noise) lies within the
    other.
    """
    values, units = scores.value[runs], FAMILY_UNITS if scores.family is not None else UNITS
    common = {
        "n_runs": len(runs),
        "n_items": int(scores.n_items[runs].max()),
        "n_unscored": int(scores.n_unscored[runs].sum()),
    }
    if np.isnan(
        values
    ).any():  # a run without a single scored item: the mean of the others would be another cell's
        nothing = {
            **common,
            "value": None,
            "population": BOTH,
            "how": "a run has no scored item: no estimate",
        }
        return {"both": nothing, "here": nothing}
    value, clusters = weight @ values, scores.clusters
    spread = _repetitions(scores, runs, weight, setting, pool)
    t, noise, beyond = (
        stdtrit(clusters.df, UPPER),
        spread.noise.sum(),
        np.maximum(spread.variance - spread.noise, 0.0).sum(),
    )
    by_unit = np.fmax(clusters.variance(weight @ scores.influence[runs])[0], noise)
    low, high = _over_runs(scores, runs, weight, spread)
    both, here = (
        _interval(value, beyond + part, np.hypot(low, t * part**0.5), np.hypot(high, t * part**0.5))
        for part in (by_unit, noise)
    )
    population, how = BOTH, TWO_WAY.format(units)
    if np.isnan(spread.df):
        both, population, how = (
            _interval(value, by_unit, t * by_unit**0.5, t * by_unit**0.5),
            THESE_RUNS,
            ONE_RUN.format(units),
        )
    elif clusters.n < 2:
        both, population, how = here, THESE_PROMPTS, f"{HERE}; one unit says nothing of others"
    elif beyond == noise == 0:
        how += "; the runs are equal in every unit"
    if scores.single and not scores.influence[runs].any() and not np.ptp(values):
        half = 100 * (
            1 - (1 - UPPER) ** (1 / clusters.n)
        )  # not one unit moved: Clopper and Pearson's bound on the share that would
        both = {"se": None, "ci_low": value - half, "ci_high": value + half, "p": None}
        how = "no unit differs from another; exact bound on the share of units that would"
    elif n := _at_an_end(scores, runs):
        how += f"; {n} of {len(runs)} runs at 0 or 100 %, where their spread cannot be seen"
    if scores.family is not None:
        population = population.replace("prompts like these", "families of prompts like these")
    both, here = _inside(both, scores.limits), _inside(here, scores.limits)
    return {
        "both": {**common, "value": value, **both, "population": population, "how": how},
        "here": {**common, "value": value, **here, "population": THESE_PROMPTS, "how": HERE},
    }


def _at_an_end(scores: Scores, runs: np.ndarray) -> int:
    """How many runs have a rate of 0 or 100 percent."""
    rate = _rate(scores)
    return 0 if rate is None else int(np.isin(rate[runs], (0.0, 100.0)).sum())


def _repetitions(
    scores: Scores, runs: np.ndarray, weight: np.ndarray, setting: np.ndarray, pool: np.ndarray
) -> Repetitions:
    """The spread of repetitions, and how much of it comes from units that a run answers differently
    by chance.

    Settings of one method differ in spread as much as methods do, so each has its own; the degrees
    of freedom (Welch, Satterthwaite) pay for that. A setting with one run has the spread of its
    pool. In a contrast the df are at most those of the side that has fewer.
    """
    pools, settings = (
        np.unique(pool, return_inverse=True)[1],
        np.unique(setting, return_inverse=True)[1],
    )
    influence = scores.influence[runs]
    rest = (
        influence
        - np.stack([influence[settings == one].mean(0) for one in range(settings.max() + 1)])[
            settings
        ]
    )
    square, df = _within(scores.value[runs], settings, pools)
    noise, _ = _spread(scores.clusters.variance(rest), settings, pools)
    total = np.bincount(settings, weight**2)
    variance = total * square
    with np.errstate(invalid="ignore", divide="ignore"):
        welch = variance.sum() ** 2 / (variance**2 / df).sum() if variance.sum() > 0 else np.inf
    alone = np.bincount(settings) - 1
    sides = [
        alone[np.unique(settings[side])].sum() for side in (weight > 0, weight < 0) if side.any()
    ]
    return Repetitions(
        settings,
        pools,
        variance,
        total * noise,
        noise,
        min(welch, *sides) if not np.isnan(variance).any() else np.nan,
    )


def of_rate(
    values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str
) -> pd.DataFrame:
    """Every estimate of one rate (runs x (category, prompt)): the bases' own levels, levels and
    changes of cells, bounds; then by category."""
    parts = [
        levels(values, arms, **labels),
        of_scores(shares(values), paired(values, arms), cells, **labels),
    ]
    parts.append(bounds(extremes(values, arms), cells, **labels))
    for category, part in values.T.groupby(level=0, sort=False):
        own = {**labels, "category": category}
        change = of_scores(shares(part.T), paired(part.T, arms), within(cells), **own)
        parts += [levels(part.T, arms, CATEGORY, **own), change]
    return ESTIMATES.concat(parts)


def of_scores(level: Scores, change: Scores, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The mean changes of all cells and the mean levels of those that are no single settings or
    runs.
    """
    broad = cells[~cells["group"].isin([RUN, SETTINGS])]
    return ESTIMATES.concat(
        [means(change, cells, CHANGE, **labels), means(level, broad, LEVEL, **labels)]
    )


def run_changes(estimates: pd.DataFrame, outcomes: dict[str, str]) -> pd.DataFrame:
    """Runs x outcomes: the change of each single run, for the outcomes that have one; `outcomes`
    gives the benchmark of each.
    """
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].eq(RUN)]
    rows = rows[rows["benchmark"].eq(rows["outcome"].map(outcomes))]
    rows = rows.drop_duplicates(["outcome", "member"]).rename(columns={"member": "run_id"})
    table = rows.pivot(index="run_id", columns="outcome", values="value").astype(float)
    return table[
        [outcome for outcome in outcomes if outcome in table and table[outcome].notna().any()]
    ]


def within(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of trained runs, for estimates within a category or dimension."""
    return cells[cells["group"].eq(TRAINED)].assign(group=CATEGORY)


def levels(
    values: pd.DataFrame, arms: pd.DataFrame, group: str = ALL, **labels: str
) -> pd.DataFrame:
    """The base models' own rates in percent with Wilson intervals; null where nothing was scored."""
    base = arms[arms["arm"].eq("base") & arms["run_id"].isin(values.index)]
    values = values.loc[base["run_id"]]
    n, k = values.notna().sum(axis=1).to_numpy(), values.sum(axis=1).to_numpy()
    low, high = wilson(k, n)
    with np.errstate(invalid="ignore"):
        frame = pd.DataFrame(
            {
                "base_model": base["base_model"].to_numpy(),
                "value": 100 * k / np.where(n > 0, n, np.nan),
                "ci_low": 100 * low,
            }
        )
    return complete(
        frame.assign(
            **labels,
            method="none",
            group=group,
            contrast=LEVEL,
            ci_high=100 * high,
            population=THESE_RUNS,
            n_runs=1,
            n_items=values.shape[1],
            n_unscored=values.shape[1] - n,
            how="share of scored prompts, Wilson interval",
        )
    )


def levels_of_scores(scores: Scores, arms: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The base models' own scores, with t intervals over units."""
    base = arms[arms["arm"].eq("base") & arms["run_id"].isin(scores.runs)]
    at, units = scores.at(base["run_id"]), scores.influence.shape[1]
    variance = (scores.influence[at] ** 2).sum(1) * units / max(units - 1, 1)
    found = [
        _inside(_t_interval(value, spread, units - 1), scores.limits)
        for value, spread in zip(scores.value[at], variance, strict=True)
    ]
    frame = (
        pd.DataFrame(found)
        .drop(columns="p")
        .assign(base_model=base["base_model"].to_numpy(), value=scores.value[at])
    )
    counts = {"n_items": scores.n_items[at], "n_unscored": scores.n_unscored[at]}
    return complete(
        frame.assign(
            **labels,
            **counts,
            method="none",
            group="all",
            contrast=LEVEL,
            population=THESE_RUNS,
            n_runs=1,
            how="t interval over units",
        )
    )


# ---- estimates as files
def write_estimates(frame: pd.DataFrame, tables_folder: Path, notebook: str) -> Path:
    """Write one notebook's part of the table `estimates`: tables/estimates/NOTEBOOK.parquet."""
    return ESTIMATES.write(frame, tables_folder / "estimates" / f"{notebook}.parquet")


def read_estimates(tables_folder: Path) -> pd.DataFrame:
    """All parts of the table `estimates`, one below the other; empty where no notebook has written
    one.
    """
    return ESTIMATES.concat(
        [ESTIMATES.read(path) for path in sorted((tables_folder / "estimates").glob("*.parquet"))]
    )


# ---- mixed models
def differences(rates: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """Run x category differences to the run's own base model in percentage points, with the run's
    settings; trained runs and no-ops only.

    log10_rate is the learning rate's logarithm centred within method, so that 0 means the method's
    own middle.
    """
    scored = rates["n_scored"].astype(float)
    share = rates.assign(share=100 * rates["k"].astype(float) / scored.where(scored > 0))[
        ["run_id", "category", "share", "n_scored", "n"]
    ]
    runs = arms[arms["arm"].isin([TRAINED, NO_OP])]
    base = share.rename(columns={"run_id": "base_run_id", "share": "base_share"})[
        ["base_run_id", "category", "base_share"]
    ]
    frame = runs.merge(share, on="run_id").merge(base, on=["base_run_id", "category"])
    frame["difference"] = frame["share"] - frame["base_share"]
    rate = pd.Series(np.log10(runs["learning_rate"].to_numpy(float)), index=runs["run_id"])
    centre = rate.groupby(runs["method"].to_numpy()).mean()
    frame["log10_rate"] = frame["run_id"].map(rate).astype(float) - frame["method"].map(
        centre
    ).astype(float)
    for name, order in (("method", METHODS), ("base_model", arms["base_model"].unique())):
        frame[name] = pd.Categorical(
            frame[name], [level for level in order if level in set(frame[name])]
        )
    settings = [
        "run_id",
        "base_model",
        "method",
        "objective",
        "dataset",
        "epochs",
        "repetition",
        "setting",
        "arm",
        "log10_rate",
    ]
    text = {
        name: frame[name].astype("string").fillna("none").astype(object)
        for name in ("dataset", "epochs", "repetition")
    }
    return frame.assign(**text)[[*settings, "category", "difference", "n_scored", "n"]]
