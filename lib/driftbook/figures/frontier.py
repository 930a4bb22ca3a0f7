"""Figures of the frontier: what repairs keep of the gain, and what they restore."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtrit

from driftbook.analyses import repairs
from driftbook.analyses.repairs import ALL, DECLINED, KEPT, PARENT, REPORT
from driftbook.figures.drawing import (
    bases,
    drawn,
    handle,
    name_rows,
    nothing,
    panels,
    short_name,
    single_runs,
    under,
)
from driftbook.figures.repairs import NULL, OTHER, SAFE, small_legend
from driftbook.stats import harm
from driftbook.stats.confidence import INTERVAL, PERCENT, UPPER
from driftbook.stats.terms import ACCURACY_AMB, REFUSED
from driftbook.study.methods import CONTROLS

STYLES = {
    None: (SAFE, "o"),
    "same norm": ("#999999", "s"),
    "same modules zeroed": ("#555555", "X"),
    "random modules zeroed": ("#999999", "x"),
    "random subspace": ("#AA8866", "D"),
    "noise": ("#CC79A7", "^"),
}
EDGES = -25.0, 125.0  # percent of the gain kept, between which the frontier is drawn


def _points(tables: dict) -> pd.DataFrame:
    """The runs of the frontier with who they are, and their numbers by outcome: of those that a
    level was chosen by the report half's.
    """
    known = repairs.repairs(tables["variants"], tables["runs"])
    rows = tables["frontier"]
    wide = (
        rows[rows["half"].isin([REPORT, ALL])]
        .pivot(index="run_id", columns="outcome", values="value")
        .astype(float)
    )
    base = known.drop_duplicates("base_model").assign(
        run_id=lambda frame: frame["base_run_id"],
        name=repairs.BASE,
        control=None,
        kind=repairs.BASE,
        value=np.nan,
    )
    return pd.concat([known, base], ignore_index=True).merge(wide, on="run_id")


def _half(values: np.ndarray) -> float:
    """Half the width of the 95% t interval of a mean over seeds; 0 where there is one seed."""
    return (
        stdtrit(len(values) - 1, UPPER) * np.nanstd(values, ddof=1) / len(values) ** 0.5
        if len(values) > 1
        else 0.0
    )


def _mean(ax: Axes, part: pd.DataFrame, y: str, colour: str, mark: str) -> tuple[float, float]:
    """The mean of some runs with t intervals over them both ways (of rates between 0 and 100), and
    the runs behind; a mean beyond the edges stands at them, as an arrow.
    """
    x, values = part[KEPT].to_numpy(), part[y].to_numpy()
    ax.plot(x, values, mark, ms=2, color=colour, alpha=0.3, mew=0.4, zorder=2)
    at = np.nanmean(x), np.nanmean(values)
    for i, own in enumerate((x, values)):
        if half := _half(own):
            ends = (
                [[at[0] - half, at[0] + half], [at[1]] * 2]
                if i == 0
                else [[at[0]] * 2, np.clip([at[1] - half, at[1] + half], 0, 100)]
            )
            ax.plot(*ends, color=colour, lw=0.7, alpha=0.8, zorder=3)
    shown = np.clip(at[0], EDGES[0] + 4, EDGES[1] - 4)
    size, face = (
        (8, "none") if mark == STYLES[None][1] else (4.5, colour)
    )  # a ring, so that what coincides with it is seen
    ax.plot(
        shown,
        at[1],
        mark if shown == at[0] else "<" if shown > at[0] else ">",
        ms=size,
        color=colour,
        mfc=face,
        mew=1.2 if face == "none" else 1,
        zorder=5 if face == "none" else 4,
    )
    return at


def _frontier_of(ax: Axes, own: pd.DataFrame, y: str, name: str) -> None:
    """One base model: the curve of rescaling, the levels of the repair and of its controls, and
    the other repairs.
    """
    base = own.loc[own["name"].eq(repairs.BASE), y].mean()
    ax.axhline(base, color="#777777", lw=0.9, ls="--", zorder=1)
    ax.grid(axis="y")
    is_rescaled = own["kind"].eq("rescale")
    whole = own["name"].eq(PARENT) & own["run_id"].isin(own["parent_run_id"][is_rescaled])
    rescaled = own[is_rescaled | whole].fillna({"value": 1.0})
    curve = [_mean(ax, part, y, NULL, "v") for _, part in rescaled.groupby("value")]
    ax.plot(*np.array([(0.0, base), *curve]).T, color=NULL, lw=1, zorder=2)
    safe = own[own["name"].eq(name)]
    for control in dict.fromkeys(safe["control"].where(safe["control"].notna(), None)):
        of = safe[safe["control"].isna() if control is None else safe["control"].eq(control)]
        colour, mark = STYLES[control]
        line = [_mean(ax, part, y, colour, mark) for _, part in of.groupby("value")]
        ax.plot(*np.array(line).T, color=colour, lw=1 if control is None else 0.6, zorder=2)
    known = ~own["kind"].isin(["rescale", PARENT, repairs.BASE]) & own[KEPT].notna()
    others = own[own["control"].isna() & own["name"].ne(name) & known]
    for _, part in others.groupby(["name", "value"], dropna=False, sort=False):
        _mean(ax, part, y, OTHER, "P")
    ax.set_xlim(*EDGES)


def _frontier_legend(fig: Figure, controls: list[str]) -> None:
    marks = [("Safe LoRA", *STYLES[None]), ("rescaling", NULL, "v")]
    marks += [(f"control: {name}", *STYLES[name]) for name in controls]
    marks += [("other repairs", OTHER, "P")]
    handles = [
        handle(name, colour, mark, mfc="none" if mark == "o" else colour)
        for name, colour, mark in marks
    ]
    small_legend(fig, [*handles, handle("base model", "#777777", "", ls="--", lw=0.9)], 4)


@drawn("14_safe_lora", "frontier")
def frontier(tables: dict) -> tuple[Figure, str]:
    """The gain kept against the outcome of safety, over-refusal and fairness, for Safe LoRA, its
    controls, rescaling and the others.
    """
    rows = tables["frontier"]
    if rows.empty or not rows["outcome"].eq(KEPT).any():
        return nothing(
            "Nothing to draw: the study repairs no runs, or its runs gained nothing to keep."
        )
    points = _points(tables)
    name, ys = (
        repairs.leading(points),
        [outcome for outcome in (*harm.OF_SAFETY, REFUSED, ACCURACY_AMB) if outcome in points],
    )
    fig, axes = panels(tables, len(ys), [2.1, *[1.5] * (len(ys) - 1)], sharex="all")
    for line, y in zip(axes, ys, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            _frontier_of(ax, points[points["base_model"].eq(base_model)], y, name)
        line[0].set_ylim(bottom=max(-4, line[0].get_ylim()[0]))
        line[0].set_ylabel("\n".join(textwrap.wrap(short_name(y), 18)) + "\n(percent)")
    under(
        axes[-1],
        f"Gain of fine-tuning that is kept (percent of the parent's), {INTERVAL}s over runs",
    )
    _frontier_legend(fig, [name for name in CONTROLS if points["control"].eq(name).any()])
    n = (
        points.loc[points["control"].isna() | points["name"].eq(name), [KEPT, "run_id"]]
        .dropna()["run_id"]
        .nunique()
    )
    means = points.groupby(["base_model", "name", "value", "control"], dropna=False)[KEPT].mean()
    return fig, (
        f"{n} runs on the report half of the prompts: what is left of the gain of fine-tuning, and"
        " what became of safety, over-refusal and fairness. Small marks: runs; large marks: means"
        f" with {PERCENT} t intervals over them, where there are several; lines join the levels of"
        " one repair. Right is the fine-tuned parent, left the base model. A repair is worth"
        " something where it lies below the line of rescaling, which only makes the update smaller;"
        " a control at the same place says what it was that worked."
        + (
            " An arrow at the edge: the mean lies beyond it."
            if (means < EDGES[0]).any() or (means > EDGES[1]).any()
            else ""
        )
    )


def _place(row) -> str:
    """What a run was fine-tuned by; nothing for the base model."""
    if row.name == repairs.BASE:
        return ""
    return row.objective if row.objective == row.dataset else f"{row.objective} on {row.dataset}"


def _rate(ax: Axes, values: np.ndarray, at: float, colour: str) -> None:
    """The rates of runs, their mean and its interval, which ends at 0 and 100 percent."""
    if len(values):
        mean, half = values.mean(), _half(values)
        single_runs(ax, values, at, colour, ms=1.6, alpha=0.3)
        ends = np.clip([mean - half, mean + half], 0, 100)
        ax.plot(ends, [at, at], color=colour, lw=1, zorder=3)
        ax.plot(mean, at, "o", ms=3.5, color=colour, zorder=4)


@drawn("14_safe_lora", "frontier")
def restored(tables: dict) -> tuple[Figure, str]:
    """Refusals of harmful prompts and unsafe responses (without a judge answers that do not refuse)
    of the base model, of the fine-tuned runs, and of every repair of them at every level.
    """
    rows = tables["frontier"]
    colours = {DECLINED: SAFE, (safety := harm.safety_outcome(rows)): NULL}
    shown = [outcome for outcome in colours if rows["outcome"].eq(outcome).any()]
    if not shown:
        return nothing("Nothing to draw: the study repairs no runs, or asks no harmful prompts.")
    points = _points(tables)
    points = points[points["control"].isna()]
    levels = points["value"].map(lambda value: "" if np.isnan(value) else f" {value:g}")
    names = points["name"].str.replace("_", " ").str.cat(levels)
    points = points.assign(place=[_place(row) for row in points.itertuples()], label=names)
    order = (
        points[["place", "label", "name"]]
        .drop_duplicates(["place", "label"])
        .assign(rank=lambda rows: rows["name"].map({repairs.BASE: 0, PARENT: 1}).fillna(2))
        .sort_values(["place", "rank"], kind="stable")
    )
    places = {(row.place, row.label): n for n, row in enumerate(order.itertuples())}
    fig, axes = panels(tables, 1, [0.3 + 0.19 * len(places)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        for (where, label), part in points[points["base_model"].eq(base_model)].groupby(
            ["place", "label"], sort=False
        ):
            for outcome, shift in zip(shown, (-0.16, 0.16), strict=False):
                values = part[outcome].dropna().to_numpy()
                _rate(ax, values, places[where, label] + shift, colours[outcome])
        for place in (place for place, rank in enumerate(order["rank"]) if rank == 1):
            ax.axhline(place - 0.5, color="#cccccc", lw=0.7, zorder=1)
        ax.set(xlim=(-4, 104), xticks=[0, 50, 100])
    names = [
        f"fine-tuned by {row.place}" if row.name == PARENT else row.label
        for row in order.itertuples(index=False)
    ]
    name_rows(axes[0, 0], names)
    axes[0, 0].tick_params(axis="y", labelsize=7)
    under(axes[0], f"Percent of the harmful prompts of the report half, {INTERVAL} over runs")
    words = {DECLINED: "refusals", safety: harm.COUNTED[safety]}
    small_legend(fig, [handle(words[one], colours[one], ms=4) for one in shown], 2)
    return (
        fig,
        (
            f"What fine-tuning did to refusals and to {words[safety]} in each family, and what"
            " every repair of it at every level brought back: below each fine-tuning its own"
            " repairs. Small dots: runs; large ones: means. How much of the gain is left stands in"
            " the frontier: a repair that deletes the adapter is the base model again."
        ),
    )
