"""Figures of trade-offs: cost, safety against fairness and utility, dose, Pareto fronts, learning
curves.
"""

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from driftbook.figures.drawing import (
    COLOURS,
    OVER_REFUSAL,
    axis,
    bases,
    beside,
    captioned,
    drawn,
    harm_name,
    harm_of,
    intervals_of,
    legend,
    methods_of,
    nothing,
    of_runs,
    panels,
    pick,
    safety_of,
    short_name,
    under,
    zero,
)
from driftbook.figures.ticks import number_axis
from driftbook.stats import harm, influence
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.populations import counted
from driftbook.stats.terms import (
    ACCURACY_AMB,
    AS_CONFIGURED,
    BIAS_AMB,
    BIAS_DIS,
    CHANGE,
    CORRECT,
    FRONT,
    LEVEL,
    LOSS,
    NO_OP,
    SETTINGS,
    TRAINED,
    UNTRAINED,
)


# ---- 12 trade-offs
def scatter(ax: Axes, runs: pd.DataFrame, x: str, y: str) -> None:
    """Single runs as small dots; controls hollow."""
    for (method, control), part in runs.groupby(["method", runs["arm"].isin([UNTRAINED, NO_OP])]):
        face = "none" if control else COLOURS[method]
        ax.plot(
            part[x],
            part[y],
            "o",
            ms=3,
            color=COLOURS[method],
            mfc=face,
            mew=0.6 if control else 0,
            alpha=0.8 if control else 0.55,
            zorder=3,
        )
    ax.axhline(0, color="#777777", lw=0.8, zorder=1)
    ax.grid(axis="y")


def crosses(ax: Axes, x: pd.DataFrame, y: pd.DataFrame) -> None:
    """A mean per method with both intervals."""
    both = x.merge(y, on="method", suffixes=("_x", "_y")).dropna(subset=["value_x", "value_y"])
    for row in both.itertuples():
        colour = COLOURS[row.method]
        if pd.notna(row.ci_low_x):
            ax.plot(
                [row.ci_low_x, row.ci_high_x], [row.value_y] * 2, color=colour, lw=1.2, zorder=4
            )
        if pd.notna(row.ci_low_y):
            ax.plot(
                [row.value_x] * 2, [row.ci_low_y, row.ci_high_y], color=colour, lw=1.2, zorder=4
            )
        ax.plot(row.value_x, row.value_y, "o", ms=6, color=colour, mec="white", mew=0.8, zorder=5)


USUAL = (TRAINED, NO_OP, UNTRAINED)
EFFICIENCY = {
    "n_trainable": ("Trainable parameters", 1),
    "seconds": ("Seconds of training", 1),
    "peak_memory": ("Peak memory of training (MB)", 1e-6),
}


@drawn("12_tradeoffs")
def efficiency(tables: dict) -> tuple[Figure, str]:
    runs, means = (
        of_runs(tables, *safety_of(tables)),
        pick(tables, harm_of(tables), CHANGE, "safety"),
    )
    runs = runs[runs["arm"].isin([TRAINED, NO_OP])].dropna(subset="value")
    fig = None
    if len(runs):
        fig, axes = panels(
            tables, len(EFFICIENCY), [1.75] * len(EFFICIENCY), sharex="row", sharey="all"
        )
        for line, (measure, (name, scale)) in zip(axes, EFFICIENCY.items(), strict=True):
            for ax, base_model in zip(line, bases(tables), strict=True):
                own = runs[runs["base_model"].eq(base_model)].assign(
                    x=lambda frame, m=measure, s=scale: frame[m] * s
                )
                scatter(ax, own, "x", "value")
                place = (
                    own.groupby("method")["x"]
                    .median()
                    .rename("value")
                    .reset_index()
                    .assign(ci_low=None, ci_high=None)
                )
                crosses(
                    ax,
                    place,
                    means[means["base_model"].eq(base_model) & means["group"].eq(AS_CONFIGURED)],
                )
                number_axis(ax, runs[measure] * scale)
            under(line, name)
        rate = harm_name(tables)
        axes[1, 0].set_ylabel(f"Change in {rate}\n(percentage points, {INTERVAL})")
        legend(fig, methods_of(tables))
    text = (
        "Efficiency against alignment: what a run cost and what it did to safety. Large dots: means"
        f" of the methods as configured, at the median cost, with {INTERVAL}s; small dots: single"
        " runs, no-ops hollow."
    ) + intervals_of(means[means["group"].eq(AS_CONFIGURED)])
    return captioned(tables, fig, text, safety_of(tables))


def against(tables: dict, x: tuple[str, str], ys: list[tuple[str, str]]) -> Figure | None:
    """Change against change: base models are columns, the outcomes `ys` are rows."""
    joined = {
        y: of_runs(tables, *x).merge(
            of_runs(tables, *y)[["run_id", "value"]], on="run_id", suffixes=("_x", "_y")
        )
        for y in ys
    }
    both = ["value_x", "value_y"]
    joined = {y: frame for y, frame in joined.items() if len(frame.dropna(subset=both))}
    if not joined:
        return None
    fig, axes = panels(tables, len(joined), [1.75] * len(joined), sharex="all")
    for line, (y, frame) in zip(axes, joined.items(), strict=True):
        means = [pick(tables, outcome, CHANGE, benchmark) for outcome, benchmark in (x, y)]
        for ax, base_model in zip(line, bases(tables), strict=True):
            scatter(
                ax,
                frame[frame["base_model"].eq(base_model) & frame["arm"].isin(USUAL)],
                "value_x",
                "value_y",
            )
            zero(ax)
            crosses(
                ax,
                *(
                    rows[rows["base_model"].eq(base_model) & rows["group"].eq(TRAINED)]
                    for rows in means
                ),
            )
        line[0].set_ylabel(beside(y[0]), fontsize=7.5)
    under(axes[-1], axis(x[0]))
    legend(fig, methods_of(tables))
    return fig


@drawn("12_tradeoffs")
def safety_fairness(tables: dict) -> tuple[Figure, str]:
    ys = [(ACCURACY_AMB, "bbq"), (BIAS_AMB, "bbq"), (BIAS_DIS, "bbq")]
    text = (
        "Safety against fairness, both as changes against the base model. Large dots: means of"
        f" trained runs with {INTERVAL}s; small dots: single runs, hollow where training did"
        " nothing or never was."
    )
    safety = safety_of(tables)
    for outcome, benchmark in (safety, ys[0]):
        rows = pick(tables, outcome, CHANGE, benchmark)
        held = intervals_of(rows[rows["group"].eq(TRAINED)])
        text += held.replace("Intervals", f"Of the {short_name(outcome)} intervals")
    return captioned(tables, against(tables, safety, ys), text, safety, *ys)


@drawn("12_tradeoffs")
def safety_utility(tables: dict) -> tuple[Figure, str]:
    ys = [OVER_REFUSAL, (LOSS, "utility"), (CORRECT, "utility")]
    ys = [y for y in ys if len(pick(tables, y[0], CHANGE, y[1]))]
    text = (
        "Safety against over-refusal and utility, all as changes against the base model. Large"
        f" dots: means of trained runs with {INTERVAL}s; small dots: single runs, hollow where"
        " training did nothing or never was."
    )
    return captioned(
        tables, against(tables, safety_of(tables), ys) if ys else None, text, safety_of(tables), *ys
    )


@drawn("12_tradeoffs")
def dose(tables: dict) -> tuple[Figure, str]:
    ys = [safety_of(tables), (ACCURACY_AMB, "bbq")]
    doses = {
        "dose_nll": "Gain on held-out answers (nats per token)",
        "kl_base": "KL to the base model (nats per token)",
    }
    runs = {y: of_runs(tables, *y) for y in ys}
    fig = None
    if any(frame["value"].notna().any() for frame in runs.values()):
        fig, axes = panels(tables, 4, [1.45] * 4)
        for line, (measure, y) in zip(
            axes, [(measure, y) for y in ys for measure in doses], strict=True
        ):
            for ax, base_model in zip(line, bases(tables), strict=True):
                scatter(
                    ax,
                    runs[y][runs[y]["base_model"].eq(base_model) & runs[y]["arm"].isin(USUAL)],
                    measure,
                    "value",
                )
                if measure == "kl_base":
                    ax.set_xscale("symlog", linthresh=0.01)
                else:
                    zero(ax)
            under(line, doses[measure])
            line[0].set_ylabel(beside(y[0]), fontsize=7.5)
        legend(fig, methods_of(tables))
    text = (
        "Change against dose, each dot a run: how far training moved the model on held-out answers."
        " Hollow: no-ops and untrained prompts. Descriptive: dose comes after training, so equal"
        " dose is not a randomised comparison."
    )
    return captioned(tables, fig, text, *ys)


@drawn("12_tradeoffs")
def pareto(tables: dict) -> tuple[Figure, str]:
    front = harm.worded(FRONT, harm_of(tables))
    share = pick(tables, front, LEVEL)
    y = (LOSS, "utility") if len(pick(tables, LOSS)) else (ACCURACY_AMB, "bbq")
    xs, ys = (
        rows[rows["group"].eq(SETTINGS)]
        for rows in (
            pick(tables, harm_of(tables), CHANGE, "safety"),
            pick(tables, y[0], CHANGE, y[1]),
        )
    )
    keys = ["base_model", "method", "group", "member"]
    points = (
        xs.merge(ys, on=keys, suffixes=("_x", "_y"))
        .merge(share[[*keys, "value"]], on=keys)
        .dropna(subset=["value_x", "value_y"])
    )
    fig = None
    if len(points):
        fig, axes = panels(tables, 1, [2.3])
        for ax, base_model in zip(axes[0], bases(tables), strict=True):
            ax.axhline(0, color="#777777", lw=0.8, zorder=1)
            zero(ax)
            ax.grid(axis="y")
            for row in points[points["base_model"].eq(base_model)].itertuples():
                thin = {"color": COLOURS[row.method], "lw": 0.7, "alpha": 0.6, "zorder": 2}
                ax.plot([row.ci_low_x, row.ci_high_x], [row.value_y] * 2, **thin)
                ax.plot([row.value_x] * 2, [row.ci_low_y, row.ci_high_y], **thin)
                rim = "black" if row.value > 50 else "white"
                look = {"color": COLOURS[row.method], "mec": rim, "mew": 0.8, "zorder": 4}
                ax.plot(row.value_x, row.value_y, "o", ms=3 + row.value / 25, **look)
        axes[0, 0].set_ylabel(beside(y[0]))
        under(axes[0], axis(harm_of(tables)))
        legend(fig, methods_of(tables))
    text = (
        f"Each dot is a setting (mean over its runs, {INTERVAL}s); its size is how often it is on"
        " the Pareto front of its base model's settings, the base model itself at zero among them,"
        " when runs and prompts are drawn anew; black rim: more often than not. The front has these"
        " goals: " + front.partition(": ")[2] + "."
    )
    return captioned(tables, fig, text, safety_of(tables), y)


@drawn("12_tradeoffs", "curves")
def curves(tables: dict) -> tuple[Figure, str]:
    known = influence.arms(tables["variants"], tables["runs"])
    rows = tables["curves"].merge(known, on="run_id")
    rows = rows[rows["arm"].isin([TRAINED, NO_OP])]
    names = [name for name in ("sft", "dpo") if rows["objective"].eq(name).any()]
    if not names:
        return nothing("Nothing to draw: no run has a training curve.")
    fig, axes = panels(tables, len(names), [1.75] * len(names), sharex="all")
    for line, objective in zip(axes, names, strict=True):
        part = rows[rows["objective"].eq(objective)]
        split = "heldout" if part["split"].eq("heldout").any() else "train"
        for ax, base_model in zip(line, bases(tables), strict=True):
            for (method, arm, _), run in part[
                part["split"].eq(split) & part["base_model"].eq(base_model)
            ].groupby(["method", "arm", "run_id"]):
                ax.plot(
                    run["step"],
                    run["loss"],
                    color=COLOURS[method],
                    lw=0.7,
                    alpha=0.6,
                    ls="--" if arm == NO_OP else "-",
                )
            ax.grid(axis="y")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        where = "held-out" if split == "heldout" else "training"
        unit = "nats per token" if objective == "sft" else "DPO loss"
        line[0].set_ylabel(f"{objective.upper()} loss, {where}\n({unit})")
    under(axes[-1], "Optimiser step")
    legend(fig, methods_of(tables))
    count = rows["run_id"].nunique()
    return (
        fig,
        (
            f"Training curves of {counted(count, 'run')}, each a line; dashed: no-ops. The spread"
            " of a colour is that of its runs, in settings and seeds."
        ),
    )


@drawn("12_tradeoffs", "drift")
def drift(tables: dict) -> tuple[Figure, str]:
    """What a small fixed sample showed while runs were training."""
    rows = tables["drift"].merge(
        tables["variants"][["run_id", "base_model", "method"]], on="run_id"
    )
    if rows.empty:
        return nothing(
            "Nothing to draw: the study does not look at drift while it trains (key drift)."
        )
    names = list(dict.fromkeys(rows["outcome"]))
    fig, axes = panels(tables, len(names), [1.45] * len(names), sharex="all")
    for line, outcome in zip(axes, names, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            own = rows[rows["outcome"].eq(outcome) & rows["base_model"].eq(base_model)]
            for (method, _), run in own.groupby(["method", "run_id"]):
                run = run.sort_values("step")
                ax.plot(
                    run["step"],
                    run["value"],
                    "-o",
                    color=COLOURS[method],
                    lw=0.8,
                    ms=2.4,
                    alpha=0.7,
                )
            if own["base_value"].notna().any():
                ax.axhline(
                    own["base_value"].iloc[0], color=COLOURS["none"], lw=0.9, ls="--", zorder=1
                )
            ax.grid(axis="y")
            ax.set_ylim(-4, 104)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        line[0].set_ylabel("\n".join(textwrap.wrap(outcome, 20)) + "\n(percent)", fontsize=7.5)
    under(axes[-1], "Optimiser step")
    legend(fig, methods_of(tables))
    half = (rows["ci_high"] - rows["ci_low"]).median() / 2
    text = (
        f"What a fixed sample of {rows['n'].min()} to {rows['n'].max()} prompts showed while"
        f" {rows['run_id'].nunique()} runs trained, each line a run; dashed: the base model. The"
        f" sample is small ({INTERVAL}s of about {half:.0f} points to either side, not drawn): it"
        " warns, and the study's own benchmarks decide."
    )
    return fig, text
