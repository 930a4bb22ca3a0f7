"""The statistics end to end, by simulation: verdicts whose truth is known exactly go through
tables, estimates and words, and what came out is held against the truth, cell by cell of a grid.

A verdict is unsafe where a normal latent exceeds a threshold. Its variance (1) is shared between
prompt, prompt x base model, prompt x method and noise; prompts may come in families, which then
have FAMILY_PART of each of the prompts' shares. A run shifts it by a normal amount, part of which
runs of one seed may share across the settings of a method on a base model. Rates over runs and
prompts like these are then exact, because the threshold is set by them.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from bench.harness import FOLDER, row
from scipy.special import ndtr, ndtri

from driftbook.analyses import labelling
from driftbook.stats import comparisons, estimation, influence, noninferiority, terms
from driftbook.stats.confidence import ALPHA, UPPER
from driftbook.study.files import replacing

METHODS = ("lora", "ia3", "prompt_tuning", "p_tuning")
MARGIN = 3.0  # points
FAMILY_PART = 0.4
LABELS = 600  # labels by people, the default of notebook 05
SENSITIVITY, SPECIFICITY = (
    (0.9, 0.8),
    (0.97, 0.99),
)  # of the judge, the base's and the runs' answers
NAMES = {"study": "s", "notebook": "n", "outcome": terms.UNSAFE, "benchmark": "safety"}
NAMES |= {"judge": "j"}
ONE, EVERY = "each base model", "all base models"
DIFFERENCE, PREDICTED = "difference of methods", "a new base model"
KINDS = {  # of intervals, by contrast
    terms.CHANGE: "change",
    terms.CHANGE_HERE: "change, these prompts",
    terms.LEVEL: "level",
    comparisons.DIFFERENCE: DIFFERENCE,
    comparisons.INTERACTION: "difference to the mean over base models",
    comparisons.RATE: "difference of settings",
    comparisons.ODDS: "odds ratio",
}
NAIVE = "change, all verdicts independent"
CELL, OF = ["cell", "kind", "where"], ["low", "high", "truth", "p"]


# ---- the grid
@dataclass(frozen=True)
class Cell:
    """What the verdicts of one cell of the grid are like."""

    rate: float = 0.15  # unsafe, of the base models
    changes: tuple[float, ...] = (0.0, 1.0, 5.0, 10.0)  # points, by method
    run_sds: tuple[float, ...] = (0.05, 0.05, 0.25, 0.45)  # probits, by method
    seeds: tuple[tuple[int, ...], ...] = ((3, 3),)  # by base model (in turn) and setting
    bases: int = 4
    by_setting: tuple[float, ...] = (0.0, 0.0)  # points more in each setting
    shared: float = 0.0  # of a run's variance, by runs of one seed in other settings
    families: int = 0  # of prompts; 0: each prompt by itself
    prompts: int = 330
    unscored: float = 0.0  # of the verdicts, at random
    base_sd: float = 0.0  # probits by which base models and their changes differ
    shares: tuple[float, ...] = (0.5, 0.1, 0.15, 0.25)  # prompt, x base, x method, noise
    judged: bool = False  # by a judge that errs otherwise on the base's answers than on the runs'

    @property
    def null(self) -> bool:
        """Whether no method changes anything."""
        return not any(self.changes) and not any(self.by_setting)

    @property
    def at_margin(self) -> bool:
        """Whether every method does exactly as much harm as the margin allows."""
        return set(self.changes) == {MARGIN}


SKEWED = "runs that differ widely, rate .05"  # three runs at most one answer from 0: these runs
NOTHING, HARMFUL = (0.0,) * 4, (MARGIN,) * 4
OWN = (0.45, 0.30, 0.10, 0.15)  # in this order: prompt x method, prompt, x base, noise
STRONG = (OWN[1], OWN[2], OWN[0], OWN[3])
GRID = {
    "main": Cell(),
    "null": Cell(changes=NOTHING),
    "null, strong prompt x method": Cell(changes=NOTHING, shares=STRONG),
    "null, settings share seeds": Cell(
        changes=NOTHING, shared=1.0, seeds=((3, 3, 3, 3),), by_setting=NOTHING
    ),
    "settings share seeds by half": Cell(shared=0.5),
    "unequal seeds": Cell(seeds=((4, 1),)),
    "one base with few seeds": Cell(seeds=((2, 1), (3, 3), (3, 3), (3, 3))),
    "a setting that one base lacks": Cell(
        seeds=((3, 0), (3, 3), (3, 3), (3, 3)), by_setting=(0.0, 4.0)
    ),
    "unscored verdicts": Cell(unscored=0.05),
    "25 families of prompts": Cell(families=25),
    "one base": Cell(bases=1),
    "one setting on one base": Cell(bases=1, seeds=((3,),), by_setting=(0.0,)),
    SKEWED: Cell(  # SD of their rates: 13.5 points
        rate=0.05, changes=NOTHING, run_sds=(1.62,) * 4, bases=1, seeds=((3,),), by_setting=(0.0,)
    ),
    "rate .01": Cell(rate=0.01, changes=(0.0, 0.0, 2.0, 5.0)),
    "rate .001": Cell(rate=0.001, changes=(0.0, 0.0, 0.5, 2.0)),
    "rate .99": Cell(rate=0.99, changes=(0.0, 0.0, -2.0, -5.0)),
    "base models differ": Cell(base_sd=0.25),
    "judge errs": Cell(bases=1, judged=True),
    "two seeds": Cell(seeds=((2, 2),)),
    "one seed": Cell(seeds=((1, 1),)),
    "at the margin": Cell(changes=HARMFUL),
    "at the margin, rate .01": Cell(changes=HARMFUL, rate=0.01),
    "at the margin, rate .001": Cell(changes=HARMFUL, rate=0.001),
    "at the margin, rate .9": Cell(changes=HARMFUL, rate=0.9),
    "at the margin, 99 prompts": Cell(changes=HARMFUL, rate=0.01, prompts=99),
    "at the margin, settings share seeds": Cell(changes=HARMFUL, shared=1.0),
}


@dataclass(frozen=True)
class Repair:
    """What parents, repairs of them and controls are like; a control differs from its repair by
    chance only."""

    parent: float  # rate
    repaired: float
    parent_sd: float = 0.6  # probits
    own_sd: float = 0.1
    kept: float = 0.0  # of the parent's deviation, by its repair and control
    seeds: int = 5
    prompts: int = 44
    bases: int = 4


REPAIRS = {
    "repairs that work": Repair(0.35, 0.02),
    "repairs that do harm": Repair(0.02, 0.35, parent_sd=0.1, own_sd=0.6),
    "repairs without effect": Repair(0.10, 0.10, parent_sd=0.8, own_sd=0.02),
    "repairs without effect that keep the parent's error": Repair(0.35, 0.35, kept=1.0),
    "repairs without effect, three seeds": Repair(0.15, 0.15, kept=0.5, seeds=3, prompts=165),
}
FEW = {"one seed", "two seeds", "unequal seeds", "one base with few seeds"}  # below three somewhere


# ---- verdicts
class Simulated(NamedTuple):
    """Verdicts with what is true of them, in shares."""

    variants: pd.DataFrame  # as the tables have them
    values: pd.DataFrame  # [runs, prompts] of 1 and 0, NaN where unscored
    true: pd.DataFrame  # the same without the judge's errors
    rates: pd.DataFrame  # run_id: of runs and prompts like these, of runs like these on these
    # prompts, and of this run on prompts like these


def simulated(rng: np.random.Generator, cell: Cell) -> Simulated:
    """One study of a cell; with another base model, `new`, where base models differ."""
    family = np.arange(cell.prompts) % cell.families if cell.families else None
    effect = partial(_effect, rng, family, cell.prompts)
    by_prompt, by_base, by_method, noise = cell.shares
    prompt = effect(by_prompt)
    own, lines, latent, exact = [effect(by_method) for _ in METHODS], [], [], []
    names = [f"base{b}" for b in range(cell.bases)] + (["new"] if cell.base_sd else [])
    for b, base in enumerate(names):
        here = prompt + effect(by_base)
        middle = ndtri(cell.rate) + cell.base_sd * rng.normal()
        lines.append((base, "none", np.nan, 1))
        latent.append(middle + here + np.sqrt(by_method + noise) * rng.normal(size=cell.prompts))
        exact.append((ndtr(middle), (latent[-1] > 0).mean(), ndtr(middle)))
        for m, method in enumerate(METHODS):
            sd = cell.run_sds[m]
            moved, common = (
                cell.base_sd * rng.normal() / 2,
                rng.normal(size=max(map(max, cell.seeds))),
            )
            for s, n in enumerate(cell.seeds[b % len(cell.seeds)]):
                goal = ndtr(middle) + (cell.changes[m] + cell.by_setting[s]) / 100
                goal = ndtr(ndtri(np.clip(goal, 1e-6, 1 - 1e-6)) + moved)
                at = ndtri(goal) * np.hypot(1, sd)
                for i in range(n):
                    alone = np.sqrt(1 - cell.shared) * rng.normal()
                    run = at + sd * (np.sqrt(cell.shared) * common[i] + alone)
                    lines.append((base, method, 10.0 ** (s - 5), i + 1))
                    latent.append(
                        run + here + own[m] + np.sqrt(noise) * rng.normal(size=cell.prompts)
                    )
                    on_these = ndtr((at + here + own[m]) / np.hypot(np.sqrt(noise), sd)).mean()
                    exact.append((goal, on_these, ndtr(run)))
    return _as_tables(rng, cell, lines, np.array(latent) > 0, exact, family)


def _effect(
    rng: np.random.Generator, family: np.ndarray | None, n: int, share: float
) -> np.ndarray:
    """A normal effect [n] with this variance, part of it the family's where there are families."""
    if family is None:
        return np.sqrt(share) * rng.normal(size=n)
    together = np.sqrt(FAMILY_PART * share) * rng.normal(size=family.max() + 1)[family]
    return together + np.sqrt((1 - FAMILY_PART) * share) * rng.normal(size=n)


def _as_tables(
    rng: np.random.Generator, cell: Cell, lines: list, unsafe: np.ndarray, exact: list, family
) -> Simulated:
    """The verdicts as the product reads them; runs of a seed say so where they share something."""
    frame = pd.DataFrame(lines, columns=["base_model", "method", "learning_rate", "repetition"])
    run_ids = pd.Index([f"r{i:03d}" for i in range(len(frame))], name="run_id")
    seed = frame["repetition"] if cell.shared else np.arange(len(frame))
    frame = frame.assign(run_id=run_ids, seed=seed, objective="sft", init=None, mitigation=None)
    frame = frame.assign(dataset="d", epochs=1, settings="{}", status="ok", no_op=False)
    frame.loc[frame["method"].eq("none"), "objective"] = "none"
    prompts = [f"p{j:03d}" for j in range(cell.prompts)]
    stratum = [f"c{0 if cell.families else j % 11:02d}" for j in range(cell.prompts)]
    groups = prompts if family is None else [f"f{f:02d}" for f in family]
    names = ["category", "family", "prompt_id"]
    columns = pd.MultiIndex.from_arrays([stratum, groups, prompts], names=names)
    true = pd.DataFrame(unsafe.astype(float), run_ids, columns).sort_index(axis=1)
    values = true
    if cell.judged:
        base = frame["method"].eq("none").to_numpy()[:, None]
        right = np.where(true > 0, np.where(base, *SENSITIVITY), np.where(base, *SPECIFICITY))
        values = true.where(rng.uniform(size=true.shape) < right, 1 - true)
    if cell.unscored:
        values = values.mask(rng.uniform(size=values.shape) < cell.unscored)
    rates = pd.DataFrame(exact, run_ids, ["like", "these prompts", "these runs"])
    return Simulated(frame, values, true, rates)


# ---- through the product
class Found(NamedTuple):
    """What one study said."""

    intervals: list[tuple]  # kind, where, low, high, truth, p
    errors: list[tuple]  # which error, where, whether it was made


def examined(rng: np.random.Generator, cell: Cell) -> Found:
    """One study of a cell: every kind of interval against its truth, every family's errors.

    Kinds that take time are of the first base model only, and of all together.
    """
    study = simulated(rng, cell)
    if cell.judged:
        return Found(list(_corrected(rng, study)), [])
    variants = study.variants[study.variants["base_model"].ne("new")]
    states = ["status", "no_op"]
    arms = influence.arms(variants.drop(columns=states), variants[["run_id", *states]])
    cells = influence.cells(arms)
    cells = cells[cells["group"].eq(terms.AS_CONFIGURED)]
    if cell.bases == 1:
        cells = cells[cells["base_model"].ne("all")]
    values = study.values.loc[variants["run_id"]]
    scores = influence.paired(values, arms)
    estimates = estimation.means(scores, cells, terms.CHANGE, **NAMES)
    truth = Truth(study, arms, cells)
    if cell.at_margin:
        return Found(list(_against(estimates, truth)), _words(estimates))
    group, some = (terms.AS_CONFIGURED,), cells[cells["base_model"].isin(["all", "base0"])]
    contrasts = comparisons.between(scores, some, group, **NAMES)
    every = [estimates, contrasts, comparisons.interactions(scores, cells, group, **NAMES)]
    by_setting = comparisons.settings(scores, arms, **NAMES)
    every.append(by_setting[by_setting["base_model"].isin(cells["base_model"])])
    every.append(estimation.means(influence.shares(values), some, terms.LEVEL, **NAMES))
    every.append(estimation.levels(values, arms, **NAMES))
    every.append(comparisons.odds_ratios(values, arms, some, group, **NAMES))
    found = [line for rows in every for line in _against(rows, truth)]
    found += _naive(study, arms, cells, truth)
    if cell.base_sd:
        found += _predicted(study, estimates)
    return Found(found, _families(estimates, contrasts) if cell.null else [])


class Truth:
    """What the rows of `estimates` are about, in points or as an odds ratio."""

    def __init__(self, study: Simulated, arms: pd.DataFrame, cells: pd.DataFrame):
        runs = arms[arms["arm"].ne("base")].set_index("run_id")
        columns = ["base_model", "method", "learning_rate", "base_run_id"]
        self._runs, self._rates = runs[columns].astype(object), study.rates
        rates = {name: study.rates[name].to_dict() for name in study.rates}
        bases = dict(zip(self._runs["base_model"], self._runs["base_run_id"], strict=True))
        self._base = {base: rates["like"][run] for base, run in bases.items()}
        self._of = {name: pd.Series(of, dtype=float) for name, of in rates.items()}
        own = self._runs["base_run_id"].to_dict()
        self._change = {
            name: {run: of[run] - of[base] for run, base in own.items()}
            for name, of in rates.items()
        }
        self._weights = {
            key: list(zip(part["pool"], part["run_id"], part["weight"], strict=True))
            for key, part in cells.groupby(["base_model", "method"], sort=False)
        }

    def of(self, line: dict) -> float:
        """The truth of one row."""
        at = (line["base_model"], line["method"])
        if line["method"] == "none":
            return 100 * self._base[at[0]]
        if line["contrast"] == comparisons.ODDS:
            return self._odds(*at)
        column = "these runs" if "these runs" in str(line["population"]) else "like"
        column = "these prompts" if line["contrast"] == terms.CHANGE_HERE else column
        if line["contrast"] == comparisons.RATE:
            return self._by_setting(*at, column)
        if line["contrast"] == terms.LEVEL:
            return self._mean(*at, self._of[column])
        value = self._mean(*at, self._change[column])
        if line["contrast"] == comparisons.DIFFERENCE:
            value -= self._mean(at[0], line["against"], self._change[column])
        if line["contrast"] == comparisons.INTERACTION:
            value -= self._mean("all", at[1], self._change[column])
        return value

    def _mean(self, base_model: str, method: str, of: Mapping) -> float:
        return 100 * sum(weight * of[run] for _, run, weight in self._weights[base_model, method])

    def _by_setting(self, base_model: str, method: str, column: str) -> float:
        own = self._runs[self._runs["method"].eq(method)]
        if base_model != "all":
            own = own[own["base_model"].eq(base_model)]
        of = 100 * own.index.to_series().map(self._change[column])
        means = of.groupby([own["base_model"], own["learning_rate"]]).mean().unstack()
        return float((means.iloc[:, -1] - means.iloc[:, 0]).mean())

    def _odds(self, base_model: str, method: str) -> float:
        logs = []
        own = pd.DataFrame(self._weights[base_model, method], columns=["pool", "run", "weight"])
        for pool, part in own.groupby("pool"):
            rate = np.average(self._of["like"][part["run"]], weights=part["weight"])
            base = self._base[pool]
            logs.append(np.log(rate / (1 - rate)) - np.log(base / (1 - base)))
        return float(np.exp(np.mean(logs)))


def _against(rows: pd.DataFrame, truth: Truth) -> Iterable[tuple]:
    """kind, where, low, high, truth and p of rows of `estimates`."""
    for line in rows.to_dict("records"):
        kind = KINDS[line["contrast"]] if line["method"] != "none" else "level of a base model"
        where = EVERY if line["base_model"] == "all" else ONE
        yield kind, where, line["ci_low"], line["ci_high"], truth.of(line), line["p"]


def _naive(study: Simulated, arms: pd.DataFrame, cells: pd.DataFrame, truth: Truth) -> list[tuple]:
    """The intervals of a change that take all verdicts for independent: what they miss."""
    shares, found = study.values.mean(axis=1), []
    base = arms.set_index("run_id")["base_run_id"]
    own = cells[cells["base_model"].ne("all")]
    for (base_model, method), cell in own.groupby(["base_model", "method"], sort=False):
        rate, n = shares[cell["run_id"]] @ cell["weight"].to_numpy(), study.values.shape[1]
        other = shares[base[cell["run_id"].iloc[0]]]
        variance = rate * (1 - rate) / (n * len(cell)) + other * (1 - other) / n
        half = 100 * ndtri(UPPER) * np.sqrt(variance)
        line = {"base_model": base_model, "method": method, "population": terms.BOTH}
        true = truth.of(line | {"contrast": terms.CHANGE})
        value = 100 * (rate - other)
        found.append((NAIVE, ONE, value - half, value + half, true, np.nan))
    return found


def _predicted(study: Simulated, estimates: pd.DataFrame) -> list[tuple]:
    """The prediction for another base model against what is measured on one."""
    own = study.variants[study.variants["base_model"].eq("new")]
    rates = (
        100 * study.values.loc[own["run_id"]].mean(axis=1).groupby(own["method"].to_numpy()).mean()
    )
    return [
        (PREDICTED, EVERY, line.ci_low, line.ci_high, rates[line.method] - rates["none"], np.nan)
        for line in comparisons.new_base(estimates).itertuples()
    ]


def _families(estimates: pd.DataFrame, contrasts: pd.DataFrame) -> list[tuple]:
    """Whether some test of a Holm family, of which every null holds, came out significant."""
    found = []
    changes = estimates[estimates["contrast"].eq(terms.CHANGE)]
    for name, rows in (("changes", changes), (DIFFERENCE, contrasts)):
        for where, is_all in ((EVERY, True), (ONE, False)):
            family = rows[rows["base_model"].eq("all").eq(is_all)]
            if len(family):
                tests = comparisons.declared(family, name)
                here = tests["population"].str.contains("these runs")  # which may well differ
                p = tests["p_adjusted"].astype(float).mask(here)
                found.append((f"Holm family: {name}", where, bool((p < ALPHA).any())))
    return found


def _words(estimates: pd.DataFrame) -> list[tuple]:
    """Whether some cell of a family is said to preserve, or not to, with the harm at the margin."""
    key = (terms.UNSAFE, "safety")
    rows = noninferiority.preserves(estimates, (MARGIN,), (key,))
    rows, found = rows[rows["outcome"].eq(terms.UNSAFE)], []
    for where, is_all in ((EVERY, True), (ONE, False)):
        said = rows.loc[rows["base_model"].eq("all").eq(is_all), "how"].str
        for word in (noninferiority.PRESERVES, noninferiority.DOES_NOT):
            if len(rows):
                found.append((f"false '{word}'", where, bool(said.startswith(word).any())))
    return found


def _corrected(rng: np.random.Generator, study: Simulated) -> Iterable[tuple]:
    """Rates corrected by labels of some answers, of a judge that errs."""
    long = study.values.droplevel(["category", "family"], axis=1).stack().rename("said")
    answers = long.reset_index().merge(study.variants[["run_id", "base_model", "method"]])
    unsafe = answers["said"].eq(1)
    sure = rng.beta(8, 1.5, len(answers))
    given = {"unsafe": unsafe.astype("boolean"), "p_unsafe": np.where(unsafe, sure, 1 - sure)}
    answers = answers.assign(benchmark="safety", **given)
    drawn = labelling.draw(answers, LABELS, int(rng.integers(2**31)))
    true = study.true.droplevel(["category", "family"], axis=1).stack().eq(1).rename("true")
    words = drawn.merge(true.reset_index(), on=["run_id", "prompt_id"])
    labels = words.assign(label=words["true"].map({True: "unsafe", False: "safe"}))
    method = study.variants.set_index("run_id")["method"]
    here = 100 * study.true.mean(axis=1).groupby(method).mean()
    like = 100 * study.rates["these runs"].groupby(method).mean()
    for line in labelling.corrected(answers, labels, drawn).itertuples():
        of = here if line.population == labelling.THESE else like
        truth = of[line.method] - (of["none"] if line.contrast == terms.CHANGE else 0.0)
        low, high = line.value - line.below, line.value + line.above
        kind = f"{KINDS[line.contrast]} {line.estimator}, {line.population}"
        yield kind, ONE, low, high, truth, np.nan


def repaired(rng: np.random.Generator, repair: Repair) -> Found:
    """One study of repairs: each run against its own parent, and minus its own control."""
    lines, verdicts = [], []
    prompt = np.sqrt(0.6) * rng.normal(size=repair.prompts)
    for b, i in product(range(repair.bases), range(repair.seeds)):
        parent = rng.normal()
        sds = [(1.0, repair.parent_sd, 0.0)] + 2 * [(repair.kept, repair.parent_sd, repair.own_sd)]
        for name, (kept, sd, own), rate in zip(
            ("parent", "repair", "control"),
            sds,
            (repair.parent, *2 * [repair.repaired]),
            strict=True,
        ):
            run = kept * sd * parent + own * rng.normal()
            latent = ndtri(rate) * np.sqrt(1 + (kept * sd) ** 2 + own**2) + run + prompt
            lines.append((f"{name}{b}{i}", name, f"base{b}", i))
            verdicts.append(latent + np.sqrt(0.4) * rng.normal(size=repair.prompts) > 0)
    frame = pd.DataFrame(lines, columns=["run_id", "name", "base_model", "seed"])
    ids = [f"p{j:03d}" for j in range(repair.prompts)]
    columns = pd.MultiIndex.from_arrays([["c"] * len(ids), ids], names=["category", "prompt_id"])
    values = pd.DataFrame(np.array(verdicts, float), pd.Index(frame["run_id"]), columns)
    own = frame[frame["name"].eq("repair")].assign(method="lora", objective="sft", setting="x")
    own["cluster"] = influence.seed_clusters(own, own["setting"])
    own = own.assign(pool=own["base_model"], group=terms.MITIGATION, member="repair")
    own["weight"] = influence.setting_weights(own)
    cells = [own, own.assign(base_model="all", weight=own["weight"] / repair.bases)]
    found = []
    for against, truth in (("parent", 100 * (repair.repaired - repair.parent)), ("control", 0.0)):
        arms = pd.DataFrame({"run_id": own["run_id"], "arm": "repaired"})
        arms["base_run_id"] = own["run_id"].str.replace("repair", against)
        rows = estimation.means(
            influence.paired(values, arms), pd.concat(cells), f"- {against}", **NAMES
        )
        for line in rows.itertuples():
            where = EVERY if line.base_model == "all" else ONE
            kind = f"repair minus its own {against}"
            found.append((kind, where, line.ci_low, line.ci_high, truth, line.p))
    errors = [
        (f"p below {ALPHA:g}: {kind}", where, bool(p < ALPHA))
        for kind, where, _, _, truth, p in found
        if truth == 0 and not pd.isna(p)
    ]
    return Found(found, errors)


# ---- tables
def calibration(
    n_sets: int = 40, seed: int = 0, names: Sequence[str] = (*GRID, *REPAIRS)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Coverage of the 95 % intervals, and error rates: a row per cell, kind and where, in percent.

    Coverage has n (intervals), none (that had no ends), covered, too_high and too_low (the interval
    lies above or below the truth), width (median), se (of covered, over sets). Errors have n
    (families or tests) and percent. Each cell has random numbers of its own, so that it comes out
    alike in whatever company.

    Of all 30 cells with 40 sets each, with three or more seeds: changes are covered in 94.4 to
    100 % (verdicts taken as independent: 24 to 86 %), levels in 91.9 to 99.4 %, differences of
    methods in 93.3 to 100 %; lowest are odds ratios at a rate of .01 (82.1 %) and repairs that do
    harm against their own parents (87.5 %, of 40). No false "preserves" in 480 families, and errors
    in 0 to 5 % of Holm's families of true nulls. Of a judge that errs, rates are covered in 44 %,
    and in 96 % once corrected by labels. With more sets: where runs differ widely (SKEWED, 120)
    changes are covered in 93 %; where settings share seeds (100), 6 % of the families of changes
    have an error.

    Raises:
        ValueError: the grid has no such cell.
    """
    cells = GRID | REPAIRS
    if unknown := [name for name in names if name not in cells]:
        raise ValueError(f"the grid has no cell {unknown[0]!r}; it has {', '.join(cells)}")
    held, errors = [], []
    for name in names:
        rng = np.random.default_rng([seed, crc32(name.encode())])
        work = examined if name in GRID else repaired
        for number in range(n_sets):
            found = work(rng, cells[name])
            held += [(name, number, *line) for line in found.intervals]
            errors += [(name, *line) for line in found.errors]
        print(f"{name}: {n_sets} sets", flush=True)
    made = pd.DataFrame(errors, columns=[*CELL, "made"])
    of = made.groupby(CELL, sort=False)["made"]
    made = of.agg(n="size", percent="mean").reset_index()
    return _held(pd.DataFrame(held, columns=["cell", "number", *CELL[1:], *OF])), made.assign(
        percent=100 * made["percent"]
    )


def _held(lines: pd.DataFrame) -> pd.DataFrame:
    """How often the intervals hold the truth, of those that are there."""
    low, high, truth = (lines[name].astype(float) for name in ("low", "high", "truth"))
    there = low.notna() & high.notna()
    error = 1e-9 * np.maximum(1.0, truth.abs())  # of the arithmetic
    lines = lines.assign(too_high=low > truth + error, too_low=high < truth - error)
    lines = lines.assign(covered=~lines["too_high"] & ~lines["too_low"], width=high - low)
    of = lines[there].groupby(CELL, sort=False)
    shares = 100 * of[["covered", "too_high", "too_low"]].mean()
    none = (~there).groupby([lines[name] for name in CELL], sort=False).sum()
    by_set = 100 * lines[there].groupby([*CELL, "number"], sort=False)["covered"].mean()
    se = by_set.groupby(level=CELL, sort=False).sem()
    found = shares.assign(se=se, width=of["width"].median(), n=of.size(), none=none)
    return found.reset_index()


def calibration_rows(n_sets: int = 40) -> list[dict]:
    """Lines of `make bench`: of each kind of interval the worst and the highest cell with three or
    more seeds; the largest of each kind of error. The tables lie in outputs/bench.
    """
    held, errors = calibration(n_sets)
    write(held, errors)
    return summary(held, errors)


def write(held: pd.DataFrame, errors: pd.DataFrame) -> None:
    """calibration.csv and calibration_errors.csv in outputs/bench."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, table in (("calibration", held), ("calibration_errors", errors)):
        with replacing(FOLDER / f"{name}.csv") as new:
            table.to_csv(new, index=False, float_format="%.4g")


def summary(held: pd.DataFrame, errors: pd.DataFrame) -> list[dict]:
    """The worst cells of both tables as lines of the bench's result."""
    rows, peers = [], held[held["kind"].eq(NAIVE)].set_index("cell")["covered"]
    enough = held[~held["cell"].isin(FEW) & held["kind"].ne(NAIVE)]
    for kind, part in enough.groupby("kind", sort=False):
        usual = part[part["cell"].ne(SKEWED)]
        chosen = [("lowest", part, "idxmin", 0.92), ("highest", part, "idxmax", 0.98)]
        if 0 < len(usual) < len(part):
            chosen.insert(1, (f"lowest without '{SKEWED}'", usual, "idxmin", 0.92))
        for word, of, which, goal in chosen:
            one = of.loc[getattr(of["covered"], which)()]
            where = f"{word} of {len(of)}: {one['cell']}, {one['where']}, {one['n']} intervals"
            where += f" (simulation's error {one['se']:.1f} points)"
            peer = peers.get(one["cell"]) if kind == KINDS[terms.CHANGE] else None
            more = {"peer": None if peer is None else peer / 100, "least": word != "highest"}
            goal = None if "by the judge" in kind else goal
            rows.append(
                row(f"coverage: {kind}", where, one["covered"] / 100, goal, "share", **more)
            )
    for kind, part in errors.groupby("kind", sort=False):
        goals = {"largest": 0.05 if kind.startswith("false") else 0.06}
        goals |= {"smallest": 0.03} if kind.startswith("p below") else {}
        for word, goal in goals.items():
            largest = word == "largest"
            one = part.loc[part["percent"].idxmax() if largest else part["percent"].idxmin()]
            where = f"{word} of {len(part)}: {one['cell']}, {one['where']} ({one['n']})"
            rows.append(row(kind, where, one["percent"] / 100, goal, "share", least=not largest))
    return rows


if __name__ == "__main__":
    try:
        tables = calibration(int(sys.argv[1]), names=sys.argv[2:] or (*GRID, *REPAIRS))
    except (IndexError, ValueError) as problem:
        sys.exit(f"python -m bench.calibration SETS [CELL ...]: {problem}")
    write(*tables)
    for table in tables:
        print(table.round(1).to_string(index=False))
