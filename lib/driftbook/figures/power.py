"""Figures of what a grid can tell and of how sure the trade-offs are: power, correlations without
noise, the probability of being on the Pareto front.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from driftbook.analyses.correlations import CORRELATION, UNATTENUATED, WITHIN_METHODS
from driftbook.analyses.power import MARGIN
from driftbook.analyses.power_rows import GRID, SMALLEST
from driftbook.analyses.tradeoffs import FRONT_BIAS
from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    TRAINED_METHODS,
    WIDTH,
    above,
    bases,
    dots,
    drawn,
    floats,
    handle,
    harm_name,
    harm_of,
    legend,
    name_rows,
    nothing,
    panels,
    pick,
    short_name,
    under,
    zero,
)
from driftbook.figures.names import SHORT
from driftbook.stats import harm, influence
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.populations import counted
from driftbook.stats.terms import AS_CONFIGURED, FRONT, NO_OP, NONE, SETTINGS, TRAINED

ALL_RUNS, WITHIN = "#222222", "#9a9a9a"


# ---- 16 power
@drawn("16_power")
def power(tables: dict) -> tuple[Figure, str]:
    rows = pick(tables, harm_of(tables), SMALLEST, "safety")
    rows = rows[rows["against"].eq(NONE)]
    grid = rows[rows["group"].eq(GRID)].assign(prompts=lambda grid: grid["n_items"].astype(float))
    grid = grid.assign(seeds=grid["member"].astype(float)).dropna(subset=["seeds", "value"])
    if grid.empty:
        return nothing("Nothing to draw: of no plan it is known what increase it would see.")
    names = [base for base in ["all", *bases(tables)] if grid["base_model"].eq(base).any()]
    counts = sorted(grid["prompts"].unique())
    fig, axes = plt.subplots(
        len(counts),
        len(names),
        figsize=(WIDTH, 1.75 * len(counts) + 0.65),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    present, seeds = rows[rows["group"].eq(AS_CONFIGURED)], _present_seeds(tables)
    for line, prompts in zip(axes, counts, strict=True):
        for ax, base_model in zip(line, names, strict=True):
            _curves(ax, grid[grid["prompts"].eq(prompts) & grid["base_model"].eq(base_model)])
            here = present[present["base_model"].eq(base_model) & present["n_items"].eq(prompts)]
            value = here["value"].dropna()
            look = {"ms": 9, "mfc": "none", "mec": "#333333", "mew": 0.8, "zorder": 5}
            ax.plot([seeds] * len(value), value, "o", **look)
        line[0].set_ylabel(
            f"{prompts:,.0f} prompts: smallest\nincrease seen\n(percentage points)", fontsize=7.5
        )
    for ax, base_model in zip(axes[0], names, strict=True):
        ax.set_title("all base models" if base_model == "all" else base_model, fontsize=8, pad=4)
    _scales(axes, sorted(grid["seeds"].unique()))
    under(axes[-1], "Seeds in each setting (logarithmic scales)")
    legend(fig, [method for method in TRAINED_METHODS if grid["method"].eq(method).any()])
    settings = present["n_runs"].astype(float).div(seeds).median()
    return (
        fig,
        (
            f"The smallest increase in the {harm_name(tables)} that is seen with 80% power, by the"
            " number of seeds and of prompts (to show that there is no increase takes a margin as"
            f" large, and a larger one near 0%); dashed: {MARGIN:g} points. Circles: the present"
            f" grid ({counted(int(seeds), 'seed')} in about {counted(round(settings), 'setting')}"
            " of a method on a base model)."
            f" Lines: {INTERVAL}s, since {_spread(tables)}. What stays at many seeds is what the"
            " prompts alone leave unknown."
        ),
    )


def _setting_sizes(tables: dict) -> pd.Series:
    """The number of runs of each setting."""
    known = influence.arms(tables["variants"], tables["runs"])
    known = known[known["arm"].isin([TRAINED, NO_OP])]
    return known.groupby(["base_model", "method", "setting"]).size()


def _present_seeds(tables: dict) -> float:
    """The most common number of runs of a setting."""
    return float(_setting_sizes(tables).mode().iloc[0])


def _spread(tables: dict) -> str:
    """Where the spread of runs and prompts was taken from."""
    if _setting_sizes(tables).gt(1).any():
        return "the spread of runs and prompts is itself estimated from the study's own runs"
    return (
        "the spread of prompts is itself estimated; that of runs is the original study's, since no"
        " setting was run twice here"
    )


def _curves(ax: Axes, rows: pd.DataFrame) -> None:
    """A line per method over seeds, with the interval of each dot beside the others'."""
    ax.axhline(MARGIN, color="#777777", lw=0.8, ls="--", zorder=1)
    ax.grid(axis="y")
    methods = [method for method in TRAINED_METHODS if rows["method"].eq(method).any()]
    for shift, method in zip(np.linspace(-0.045, 0.045, len(methods)), methods, strict=True):
        own = rows[rows["method"].eq(method)].sort_values("seeds")
        place = own["seeds"] * np.exp(shift)
        ax.plot(place, own["value"], "-o", ms=2.8, lw=0.9, color=COLOURS[method], zorder=3)
        ax.vlines(
            place, own["ci_low"], own["ci_high"], color=COLOURS[method], lw=0.8, alpha=0.7, zorder=2
        )


def _scales(axes: np.ndarray, seeds: list[float]) -> None:
    """Logarithmic axes with plain numbers."""
    ax = axes[0, 0]
    ax.set_xscale("log")
    ax.set_yscale("log")
    for each in axes.ravel():
        each.set_xticks(seeds, [f"{one:g}" for one in seeds], fontsize=6.5)
        each.xaxis.set_minor_locator(NullLocator())
        each.yaxis.set_minor_locator(NullLocator())
        each.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = ax.get_ylim()
    ax.set_yticks([one for one in (0.1, 0.3, 1, 3, 10, 30, 100) if low <= one <= high])


# ---- 12 trade-offs
@drawn("12_tradeoffs")
def attenuation(tables: dict) -> tuple[Figure, str]:
    rows = tables["estimates"]
    rows = floats(rows[rows["notebook"].eq("12_tradeoffs") & rows["against"].eq(harm_of(tables))])
    outcomes = [
        outcome for outcome in SHORT if rows.loc[rows["outcome"].eq(outcome), "value"].notna().any()
    ]
    if not outcomes:
        return nothing("Nothing to draw: no correlation could be computed.")
    fig, axes = panels(tables, 1, [0.4 + 0.42 * len(outcomes)])
    kinds = [
        (words + more, colour, bool(more))
        for words, colour in (("", ALL_RUNS), (WITHIN_METHODS, WITHIN))
        for more in ("", UNATTENUATED)
    ]
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        zero(ax)
        own = rows[rows["base_model"].eq(base_model)].set_index(["outcome", "contrast"])
        for place, outcome in enumerate(outcomes):
            for shift, (words, colour, corrected) in zip(
                np.linspace(-0.27, 0.27, len(kinds)), kinds, strict=True
            ):
                _correlation(
                    ax, own, (outcome, CORRELATION + words), place + shift, colour, corrected
                )
            if place:
                ax.axhline(place - 0.5, color="#eeeeee", lw=0.6, zorder=0)
        ax.set_xlim(-1.08, 1.08)
        ax.set_xticks([-1, 0, 1], ["−1", "0", "1"])
    name_rows(axes[0, 0], [short_name(outcome) for outcome in outcomes])
    under(axes[0], f"Correlation with the change in {harm_name(tables)} ({INTERVAL})")
    _kinds(fig)
    text = (
        "Does what happens to safety go with what happens to the rest? Correlations over the"
        " trained runs of each base model, between the changes in the"
        f" {harm_name(tables)} and in each other outcome. Hollow: as it is; filled: corrected"
        " for the noise of prompts and question families. Dark: over all runs; light: within"
        " methods, so that methods' own means do not count. A cross: cannot be corrected, the runs"
        " differ by noise or the correction leads beyond 1. No line: too uncertain for an interval."
    )
    known = rows[rows["value"].notna()]
    return (
        fig,
        (
            f"{text} Behind it: {known['n_runs'].min()} to {known['n_runs'].max()} runs of each"
            " base model."
        ),
    )


def _correlation(
    ax: Axes, own: pd.DataFrame, key: tuple[str, str], place: float, colour: str, corrected: bool
) -> None:
    if key not in own.index:
        return
    row = own.loc[[key]]
    dots(ax, row, place, colour, corrected)
    if corrected and row["value"].isna().iloc[0]:
        ax.plot(0, place, "x", ms=3.5, color=colour, mew=0.9, zorder=4)


def _kinds(fig: Figure) -> None:
    given = [
        (words, colour, filled)
        for words, colour in (("all runs", ALL_RUNS), ("within methods", WITHIN))
        for filled in (False, True)
    ]
    handles = [
        handle(
            f"{words}, {('corrected' if filled else 'as it is')}",
            colour,
            ls="-",
            lw=1,
            mfc=colour if filled else "white",
        )
        for words, colour, filled in given
    ]
    above(fig, handles)


@drawn("12_tradeoffs")
def front_probability(tables: dict) -> tuple[Figure, str]:
    rows = tables["estimates"]
    fair, unbiased = (harm.worded(one, harm_of(tables)) for one in (FRONT, FRONT_BIAS))
    rows = rows[rows["outcome"].isin([fair, unbiased])].astype({"value": float})
    rows = rows[rows["group"].eq(SETTINGS) | rows["method"].eq("none")]
    if rows["value"].isna().all():
        return nothing("Nothing to draw: no setting has a score in all goals.")
    order = rows.assign(place=rows["method"].map(list(COLOURS).index)).sort_values(
        "place", kind="stable"
    )
    order = order[["method", "member"]].drop_duplicates().itertuples(index=False, name=None)
    pairs = list(order)
    fig, axes = panels(tables, 1, [0.5 + 0.19 * len(pairs)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        own = rows[rows["base_model"].eq(base_model)]
        own = own.set_index(["outcome", "method", "member"])["value"]
        for place, (method, setting) in enumerate(pairs):
            for outcome, filled, shift in ((fair, True, -0.16), (unbiased, False, 0.16)):
                value = own.get((outcome, method, setting), np.nan)
                face = COLOURS[method] if filled else "white"
                look = {"color": COLOURS[method], "mfc": face, "mew": 1, "zorder": 4}
                ax.plot(value, place + shift, "o", ms=4, **look)
        ax.axvline(50, color="#777777", lw=0.8, ls="--", zorder=1)
        ax.set_xlim(-4, 104)
        ax.set_xticks([0, 50, 100])
    name_rows(axes[0, 0], [_setting(*pair) for pair in pairs])
    axes[0, 0].tick_params(axis="y", labelsize=6.5)
    under(axes[0], "Probability of being on the Pareto front (percent)")
    fairness = {"filled": fair, "hollow": unbiased}
    goals = "; ".join(
        f"{look}: {outcome.partition(': ')[2]}"
        for look, outcome in fairness.items()
        if rows["outcome"].eq(outcome).any()
    )
    runs = rows.loc[rows["method"].ne("none"), "n_runs"]
    return (
        fig,
        (
            "How sure it is that nothing beats a setting: that no other setting, and not the base"
            f" model, is as good in all goals and better in one. Goals: {goals}. Seeds, prompts and"
            " question families are drawn anew, the same ones for all settings of a base model"
            " (where a method ran no setting twice, prompts alone); a probability has no interval"
            " of its own. With so many goals much is on the front: low probabilities say more than"
            f" high ones. Behind it: {_runs_a_setting(runs)}."
        ),
    )


def _runs_a_setting(runs: pd.Series) -> str:
    """How many runs a setting has in words."""
    if runs.min() == runs.max():
        return f"{counted(int(runs.min()), 'run')} a setting"
    return f"{runs.min()} to {runs.max()} runs a setting"


def _setting(method: str, setting: str) -> str:
    words = setting.replace("sft", "SFT").replace("dpo", "DPO")
    return METHOD_LABELS[method] if method == "none" else f"{METHOD_LABELS[method]}, {words}"
