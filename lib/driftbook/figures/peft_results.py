"""Figures of PEFT's own published runs: the Pareto front, partial pooling of methods, what size and
cost go with, and the curves.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    WIDTH,
    above,
    dots,
    drawn,
    floats,
    handle,
    name_rows,
    nothing,
)
from driftbook.figures.ticks import number_axis
from driftbook.rereading.peft_results import (
    ACCURACY,
    AS_PUBLISHED,
    BY_METHOD,
    CORRECT,
    FORGETTING,
    MIXED,
    NOTEBOOK,
    POOLED,
    QUESTIONS,
    RERUN,
    RUN,
    VALIDATION,
    on,
)
from driftbook.stats import terms
from driftbook.stats.confidence import INTERVAL
from driftbook.study.methods import STUDIED

_OTHER, FAINT = "#333333", "#bbbbbb"
_OURS = {method: COLOURS[method] for method in STUDIED}
METHOD_NAMES = {
    **METHOD_LABELS,
    "adalora": "AdaLoRA",
    "adamss": "AdaMSS",
    "adaption_prompt": "Adaption Prompt",
    "beft": "BEFT",
    "boft": "BOFT",
    "c3a": "C3A",
    "deft": "DEFT",
    "delora": "DeLoRA",
    "fourierft": "FourierFT",
    "frod": "FRoD",
    "full_finetuning": "full fine-tuning",
    "glora": "GLoRA",
    "gralora": "GraLoRA",
    "hira": "HiRA",
    "lily": "Lily",
    "ln_tuning": "LN-Tuning",
    "loha": "LoHa",
    "lokr": "LoKr",
    "miss": "MiSS",
    "oft": "OFT",
    "osf": "OSF",
    "peanut": "PEANuT",
    "prefix_tuning": "Prefix-Tuning",
    "psoft": "PSOFT",
    "pvera": "PVeRA",
    "randlora": "RandLoRA",
    "road": "RoAd",
    "shira": "SHiRA",
    "tinylora": "TinyLoRA",
    "trainable_tokens": "trainable tokens",
    "unilora": "UniLoRA",
    "vblora": "VB-LoRA",
    "vera": "VeRA",
    "waveft": "WaveFT",
}
EMPTY = "Nothing to draw: there are no estimates of single runs."
SURE = 95.0  # percent of draws
# a run not on the front as published is shown where it is so in this share of draws, percent
PRESENT = 10.0


def name(method: str) -> str:
    return METHOD_NAMES.get(method, method.replace("_", " "))


def colour(method: str) -> str:
    return _OURS.get(method, _OTHER)


def single(tables: dict) -> pd.DataFrame:
    """A row per finished run: method, variant, costs, accuracy with its interval, forgetting, and
    how often it is on the front.
    """
    variants = tables["variants"].assign(
        variant=tables["variants"]["settings"].map(lambda text: json.loads(text)["variant"])
    )
    frame = variants[["run_id", "method", "method_class", "variant"]].merge(
        tables["runs"][["run_id", "n_trainable", "seconds", "peak_memory"]], on="run_id"
    )
    rows = tables["estimates"]
    rows = rows[rows["group"].eq(terms.RUN)].rename(columns={"member": "run_id"})
    accuracy = rows[rows["outcome"].eq(ACCURACY) & rows["contrast"].eq(RUN)][
        ["run_id", "value", "ci_low", "ci_high"]
    ]
    columns = {
        "forgetting": (FORGETTING, RUN),
        "published": (on("peak memory"), AS_PUBLISHED),
        "share": (on("peak memory"), QUESTIONS),
        "again": (on("peak memory"), RERUN),
    }
    frame = frame.merge(accuracy, on="run_id")
    for column, (outcome, contrast) in columns.items():
        found = rows[rows["outcome"].eq(outcome) & rows["contrast"].eq(contrast)].set_index(
            "run_id"
        )["value"]
        frame[column] = frame["run_id"].map(found).astype(float)
    numbers = ["n_trainable", "seconds", "peak_memory", "value", "ci_low", "ci_high"]
    return frame.astype(dict.fromkeys(numbers, float)).assign(
        memory=lambda part: part["peak_memory"] / 1e9, front=lambda part: part["published"].eq(100)
    )


def _run_label(row) -> str:
    """Method and variant of a run, short."""
    variant = (
        row.variant.removeprefix("default")
        .replace("target-", "")
        .replace("-random_seed_42", "")
        .replace("rank", "r")
    )
    return f"{name(row.method)} {variant}".strip()


def counted(rows: pd.DataFrame) -> str:
    return f"{len(rows)} runs of {rows['method'].nunique()} methods, one seed each."


def _key(fig: Figure, other: str = _OTHER) -> None:
    """Our four methods in their colours, and that of all others."""
    names = {METHOD_LABELS[method]: COLOURS[method] for method in STUDIED} | {
        "PEFT's other methods": other
    }
    handles = [handle(text, shade, ls="-", lw=0) for text, shade in names.items()]
    above(fig, handles, handlelength=1, columnspacing=1.2)


def log_axis(axis, values: pd.Series) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis._set_axes_scale("log")
    low, high = np.log10(values[values > 0].min()), np.log10(values.max())
    steps = [
        digit * 10.0**power
        for power in range(int(np.floor(low)), int(np.ceil(high)) + 1)
        for digit in ((1, 2, 5) if high - low < 2.6 else (1,))
    ]
    axis.set_ticks([step for step in steps if 10**low * 0.9 <= step <= 10**high * 1.1])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


# ---- the front
@drawn(NOTEBOOK)
def peft_pareto(tables: dict) -> tuple[Figure, str]:
    rows = single(tables).dropna(subset=["value", "forgetting"])
    rows = rows[rows["forgetting"] > 0].sort_values("value", ascending=False)
    if rows.empty:
        return nothing(EMPTY)
    # a run that forgot next to nothing would take half of the axis
    edge = rows["forgetting"].quantile(0.02) / 1.5
    rows = rows.assign(x=rows["forgetting"].clip(lower=edge), area=_area(rows["memory"]))
    fig, ax = plt.subplots(figsize=(WIDTH, 5.3))
    log_axis(ax.xaxis, rows["x"])
    on_it, off = rows[rows["front"]], rows[~rows["front"]]
    pale = [_OURS.get(method, FAINT) for method in off["method"]]
    ax.scatter(off["x"], off["value"], s=off["area"], c=pale, alpha=0.45, lw=0, zorder=2)
    for row in on_it.itertuples():
        ax.plot([row.x] * 2, [row.ci_low, row.ci_high], color=colour(row.method), lw=0.8, zorder=3)
    shades = [colour(method) for method in on_it["method"]]
    faces = np.where(on_it["share"].ge(SURE), shades, "white")
    look = {"facecolors": faces, "edgecolors": shades, "lw": 1.2, "zorder": 4}
    ax.scatter(on_it["x"], on_it["value"], s=on_it["area"], **look)
    ax.grid(axis="y")
    ax.set_xlabel("Forgetting: rise of the loss on Wikipedia text (nats per token, log scale)")
    ax.set_ylabel(f"Correct answers to GSM8K's test questions (percent, {INTERVAL})")
    _key(fig)
    _sizes(ax, rows["memory"].max())
    words = [
        _run_label(row) + (f" ({row.forgetting:.1g})" if row.forgetting < edge else "")
        for row in on_it.itertuples()
    ]
    place(fig, ax, on_it, words, rows)
    return (
        fig,
        (
            "Accuracy (up is better) against forgetting (left is better); the area of a dot grows"
            f" with the peak memory of training (small is better). Named: the {len(on_it)} runs"
            " that no other beats in all three as published, full where that holds in at least"
            f" {SURE:g}% of draws of other test questions; pale: the other {len(off)}. A run at the"
            " left edge forgot less than the axis shows, with its number. Lines: Wilson intervals"
            f" over questions. What another seed would change is not known. {counted(rows)}"
        ),
    )


def _sizes(ax: Axes, largest: float) -> None:
    """A legend of the areas of dots."""
    handles = [
        ax.scatter([], [], s=_area(pd.Series([float(size)])), c=FAINT, label=f"{size} GB")
        for size in (20, 25, 30, 40)
        if size <= largest + 2
    ]
    look = {"title_fontsize": 7.5, "fontsize": 7.5, "labelspacing": 0.8}
    ax.legend(handles=handles, loc="lower right", title="peak memory", **look)


def _area(memory: pd.Series) -> pd.Series:
    """Area of a dot, points squared, linear in GB."""
    return 10 + 5 * (memory - 18).clip(lower=0)


def place(fig: Figure, ax: Axes, rows: pd.DataFrame, words: list[str], every: pd.DataFrame) -> None:
    """Write a name beside each row's dot where it hides no dot, interval or other name, or the
    fewest; a thin line leads to it where it is not near.
    """
    fig.canvas.draw()  # fixes the axes' place, without which nothing can be said about pixels
    unit = fig.dpi / 72
    taken = [
        (*ax.transData.transform((row.x, row.value)), 4 * unit, 4 * unit, 1.5 if row.front else 0.5)
        for row in every.itertuples()
    ]  # x, y, half width, half height, weight
    taken += [
        (*ax.transData.transform((row.x, y)), 2 * unit, 3 * unit, 1.0)
        for row in rows.itertuples()
        for y in np.linspace(row.ci_low, row.ci_high, 5)
    ]
    box = ax.get_window_extent()
    for row, text in zip(rows.itertuples(), words, strict=True):
        note = ax.annotate(
            text,
            (row.x, row.value),
            fontsize=6.8,
            color=colour(row.method),
            zorder=5,
            ha="center",
            va="center",
        )
        extent, at = note.get_window_extent(), ax.transData.transform((row.x, row.value))
        half = np.array([extent.width, extent.height]) / 2 + (2 * unit, unit)
        spots = [at + shift for shift in _shifts(half, unit)]
        costs = [_cost(spot, at, half, taken, box) + 0.02 * i for i, spot in enumerate(spots)]
        best = spots[int(np.argmin(costs))]
        note.set_position(ax.transData.inverted().transform(best))
        taken.append((*best, *half, 6.0))
        near = np.clip(at, best - half, best + half)
        if np.hypot(*(near - at)) > 9 * unit:
            ends = ax.transData.inverted().transform([at, near])
            ax.plot(ends[:, 0], ends[:, 1], color=colour(row.method), lw=0.4, alpha=0.7, zorder=1)


def _shifts(half: np.ndarray, unit: float) -> list[np.ndarray]:
    """Places of a label's centre about its dot, pixels, the nearest first: right, left, above,
    below, and between.
    """
    turns = np.deg2rad([0, 180, 35, 145, -35, -145, 90, -90, 65, 115, -65, -115])
    return [
        np.array([np.cos(turn) * (half[0] + gap), np.sin(turn) * (half[1] + gap)])
        for gap in unit * np.array([6, 10, 16, 24, 34, 46, 60])
        for turn in turns
    ]


def _cost(spot: np.ndarray, at: np.ndarray, half: np.ndarray, taken: list[tuple], box) -> float:
    """The weight of the boxes that a label at this spot would overlap, and its line from `at` would
    cross; much more where it leaves the axes.
    """
    boxes = np.array(taken)
    centres, halves, weight = boxes[:, :2], boxes[:, 2:4], boxes[:, 4]
    hits = weight[(np.abs(centres - spot) < halves + half).all(1)].sum()
    line = at + np.linspace(0, 1, 9)[:, None] * (np.clip(at, spot - half, spot + half) - at)
    others = np.abs(centres - at).max(1) > 1  # not its own dot
    crossed = weight[
        (np.abs(centres[:, None] - line) < halves[:, None]).all(-1).any(1) & others
    ].sum()
    outside = ((spot - half) < (box.x0, box.y0)).any() or ((spot + half) > (box.x1, box.y1)).any()
    return hits + 0.4 * crossed + 20.0 * outside


@drawn(NOTEBOOK)
def peft_front(tables: dict) -> tuple[Figure, str]:
    rows = single(tables).dropna(subset=["value", "forgetting", "published"])
    rows = rows[rows["front"] | rows["share"].ge(PRESENT)].sort_values(
        "value", ascending=False, ignore_index=True
    )
    if rows.empty:
        return nothing(EMPTY)
    fig, axes = plt.subplots(
        1, 4, figsize=(WIDTH, 1.0 + 0.185 * len(rows)), sharey=True, width_ratios=[1.25, 1, 1, 1]
    )
    places, shades, full = (
        np.arange(len(rows)),
        [colour(method) for method in rows["method"]],
        rows["front"].tolist(),
    )
    dots(axes[0], rows, places, shades, full)
    for ax, column in ((axes[1], "forgetting"), (axes[2], "memory")):
        dots(ax, rows.assign(value=rows[column], ci_low=None), places, shades, full)
    log_axis(axes[1].xaxis, rows["forgetting"])
    axes[3].scatter(rows["again"], places, s=16, marker="|", c=shades, lw=1.2, zorder=3)
    dots(axes[3], rows.assign(value=rows["share"], ci_low=None), places, shades, full)
    axes[3].set_xlim(-6, 106)
    name_rows(axes[0], [_run_label(row) for row in rows.itertuples()])
    axes[0].tick_params(axis="y", labelsize=7)
    titles = ("Accuracy", "Forgetting", "Peak memory", "On the front")
    units = (
        f"percent correct,\n{INTERVAL}",
        "nats per token,\nlog scale",
        "GB\n",
        "percent of draws;\n|: another run",
    )
    for ax, title, unit in zip(axes, titles, units, strict=True):
        ax.set_title(title)
        ax.set_xlabel(unit)
    return (
        fig,
        (
            "The runs on the Pareto front of accuracy, forgetting and peak memory (full), and"
            f" those that other test questions would put there in at least {PRESENT:g}% of draws"
            " (hollow), from the most accurate to the least. Right: how often a run is on the"
            " front when the accuracies are drawn again for other questions; |: when another run"
            " is assumed to differ, too, as the notebook's parameters say. A run that learned"
            f" nothing can be on a front: little is forgotten by it. {counted(rows)}"
        ),
    )


# ---- partial pooling
@drawn(NOTEBOOK)
def peft_pooling(tables: dict) -> tuple[Figure, str]:
    runs, rows = single(tables), tables["estimates"]
    rows = rows[
        rows["estimator"].isin([POOLED, BY_METHOD, MIXED])
        & rows["outcome"].isin([ACCURACY, FORGETTING])
    ]
    rows = floats(rows)
    if rows.empty:
        return nothing("Nothing to draw: there are no models of the runs.")
    order = (
        rows[rows["estimator"].eq(MIXED) & rows["outcome"].eq(ACCURACY)]
        .sort_values("value", ascending=False)["method"]
        .tolist()
    )
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.9 + 0.165 * len(order)), sharey=True)
    for ax, outcome, column in zip(
        axes, (ACCURACY, FORGETTING), ("value", "forgetting"), strict=True
    ):
        _pooled(ax, rows[rows["outcome"].eq(outcome)], runs.assign(raw=runs[column]), order)
    log_axis(axes[1].xaxis, runs["forgetting"])
    name_rows(axes[0], [name(method) for method in order])
    axes[0].tick_params(axis="y", labelsize=7)
    axes[0].set_title("Accuracy")
    axes[1].set_title("Forgetting")
    marks = {
        "mixed": ("o", 4.5, _OTHER),
        "by method": ("o", 5.5, "none"),
        "pooled": ("|", 9, "#999999"),
    }
    handles = [
        handle(text, _OTHER if text != "pooled" else face, mark, ls="-", ms=size, mfc=face, lw=0)
        for text, (mark, size, face) in marks.items()
    ]
    above(fig, handles, 3, handlelength=1, columnspacing=1.2)
    axes[0].set_xlabel(f"percent correct, {INTERVAL}")
    axes[1].set_xlabel(f"nats per token, log scale, {INTERVAL}")
    return (
        fig,
        (
            "Three models of the same runs. Grey line and band: pooled, one mean for all methods."
            " Hollow: by method, the mean of its own runs. Full, with interval: mixed, a random"
            " intercept of methods, so that a method with few runs is drawn to the mean of all."
            " Small dots: single runs. Intervals are over settings like those tried of a method,"
            f" and assume one spread for all. {counted(runs)}"
        ),
    )


def _pooled(ax: Axes, rows: pd.DataFrame, runs: pd.DataFrame, order: list[str]) -> None:
    """One outcome: the pooled mean as a band; per method its runs, its own mean and the mixed
    model's.
    """
    of = {
        model: rows[rows["estimator"].eq(model)].set_index("method")
        for model in (POOLED, BY_METHOD, MIXED)
    }
    one = of[POOLED].iloc[0]
    ax.axvspan(one["ci_low"], one["ci_high"], color="#eeeeee", zorder=0)
    ax.axvline(one["value"], color="#999999", lw=0.9, zorder=1)
    for place, method in enumerate(method for method in order if method in of[MIXED].index):
        raw = runs[runs["method"].eq(method)]["raw"]
        ax.plot(
            raw,
            np.full(len(raw), place),
            "o",
            ms=2.2,
            color=colour(method),
            alpha=0.45,
            mew=0,
            zorder=2,
        )
        ax.plot(
            of[BY_METHOD].loc[method, "value"],
            place,
            "o",
            ms=5.5,
            color=colour(method),
            mfc="none",
            mew=0.7,
            zorder=3,
        )
        dots(ax, of[MIXED].loc[[method]].reset_index(), place, colour(method))


# ---- efficiency
COSTS = {
    "n_trainable": "Trainable parameters",
    "seconds": "Seconds of training",
    "memory": "Peak memory (GB)",
}


@drawn(NOTEBOOK)
def peft_efficiency(tables: dict) -> tuple[Figure, str]:
    rows = single(tables).dropna(subset=["value", "forgetting"])
    if rows.empty:
        return nothing(EMPTY)
    fig, axes = plt.subplots(2, 3, figsize=(WIDTH, 4.2), sharex="col", sharey="row")
    shown = rows.iloc[rows["method"].isin(_OURS).argsort(kind="stable")]  # ours in front
    shades = [_OURS.get(method, "#999999") for method in shown["method"]]
    faces = [
        "white" if kind == "prompt" else shade
        for kind, shade in zip(shown["method_class"], shades, strict=True)
    ]
    for line, column in zip(axes, ("value", "forgetting"), strict=True):
        for ax, cost in zip(line, COSTS, strict=True):
            ax.scatter(
                shown[cost],
                shown[column],
                s=16,
                facecolors=faces,
                edgecolors=shades,
                lw=0.9,
                alpha=0.85,
                zorder=3,
            )
            ax.grid(axis="y")
    log_axis(axes[1, 0].yaxis, rows["forgetting"])
    log_axis(axes[1, 1].xaxis, rows["seconds"])
    number_axis(axes[1, 0], rows["n_trainable"])
    axes[0, 0].set_ylabel("Correct answers (percent)")
    axes[1, 0].set_ylabel("Forgetting (nats per token)")
    for ax, text in zip(axes[1], COSTS.values(), strict=True):
        ax.set_xlabel(text)
    _key(fig, "#999999")
    return (
        fig,
        (
            "What a run cost, and what it learned and forgot; each dot a run, hollow: prompt-based"
            " methods. Seconds are those of the training steps alone. P-Tuning trains an encoder"
            " that is thrown away after training, so its parameters say more than its adapter"
            f" holds. {counted(rows)}"
        ),
    )


# ---- curves
@drawn(NOTEBOOK, "rates")
def peft_curves(tables: dict) -> tuple[Figure, str]:
    rows = tables["rates"]
    rows = rows[rows["benchmark"].eq(VALIDATION) & rows["outcome"].eq(CORRECT)].merge(
        tables["variants"][["run_id", "method", "method_class"]], on="run_id"
    )
    if rows.empty:
        return nothing("Nothing to draw: no run has a curve.")
    rows = rows.assign(
        step=rows["category"].str.removeprefix("step ").astype(int),
        percent=100 * rows["k"].astype(float) / rows["n"].astype(float),
    )
    rows = rows.assign(
        panel=rows["method_class"].map({"prompt": "Prompt-based"}).fillna("Adapter-based")
    ).sort_values("step")
    fig, axes = plt.subplots(
        1, rows["panel"].nunique(), figsize=(WIDTH, 2.9), sharey=True, sharex=True, squeeze=False
    )
    for ax, (text, part) in zip(axes[0], rows.groupby("panel"), strict=True):
        for (method, kind, _), run in part.groupby(["method", "method_class", "run_id"]):
            ours, full = method in _OURS, kind == "full"
            shade = _OTHER if full else _OURS.get(method, FAINT)
            ax.plot(
                run["step"],
                run["percent"],
                color=shade,
                lw=1.0 if ours else 0.6,
                ls="--" if full else "-",
                alpha=0.9 if ours or full else 0.6,
                zorder=3 if ours else 2,
            )
        mean = part[part["method_class"].ne("full")].groupby("step")["percent"].mean()
        ax.plot(mean.index, mean, color="black", lw=1.6, zorder=4)
        log_axis(ax.xaxis, rows["step"].astype(float))
        ax.grid(axis="y")
        ax.set_title(
            f"{text} ({part.loc[part['method_class'].ne('full'), 'run_id'].nunique()} runs)"
        )
        ax.set_xlabel("Training step (log scale)")
    axes[0, 0].set_ylabel("Correct answers (percent)")
    _key(fig, FAINT)
    return (
        fig,
        (
            f"Accuracy on {rows['n'].iloc[0]} validation questions during training, a line per run;"
            " black: their mean; dashed: full fine-tuning, not in it. The questions are the same at"
            " every step and for all runs, and so few that a single point is uncertain by about"
            f" {196 * np.sqrt(0.24 / float(rows['n'].iloc[0])):.0f} points either way."
            f" {counted(rows.drop_duplicates('run_id'))}"
        ),
    )
