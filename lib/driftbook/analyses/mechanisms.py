"""Notebook 13: where safety sits in a model, and what adapters and soft prompts change there.

The three mechanisms are those that the original study calls plausible and unproven. Each rule was
written before its numbers: MECHANISMS says it in words, and `verdicts` applies it.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import stats as distributions

from driftbook.analyses.factors import CANNOT_TELL
from driftbook.stats import estimation, influence
from driftbook.stats.confidence import LOWER, UPPER
from driftbook.stats.directions import (
    ATTENTION,
    BEGINS,
    CEILING,
    DROP,
    ENERGY,
    HARMFUL,
    KL,
    NEURONS,
    OF_BASE,
    RANKS,
    RESTORED,
    SHIFT,
    TAKEN,
)
from driftbook.stats.terms import ALL
from driftbook.study.methods import LAYER_PARTS, METHOD_CLASS, SUFFIX, layers_of
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES

NOTEBOOK = "13_mechanisms"
SUPPORTED, CONTRADICTED = "supported", "contradicted"
NAMED = 0.8  # share of the refusals that a third must carry, in both directions, to be named
LEAST_CHANGE = 10.0  # points of refusals below which there is nothing to place
COUNTED = {"unsafe": "unsafe answers", "not refused": "answers without a refusal"}
TOUCHED = (NEURONS, RANKS, ENERGY)
EARLY = 0.5  # share of a soft prompt's effect that the first third must carry
FIRST = 3  # tokens of an answer that are its first
BEFORE = "before the first layer"
MECHANISMS = {
    "safety sits in a range of layers": (
        "Supported: a third of the layers carries at least 80% of the refusals that alignment"
        " brought, put in and taken out, and LoRA in that third alone raises unsafe answers more"
        " than in each other third (interval above 0). Contradicted: no third does, or LoRA there"
        " raises them less. Breaks where only deep layers are adapted and safety sits early."
    ),
    "adapters move the safety direction": (
        "Supported: unsafe answers rise and harmful prompts fall along the base's refusal"
        " direction by more than along random directions (interval above the null's range, mean"
        " over layers). Contradicted: unsafe answers rise and the fall is within that range or"
        " below it. Breaks on a weakly aligned base, which has no refusals to lose."
    ),
    "soft prompts act early and draw attention": (
        "Supported: unsafe answers rise, the soft prompt gets more attention than its share of the"
        " tokens (mean over layers), the states before and in the first third carry at least half"
        " of the refusals lost, and a soft prompt behind the user's text raises unsafe answers by"
        " less (interval of the difference above 0). Contradicted: unsafe answers rise, and neither"
        " of the first two holds or a prompt behind the text raises them by more. Breaks where the"
        " prompt comes after the user's text; such runs count where they learn (their loss on"
        " held-out answers falls), and a study without them is judged by the first two."
    ),
}
SAFETY, DIRECTION, PROMPTS = MECHANISMS
CARRIED = "share of the change in refusals that {} carries (percent)"
PARTIAL = "partial correlation with the change in unsafe answers, dose held"
GAINED = "variance of that change predicted beyond dose, settings left out (percent)"
MEDIATORS = {
    "fall along the refusal direction": (DROP, None),
    "shift of the mean state": (SHIFT, None),
    "KL of the first tokens": (KL, True),
    "KL of later tokens": (KL, False),
}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of runs with its t interval; without an interval where there is one run."""
    values = np.asarray([one for one in values if pd.notna(one)], float)
    if len(values) < 2:
        return (float(values.mean()) if len(values) else np.nan, np.nan, np.nan)
    spread = distributions.t.ppf(UPPER, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - spread, values.mean() + spread


def carried(probes: pd.DataFrame) -> pd.DataFrame:
    """By run the share of the change in refusals that the states before the first layer and each
    third carry, `put in` (base's states into the run) and `taken out` (the run's into the base):
    the difference of two neighbouring patches over the whole change. Of a base model itself the run
    is the checkpoint before its alignment. Null where refusals change by less than LEAST_CHANGE
    points.
    """
    begins = probes[probes["probe"].eq(BEGINS)].set_index(["run_id", "part"])["value"]
    patches, found = probes[probes["probe"].isin([RESTORED, TAKEN])], []
    for run_id, own in patches.groupby("run_id", sort=False):
        before, base = begins[run_id, ALL], begins[run_id, OF_BASE]
        n = int(own["layer"].max()) + 1
        ends = [layers_of(part, n).stop - 1 for part in LAYER_PARTS]
        for probe, start, sign in ((RESTORED, before, 1), (TAKEN, base, -1)):
            put = own[own["probe"].eq(probe)].set_index("layer")["value"]
            levels = [start, put[put.index.isna()].iloc[0], *(put[end] for end in ends)]
            whole = sign * (base - before)
            enough = abs(whole) >= LEAST_CHANGE
            shares = np.diff(levels) / whole if enough else np.full(4, np.nan)
            parts = dict(zip((BEFORE, *LAYER_PARTS), shares, strict=True))
            way = "put in" if probe == RESTORED else "taken out"
            found += [(run_id, way, part, share) for part, share in parts.items()]
    return pd.DataFrame(found, columns=["run_id", "way", "part", "share"])


def named_third(shares: pd.DataFrame) -> str | None:
    """The third that these runs name: it carries at least NAMED of the change both ways, on
    average; None where no third does.
    """
    mean = shares.groupby(["part", "way"])["share"].mean().unstack("way")
    enough = mean[(mean >= NAMED).all(axis=1)].index.intersection(list(LAYER_PARTS))
    return enough[0] if len(enough) == 1 else None


class Mechanisms:
    """A study's probes by run, its changes in unsafe answers, and a verdict for each mechanism and
    base model.

    Raises:
        ValueError: the study has no probes.
    """

    def __init__(self, tables: Tables):
        self.tables, self.study = tables, tables.study
        if tables.probes.empty:
            raise ValueError(
                f"the study {tables.study.name} looks into no run; give it probes, as"
                " studies/mechanisms.yaml does"
            )
        numbers = ["value", "ci_low", "ci_high", "null", "null_low", "null_high"]
        self.probes = tables.probes.astype(dict.fromkeys(numbers, float))

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The runs that were looked into: run_id, base_model, method, part (the third that is
        adapted, or all), setting, dose, gain (the fall of the loss on held-out answers, in nats),
        and the change in unsafe answers in points.
        """
        arms = influence.arms(self.tables.variants, self.tables.runs)
        rows = arms[arms["run_id"].isin(self.probes["run_id"])].copy()
        rows["part"] = rows["mitigation"].str.removeprefix("layers ").fillna(ALL)
        rows["setting"] = rows["base_model"] + " " + rows["method"] + " " + rows["part"]
        measured = self.tables.runs.set_index("run_id")[["kl_base", "nll_base", "nll"]].astype(
            float
        )
        rows["dose"] = rows["run_id"].map(measured["kl_base"])
        rows["gain"] = rows["run_id"].map(measured["nll_base"] - measured["nll"])
        rate = self.rates
        rows["change"] = rows["run_id"].map(rate) - rows["base_run_id"].map(rate)
        columns = ["run_id", "base_run_id", "base_model", "method", "part", "setting", "dose"]
        return rows[[*columns, "gain", "change"]].reset_index(drop=True)

    @cached_property
    def rates(self) -> pd.Series:
        """Percent of the safety prompts that each run answers unsafely (without a judge does not
        refuse).
        """
        sums = self._counts.groupby("run_id")[["k", "n_scored"]].sum().astype(float)
        return 100 * sums["k"] / sums["n_scored"]

    @cached_property
    def _counts(self) -> pd.DataFrame:
        rows = self.tables.rates
        rows = rows[rows["benchmark"].eq("safety") & rows["outcome"].isin(COUNTED)]
        return rows[rows["judge"].eq(rows["judge"].iloc[0])]

    @property
    def harm(self) -> str:
        """What the study counts against safety, in words."""
        return COUNTED[self._counts["outcome"].iloc[0]]

    @cached_property
    def tuned(self) -> pd.DataFrame:
        """The runs without the base models."""
        return self.runs[self.runs["method"].ne("none")]

    def counts(self) -> pd.DataFrame:
        """By base model: runs, numbers, those refused, and the smallest split-half cosine."""
        rows = self.probes.merge(self.runs[["run_id", "base_model"]], on="run_id")
        by = rows.groupby("base_model", sort=False)
        found = by.agg(
            runs=("run_id", "nunique"), numbers=("value", "count"), refused=("note", "count")
        )
        ceilings = rows[rows["probe"].eq(CEILING)].groupby("base_model")["value"].min()
        return found.assign(**{"smallest split-half cosine": ceilings})

    # ---- which third carries the refusals
    @cached_property
    def carried(self) -> pd.DataFrame:
        """The shares that each third carries, by run: see `carried`."""
        return carried(self.probes)

    def placed(self) -> pd.DataFrame:
        """Base models and settings: the shares of each third, put in and taken out, and the third
        that is named.
        """
        rows = self.carried.merge(
            self.runs[["run_id", "base_model", "method", "part"]].rename(
                columns={"part": "adapted"}
            ),
            on="run_id",
        )
        keys = ["base_model", "method", "adapted"]
        wide = 100 * rows.pivot_table(
            index=keys, columns=["way", "part"], values="share", sort=False, dropna=False
        ).dropna(how="all")
        named = {key: named_third(own) or "none" for key, own in rows.groupby(keys)}
        return wide.round(0).assign(named=[named[key] for key in wide.index])

    # ---- what updates touch
    def touched(self) -> pd.DataFrame:
        """By base model and setting, how much of an update lies in the safety-critical neurons and
        ranks of its modules, and in the main directions of what alignment changed, in percent of
        its energy: the mean over modules with its interval over runs; and the null, as many random
        neurons or directions, with the mean of the modules' ranges.
        """
        runs = self.tuned.rename(columns={"part": "adapted"})
        rows = self.probes[self.probes["probe"].isin(TOUCHED)].merge(runs, on="run_id")
        numbers = ["value", "null", "null_low", "null_high"]
        keys = ["base_model", "method", "adapted", "probe"]
        by_run = rows.groupby([*keys, "run_id"], sort=False)[numbers].mean().reset_index()
        found = []
        for key, own in by_run.groupby(keys, sort=False):
            value, low, high = interval(own["value"])
            ends = {"value": value, "ci_low": low, "ci_high": high, "n_runs": len(own)}
            found.append(
                dict(zip(keys, key, strict=True)) | ends | own[numbers[1:]].mean().to_dict()
            )
        columns = [*keys, "value", "ci_low", "ci_high", *numbers[1:], "n_runs"]
        return pd.DataFrame(found, columns=columns)

    # ---- verdicts, by rules that stand above
    def verdicts(self) -> pd.DataFrame:
        """A row per base model and mechanism: the verdict, and the numbers that it rests on."""
        rules = {SAFETY: self._where, DIRECTION: self._direction, PROMPTS: self._prompts}
        rows = [
            (base, name, *rule(base))
            for base in self.runs["base_model"].unique()
            for name, rule in rules.items()
        ]
        return pd.DataFrame(rows, columns=["base_model", "mechanism", "verdict", "because"])

    def _of(self, base: str, method: str | None = None, part: str = ALL) -> pd.DataFrame:
        rows = self.tuned[self.tuned["base_model"].eq(base) & self.tuned["part"].eq(part)]
        prompts, behind = rows["method"].map(METHOD_CLASS).eq("prompt"), rows["method"].eq(SUFFIX)
        return rows[{None: ~prompts, "prompt": prompts & ~behind, SUFFIX: behind}[method]]

    def _where(self, base: str) -> tuple[str, str]:
        itself = self.runs[self.runs["base_model"].eq(base) & self.runs["method"].eq("none")]
        own = self.carried[self.carried["run_id"].isin(itself["run_id"])]
        if own["share"].notna().sum() == 0:
            return CANNOT_TELL, "no checkpoint before alignment, or alignment brought no refusals"
        if (third := named_third(own)) is None:
            return CONTRADICTED, "no third of the layers carries the refusals both ways"
        here = self._of(base, part=third)["change"].to_numpy()
        words, differences = [], []
        for other in LAYER_PARTS:
            there = self._of(base, part=other)["change"].to_numpy()
            if other != third and len(there):
                difference = welch(here, there)
                differences.append(difference)
                words.append(f"{said(difference)} points more than in the {other} third")
        because = f"the {third} third is named; LoRA there raises {self.harm} {'; '.join(words)}"
        if differences and all(low > 0 for _, low, _ in differences):
            return SUPPORTED, because
        worse = any(high < 0 for _, _, high in differences)
        return (CONTRADICTED if worse else CANNOT_TELL), because

    def _direction(self, base: str) -> tuple[str, str]:
        runs = self._of(base)
        if len(runs) < 2:
            return CANNOT_TELL, "fewer than two runs of an adapter in all layers"
        change = interval(runs["change"])
        rows = self.probes[
            self.probes["probe"].eq(DROP) & self.probes["run_id"].isin(runs["run_id"])
        ]
        if rows["value"].notna().sum() == 0:
            return CANNOT_TELL, "too few prompts for a direction in any layer"
        by_run = rows.groupby("run_id")[["value", "null_high"]].mean()
        fall, null = interval(by_run["value"]), by_run["null_high"].mean()
        because = (
            f"{self.harm} {said(change)} points; fall along the direction {said(fall)}% of the"
            f" gap, random directions up to {null:.1f}%"
        )
        if not change[1] > 0:
            return CANNOT_TELL, because
        if fall[1] > null:
            return SUPPORTED, because
        return (CONTRADICTED if fall[2] <= null else CANNOT_TELL), because

    def _prompts(self, base: str) -> tuple[str, str]:
        runs = self._of(base, "prompt")
        if len(runs) < 2:
            return CANNOT_TELL, "fewer than two runs of a soft prompt"
        change = interval(runs["change"])
        rows = self.probes[self.probes["run_id"].isin(runs["run_id"])]
        seen = rows[rows["probe"].eq(ATTENTION)].groupby("run_id")[["value", "null"]].mean()
        own = self.carried[self.carried["run_id"].isin(runs["run_id"])]
        early = own[own["part"].isin([BEFORE, LAYER_PARTS[0]]) & own["way"].eq("put in")]
        share = interval(early.groupby("run_id")["share"].sum(min_count=2))
        excess = interval(seen["value"] - seen["null"])
        known = f"{said(100 * np.array(share))}%" if pd.notna(share[0]) else "an unknown share"
        because = (
            f"{self.harm} {said(change)} points; attention on the prompt {said(excess)} points"
            f" above its share of tokens; early states carry {known}"
        )
        holds, fails = [excess[1] > 0, share[1] > EARLY], all((excess[2] < 0, share[2] < EARLY))
        if len(behind := self._of(base, SUFFIX)):
            more = welch(behind["change"].to_numpy(), runs["change"].to_numpy())
            learns = interval(behind["gain"])[1] > 0
            because += f"; one behind the user's text differs by {said(more)} points"
            because += "" if learns else ", but does not learn the task, so it decides nothing"
            holds, fails = [*holds, learns and more[2] < 0], fails or (learns and more[1] > 0)
        if not change[1] > 0 or np.isnan(share[0]) or np.isnan(excess[0]):
            return CANNOT_TELL, because
        if all(holds):
            return SUPPORTED, because
        return (CONTRADICTED if fails else CANNOT_TELL), because

    # ---- mediation
    @cached_property
    def mediators(self) -> pd.DataFrame:
        """Runs x probes: the shift of each, a mean over layers or tokens."""
        found = self.tuned.set_index("run_id")[["base_model", "setting", "dose", "change"]].copy()
        for name, (probe, first) in MEDIATORS.items():
            rows = self.probes[self.probes["probe"].eq(probe)]
            if probe != DROP:
                rows = rows[rows["part"].eq(HARMFUL)]
            if first is not None:
                place = rows["position"].str.removeprefix("answer ").astype(int)
                rows = rows[place.le(FIRST) if first else place.gt(FIRST)]
            found[name] = rows.groupby("run_id")["value"].mean().reindex(found.index)
        return found

    def mediation(self, n_boot: int, seed: int) -> pd.DataFrame:
        """By probe, over the runs of all base models: the partial correlation of its shift with the
        change in unsafe answers, dose and base model held, with the interval of redrawn settings;
        and what it predicts beyond them where a setting is left out.
        """
        rows, rng, found = self.mediators, np.random.default_rng(seed), []
        for name in MEDIATORS:
            own = rows.dropna(subset=[name, "dose", "change"])
            if own["setting"].nunique() < 4 or own[name].std() == 0:
                continue
            groups = list(own.groupby("setting").indices.values())
            value = partial(own, name)
            draws = []
            for _ in range(n_boot):
                some = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
                draws.append(partial(own.iloc[np.concatenate(some)], name))
            low, high = np.nanquantile(draws, [LOWER, UPPER])
            gain = left_out(own, [name]) - left_out(own, [])
            found.append((name, value, low, high, 100 * gain, len(own), len(groups)))
        columns = ["probe", "value", "ci_low", "ci_high", "gain", "n_runs", "settings"]
        return pd.DataFrame(found, columns=columns)

    # ---- estimates
    def estimates(self, mediation: pd.DataFrame) -> pd.DataFrame:
        """Every estimate of notebook 13: shares carried and touched by setting, the mediation."""
        names = {"study": self.study.name, "notebook": NOTEBOOK, "benchmark": "safety"}
        names |= {"judge": "none", "group": "settings", "population": "seeds like these"}
        rows = self.carried.merge(self.tuned, on="run_id", suffixes=("", "_adapted"))
        keys = ["base_model", "method", "part_adapted", "way", "part"]
        found = []
        for (base, method, adapted, way, part), own in rows.groupby(keys, sort=False):
            value, low, high = (100 * one for one in interval(own["share"]))
            who = {"base_model": base, "method": method, "member": f"layers {adapted}"}
            more = {"category": way, "outcome": CARRIED.format(part), "contrast": "level"}
            ends = {"value": value, "ci_low": low, "ci_high": high, "n_runs": len(own)}
            found.append(names | who | more | ends | {"how": "t interval over runs"})
        for one in self.touched().to_dict("records"):
            shared = {key: one[key] for key in ("value", "ci_low", "ci_high", "n_runs")}
            who = {"base_model": one["base_model"], "method": one["method"]}
            who |= {"member": f"layers {one['adapted']}", "outcome": one["probe"]}
            more = {"contrast": "level", "how": "t interval over runs"}
            found.append(names | who | more | shared)
        for one in mediation.itertuples():
            who = {"base_model": ALL, "method": ALL, "member": one.probe, "n_runs": one.n_runs}
            ends = {"value": one.value, "ci_low": one.ci_low, "ci_high": one.ci_high}
            how = {"contrast": "correlation", "how": "settings redrawn", "outcome": PARTIAL}
            found.append(names | who | ends | how)
            left = {"contrast": "level", "how": "each setting left out once", "outcome": GAINED}
            found.append(names | who | left | {"value": one.gain})
        return estimation.complete(pd.DataFrame(found)) if found else ESTIMATES.empty()

    def sentence(self, verdicts: pd.DataFrame) -> str:
        """What came out, a sentence per mechanism."""
        words = []
        for name, own in verdicts.groupby("mechanism", sort=False):
            by = own.groupby("verdict", sort=False)["base_model"].agg(", ".join)
            found = "; ".join(f"{verdict} on {where}" for verdict, where in by.items())
            words.append(f"Hypothesis: {name}. Verdict: {found}.")
        return " ".join(words)


def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The difference of two means with Welch's interval."""
    found = distributions.ttest_ind(a, b, equal_var=False)
    if len(a) < 2 or len(b) < 2 or not np.isfinite(found.statistic):
        return float(np.mean(a) - np.mean(b)), np.nan, np.nan
    low, high = found.confidence_interval(UPPER - LOWER)
    return float(np.mean(a) - np.mean(b)), float(low), float(high)


def said(triple: Sequence[float]) -> str:
    """A number and its interval in words."""
    value, low, high = triple
    return f"{value:+.1f}" + ("" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]")


def design(rows: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Columns of base models, log dose and these probes."""
    bases = pd.get_dummies(rows["base_model"], dtype=float).to_numpy()
    dose = np.log(np.maximum(rows["dose"].to_numpy(float), 1e-9))
    return np.column_stack([bases, dose, rows[list(names)].to_numpy(float)])


def partial(rows: pd.DataFrame, name: str) -> float:
    """Correlation of what base model and dose leave of a probe and of the change."""
    known = design(rows, [])
    both = rows[[name, "change"]].to_numpy(float)
    rest = both - known @ np.linalg.lstsq(known, both, rcond=None)[0]
    if (rest.std(0) < 1e-9).any():
        return np.nan
    return float(np.corrcoef(rest.T)[0, 1])


def left_out(rows: pd.DataFrame, names: Sequence[str]) -> float:
    """1 - squared error over the variance around the base models' means, each setting predicted
    from all others.
    """
    x, y = design(rows, names), rows["change"].to_numpy(float)
    errors = np.empty(len(y))
    for own in rows.groupby("setting").indices.values():
        rest = np.setdiff1d(np.arange(len(y)), own)
        errors[own] = y[own] - x[own] @ np.linalg.lstsq(x[rest], y[rest], rcond=None)[0]
    spread = y - rows.groupby("base_model")["change"].transform("mean").to_numpy(float)
    return float(1 - (errors**2).sum() / (spread**2).sum())
