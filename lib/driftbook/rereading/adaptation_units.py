"""Whether LoRA differs from full fine-tuning in the second study, by what is taken as the unit:
cells, model families, or runs.

A run is one training: a family, a method and a seed. The cells of a run (attacks x sets of prompts)
share its weights, so that 20 cells of five families are ten runs, not 20 draws.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from driftbook.rereading.adaptation_published import black_box, changed, equivalence_p
from driftbook.rereading.adaptation_study import (
    ADAPTATION_NAME,
    ADAPTATION_NOTEBOOK,
    CELL_KEYS,
    JUDGES,
    PLAIN,
    SEED_NAMES,
    TUNED,
    AdaptationData,
)
from driftbook.stats.estimation import complete
from driftbook.stats.intervals import t_interval
from driftbook.stats.linear import rate_model
from driftbook.stats.mixed import MixedFit
from driftbook.stats.terms import CHANGE, NONE, PRIMARY
from driftbook.study.tables import ESTIMATES

SUCCESS = "attack success rate (percent)"
CELLS, FAMILY_MEANS, ROBUST, MIXED_CELLS = (
    "cells",
    "families",
    "families, CR2",
    "families, mixed model",
)
RERUNS, LATER_RERUNS = "runs, by three seeds", "runs, by the two later seeds"
ONE_SEED = "difference, one seed for all runs"
EQUIVALENCE = "equivalence at the margin"
BY_SEED, SEED_GAP = "change against the base model, by seed", "seeds 0 and 123 less the original"
OF_A_FAMILY = "family"
RUN_SPREAD, CELL_SPREAD = (
    "standard deviation of a run's mean over its cells",
    "standard deviation of a cell between seeds",
)
ALL_SEEDS, NEW_SEEDS = "three seeds", "seeds 0 and 123"
MARGINS = (3.0, 5.0, 7.5)  # the study's own, percentage points
NEW_FAMILIES = "model families like these five, one run of each; these attacks and prompts"
OTHER_SEEDS = "these five model families, seeds like these; these attacks and prompts"
CELL_DRAWS = "cells like these, as if each were drawn alone"
PAIRS = (("lora", "fft"), ("qlora", "fft"), ("lora", "qlora"))


# ---- one mean, by its unit
@dataclass(frozen=True)
class UnitMean:
    """A mean difference in percentage points, its standard error and degrees of freedom, and how
    many units were averaged.
    """

    value: float
    se: float
    df: float
    n_units: int

    def interval(self) -> dict[str, float | None]:
        return t_interval(self.value, self.se**2, self.df)

    def equivalence(self, margin: float) -> float:
        """p of two one-sided tests at this margin."""
        return equivalence_p(self.value, self.se, self.df, margin)

    def smallest_margin(self, alpha: float = 0.05) -> float:
        """The smallest margin at which the two one-sided tests at `alpha` would both reject."""
        return abs(self.value) + float(stdtrit(self.df, 1 - alpha)) * self.se


def mean_of_cells(difference: pd.Series) -> UnitMean:
    """As the study has it: every cell a draw."""
    n = len(difference)
    return UnitMean(difference.mean(), difference.std() / np.sqrt(n), n - 1, n)


def mean_of_families(difference: pd.Series) -> UnitMean:
    """The mean of the families' means, with t over families."""
    means = difference.groupby("family").mean()
    n = len(means)
    return UnitMean(means.mean(), means.std() / np.sqrt(n), n - 1, n)


def mean_by_clusters(difference: pd.Series) -> UnitMean:
    """The mean over cells, its error robust to dependence within families: CR2 with Satterthwaite's
    degrees of freedom (Bell and McCaffrey 2002, Survey Methodology 28, 169).

    With one cluster of n of N cells its residual sum is divided by sqrt(1 - n / N), and the df are
    (sum l)^2 / sum l^2 over the eigenvalues l of the clusters' covariance were cells independent.
    Of clusters of equal size it is the t test of their means.
    """
    codes, names = pd.factorize(difference.index.get_level_values("family"))
    total, mean = len(difference), difference.mean()
    rest = np.bincount(codes, difference.to_numpy() - mean)
    n = np.bincount(codes).astype(float)
    scale = 1 / np.sqrt(1 - n / total)
    variance = ((rest * scale) ** 2).sum() / total**2
    covariance = (np.diag(n) - np.outer(n, n) / total) * np.outer(scale, scale)
    roots = np.linalg.eigvalsh(covariance)
    return UnitMean(mean, np.sqrt(variance), roots.sum() ** 2 / (roots**2).sum(), len(names))


def mean_by_mixed(difference: pd.Series) -> tuple[UnitMean, MixedFit]:
    """The mean of a linear mixed model with random intercepts of families and of cells that all
    families share, by REML; df: families less one.
    """
    rows = difference.rename("difference").reset_index()
    rows["cell"] = rows[CELL_KEYS].agg(" ".join, axis=1)
    fit = rate_model(rows, "difference ~ 1", groups=("family", "cell"))
    found, n = fit.contrast(np.eye(1)).iloc[0], rows["family"].nunique()
    return UnitMean(found["estimate"], found["se"], fit.df, n), fit


# ---- how runs differ by their seed
def seed_means(data: AdaptationData, judge: str, attacks: list[str]) -> pd.DataFrame:
    """The mean attack success of each LoRA run over its cells: a row per family, a column per seed;
    column `base` is the base model's in the same table.
    """
    rows = data.seeds[
        data.seeds["judge"].eq(judge) & data.seeds["usable"] & data.seeds["attack"].isin(attacks)
    ]
    wide = rows.pivot_table(index="family", columns="seed", values="asr")[list(SEED_NAMES.values())]
    return wide.assign(base=rows.groupby("family")["base"].mean())


def pooled_spread(values: pd.DataFrame) -> tuple[float, float]:
    """The standard deviation within rows, pooled, and its degrees of freedom."""
    return float(np.sqrt(values.var(axis=1).mean())), float(len(values) * (values.shape[1] - 1))


def mean_of_reruns(difference: pd.Series, spread: float, df: float, n_tuned: int = 1) -> UnitMean:
    """The mean over families with the error that other seeds of the same families would bring; of
    each family's difference `n_tuned` of the two models were trained.
    """
    means = difference.groupby("family").mean()
    return UnitMean(means.mean(), spread * np.sqrt(n_tuned / len(means)), df, len(means))


# ---- as estimates
def of_success(rows: list[dict]) -> pd.DataFrame:
    """Rows as estimates of attack success in this study."""
    usual = {
        "study": ADAPTATION_NAME,
        "notebook": ADAPTATION_NOTEBOOK,
        "outcome": SUCCESS,
        "benchmark": "all",
        "base_model": "all",
        "group": "all",
    }
    return complete(pd.DataFrame([{**usual, **row} for row in rows]))


def _by_unit(
    difference: pd.Series, runs: pd.DataFrame, n_tuned: int, fits: dict, name: str
) -> dict[str, UnitMean]:
    """The mean difference by each unit, given LoRA's means by seed; `fits` gets the mixed model."""
    mixed, fits[name] = mean_by_mixed(difference)
    return {
        CELLS: mean_of_cells(difference),
        FAMILY_MEANS: mean_of_families(difference),
        ROBUST: mean_by_clusters(difference),
        MIXED_CELLS: mixed,
        RERUNS: mean_of_reruns(difference, *pooled_spread(runs), n_tuned=n_tuned),
        LATER_RERUNS: mean_of_reruns(
            difference, *pooled_spread(runs.drop(columns="original")), n_tuned=n_tuned
        ),
    }


_HOW = {
    CELLS: "mean of cells, t interval over cells",
    FAMILY_MEANS: "mean of families' means, t interval over families",
    ROBUST: "mean of cells, clustered by family, CR2, Satterthwaite",
    MIXED_CELLS: "mixed model, random family and cell, t with families less one",
    RERUNS: "mean of families' means, spread of runs from LoRA's three seeds",
    LATER_RERUNS: "mean of families' means, spread of runs from LoRA's two later seeds",
}
_POPULATION = {CELLS: CELL_DRAWS, RERUNS: OTHER_SEEDS, LATER_RERUNS: OTHER_SEEDS}


def differences_by_unit(data: AdaptationData) -> tuple[pd.DataFrame, dict[str, MixedFit]]:
    """LoRA, QLoRA and full fine-tuning against each other on the grid of one seed, by judge and
    unit, with the tests of equivalence; and the mixed models by name.
    """
    found, fits = [], {}
    attacks = list(data.controlled["attack"].unique())
    for judge in JUDGES:
        runs = seed_means(data, judge, attacks).drop(columns="base")
        for one, other in PAIRS:
            difference = changed(data.controlled, judge, one, other)
            names = {"judge": judge, "method": one, "against": other, "contrast": ONE_SEED}
            units = _by_unit(difference, runs, 2, fits, f"{judge}, {one} less {other}")
            found += _rows(units, names, difference)
            found += _equivalences(units, names, difference)
    return of_success(found), fits


def _rows(units: dict[str, UnitMean], names: dict, difference: pd.Series) -> list[dict]:
    """An estimate per unit, the primary of which is the family; and the mean of each family."""
    counts = {"n_runs": difference.index.get_level_values("family").nunique()}
    counts["n_runs"] *= 2 if names["contrast"] == ONE_SEED else 1
    rows = [
        {
            **names,
            **counts,
            "estimator": PRIMARY if unit == FAMILY_MEANS else unit,
            "value": mean.value,
            **mean.interval(),
            "population": _POPULATION.get(unit, NEW_FAMILIES),
            "how": f"{_HOW[unit]}; {mean.df:.1f} degrees of freedom",
            "n_items": len(difference),
        }
        for unit, mean in units.items()
    ]
    own = difference.groupby("family").mean()
    how = "mean over the cells of one family: no interval"
    return rows + [
        {
            **names,
            "group": OF_A_FAMILY,
            "base_model": family,
            "value": value,
            "population": "this family, these runs",
            "how": how,
            "n_runs": counts["n_runs"] // len(own),
            "n_items": len(difference) // len(own),
        }
        for family, value in own.items()
    ]


def _equivalences(units: dict[str, UnitMean], names: dict, difference: pd.Series) -> list[dict]:
    """The tests of equivalence by unit and margin."""
    return [
        {
            **names,
            "contrast": EQUIVALENCE,
            "estimator": PRIMARY if unit == FAMILY_MEANS else unit,
            "value": mean.value,
            "se": mean.se,
            "p": mean.equivalence(margin),
            "margin": margin,
            "population": _POPULATION.get(unit, NEW_FAMILIES),
            "how": f"two one-sided t tests; smallest margin {mean.smallest_margin():.1f}",
            "n_items": len(difference),
        }
        for unit, mean in units.items()
        for margin in MARGINS
    ]


def changes_by_unit(data: AdaptationData) -> tuple[pd.DataFrame, dict[str, MixedFit]]:
    """Changes of the black-box attacks against the base model, published grid, by judge and unit;
    and the mixed models by name.
    """
    found, fits, grid = [], {}, black_box(data.asr)
    attacks = list(grid["attack"].unique())
    for judge in JUDGES:
        runs = seed_means(data, judge, attacks).drop(columns="base")
        for method in TUNED:
            difference = changed(grid, judge, method, PLAIN)
            names = {"judge": judge, "method": method, "against": NONE, "contrast": CHANGE}
            units = _by_unit(difference, runs, 1, fits, f"{judge}, {method} change")
            found += _rows(units, names, difference)
    return of_success(found), fits


def spreads_of_seeds(data: AdaptationData) -> pd.DataFrame:
    """How LoRA runs differ by seed: standard deviations by judge and attack, of single cells and of
    a run's mean; each seed's mean change; and the two later seeds less the original.
    """
    found, black = [], list(black_box(data.seeds)["attack"].unique())
    for judge in JUDGES:
        groups = {attack: [attack] for attack in data.seeds["attack"].unique()}
        for attack, attacks in {**groups, "black-box": black}.items():
            names = {"judge": judge, "method": "lora", "category": attack}
            found += _spread_rows(seed_means(data, judge, attacks), data, names, attacks)
        runs = seed_means(data, judge, black)
        found += _seed_rows(runs, {"judge": judge, "method": "lora", "category": "black-box"})
    return of_success(found)


def _spread_rows(
    runs: pd.DataFrame, data: AdaptationData, names: dict, attacks: list[str]
) -> list[dict]:
    """Standard deviations of runs and of cells between all seeds and between the two later ones,
    with chi-square intervals.
    """
    rows = data.seeds[
        data.seeds["judge"].eq(names["judge"])
        & data.seeds["usable"]
        & data.seeds["attack"].isin(attacks)
    ]
    cells = rows.pivot_table(index=["family", *CELL_KEYS], columns="seed", values="asr")
    found = []
    for contrast, values in ((RUN_SPREAD, runs.drop(columns="base")), (CELL_SPREAD, cells)):
        for seeds, part in ((ALL_SEEDS, values), (NEW_SEEDS, values.drop(columns="original"))):
            spread, df = pooled_spread(part)
            found.append(
                {
                    **names,
                    "contrast": contrast,
                    "member": seeds,
                    "value": spread,
                    "population": OTHER_SEEDS,
                    "how": f"pooled over {len(part)} rows, {df:.0f} degrees of freedom",
                    "n_runs": part.shape[1] * runs.shape[0],
                    "n_items": len(part),
                }
            )
    return found


def _seed_rows(runs: pd.DataFrame, names: dict) -> list[dict]:
    """Each seed's mean change over families, and the two later seeds less the original one."""
    change = runs.sub(runs["base"], axis=0).drop(columns="base")
    gap = change.drop(columns="original").mean(axis=1) - change["original"]
    parts = {seed: (BY_SEED, change[seed]) for seed in change} | {"both": (SEED_GAP, gap)}
    found = []
    for member, (contrast, values) in parts.items():
        mean, own = mean_of_families(values), {"contrast": contrast, "member": member}
        found.append(
            {
                **names,
                **own,
                "value": mean.value,
                **mean.interval(),
                "population": NEW_FAMILIES,
                "how": "mean over families, t interval over families",
                "n_runs": len(values),
            }
        )
        found += [
            {
                **names,
                **own,
                "group": OF_A_FAMILY,
                "base_model": family,
                "value": value,
                "population": "this family, this run",
                "how": "mean over the cells of one family: no interval",
                "n_runs": 1,
            }
            for family, value in values.items()
        ]
    return found


def all_of_units(data: AdaptationData) -> tuple[dict[str, pd.DataFrame], dict[str, MixedFit]]:
    """Every estimate of this module by what it answers, and the mixed models by name."""
    differences, fits = differences_by_unit(data)
    changes, more = changes_by_unit(data)
    parts = {"differences": differences, "changes": changes, "seeds": spreads_of_seeds(data)}
    return {name: ESTIMATES.check(part) for name, part in parts.items()}, {**fits, **more}
