"""Figures of the original study, read again: each reads published tables and computes nothing but
positions.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    WIDTH,
    above,
    bases,
    dots,
    drawn,
    floats,
    legend,
    single_runs,
    under,
    zero,
)
from driftbook.rereading import original_study, original_tables
from driftbook.rereading.original_analysis import GAIN, SAFETY, SAME_LENGTH, SAME_VERDICT
from driftbook.stats.confidence import INTERVAL, PERCENT
from driftbook.stats.terms import CHANGE, RUN
from driftbook.study.methods import STUDIED

POINTS = f"Change in safety score against the base model (points, {INTERVAL})"
RATES = ("2e-5", "1e-3")
MOST = "largest possible"  # group of the largest effect size that n allows
WAYS = (("o", "#0072B2"), ("s", "#009E73"), ("^", "#56B4E9"), ("P", "#D55E00"))
CONDITIONAL = "The base models' one score each is taken as known."


def rows_of(tables: dict, outcome: str, contrast: str) -> pd.DataFrame:
    """The estimates of an outcome and contrast, numbers as floats."""
    rows = tables["estimates"]
    rows = rows[rows["outcome"].eq(outcome) & rows["contrast"].eq(contrast)]
    return floats(rows)


def runs_of(tables: dict, outcome: str, contrast: str) -> pd.DataFrame:
    """The single runs of an outcome, with their settings and record."""
    rows = rows_of(tables, outcome, contrast)
    rows = rows[rows["group"].eq(RUN)].rename(columns={"member": "run_id"})
    record = tables["runs"][["run_id", "trained_learning_rate", "no_op"]].assign(
        no_op=lambda part: part["no_op"].fillna(False).astype(bool)
    )
    return (
        rows[["run_id", "value"]].merge(tables["variants"], on="run_id").merge(record, on="run_id")
    )


def _panels(tables: dict, n_rows: int, height: float, **shared) -> tuple[Figure, np.ndarray]:
    """Axes [n_rows, base models], titled by short names."""
    names = bases(tables)
    fig, axes = plt.subplots(
        n_rows, len(names), figsize=(WIDTH, n_rows * height + 0.9), squeeze=False, **shared
    )
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(
            original_tables.short(name)
            .replace("-Instruct", "")
            .replace("Meta-", "")
            .replace("Qwen2-5", "Qwen2.5")
            .replace("v0-3", "v0.3")
        )
    return fig, axes


def named_rows(axes: np.ndarray, labels: list[str]) -> None:
    """The same rows in every panel, from the top, labelled on the left."""
    for i, ax in enumerate(axes):
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(labelleft=i == 0)
        ax.set_ylim(len(labels) - 0.4, -0.6)


def _key(fig: Figure, handles: list[Line2D]) -> None:
    above(fig, handles, frameon=False, fontsize=7.5, handletextpad=0.4, handlelength=None)


def mark(
    label: str, marker: str = "o", face: str = "#444444", edge: str = "#444444", size: float = 4.5
) -> Line2D:
    return Line2D([], [], ls="", marker=marker, mfc=face, mec=edge, ms=size, label=label)


@drawn("20_original_study")
def original_relabelled(tables: dict) -> tuple[Figure, str]:
    shown, single = rows_of(tables, SAFETY, CHANGE), runs_of(tables, SAFETY, CHANGE)
    single = single[single["objective"].eq("sft") & single["epochs"].eq(5)]
    order = [(method, rate) for method in STUDIED for rate in RATES]
    fig, axes = _panels(tables, 1, 0.33 * len(order), sharex=True)
    for ax, base in zip(axes[0], bases(tables), strict=True):
        zero(ax)
        for place, (method, rate) in enumerate(order):
            here = shown[shown["base_model"].eq(base) & shown["method"].eq(method)]
            here = here[here["member"].eq(rate)]
            raw = single[
                single["base_model"].eq(base)
                & single["method"].eq(method)
                & np.isclose(single["trained_learning_rate"].astype(float), float(rate))
            ]
            look = {"alpha": 0.45, "mec": "none", "mew": None}
            single_runs(ax, raw["value"], place, COLOURS[method], **look)
            dots(ax, here[here["group"].eq("true rate")], place, COLOURS[method])
            label, true = (
                here.loc[here["group"].eq(f"{kind} rate"), "value"].tolist()
                for kind in ("labelled", "true")
            )
            look = {"ms": 4, "mfc": "white", "mec": "#555555", "mew": 0.8, "zorder": 5}
            ax.plot(label, [place - 0.36] * len(label), "v", **look)
            if label and true:
                ends = [label[0], true[0]]
                ax.plot(ends, [place - 0.3, place], color="#555555", lw=0.7, zorder=2)
    named_rows(axes[0], [f"{METHOD_LABELS[method]}, {rate}" for method, rate in order])
    under(axes[0], POINTS)
    _key(
        fig,
        [
            mark("by the rate it was trained at"),
            mark("by the rate on its label", "v", "white", "#555555", 4),
            mark("a run", size=2.2),
        ],
    )
    wrong = tables["runs"]["findings"].notna().sum()
    text = (
        f"{wrong} runs were labelled with a learning rate of 1e-3 and trained at 2e-5. SFT on"
        f" UltraFeedback for 5 epochs: mean change over rounds by true rate (dots, {PERCENT} t"
        " intervals over rounds, run variance of each method and base model) and by label"
        f" (triangles); small dots: runs. {CONDITIONAL}"
    )
    return fig, f"{text} Behind it: {len(single)} runs; {unscored(tables)}."


def unscored(tables: dict) -> str:
    """How many verdicts there are and how many are empty, in words."""
    own = tables["rates"][
        ~tables["rates"]["run_id"].isin(
            tables["variants"].loc[tables["variants"]["method"].eq("none"), "run_id"]
        )
    ]
    return (
        f"{own['n'].sum() - own['n_scored'].sum()} of {own['n'].sum():,} verdicts are empty and"
        " count as not safe"
    )


@drawn("20_original_study")
def original_answers(tables: dict) -> tuple[Figure, str]:
    contrast = "labelled 1e-3 against labelled 2e-5"
    order = [(method, number) for method in STUDIED for number in original_study.ROUNDS]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.9 + 0.24 * len(order)), sharey=True)
    for ax, outcome in zip(axes, (SAME_LENGTH, SAME_VERDICT), strict=True):
        means, single = rows_of(tables, outcome, contrast), runs_of(tables, outcome, contrast)
        for place, (method, number) in enumerate(order):
            raw = single[single["method"].eq(method) & single["repetition"].eq(number)]
            here = means["group"].eq("round") & means["member"].eq(str(number))
            mean = means[means["method"].eq(method) & here]["value"]
            ax.plot(
                raw["value"],
                [place] * len(raw),
                "o",
                ms=3,
                color=COLOURS[method],
                alpha=0.4,
                mec="none",
            )
            ax.plot(
                mean,
                [place] * len(mean),
                "D",
                ms=5,
                mfc=COLOURS[method],
                mec="white",
                mew=0.7,
                zorder=4,
            )
    named_rows(axes, [f"{METHOD_LABELS[method]}, round {number}" for method, number in order])
    axes[0].set_xlabel("Answers of exactly equal length\n(percent of 330 prompts)")
    axes[1].set_xlabel("Equal verdicts\n(percent of prompts judged in both)")
    _key(fig, [mark("mean over runs", "D"), mark("a run", size=3)])
    text = (
        "The answers themselves show which runs labelled 1e-3 were trained at 2e-5: each is"
        " compared with the runs labelled 2e-5 of its base model, method, objective and epochs. In"
        " round 3 all were mislabelled. No interval: all 330 prompts are shown. Where a method's"
        " repeated runs agree no more than others (Prompt-Tuning), lengths tell nothing."
    )
    return fig, text


@drawn("20_original_study")
def original_dose(tables: dict) -> tuple[Figure, str]:
    gain = runs_of(tables, GAIN, CHANGE)
    both = gain.merge(
        runs_of(tables, SAFETY, CHANGE)[["run_id", "value"]],
        on="run_id",
        suffixes=("_gain", "_change"),
    )
    fig, axes = _panels(tables, 2, 1.75, sharex=True, sharey=True)
    for line, objective in zip(axes, ("sft", "dpo"), strict=True):
        for ax, base in zip(line, bases(tables), strict=True):
            zero(ax)
            ax.axhline(0, color="#777777", lw=0.6, zorder=1)
            ax.grid(axis="y")
            here = both[both["base_model"].eq(base) & both["objective"].eq(objective)]
            for run in here.itertuples():
                face = "white" if run.no_op else COLOURS[run.method]
                look = {"mfc": face, "mec": COLOURS[run.method], "alpha": 0.85, "zorder": 3}
                ax.plot(run.value_gain, run.value_change, "o", ms=3.6, mew=0.9, **look)
            ax.set_xscale("symlog", linthresh=1, linscale=0.5)
            ax.xaxis.set_major_locator(FixedLocator([-100, 0, 10]))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_locator(NullLocator())
            if here.empty:
                look = {"va": "center", "fontsize": 7.5, "color": "#888888"}
                ax.text(0.03, 0.35, "not trained\nby DPO", transform=ax.transAxes, **look)
        line[0].set_ylabel(f"{objective.upper()}: change in\nsafety score (points)")
    under(axes[1], "Fall of held-out loss (percent of the base model's; negative: it rose)")
    legend(fig, STUDIED)
    n, inert = len(both), int(both["no_op"].sum())
    worse = int(((both["value_gain"] < 0) & ~both["no_op"]).sum())
    text = (
        "Dose: how far training lowered the loss, against what it did to safety; each dot one of"
        f" {n} runs. {inert} runs learned nothing (hollow: no-ops, by loss alone); {worse} ended"
        " worse than the base model, most of them Prompt-Tuning. DPO's own loss starts at ln 2."
        " Descriptive: dose comes after training, and methods had one rate, not one dose."
    )
    return fig, text


@drawn("20_original_study")
def original_rounds(tables: dict) -> tuple[Figure, str]:
    means, single = (
        rows_of(tables, SAFETY, "no-ops: the base model scored again"),
        runs_of(tables, SAFETY, CHANGE),
    )
    single = single[single["no_op"]]
    fig, axes = _panels(tables, 1, 1.1, sharex=True)
    axes[0, 0].xaxis.set_major_locator(MultipleLocator(4))
    for ax, base in zip(axes[0], bases(tables), strict=True):
        zero(ax)
        for place, number in enumerate(original_study.ROUNDS):
            raw = single[single["base_model"].eq(base) & single["repetition"].eq(number)]["value"]
            here = means["group"].eq("round") & means["member"].eq(str(number))
            mean = means[means["base_model"].eq(base) & here]["value"]
            ax.plot(
                raw, [place] * len(raw), "o", ms=3.2, color=COLOURS["ia3"], alpha=0.6, mec="none"
            )
            ax.plot(
                mean,
                [place] * len(mean),
                "D",
                ms=5.5,
                mfc=COLOURS["ia3"],
                mec="#222222",
                mew=0.6,
                zorder=4,
            )
    named_rows(axes[0], [f"round {number}" for number in original_study.ROUNDS])
    under(axes[0], "Difference from the base model's one published score (percentage points)")
    _key(
        fig,
        [
            mark("mean of a round", "D", COLOURS["ia3"], "#222222"),
            mark("a run that learned nothing", face=COLOURS["ia3"], edge="none", size=3.2),
        ],
    )
    p = means.dropna(subset="p").groupby("base_model", sort=False)["p"].first()
    words = "; ".join(f"{original_tables.short(base)} p = {value:.2g}" for base, value in p.items())
    text = (
        f"The base model scored again: {len(single)} IA3 runs whose loss never left the base"
        " model's, by round. A drift between rounds is a change of the scoring, not of a model. F"
        f" test of equal rounds: {words}."
    )
    return fig, text


@drawn("20_original_study")
def original_tests(tables: dict) -> tuple[Figure, str]:
    rows = tables["estimates"]
    rows = rows[
        rows["outcome"].str.startswith("statistic ") & ~rows["outcome"].eq("statistic p")
    ].astype({"value": float})
    names = list(dict.fromkeys(rows.loc[rows["group"].eq("published"), "contrast"]))
    ways = [way for way in dict.fromkeys(rows["group"]) if way not in ("published", MOST)]
    styles = dict(zip(ways, WAYS, strict=False))
    fig, ax = plt.subplots(figsize=(WIDTH, 1.2 + 0.36 * len(names)))
    for place, name in enumerate(names):
        here = rows[rows["contrast"].eq(name)].set_index("group")["value"]
        ax.plot(here["published"], place, "D", ms=9, mfc="none", mec="#222222", mew=1.2, zorder=5)
        if MOST in here:
            ax.plot([here[MOST]] * 2, [place - 0.3, place + 0.3], color="#B3001B", lw=1.5)
        for i, (way, (shape, shade)) in enumerate(styles.items()):
            ax.plot(here.get(way), place + 0.09 * (i - 1.5), shape, ms=4, color=shade, zorder=4)
    named_rows(np.array([ax]), ["\n".join(textwrap.wrap(_plain(name), 34)) for name in names])
    ax.set_xlabel(
        "Effect size (r = z / sqrt(n) of Wilcoxon's test; Kendall's W among the four methods)"
    )
    ceiling = Line2D(
        [], [], ls="", marker="|", mec="#B3001B", ms=9, mew=1.5, label="largest r that n allows"
    )
    handles = [
        mark("published", "D", "none", "#222222", 7),
        ceiling,
        *(mark(way, styles[way][0], styles[way][1], styles[way][1], 4) for way in ways),
    ]
    above(fig, handles, 3, frameon=False, fontsize=7.5, handlelength=None, columnspacing=None)
    text = (
        "The study's own tests, run again on its runs: published effect sizes and ours, by which"
        " runs are used. Red bar: the r that all configurations changing in one direction give; it"
        " depends on n alone and exceeds 1 for n of 12 or more (bars: n of all runs). No interval:"
        " the tests are theirs."
    )
    return fig, text


def _plain(name: str) -> str:
    """A comparison with the names that a reader knows."""
    for base in original_study.MODELS.values():
        name = name.replace(
            base,
            original_tables.short(base)
            .partition("-")[0]
            .replace("Meta", "Llama")
            .replace("Qwen2", "Qwen")
            .capitalize(),
        )
    for method in STUDIED:
        name = name.replace(method, METHOD_LABELS[method])
    return name
