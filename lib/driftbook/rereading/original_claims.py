"""The ledger of the original study's claims: what each says of which cells, read three ways, in
several forms of which the first, all runs, decides.

A cell is what the study repeated: a base model, a method and a true setting. The readings and the
rule that gives verdicts stand in original_quantifiers; what is claimed (a region) and the forms
stand here. A claim without public data cannot be told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from driftbook.rereading import original_quantifiers as quantifiers
from driftbook.rereading import original_spreads, original_study, original_tables, original_tests
from driftbook.rereading.original_analysis import KNOWN_BASE, ROUNDS_POPULATION, SAFETY, SETTING
from driftbook.rereading.original_contrasts import (
    cell_weight,
    matched_cells,
    matched_weight,
    mean_weight,
)
from driftbook.rereading.original_quantifiers import OPEN, Family, Quantified, Region
from driftbook.study.methods import METHOD_LABELS

MARGIN = 3.0  # points of safety that "preserves" and "stable" allow, fixed beforehand
ABOVE_MARGIN, WITHIN_MARGIN = (-MARGIN, np.inf), (-MARGIN, MARGIN)
ABOVE_ZERO, BELOW_ZERO = (0.0, np.inf), (-np.inf, 0.0)
BELOW_ONE, ABOVE_ONE = (0.0, 1.0), (1.0, np.inf)
BASES = original_study.MODELS
_WORDS = {full: name.capitalize() for name, full in BASES.items()}
CLASSES = {
    "lora": "ia3",
    "ia3": "lora",
    "prompt_tuning": "p_tuning",
    "p_tuning": "prompt_tuning",
}  # the other method of the class
# forms: which runs, which weights, which comparisons; only the first decides
ALL_RUNS, BY_RUN = "all runs", "each run equal"
NO_NO_OPS, NO_OUTLIERS = "without no-ops", "without the authors' outliers"
COMMON, LEARNED_RUNS = "settings of every base model", "learned runs (chosen after treatment)"
NO_P_TUNING = "without P-Tuning"
CLASS_MATE, LARGEST = "exchange within the class", "largest exchange (chosen after treatment)"
FORMS = (
    ALL_RUNS,
    BY_RUN,
    NO_NO_OPS,
    NO_OUTLIERS,
    COMMON,
    LEARNED_RUNS,
    NO_P_TUNING,
    CLASS_MATE,
    LARGEST,
)
NO_FAIRNESS = (
    "null: no verdicts or answers of the main study's BBQ-Lite runs were found in the package (only"
    " means of one setting, and a later code arm); needed: each run's and base model's answers"
)


@dataclass(frozen=True)
class Claim:
    """A claim judged: its readings by form (the first form decides), the cells behind them, the
    region that it claims, and what it is about. Without data there are no forms.
    """

    about: str
    region: Region | None = None
    forms: dict[str, tuple[Quantified, ...]] = field(default_factory=dict)
    cells: Family | None = None
    population: str = KNOWN_BASE
    outcome: str = SAFETY
    margin: float | None = None

    @property
    def readings(self) -> tuple[Quantified, ...]:
        """The readings that decide."""
        return next(iter(self.forms.values()), ())

    @property
    def verdict(self) -> str:
        return quantifiers.claim_verdict(self.readings) if self.forms else OPEN


def ledger(rows: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> dict[str, Claim]:
    """Every claim of data/original_study/claims.csv, judged; `rows` is rereading.frame."""
    fairness = Claim(NO_FAIRNESS, outcome="fairness (no public data)", population="none")
    return {
        "lora_preserves": of_method(rows, "lora", ABOVE_MARGIN),
        "ia3_preserves": of_method(rows, "ia3", ABOVE_MARGIN),
        "prompt_tuning_degrades": of_method(rows, "prompt_tuning", BELOW_ZERO),
        "p_tuning_degrades": of_method(rows, "p_tuning", BELOW_ZERO),
        "llama_stable": of_base(rows, BASES["llama"], WITHIN_MARGIN),
        "qwen_gains": of_base(rows, BASES["qwen"], ABOVE_ZERO),
        "gemma_steepest": steepest(rows, BASES["gemma"]),
        "mistral_variable": most_variable(rows, BASES["mistral"], n_boot, seed),
        "rate_secondary": secondary(rows),
        "dpo_steadier": steadier(rows, n_boot, seed),
        "malware_improves": of_change(
            rows, pd.Series(True, rows.index), ABOVE_ZERO, "Malware", "its change, by cell"
        ),
        "categories_decline": decline(rows),
        **dict.fromkeys(("dimensions_decline", "sft_fairness", "safety_not_fairness"), fairness),
    }


# ---- which runs
def kept_runs(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The runs of each form that leaves runs out; utility decides nothing where it is not known."""
    n_bases = rows["base_model"].nunique()
    common = rows.groupby("setting")["base_model"].transform("nunique").eq(n_bases)
    kept = {ALL_RUNS: pd.Series(True, rows.index), NO_NO_OPS: ~rows["no_op"].astype(bool)}
    if rows["utility"].notna().any():
        kept[NO_OUTLIERS] = ~original_tests.outliers(rows["utility"])
    return kept | {COMMON: common, LEARNED_RUNS: rows["gain"].gt(0)}


def _forms(
    rows: pd.DataFrame,
    chosen: pd.Series,
    read: Callable[[pd.Series], tuple[Quantified, ...]],
    names: tuple[str, ...],
) -> dict[str, tuple[Quantified, ...]]:
    """The readings of each form that differs from all runs and leaves any; `read` takes the runs
    kept.
    """
    found = {}
    for form, kept in kept_runs(rows).items():
        own = chosen & kept
        if form in names and own.any() and (form == ALL_RUNS or not own.equals(chosen)):
            found[form] = read(kept)
    return found


def cell_names(rows: pd.DataFrame) -> pd.Series:
    """Each run's cell in words: base model, method, objective, data, rate, epochs."""
    found = []
    for row in rows[["base_model", "method", *SETTING, "rate"]].itertuples(index=False):
        rate = "unknown rate" if pd.isna(row.rate) else f"{row.rate:.0e}".replace("e-0", "e-")
        data = "UltraChat" if row.dataset == "ultrachat_200k" else "UltraFeedback"
        setting = f"{row.objective.upper()} {data} {rate} {row.epochs} ep"
        found.append(f"{_WORDS[row.base_model]} {METHOD_LABELS[row.method]} {setting}")
    return pd.Series(found, rows.index)


def cells_of(rows: pd.DataFrame, chosen: pd.Series) -> dict[str, pd.Series]:
    """The weights of the mean over runs of each cell of the chosen runs, by the cell's name."""
    names, found = cell_names(rows), {}
    for name in names[chosen].unique():
        here = (chosen & names.eq(name)).to_numpy()
        found[name] = pd.Series(here / here.sum(), rows.index)
    return found


# ---- claims about changes
def of_change(
    rows: pd.DataFrame,
    chosen: pd.Series,
    region: Region,
    value: str = "change",
    about: str = "its change in each cell",
) -> Claim:
    """A claim that the change of the chosen runs lies in a region; cells count alike in a base
    model, and base models count alike.
    """

    def read(kept: pd.Series) -> tuple[Quantified, ...]:
        mean = quantifiers.of_weights(rows, {"all": cell_weight(rows, chosen & kept)}, value)
        cells = quantifiers.of_weights(rows, cells_of(rows, chosen & kept), value)
        return quantifiers.three_readings(mean, cells, region, SAFETY)

    several = rows.loc[chosen, "base_model"].nunique() > 1
    names = (ALL_RUNS, NO_NO_OPS, NO_OUTLIERS, LEARNED_RUNS, *((COMMON,) if several else ()))
    forms = _forms(rows, chosen, read, names)
    by_run = quantifiers.of_weights(rows, {"all": mean_weight(rows, chosen)}, value)
    forms[BY_RUN] = (quantifiers.mean_reading(by_run, region, SAFETY),)
    cells = quantifiers.of_weights(rows, cells_of(rows, chosen), value)
    margin = MARGIN if MARGIN in np.abs(region) else None
    return Claim(about, region, forms, cells, margin=margin)


def of_method(rows: pd.DataFrame, method: str, region: Region) -> Claim:
    """A claim about the change that a method brings."""
    chosen = rows["method"].eq(method)
    inert = int((rows["no_op"] & chosen).sum())
    note = f"; {inert} of {int(chosen.sum())} runs are no-ops" if inert else ""
    about = f"change of each base model and setting{note}; over-refusal was not measured"
    return of_change(rows, chosen, region, about=about)


def of_base(rows: pd.DataFrame, base_model: str, region: Region) -> Claim:
    """A claim about the change of a base model."""
    about = "change of each method and setting on it"
    return of_change(rows, rows["base_model"].eq(base_model), region, about=about)


def steepest(rows: pd.DataFrame, base_model: str) -> Claim:
    """A base model declines most if each other one changes more favourably at equal method and
    settings: on the mean over matched cells, in every one, in most.
    """
    equal = ["method", *SETTING, "rate"]
    others = [base for base in rows["base_model"].unique() if base != base_model]
    names = cell_names(rows)

    def families(kept: pd.Series) -> tuple[Family, Family]:
        sides = {
            base: (rows["base_model"].eq(base) & kept, rows["base_model"].eq(base_model) & kept)
            for base in others
        }
        means = {_WORDS[base]: matched_weight(rows, *sides[base], equal) for base in others}
        cells = {
            f"{names[weight.gt(0).idxmax()]} less {_WORDS[base_model]}": weight
            for base in others
            for weight in matched_cells(rows, *sides[base], equal)
        }
        return quantifiers.of_weights(rows, means), quantifiers.of_weights(rows, cells)

    def read(kept: pd.Series) -> tuple[Quantified, ...]:
        return quantifiers.three_readings(*families(kept), ABOVE_ZERO, SAFETY)

    everyone = pd.Series(True, rows.index)
    forms = _forms(rows, everyone, read, (ALL_RUNS, NO_NO_OPS, NO_OUTLIERS, LEARNED_RUNS))
    about = f"lead of each other base model over {_WORDS[base_model]}, at equal method and setting"
    return Claim(about, ABOVE_ZERO, forms, families(everyone)[1])


def decline(rows: pd.DataFrame) -> Claim:
    """Categories other than Malware decline: their mean, every one, most of them. A cell is a
    category: its mean change over all cells of runs.
    """
    others = [name for name in original_study.HEX_PHI if name != "Malware"]
    together = rows.assign(together=rows[others].mean(axis=1))

    def families(kept: pd.Series) -> tuple[Family, Family]:
        weight = {"all": cell_weight(rows, kept)}
        each = {name: quantifiers.of_weights(rows, weight, name) for name in others}
        return quantifiers.of_weights(together, weight, "together"), quantifiers.joined(each)

    def read(kept: pd.Series) -> tuple[Quantified, ...]:
        return quantifiers.three_readings(*families(kept), BELOW_ZERO, SAFETY)

    everyone = pd.Series(True, rows.index)
    names = (ALL_RUNS, NO_NO_OPS, NO_OUTLIERS, COMMON, LEARNED_RUNS)
    about = "change of each category; public summaries do not name those that the paper means"
    forms = _forms(rows, everyone, read, names)
    return Claim(about, BELOW_ZERO, forms, families(everyone)[1])


# ---- the learning rate
def secondary(rows: pd.DataFrame) -> Claim:
    """The learning rate is secondary if exchanging the method moves safety more than the rate does:
    in each method and base model, against every other method.

    The number of a cell is the size of the exchange's effect less the size of the rate's (2e-5
    instead of 1e-3, true rates); for its interval the signs of both are taken as estimated.
    """
    partners = {
        ALL_RUNS: {method: [one for one in CLASSES if one != method] for method in CLASSES},
        CLASS_MATE: {method: [mate] for method, mate in CLASSES.items()},
    }
    kept = kept_runs(rows)
    found = {form: _exchanges(rows, kept[ALL_RUNS], given) for form, given in partners.items()}
    if NO_OUTLIERS in kept:
        found[NO_OUTLIERS] = _exchanges(rows, kept[NO_OUTLIERS], partners[ALL_RUNS])
    found[LARGEST] = [
        max(part, key=lambda one: abs(one[2])) for part in _by_cell(found[ALL_RUNS]).values()
    ]
    forms, families = {}, {}
    for form, parts in found.items():
        weights = {name: weight for name, weight, *_ in parts}
        families[form] = quantifiers.of_weights(rows, weights)
        means = quantifiers.of_weights(rows, {"all": sum(weights.values()) / len(weights)})
        forms[form] = quantifiers.three_readings(means, families[form], ABOVE_ZERO, SAFETY)
    sizes = [np.abs([one[i] for one in found[ALL_RUNS]]).mean() for i in (2, 3)]
    about = (
        "size of the effect of exchanging the method less that of the rate, by base model, method"
        f" and other method; mean sizes {sizes[0]:.1f} and {sizes[1]:.1f}"
    )
    population = ROUNDS_POPULATION
    return Claim(about, ABOVE_ZERO, forms, families[ALL_RUNS], population)


def _exchanges(rows: pd.DataFrame, kept: pd.Series, partners: dict[str, list[str]]) -> list[tuple]:
    """Of each base model, method and other method: name, weights of the difference of sizes, the
    effect of the exchange, that of the rate, and the base model and method.
    """
    low, high, found = rows["rate"].lt(1e-4), rows["rate"].gt(1e-4), []
    for base in rows["base_model"].unique():
        on_base = rows["base_model"].eq(base)
        for method, others in partners.items():
            here = on_base & kept & rows["method"].eq(method)
            rate = matched_weight(rows, here & low, here & high, SETTING)
            effect = float(rate @ rows["change"])
            for other in others:
                there = on_base & kept & rows["method"].eq(other)
                swap = matched_weight(rows, there, here, [*SETTING, "rate"])
                moved = float(swap @ rows["change"])
                weight = np.sign(moved) * swap - np.sign(effect) * rate
                name = f"{_WORDS[base]} {METHOD_LABELS[other]} for {METHOD_LABELS[method]}"
                if rate.any() and swap.any():
                    found.append((name, weight, moved, effect, (base, method)))
    return found


def _by_cell(parts: list[tuple]) -> dict[tuple, list[tuple]]:
    """Exchanges by base model and method."""
    found = {}
    for one in parts:
        found.setdefault(one[4], []).append(one)
    return found


# ---- claims about spread
def most_variable(rows: pd.DataFrame, base_model: str, n_boot: int, seed: int) -> Claim:
    """A base model varies most if its runs' standard deviation exceeds that of each other one, at
    equal method and settings.
    """
    own = rows["base_model"].eq(base_model)
    others = [base for base in rows["base_model"].unique() if base != base_model]
    pairs = {_WORDS[base]: (own, rows["base_model"].eq(base)) for base in others}
    cells = {
        f"{_WORDS[base]}, {METHOD_LABELS[method]}": (
            own & rows["method"].eq(method),
            rows["base_model"].eq(base) & rows["method"].eq(method),
        )
        for base in others
        for method in CLASSES
    }
    equal = ["method", *SETTING, "rate"]
    about = f"standard deviation of {_WORDS[base_model]} over that of each other base model"
    return of_spread(rows, pairs, cells, equal, ABOVE_ONE, about, n_boot, seed)


def steadier(rows: pd.DataFrame, n_boot: int, seed: int) -> Claim:
    """DPO is less variable than SFT if the ratio of standard deviations lies below one, at equal
    base model, method, rate and epochs.
    """
    dpo, sft = rows["objective"].eq("dpo"), rows["objective"].eq("sft")
    cells = {
        f"{_WORDS[base]} {METHOD_LABELS[method]}": tuple(
            side & rows["base_model"].eq(base) & rows["method"].eq(method) for side in (dpo, sft)
        )
        for base in rows["base_model"].unique()
        for method in CLASSES
    }
    equal = ["base_model", "method", "dataset", "epochs", "rate"]
    missing = original_tables.absent(rows.rename(columns={"labelled": "learning_rate_labelled"}))
    lost = int(missing["objective"].eq("dpo").sum())
    about = (
        "standard deviation of DPO over that of SFT, at equal base model, method and setting;"
        f" {lost} DPO runs are absent, so it is about the runs that survived"
    )
    return of_spread(
        rows, {"DPO over SFT": (dpo, sft)}, cells, equal, BELOW_ONE, about, n_boot, seed
    )


def of_spread(
    rows: pd.DataFrame,
    pairs: dict[str, tuple],
    cells: dict[str, tuple],
    equal: list[str],
    region: Region,
    about: str,
    n_boot: int,
    seed: int,
) -> Claim:
    """A claim about ratios of standard deviations: over all runs, between equal runs, and the share
    of cells (base models and methods) whose ratio between equal runs lies in the region.
    """
    kept = kept_runs(rows)
    kept = {form: kept[form] for form in (ALL_RUNS, NO_OUTLIERS) if form in kept}
    kept[NO_P_TUNING] = rows["method"].ne("p_tuning")
    forms, families = {}, {}
    for form, here in kept.items():
        total, again, each = {}, {}, {}
        for name, (one, other) in pairs.items():
            sides = rows, one & here, other & here, equal
            total[name] = original_spreads.total_ratio(*sides, n_boot, seed)
            again[name] = original_spreads.repeat_ratio(*sides)
        for name, (one, other) in cells.items():
            ratio = original_spreads.repeat_ratio(rows, one & here, other & here, equal)
            each |= {name: ratio} if np.isfinite(ratio.value) else {}
        families[form] = quantifiers.of_ratios(each)
        forms[form] = (
            _spread_reading(total, region, quantifiers.TOTAL),
            _spread_reading(again, region, quantifiers.REPEATS),
            quantifiers.cell_readings(families[form], region)[1],
        )
    outcome = original_spreads.SPREAD_RATIO
    return Claim(about, region, forms, families[ALL_RUNS], ROUNDS_POPULATION, outcome)


def _spread_reading(ratios: dict, region: Region, quantifier: str) -> Quantified:
    family = quantifiers.of_ratios(ratios)
    worst = min(ratios.values(), key=lambda one: quantifiers.depth(one.value, region))
    p = "" if np.isnan(worst.p) else f", two-sided p {worst.p:.3f}"
    outcome, words = original_spreads.SPREAD_RATIO, f"{worst.how}{p}"
    return quantifiers.mean_reading(family, region, outcome, quantifier, words)
