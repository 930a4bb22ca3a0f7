"""Notebook 14: repairs at their chosen levels against their parents and controls; see `repairs`."""

import pandas as pd

from driftbook.analyses import repairs
from driftbook.stats import terms
from driftbook.stats.picking import picked
from driftbook.study.opening import Tables
from driftbook.study.tables import ESTIMATES

NAMES = {"notebook": "14_safe_lora"}


def needed(tables: Tables) -> repairs.Tables:
    """The tables that repairs are scored from."""
    return repairs.Tables(*(getattr(tables, name) for name in repairs.Tables._fields))


def report_half(tables: Tables) -> repairs.Tables:
    """The tables with the half of the safety prompts and held-out answers that is reported on."""
    return repairs.halves(needed(tables), tables.study.seed)[repairs.REPORT]


def repaired_runs(tables: Tables) -> pd.DataFrame:
    """The repaired runs and their parents, as `repairs.repairs`.

    Raises:
        ValueError: the study repairs no runs.
    """
    found = repairs.repairs(tables.variants, tables.runs)
    if found.empty:
        raise ValueError(
            f"the study {tables.study.name} repairs no runs; give it mitigations, as"
            " studies/safe_lora.yaml does"
        )
    return found


def frontier_points(tables: Tables) -> pd.DataFrame:
    """The table `frontier`: the numbers of each run on either half."""
    return repairs.points(needed(tables), repaired_runs(tables), tables.study.seed)


def chosen_levels(tables: Tables, keep: float) -> pd.DataFrame:
    """The level of each repair on each base model, chosen on the calibration half."""
    return repairs.chosen(tables.frontier, repaired_runs(tables), keep)


def runs_at_level(tables: Tables, levels: pd.DataFrame) -> pd.DataFrame:
    """The runs of every repair and of its controls at the chosen level."""
    return repairs.at_chosen(repaired_runs(tables), levels)


def repair_estimates(tables: Tables, levels: pd.DataFrame) -> pd.DataFrame:
    """Every estimate of notebook 14: repairs against parents, base models and controls, against
    rescaling that keeps as much, and in each BBQ dimension."""
    names = {"study": tables.study.name, **NAMES}
    own, runs = needed(tables), repaired_runs(tables)
    pairs = repairs.compared(own, runs, levels, tables.study.seed, **names)
    leading = [repairs.leading(runs), repairs.leading(runs, "rescale")]
    dimensions = repairs.by_dimension(own, runs, levels, filter(None, leading), **names)
    beside = repairs.beside_rescaling(tables.frontier, runs, levels, **names)
    return ESTIMATES.concat([pairs, dimensions, beside])


# ---- for reading
def counts_of(tables: Tables) -> pd.DataFrame:
    """How many runs each repair and each of its controls has, by level."""
    runs = repaired_runs(tables)
    counts = runs.assign(control=runs["control"].fillna("itself")).pivot_table(
        index=["name", "value"],
        columns="control",
        values="run_id",
        aggfunc="count",
        dropna=False,
        sort=False,
    )
    return counts.dropna(how="all").fillna(0).astype(int)


def levels_shown(levels: pd.DataFrame) -> pd.DataFrame:
    """Repairs x base models: the chosen level, and on how many base models it keeps enough."""
    which = repairs.LEVEL_OF[1:]
    table = levels.set_index([*which, "base_model"])["value"].unstack()
    return table.assign(**{"keeps enough on": levels.groupby(which, dropna=False)["enough"].sum()})


def tested(estimates: pd.DataFrame) -> pd.DataFrame:
    """The tests of unsafe responses over all base models, with Holm's adjusted p values."""
    rows = picked(estimates, base_model="all", outcome=terms.UNSAFE)
    columns = [
        "member",
        "contrast",
        "against",
        "value",
        "ci_low",
        "ci_high",
        "p_adjusted",
        "n_runs",
    ]
    return rows.loc[rows["family_of_tests"].notna(), columns]


def spectra_shown(tables: Tables) -> pd.DataFrame:
    """By base model and pair: the norm of V, its effective rank, and that as a share of full."""
    rows = tables.spectra.drop_duplicates(["base_model", "pair", "module"])
    smaller = rows[["out_features", "in_features"]].min(axis=1)
    rows = rows.assign(share=rows["effective_rank_v"] / smaller)
    columns = ["norm_v", "effective_rank_v", "share"]
    return rows.groupby(["base_model", "pair"], sort=False)[columns].mean().astype(float)


def published_numbers() -> pd.DataFrame:
    """Hsu et al. 2024, Tables 1 to 4: utility and attack success rate, as published."""
    wide = {"index": ["setting", "base_model"], "columns": "method", "values": ["utility", "asr"]}
    return repairs.published().pivot(**wide).fillna("")


def repair_sentence(tables: Tables, estimates: pd.DataFrame) -> str:
    """What the leading Safe LoRA repair did at its chosen level, in one sentence."""
    return repairs.sentence(estimates, repairs.leading(repaired_runs(tables)))
