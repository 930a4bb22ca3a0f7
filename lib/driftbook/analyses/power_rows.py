"""Power and its components as rows of estimates, and in words."""

import numpy as np
import pandas as pd
from scipy.stats import chi2

from driftbook.analyses.power import (
    MARGIN,
    beyond_critical,
    margin_reach,
    minimum_detectable,
    power_grid,
    precision,
    smallest_margin,
)
from driftbook.analyses.power_components import components, family_size
from driftbook.stats import estimation, influence, terms
from driftbook.stats.confidence import LOWER, UPPER

SMALLEST, EXCLUDED = (
    "smallest increase seen with 80% power",
    "smallest margin within which no increase can be shown, with 80% power",
)
SHOWN = "power to show no increase beyond the margin (percent)"
SD_RUN, SD_UNIT, SD_NOISE = (
    "spread of runs with equal settings (SD)",
    "spread over prompts of the mean change (SD)",
    "spread of run x prompt (SD)",
)
PLANNED = "planned, with the original study's spread"
GRID = "grid"  # group of the plans that are tried: member is seeds a setting, category the prompts


def margin_word(smallest: float, margin: float = MARGIN) -> str:
    """What the smallest margin that can be shown says of a test at `margin`."""
    return (
        "not known" if np.isnan(smallest) else "can tell" if smallest <= margin else "cannot tell"
    )


def by_category(
    values: pd.DataFrame, arms: pd.DataFrame, cells: pd.DataFrame, margin: float = MARGIN
) -> pd.DataFrame:
    """What the present runs can show in each category of a rate (runs x (category, prompt)), and
    about how many prompts it would take.

    A row per category, base model (and all) and method: n_units, se, df, smallest (margin, in
    points), says (at `margin`), needs: the prompts at which `margin` were the smallest one, with
    these runs and the same critical value; null where the runs alone leave more than that unknown.
    """
    here, parts = power_grid(cells), []
    for category, part in values.T.groupby(level=0, sort=False):
        change = influence.paired(part.T, arms)
        found = components(change, cells[cells["group"].eq(terms.AS_CONFIGURED)]).query(
            "other == 'none'"
        )
        plan, endless = (
            precision(found, here, n, family_size(change), examples=4)
            for n in (part.shape[0], 1_000_000_000)
        )
        parts.append(
            plan.assign(
                category=category, smallest=smallest_margin(plan)["value"], runs_alone=endless["se"]
            )
        )
    table = pd.concat(parts, ignore_index=True)
    room = (margin * table["se"] / table["smallest"]) ** 2 - table["runs_alone"] ** 2
    needs = np.ceil(
        table["n_units"] * (table["se"] ** 2 - table["runs_alone"] ** 2) / room.where(room > 0)
    )
    return table.drop(columns=["example", "runs_alone"]).assign(
        says=table["smallest"].map(lambda one: margin_word(one, margin)),
        needs=needs.astype("Int64"),
    )


# ---- as estimates
def of_plan(plan: pd.DataFrame, group: str, margin: float = MARGIN, **labels: str) -> pd.DataFrame:
    """Of each contrast the smallest increase seen, and of those with the base model the smallest
    margin and the power at `margin`, as estimates.
    """
    rows = plan.reset_index(drop=True).assign(
        n_items=lambda frame: frame["n_units"], group=group, population=terms.BOTH, **labels
    )
    rows = rows.assign(against=rows["other"])
    smallest = rows.assign(contrast=SMALLEST, **minimum_detectable(rows))
    own = rows[rows["other"].eq("none")]
    excluded, known, critical = (
        own.assign(contrast=EXCLUDED, **smallest_margin(own)),
        own["df_known"].to_numpy(float),
        margin_reach(own, margin),
    )
    low, high = (
        own.assign(se=own["se"] * np.sqrt(known / chi2.ppf(share, known)))
        for share in (LOWER, UPPER)
    )
    ends = {
        name: 100 * beyond_critical(critical, plan["df"], margin / plan["se"])
        for name, plan in (("value", own), ("ci_low", low), ("ci_high", high))
    }
    shown = own.assign(contrast=SHOWN, margin=margin, **ends)
    return estimation.complete(
        pd.concat([smallest, excluded, shown], ignore_index=True).drop(columns=["se", "example"])
    )


def of_components(components: pd.DataFrame, group: str, **labels: str) -> pd.DataFrame:
    """The components of each method on each base model as estimates; spreads of runs and of prompts
    with chi-square intervals at their degrees of freedom.
    """
    own, parts = components[components["other"].eq("none")], []
    for name, contrast, df in (
        ("run", SD_RUN, own["df_run"]),
        ("unit", SD_UNIT, own["df_unit"]),
        ("noise", SD_NOISE, None),
    ):
        rows = own[["base_model", "method", "how"]].assign(value=own[name], contrast=contrast)
        if df is not None:
            known = df.where(df > 0).astype(float)
            rows = rows.assign(
                ci_low=own[name] * np.sqrt(known / chi2.ppf(UPPER, known)),
                ci_high=own[name] * np.sqrt(known / chi2.ppf(LOWER, known)),
            )
        parts.append(rows)
    return estimation.complete(
        pd.concat(parts, ignore_index=True).assign(group=group, population=terms.BOTH, **labels)
    )


def over_all(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows over all base models; where there is no such row, those of the first base model."""
    return (
        rows[
            rows["base_model"].eq(
                "all" if rows["base_model"].eq("all").any() else rows["base_model"].iloc[0]
            )
        ]
        if len(rows)
        else rows
    )


def power_sentence(estimates: pd.DataFrame, names: dict[str, str], margin: float = MARGIN) -> str:
    """What the present grid can show, in words; `names` has the methods' names."""
    rows = over_all(
        estimates[estimates["group"].eq(terms.AS_CONFIGURED) & estimates["contrast"].eq(EXCLUDED)]
    )
    if rows["value"].isna().all():
        return (
            "This grid cannot tell anything of seeds like these:"
            f" {rows['how'].iloc[0] if len(rows) else 'no run has a score'}."
        )
    known = rows.dropna(subset="value")
    enough = [names[method] for method in known.loc[known["value"].le(margin), "method"]]
    margins = ", ".join(
        f"{names[row.method]} {row.value:.1f} ({row.ci_low:.1f} to {row.ci_high:.1f})"
        for row in known.itertuples()
    )
    where = (
        "the mean over base models"
        if known["base_model"].eq("all").all()
        else f"{known['base_model'].iloc[0]}"
    )
    return (
        f"For {where} this grid can show that safety is preserved within {margin:g} points for"
        f" {', '.join(enough) or 'no method'}; the smallest margins are {margins} points."
    )
