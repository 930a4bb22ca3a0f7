"""Figures of factors (11) and doses (15): shares of the variance beside the largest contrasts,
methods with and without no-ops, doses, matched doses.
"""

import textwrap
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from driftbook.analyses import doses, factors
from driftbook.analyses.variance_shares import SHARE
from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    TRAINED_METHODS,
    WIDTH,
    above,
    axis,
    bases,
    captioned,
    coverage,
    dots,
    drawn,
    floats,
    handle,
    harm_name,
    harm_of,
    intervals_of,
    legend,
    methods_of,
    name_rows,
    nothing,
    panels,
    pick,
    safety_of,
    under,
    zero,
)
from driftbook.stats import harm, influence
from driftbook.stats.confidence import INTERVAL, PERCENT
from driftbook.stats.populations import counted
from driftbook.stats.terms import AS_CONFIGURED, CHANGE, NO_OP, TRAINED

VIEWS = {
    doses.PLAIN: ("as configured", "#222222"),
    doses.MATCHED["dose_nll"]: ("at equal gain on held-out answers", "#009E73"),
    doses.MATCHED["kl_base"]: ("at equal KL to the base model", "#CC79A7"),
}


# ---- 11 factors
@drawn("11_mixed_effects")
def variance_shares(tables: dict) -> tuple[Figure, str]:
    means = [f"{contrast}, {factors.MEAN}" for contrast in (factors.WITHIN, factors.BETWEEN)]
    shares, within, between, single = (
        pick(tables, harm_of(tables), contrast, "safety")
        for contrast in (SHARE, *means, factors.WITHIN)
    )
    if pick(tables, harm_of(tables), CHANGE, "safety")["value"].isna().all():
        return captioned(tables, None, "", safety_of(tables))
    if not any(rows["value"].notna().any() for rows in (shares, within, single)):
        return nothing(
            "Nothing to draw: within a method no two trained runs differ in one factor alone, so"
            " that nothing says which factor moves a run."
        )
    names = list(dict.fromkeys([*shares["member"], *between["member"], *within["member"]]))
    names.sort(key=factors.SEED.__eq__)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.1 + 0.5 * len(names)), sharey=True, width_ratios=[1, 1.5]
    )
    _shares_drawn(left, shares, names)
    methods = methods_of(tables)
    _beside_methods(right, within, between, single, names, methods)
    _say(right, tables["estimates"], names, methods)
    name_rows(left, [name.capitalize() for name in names])
    left.set_title("Share of the variance")
    right.set_title("Largest contrast within a method")
    under([left], f"Percent, {INTERVAL}")
    under([right], f"Percentage points, {PERCENT} band")
    legend(fig, methods)
    bands = (
        "Bands hold for all contrasts at once, over seeds, on these prompts"
        if within["ci_low"].notna().any() or between["ci_low"].notna().any()
        else "No contrast here has a band"
    )
    text = (
        f"Left: share of the variance between runs in the change of the {harm_name(tables)}"
        " (Shapley, noise taken off, interval over redrawn runs); seed is what runs with equal"
        " settings differ by. Shares depend on the levels tried. Right: the largest difference that"
        " only this factor makes within each method, as a mean over matched cells with its band,"
        " and the largest of single cells (hollow); beside them the largest between methods at"
        f" equal settings (grey, its band shaded). {bands}. Secondary: means and single cells"
        " alike, the largest within the method is below the largest between methods, intervals"
        " included. Where a dot is missing no two cells differ in that alone."
    )
    return captioned(tables, fig, text, safety_of(tables))


def _shares_drawn(ax: Axes, shares: pd.DataFrame, names: list[str]) -> None:
    """A dot per factor, or why there is none."""
    zero(ax)
    places = [names.index(factor) for factor in shares["member"]]
    grey = [COLOURS["none"] if factor == factors.SEED else "#222222" for factor in shares["member"]]
    dots(ax, shares, places, grey)
    if len(shares) and shares["value"].isna().all():
        why = "\n".join(textwrap.wrap(shares["how"].iloc[0], 30))
        look = {"ha": "center", "va": "center", "color": "#888888", "fontsize": 7}
        ax.text(0.5, 0.5, why, transform=ax.transAxes, **look)


def _beside_methods(
    ax: Axes,
    within: pd.DataFrame,
    between: pd.DataFrame,
    single: pd.DataFrame,
    names: list[str],
    methods: tuple[str, ...],
) -> None:
    """A dot per factor and method, a hollow one for single cells, and the shaded band of the
    largest contrast between methods.
    """
    zero(ax)
    for row in between.dropna(subset=["ci_low", "ci_high"]).itertuples():
        ax.axvspan(row.ci_low, row.ci_high, color="#eeeeee", lw=0, zorder=0)
    if factors.METHOD in names:
        dots(ax, between, names.index(factors.METHOD), "#777777")
    for method, shift in _shifts(methods):
        for rows, solid in ((single.assign(ci_low=np.nan), False), (within, True)):
            own = rows[rows["method"].eq(method) & rows["member"].isin(names)]
            dots(
                ax,
                own,
                [names.index(factor) + shift for factor in own["member"]],
                COLOURS[method],
                solid,
            )


def _say(ax: Axes, estimates: pd.DataFrame, names: list[str], methods: tuple[str, ...]) -> None:
    """The word of each factor and method, at the right edge, beside its dot."""
    safety = harm.safety_outcome(estimates)
    rows = estimates[estimates["outcome"].eq(safety) & estimates["value"].notna()]
    words = factors.verdicts(rows)
    for method, shift in _shifts(methods):
        for factor, said in (
            (words[method] if method in words else pd.Series(dtype=str)).dropna().items()
        ):
            place = (1.02, names.index(factor) + shift)
            ax.annotate(
                said,
                place,
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=6,
                color=COLOURS[method],
            )


def _shifts(methods: tuple[str, ...]) -> zip:
    """Each method's place beside the middle of a row."""
    return zip(methods, np.linspace(-0.32, 0.32, len(methods)), strict=True)


# ---- 15 dose
@drawn("15_dose")
def no_ops(tables: dict) -> tuple[Figure, str]:
    rows = pick(tables, harm_of(tables), CHANGE, "safety")
    rows = rows[rows["group"].isin([AS_CONFIGURED, TRAINED]) & rows["notebook"].eq("09_safety")]
    methods = [method for method in TRAINED_METHODS if rows["method"].eq(method).any()]
    if not methods:
        return captioned(tables, None, "", safety_of(tables))
    usual = _usual(tables)
    fig, axes = panels(tables, 1, [0.5 + 0.45 * len(methods)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        zero(ax)
        for place, method in enumerate(methods):
            for group, shift, solid in ((AS_CONFIGURED, -0.16, True), (TRAINED, 0.16, False)):
                row = rows[
                    rows["base_model"].eq(base_model)
                    & rows["method"].eq(method)
                    & rows["group"].eq(group)
                ]
                dots(ax, row, place + shift, COLOURS[method], solid)
            own = usual[usual["base_model"].eq(base_model) & usual["method"].eq(method)]
            idle = own["arm"].eq(NO_OP).sum()
            ax.annotate(
                f"{idle} of {len(own)}" if idle else "",
                (0.97, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=6.5,
            )
    name_rows(axes[0, 0], [METHOD_LABELS[method] for method in methods])
    under(axes[0], axis(harm_of(tables)))
    text = (
        f"Change in the {harm_name(tables)} of all runs as configured (filled) and without the"
        " no-ops (hollow). A number says how many of a method's runs are no-ops; where there is"
        " none, both are the same runs. A method that did nothing preserved nothing."
        f"{intervals_of(rows)}"
    )
    fig, caption = captioned(tables, fig, text, safety_of(tables))
    return fig, f"{caption} Shown are the {len(usual)} as configured."


def _usual(tables: dict) -> pd.DataFrame:
    """The runs as configured with their arms and doses."""
    known = influence.arms(tables["variants"], tables["runs"])
    return known[known["arm"].isin([TRAINED, NO_OP])].merge(
        tables["runs"][["run_id", *doses.DOSES]], on="run_id"
    )


@drawn("15_dose", "runs")
def doses_reached(tables: dict) -> tuple[Figure, str]:
    runs = (
        _usual(tables)
        .dropna(subset=list(doses.DOSES), how="all")
        .astype(dict.fromkeys(doses.DOSES, float))
    )
    methods = [method for method in TRAINED_METHODS if runs["method"].eq(method).any()]
    if not methods:
        return nothing("Nothing to draw: no run has a dose.")
    fig, axes = panels(tables, 2, [0.4 + 0.3 * len(methods)] * 2)
    for line, measure in zip(axes, doses.DOSES, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            for place, method in enumerate(methods):
                own = runs[runs["base_model"].eq(base_model) & runs["method"].eq(method)]
                for objective, shift in (("sft", -0.17), ("dpo", 0.17)):
                    _strip(
                        ax,
                        own[own["objective"].eq(objective)],
                        measure,
                        place + shift,
                        COLOURS[method],
                    )
            if measure == "kl_base":
                ax.set_xscale("log")
            else:
                zero(ax)
        name_rows(line[0], [METHOD_LABELS[method] for method in methods])
        under(
            line,
            {
                "dose_nll": (
                    "Gain on held-out answers (nats per token); left of zero: worse than the base"
                    " model"
                ),
                "kl_base": "KL to the base model (nats per token)",
            }[measure],
        )
    worse = runs["dose_nll"].lt(0).sum()
    text = (
        f"How far training moved {counted(len(runs), 'run')}, a dot each: upper dots of a row SFT,"
        f" lower DPO; hollow: no-ops. {worse} of them ended worse on held-out answers than their"
        " base model. Methods can be compared at equal dose only where their dots overlap. A KL of"
        " zero has no place on this axis."
    )
    return fig, text


def _strip(ax: Axes, runs: pd.DataFrame, measure: str, place: float, colour: str) -> None:
    for idle, part in runs.groupby(runs["arm"].eq(NO_OP)):
        shown = part[part[measure].gt(0)] if measure == "kl_base" else part
        ax.plot(
            shown[measure],
            [place] * len(shown),
            "o",
            ms=3,
            color=colour,
            mfc="none" if idle else colour,
            mew=0.7 if idle else 0,
            alpha=0.7,
            zorder=3,
        )


@drawn("15_dose")
def dose_matched(tables: dict) -> tuple[Figure, str]:
    rows, rate = floats(tables["estimates"]), harm_name(tables)
    rows = rows[
        rows["notebook"].eq("15_dose")
        & rows["outcome"].eq(harm_of(tables))
        & (rows["group"].eq(AS_CONFIGURED) | rows["member"].eq(doses.MEAN_DOSE))
    ]
    others = set(rows.loc[rows["contrast"].eq(doses.PLAIN), "against"])
    pairs = [
        (one, other)
        for one, other in combinations(TRAINED_METHODS, 2)
        if rows["method"].eq(one).any() and other in others
    ]
    if not pairs:
        return nothing(f"Nothing to draw: no two methods have a change in the {rate}.")
    fig, axes = panels(tables, 1, [0.5 + 0.5 * len(pairs)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        zero(ax)
        for place, (method, other) in enumerate(pairs):
            for (view, (_, colour)), shift in zip(VIEWS.items(), (-0.25, 0.0, 0.25), strict=True):
                row = rows[
                    rows["base_model"].eq(base_model)
                    & rows["method"].eq(method)
                    & rows["contrast"].eq(view)
                    & rows["against"].eq(other)
                ]
                dots(ax, row, place + shift, colour, view == doses.PLAIN)
                if len(row) and row["value"].isna().all():
                    look = {"va": "center", "fontsize": 5.5, "color": colour}
                    at = {"xy": (0.02, place + shift), "xycoords": ("axes fraction", "data")}
                    ax.annotate("no common dose", **at, **look)
    axes[0, 0].set_xlim(*_most(rows[rows["base_model"].ne("all")]))
    names = [f"{METHOD_LABELS[method]}\nless {METHOD_LABELS[other]}" for method, other in pairs]
    name_rows(axes[0, 0], names)
    unit = f"(percentage points, {INTERVAL})"
    under(axes[0], f"Difference in the change of the {rate} {unit}")
    marks = [
        handle(view, colour, ls="-", lw=1, mfc=colour if view == "as configured" else "white")
        for view, colour in VIEWS.values()
    ]
    above(fig, marks)
    text = (
        f"Difference between two methods in the change of the {rate}. Filled: over"
        " all runs as configured. Hollow: at the doses that runs of both methods reached (local"
        " lines, mean over three preset doses). Descriptive: dose comes after treatment, so equal"
        f" dose is not a randomised comparison.{intervals_of(rows)} Not adjusted for the number of"
        " pairs; an interval that reaches a panel's edge goes on."
        f" {coverage(tables, safety_of(tables))} Shown are the {len(_usual(tables))} as configured."
    )
    return fig, text


def _most(rows: pd.DataFrame) -> tuple[float, float]:
    """Limits that hold every value and nine in ten interval ends, so that one wide interval does
    not flatten all others.
    """
    low, high = (rows[end].dropna() for end in ("ci_low", "ci_high"))
    ends = [
        *rows["value"].dropna(),
        0.0,
        *([low.quantile(0.1), high.quantile(0.9)] if len(low) else []),
    ]
    margin = 0.08 * (np.ptp(ends) or 1.0)
    return min(ends) - margin, max(ends) + margin
