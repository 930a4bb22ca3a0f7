"""Figures of notebook 13: probes by layer with their nulls, refusals by what is put in place, KL by
the place in an answer, and what an adapter changes by layer.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    WIDTH,
    above,
    bases,
    drawn,
    handle,
    nothing,
    under,
)
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.directions import (
    ATTENTION,
    BEGINS,
    DRIFT,
    DROP,
    HARMFUL,
    HARMLESS,
    KL,
    OF_BASE,
    RESTORED,
    SHIFT,
    TAKEN,
    UPDATE,
)
from driftbook.stats.terms import ALL
from driftbook.study.methods import LAYER_PARTS, layers_of

_NOTEBOOK, _TABLE = "13_mechanisms", "probes"
_NONE = "Nothing to draw: the study looks into no run."
PARTS = {ALL: "o", "early": "<", "middle": "s", "late": ">"}
SHADES = {ALL: COLOURS["lora"], "early": "#66C2E8", "middle": "#3B6FB6", "late": "#1B3A63"}
GREY = "#BBBBBB"


def _rows(tables: dict, *probes: str) -> pd.DataFrame:
    """The rows of probes with their run's base model, method and adapted part, as floats."""
    rows = tables["probes"]
    numbers = ["value", "ci_low", "ci_high", "null", "null_low", "null_high"]
    rows = rows[rows["probe"].isin(probes)].astype(dict.fromkeys(numbers, float))
    known = tables["variants"][["run_id", "base_model", "method", "mitigation"]]
    known = known.assign(adapted=known["mitigation"].str.removeprefix("layers ").fillna(ALL))
    return rows.merge(known.drop(columns="mitigation"), on="run_id")


def _groups(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Method and adapted part of the runs, in the order of the legend."""
    there = set(zip(rows["method"], rows["adapted"], strict=True))
    return [(m, p) for m in METHOD_LABELS for p in PARTS if (m, p) in there and m != "none"]


def _look(method: str, part: str) -> tuple[str, str]:
    """Colour and mark of a group."""
    return (SHADES[part] if method == "lora" else COLOURS[method]), PARTS[part]


def _label(method: str, part: str) -> str:
    return METHOD_LABELS[method] + ("" if part == ALL else f", {part} layers")


def _legend(fig: Figure, groups: list[tuple[str, str]], *more) -> None:
    marks = [(_label(*one), *_look(*one)) for one in groups]
    handles = [handle(name, colour, mark, ms=4) for name, colour, mark in marks]
    above(fig, [*handles, *more], min(4, len(handles) + len(more)), fontsize=7)


def _axes(tables: dict, rows: int, height: float) -> tuple[Figure, np.ndarray]:
    names = bases(tables)
    shape = {"figsize": (WIDTH, 0.9 + height * rows), "squeeze": False, "sharey": "row"}
    fig, axes = plt.subplots(rows, len(names), **shape)
    for column, name in enumerate(names):
        axes[0, column].set_title(name)
    for ax in axes.flat:  # layers and tokens are whole
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return fig, axes


def _lines(ax: Axes, rows: pd.DataFrame, x: str, groups: list[tuple[str, str]]) -> None:
    """The mean of each group's runs along x, and thin lines to the extreme runs."""
    for number, (method, part) in enumerate(groups):
        own = rows[rows["method"].eq(method) & rows["adapted"].eq(part)].dropna(subset=["value"])
        by = own.groupby(x)["value"].agg(["mean", "min", "max"])
        if by.empty:
            continue
        colour, mark = _look(method, part)
        places = by.index.to_numpy(float) + 0.07 * (number - (len(groups) - 1) / 2)
        ax.vlines(places, by["min"], by["max"], color=colour, lw=0.8)
        ax.plot(places, by["mean"], mark, color=colour, ms=3.5, ls="-", lw=0.7)


def _band(ax: Axes, rows: pd.DataFrame) -> None:
    """The mean range of the nulls, by layer."""
    by = rows.groupby("layer")[["null_low", "null_high"]].mean().dropna()
    if len(by):
        layers = by.index.to_numpy(float)
        ax.fill_between(layers, by["null_low"], by["null_high"], color=GREY, alpha=0.5, lw=0)


@drawn(_NOTEBOOK, _TABLE)
def probes_by_layer(tables: dict) -> tuple[Figure, str]:
    """The refusal direction by layer: its cosine with the base's, and the fall along it."""
    rows = _rows(tables, DRIFT, DROP, SHIFT)
    rows = rows[rows["method"].ne("none")]
    if rows.empty:
        return nothing(_NONE)
    groups = _groups(rows)
    shown = {
        DRIFT: "cosine with the\nbase's direction",
        DROP: "fall of harmful\nprompts (% of gap)",
        SHIFT: "shift of the\nmean state",
    }
    fig, axes = _axes(tables, len(shown), 1.25)
    for line, (probe, label) in zip(axes, shown.items(), strict=True):
        for ax, base in zip(line, bases(tables), strict=True):
            own = rows[rows["probe"].eq(probe) & rows["base_model"].eq(base)]
            own = own[own["part"].eq(HARMFUL)] if probe == SHIFT else own
            _band(ax, own)
            _lines(ax, own, "layer", groups)
            ax.set_xlim(-0.5, float(rows["layer"].max()) + 0.5)
        line[0].set_ylabel(label)
    under(axes[-1], "Layer")
    _legend(fig, groups, handle("range of the null", GREY, "s", ms=6))
    return fig, (
        "Above: the cosine of each run's refusal direction with the base model's, null from"
        " shuffled labels. Middle: how far harmful prompts fall along the base's direction, in"
        " percent of its gap between harmful and harmless prompts, null from random directions."
        " Below: 1 - cosine of the mean states of harmful prompts, null from halves of the base's"
        " own prompts. Dots: means over seeds; lines: the extreme seeds. Layers without a direction"
        " (its halves have a cosine below .5) are left out."
    )


@drawn(_NOTEBOOK, _TABLE)
def refusals_patched(tables: dict) -> tuple[Figure, str]:
    """How likely answers begin as refusals with others' states put in place, by layer."""
    rows = _rows(tables, RESTORED, TAKEN)
    if rows.empty:
        return nothing(_NONE)
    rows["layer"] = rows["layer"].astype(float).fillna(-1)
    groups, base_rows = _groups(rows), rows[rows["method"].eq("none")]
    shown = {RESTORED: "base's states\nin the run (%)", TAKEN: "run's states\nin the base (%)"}
    fig, axes = _axes(tables, 2, 1.5)
    for line, (probe, label) in zip(axes, shown.items(), strict=True):
        for ax, base in zip(line, bases(tables), strict=True):
            own = rows[rows["probe"].eq(probe) & rows["base_model"].eq(base)]
            _band(ax, own[own["method"].ne("none")])
            before = base_rows[base_rows["probe"].eq(probe) & base_rows["base_model"].eq(base)]
            ax.plot(before["layer"], before["value"], color="#555555", lw=1, ls="--")
            _lines(ax, own, "layer", groups)
            ax.set_ylim(-4, 104)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda layer, _: _level(layer)))
            ax.set_xlim(-1.5, rows["layer"].max() + 0.5)
            ax.set_xticks(_shown_levels(int(rows["layer"].max())))
        line[0].set_ylabel(label)
    under(axes[-1], "Layer whose states are replaced, at every token of the prompt")
    dashed = handle("checkpoint before alignment", "#555555", "", ls="--", lw=1)
    _legend(fig, groups, dashed, handle("random step of equal length", GREY, "s", ms=6))
    return fig, (
        "The probability that the answer to a harmful prompt begins as a refusal. Above: the run,"
        " with the base model's states put in place of its own at one layer. Below: the base model,"
        " with the run's. A range of layers between two dots carries their difference. Dashed: the"
        " checkpoint before alignment in place of a run. Dots: means over seeds; lines: the extreme"
        f" seeds; grey: {INTERVAL} of a random step as long as the base's, the mean over runs."
    )


def _level(layer: float) -> str:
    return "in" if layer < 0 else f"{layer:.0f}"


def _shown_levels(last: int) -> list[int]:
    """What goes in, and the last layer of each third, between which shares are read."""
    return [-1, *(layers_of(part, last + 1).stop - 1 for part in LAYER_PARTS)]


@drawn(_NOTEBOOK, _TABLE)
def kl_by_place(tables: dict) -> tuple[Figure, str]:
    """KL of the next token by its place in the base model's own answer."""
    rows = _rows(tables, KL)
    rows = rows[rows["method"].ne("none")]
    if rows.empty:
        return nothing(_NONE)
    rows["place"] = rows["position"].str.removeprefix("answer ").astype(int)
    groups = _groups(rows)
    fig, axes = _axes(tables, 2, 1.3)
    for line, kind in zip(axes, (HARMFUL, HARMLESS), strict=True):
        for ax, base in zip(line, bases(tables), strict=True):
            _lines(ax, rows[rows["part"].eq(kind) & rows["base_model"].eq(base)], "place", groups)
        line[0].set_ylabel(f"{kind} prompts\n(nats)")
    under(axes[-1], "Token of the base model's own answer")
    _legend(fig, groups)
    return fig, (
        "KL(run || base) of the next token along the base model's own answers: where the first"
        " tokens stand out, fine-tuning changed how answers begin and little behind that (shallow"
        " alignment). Dots: means over seeds; lines: the extreme seeds."
    )


@drawn(_NOTEBOOK, _TABLE)
def change_by_layer(tables: dict) -> tuple[Figure, str]:
    """What an update adds to its module's output, and the attention that a soft prompt gets."""
    rows = _rows(tables, UPDATE, ATTENTION)
    rows = rows[rows["layer"].notna() & rows["value"].notna()]
    if rows.empty:
        return nothing(_NONE)
    shown = {UPDATE: "|ΔW h| over |h|\n(%)", ATTENTION: "attention on the\nsoft prompt (%)"}
    shown = {probe: label for probe, label in shown.items() if rows["probe"].eq(probe).any()}
    fig, axes = _axes(tables, len(shown), 1.4)
    for line, (probe, label) in zip(axes, shown.items(), strict=True):
        for ax, base in zip(line, bases(tables), strict=True):
            own = rows[rows["probe"].eq(probe) & rows["base_model"].eq(base)]
            by = own.groupby("layer")["null"].mean()
            ax.plot(by.index.to_numpy(float), by, color=GREY, lw=2)
            own = own.groupby(["run_id", "method", "adapted", "layer"])["value"].mean()
            _lines(ax, own.reset_index(), "layer", _groups(rows))
        line[0].set_ylim(bottom=0)  # of the whole line, which is drawn now
        line[0].set_ylabel(label)
    under(axes[-1], "Layer")
    _legend(fig, _groups(rows), handle("null", GREY, "", ls="-", lw=2))
    return fig, (
        "Above: what LoRA adds to the output of its modules at the last token of harmful prompts,"
        " over the norm of what the module is given, the mean of its modules; grey: a random update"
        " of the same norm. Below: the share of that token's attention that goes to the soft"
        " prompt; grey: the soft prompt's share of the tokens. Dots: means over seeds; lines: the"
        " extreme seeds."
    )


@drawn(_NOTEBOOK, _TABLE)
def refusals_begun(tables: dict) -> tuple[Figure, str]:
    """How likely answers to harmful prompts begin as refusals, by setting."""
    rows = _rows(tables, BEGINS)
    if rows.empty:
        return nothing(_NONE)
    groups = _groups(rows)
    fig, axes = _axes(tables, 1, 0.3 + 0.22 * len(groups))
    for ax, base in zip(axes[0], bases(tables), strict=True):
        own = rows[rows["base_model"].eq(base)]
        ax.axvline(own.loc[own["part"].eq(OF_BASE), "value"].mean(), color="#555555", lw=0.8)
        for place, (method, part) in enumerate(groups):
            some = own[own["method"].eq(method) & own["adapted"].eq(part) & own["part"].eq(ALL)]
            colour, mark = _look(method, part)
            ax.plot(some["value"], [place] * len(some), mark, color=colour, ms=3, alpha=0.5)
            ax.plot(some["value"].mean(), place, mark, color=colour, ms=5.5, mec="white", mew=0.5)
        ax.set_yticks(range(len(groups)), [_label(*one) for one in groups])
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_xlim(-4, 104)
    under(axes[0], "Answers to harmful prompts that begin as a refusal (percent)")
    return fig, (
        "The probability that the answer to a harmful prompt begins as a refusal. Small marks are"
        " seeds, large ones their means, the line is the base model. A setting that names layers"
        " adapts that third of the layers alone."
    )
