"""The original study read again, whole: its runs as one table of changes, and every estimate."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from driftbook.rereading import (
    original_analysis,
    original_models,
    original_study,
    original_tables,
    original_tests,
)
from driftbook.stats import linear, logistic, mixed
from driftbook.study.tables import ESTIMATES

_RATES = (2e-5, 1e-3)
OF_CATEGORIES = (
    "difference ~ base_model * method + method:objective + method:log10_rate + method:epochs"
    " + dataset + round"
)
OF_ITEMS = "safe ~ base_model * method + method:objective + method:low + epochs + dataset"


@dataclass(frozen=True)
class Reading:
    """The public runs and verdicts: as they are, as tables of this workbook, and a row per run."""

    runs: pd.DataFrame
    known: dict[str, pd.DataFrame]
    items: pd.DataFrame
    rows: pd.DataFrame

    @property
    def folder(self) -> Path:
        return original_tables.folder()

    def tables(self, estimates: pd.DataFrame) -> dict:
        """What figures are drawn from."""
        return {**self.known, "note": original_study.ORIGINAL_NOTE, "estimates": estimates}

    def write(
        self, parts: dict[str, pd.DataFrame], name: str = original_study.ORIGINAL_NAME
    ) -> pd.DataFrame:
        """All parts as one table of estimates, written under a name with the other tables."""
        estimates = ESTIMATES.concat(list(parts.values()))
        original_tables.write_original(self.known, estimates, self.folder, name)
        return estimates

    def tests_sentence(self) -> str:
        """How many of the published statistics come back, and which do not."""
        reproduced = original_tests.reproduction(self.rows)
        agreed = reproduced["reproduced"].ne("none")
        kept = original_study.cited("effect_sizes").set_index("comparison")["value"]
        lost = [
            f"{row.comparison}, {row.statistic} {row.published}"
            for row in reproduced[~agreed].itertuples()
        ]
        fence = original_tests.outliers(self.rows["utility"]).sum()
        return (
            f"{agreed.sum()} of {len(reproduced)} published statistics come back to every digit"
            f" printed. These do not: {'; '.join(lost)}. The study keeps {kept['runs kept']:.0f}"
            f" runs and leaves out {kept['utility outliers left out']:.0f} by Tukey's fence; public"
            f" are {len(self.rows)}, of which {fence} lie outside the fence."
        )

    def labels_sentence(self, parts: dict[str, pd.DataFrame]) -> str:
        """How many labels are wrong, how many runs learned nothing, and what the true rate does to
        LoRA; `parts` is original_estimates.
        """
        effects = parts["rate effects"]
        true = effects["member"].eq(original_analysis.RATES_MEMBER.format("true"))
        own = effects[effects["base_model"].ne("all") & true & effects["method"].eq("lora")]
        worst = own.nlargest(1, "value").iloc[0]
        wrong = self.known["runs"]["findings"].notna().sum()
        return (
            f"{wrong} of {len(self.runs)} public runs carry the wrong learning rate,"
            f" {self.rows['no_op'].sum()} learned nothing, and at true rates 2e-5 instead of 1e-3"
            f" moves LoRA on {original_tables.short(worst.base_model)} by {worst.value:+.1f} points"
            f" ({worst.ci_low:+.1f} to {worst.ci_high:+.1f})."
        )


def read_original(source: str = "") -> Reading:
    """The study's data from a reduced folder or a checkout of its package; else from GitHub.

    Raises:
        ValueError: the data are not there, or not what they were; the sentence says what to do.
    """
    runs, verdicts = original_study.load(source)
    known, items = original_tables.tables(runs, verdicts), original_tables.items(runs, verdicts)
    return Reading(runs, known, items, original_analysis.frame(runs, verdicts))


def original_estimates(reading: Reading, items_too: bool = True) -> dict[str, pd.DataFrame]:
    """All estimates of the study read again, by what they answer, in the notebook's order."""
    rows = reading.rows
    reproduced = original_tests.reproduction(rows)
    agreement = original_tests.agreement(rows, reading.items)
    return {
        "runs": original_analysis.single_runs(rows),
        "tests": original_tests.of_tests(rows, reproduced),
        "answers": original_tests.of_agreement(agreement),
        "rates": original_analysis.cells(rows),
        "rate effects": original_analysis.rate_effects(rows),
        "changes": original_analysis.changes(rows),
        "rounds": original_analysis.rounds(rows),
        "against no-ops": original_analysis.against_no_ops(rows),
        "between methods": original_analysis.between_methods(rows),
        "between base models": original_analysis.between_bases(rows),
        "categories": original_analysis.by_category(rows),
        "run x category": category_model(rows)[1],
        **({"items": item_model(rows, reading.items)[1]} if items_too else {}),
    }


def category_model(rows: pd.DataFrame) -> tuple[mixed.MixedFit, pd.DataFrame]:
    """The linear mixed model of run x category changes, and its contrasts as estimates."""
    frame = original_models.category_rows(rows)
    fit = linear.rate_model(frame, OF_CATEGORIES)
    low, high = (
        frame.loc[frame["rate"].eq(rate)].groupby("method")["log10_rate"].first() for rate in _RATES
    )
    column = "log10_rate", low["lora"], high["lora"]
    return fit, _contrasts(fit, rows, column, original_analysis.SAFETY, "run x category")


def item_model(rows: pd.DataFrame, items: pd.DataFrame) -> tuple[mixed.MixedFit, pd.DataFrame]:
    """The logistic model of single verdicts, and its contrasts as estimates."""
    asked = original_models.item_rows(rows, items).dropna(subset="safe")
    fit = logistic.item_model(asked.assign(safe=asked["safe"].astype(int)), OF_ITEMS)
    return fit, _contrasts(fit, rows, ("low", 1, 0), original_analysis.ODDS, "items")


def _contrasts(
    fit: mixed.MixedFit, rows: pd.DataFrame, column: tuple, outcome: str, model: str
) -> pd.DataFrame:
    """Every pair of methods, and the lower rate instead of the higher within each method."""
    at = original_models.contrast_rows(rows)
    weights, names = original_models.pairs_of_methods(fit, at)
    given = original_analysis.DIFFERENCE
    parts = [
        original_models.of_model(fit, w, names.iloc[[i]], outcome, model, given)
        for i, w in enumerate(weights)
    ]
    weights, names = original_models.effect_of_rate(fit, at, *column)
    given = original_analysis.RATE_EFFECT
    return ESTIMATES.concat(
        [*parts, original_models.of_model(fit, weights, names, outcome, model, given)]
    )
