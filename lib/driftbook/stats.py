"""Numbers with their intervals: changes of each run against its own base model on the same prompts, means over runs, mixed models.

Every estimate says over what its interval generalises. A score is kept with its influence, how much each unit (a prompt, a question
family) moves it, so that changes, means over runs and contrasts all get their variance from the same few lines.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import chdtri, ndtr, ndtri, stdtr, stdtridf, stdtrit

from driftbook.mixed import item_model as item_model  # entry points of the library, beside the estimates made from them
from driftbook.mixed import rate_model as rate_model
from driftbook.study import METHODS
from driftbook.tables import ESTIMATES

UNSAFE, REFUSED = "unsafe-response rate (percent)", "refusal rate (percent)"
ACCURACY_AMB, ACCURACY_DIS = "accuracy, ambiguous (percent)", "accuracy, disambiguated (percent)"
BIAS_AMB, BIAS_DIS = "bias score, ambiguous (-100 to 100)", "bias score, disambiguated (-100 to 100)"
FLIPS = "BBQ answers that change with the order of the options (percent)"
LOSS, CORRECT = "utility: loss (nats per token)", "utility: correct answers (percent)"
FRONT = "on the Pareto front (percent): fewer unsafe responses, fewer refusals of benign prompts, more accuracy in ambiguous contexts, less utility loss"
LEVEL, CHANGE, CHANGE_HERE = "level", "change against the base model", "change against the base model, these prompts"
LOWEST, HIGHEST = "change if the unscored were as low as can be", "change if the unscored were as high as can be"
TRAINED, AS_CONFIGURED, NO_OP, UNTRAINED = "trained", "as configured", "no-op", "untrained"
BOTH = "seeds like these, prompts like these, these base models"
THESE_PROMPTS = "seeds like these, these prompts, these base models"
THESE_RUNS = "these runs, prompts like these, these base models"
TWO_WAY = "mean over runs; two ways: runs within settings (generalised pivot) and {}, joined by MOVER"
ONE_RUN = "mean over runs; no setting was run twice, so nothing is known of other seeds; t interval over {}"
HERE = "mean over runs; spread of runs within settings"
UNITS, FAMILY_UNITS = "units (CR2)", "families of prompts (CR2)"
TAIL = 0.975  # of the 95 % intervals


# ---- one number
def wilson(k, n, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of Wilson's interval of k in n, as shares; NaN where n is 0."""
    k, n = np.asarray(k, float), np.where(np.asarray(n, float) > 0, n, np.nan).astype(float)
    z = ndtri(0.5 + level / 2)
    centre, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    return np.where(k == 0, 0.0 * n, centre - half), np.where(k == n, n / n, centre + half)


# ---- who is compared with whom
def arms(variants: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """`variants` that ran, with what each one is compared as (arm) and its base model's run (base_run_id).

    arm: base, trained, no-op, untrained, or init and mitigation by name. A method's own init is the one most of its runs have. A base model's
    further repetitions are left out: their greedy answers are those of the first, and they differ in drawn ones alone.
    """
    frame = variants.merge(runs[["run_id", "status", "no_op"]], on="run_id", validate="1:1")
    frame = frame[frame["status"].eq("ok") & ~(frame["method"].eq("none") & frame["repetition"].gt(1))].reset_index(drop=True)
    usual = frame.groupby("method")["init"].agg(lambda init: init.value_counts().index[0] if init.notna().any() else None)
    other = frame["init"].notna() & frame["init"].ne(frame["method"].map(usual))
    frame["arm"] = np.select(
        [frame["method"].eq("none"), frame["objective"].eq("untrained"), frame["no_op"].fillna(False)], ["base", UNTRAINED, NO_OP], TRAINED
    )
    frame["arm"] = frame["arm"].mask(other, "init: " + frame["init"].fillna("") + ", " + frame["objective"])
    frame["arm"] = frame["arm"].mask(frame["mitigation"].notna(), "mitigation: " + frame["mitigation"].fillna(""))
    rates = frame["learning_rate"].map(lambda rate: "" if pd.isna(rate) else f" at {rate:.0e}".replace("e-0", "e-"))
    several = frame.groupby("objective")["dataset"].transform("nunique").gt(1)
    frame["setting"] = frame["objective"] + (" on " + frame["dataset"].fillna("")).where(several, "") + rates + frame["epochs"].map(lambda epochs: "" if pd.isna(epochs) else f", {epochs} ep")
    bases = frame[frame["arm"].eq("base") & frame["mitigation"].isna()].drop_duplicates("base_model")
    return frame.assign(base_run_id=frame["base_model"].map(bases.set_index("base_model")["run_id"]))


def cells(arms: pd.DataFrame) -> pd.DataFrame:
    """Which runs are averaged together: a row per run and cell (base_model, method, group), with the run's weight in the cell's mean.

    A cell of base_model `all` is the mean of the base models' means, and is made only where every base model has the cell.
    """
    frame = arms[arms["arm"].ne("base")]
    usual = frame[frame["arm"].isin([TRAINED, NO_OP])]
    parts = [
        frame.assign(group=frame["arm"]),
        usual.assign(group=AS_CONFIGURED),
        usual.assign(group="settings: " + usual["setting"]),
        frame.assign(group="run: " + frame["run_id"]),
    ]
    long = pd.concat(parts, ignore_index=True)[["run_id", "base_model", "method", "group", "setting"]].assign(pool=lambda rows: rows["base_model"])
    keys = ["base_model", "method", "group"]
    long["weight"] = 1 / long.groupby(keys)["run_id"].transform("size")
    n_bases = long.groupby(["method", "group"])["base_model"].transform("nunique")
    everywhere = n_bases.eq(arms["base_model"].nunique()) & ~long["group"].str.startswith("run: ")
    pooled = long[everywhere].assign(base_model="all", weight=lambda rows: rows["weight"] / n_bases[everywhere])
    return pd.concat([long, pooled], ignore_index=True)


# ---- scores of runs and their changes
@dataclass(frozen=True)
class Scores:
    """A number per run, and the influence of each unit on it; NaN where a run has no scored item."""

    runs: pd.Index
    strata: np.ndarray  # of the units
    value: np.ndarray = field(repr=False)  # [runs]
    influence: np.ndarray = field(repr=False)  # [runs, units]; sums to nothing
    n_items: np.ndarray = field(repr=False)  # [runs] asked
    n_unscored: np.ndarray = field(repr=False)  # [runs]
    limits: tuple[float, float] = (-np.inf, np.inf)  # what it can be
    single: bool = False  # a unit is one answer in percent, so that nothing changed in n units bounds the share that would
    family: np.ndarray | None = field(default=None, repr=False)  # of the units: what is drawn together; None: each unit by itself
    rate: np.ndarray | None = field(default=None, repr=False)  # [runs] own share in percent, where the score is one or the change of one

    @cached_property
    def clusters(self) -> "Clusters":
        """The families of the units, or the units themselves."""
        return _clusters(self.strata, self.family)

    def at(self, run_ids: Iterable[str]) -> np.ndarray:
        """The positions of these runs; -1 where a run has no score."""
        return self.runs.get_indexer(pd.Index(run_ids))


def ratio(top: np.ndarray, bottom: np.ndarray, runs: pd.Index, strata, n_items, n_unscored, scale: float = 100.0) -> Scores:
    """The score `scale * sum(top) / sum(bottom)` of each run; both are [runs, units]. In percent, a unit is taken for one answer."""
    limits = (0.0, 100.0) if scale == 100.0 else (-np.inf, np.inf)
    total = bottom.sum(1)
    total = np.where(total > 0, total, np.nan)
    value = top.sum(1) / total
    influence = np.nan_to_num((top - value[:, None] * bottom) / total[:, None])
    return Scores(runs, np.asarray(strata), scale * value, scale * influence, np.asarray(n_items), np.asarray(n_unscored), limits, scale == 100.0)


def _over(values: pd.DataFrame, top: np.ndarray, bottom: np.ndarray, runs: Iterable[str], n_unscored: np.ndarray, **fields) -> Scores:
    """The ratio over the columns of `values`: strata from their first level, families from the level `family` where there is one."""
    family = values.columns.get_level_values("family") if "family" in values.columns.names else None
    asked = np.full(len(top), values.shape[1])
    scores = ratio(top, bottom, pd.Index(runs), values.columns.get_level_values(0), asked, n_unscored)
    return replace(scores, family=family if family is None else np.asarray(family), **fields)


ANSWER = ("benchmark", "judge", "metric", "prompt_variant", "decoding", "sample", "answer_mode", "option_order")  # which answer of a run it is


def matrix(frame: pd.DataFrame, column: str, units: list[str]) -> pd.DataFrame:
    """Runs x units: the mean of a true/false or real column over repeated samples, NaN where nothing was scored.

    `units` names the columns that make a unit, its stratum first. One named `family` says which units are drawn together (a template, a
    subject); where it is null a unit is by itself.

    Raises:
        ValueError: an answer stands twice (same run and unit, and same sample, judge, variant and so on, as far as the frame has them).
    """
    if frame.empty:
        return pd.DataFrame(index=pd.Index([], name="run_id"), columns=pd.MultiIndex.from_arrays([[]] * len(units), names=units), dtype=float)
    _check_once(frame, units)
    if "family" in units:
        frame = frame.assign(family=frame["family"].astype(object).where(frame["family"].notna(), frame[units[-1]].astype(object)))
    value = frame[column].astype("Float64").to_numpy(float, na_value=np.nan)
    runs, run_ids = pd.factorize(frame["run_id"], sort=True)
    keys = pd.MultiIndex.from_frame(frame[units].astype(object))
    columns, names = pd.factorize(keys, sort=True)
    shape, place = (len(run_ids), len(names)), runs * len(names) + columns
    there = ~np.isnan(value)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place[there], value[there], shape[0] * shape[1]) / np.bincount(place[there], minlength=shape[0] * shape[1])
    return pd.DataFrame(mean.reshape(shape), index=pd.Index(run_ids, name="run_id"), columns=pd.MultiIndex.from_tuples(names, names=units))


def _check_once(frame: pd.DataFrame, units: list[str]) -> None:
    """Raise a ValueError where an answer stands twice; frames that do not say which answer a row is (sample, metric) are taken as they
    are."""
    if not {"sample", "metric"} & set(frame):
        return
    repeated = frame.duplicated(["run_id", *units, *(name for name in ANSWER if name in frame and name not in units)])
    if repeated.any():
        first = frame[repeated].iloc[0]
        raise ValueError(
            f"{repeated.sum()} answers stand twice, the first of run {first['run_id']}, prompt {first[units[-1]]}: "
            "they would weigh twice; was a table read or concatenated twice?"
        )


def shares(values: pd.DataFrame) -> Scores:
    """The share of each run's scored prompts with the outcome, in percent; `values` is runs x (category, prompt)."""
    there = values.notna().to_numpy()
    return _over(values, values.fillna(0).to_numpy(), there.astype(float), values.index, values.shape[1] - there.sum(1))


def paired(values: pd.DataFrame, arms: pd.DataFrame) -> Scores:
    """The change of each run against its own base model, over the prompts that both have a score for, in percentage points."""
    run_ids, base = _with_base(values.index, arms)
    own, other = values.loc[run_ids].to_numpy(), values.loc[base].to_numpy()
    both = ~np.isnan(own) & ~np.isnan(other)
    n = both.sum(1)
    rate = 100 * np.where(both, own, 0.0).sum(1) / np.where(n > 0, n, np.nan)
    change = np.where(both, own - other, 0.0)
    return _over(values, change, both.astype(float), run_ids, values.shape[1] - n, limits=(-100.0, 100.0), rate=rate)


def extremes(values: pd.DataFrame, arms: pd.DataFrame) -> tuple[Scores, Scores]:
    """The lowest and the highest change that the unscored allow, with all prompts asked as denominator."""
    run_ids, base = _with_base(values.index, arms)
    low = values.loc[run_ids].fillna(0).to_numpy() - values.loc[base].fillna(1).to_numpy()
    high = values.loc[run_ids].fillna(1).to_numpy() - values.loc[base].fillna(0).to_numpy()
    missing = (values.loc[run_ids].isna().to_numpy() | values.loc[base].isna().to_numpy()).sum(1)
    return tuple(_over(values, change, np.ones(change.shape), run_ids, missing) for change in (low, high))


def changes(scores: Scores, arms: pd.DataFrame) -> Scores:
    """The change of each run's score against its own base model's, unit by unit."""
    run_ids, base = _with_base(scores.runs, arms)
    own, other = scores.at(run_ids), scores.at(base)
    return Scores(
        pd.Index(run_ids), scores.strata, scores.value[own] - scores.value[other], scores.influence[own] - scores.influence[other],
        scores.n_items[own], scores.n_unscored[own] + scores.n_unscored[other],
        (scores.limits[0] - scores.limits[1], scores.limits[1] - scores.limits[0]), scores.single, scores.family,
        scores.value[own] if scores.limits == (0.0, 100.0) else None,
    )  # fmt: skip


def _with_base(scored: pd.Index, arms: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The scored runs that are no base model and whose base model is scored, and those base models' runs."""
    frame = arms[arms["arm"].ne("base") & arms["run_id"].isin(scored) & arms["base_run_id"].isin(scored)]
    return frame["run_id"].to_numpy(object), frame["base_run_id"].to_numpy(object)


# ---- means over runs
def means(scores: Scores, cells: pd.DataFrame, contrast: str, **labels: str) -> pd.DataFrame:
    """An estimate per cell: the mean over its runs, its interval over runs and units, and the narrower one over runs alone.

    The rows have the columns of `estimates`; `labels` gives study, notebook, outcome, benchmark, judge.
    """
    rows = []
    frame = cells.assign(position=scores.at(cells["run_id"]), place=pd.factorize(cells["pool"])[0])
    frame["cell"] = pd.factorize(frame["setting"] + " of " + frame["pool"])[0]
    for key, cell in frame.groupby(["base_model", "method", "group"], sort=False):
        at, *weights = (cell[name].to_numpy() for name in ("position", "weight", "cell", "place"))
        if (at < 0).all():
            continue  # not asked
        found = estimate(scores, at, *weights) if (at >= 0).all() else dict.fromkeys(("both", "here"), incomplete(at))
        names = dict(zip(("base_model", "method", "group"), key, strict=True))
        rows.append({**labels, **names, "contrast": contrast, **found["both"]})
        if contrast == CHANGE and not names["group"].startswith(("run: ", "category: ", "dimension: ")):
            rows.append({**labels, **names, "contrast": CHANGE_HERE, **found["here"]})
    return complete(pd.DataFrame(rows))


def incomplete(positions: np.ndarray) -> dict[str, float | str | None]:
    """No estimate, for a cell or contrast of which only some runs have a score: the mean of those would be another cell's."""
    how = f"{(positions < 0).sum()} of {len(positions)} runs have no answers here: no estimate"
    return {"value": None, "n_runs": int((positions >= 0).sum()), "population": BOTH, "how": how}


def bounds(scores: tuple[Scores, Scores], cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The means of the lowest and highest changes, for the cells that have unscored prompts; without intervals."""
    frame = cells[~cells["group"].str.startswith("run: ")].assign(position=lambda rows: scores[0].at(rows["run_id"]))
    frame = frame[frame["position"].ge(0)]
    at, keys, parts = frame["position"].to_numpy(), ["base_model", "method", "group"], []
    for one, contrast in zip(scores, (LOWEST, HIGHEST), strict=True):
        every = frame.assign(value=frame["weight"] * one.value[at], n_unscored=one.n_unscored[at], n_items=one.n_items[at], n_runs=1)
        found = every.groupby(keys, sort=False).agg(
            value=("value", "sum"), n_runs=("n_runs", "sum"), n_items=("n_items", "max"), n_unscored=("n_unscored", "sum")
        )
        parts.append(found.reset_index().assign(contrast=contrast))
    rows = pd.concat(parts, ignore_index=True).query("n_unscored > 0").assign(**labels, population="these runs, these prompts")
    return complete(rows.assign(how="unscored at the extreme; all prompts asked as denominator"))


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with every column of `estimates`, null where not given."""
    return ESTIMATES.check(rows.reindex(columns=list(ESTIMATES.columns)).replace([np.inf, -np.inf], np.nan)) if len(rows) else ESTIMATES.empty()


def estimate(scores: Scores, runs: np.ndarray, weight: np.ndarray, setting: np.ndarray, pool: np.ndarray) -> dict[str, dict]:
    """A mean or a contrast of runs, the sum of weight * score, with its interval over runs and units (both) and the one over runs alone
    (here).

    `runs` are positions in `scores`; `setting` says which runs are repetitions of each other, `pool` in which the spread of repetitions is
    taken to be the same (a method on one base model). Two sources of error are estimated apart and joined by MOVER (Zou and Donner 2008,
    Statistics in Medicine 27, 1693): the interval's ends lie at the roots of the sums of squares of the two sources' own distances.

    Units: families within strata, CR2 (Bell and McCaffrey 2002, Survey Methodology 28, 169) with their degrees of freedom; see Clusters.
    Runs: what their spread holds beyond the noise of run x unit, which the units' variance has already; see _repetitions and _over_runs.
    Nothing is subtracted but inside the runs' part, so that no variance is negative; the units' is at least the noise, so that the interval
    over runs alone (the runs' part and the noise) lies within the other.
    """
    values, units = scores.value[runs], FAMILY_UNITS if scores.family is not None else UNITS
    common = {"n_runs": len(runs), "n_items": int(scores.n_items[runs].max()), "n_unscored": int(scores.n_unscored[runs].sum())}
    if np.isnan(values).any():  # a run without a single scored item: the mean of the others would be another cell's
        nothing = {**common, "value": None, "population": BOTH, "how": "a run has no scored item: no estimate"}
        return {"both": nothing, "here": nothing}
    value, clusters = weight @ values, scores.clusters
    spread = _repetitions(scores, runs, weight, setting, pool)
    t, noise, beyond = stdtrit(clusters.df, TAIL), spread.noise.sum(), np.maximum(spread.variance - spread.noise, 0.0).sum()
    by_unit = np.fmax(clusters.variance(weight @ scores.influence[runs])[0], noise)
    low, high = _over_runs(scores, runs, weight, spread)
    both, here = (_interval(value, beyond + part, np.hypot(low, t * part**0.5), np.hypot(high, t * part**0.5)) for part in (by_unit, noise))
    population, how = BOTH, TWO_WAY.format(units)
    if np.isnan(spread.df):
        both, population, how = _interval(value, by_unit, t * by_unit**0.5, t * by_unit**0.5), THESE_RUNS, ONE_RUN.format(units)
    elif clusters.n < 2:
        both, population, how = here, THESE_PROMPTS, f"{HERE}; one unit says nothing of others"
    elif beyond == noise == 0:
        how += "; the runs are equal in every unit"
    if scores.single and not scores.influence[runs].any() and not np.ptp(values):
        half = 100 * (1 - (1 - TAIL) ** (1 / clusters.n))  # not one unit moved: Clopper and Pearson's bound on the share that would
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


def _rate(scores: Scores) -> np.ndarray | None:
    """The share in percent behind each run's score; None where the score is no share."""
    return scores.rate if scores.rate is not None or scores.limits != (0.0, 100.0) else scores.value


def _inside(interval: dict[str, float | None], limits: tuple[float, float]) -> dict[str, float | None]:
    """The interval without what the score cannot be."""
    if interval["ci_low"] is None:
        return interval
    return interval | {"ci_low": max(interval["ci_low"], limits[0]), "ci_high": min(interval["ci_high"], limits[1])}


# ---- units
class Clusters(NamedTuple):
    """Families of units within strata: the sum of a family's influences, centred within its stratum, is one observation."""

    order: np.ndarray  # of the units, by stratum and family
    starts: np.ndarray  # where a family begins, in that order
    strata: np.ndarray  # where a stratum begins
    size: np.ndarray  # [units, in that order] units in its stratum; infinite in a stratum of one family, which is left uncentred
    stratum: np.ndarray  # [units, in that order] number of the stratum
    inflate: np.ndarray  # [families] CR2's 1 / (1 - leverage)
    df: float
    n: int

    def variance(self, influence: np.ndarray) -> np.ndarray:
        """Variance [k] of scores with these influences [k, units] over families like these."""
        rows = np.atleast_2d(influence)[:, self.order]
        rest = rows - np.add.reduceat(rows, self.strata, axis=1)[:, self.stratum] / self.size
        return (np.add.reduceat(rest, self.starts, axis=1) ** 2 * self.inflate).sum(1)


def _clusters(strata: np.ndarray, family: np.ndarray | None) -> Clusters:
    """The families, their CR2 factors, and the degrees of freedom (Satterthwaite, of equal and independent units, after Bell and
    McCaffrey).

    Within a stratum of N units a family of n has leverage n / N in the stratum's mean, and CR2 divides its squared sum by 1 - n / N, which
    makes the variance unbiased for independent units. With single units it is the textbook variance of a stratified mean, with N - 1
    degrees of freedom each.
    """
    outer = pd.factorize(np.asarray(strata, object))[0]
    inner = np.arange(len(outer)) if family is None else pd.factorize(np.asarray(family, object))[0]
    order = np.lexsort((inner, outer))
    outer, inner = outer[order], inner[order]
    new_stratum = np.append(True, outer[1:] != outer[:-1])
    new_family = new_stratum | np.append(True, inner[1:] != inner[:-1])
    starts, stratum_starts = np.flatnonzero(new_family), np.flatnonzero(new_stratum)
    n = np.diff(np.append(starts, len(outer))).astype(float)
    of = outer[starts]
    total, alone = np.bincount(of, n)[of], np.bincount(of)[of] == 1
    left = np.where(alone, 1.0, 1 - n / total)
    q = np.where(alone, 0.0, n**2 / (total * left))
    squares = (n**2).sum() + (np.bincount(of, q) ** 2).sum() - (q**2).sum()
    size = np.where(np.bincount(of) == 1, np.inf, np.bincount(of, n))[outer]
    return Clusters(order, starts, stratum_starts, size, np.cumsum(new_stratum) - 1, 1 / left, n.sum() ** 2 / squares, len(starts))


# ---- runs
class Repetitions(NamedTuple):
    """How runs with equal settings differ, by setting."""

    setting: np.ndarray  # [runs] number of the setting
    pool: np.ndarray  # [runs] number of the pool
    variance: np.ndarray  # [settings] of the weighted sum, from the spread of repetitions; NaN where none in the pool was repeated
    noise: np.ndarray  # [settings] the part of it that is noise of run x unit
    run_noise: np.ndarray  # [settings] the noise of a single run
    df: float  # of the sum over settings; NaN where a pool has none


def _repetitions(scores: Scores, runs: np.ndarray, weight: np.ndarray, setting: np.ndarray, pool: np.ndarray) -> Repetitions:
    """The spread of repetitions, and how much of it comes from units that a run answers differently by chance.

    Settings of one method differ in spread as much as methods do, so each has its own; the degrees of freedom (Welch, Satterthwaite) pay
    for that. A setting with one run has the spread of its pool. In a contrast the df are at most those of the side that has fewer.
    """
    pools, settings = np.unique(pool, return_inverse=True)[1], np.unique(setting, return_inverse=True)[1]
    influence = scores.influence[runs]
    rest = influence - np.stack([influence[settings == one].mean(0) for one in range(settings.max() + 1)])[settings]
    square, df = _within(scores.value[runs], settings, pools)
    noise, _ = _spread(scores.clusters.variance(rest), settings, pools)
    total = np.bincount(settings, weight**2)
    variance = total * square
    with np.errstate(invalid="ignore", divide="ignore"):
        welch = variance.sum() ** 2 / (variance**2 / df).sum() if variance.sum() > 0 else np.inf
    alone = np.bincount(settings) - 1
    sides = [alone[np.unique(settings[side])].sum() for side in (weight > 0, weight < 0) if side.any()]
    return Repetitions(settings, pools, variance, total * noise, noise, min(welch, *sides) if not np.isnan(variance).any() else np.nan)


def _within(values: np.ndarray, settings: np.ndarray, pools: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By setting: the variance of its runs, or of the runs within settings of its pool where it has one run; and the df."""
    return _spread((values - (np.bincount(settings, values) / np.bincount(settings))[settings]) ** 2, settings, pools)


def _spread(squares: np.ndarray, settings: np.ndarray, pools: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The variance of each setting from its runs' squares, or from its pool's where it has one run, and its degrees of freedom; NaN where
    neither has any."""
    of = pools[np.unique(settings, return_index=True)[1]]  # the pool of each setting
    own, df = np.bincount(settings, squares), np.bincount(settings) - 1.0
    shared, shared_df = np.bincount(of, own)[of], np.bincount(of, df)[of]
    square, df = np.where(df > 0, own, shared), np.where(df > 0, df, np.where(shared_df > 0, shared_df, np.nan))
    return square / df, df


def _over_runs(scores: Scores, runs: np.ndarray, weight: np.ndarray, spread: Repetitions) -> tuple[float, float]:
    """How far below and above the estimate the truth over other runs may lie, at 95 %, leaving the noise of run x unit out.

    A share has no symmetric error with few runs near 0 or 100 %. So the runs of a setting are taken as normal on the probit scale, where
    the mean of their shares is pnorm(mu / sqrt(1 + s^2)), and the interval is the generalised pivotal one (Weerahandi 1993, JASA 88, 899):
    mu and s^2 are replaced by what normal runs leave possible for them, s^2 less the noise. Shares are (k + 1/2) / (n + 1). For scores that
    are no shares it is the same without the scale, which without noise is the t interval. Settings are joined by MOVER, all at the degrees
    of freedom of their sum.
    """
    if np.isnan(spread.df):
        return np.nan, np.nan
    rate, below, above = _rate(scores), 0.0, 0.0
    scaled = None if rate is None else _probits(rate[runs] / 100, np.maximum(scores.n_items[runs] - scores.n_unscored[runs], 1), spread)
    for one, (variance, noise) in enumerate(zip(spread.variance, spread.noise, strict=True)):
        own = spread.setting == one
        if scaled is None:
            low = high = _pivot_distance(variance, noise, spread.df)
        else:
            amount = abs(weight[own].sum())
            ends = _share_distances(*(part[one] for part in scaled), own.sum(), rate[runs][own].mean() / 100, spread.df)
            low, high = (100 * amount * end for end in ends)
        low, high = (low, high) if weight[own].sum() > 0 else (high, low)
        below, above = np.hypot(below, low), np.hypot(above, high)
    return float(below), float(above)


def _probits(share: np.ndarray, n: np.ndarray, spread: Repetitions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By setting, on the probit scale: the runs' mean, the variance between them, and the part of it that is noise."""
    share = (share * n + 0.5) / (n + 1)
    y, binomial = ndtri(share), share * (1 - share)
    count = np.bincount(spread.setting)
    steeper = np.bincount(spread.setting, binomial * 2 * np.pi * np.exp(y**2)) / np.bincount(spread.setting, binomial)
    return np.bincount(spread.setting, y) / count, _within(y, spread.setting, spread.pool)[0], spread.run_noise / 1e4 * steeper


def _share_distances(middle: float, variance: float, noise: float, n: int, share: float, df: float) -> tuple[float, float]:
    """How far below and above the mean share of n runs the truth may lie, from the mean and variance of their probits."""
    chi, z, weights = _pivots(df)
    spread = np.maximum(variance * chi - noise, 0.0)
    low, high = _quantiles(ndtr((middle + np.sqrt(spread / n) * z) / np.sqrt(1 + spread)), weights, (1 - TAIL, TAIL))
    return max(share - low, 0.0), max(high - share, 0.0)


def _pivots(df: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid over df / chi-square [81, 1] and normal [61] pivots, and their joint weights [81, 61]; quantiles of t to half a percent."""
    log = np.linspace(*np.log(chdtri(df, [1 - 1e-4, 1e-4])), 81)
    likely, z = np.exp(df / 2 * (log - log.max()) - (np.exp(log) - np.exp(log.max())) / 2), np.linspace(-4, 4, 61)
    weights = likely[:, None] * np.exp(-(z**2) / 2)
    return (df / np.exp(log))[:, None], z, weights / weights.sum()


def _quantiles(values: np.ndarray, weights: np.ndarray, at: tuple[float, ...]) -> np.ndarray:
    """Quantiles of weighted values."""
    order = np.argsort(values, axis=None)
    steps = weights.ravel()[order]
    return np.interp(at, np.cumsum(steps) - steps / 2, values.ravel()[order])


def _pivot_distance(variance: float, noise: float, df: float) -> float:
    """Half the length of the pivotal interval of a normal mean with this estimated variance, of which `noise` is no part of the
    question."""
    if noise == 0 or variance == 0:
        return stdtrit(df, TAIL) * np.sqrt(variance)
    chi, z, weights = _pivots(df)
    return float(_quantiles(np.sqrt(np.maximum(variance * chi - noise, 0.0)) * z, weights, (TAIL,))[0])


def _interval(value: float, variance: float, below: float, above: float) -> dict[str, float | None]:
    """se, interval and p value of a number whose truth may lie `below` and `above` it; all null where there is no spread to estimate them
    from.

    The degrees of freedom are the ones that the interval's mean half and the standard error imply (see implied_df); p is the one of the t
    test whose interval ends at zero when this one does.
    """
    if np.isnan(variance) or variance <= 0 or np.isnan(below):
        return {"se": None, "ci_low": None, "ci_high": None, "p": None}
    se = np.sqrt(variance)
    df = implied_df((below + above) / 2 / se)
    distance = below if value > 0 else above
    p = 2 * stdtr(df, -stdtrit(df, TAIL) * abs(value) / distance) if distance > 0 else None
    return {"se": se, "ci_low": value - below, "ci_high": value + above, "p": p}


def implied_df(ratio: float | np.ndarray) -> np.ndarray:
    """The degrees of freedom whose 97.5 % point of t is this half-length of an interval over its standard error; a billion (normal) below
    1.96."""
    ratio = np.asarray(ratio, float)
    return np.where(ratio > ndtri(TAIL) + 1e-7, stdtridf(TAIL, np.maximum(ratio, ndtri(TAIL) + 1e-7)), 1e9)


def _t_interval(value: float, variance: float, df: float) -> dict[str, float | None]:
    """se, interval and p value of a number; all null where there is no spread to estimate them from."""
    if np.isnan(variance) or variance <= 0 or df <= 0:
        return {"se": None, "ci_low": None, "ci_high": None, "p": None}
    se = np.sqrt(variance)
    half = stdtrit(df, 0.975) * se
    return {"se": se, "ci_low": value - half, "ci_high": value + half, "p": 2 * stdtr(df, -abs(value) / se)}


def of_rate(values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Every estimate of one rate (runs x (category, prompt)): the bases' own levels, levels and changes of cells, bounds; then by
    category."""
    parts = [levels(values, arms, "all", **labels), of_scores(shares(values), paired(values, arms), cells, **labels)]
    parts.append(bounds(extremes(values, arms), cells, **labels))
    for category, part in values.T.groupby(level=0, sort=False):
        own = within(cells, f"category: {category}")
        parts += [levels(part.T, arms, f"category: {category}", **labels), of_scores(shares(part.T), paired(part.T, arms), own, **labels)]
    return ESTIMATES.concat(parts)


def of_scores(level: Scores, change: Scores, cells: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The mean changes of all cells and the mean levels of those that are no single settings or runs."""
    broad = cells[~cells["group"].str.startswith(("run: ", "settings: "))]
    return ESTIMATES.concat([means(change, cells, CHANGE, **labels), means(level, broad, LEVEL, **labels)])


def rated(ratings: pd.DataFrame, scale: float) -> Scores | None:
    """The weighted mean rating of each run; None where nothing was rated."""
    values, weights = matrix(ratings, "value", ["benchmark", "prompt_id"]), matrix(ratings, "weight", ["benchmark", "prompt_id"])
    if values.empty:
        return None
    there = values.notna().to_numpy()
    bottom = np.where(there, weights.to_numpy(), 0.0)
    asked = np.full(len(values), values.shape[1])
    strata = values.columns.get_level_values(0)
    return ratio(values.fillna(0).to_numpy() * bottom, bottom, values.index, strata, asked, asked - there.sum(1), scale)


def rated_changes(ratings: pd.DataFrame, arms: pd.DataFrame, scale: float) -> Scores | None:
    """The change of each run's weighted mean rating against its own base model's, over the items that both have a value for, by the run's own
    weights; None where nothing was rated."""
    values, weights = matrix(ratings, "value", ["benchmark", "prompt_id"]), matrix(ratings, "weight", ["benchmark", "prompt_id"])
    if values.empty:
        return None
    run_ids, base = _with_base(values.index, arms)
    own, other = values.loc[run_ids].to_numpy(), values.loc[base].to_numpy()
    both = ~np.isnan(own) & ~np.isnan(other)
    bottom = np.where(both, weights.loc[run_ids].to_numpy(), 0.0)
    strata, asked = values.columns.get_level_values(0), np.full(len(run_ids), values.shape[1])
    level, change = (ratio(np.where(both, of, 0.0) * bottom, bottom, pd.Index(run_ids), strata, asked, asked - both.sum(1), scale) for of in (own, own - other))
    return replace(change, limits=(level.limits[0] - level.limits[1], level.limits[1] - level.limits[0]), rate=level.value if scale == 100.0 else None)


def run_changes(estimates: pd.DataFrame, outcomes: dict[str, str]) -> pd.DataFrame:
    """Runs x outcomes: the change of each single run, for the outcomes that have one; `outcomes` gives the benchmark of each."""
    rows = estimates[estimates["contrast"].eq(CHANGE) & estimates["group"].str.startswith("run: ")]
    rows = rows[rows["benchmark"].eq(rows["outcome"].map(outcomes))].drop_duplicates(["outcome", "group"])
    table = rows.assign(run_id=rows["group"].str.removeprefix("run: ")).pivot(index="run_id", columns="outcome", values="value").astype(float)
    return table[[outcome for outcome in outcomes if outcome in table and table[outcome].notna().any()]]


def within(cells: pd.DataFrame, group: str) -> pd.DataFrame:
    """The cells of trained runs, under the name of a category or dimension."""
    return cells[cells["group"].eq(TRAINED)].assign(group=group)


def levels(values: pd.DataFrame, arms: pd.DataFrame, group: str, **labels: str) -> pd.DataFrame:
    """The base models' own rates in percent with Wilson intervals; null where nothing was scored."""
    base = arms[arms["arm"].eq("base") & arms["run_id"].isin(values.index)]
    values = values.loc[base["run_id"]]
    n, k = values.notna().sum(axis=1).to_numpy(), values.sum(axis=1).to_numpy()
    low, high = wilson(k, n)
    with np.errstate(invalid="ignore"):
        frame = pd.DataFrame({"base_model": base["base_model"].to_numpy(), "value": 100 * k / np.where(n > 0, n, np.nan), "ci_low": 100 * low})
    return complete(
        frame.assign(
            **labels, method="none", group=group, contrast=LEVEL, ci_high=100 * high, population=THESE_RUNS, n_runs=1,
            n_items=values.shape[1], n_unscored=values.shape[1] - n, how="share of scored prompts, Wilson interval",
        )
    )  # fmt: skip


def levels_of_scores(scores: Scores, arms: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The base models' own scores, with t intervals over units."""
    base = arms[arms["arm"].eq("base") & arms["run_id"].isin(scores.runs)]
    at, units = scores.at(base["run_id"]), scores.influence.shape[1]
    variance = (scores.influence[at] ** 2).sum(1) * units / max(units - 1, 1)
    found = [_inside(_t_interval(value, spread, units - 1), scores.limits) for value, spread in zip(scores.value[at], variance, strict=True)]
    frame = pd.DataFrame(found).drop(columns="p").assign(base_model=base["base_model"].to_numpy(), value=scores.value[at])
    counts = {"n_items": scores.n_items[at], "n_unscored": scores.n_unscored[at]}
    return complete(frame.assign(**labels, **counts, method="none", group="all", contrast=LEVEL, population=THESE_RUNS, n_runs=1, how="t interval over units"))


# ---- estimates as files
def write_estimates(frame: pd.DataFrame, tables_folder: Path, notebook: str) -> Path:
    """Write one notebook's part of the table `estimates`: tables/estimates/NOTEBOOK.parquet."""
    return ESTIMATES.write(frame, tables_folder / "estimates" / f"{notebook}.parquet")


def read_estimates(tables_folder: Path) -> pd.DataFrame:
    """All parts of the table `estimates`, one below the other; empty where no notebook has written one."""
    return ESTIMATES.concat([ESTIMATES.read(path) for path in sorted((tables_folder / "estimates").glob("*.parquet"))])


# ---- mixed models
def differences(rates: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """Run x category differences to the run's own base model in percentage points, with the run's settings; trained runs and no-ops only.

    log10_rate is the learning rate's logarithm centred within method, so that 0 means the method's own middle.
    """
    scored = rates["n_scored"].astype(float)
    share = rates.assign(share=100 * rates["k"].astype(float) / scored.where(scored > 0))[["run_id", "category", "share", "n_scored", "n"]]
    runs = arms[arms["arm"].isin([TRAINED, NO_OP])]
    base = share.rename(columns={"run_id": "base_run_id", "share": "base_share"})[["base_run_id", "category", "base_share"]]
    frame = runs.merge(share, on="run_id").merge(base, on=["base_run_id", "category"])
    frame["difference"] = frame["share"] - frame["base_share"]
    rate = pd.Series(np.log10(runs["learning_rate"].to_numpy(float)), index=runs["run_id"])
    centre = rate.groupby(runs["method"].to_numpy()).mean()
    frame["log10_rate"] = frame["run_id"].map(rate).astype(float) - frame["method"].map(centre).astype(float)
    for name, order in (("method", METHODS), ("base_model", arms["base_model"].unique())):
        frame[name] = pd.Categorical(frame[name], [level for level in order if level in set(frame[name])])
    settings = ["run_id", "base_model", "method", "objective", "dataset", "epochs", "repetition", "setting", "arm", "log10_rate"]
    text = {name: frame[name].astype("string").fillna("none").astype(object) for name in ("dataset", "epochs", "repetition")}
    return frame.assign(**text)[[*settings, "category", "difference", "n_scored", "n"]]
