"""Figures of a second study, read again: LoRA against full fine-tuning by unit, seeds, judges
against people, and Safe LoRA's three seeds.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from driftbook.figures.drawing import (
    COLOURS,
    WIDTH,
    above,
    dots,
    drawn,
    floats,
    handle,
    name_rows,
    nothing,
    single_runs,
    zero,
)
from driftbook.rereading import adaptation_judges as judged
from driftbook.rereading import adaptation_units as units
from driftbook.rereading.adaptation_reading import OURS, REPAIR_CHANGE, REPAIR_OF_SEED
from driftbook.rereading.adaptation_study import (
    ADAPTATION_NAME,
    ADAPTATION_NOTEBOOK,
    CONFIGS,
    JUDGES,
    PLAIN,
    TUNED,
)
from driftbook.stats.confidence import ALPHA, INTERVAL
from driftbook.stats.terms import CHANGE, LEVEL, MITIGATION, PRIMARY

_SHADES = {"lora": COLOURS["lora"], "qlora": "#5b7fa6", "fft": "#333333"}
_GREY, _PALE, _MARGIN = "#777777", "#d9d9d9", 5.0
_UNITS = {
    units.CELLS: "cells (as published)",
    PRIMARY: "families",
    units.ROBUST: "families, CR2",
    units.MIXED_CELLS: "families, mixed model",
    units.RERUNS: "runs, all three seeds",
    units.LATER_RERUNS: "runs, two later seeds",
}
_TOGETHER = {"black-box": "black-box, together"}
_SEEDS = ("original", "0", "123")
_MARKS = dict(zip(JUDGES, ("s", "^", "D"), strict=True))  # of the judges' own rates


def _pick(tables: dict, **keys) -> pd.DataFrame:
    """The estimates of these keys, as floats."""
    rows = tables["estimates"]
    return floats(rows[rows[list(keys)].eq(keys).all(axis=1)])


def _one_panel_each(height: float) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each judge."""
    fig, axes = plt.subplots(1, len(JUDGES), figsize=(WIDTH, height), sharey=True, sharex=True)
    for ax, judge in zip(axes, JUDGES, strict=True):
        ax.set_title(judge)
    return fig, dict(zip(JUDGES, axes, strict=True))


def _label(axes, text: str) -> None:
    """One axis label, under the middle panel."""
    axes = list(axes)
    axes[len(axes) // 2].set_xlabel(text)


def _beside(ax: Axes, text: str, place: tuple, where, **look) -> None:
    """Small words at the right of a panel."""
    look = {"ha": "right", "va": "center", "fontsize": 7} | look
    ax.annotate(text, place, xycoords=where, **look)


# ---- units
@drawn(ADAPTATION_NOTEBOOK)
def adaptation_units(tables: dict) -> tuple[Figure, str]:
    every = _pick(tables, contrast=units.ONE_SEED, method="lora", against="fft")
    if every.empty:
        return nothing("Nothing to draw: there are no differences on the grid of one seed.")
    tests = _pick(tables, contrast=units.EQUIVALENCE, method="lora", against="fft", margin=_MARGIN)
    fig, axes = _one_panel_each(2.75)
    for judge, ax in axes.items():
        rows = every[every["judge"].eq(judge)]
        ax.axvspan(-_MARGIN, _MARGIN, color="#f0f0f0", zorder=0)
        zero(ax)
        own = rows[rows["group"].eq(units.OF_A_FAMILY)]["value"]
        place = list(_UNITS).index(PRIMARY)
        single_runs(ax, own, place + np.linspace(-0.2, 0.2, len(own)), _SHADES["lora"], ms=3)
        for place, unit in enumerate(_UNITS):
            row = rows[rows["estimator"].eq(unit) & rows["group"].eq("all")]
            dots(ax, row, place, _SHADES["lora"], unit != units.CELLS)
            p = tests[tests["judge"].eq(judge) & tests["estimator"].eq(unit)]["p"]
            for value in p:
                sure = {"color": "#222222", "weight": "bold"} if value < ALPHA else {"color": _GREY}
                _beside(ax, f"{value:.3f}", (1.0, place), ("axes fraction", "data"), **sure)
        _beside(ax, f"p at ±{_MARGIN:g}", (1.0, 1.01), "axes fraction", va="bottom", color=_GREY)
    low, high = every["ci_low"].min(), every["ci_high"].max()
    next(iter(axes.values())).set_xlim(low - 1, high + 0.27 * (high - low))  # room for p
    name_rows(next(iter(axes.values())), list(_UNITS.values()))
    _label(axes.values(), f"Attack success, LoRA less full fine-tuning (points, {INTERVAL})")
    return (
        fig,
        (
            "LoRA less full fine-tuning on the grid that was trained with one seed (2 attacks x 2"
            " benchmarks x 5 families, one run of each method and family), by what is taken as a"
            " unit; hollow: cells, as published. Small dots: the mean of each family. Grey band:"
            f" {_MARGIN:g} points; right: p of the two one-sided tests of equivalence at that"
            f" margin, bold below {ALPHA:g} (they read a 90% interval). Rows of families: other"
            " families; rows of runs: other seeds of these families, whose spread is LoRA's."
        ),
    )


@drawn(ADAPTATION_NOTEBOOK)
def adaptation_changes(tables: dict) -> tuple[Figure, str]:
    every = _pick(tables, contrast=CHANGE, outcome=units.SUCCESS)
    if every.empty:
        return nothing("Nothing to draw: there are no changes against the base model.")
    shown = (units.CELLS, PRIMARY, units.RERUNS)
    fig, axes = _one_panel_each(3.3)
    for judge, ax in axes.items():
        zero(ax)
        for place, (method, unit) in enumerate((m, u) for m in TUNED for u in shown):
            rows = every[every["judge"].eq(judge) & every["method"].eq(method)]
            if unit == PRIMARY:
                own = rows[rows["group"].eq(units.OF_A_FAMILY)]["value"]
                spread = place + np.linspace(-0.2, 0.2, len(own))
                single_runs(ax, own, spread, _SHADES[method], ms=3)
            row = rows[rows["group"].eq("all") & rows["estimator"].eq(unit)]
            dots(ax, row, place, _SHADES[method], unit != units.CELLS)
            if place % len(shown) == 0 and place:
                ax.axhline(place - 0.5, color="#e5e5e5", lw=0.6, zorder=0)
    names = [f"{CONFIGS[method]}: {_UNITS[unit]}" for method in TUNED for unit in shown]
    name_rows(next(iter(axes.values())), names)
    _label(axes.values(), f"Change in attack success against the base model (points, {INTERVAL})")
    return (
        fig,
        (
            f"Changes under black-box attacks in the published grid ({row.n_items.max()} cells of"
            f" {len(own)} families, one run each), as published (hollow: a cell is a draw), with"
            " families as units, and against the spread of runs with other seeds of the same"
            " families (LoRA's three seeds, taken for all methods). Small dots: families. In this"
            " grid method and seed are confounded."
        ),
    )


# ---- seeds
@drawn(ADAPTATION_NOTEBOOK)
def adaptation_seeds(tables: dict) -> tuple[Figure, str]:
    changes = _pick(tables, contrast=units.BY_SEED)
    if changes.empty:
        return nothing("Nothing to draw: there are no changes by seed.")
    spread = _pick(tables, contrast=units.RUN_SPREAD)
    attacks = list(dict.fromkeys(spread["category"]))
    fig, axes = plt.subplots(
        2, 3, figsize=(WIDTH, 4.1), sharex="row", sharey="row", height_ratios=[3, len(attacks)]
    )
    for column, judge in enumerate(JUDGES):
        top, low = axes[:, column]
        top.set_title(judge)
        zero(top)
        rows = changes[changes["judge"].eq(judge)]
        for place, seed in enumerate(_SEEDS):
            one = rows[rows["member"].eq(seed)]
            own = one[one["group"].eq(units.OF_A_FAMILY)]["value"]
            single_runs(top, own, place + np.linspace(-0.2, 0.2, len(own)), _SHADES["lora"], ms=3)
            dots(top, one[one["group"].eq("all")], place, _SHADES["lora"])
        for place, attack in enumerate(attacks):
            both = spread[spread["judge"].eq(judge) & spread["category"].eq(attack)]
            for seeds, full in ((units.ALL_SEEDS, True), (units.NEW_SEEDS, False)):
                dots(low, both[both["member"].eq(seeds)], place, _SHADES["lora"], full)
        low.set_xlim(left=0)
    name_rows(axes[0, 0], [f"seed {one}" if one.isdigit() else one for one in _SEEDS])
    name_rows(axes[1, 0], [_TOGETHER.get(attack, attack) for attack in attacks])
    _label(axes[0], f"Change in attack success, LoRA, black-box attacks (points, {INTERVAL})")
    _label(axes[1], "Standard deviation of a run's mean between seeds (points)")
    marks = [
        handle("all three seeds", _SHADES["lora"]),
        handle("seeds 0 and 123 alone", _SHADES["lora"], mfc="white"),
    ]
    above(fig, marks)
    return (
        fig,
        (
            "LoRA at three seeds. Above: the mean change of each seed over five families (small"
            " dots), interval over families. Below: how a run's mean over its cells varies between"
            " seeds, pooled over families. Where the hollow dot is far left of the full one, seeds"
            " 0 and 123 agree with each other and not with the original run: then the original"
            " differs in more than its seed. DeepInception on JBB is left out for GPT-4o-mini."
        ),
    )


# ---- judges and people
def _pattern_name(pattern: str) -> str:
    """Which judges call an answer harmful."""
    said = [judge for judge, sign in zip(JUDGES, pattern, strict=True) if sign == "1"]
    return (
        "none"
        if not said
        else "all three"
        if len(said) == len(JUDGES)
        else " and ".join(said) + ("" if len(said) > 1 else " alone")
    )


@drawn(ADAPTATION_NOTEBOOK)
def adaptation_patterns(tables: dict) -> tuple[Figure, str]:
    every = _pick(tables, outcome=judged.OF_PATTERN)
    if every.empty:
        return nothing("Nothing to draw: there are no labels by pattern of verdicts.")
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
    for place, pattern in enumerate(judged.PATTERNS):
        rows = every[every["member"].eq(pattern)]
        apart = rows[rows["category"].ne("all")]
        spread = place + np.linspace(-0.22, 0.22, len(apart))
        ax.scatter(
            apart["value"],
            spread,
            s=3 * np.sqrt(apart["n_items"].astype(float)),
            c=_GREY,
            alpha=0.55,
            lw=0,
            zorder=2,
        )
        dots(ax, rows[rows["category"].eq("all")], place, "#222222")
        own = rows[rows["category"].eq("all")].iloc[0]
        words = f"{own.n_items - own.n_unscored:.0f} + {own.n_unscored:.0f}"
        _beside(ax, words, (1.01, place), ("axes fraction", "data"), ha="left", color=_GREY)
    words = "labelled\nalike + not"
    _beside(ax, words, (1.01, 1.0), "axes fraction", ha="left", va="bottom", color=_GREY)
    name_rows(ax, [_pattern_name(pattern) for pattern in judged.PATTERNS])
    ax.set_ylabel("Judges that say harmful")
    ax.set_xlim(-2, 102)
    ax.set_xlabel(f"Answers that people call harmful (percent of those labelled alike, {INTERVAL})")
    return (
        fig,
        (
            "What people say of answers with the same three verdicts: the share called harmful,"
            " with Wilson's interval. The sample was drawn by these verdicts, so that these shares"
            " are not distorted by the draw, unlike a judge's sensitivity or precision. Small dots:"
            f" single attacks with at least {judged.LEAST_LABELLED} answers labelled alike, larger"
            " where more was labelled. Right: how many answers both people"
            " labelled alike, and how many they did not."
        ),
    )


@drawn(ADAPTATION_NOTEBOOK)
def adaptation_errors(tables: dict) -> tuple[Figure, str]:
    outcomes = (judged.FALSE_ALARMS, judged.SENSITIVITY, judged.PRECISION_OF)
    every = _pick(tables, contrast=LEVEL)
    every = every[every["outcome"].isin(outcomes)]
    if every.empty:
        return nothing("Nothing to draw: there are no errors of judges.")
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.1), sharey=True)
    for ax, outcome in zip(axes, outcomes, strict=True):
        rows = every[every["outcome"].eq(outcome)]
        for place, judge in enumerate(JUDGES):
            own = rows[rows["judge"].eq(judge)]
            _band(ax, own[own["estimator"].eq(judged.BOUNDED)], place + 0.13)
            dots(ax, own[own["estimator"].eq(judged.ENRICHED)], place - 0.2, _GREY, False)
            dots(ax, own[own["estimator"].eq(PRIMARY)], place + 0.13, "#222222")
        ax.set_title(outcome.removesuffix(" (percent)").capitalize())
        ax.set_xlim(-2, 102)
    name_rows(axes[0], list(JUDGES))
    _label(axes, "percent")
    above(
        fig,
        [
            handle(f"as sampled, {INTERVAL}", _GREY, mfc="white"),
            handle("raked to the judges' rates", "#222222"),
            handle("what the rates allow", "#bdbdbd", marker="", ls="-", lw=5),
        ],
    )
    return (
        fig,
        (
            "The judges against the consensus of two people. Hollow: in the labelled sample, which"
            " was enriched for disagreement between the judges. Full: the patterns of verdicts"
            " raked to the judges' published rates, all configurations and four attacks of"
            " HarmBench. Grey: the least and the largest that any shares of patterns with these"
            " rates give, with the labels' shares as they are."
        ),
    )


def _band(ax: Axes, rows: pd.DataFrame, place: float) -> None:
    """Bounds as a pale thick line."""
    for row in rows.itertuples():
        ends = [row.ci_low, row.ci_high]
        ax.plot(ends, [place] * 2, color="#bdbdbd", lw=5, solid_capstyle="butt", zorder=1)


def _three_ways(ax: Axes, rows: pd.DataFrame, place: float, shade: str) -> None:
    """One configuration: the judges' own marks, the bounds, the raked number."""
    _band(ax, rows[rows["estimator"].eq(judged.BOUNDED)], place + 0.12)
    dots(ax, rows[rows["estimator"].eq(PRIMARY)], place + 0.12, shade)
    said = rows[rows["estimator"].eq(judged.SAID)]
    for row in said.itertuples():
        ax.plot(row.value, place - 0.22, _MARKS[row.judge], color=shade, mfc="white", ms=4, mew=0.9)


@drawn(ADAPTATION_NOTEBOOK)
def adaptation_harmful(tables: dict) -> tuple[Figure, str]:
    every = _pick(tables, outcome=judged.HARMFUL)
    if every.empty:
        return nothing("Nothing to draw: there are no corrected rates.")
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.1), width_ratios=[1, 1.1], sharey=True)
    configs = list(CONFIGS)
    for place, config in enumerate(configs):
        shade = _SHADES.get(config, _GREY)
        rows = every[every["method"].eq(config)]
        _three_ways(axes[0], rows[rows["contrast"].eq(LEVEL)], place, shade)
        if config != PLAIN:
            change = rows[rows["contrast"].eq(CHANGE)]
            _three_ways(axes[1], change, place, shade)
            own = change[change["estimator"].eq(judged.OWN_SHARES)]
            dots(axes[1], own, place + 0.36, shade, False)
    zero(axes[1])
    name_rows(axes[0], [CONFIGS[config] for config in configs])
    for ax, title in zip(axes, ("Rate", "Change against the base model"), strict=True):
        ax.set_title(title)
    axes[0].set_xlabel(f"Harmful answers (percent, {INTERVAL})")
    axes[1].set_xlabel(f"Change (points, {INTERVAL})")
    handles = [handle(judge, _GREY, mark, mfc="white") for judge, mark in _MARKS.items()]
    handles += [
        handle("raked to human labels", "#222222"),
        handle("raked, each side's own labels", "#222222", mfc="white"),
        handle("what the rates allow", "#bdbdbd", marker="", ls="-", lw=5),
    ]
    above(fig, handles, 3)
    return (
        fig,
        (
            f"Harmful answers under the black-box attacks on HarmBench ({rows['n_items'].min()}"
            " cells), as each judge says, and corrected by human labels of answers with the same"
            " three verdicts. Full: patterns of verdicts raked to the judges' rates; the interval"
            " is that of the labels alone. Grey: what any shares of patterns with these rates give."
            " Hollow round: each side's patterns read by its own labels, under the attacks that"
            " both were labelled"
            " under; a judge may err otherwise on a tuned model's answers. JBB was not labelled."
        ),
    )


# ---- Safe LoRA
@drawn(ADAPTATION_NOTEBOOK)
def adaptation_repair(tables: dict) -> tuple[Figure, str]:
    every = _pick(tables, contrast=REPAIR_CHANGE)
    theirs = every[every["study"].eq(ADAPTATION_NAME)]
    ours = every[every["study"].eq(OURS)].sort_values("base_model", key=lambda one: one.eq("all"))
    if theirs.empty or ours.empty:
        return nothing("Nothing to draw: there are no changes by Safe LoRA.")
    fig, axes = plt.subplots(
        2, 1, figsize=(WIDTH, 3.6), sharex=True, height_ratios=[len(JUDGES), len(ours)]
    )
    for ax in axes:
        zero(ax)
    for place, judge in enumerate(JUDGES):
        rows = theirs[theirs["judge"].eq(judge)]
        seeds = rows[rows["group"].eq(REPAIR_OF_SEED)]
        single_runs(
            axes[0],
            seeds["value"],
            place + np.linspace(-0.2, 0.2, len(seeds)),
            _SHADES["lora"],
            ms=4,
        )
        dots(axes[0], rows[rows["group"].eq(MITIGATION)], place, _SHADES["lora"])
    dots(axes[1], ours, np.arange(len(ours)), _GREY)
    name_rows(axes[0], list(JUDGES))
    names = ["all base models" if one == "all" else one for one in ours["base_model"]]
    name_rows(axes[1], names)
    mean = theirs[theirs["group"].eq(MITIGATION)].iloc[0]
    axes[0].set_title(
        f"The study: {mean.base_model}, {mean.category}, {mean.n_runs} seeds; attack success"
    )
    runs = ours[ours["base_model"].ne("all")]["n_runs"]
    axes[1].set_title(f"Ours: the miniature, {runs.min()} seeds a base model; unsafe responses")
    axes[1].set_xlabel(f"Safe LoRA less LoRA (points, {INTERVAL}); left is safer")
    return (
        fig,
        (
            "What Safe LoRA does to the adapter that it repairs. Above: the study's seeds (small"
            f" dots) and their mean, t interval of {mean.n_runs - 1} degrees of freedom. Below: our"
            " published estimates on the miniature, which are no finding about real models; their"
            " intervals are over seeds and families of prompts. The outcomes differ, so that only"
            " directions compare."
        ),
    )
