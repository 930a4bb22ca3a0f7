"""Every figure of the workbook: each takes tables and gives a figure and its caption, and computes
nothing but positions.
"""

import html
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image as Picture

from driftbook.figures.names import short_name, unit_of
from driftbook.stats import harm, influence, populations
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.terms import (
    AS_CONFIGURED,
    BIAS_AMB,
    BIAS_DIS,
    CATEGORY,
    CHANGE,
    CHANGE_HERE,
    LEVEL,
    NO_OP,
    PRIMARY,
    REFUSED,
    RUN,
    TRAINED,
    UNREADABLE,
    UNTRAINED,
)
from driftbook.study.consistency import REREADING
from driftbook.study.files import replacing
from driftbook.study.methods import METHOD_LABELS, PEFT_METHODS
from driftbook.study.nameless import nameless

COLOURS = {"none": "#777777"} | {name: method.colour for name, method in PEFT_METHODS.items()}
TRAINED_METHODS = tuple(PEFT_METHODS)
WIDTH, FEW = 6.5, 50
ASKED = {"safety": "harmful prompts", "over_refusal": "benign look-alikes"}
NO_INFORMATION = "persons not told apart"
Drawing = Callable[[dict], tuple[Figure, str]]
FIGURES: dict[str, Drawing] = {}  # every figure by name, in the workbook's order
SOURCES: dict[str, str] = {}  # the notebook and table that made it


def drawn(notebook: str, table: str = "estimates") -> Callable[[Drawing], Drawing]:
    """Registers a function as the figure of its name, made by this notebook from this table."""

    def register(drawing: Drawing) -> Drawing:
        name = drawing.__name__
        FIGURES[name] = _of_its_own(notebook, drawing) if notebook in REREADING else drawing
        SOURCES[name] = f"notebook {notebook} from the table {table}"
        return drawing

    return register


def _of_its_own(notebook: str, drawing: Drawing) -> Drawing:
    """The drawing, or a sentence where the tables are those of another study: what was read again
    has figures of its own.
    """

    @wraps(drawing)
    def drawn_or_not(tables: dict) -> tuple[Figure, str]:
        return (
            drawing(tables)
            if tables["estimates"]["notebook"].eq(notebook).any()
            else nothing(f"Nothing to draw: there are no estimates of notebook {notebook}.")
        )

    return drawn_or_not


# ---- reading, drawing, saving
def style() -> None:
    """Make every figure look like the workbook's."""
    plt.style.use(Path(__file__).with_name("workbook.mplstyle"))


def save_figure(fig: Figure, folder: Path, name: str, caption: str, source: str) -> Path:
    """Write the figure (PNG of 256 colours) and, beside it, NAME.md with its caption and the
    notebook and table that made it.
    """
    drawn = BytesIO()
    fig.savefig(drawn, format="png")
    with replacing(folder / f"{name}.png") as new:
        _few_colours(Picture.open(drawn).convert("RGB")).save(
            new, format="png", optimize=True, dpi=(150, 150)
        )
    with replacing(folder / f"{name}.md") as new:
        new.write_text(inert_markdown(nameless(f"{caption}\n\nMade by {source}.\n")))
    return folder / f"{name}.png"


def inert_markdown(text: str) -> str:
    """A caption as Markdown in which notes and categories are no HTML and no link."""
    return html.escape(text, quote=False).replace("](", "]\\(")


def plain_caption(text: str) -> str:
    """The caption that was written so."""
    return html.unescape(text.replace("]\\(", "]("))


def _few_colours(picture: Picture.Image) -> Picture.Image:
    """The picture in 256 colours, among them white and the methods' own, exactly."""
    exact = [
        int(colour[i : i + 2], 16) for colour in ("#ffffff", *COLOURS.values()) for i in (1, 3, 5)
    ]
    rest = 256 - len(exact) // 3
    palette = Picture.new("P", (1, 1))
    palette.putpalette(exact + picture.quantize(rest).getpalette()[: 3 * rest])
    few = picture.quantize(palette=palette, dither=Picture.Dither.NONE)
    colours, paper = few.getpalette(), few.getpixel((0, 0))
    few.putpalette(
        [*colours[: 3 * paper], 255, 255, 255, *colours[3 * paper + 3 :]]
    )  # the nearest colour that Pillow finds for white is not white
    return few


# ---- what to show
def bases(tables: dict) -> list[str]:
    """The study's base models in their order: those of which a variant was made, since of another
    one a figure of changes shows nothing; all where none was.
    """
    variants = tables["variants"]
    made = variants[variants["method"].ne("none")]
    return list((made if len(made) else variants)["base_model"].unique())


def pick(
    tables: dict,
    outcome: str,
    contrast: str = CHANGE,
    benchmark: str | None = None,
    estimator: str = PRIMARY,
) -> pd.DataFrame:
    """The estimates of an outcome, contrast and estimator, of the first judge; those of repairs,
    which have figures of their own and name no detector of refusals, are left to them.
    """
    rows = tables["estimates"]
    rows = rows[
        rows["notebook"].ne("14_safe_lora")
        & rows["outcome"].eq(outcome)
        & rows["contrast"].eq(contrast)
        & rows["estimator"].eq(estimator)
        & rows["benchmark"].eq(benchmark or rows["benchmark"])
    ]
    rows = rows[rows["judge"].eq(rows["judge"].iloc[0])] if len(rows) else rows
    return floats(rows)


def floats(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with their numbers as floats, NaN where null."""
    names = ("value", "se", "ci_low", "ci_high", "p", "p_adjusted")
    return rows.astype({name: float for name in names if name in rows})


def of_runs(tables: dict, outcome: str, benchmark: str | None = None) -> pd.DataFrame:
    """The change of each single run, with the run's arm, setting and record."""
    rows = pick(tables, outcome, CHANGE, benchmark)
    rows = rows[rows["group"].eq(RUN)].rename(columns={"member": "run_id"})[
        ["run_id", "value", "ci_low", "ci_high", "n_items", "n_unscored", "judge"]
    ]
    records = tables["runs"][
        ["run_id", "n_trainable", "seconds", "peak_memory", "dose_nll", "kl_base"]
    ]
    known = influence.arms(tables["variants"], tables["runs"])[
        ["run_id", "base_model", "method", "objective", "arm", "setting"]
    ]
    return known.merge(rows, on="run_id").merge(records, on="run_id")


def _method_label(method: str, group: str = TRAINED) -> str:
    return (
        METHOD_LABELS[method]
        if group in (TRAINED, AS_CONFIGURED)
        else f"{METHOD_LABELS[method]}, {group}"
    )


def harm_name(tables: dict) -> str:
    """The safety outcome of a study in few words; see `harm_of`."""
    return short_name(harm_of(tables))


def axis(outcome: str, change: bool = True) -> str:
    """An axis label: outcome, unit, interval."""
    unit = unit_of(outcome, "percentage points" if change else "percent")
    return (
        f"Change in {short_name(outcome)} against the base model"
        if change
        else short_name(outcome).capitalize()
    ) + f" ({unit}, {INTERVAL})"


def beside(outcome: str) -> str:
    """The label of a vertical axis, short enough for a small panel."""
    return f"Change in\n{short_name(outcome)}\n({unit_of(outcome, 'points')})"


def lines_meant(tables: dict, groups: Sequence[str], *shown: tuple[str, str | None]) -> str:
    """What the lines of a figure of changes are, from the population of the estimates drawn."""
    rows = pd.concat([pick(tables, outcome, CHANGE, benchmark) for outcome, benchmark in shown])
    rows = rows[rows["group"].isin(groups)]
    if not (held := populations.held_for(rows)):
        return "There are no intervals."
    if populations.over_seeds(rows) is False:
        return f"Line: {INTERVAL} for {held}."
    return f"Thin line: {INTERVAL} for {held}; thick line: for other seeds alone, on these prompts."


def intervals_of(rows: pd.DataFrame) -> str:
    """A sentence on what the intervals of these estimates hold for; "" where they have none."""
    held = populations.held_for(rows)
    return f" Intervals hold for {held}." if held else ""


def coverage(tables: dict, *shown: tuple[str, str | None]) -> str:
    """How many runs and prompts are behind a figure, and the share that could not be scored."""
    words = []
    for outcome, benchmark in shown:
        rows = of_runs(tables, outcome, benchmark)
        if rows.empty:
            continue
        asked, unscored = rows["n_items"].sum(), rows["n_unscored"].sum()
        judge = "" if rows["judge"].iloc[0] == "none" else f" by {rows['judge'].iloc[0]}"
        words.append(
            f"{short_name(outcome)}{judge}: {populations.counted(len(rows), 'run')} x"
            f" {rows['n_items'].max()} items, {100 * unscored / asked:.3g}% without a score in run"
            " or base"
        )
    return "Behind it: " + "; ".join(dict.fromkeys(words)) + "."


def unread_bases(tables: dict, *outcomes: str) -> list[str]:
    """The base models of which one of these outcomes is no finding: their answers hold no
    information (notebook 10).
    """
    rows = tables["estimates"]
    unread = rows["estimator"].eq(UNREADABLE) & rows["outcome"].isin(outcomes)
    return [one for one in bases(tables) if rows.loc[unread, "base_model"].eq(one).any()]


def left_out(tables: dict, *outcomes: str) -> str:
    """What a caption says of base models that have no dot; nothing where there are none."""
    names = ", ".join(unread_bases(tables, *outcomes))
    if not names:
        return ""
    return (
        f"No bias score is drawn for {names}: the answers do not tell one person from the other. "
    )


def empty_panel(ax: Axes, text: str) -> None:
    """Say in a panel why nothing is drawn there."""
    place = {"transform": ax.transAxes, "ha": "center", "va": "center"}
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    ax.text(0.5, 0.5, text, color="#666666", fontsize=8, bbox=paper, **place)


def nothing(sentence: str) -> tuple[Figure, str]:
    """A figure that says why there is none."""
    fig, ax = plt.subplots(figsize=(WIDTH, 1.2))
    ax.axis("off")
    ax.text(0.5, 0.5, sentence, ha="center", va="center", wrap=True)
    return fig, sentence


# ---- panels
def panels(
    tables: dict, n_rows: int, heights: list[float], sharex: str = "row", sharey: str = "row"
) -> tuple[Figure, np.ndarray]:
    """Axes [n_rows, base models], a column per base model, with rows of the given heights in
    inches.
    """
    n = len(bases(tables))
    fig, axes = plt.subplots(
        n_rows,
        n,
        figsize=(WIDTH, sum(heights) + 0.65),
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
        height_ratios=heights,
    )
    for column, base_model in enumerate(bases(tables)):
        axes[0, column].set_title(
            "\n".join(textwrap.wrap(base_model, max(12, 60 // n))), y=1, pad=4
        )
    return fig, axes


def panels_with_all(tables: dict, height: float) -> tuple[Figure, dict[str, Axes]]:
    """One row of panels by name: a base model each and, where there are several, all of them."""
    columns = [*bases(tables), "all"] if len(bases(tables)) > 1 else bases(tables)
    shared = {"sharey": True, "sharex": True, "squeeze": False}
    fig, axes = plt.subplots(1, len(columns), figsize=(WIDTH, height), **shared)
    for ax, base_model in zip(axes[0], columns, strict=True):
        title = "all base models" if base_model == "all" else base_model
        ax.set_title("\n".join(textwrap.wrap(title, max(12, 60 // len(columns)))))
    return fig, dict(zip(columns, axes[0], strict=True))


def dots(
    ax: Axes,
    rows: pd.DataFrame,
    places: float | Sequence[float],
    colours: str | Sequence[str],
    filled: bool | Sequence[bool] = True,
    here: pd.DataFrame | None = None,
) -> None:
    """A dot and its interval per row, at one place (or one each), in one colour (or one each).

    `here` has the narrower intervals, drawn thick. Rows without a value show nothing.
    """
    given = (np.broadcast_to(one, len(rows)) for one in (places, colours, filled))
    thick = [None] * len(rows) if here is None else list(here.itertuples())
    for row, inner, place, colour, solid in zip(rows.itertuples(), thick, *given, strict=True):
        if pd.isna(row.value):
            continue
        colour, line = str(colour), {"solid_capstyle": "butt", "zorder": 3}
        if pd.notna(row.ci_low):
            ax.plot([row.ci_low, row.ci_high], [place] * 2, color=colour, lw=1, **line)
        if inner is not None and pd.notna(inner.ci_low):
            ends = [float(inner.ci_low), float(inner.ci_high)]
            ax.plot(ends, [place] * 2, color=colour, lw=2.8, **line)
        face = colour if solid else "white"
        ax.plot(row.value, place, "o", ms=4.5, color=colour, mfc=face, mew=1, zorder=4)


def single_runs(
    ax: Axes, values: Sequence[float], places: float | Sequence[float], colour: str, **look
) -> None:
    """Small dots, one per run, behind an estimate."""
    look = {"ms": 2.2, "alpha": 0.35, "mew": 0, "zorder": 2} | look
    ax.plot(values, np.broadcast_to(places, len(values)), "o", color=colour, **look)


def handle(label: str, colour: str, marker: str = "o", **look) -> Line2D:
    """A mark of a legend."""
    return Line2D(
        [], [], **{"ls": "", "ms": 4.5, "marker": marker, "color": colour} | look, label=label
    )


def above(fig: Figure, handles: list[Line2D], columns: int | None = None, **look) -> None:
    """A legend above the panels, from the left, in one line or in so many columns."""
    look = {"handlelength": 1.4, "columnspacing": 1.4} | look
    fig.legend(handles=handles, loc="outside upper left", ncols=columns or len(handles), **look)


def zero(ax: Axes) -> None:
    ax.axvline(0, color="#777777", lw=0.9, zorder=1)


def method_rows(
    ax: Axes,
    changes: pd.DataFrame,
    here: pd.DataFrame,
    runs: pd.DataFrame,
    order: list[tuple[str, str]],
    empty: str = "nothing scored",
) -> None:
    """Rows of method and group, from the top: raw runs behind, estimate and intervals in front;
    `empty` says why there is none.
    """
    zero(ax)
    for place, (method, group) in enumerate(order):
        row = changes[changes["method"].eq(method) & changes["group"].eq(group)]
        thick = here[here["method"].eq(method) & here["group"].eq(group)]
        member = runs[
            runs["method"].eq(method)
            & (
                runs["arm"].eq(group)
                | runs["setting"].eq(group) & runs["arm"].isin([TRAINED, NO_OP])
            )
        ]
        if len(member) < FEW:
            spread = np.linspace(-0.24, 0.24, len(member)) if len(member) > 1 else 0.0
            single_runs(ax, member["value"], place + spread, COLOURS[method])
        dots(
            ax,
            row,
            place,
            COLOURS[method],
            group not in (UNTRAINED, NO_OP),
            thick if len(thick) else None,
        )
    if not changes["value"].notna().any():
        empty_panel(ax, empty)


def name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def present(rows: pd.DataFrame, groups: tuple[str, ...]) -> list[tuple[str, str]]:
    """Method and group pairs of the estimates, group by group, in the methods' order."""
    have = set(zip(rows["method"], rows["group"], strict=True))
    return [
        (method, group) for group in groups for method in TRAINED_METHODS if (method, group) in have
    ]


def changes_figure(
    tables: dict, shown: list[tuple[str, str | None]], groups: tuple[str, ...], height: float = 0.27
) -> Figure | None:
    """Rows of axes: outcomes. Columns: base models. In each, a row per method and group. None where
    there are no estimates.
    """
    shown = [
        (outcome, benchmark)
        for outcome, benchmark in shown
        if len(pick(tables, outcome, CHANGE, benchmark))
    ]
    order = (
        present(
            pd.concat([pick(tables, outcome, CHANGE, benchmark) for outcome, benchmark in shown]),
            groups,
        )
        if shown
        else []
    )
    if not order:
        return None
    fig, axes = panels(tables, len(shown), [0.45 + height * len(order)] * len(shown))
    for line, (outcome, benchmark) in zip(axes, shown, strict=True):
        every, thick, runs = (
            pick(tables, outcome, CHANGE, benchmark),
            pick(tables, outcome, CHANGE_HERE, benchmark),
            of_runs(tables, outcome, benchmark),
        )
        level = pick(tables, outcome, LEVEL, benchmark)
        unread = unread_bases(tables, outcome)
        for ax, base_model in zip(line, bases(tables), strict=True):
            method_rows(
                ax,
                *(frame[frame["base_model"].eq(base_model)] for frame in (every, thick, runs)),
                order,
                NO_INFORMATION if base_model in unread else "nothing scored",
            )
            base_level(
                ax,
                level[
                    level["base_model"].eq(base_model)
                    & level["method"].eq("none")
                    & level["group"].eq("all")
                ],
            )
        name_rows(line[0], [_method_label(*pair) for pair in order])
        under(line, axis(outcome) + (f", {ASKED[benchmark]}" if benchmark in ASKED else ""))
    return fig


def base_level(ax: Axes, rows: pd.DataFrame) -> None:
    """The base model's own value, small, above the zero line."""
    if len(rows) and pd.notna(rows["value"].iloc[0]):
        text = f"base {rows['value'].iloc[0]:.1f}" + (
            ""
            if "bias" in rows["outcome"].iloc[0]
            else "%"
            if "percent" in rows["outcome"].iloc[0]
            else ""
        )
        ax.set_title(ax.get_title(loc="left"), loc="left", y=1, pad=13)
        ax.annotate(
            text,
            (0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
            color="#666666",
            annotation_clip=False,
        )


def under(line: np.ndarray, text: str) -> None:
    """One axis label under a row of panels, from the left; the layout keeps room for its height,
    not for its width.
    """
    lines = textwrap.wrap(text, 76)
    line[0].set_xlabel("\n".join(" " for _ in lines))
    label = line[0].annotate(
        "\n".join(lines),
        (0, 0),
        xycoords=("axes fraction", line[0].xaxis.label),
        ha="left",
        va="bottom",
        fontsize=8,
        color="#444444",
    )
    label.set_in_layout(False)


def captioned(
    tables: dict, fig: Figure | None, text: str, *shown: tuple[str, str | None]
) -> tuple[Figure, str]:
    """The figure with its caption, or a sentence in its place."""
    if fig is None:
        none = f"there are no estimates of the {' or '.join(short_name(one) for one, _ in shown)}."
        unread = left_out(tables, *(one for one, _ in shown)).strip()
        return nothing(f"Nothing to draw: {unread or none}")
    return fig, f"{text} {coverage(tables, *shown)}"


# ---- 09 safety
OVER_REFUSAL = (REFUSED, "over_refusal")


def harm_of(tables: dict) -> str:
    """The outcome that tells of safety in this study (harm.safety_outcome)."""
    return harm.safety_outcome(tables["estimates"])


def safety_of(tables: dict) -> tuple[str, str]:
    """The same with its benchmark."""
    return harm_of(tables), "safety"


def by_part(tables: dict, shown: list[tuple[str, str]], text: str | None = None) -> Figure | None:
    """Levels by category or dimension: rows of axes are outcomes, columns base models; in each, a
    row per part and a dot per method.
    """
    every = [
        rows[rows["group"].eq(CATEGORY)]
        for rows in (pick(tables, outcome, LEVEL, benchmark) for outcome, benchmark in shown)
    ]
    parts = list(dict.fromkeys(part for rows in every for part in rows["category"]))
    if not parts:
        return None
    fig, axes = panels(tables, len(shown), [0.4 + 0.36 * len(parts)] * len(shown))
    shades = ("none", *methods_of(tables))
    for line, rows, (outcome, _) in zip(axes, every, shown, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            if outcome in (BIAS_AMB, BIAS_DIS):
                zero(ax)
            for place, part in enumerate(parts):
                if place:
                    ax.axhline(place - 0.5, color="#eeeeee", lw=0.6, zorder=0)
                for shift, method in zip(
                    np.linspace(-0.32, 0.32, len(shades)), shades, strict=True
                ):
                    row = rows[
                        rows["base_model"].eq(base_model)
                        & rows["category"].eq(part)
                        & rows["method"].eq(method)
                    ]
                    dots(ax, row, place + shift, COLOURS[method])
            if base_model in unread_bases(tables, outcome):
                empty_panel(ax, NO_INFORMATION)
        name_rows(line[0], [part.replace("_", " ") for part in parts])
        under(line, text or axis(outcome, change=False))
    legend(fig, shades)
    return fig


def methods_of(tables: dict) -> tuple[str, ...]:
    """The methods that a study trains, in the workbook's order."""
    return tuple(
        method for method in TRAINED_METHODS if tables["variants"]["method"].eq(method).any()
    )


def legend(fig: Figure, methods) -> None:
    """Names of the methods in their colours, in one line above the panels, where rows stand for
    something else.
    """
    handles = [
        Line2D([], [], color=COLOURS[method], marker="o", ms=4.5, lw=1, label=METHOD_LABELS[method])
        for method in methods
    ]
    above(fig, handles)
