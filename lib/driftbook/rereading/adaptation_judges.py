"""What the second study's human labels can say of its judges' errors, and what they cannot.

The labelled answers were drawn by their three verdicts: five of each of five groups in each attack
and family. Among answers with the same three verdicts (a pattern) the draw does not depend on
whether an answer is harmful, so the share of harmful answers of each pattern can be estimated, and
sensitivity or a false-positive rate cannot, since how often each pattern occurs was not published.
What was published is each judge's rate in each cell: three equations for the shares of eight
patterns. Their solutions bound the rate of harmful answers (a linear programme), and raking picks
one of them.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import linprog

from driftbook.rereading.adaptation_published import black_box, confusion
from driftbook.rereading.adaptation_study import (
    ADAPTATION_NAME,
    ADAPTATION_NOTEBOOK,
    CONFIGS,
    JUDGES,
    LABELLED_BENCHMARK,
    PLAIN,
    TUNED,
    AdaptationData,
)
from driftbook.stats.confidence import ALPHA, CONFIDENCE, LOWER, UPPER
from driftbook.stats.estimation import complete
from driftbook.stats.intervals import wilson
from driftbook.stats.terms import CHANGE, LEVEL, PRIMARY

HARMFUL, OVER_REFUSED = "harmful answers (percent)", "over-refusals (percent)"
SENSITIVITY, FALSE_ALARMS, PRECISION_OF = (
    "sensitivity (percent)",
    "false-positive rate (percent)",
    "precision (percent)",
)
OF_PATTERN = "harmful answers of a pattern of verdicts (percent)"
BOUNDED, BOUNDED_WIDE, UNRELATED, OWN_SHARES, BY_ATTACK, SAID, ENRICHED = (
    "bounds",
    "bounds, shares uncertain",
    "raked from independence",
    "raked, each side's own labels",
    "raked, each attack's own labels",
    "the judge's own rate",
    "as sampled",
)
TIPPING = "fall of the precision that would leave no change"
PRECISION_CHANGE = "precision of its positives less the base model's"
THESE_RATES = "these runs, answers like those labelled"
HUMANS = "human labels"
PATTERNS = ["".join(one) for one in product("01", repeat=len(JUDGES))]
VERDICTS_OF = np.array([[int(sign) for sign in one] for one in PATTERNS])  # [patterns, judges]
LEAST_LABELLED = 5  # answers behind a published share
_TURNS, _EXACT = 1000, 1e-12  # of raking


# ---- shares of harmful answers by pattern
@dataclass(frozen=True)
class Shares:
    """For each pattern, in the order of PATTERNS: k harmful of n labelled alike by both people, and
    how many of it were drawn, disagreements included.
    """

    k: np.ndarray
    n: np.ndarray
    drawn: np.ndarray

    @property
    def value(self) -> np.ndarray:
        """The share of harmful; a half where nothing was labelled."""
        return np.where(self.n > 0, self.k / np.maximum(self.n, 1), 0.5)

    def ends(self, level: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
        """Wilson limits; 0 and 1 where nothing was labelled."""
        low, high = wilson(self.k, self.n, level)
        return np.where(self.n > 0, low, 0.0), np.where(self.n > 0, high, 1.0)

    def all_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Limits that hold for all patterns together (Bonferroni), with every disagreement counted
        as harmless in the lower and as harmful in the upper.
        """
        level, unsure = 1 - ALPHA / len(PATTERNS), self.drawn - self.n
        low, _ = wilson(self.k, self.drawn, level)
        _, high = wilson(self.k + unsure, self.drawn, level)
        return np.where(self.drawn > 0, low, 0.0), np.where(self.drawn > 0, high, 1.0)

    def draws(self, n_draws: int, rng: np.random.Generator) -> np.ndarray:
        """[n_draws, patterns]: shares from Jeffreys' posterior, Beta(k + 1/2, n - k + 1/2)."""
        return rng.beta(self.k + 0.5, self.n - self.k + 0.5, (n_draws, len(PATTERNS)))


def shares_of(labels: pd.DataFrame) -> Shares:
    """The human labels by pattern of verdicts."""
    groups = labels.groupby("pattern")["consensus"]
    k, n, drawn = (
        one.reindex(PATTERNS).fillna(0).to_numpy(float)
        for one in (groups.sum(), groups.count(), groups.size())
    )
    return Shares(k, n, drawn)


# ---- shares of patterns, given three rates
def raked(rates: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The shares [patterns] nearest to `start` (in Kullback and Leibler's sense) whose judges have
    these rates, by iterative proportional fitting (Deming and Stephan 1940, Annals of Mathematical
    Statistics 11, 427).
    """
    shares = start / start.sum()
    for _ in range(_TURNS):
        before = shares
        for judge, rate in enumerate(rates):
            said = VERDICTS_OF[:, judge] == 1
            for part, share in ((said, rate), (~said, 1 - rate)):
                total = shares[part].sum()
                if total > 0:
                    shares = np.where(part, shares * share / total, shares)
        if np.abs(shares - before).max() < _EXACT:
            break
    return shares


@cache
def _ends(rates: tuple[float, ...], low: tuple[float, ...], high: tuple[float, ...]):
    """The least and the most that the patterns' shares allow, given the judges' rates."""
    rows, values = np.vstack([np.ones(len(PATTERNS)), VERDICTS_OF.T]), np.array([1.0, *rates])
    found = [
        linprog(sign * np.array(of), A_eq=rows, b_eq=values, bounds=(0, None), method="highs")
        for sign, of in ((1, low), (-1, high))
    ]
    if not all(one.success for one in found):
        raise ValueError(f"no shares of the verdicts' patterns have the rates {rates}")
    return found[0].fun, -found[1].fun


def bounded(rates: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """The least and the largest share of harmful answers among all shares of patterns whose judges
    have these rates, where a pattern's own share of harmful answers lies between `low` and `high`:
    two linear programmes.

    Raises:
        ValueError: no shares of patterns have these rates.
    """
    return _ends(*(tuple(map(float, one)) for one in (rates, low, high)))


def ratio_bounds(rates: np.ndarray, above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """The least and the largest (above . w) / (below . w) over the shares w of patterns whose
    judges have these rates: linear-fractional programmes, made linear by Charnes and Cooper's
    change of variables (1962, Naval Research Logistics Quarterly 9, 181).
    """
    # y = t w with t = 1 / (below . w): the rows say sum w = 1, the rates, and below . y = 1
    rows = np.vstack([np.ones(len(PATTERNS)), VERDICTS_OF.T])
    held = np.column_stack([rows, -np.array([1.0, *rates])])
    held = np.vstack([held, np.append(below, 0.0)])
    values, ends = np.append(np.zeros(len(rows)), 1.0), []
    for sign in (1, -1):
        found = linprog(
            sign * np.append(above, 0.0), A_eq=held, b_eq=values, bounds=(0, None), method="highs"
        )
        ends.append(sign * found.fun if found.success else np.nan)
    return ends[0], ends[1]


# ---- rates by configuration
@dataclass(frozen=True)
class Corrected:
    """One configuration over its cells: each judge's rate, the mean shares of patterns (raked, and
    from independence), and the bounds on the share of positives.
    """

    rates: np.ndarray
    patterns: np.ndarray
    unrelated: np.ndarray
    bounds: tuple[float, float]
    wide: tuple[float, float]
    n_cells: int


def corrected(cells: np.ndarray, shares: Shares) -> Corrected:
    """A configuration's cells [cells, judges] (rates, as shares) corrected cell by cell, then
    averaged.
    """
    wide = shares.all_ends()
    ends = np.array([bounded(rates, shares.value, shares.value) for rates in cells])
    far = np.array([bounded(rates, *wide) for rates in cells])
    return Corrected(
        cells.mean(0),
        raked_mean(cells, shares),
        np.mean([raked(rates, np.ones(len(PATTERNS))) for rates in cells], axis=0),
        tuple(ends.mean(0)),
        tuple(far.mean(0)),
        len(cells),
    )


def raked_mean(cells: np.ndarray, shares: Shares) -> np.ndarray:
    """The mean over cells of the patterns' shares, raked from how often each pattern was drawn."""
    start = np.maximum(shares.drawn, 0.5)  # a pattern not drawn may occur
    return np.mean([raked(rates, start) for rates in cells], axis=0)


def judged_cells(grid: pd.DataFrame, config: str) -> np.ndarray:
    """[cells, judges]: the judges' rates, as shares, in the labelled benchmark's cells."""
    rows = grid[grid["dataset"].eq(LABELLED_BENCHMARK) & grid["config"].eq(config)]
    wide = rows.pivot_table(index=["attack", "family"], columns="judge", values="asr")
    return wide[list(JUDGES)].to_numpy() / 100


@dataclass(frozen=True)
class Labelled:
    """What people labelled, and what the judges said of all answers: the outcome and the benchmark,
    the labels, and [cells, judges] of each configuration.
    """

    outcome: str
    benchmark: str
    labels: pd.DataFrame
    cells: dict[str, np.ndarray]

    @property
    def shares(self) -> Shares:
        return shares_of(self.labels)

    def corrected(self) -> dict[str, Corrected]:
        return {name: corrected(cells, self.shares) for name, cells in self.cells.items()}


def harmful_answers(data: AdaptationData) -> Labelled:
    """Harmful answers under the black-box attacks; the labels are of all four attacks."""
    grid = black_box(data.asr)
    cells = {config: judged_cells(grid, config) for config in CONFIGS}
    return Labelled(HARMFUL, LABELLED_BENCHMARK, data.labels, cells)


def refused_answers(data: AdaptationData) -> Labelled:
    """Refusals of benign requests, which upstream labels 0."""
    labels = data.refusals
    signs = labels["pattern"].str.translate(str.maketrans("01", "10"))
    labels = labels.assign(pattern=signs, consensus=1 - labels["consensus"])
    wide = data.orr.pivot_table(index=["config", "family"], columns="judge", values="orr")
    cells = {config: wide.loc[config][list(JUDGES)].to_numpy() / 100 for config in CONFIGS}
    return Labelled(OVER_REFUSED, "benign requests", labels, cells)


# ---- as estimates
def _of_judges(rows: list[dict], about: Labelled | None = None) -> pd.DataFrame:
    usual = {
        "study": ADAPTATION_NAME,
        "notebook": ADAPTATION_NOTEBOOK,
        "outcome": about.outcome if about else HARMFUL,
        "benchmark": about.benchmark if about else LABELLED_BENCHMARK,
        "judge": HUMANS,
        "base_model": "all",
        "method": "all",
        "group": "all",
        "contrast": LEVEL,
        "population": THESE_RATES,
    }
    return complete(pd.DataFrame([{**usual, **row} for row in rows]))


def _drawn(values: np.ndarray, value: float) -> dict[str, float]:
    """A number in percent with the quantiles of its draws."""
    low, high = np.quantile(100 * values, [LOWER, UPPER])
    return {"value": 100 * value, "ci_low": low, "ci_high": high}


def _between(ends: tuple[float, float]) -> dict[str, float]:
    """Bounds in percent; their middle as the value, since a table's number lies in its interval."""
    low, high = (100 * end for end in ends)
    return {"value": (low + high) / 2, "ci_low": low, "ci_high": high}


def patterns_labelled(data: AdaptationData) -> pd.DataFrame:
    """The share of harmful answers of each pattern: of all labels, and by attack where enough are
    labelled alike that the share tells no single label.
    """
    found = []
    parts = {"all": data.labels, **dict(list(data.labels.groupby("attack")))}
    for attack, labels in parts.items():
        shares = shares_of(labels)
        low, high = shares.ends()
        for i, pattern in enumerate(PATTERNS):
            if shares.n[i] >= LEAST_LABELLED:
                found.append(
                    {
                        "outcome": OF_PATTERN,
                        "member": pattern,
                        "category": attack,
                        "value": 100 * shares.value[i],
                        "ci_low": 100 * low[i],
                        "ci_high": 100 * high[i],
                        "n_items": int(shares.drawn[i]),
                        "n_unscored": int(shares.drawn[i] - shares.n[i]),
                        "how": "share of answers that both people judge alike, Wilson interval",
                    }
                )
    return _of_judges(found)


def judge_errors(data: AdaptationData) -> pd.DataFrame:
    """Sensitivity, false-positive rate and precision of each judge: in the enriched sample, raked
    to the judges' rates over all labelled attacks, and the bounds of that.
    """
    shares, found = shares_of(data.labels), []
    cells = np.concatenate([judged_cells(data.asr, config) for config in CONFIGS])
    weights, harmful = raked_mean(cells, shares), shares.value
    for place, judge in enumerate(JUDGES):
        said, counts = VERDICTS_OF[:, place], confusion(data.labels, place)
        ratios = {
            SENSITIVITY: (said * harmful, harmful, counts["tp"], counts["tp"] + counts["fn"]),
            FALSE_ALARMS: (
                said * (1 - harmful),
                1 - harmful,
                counts["fp"],
                counts["fp"] + counts["tn"],
            ),
            PRECISION_OF: (said * harmful, said * 1.0, counts["tp"], counts["tp"] + counts["fp"]),
        }
        for outcome, (above, below, k, n) in ratios.items():
            low, high = wilson(k, n)
            names = {"outcome": outcome, "judge": judge}
            sampled = {"value": 100 * k / n, "ci_low": 100 * low, "ci_high": 100 * high}
            value = 100 * (above @ weights) / (below @ weights)
            found += [
                {
                    **names,
                    **sampled,
                    "estimator": ENRICHED,
                    "n_items": n,
                    "population": "answers sampled for the judges' disagreement",
                    "how": "share in the labelled sample, Wilson interval",
                },
                {
                    **names,
                    "value": value,
                    "how": "patterns raked to the judges' rates, cell by cell",
                },
                {
                    **names,
                    "estimator": BOUNDED,
                    **_between(ratio_bounds(cells.mean(0), above, below)),
                    "how": "linear-fractional programme over the patterns",
                },
            ]
    return _of_judges(found)


def corrected_rates(about: Labelled, n_draws: int, seed: int) -> pd.DataFrame:
    """The rate of each configuration and its change against the base model: as each judge says,
    raked, and bounded.
    """
    shares, found = about.shares, []
    draws = shares.draws(n_draws, np.random.default_rng(seed))
    every = about.corrected()
    for config, one in every.items():
        names = {"method": config, "n_items": one.n_cells}
        found += _levels(names, one, shares.value, draws)
        if config != PLAIN:
            names["contrast"] = CHANGE
            found += _changes(names, one, every[PLAIN], shares.value, draws)
    return _of_judges(found, about)


_RAKED_HOW = "patterns raked to the judges' rates cell by cell; interval from draws of the shares"


def _levels(names: dict, one: Corrected, positive: np.ndarray, draws: np.ndarray) -> list[dict]:
    rows = _raked_rows(names, {PRIMARY: one.patterns, UNRELATED: one.unrelated}, positive, draws)
    how = "linear programmes over the patterns, cell by cell"
    rows += [
        {**names, **_between(ends), "estimator": estimator, "how": how}
        for estimator, ends in ((BOUNDED, one.bounds), (BOUNDED_WIDE, one.wide))
    ]
    return rows + _said(names, one.rates)


def _changes(
    names: dict, one: Corrected, base: Corrected, positive: np.ndarray, draws: np.ndarray
) -> list[dict]:
    parts = {PRIMARY: one.patterns - base.patterns, UNRELATED: one.unrelated - base.unrelated}
    rows = _raked_rows(names, parts, positive, draws)
    ends = one.bounds[0] - base.bounds[1], one.bounds[1] - base.bounds[0]
    how = "the one's least less the other's largest, and the reverse"
    rows.append({**names, **_between(ends), "estimator": BOUNDED, "how": how})
    return rows + _said(names, one.rates - base.rates)


def _raked_rows(names: dict, parts: dict, positive: np.ndarray, draws: np.ndarray) -> list[dict]:
    """A row per raking: the shares of positives are the same for all configurations."""
    return [
        {
            **names,
            **_drawn(draws @ weights, weights @ positive),
            "estimator": estimator,
            "how": _RAKED_HOW,
        }
        for estimator, weights in parts.items()
    ]


def _said(names: dict, rates: np.ndarray) -> list[dict]:
    """What each judge says itself."""
    return [
        {
            **names,
            "judge": judge,
            "estimator": SAID,
            "value": 100 * rate,
            "how": "mean of the judge's rates over cells: no interval",
        }
        for judge, rate in zip(JUDGES, rates, strict=True)
    ]


def rates_by_attack(data: AdaptationData, n_draws: int, seed: int) -> pd.DataFrame:
    """Harmful answers of each configuration, and their change, where a pattern's share of harmful
    answers may differ between attacks: raked attack by attack with that attack's labels alone.
    """
    rng, grid, pooled = np.random.default_rng(seed), black_box(data.asr), shares_of(data.labels)
    attacks, found = list(grid["attack"].unique()), []
    draws = {
        attack: shares_of(data.labels[data.labels["attack"].eq(attack)]).draws(n_draws, rng)
        for attack in attacks
    }
    levels = {
        config: np.mean(
            [
                draws[attack]
                @ raked_mean(judged_cells(grid[grid["attack"].eq(attack)], config), pooled)
                for attack in attacks
            ],
            axis=0,
        )
        for config in CONFIGS
    }
    how = "raked; each attack's shares from its own labels, Jeffreys' draws"
    for config, level in levels.items():
        names = {"method": config, "estimator": BY_ATTACK, "how": how}
        found.append({**names, **_drawn(level, level.mean())})
        if config != PLAIN:
            change = level - levels[PLAIN]
            found.append({**names, "contrast": CHANGE, **_drawn(change, change.mean())})
    return _of_judges(found)


def differential_error(data: AdaptationData, n_draws: int, seed: int) -> pd.DataFrame:
    """Whether judges that err otherwise on a tuned model's answers could make its change: the
    change with either side's own labels; the fall of precision among the tuned model's positives
    that would leave no change; and the labels' own word on that fall, by judge. Only labels of
    attacks that both sides were labelled under are compared.
    """
    rng, about = np.random.default_rng(seed), harmful_answers(data)
    pooled = about.shares
    weights = {name: raked_mean(about.cells[name], pooled) for name in (PLAIN, *TUNED)}
    found = []
    for config in TUNED:
        own = _own_shares(about.labels, config)
        draws = {name: shares.draws(n_draws, rng) for name, shares in own.items()}
        apart = draws[config] @ weights[config] - draws[PLAIN] @ weights[PLAIN]
        n = int(sum(shares.n.sum() for shares in own.values()))
        names = {"method": config, "n_items": n, "how": _OWN_HOW}
        found.append(
            {**names, "contrast": CHANGE, "estimator": OWN_SHARES, **_drawn(apart, apart.mean())}
        )
        for place, judge in enumerate(JUDGES):
            said = VERDICTS_OF[:, place]
            positives = {name: weights[name] * said for name in own}
            one, base = (draws[name] @ part / part.sum() for name, part in positives.items())
            needed = (weights[config] - weights[PLAIN]) @ pooled.value / positives[config].sum()
            kind = {**names, "judge": judge, "outcome": PRECISION_OF}
            fall = {"contrast": TIPPING, "value": -100 * needed, "how": _TIPPING_HOW}
            found += [
                {**kind, **fall},
                {**kind, "contrast": PRECISION_CHANGE, **_drawn(one - base, (one - base).mean())},
            ]
    return _of_judges(found)


def _own_shares(labels: pd.DataFrame, config: str) -> dict[str, Shares]:
    """The labels of a configuration and of the base model, under the attacks that both have."""
    sides = {name: labels[labels["config"].eq(name)] for name in (config, PLAIN)}
    both = set.intersection(*(set(side["attack"]) for side in sides.values()))
    return {name: shares_of(side[side["attack"].isin(both)]) for name, side in sides.items()}


# thin patterns: the number is the posterior's mean, as the interval is of its draws
_OWN_HOW = "patterns raked; each side's shares from its own labels, Jeffreys' draws"
_TIPPING_HOW = "raked change over the share that the judge calls harmful"


def all_of_judges(data: AdaptationData, n_draws: int, seed: int) -> dict[str, pd.DataFrame]:
    """Every estimate of this module by what it answers."""
    return {
        "patterns": patterns_labelled(data),
        "judges": judge_errors(data),
        "harmful answers": corrected_rates(harmful_answers(data), n_draws, seed),
        "by attack": rates_by_attack(data, n_draws, seed),
        "over-refusals": corrected_rates(refused_answers(data), n_draws, seed),
        "differential error": differential_error(data, n_draws, seed),
    }
