"""Scores of runs with the influence of each family of prompts, from which every interval is
computed.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from driftbook.stats import terms

CELL = ["base_model", "method", "group", "member"]  # runs with these in common are averaged


# ---- who is compared with whom
def arms(variants: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The variants that ran, with their role in comparisons (arm), their setting in words, and
    their base model's run (base_run_id).

    arm: base, trained, no-op, stopped, mixed in, untrained, init or mitigation; `member` says which
    init or mitigation. A run whose training ended before its epochs (by drift, say) is "stopped
    early": a treatment of its own, averaged with no complete run. So is "mixed in" a run that
    others are mixed with (a soup or MOD, with one on safety data) and of which nothing itself is
    made. A method's own init is the one most of its runs have. A base model's further repetitions
    are left out: their greedy answers are those of the first, only drawn ones differ.
    `cluster` says which runs share their random numbers; see seed_clusters.
    """
    frame = variants.merge(runs[["run_id", "status", "no_op"]], on="run_id", validate="1:1")
    frame = frame[
        frame["status"].eq("ok") & ~(frame["method"].eq("none") & frame["repetition"].gt(1))
    ].reset_index(drop=True)
    usual = frame.groupby("method")["init"].agg(
        lambda init: init.value_counts().index[0] if init.notna().any() else None
    )
    other = frame["init"].notna() & frame["init"].ne(frame["method"].map(usual))
    is_base, untrained = frame["method"].eq("none"), frame["objective"].eq("untrained")
    apart = [_mixed_in(frame, variants), _stopped(frame, runs)]
    kinds = [is_base, untrained, *apart, frame["no_op"].fillna(False)]
    words = ["base", terms.UNTRAINED, terms.MIXED_IN, terms.STOPPED, terms.NO_OP]
    frame["arm"] = np.select(kinds, words, terms.TRAINED)
    repaired = frame["mitigation"].notna()
    frame["arm"] = frame["arm"].mask(other, terms.INIT).mask(repaired, terms.MITIGATION)
    started = frame["init"].fillna("") + ", " + frame["objective"]
    names = [frame["mitigation"].fillna(""), started]
    frame["member"] = np.select([repaired, other], names, terms.ALL)
    rates = frame["learning_rate"].map(
        lambda rate: "" if pd.isna(rate) else f" at {rate:.0e}".replace("e-0", "e-")
    )
    several = frame.groupby("objective")["dataset"].transform("nunique").gt(1)
    dataset = (" on " + frame["dataset"].fillna("")).where(several, "")
    epochs = frame["epochs"].map(lambda epochs: "" if pd.isna(epochs) else f", {epochs} ep")
    frame["setting"] = frame["objective"] + dataset + rates + epochs
    bases = frame[frame["arm"].eq("base") & ~repaired].drop_duplicates("base_model")
    first = bases.set_index("base_model")["run_id"]
    return frame.assign(
        base_run_id=frame["base_model"].map(first), cluster=seed_clusters(frame, frame["setting"])
    )


def _mixed_in(frame: pd.DataFrame, variants: pd.DataFrame) -> pd.Series:
    """Whether others are mixed with a run of which nothing itself is made."""
    if not {"settings", "parent_run_id"} <= set(variants):
        return pd.Series(False, frame.index)
    repairs = [json.loads(one).get("mitigation") or {} for one in variants["settings"]]
    others = {name for one in repairs for name in (one.get("safety_run_id"), *one.get("parts", ()))}
    mixed = others - set(variants["parent_run_id"].dropna())
    return frame["run_id"].isin(mixed)


def _stopped(frame: pd.DataFrame, runs: pd.DataFrame) -> pd.Series:
    """Whether a run's trainer ended before the epochs that it was given."""
    if "trained_epochs" not in runs:
        return pd.Series(False, frame.index)
    trained = frame["run_id"].map(runs.set_index("run_id")["trained_epochs"]).astype(float)
    return trained.lt(0.999 * frame["epochs"].astype(float)).fillna(False)


def seed_clusters(runs: pd.DataFrame, setting: pd.Series) -> pd.Series:
    """A name per run that equals that of every run with the same random numbers: the same base
    model, method, objective and seed, in whatever setting.

    Such runs begin from the same adapter and see the data in the same order, so they err together:
    in the miniature, settings that share a seed correlate by .5 (Prompt-Tuning) to .7 (P-Tuning).
    Runs of different methods do not (-.05 and .04 there). Repetitions of one setting that repeat a
    seed are runs apart: they differ by what the hardware does not repeat.
    """
    of = [runs[name].astype("string").fillna("") for name in ("base_model", "method", "objective")]
    seed = runs["seed"].astype("string").fillna(runs["run_id"].astype("string"))
    names = of[0] + ", " + of[1] + ", " + of[2] + ", seed " + seed
    again = names.groupby([names, setting.astype("string")]).cumcount()
    more = again.map(lambda n: f", again {n}" if n else "").astype("string")  # of no run too
    return (names + more).astype(object)


def cells(arms: pd.DataFrame) -> pd.DataFrame:
    """Which runs are averaged together: a row per run and cell (base_model, method, group,
    member), with the run's weight in the cell's mean.

    Settings weigh the same in a cell, and so do the runs of a setting. "As configured" is one grid:
    of the trained runs, settings that some base models lack are in it, and in the cell `trained`,
    only where no setting of the method is everywhere (each base model then has its own grid, and
    there is no mean over base models). A cell of base_model `all` is the mean of the base models'
    means, and is made only where every base model has the cell.
    """
    frame = arms[arms["arm"].ne("base")]
    usual = frame[frame["arm"].isin([terms.TRAINED, terms.NO_OP])]
    trained, n_bases = frame["arm"].eq(terms.TRAINED), arms["base_model"].nunique()
    grids = {terms.TRAINED: _one_grid(frame[trained]), terms.AS_CONFIGURED: _one_grid(usual)}
    parts = [
        frame[~trained].assign(group=frame["arm"]),
        *(grid.assign(group=group) for group, (grid, _) in grids.items()),
        usual.assign(group=terms.SETTINGS, member=usual["setting"]),
        frame.assign(group=terms.RUN, member=frame["run_id"]),
    ]
    long = pd.concat(parts, ignore_index=True)[["run_id", *CELL, "setting", "cluster"]].assign(
        pool=lambda rows: rows["base_model"]
    )
    long["weight"] = setting_weights(long)
    of_cell = long.groupby(CELL[1:])["base_model"].transform("nunique")
    everywhere = of_cell.eq(n_bases) & long["group"].ne(terms.RUN)
    for group, (_, own_grids) in grids.items():
        everywhere &= ~(long["group"].eq(group) & long["method"].isin(own_grids))
    pooled = long[everywhere].assign(base_model="all", weight=lambda rows: rows["weight"] / n_bases)
    return pd.concat([long, pooled], ignore_index=True)


def setting_weights(cells: pd.DataFrame) -> pd.Series:
    """The weight of each run in the mean of its cell: settings weigh the same, and so do the runs
    of a setting."""
    n_settings = cells.groupby(CELL)["setting"].transform("nunique")
    return 1 / n_settings / cells.groupby([*CELL, "setting"])["run_id"].transform("size")


def _one_grid(usual: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs in settings that every base model of their method has; and the methods without such
    a setting, of which all runs are kept.
    """
    of_setting, of_method = (
        usual.groupby(names)["base_model"].transform("nunique")
        for names in (["method", "setting"], ["method"])
    )
    there = of_setting.eq(of_method)
    own = sorted(set(usual["method"]) - set(usual.loc[there, "method"]))
    return usual[there | usual["method"].isin(own)], own


# ---- scores of runs and their changes
@dataclass(frozen=True)
class Scores:
    """A number per run, and the influence of each unit on it; NaN where nothing was scored."""

    runs: pd.Index
    strata: np.ndarray  # of the units
    value: np.ndarray = field(repr=False)  # [runs]
    influence: np.ndarray = field(repr=False)  # [runs, units]; sums to nothing
    n_items: np.ndarray = field(repr=False)  # [runs] asked
    n_unscored: np.ndarray = field(repr=False)  # [runs]
    limits: tuple[float, float] = (-np.inf, np.inf)  # what it can be
    # [2, runs, units] of a share or the change of one: each unit's part of it (its sum is the
    # value / 100) and of its denominator (its sum is 1)
    counted: np.ndarray | None = field(default=None, repr=False)
    # of the units: those drawn together; None: each unit alone
    family: np.ndarray | None = field(default=None, repr=False)
    # [runs] own share in percent, where the score is one or the change of one
    rate: np.ndarray | None = field(default=None, repr=False)
    # [runs] the run that a change is measured against
    reference: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def clusters(self) -> "Clusters":
        """The families of the units, or the units themselves."""
        return _clusters(self.strata, self.family)

    def at(self, run_ids: Iterable[str]) -> np.ndarray:
        """The positions of these runs; -1 where a run has no score."""
        return self.runs.get_indexer(pd.Index(run_ids))

    def of(self, run_ids: Iterable[str]) -> np.ndarray:
        """The scores of these runs; nan where a run has none."""
        return pd.Series(self.value, self.runs, dtype=float).reindex(run_ids).to_numpy()


def ratio(
    top: np.ndarray,
    bottom: np.ndarray,
    runs: pd.Index,
    strata,
    n_items,
    n_unscored,
    scale: float = 100.0,
) -> Scores:
    """The score `scale * sum(top) / sum(bottom)` of each run; both are [runs, units]. In percent it
    is a share, of which a unit has no more than its part of `bottom`.
    """
    limits = (0.0, 100.0) if scale == 100.0 else (-np.inf, np.inf)
    total = bottom.sum(1)
    total = np.where(total > 0, total, np.nan)
    value = top.sum(1) / total
    influence = np.nan_to_num((top - value[:, None] * bottom) / total[:, None])
    counted = np.nan_to_num(np.stack([top, bottom]) / total[:, None]) if scale == 100.0 else None
    strata, n_items, n_unscored = map(np.asarray, (strata, n_items, n_unscored))
    found = (runs, strata, scale * value, scale * influence, n_items, n_unscored)
    return Scores(*found, limits, counted)


def _over(
    values: pd.DataFrame,
    top: np.ndarray,
    bottom: np.ndarray,
    runs: Iterable[str],
    n_unscored: np.ndarray,
    **fields,
) -> Scores:
    """The ratio over the columns of `values`: strata from their first level, families from the
    level `family` where there is one.
    """
    strata, asked = values.columns.get_level_values(0), np.full(len(top), values.shape[1])
    scores = ratio(top, bottom, pd.Index(runs), strata, asked, n_unscored)
    if "family" in values.columns.names:
        fields["family"] = np.asarray(values.columns.get_level_values("family"))
    return replace(scores, **fields)


# which answer of a run it is
ANSWER = ["benchmark", "judge", "metric", "prompt_variant", "decoding", "sample", "answer_mode"]
ANSWER += ["option_order"]


def matrix(frame: pd.DataFrame, column: str, units: list[str]) -> pd.DataFrame:
    """Runs x units: the mean of a true/false or real column over repeated samples, NaN where
    nothing was scored.

    `units` names the columns that make a unit, its stratum first. One named `family` says which
    units are drawn together (a template, a subject); where it is null a unit is by itself.

    Raises:
        ValueError: an answer stands twice (same run and unit, and same sample, judge, variant and
            so on, as far as the frame has them); not where it has neither sample nor metric.
    """
    if frame.empty:
        columns = pd.MultiIndex.from_arrays([[]] * len(units), names=units)
        return pd.DataFrame(index=pd.Index([], name="run_id"), columns=columns, dtype=float)
    _check_once(frame, units)
    if "family" in units:
        family, alone = (frame[name].astype(object) for name in ("family", units[-1]))
        frame = frame.assign(family=family.where(frame["family"].notna(), alone))
    value = frame[column].astype("Float64").to_numpy(float, na_value=np.nan)
    runs, run_ids = pd.factorize(frame["run_id"], sort=True)
    keys = pd.MultiIndex.from_frame(frame[units].astype(object))
    columns, names = pd.factorize(keys, sort=True)
    there, size = ~np.isnan(value), len(run_ids) * len(names)
    place = (runs * len(names) + columns)[there]
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, value[there], size) / np.bincount(place, minlength=size)
    index, columns = pd.Index(run_ids, name="run_id"), pd.MultiIndex.from_tuples(names, names=units)
    return pd.DataFrame(mean.reshape(len(index), len(names)), index=index, columns=columns)


def _check_once(frame: pd.DataFrame, units: list[str]) -> None:
    """Raise a ValueError where an answer stands twice; frames that do not say which answer a row is
    (sample, metric) are taken as they are."""
    if not {"sample", "metric"} & set(frame):
        return
    of_run = [name for name in ANSWER if name in frame and name not in units]
    repeated = frame.duplicated(["run_id", *units, *of_run])
    if repeated.any():
        first = frame[repeated].iloc[0]
        raise ValueError(
            f"{repeated.sum()} answers stand twice, the first of run {first['run_id']}, prompt"
            f" {first[units[-1]]}: they would weigh twice; was a table read or concatenated twice?"
        )


def shares(values: pd.DataFrame) -> Scores:
    """The share of each run's scored prompts with the outcome, in percent; `values` is runs x
    (category, prompt).
    """
    there, k = values.notna().to_numpy(), values.fillna(0).to_numpy()
    missing = values.shape[1] - there.sum(1)
    return _over(values, k, there.astype(float), values.index, missing)


def paired(values: pd.DataFrame, arms: pd.DataFrame) -> Scores:
    """The change of each run against its own base model, over the prompts that both have a score
    for, in percentage points.
    """
    run_ids, base = _with_base(values.index, arms)
    own, other = values.loc[run_ids].to_numpy(), values.loc[base].to_numpy()
    both = ~np.isnan(own) & ~np.isnan(other)
    n, change = both.sum(1), np.where(both, own - other, 0.0)
    rate = 100 * np.where(both, own, 0.0).sum(1) / np.where(n > 0, n, np.nan)
    more = {"limits": (-100.0, 100.0), "rate": rate, "reference": base}
    return _over(values, change, both.astype(float), run_ids, values.shape[1] - n, **more)


def extremes(values: pd.DataFrame, arms: pd.DataFrame) -> tuple[Scores, Scores]:
    """The lowest and the highest change that the unscored allow, with all prompts asked as
    denominator.
    """
    run_ids, base = _with_base(values.index, arms)
    own, other = values.loc[run_ids].to_numpy(), values.loc[base].to_numpy()
    missing, every = (np.isnan(own) | np.isnan(other)).sum(1), np.ones(own.shape)
    low, high = (
        np.where(np.isnan(own), one, own) - np.where(np.isnan(other), 1.0 - one, other)
        for one in (0.0, 1.0)
    )
    return tuple(_over(values, change, every, run_ids, missing) for change in (low, high))


def changes(scores: Scores, arms: pd.DataFrame) -> Scores:
    """The change of each run's score against its own base model's, unit by unit."""
    run_ids, base = _with_base(scores.runs, arms)
    own, other = scores.at(run_ids), scores.at(base)
    parts = scores.counted
    if parts is not None:
        means = (parts[1, own] + parts[1, other]) / 2
        parts = np.stack([parts[0, own] - parts[0, other], means])
    return replace(
        scores,
        runs=pd.Index(run_ids),
        value=scores.value[own] - scores.value[other],
        influence=scores.influence[own] - scores.influence[other],
        n_items=scores.n_items[own],
        n_unscored=scores.n_unscored[own] + scores.n_unscored[other],
        limits=_of_changes(scores.limits),
        counted=parts,
        rate=scores.value[own] if scores.limits == (0.0, 100.0) else None,
        reference=base,
    )


def _of_changes(limits: tuple[float, float]) -> tuple[float, float]:
    """What the change of a score with these limits can be."""
    return limits[0] - limits[1], limits[1] - limits[0]


def _with_base(scored: pd.Index, arms: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The scored runs that are no base model and whose base model is scored, and those base models'
    runs.
    """
    both = arms["run_id"].isin(scored) & arms["base_run_id"].isin(scored)
    frame = arms[arms["arm"].ne("base") & both]
    return frame["run_id"].to_numpy(object), frame["base_run_id"].to_numpy(object)


# ---- units
class Clusters(NamedTuple):
    """Families of units within strata: the sum of a family's influences, centred within its
    stratum, is one observation.
    """

    order: np.ndarray  # of the units, by stratum and family
    starts: np.ndarray  # where a family begins, in that order
    strata: np.ndarray  # where a stratum begins
    # [units, in that order] units in its stratum; infinite where one family is all, left uncentred
    size: np.ndarray
    stratum: np.ndarray  # [units, in that order] number of the stratum
    inflate: np.ndarray  # [families] CR2's 1 / (1 - leverage)
    df: float
    n: int

    def variance(self, influence: np.ndarray) -> np.ndarray:
        """Variance [k] of scores with these influences [k, units] over families like these."""
        rows = np.atleast_2d(influence)[:, self.order]
        rest = rows - np.add.reduceat(rows, self.strata, axis=1)[:, self.stratum] / self.size
        return (np.add.reduceat(rest, self.starts, axis=1) ** 2 * self.inflate).sum(1)

    def largest(self, parts: np.ndarray) -> float:
        """The part of a family in a total that the units' `parts` [units] add up to: the mean over
        families, weighed by their parts (1 / the effective number of families).
        """
        sums = np.add.reduceat(parts[self.order], self.starts)
        return float((sums**2).sum() / sums.sum() ** 2)


def _clusters(strata: np.ndarray, family: np.ndarray | None) -> Clusters:
    """The families, their CR2 factors, and the degrees of freedom (Satterthwaite, of equal and
    independent units, after Bell and McCaffrey).

    Within a stratum of N units a family of n has leverage n / N in the stratum's mean, and CR2
    divides its squared sum by 1 - n / N, which makes the variance unbiased for independent units.
    With single units it is the textbook variance of a stratified mean, with N - 1 degrees of
    freedom each.
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
    stratum, df = np.cumsum(new_stratum) - 1, n.sum() ** 2 / squares
    return Clusters(order, starts, stratum_starts, size, stratum, 1 / left, df, len(starts))


# ---- ratings
def rated(ratings: pd.DataFrame, scale: float) -> Scores | None:
    """The weighted mean rating of each run; None where nothing was rated."""
    values, weights = _ratings(ratings)
    if values.empty:
        return None
    own = values.to_numpy()
    return _weighed(values, own, ~np.isnan(own), weights.to_numpy(), values.index, scale)


def rated_changes(ratings: pd.DataFrame, arms: pd.DataFrame, scale: float) -> Scores | None:
    """The change of each run's weighted mean rating against its own base model's, over the items
    that both have a value for, by the run's own weights; None where nothing was rated.
    """
    values, weights = _ratings(ratings)
    if values.empty:
        return None
    run_ids, base = _with_base(values.index, arms)
    own, other = values.loc[run_ids].to_numpy(), values.loc[base].to_numpy()
    both, weights = ~np.isnan(own) & ~np.isnan(other), weights.loc[run_ids].to_numpy()
    level, change = (
        _weighed(values, of, both, weights, pd.Index(run_ids), scale) for of in (own, own - other)
    )
    rate = level.value if scale == 100.0 else None
    return replace(change, limits=_of_changes(level.limits), rate=rate, reference=base)


def _ratings(ratings: pd.DataFrame) -> list[pd.DataFrame]:
    return [matrix(ratings, name, ["benchmark", "prompt_id"]) for name in ("value", "weight")]


def _weighed(
    values: pd.DataFrame,
    of: np.ndarray,
    there: np.ndarray,
    weights: np.ndarray,
    runs: pd.Index,
    scale: float,
) -> Scores:
    """The weighted mean of each run over the items that are there."""
    bottom, asked = np.where(there, weights, 0.0), np.full(len(there), there.shape[1])
    top, strata = np.where(there, of, 0.0) * bottom, values.columns.get_level_values(0)
    return ratio(top, bottom, runs, strata, asked, asked - there.sum(1), scale)
