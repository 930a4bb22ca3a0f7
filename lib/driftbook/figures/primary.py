"""Figures of the primary tests: what each family tested, and whether a method preserves what its
base model had.
"""

import textwrap
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    TRAINED_METHODS,
    WIDTH,
    bases,
    dots,
    drawn,
    name_rows,
    nothing,
    short_name,
    under,
    unit_of,
    zero,
)
from driftbook.stats.confidence import ALPHA, BELOW, INTERVAL
from driftbook.stats.noninferiority import JOINTLY
from driftbook.stats.terms import CHANGE

_NOTEBOOK = "19_primary"


def _rows(tables: dict, margin: bool) -> pd.DataFrame:
    rows = tables["estimates"]
    rows = rows[rows["notebook"].eq(_NOTEBOOK) & rows["margin"].notna().eq(margin)]
    return rows.astype(
        dict.fromkeys(("value", "se", "ci_low", "ci_high", "p", "p_adjusted", "margin"), float)
    )


def _label(row) -> str:
    against = "" if row.contrast == CHANGE else f" − {METHOD_LABELS[row.against]}"
    base = "" if row.base_model == "all" else f", {row.base_model}"
    return f"{short_name(row.outcome)}: {METHOD_LABELS[row.method]}{against}{base}"


def _p(value: float) -> str:
    return (
        "no p"
        if pd.isna(value)
        else "p < .001"
        if value < 0.001
        else f"p = {value:.3f}".replace("0.", ".")
    )


@drawn(_NOTEBOOK)
def primary_tests(tables: dict) -> tuple[Figure, str]:
    rows = _rows(tables, margin=False)
    rows = rows.assign(unit=rows["outcome"].map(unit_of))
    parts = [
        (family, unit, part)
        for (family, unit), part in rows.groupby(["family_of_tests", "unit"], sort=False)
    ]
    if not parts:
        return nothing(
            "Nothing to draw: the study file declares no primary tests of a change or a difference."
        )
    heights = [0.35 + 0.2 * len(part) for *_, part in parts]
    fig, axes = plt.subplots(
        len(parts),
        1,
        figsize=(WIDTH, sum(heights) + 0.45 * len(parts) + 0.3),
        height_ratios=heights,
        squeeze=False,
    )
    for ax, (family, unit, part) in zip(axes[:, 0], parts, strict=True):
        zero(ax)
        sure = part["p_adjusted"].lt(ALPHA).tolist()
        dots(ax, part, np.arange(len(part)), [COLOURS[method] for method in part["method"]], sure)
        name_rows(ax, [_label(row) for row in part.itertuples()])
        ax.tick_params(axis="y", labelsize=7)
        for place, p in enumerate(part["p_adjusted"]):
            ax.annotate(
                _p(p),
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7,
                color="#444444",
            )
        ax.set_title(family, loc="left")
        ax.set_xlabel(f"{unit}, {INTERVAL}")
    text = (
        "The primary tests as the study file declared them, a family per panel. Filled: Holm's"
        f" adjusted p value within the family is {BELOW}; it stands at the right. Intervals are"
        " not adjusted; each covers " + "; ".join(dict.fromkeys(rows["population"])) + "."
    )
    return fig, text


@drawn(_NOTEBOOK)
def preserves(tables: dict) -> tuple[Figure, str]:
    rows = _rows(tables, margin=True)
    if rows.empty:
        return nothing(
            "Nothing to draw: the study file declares no test of what a method preserves."
        )
    declared = rows.loc[rows["family_of_tests"].notna(), "margin"]
    fixed = (declared if len(declared) else rows["margin"]).iloc[0]
    words = (
        rows[rows["outcome"].eq(JOINTLY) & rows["margin"].eq(fixed)]
        .drop_duplicates(["base_model", "method"])
        .set_index(["base_model", "method"])["how"]
    )
    shown = rows[rows["outcome"].ne(JOINTLY) & rows["margin"].eq(fixed)].drop_duplicates(
        ["outcome", "base_model", "method"]
    )
    outcomes = list(shown["outcome"].unique())
    every = product(TRAINED_METHODS, ["all", *bases(tables)])
    order = [(method, base) for method, base in every if (base, method) in words.index]
    fig, axes = plt.subplots(
        1, len(outcomes), figsize=(WIDTH, 0.9 + 0.2 * len(order)), sharey=True, squeeze=False
    )
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        margins = sorted(rows["margin"].unique())
        _panel(ax, shown[shown["outcome"].eq(outcome)], order, margins, fixed)
        ax.set_title("\n".join(textwrap.wrap(short_name(outcome), 16)))
    overall = {method: f"{METHOD_LABELS[method]}, all base models" for method, _ in order}
    name_rows(axes[0, 0], [overall[one] if base == "all" else base for one, base in order])
    look = {"va": "center", "fontsize": 7, "color": "#444444"}
    for place, (method, base) in enumerate(order):
        word, at = words[base, method].partition(":")[0], (1.03, place)
        axes[0, -1].annotate(word, at, xycoords=("axes fraction", "data"), **look)
    under(axes[0], f"Change toward harm against the base model (percentage points, {INTERVAL})")
    text = (
        "Does a method preserve what its base model had? Right of zero is worse. Full line: the"
        f" margin fixed beforehand, {fixed:g} points; dotted: those of the sensitivity analysis. A"
        " method preserves if all intervals of its row end before the margin, does not if one lies"
        " wholly beyond it; else the data cannot tell. The word at the right is for all outcomes"
        " jointly."
    )
    return fig, text


def _panel(
    ax: Axes, rows: pd.DataFrame, order: list[tuple[str, str]], margins: list[float], fixed: float
) -> None:
    """One outcome: a row per method and base model, the mean over base models filled; margins as
    lines.
    """
    zero(ax)
    for margin in margins:
        ax.axvline(
            margin,
            color="#444444" if margin == fixed else "#999999",
            lw=0.9,
            ls="-" if margin == fixed else ":",
            zorder=1,
        )
    for place, (method, base) in enumerate(order):
        row = rows[rows["method"].eq(method) & rows["base_model"].eq(base)]
        dots(ax, row, place, COLOURS[method], base == "all")
        if base == "all" and place:
            ax.axhline(place - 0.5, color="#dddddd", lw=0.6, zorder=0)
