"""Figure of the specification curve: the primary family under every choice of an analyst."""

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
    drawn,
    nothing,
    short_name,
    under,
)
from driftbook.stats import harm
from driftbook.stats.confidence import BELOW, INTERVAL
from driftbook.stats.noninferiority import CANNOT_TELL
from driftbook.stats.terms import PRIMARY

KINDS = {
    "judge": "judge",
    "threshold": "threshold",
    "wording": "wording",
    "no_ops": "no-ops",
    "weights": "weights",
    "unscored": "unscored",
    "estimator": "estimator",
}
_SURE, _UNSURE = 2.6, 2.2  # sizes of dots


@drawn("19_primary", "specifications")
def specification_curve(tables: dict) -> tuple[Figure, str]:
    rows = tables["specifications"].dropna(subset=["value"])
    if rows.empty:
        return nothing(
            "Nothing to draw: the study declares no family of changes in safety over all base"
            " models, or none could be estimated."
        )
    rows = rows.astype({"value": float, "ci_low": float, "ci_high": float})
    rate = short_name(harm.of_judge(rows["judge"].iloc[0]))
    methods = [method for method in TRAINED_METHODS if rows["method"].eq(method).any()]
    levels = _levels(rows)
    heights = [2.3, 0.2 + 0.145 * len(levels)]
    fig, axes = plt.subplots(
        2,
        len(methods),
        figsize=(WIDTH, sum(heights) + 0.7),
        height_ratios=heights,
        sharey="row",
        sharex="col",
        squeeze=False,
    )
    for (top, below), method in zip(axes.T, methods, strict=True):
        own = rows[rows["method"].eq(method)].sort_values("value", kind="stable")
        _values(top, own, COLOURS[method])
        _choices(below, own, levels, COLOURS[method])
        top.set_title(METHOD_LABELS[method], loc="left")
    axes[0, 0].set_ylabel(f"Change in {rate}\n(percentage points, {INTERVAL})")
    names = [_name(kind, level, rows) for kind, level in levels]
    axes[1, 0].set_yticks(range(len(levels)), names, fontsize=7)
    under(axes[1], "Specifications, from the lowest estimate to the highest")
    return fig, _caption(rows, levels)


def _levels(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """The kinds of choices with their levels, those that have several."""
    return [
        (kind, level) for kind in KINDS for level in rows[kind].unique() if rows[kind].nunique() > 1
    ]


def _name(kind: str, level: str, rows: pd.DataFrame) -> str:
    """The label of a line of the matrix; the declared choice is marked."""
    declared = rows.loc[rows["declared"], kind].eq(level).any()
    return _chosen(kind, level) + (" *" if declared else "")


def _chosen(kind: str, level: str) -> str:
    shown = "mean over runs" if (kind, level) == ("estimator", PRIMARY) else level
    return f"{KINDS[kind]}: {shown}"


def _values(ax: Axes, own: pd.DataFrame, colour: str) -> None:
    """The estimates in their order, with intervals; filled where there is a word."""
    ax.axhline(0, color="#777777", lw=0.9, zorder=1)
    for place, row in enumerate(own.itertuples()):
        if pd.notna(row.ci_low):
            ax.plot([place] * 2, [row.ci_low, row.ci_high], color=colour, lw=0.8, alpha=0.6)
        sure = row.word != CANNOT_TELL
        look = {"ms": _SURE if sure else _UNSURE, "color": colour, "mew": 0.7, "zorder": 3}
        ax.plot(place, row.value, "o", mfc=colour if sure else "white", **look)
    for place in np.flatnonzero(own["declared"].to_numpy(bool)):
        value = own["value"].iloc[place]
        ax.plot(place, value, "D", ms=5.5, mfc="none", color="black", mew=1, zorder=4)
    ax.grid(visible=False, axis="x")
    ax.grid(visible=True, axis="y")


def _choices(ax: Axes, own: pd.DataFrame, levels: list[tuple[str, str]], colour: str) -> None:
    """A mark where a specification has a choice; a line between kinds."""
    for line, (kind, level) in enumerate(levels):
        places = np.flatnonzero(own[kind].eq(level).to_numpy(bool))
        ax.plot(places, [line] * len(places), "|", ms=5, mew=1, color=colour)
        if line and levels[line - 1][0] != kind:
            ax.axhline(line - 0.5, color="#dddddd", lw=0.6, zorder=0)
    ax.set_ylim(len(levels) - 0.4, -0.6)
    ax.set_xlim(-1, len(own))
    ax.set_xticks([])
    ax.grid(visible=False)


def _caption(rows: pd.DataFrame, levels: list[tuple[str, str]]) -> str:
    varied = {kind for kind, _ in levels}
    fixed = [_chosen(kind, rows[kind].iloc[0]) for kind in KINDS if kind not in varied]
    n = len(rows[list(KINDS)].drop_duplicates())
    text = (
        f"The declared family {rows['family_of_tests'].iloc[0]} under {n} specifications: above the"
        " estimates over all base models, below what was chosen in each. Diamond and *: as"
        f" declared. Filled: Holm's adjusted p among the methods of the specification is {BELOW}."
    )
    return text + (f" The same in all: {'; '.join(fixed)}." if fixed else "")
