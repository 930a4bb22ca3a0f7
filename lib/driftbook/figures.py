"""Every figure of the workbook: each takes tables and gives a figure and its caption, and computes nothing but positions."""

import importlib
import textwrap
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from PIL import Image as Picture

from driftbook import stats
from driftbook.files import read_json, replacing
from driftbook.stats import (  # fmt: skip
    ACCURACY_AMB,
    ACCURACY_DIS,
    AS_CONFIGURED,
    BIAS_AMB,
    BIAS_DIS,
    CHANGE,
    CHANGE_HERE,
    CORRECT,
    FLIPS,
    FRONT,
    LEVEL,
    LOSS,
    NO_OP,
    REFUSED,
    TRAINED,
    UNSAFE,
    UNTRAINED,
)
from driftbook.study import PEFT_METHODS, REREAD
from driftbook.tables import TABLES

COLOURS = {"none": "#777777"} | {name: method.colour for name, method in PEFT_METHODS.items()}
LABELS = {"none": "base model"} | {name: method.label for name, method in PEFT_METHODS.items()}
TRAINED_METHODS = tuple(PEFT_METHODS)
WIDTH, FEW = 6.5, 50
SHORT = {
    UNSAFE: "unsafe-response rate", REFUSED: "refusal rate", ACCURACY_AMB: "accuracy, ambiguous", ACCURACY_DIS: "accuracy, disambiguated",
    BIAS_AMB: "bias score, ambiguous", BIAS_DIS: "bias score, disambiguated", FLIPS: "order-dependent answers", LOSS: "loss on utility answers", CORRECT: "correct utility answers",
}  # fmt: skip
UNITS = {BIAS_AMB: "points", BIAS_DIS: "points", LOSS: "nats per token"}
ASKED = {"safety": "harmful prompts", "over_refusal": "benign look-alikes"}
BOTH_LINES = "Thin line: 95% interval over seeds and prompts like these; thick line: over seeds alone, on these prompts."
Drawing = Callable[[dict], tuple[Figure, str]]
FIGURES: dict[str, Drawing] = {}  # every figure by name, in the workbook's order
SOURCES: dict[str, str] = {}  # the notebook and table that made it
MODULES = tuple(f"driftbook.figures_{name}" for name in ("factors", "planning", "labels", "primary", "safe_lora", "original", "peft"))  # the figures beside those of this module


def drawn(notebook: str, table: str = "estimates") -> Callable[[Drawing], Drawing]:
    """Registers a function as the figure of its name, made by this notebook from this table."""

    def register(drawing: Drawing) -> Drawing:
        name = drawing.__name__
        FIGURES[name] = _of_its_own(notebook, drawing) if notebook.partition("_")[2] in REREAD else drawing
        SOURCES[name] = f"notebook {notebook} from the table {table}"
        return drawing

    return register


def _of_its_own(notebook: str, drawing: Drawing) -> Drawing:
    """The drawing, or a sentence where the tables are those of another study: what was read again has figures of its own."""

    @wraps(drawing)
    def drawn_or_not(tables: dict) -> tuple[Figure, str]:
        return drawing(tables) if tables["estimates"]["notebook"].eq(notebook).any() else nothing(f"Nothing to draw: there are no estimates of notebook {notebook}.")

    return drawn_or_not


def every() -> dict[str, Drawing]:
    """All figures by name, those of the other modules too."""
    for module in MODULES:
        importlib.import_module(module)
    return FIGURES


def of(folder: Path) -> list[str]:
    """The names of the figures that a folder of figures holds, in the workbook's order."""
    return [name for name in every() if (folder / f"{name}.png").is_file()]


# ---- reading, drawing, saving
def style() -> None:
    """Make every figure look like the workbook's."""
    plt.style.use(Path(__file__).with_name("workbook.mplstyle"))


WHERE_MADE = ("drift", "modules", "spectra", "frontier")  # tables that a study has where it looks while it trains, or repairs


def read(tables_folder: Path, note: str | None = None) -> dict:
    """What figures are drawn from: the tables by name, and the study's note (from study.json beside published tables where not given)."""
    found = {name: TABLES[name].read(tables_folder) for name in ("variants", "runs", "curves", "rates")}
    found |= {name: TABLES[name].read(tables_folder) if TABLES[name].path(tables_folder).is_file() else TABLES[name].empty() for name in WHERE_MADE}
    note = read_json(tables_folder.parent / "study.json")["note"] if note is None else note
    return {**found, "estimates": stats.read_estimates(tables_folder), "note": note}


def draw(name: str, tables: dict, folder: Path | None = None) -> Figure:
    """The figure of this name, saved with its caption in `folder` where one is given; a notebook shows it by returning it."""
    style()
    fig, caption = every()[name](tables)
    height = fig.get_figheight()
    fig.get_layout_engine().set(rect=(0, 0.16 / height, 1, 1 - 0.16 / height), w_pad=0.05, h_pad=0.05)
    fig.text(0.995, 0.03 / height, tables["note"], ha="right", va="bottom", fontsize=6.5, color="#888888", style="italic")
    if folder is not None:
        save_figure(fig, folder, name, caption, SOURCES[name])
    plt.close(fig)
    return fig


def show(name: str, tables: dict, folder: Path) -> Image:
    """The figure of this name, saved with its caption, as the picture that was saved: a notebook need not draw it twice."""
    draw(name, tables, folder)
    return Image(data=(folder / f"{name}.png").read_bytes(), width=int(WIDTH * 120))


def save_figure(fig: Figure, folder: Path, name: str, caption: str, source: str) -> Path:
    """Write the figure (PNG of 256 colours) and, beside it, NAME.md with its caption and the notebook and table that made it."""
    drawn = BytesIO()
    fig.savefig(drawn, format="png")
    with replacing(folder / f"{name}.png") as new:
        _few_colours(Picture.open(drawn).convert("RGB")).save(new, format="png", optimize=True, dpi=(150, 150))
    with replacing(folder / f"{name}.md") as new:
        new.write_text(f"{caption}\n\nMade by {source}.\n")
    return folder / f"{name}.png"


def _few_colours(picture: Picture.Image) -> Picture.Image:
    """The picture in 256 colours, among them white and the methods' own, exactly."""
    exact = [int(colour[i : i + 2], 16) for colour in ("#ffffff", *COLOURS.values()) for i in (1, 3, 5)]
    rest = 256 - len(exact) // 3
    palette = Picture.new("P", (1, 1))
    palette.putpalette(exact + picture.quantize(rest).getpalette()[: 3 * rest])
    few = picture.quantize(palette=palette, dither=Picture.Dither.NONE)
    colours, paper = few.getpalette(), few.getpixel((0, 0))
    few.putpalette([*colours[: 3 * paper], 255, 255, 255, *colours[3 * paper + 3 :]])  # the nearest colour that Pillow finds for white is not white
    return few


# ---- what to show
def bases(tables: dict) -> list[str]:
    """The study's base models in their order."""
    return list(tables["variants"]["base_model"].unique())


def pick(tables: dict, outcome: str, contrast: str = CHANGE, benchmark: str | None = None) -> pd.DataFrame:
    """The estimates of an outcome and contrast, of the first judge, with the run_id of single runs."""
    rows = tables["estimates"]
    rows = rows[rows["outcome"].eq(outcome) & rows["contrast"].eq(contrast) & rows["benchmark"].eq(benchmark or rows["benchmark"])]
    rows = rows[rows["judge"].eq(rows["judge"].iloc[0])] if len(rows) else rows
    rows = rows.astype(dict.fromkeys(("value", "se", "ci_low", "ci_high"), float))
    return rows.assign(run_id=rows["group"].str.removeprefix("run: ").where(rows["group"].str.startswith("run: ")))


def of_runs(tables: dict, outcome: str, benchmark: str | None = None) -> pd.DataFrame:
    """The change of each single run, with the run's arm, setting and record."""
    rows = pick(tables, outcome, CHANGE, benchmark).dropna(subset="run_id")[["run_id", "value", "ci_low", "ci_high", "n_items", "n_unscored", "judge"]]
    records = tables["runs"][["run_id", "n_trainable", "seconds", "peak_memory", "dose_nll", "kl_base"]]
    known = stats.arms(tables["variants"], tables["runs"])[["run_id", "base_model", "method", "objective", "arm", "setting"]]
    return known.merge(rows, on="run_id").merge(records, on="run_id")


def label(method: str, group: str = TRAINED) -> str:
    return LABELS[method] if group in (TRAINED, AS_CONFIGURED) else f"{LABELS[method]}, {group}"


def axis(outcome: str, change: bool = True) -> str:
    """An axis label: outcome, unit, interval."""
    unit = UNITS.get(outcome, "percentage points" if change else "percent")
    return (f"Change in {SHORT[outcome]} against the base model" if change else SHORT[outcome].capitalize()) + f" ({unit}, 95% interval)"


def beside(outcome: str) -> str:
    """The label of a vertical axis, short enough for a small panel."""
    return f"Change in\n{SHORT[outcome]}\n({UNITS.get(outcome, 'points')})"


def coverage(tables: dict, *shown: tuple[str, str | None]) -> str:
    """How many runs and prompts are behind a figure, and the share that could not be scored."""
    words = []
    for outcome, benchmark in shown:
        rows = of_runs(tables, outcome, benchmark)
        if rows.empty:
            continue
        asked, unscored = rows["n_items"].sum(), rows["n_unscored"].sum()
        judge = "" if rows["judge"].iloc[0] == "none" else f" by {rows['judge'].iloc[0]}"
        words.append(f"{SHORT[outcome]}{judge}: {len(rows)} runs x {rows['n_items'].max()} items, {100 * unscored / asked:.2g}% without a score in run or base")
    return "Behind it: " + "; ".join(dict.fromkeys(words)) + "."


def nothing(sentence: str) -> tuple[Figure, str]:
    """A figure that says why there is none."""
    fig, ax = plt.subplots(figsize=(WIDTH, 1.2))
    ax.axis("off")
    ax.text(0.5, 0.5, sentence, ha="center", va="center", wrap=True)
    return fig, sentence


# ---- panels
def panels(tables: dict, n_rows: int, heights: list[float], sharex: str = "row", sharey: str = "row") -> tuple[Figure, np.ndarray]:
    """Axes [n_rows, base models], a column per base model, with rows of the given heights in inches."""
    n = len(bases(tables))
    fig, axes = plt.subplots(
        n_rows, n, figsize=(WIDTH, sum(heights) + 0.65), sharex=sharex, sharey=sharey, squeeze=False, height_ratios=heights
    )
    for column, base_model in enumerate(bases(tables)):
        axes[0, column].set_title("\n".join(textwrap.wrap(base_model, max(12, 60 // n))), y=1, pad=4)
    return fig, axes


def dots(ax: Axes, rows: pd.DataFrame, places: np.ndarray, colours: list[str], filled: list[bool], here: pd.DataFrame | None = None) -> None:
    """A dot and its interval per row; `here` gives the narrower interval. Rows without a value show nothing."""
    here = here.reset_index(drop=True) if here is not None else None
    for i, (row, place, colour, solid) in enumerate(zip(rows.itertuples(), places, colours, filled, strict=True)):
        if pd.isna(row.value):
            continue
        if pd.notna(row.ci_low):
            ax.plot([row.ci_low, row.ci_high], [place, place], color=colour, lw=1, solid_capstyle="butt", zorder=3)
        if here is not None and pd.notna(here.loc[i, "ci_low"]):
            ax.plot(here.loc[i, ["ci_low", "ci_high"]].astype(float), [place, place], color=colour, lw=2.8, solid_capstyle="butt", zorder=3)
        ax.plot(row.value, place, "o", ms=4.5, color=colour, mfc=colour if solid else "white", mew=1, zorder=4)


def zero(ax: Axes) -> None:
    ax.axvline(0, color="#777777", lw=0.9, zorder=1)


def method_rows(ax: Axes, changes: pd.DataFrame, here: pd.DataFrame, runs: pd.DataFrame, order: list[tuple[str, str]]) -> None:
    """Rows of method and group, from the top: raw runs behind, estimate and intervals in front."""
    zero(ax)
    for place, (method, group) in enumerate(order):
        row = changes[changes["method"].eq(method) & changes["group"].eq(group)]
        thick = here[here["method"].eq(method) & here["group"].eq(group)]
        member = runs[runs["method"].eq(method) & (runs["arm"].eq(group) | ("settings: " + runs["setting"]).eq(group) & runs["arm"].isin([TRAINED, NO_OP]))]
        if len(member) < FEW:
            spread = place + np.linspace(-0.24, 0.24, len(member)) if len(member) > 1 else np.full(len(member), place + 0.0)
            ax.plot(member["value"], spread, "o", ms=2.2, color=COLOURS[method], alpha=0.35, mew=0, zorder=2)
        dots(ax, row, np.full(len(row), place), [COLOURS[method]] * len(row), [group not in (UNTRAINED, NO_OP)] * len(row), thick if len(thick) else None)
    if not changes["value"].notna().any():
        ax.text(0.5, 0.5, "nothing scored", transform=ax.transAxes, ha="center", va="center", color="#888888")


def name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def present(rows: pd.DataFrame, groups: tuple[str, ...]) -> list[tuple[str, str]]:
    """Method and group pairs of the estimates, group by group, in the methods' order."""
    have = set(zip(rows["method"], rows["group"], strict=True))
    return [(method, group) for group in groups for method in TRAINED_METHODS if (method, group) in have]


def changes_figure(tables: dict, shown: list[tuple[str, str | None]], groups: tuple[str, ...], height: float = 0.27) -> Figure | None:
    """Rows of axes: outcomes. Columns: base models. In each, a row per method and group. None where there are no estimates."""
    shown = [(outcome, benchmark) for outcome, benchmark in shown if len(pick(tables, outcome, CHANGE, benchmark))]
    order = present(pd.concat([pick(tables, outcome, CHANGE, benchmark) for outcome, benchmark in shown]), groups) if shown else []
    if not order:
        return None
    fig, axes = panels(tables, len(shown), [0.45 + height * len(order)] * len(shown))
    for line, (outcome, benchmark) in zip(axes, shown, strict=True):
        every, thick, runs = pick(tables, outcome, CHANGE, benchmark), pick(tables, outcome, CHANGE_HERE, benchmark), of_runs(tables, outcome, benchmark)
        level = pick(tables, outcome, LEVEL, benchmark)
        for ax, base_model in zip(line, bases(tables), strict=True):
            method_rows(ax, *(frame[frame["base_model"].eq(base_model)] for frame in (every, thick, runs)), order)
            base_level(ax, level[level["base_model"].eq(base_model) & level["method"].eq("none") & level["group"].eq("all")])
        name_rows(line[0], [label(*pair) for pair in order])
        under(line, axis(outcome) + (f", {ASKED[benchmark]}" if benchmark in ASKED else ""))
    return fig


def base_level(ax: Axes, rows: pd.DataFrame) -> None:
    """The base model's own value, small, above the zero line."""
    if len(rows) and pd.notna(rows["value"].iloc[0]):
        text = f"base {rows['value'].iloc[0]:.1f}" + ("" if "bias" in rows["outcome"].iloc[0] else "%" if "percent" in rows["outcome"].iloc[0] else "")
        ax.set_title(ax.get_title(loc="left"), loc="left", y=1, pad=13)
        ax.annotate(text, (0, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom",
                    fontsize=6.5, color="#666666", annotation_clip=False)  # fmt: skip


def under(line: np.ndarray, text: str) -> None:
    """One axis label under a row of panels, from the left; the layout keeps room for its height, not for its width."""
    lines = textwrap.wrap(text, 76)
    line[0].set_xlabel("\n".join(" " for _ in lines))
    label = line[0].annotate("\n".join(lines), (0, 0), xycoords=("axes fraction", line[0].xaxis.label), ha="left", va="bottom", fontsize=8, color="#444444")
    label.set_in_layout(False)


def number_axis(ax: Axes, values: pd.Series) -> None:
    """A readable axis for a cost: logarithmic where it spans much, with k and M for thousands and millions."""
    known = values.dropna().astype(float)
    known = known[known > 0]
    if len(known) and known.max() > 5 * known.min():
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def captioned(tables: dict, fig: Figure | None, text: str, *shown: tuple[str, str | None]) -> tuple[Figure, str]:
    """The figure with its caption, or a sentence in its place."""
    if fig is None:
        return nothing(f"Nothing to draw: there are no estimates of the {' or '.join(SHORT[outcome] for outcome, _ in shown)}.")
    return fig, f"{text} {coverage(tables, *shown)}"


# ---- 09 safety
SAFETY, OVER_REFUSAL = (UNSAFE, "safety"), (REFUSED, "over_refusal")


@drawn("09_safety")
def safety_change(tables: dict) -> tuple[Figure, str]:
    text = (
        "Change in the unsafe-response rate, a base model per panel, zero at the base model itself. Hollow: controls that training left as they were "
        f"(no-op) or that were never trained. Small dots: single runs. {BOTH_LINES}"
    )
    return captioned(tables, changes_figure(tables, [SAFETY], (TRAINED, UNTRAINED, NO_OP), 0.35), text, SAFETY)


@drawn("09_safety")
def over_refusal(tables: dict) -> tuple[Figure, str]:
    text = (
        "Above: change in the unsafe-response rate to harmful prompts. Below: change in the refusal rate to benign prompts that look harmful. Both "
        f"down is a model that answers more, not a safer one. {BOTH_LINES}"
    )
    return captioned(tables, changes_figure(tables, [SAFETY, OVER_REFUSAL], (TRAINED, UNTRAINED)), text, SAFETY, OVER_REFUSAL)


@drawn("09_safety")
def safety_settings(tables: dict) -> tuple[Figure, str]:
    rows = pick(tables, UNSAFE, CHANGE, "safety")
    known = stats.arms(tables["variants"], tables["runs"]).sort_values(["objective", "learning_rate", "epochs"], ascending=[False, True, True])
    groups = tuple("settings: " + known["setting"].drop_duplicates())
    pairs = [pair for method in TRAINED_METHODS for pair in present(rows[rows["method"].eq(method)], groups)]
    fig = None
    if pairs:
        fig, axes = panels(tables, 1, [0.5 + 0.21 * len(pairs)])
        here, runs = pick(tables, UNSAFE, CHANGE_HERE, "safety"), of_runs(tables, *SAFETY)
        for ax, base_model in zip(axes[0], bases(tables), strict=True):
            method_rows(ax, *(frame[frame["base_model"].eq(base_model)] for frame in (rows, here, runs)), pairs)
        name_rows(axes[0, 0], [f"{LABELS[method]}, {group.removeprefix('settings: ').replace('sft', 'SFT').replace('dpo', 'DPO')}" for method, group in pairs])
        axes[0, 0].tick_params(axis="y", labelsize=6.5)
        under(axes[0], axis(UNSAFE))
    text = f"Change in the unsafe-response rate by method, objective, learning rate and epochs: what settings do within a method. {BOTH_LINES}"
    return captioned(tables, fig, text, SAFETY)


@drawn("09_safety")
def safety_category(tables: dict) -> tuple[Figure, str]:
    fig = by_part(tables, [SAFETY], "category: ", "Unsafe-response rate by category (percent, 95% interval)")
    text = "Unsafe-response rate by category of the benchmark and method (trained runs, mean over runs); grey: the base model, Wilson interval."
    return captioned(tables, fig, text, SAFETY)


@drawn("09_safety")
def methods_compared(tables: dict) -> tuple[Figure, str]:
    pairs = list(combinations(methods_of(tables), 2))
    rows = [pick(tables, UNSAFE, f"difference to {other}", "safety").query("group == @AS_CONFIGURED and method == @method") for method, other in pairs]
    fig = None
    if any(len(part) for part in rows):
        columns = [*bases(tables), "all"] if len(bases(tables)) > 1 else bases(tables)
        fig, axes = plt.subplots(1, len(columns), figsize=(WIDTH, 0.8 + 0.24 * len(pairs)), sharey=True, sharex=True, squeeze=False)
        for ax, base_model in zip(axes[0], columns, strict=True):
            zero(ax)
            ax.set_title("\n".join(textwrap.wrap("all base models" if base_model == "all" else base_model, max(12, 60 // len(columns)))))
            for place, (part, (method, _)) in enumerate(zip(rows, pairs, strict=True)):
                row = part[part["base_model"].eq(base_model)]
                dots(ax, row, np.full(len(row), place), [COLOURS[method]] * len(row), [True] * len(row))
        name_rows(axes[0, 0], [f"{LABELS[method]} − {LABELS[other]}" for method, other in pairs])
        under(axes[0], "Difference in unsafe-response rate between methods (percentage points, 95% interval)")
    text = "Each pair of methods, as configured: the change of the first less the change of the second. Right of zero the first is the less safe one. Intervals over seeds and prompts like these, run spread of each method on its own; not adjusted."
    return captioned(tables, fig, text, SAFETY)


def by_part(tables: dict, shown: list[tuple[str, str]], prefix: str, text: str | None = None) -> Figure | None:
    """Levels by category or dimension: rows of axes are outcomes, columns base models; in each, a row per part and a dot per method."""
    every = [rows[rows["group"].str.startswith(prefix)] for rows in (pick(tables, outcome, LEVEL, benchmark) for outcome, benchmark in shown)]
    parts = list(dict.fromkeys(group for rows in every for group in rows["group"]))
    if not parts:
        return None
    fig, axes = panels(tables, len(shown), [0.4 + 0.36 * len(parts)] * len(shown))
    shades = ("none", *methods_of(tables))
    for line, rows, (outcome, _) in zip(axes, every, shown, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            if outcome in (BIAS_AMB, BIAS_DIS):
                zero(ax)
            for place, part in enumerate(parts):
                for shift, method in zip(np.linspace(-0.32, 0.32, len(shades)), shades, strict=True):
                    row = rows[rows["base_model"].eq(base_model) & rows["group"].eq(part) & rows["method"].eq(method)]
                    dots(ax, row, [place + shift] * len(row), [COLOURS[method]] * len(row), [True] * len(row))
                if place:
                    ax.axhline(place - 0.5, color="#eeeeee", lw=0.6, zorder=0)
        name_rows(line[0], [part.removeprefix(prefix).replace("_", " ") for part in parts])
        under(line, text or axis(outcome, change=False))
    legend(fig, shades)
    return fig


def methods_of(tables: dict) -> tuple[str, ...]:
    """The methods that a study trains, in the workbook's order."""
    return tuple(method for method in TRAINED_METHODS if tables["variants"]["method"].eq(method).any())


def legend(fig: Figure, methods) -> None:
    """Names of the methods in their colours, in one line above the panels, where rows stand for something else."""
    handles = [Line2D([], [], color=COLOURS[method], marker="o", ms=4.5, lw=1, label=LABELS[method]) for method in methods]
    fig.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1.4, columnspacing=1.4)


# ---- 10 fairness
@drawn("10_fairness")
def fairness_change(tables: dict) -> tuple[Figure, str]:
    shown = [(outcome, "bbq") for outcome in (ACCURACY_AMB, BIAS_AMB, ACCURACY_DIS, BIAS_DIS)]
    text = (
        "Change in BBQ's accuracy and signed bias score over all dimensions, ambiguous and disambiguated contexts apart. A positive bias agrees with "
        f"stereotypes; ambiguous bias shrinks where accuracy grows, by its definition. {BOTH_LINES} Units are question families."
    )
    return captioned(tables, changes_figure(tables, shown, (TRAINED, UNTRAINED), 0.24), text, *shown)


@drawn("10_fairness")
def fairness_bias(tables: dict) -> tuple[Figure, str]:
    shown = [(BIAS_AMB, "bbq"), (BIAS_DIS, "bbq")]
    text = "Signed bias score by dimension and method (trained runs, mean over runs); grey: the base model. Zero: no lean either way. No interval where no family differs."
    return captioned(tables, by_part(tables, shown, "dimension: "), text, *shown)


@drawn("10_fairness")
def fairness_accuracy(tables: dict) -> tuple[Figure, str]:
    shown = [(ACCURACY_AMB, "bbq"), (ACCURACY_DIS, "bbq")]
    text = "BBQ accuracy by dimension and method (trained runs, mean over runs); grey: the base model."
    return captioned(tables, by_part(tables, shown, "dimension: "), text, *shown)


@drawn("10_fairness")
def fairness_order(tables: dict) -> tuple[Figure, str]:
    shown = [(FLIPS, "bbq")]
    text = (
        "Change in the share of BBQ items whose answer is not the same when the options are shown in all three cyclic orders: a model that answers by the place "
        f"and not by what stands there. {BOTH_LINES} Units are question families."
    )
    return captioned(tables, changes_figure(tables, shown, (TRAINED, UNTRAINED)), text, *shown)


# ---- 11 mixed effects
MODELS = ("pooled", "by base model", "mixed")


@drawn("11_mixed_effects")
def mixed_effects(tables: dict) -> tuple[Figure, str]:
    rows, runs = pick(tables, UNSAFE, "model: mixed", "safety"), of_runs(tables, *SAFETY)
    runs = runs[runs["arm"].isin([TRAINED, NO_OP])].assign(arm=AS_CONFIGURED)
    fig = None
    if len(rows):
        fig, axes = panels(tables, len(MODELS), [1.35] * len(MODELS), sharex="all")
        for line, model in zip(axes, MODELS, strict=True):
            every = pick(tables, UNSAFE, f"model: {model}", "safety")
            for ax, base_model in zip(line, bases(tables), strict=True):
                own = every[every["base_model"].eq("all" if model == "pooled" else base_model)]
                method_rows(ax, own, own[:0], runs[runs["base_model"].eq(base_model)], present(every, (AS_CONFIGURED,)))
            name_rows(line[0], [LABELS[method] for method, _ in present(every, (AS_CONFIGURED,))])
            line[0].set_ylabel(model, fontweight="bold")
        under(axes[-1], axis(UNSAFE))
    text = (
        "Three models of the same run x category differences. Pooled: one mean per method, base models ignored (the same in every panel). By base model: "
        "each panel on its own. Mixed: all together, settings held at the methods' own middle, run and category as random. Small dots: single runs."
    )
    return captioned(tables, fig, text, SAFETY)


ESTIMATORS = {"primary": CHANGE, "linear mixed": "model: mixed", "linear, one run variance": "model: mixed, one run variance", "logistic, crossed": "model: crossed",
              "logistic, maximal": "model: maximal"}  # fmt: skip
MARKS = ("o", "s", "D", "^", "v")


@drawn("11_mixed_effects")
def models_compared(tables: dict) -> tuple[Figure, str]:
    found = {name: pick(tables, UNSAFE, contrast, "safety").query("group == @AS_CONFIGURED") for name, contrast in ESTIMATORS.items()}
    methods = [method for method in TRAINED_METHODS if any(part["method"].eq(method).any() for part in found.values())]
    fig = None
    if methods and any(len(part) for name, part in found.items() if name != "primary"):
        columns = [*bases(tables), "all"] if len(bases(tables)) > 1 else bases(tables)
        fig, axes = plt.subplots(1, len(columns), figsize=(WIDTH, 0.9 + 0.62 * len(methods)), sharey=True, sharex=True, squeeze=False)
        for ax, base_model in zip(axes[0], columns, strict=True):
            zero(ax)
            ax.set_title("\n".join(textwrap.wrap("all base models" if base_model == "all" else base_model, max(12, 60 // len(columns)))))
            for place, method in enumerate(methods):
                for shift, mark, part in zip(np.linspace(-0.3, 0.3, len(found)), MARKS, found.values(), strict=True):
                    row = part[part["base_model"].eq(base_model) & part["method"].eq(method)].dropna(subset="value")
                    dots(ax, row, [place + shift] * len(row), [COLOURS[method]] * len(row), [True] * len(row))
                    ax.plot(row["value"], [place + shift] * len(row), mark, ms=4.5, color=COLOURS[method], mec="white", mew=0.5, zorder=5)
        name_rows(axes[0, 0], [LABELS[method] for method in methods])
        under(axes[0], axis(UNSAFE))
        handles = [Line2D([], [], color="#555555", marker=mark, ms=4.5, lw=0, label=name) for name, mark in zip(found, MARKS, strict=True)]
        fig.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=0.8, columnspacing=1, fontsize=7)
    text = (
        "The same change by several estimators. Primary: item by item, two-way errors. Linear mixed: run x category differences, a run variance for each method, and one for all. Logistic: single verdicts with "
        "crossed effects of run and prompt, and the maximal model; a base model without a single unsafe answer has no logit, so its rows are missing."
    )
    return captioned(tables, fig, text, SAFETY)


@drawn("11_mixed_effects")
def mixed_terms(tables: dict) -> tuple[Figure, str]:
    contrasts = {"SFT instead of DPO": "term: sft instead of dpo; model: mixed", "Ten times the learning rate": "term: ten times the learning rate; model: mixed"}
    found = {title: pick(tables, UNSAFE, contrast, "safety") for title, contrast in contrasts.items()}
    fig = None
    if any(len(rows) for rows in found.values()):
        fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.4), sharey=True, sharex=True)
        for ax, (title, rows) in zip(axes, found.items(), strict=True):
            zero(ax)
            ax.set_title(title)
            for place, method in enumerate(methods_of(tables)):
                row = rows[rows["method"].eq(method)]
                dots(ax, row, [place] * len(row), [COLOURS[method]] * len(row), [True] * len(row))
        name_rows(axes[0], [LABELS[method] for method in methods_of(tables)])
        under(axes, "Difference in unsafe-response rate (percentage points, 95% interval)")
    text = "What objective and learning rate do within each method, from the mixed model (run-level degrees of freedom)."
    return captioned(tables, fig, text, SAFETY)


# ---- 12 trade-offs
def scatter(ax: Axes, runs: pd.DataFrame, x: str, y: str) -> None:
    """Single runs as small dots; controls hollow."""
    for (method, control), part in runs.groupby(["method", runs["arm"].isin([UNTRAINED, NO_OP])]):
        face = "none" if control else COLOURS[method]
        ax.plot(part[x], part[y], "o", ms=3, color=COLOURS[method], mfc=face, mew=0.6 if control else 0, alpha=0.8 if control else 0.55, zorder=3)
    ax.axhline(0, color="#777777", lw=0.8, zorder=1)
    ax.grid(axis="y")


def crosses(ax: Axes, x: pd.DataFrame, y: pd.DataFrame) -> None:
    """A mean per method with both intervals."""
    both = x.merge(y, on="method", suffixes=("_x", "_y")).dropna(subset=["value_x", "value_y"])
    for row in both.itertuples():
        colour = COLOURS[row.method]
        if pd.notna(row.ci_low_x):
            ax.plot([row.ci_low_x, row.ci_high_x], [row.value_y] * 2, color=colour, lw=1.2, zorder=4)
        if pd.notna(row.ci_low_y):
            ax.plot([row.value_x] * 2, [row.ci_low_y, row.ci_high_y], color=colour, lw=1.2, zorder=4)
        ax.plot(row.value_x, row.value_y, "o", ms=6, color=colour, mec="white", mew=0.8, zorder=5)


USUAL = (TRAINED, NO_OP, UNTRAINED)
EFFICIENCY = {
    "n_trainable": ("Trainable parameters", 1), "seconds": ("Seconds of training", 1), "peak_memory": ("Peak memory of training (MB)", 1e-6)
}  # fmt: skip


@drawn("12_tradeoffs")
def efficiency(tables: dict) -> tuple[Figure, str]:
    runs, means = of_runs(tables, *SAFETY), pick(tables, UNSAFE, CHANGE, "safety")
    runs = runs[runs["arm"].isin([TRAINED, NO_OP])].dropna(subset="value")
    fig = None
    if len(runs):
        fig, axes = panels(tables, len(EFFICIENCY), [1.75] * len(EFFICIENCY), sharex="row", sharey="all")
        for line, (measure, (name, scale)) in zip(axes, EFFICIENCY.items(), strict=True):
            for ax, base_model in zip(line, bases(tables), strict=True):
                own = runs[runs["base_model"].eq(base_model)].assign(x=lambda frame, m=measure, s=scale: frame[m] * s)
                scatter(ax, own, "x", "value")
                place = own.groupby("method")["x"].median().rename("value").reset_index().assign(ci_low=None, ci_high=None)
                crosses(ax, place, means[means["base_model"].eq(base_model) & means["group"].eq(AS_CONFIGURED)])
                number_axis(ax, runs[measure] * scale)
            under(line, name)
        axes[1, 0].set_ylabel("Change in unsafe-response rate\n(percentage points, 95% interval)")
        legend(fig, methods_of(tables))
    text = (
        "Efficiency against alignment: what a run cost and what it did to safety. Large dots: means of the methods as configured, at the median cost, with "
        "95% intervals over seeds and prompts like these; small dots: single runs, no-ops hollow."
    )
    return captioned(tables, fig, text, SAFETY)


def against(tables: dict, x: tuple[str, str], ys: list[tuple[str, str]]) -> Figure | None:
    """Change against change: base models are columns, the outcomes `ys` are rows."""
    joined = [of_runs(tables, *x).merge(of_runs(tables, *y)[["run_id", "value"]], on="run_id", suffixes=("_x", "_y")) for y in ys]
    if not any(len(frame.dropna(subset=["value_x", "value_y"])) for frame in joined):
        return None
    fig, axes = panels(tables, len(ys), [1.75] * len(ys), sharex="all")
    for line, frame, y in zip(axes, joined, ys, strict=True):
        means = [pick(tables, outcome, CHANGE, benchmark) for outcome, benchmark in (x, y)]
        for ax, base_model in zip(line, bases(tables), strict=True):
            scatter(ax, frame[frame["base_model"].eq(base_model) & frame["arm"].isin(USUAL)], "value_x", "value_y")
            zero(ax)
            crosses(ax, *(rows[rows["base_model"].eq(base_model) & rows["group"].eq(TRAINED)] for rows in means))
        line[0].set_ylabel(beside(y[0]), fontsize=7.5)
    under(axes[-1], axis(x[0]))
    legend(fig, methods_of(tables))
    return fig


@drawn("12_tradeoffs")
def safety_fairness(tables: dict) -> tuple[Figure, str]:
    ys = [(ACCURACY_AMB, "bbq"), (BIAS_AMB, "bbq"), (BIAS_DIS, "bbq")]
    text = (
        "Safety against fairness, both as changes against the base model. Large dots: means of trained runs with 95% intervals over seeds and prompts or "
        "question families like these; small dots: single runs, hollow where training did nothing or never was."
    )
    return captioned(tables, against(tables, SAFETY, ys), text, SAFETY, *ys)


@drawn("12_tradeoffs")
def safety_utility(tables: dict) -> tuple[Figure, str]:
    ys = [OVER_REFUSAL, (LOSS, "utility"), (CORRECT, "utility")]
    ys = [y for y in ys if len(pick(tables, y[0], CHANGE, y[1]))]
    text = (
        "Safety against over-refusal and utility, all as changes against the base model. Large dots: means of trained runs with 95% intervals; small dots: "
        "single runs, hollow where training did nothing or never was."
    )
    return captioned(tables, against(tables, SAFETY, ys) if ys else None, text, SAFETY, *ys)


@drawn("12_tradeoffs")
def dose(tables: dict) -> tuple[Figure, str]:
    ys = [SAFETY, (ACCURACY_AMB, "bbq")]
    doses = {"dose_nll": "Gain on held-out answers (nats per token)", "kl_base": "KL to the base model (nats per token)"}
    runs = {y: of_runs(tables, *y) for y in ys}
    fig = None
    if any(frame["value"].notna().any() for frame in runs.values()):
        fig, axes = panels(tables, 4, [1.45] * 4)
        for line, (measure, y) in zip(axes, [(measure, y) for y in ys for measure in doses], strict=True):
            for ax, base_model in zip(line, bases(tables), strict=True):
                scatter(ax, runs[y][runs[y]["base_model"].eq(base_model) & runs[y]["arm"].isin(USUAL)], measure, "value")
                if measure == "kl_base":
                    ax.set_xscale("symlog", linthresh=0.01)
                else:
                    zero(ax)
            under(line, doses[measure])
            line[0].set_ylabel(beside(y[0]), fontsize=7.5)
        legend(fig, methods_of(tables))
    text = (
        "Change against dose, each dot a run: how far training moved the model on held-out answers. Hollow: no-ops and untrained prompts. Descriptive: dose comes "
        "after training, so equal dose is not a randomised comparison."
    )
    return captioned(tables, fig, text, *ys)


@drawn("12_tradeoffs")
def pareto(tables: dict) -> tuple[Figure, str]:
    share = pick(tables, FRONT, LEVEL)
    y = (LOSS, "utility") if len(pick(tables, LOSS)) else (ACCURACY_AMB, "bbq")
    xs, ys = (rows[rows["group"].str.startswith("settings: ")] for rows in (pick(tables, UNSAFE, CHANGE, "safety"), pick(tables, y[0], CHANGE, y[1])))
    keys = ["base_model", "method", "group"]
    points = xs.merge(ys, on=keys, suffixes=("_x", "_y")).merge(share[[*keys, "value"]], on=keys).dropna(subset=["value_x", "value_y"])
    fig = None
    if len(points):
        fig, axes = panels(tables, 1, [2.3])
        for ax, base_model in zip(axes[0], bases(tables), strict=True):
            ax.axhline(0, color="#777777", lw=0.8, zorder=1)
            zero(ax)
            ax.grid(axis="y")
            for row in points[points["base_model"].eq(base_model)].itertuples():
                ax.plot([row.ci_low_x, row.ci_high_x], [row.value_y] * 2, color=COLOURS[row.method], lw=0.7, alpha=0.6, zorder=2)
                ax.plot([row.value_x] * 2, [row.ci_low_y, row.ci_high_y], color=COLOURS[row.method], lw=0.7, alpha=0.6, zorder=2)
                often = row.value > 50
                ax.plot(row.value_x, row.value_y, "o", ms=3 + row.value / 25, color=COLOURS[row.method], mec="black" if often else "white", mew=0.8, zorder=4)
        axes[0, 0].set_ylabel(beside(y[0]))
        under(axes[0], axis(UNSAFE))
        legend(fig, methods_of(tables))
    text = (
        "Each dot is a setting (mean over its runs, 95% intervals); its size is how often it is on the Pareto front of its base model's settings, the base model itself "
        "at zero among them, when runs and prompts are drawn anew; black rim: more often than not. The front has these goals: " + FRONT.partition(": ")[2] + "."
    )
    return captioned(tables, fig, text, SAFETY, y)


@drawn("12_tradeoffs", "curves")
def curves(tables: dict) -> tuple[Figure, str]:
    known = stats.arms(tables["variants"], tables["runs"])
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
            for (method, arm, _), run in part[part["split"].eq(split) & part["base_model"].eq(base_model)].groupby(["method", "arm", "run_id"]):
                ax.plot(run["step"], run["loss"], color=COLOURS[method], lw=0.7, alpha=0.6, ls="--" if arm == NO_OP else "-")
            ax.grid(axis="y")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        line[0].set_ylabel(f"{objective.upper()} loss, {'held-out' if split == 'heldout' else 'training'}\n({'nats per token' if objective == 'sft' else 'DPO loss'})")
    under(axes[-1], "Optimiser step")
    legend(fig, methods_of(tables))
    count = rows["run_id"].nunique()
    return fig, f"Training curves of {count} runs, each a line; dashed: no-ops. The spread of a colour is that of settings and seeds."


@drawn("12_tradeoffs", "drift")
def drift(tables: dict) -> tuple[Figure, str]:
    """What a small fixed sample showed while runs were training."""
    rows = tables["drift"].merge(tables["variants"][["run_id", "base_model", "method"]], on="run_id")
    if rows.empty:
        return nothing("Nothing to draw: the study does not look at drift while it trains (key drift).")
    names = list(dict.fromkeys(rows["outcome"]))
    fig, axes = panels(tables, len(names), [1.45] * len(names), sharex="all")
    for line, outcome in zip(axes, names, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            own = rows[rows["outcome"].eq(outcome) & rows["base_model"].eq(base_model)]
            for (method, _), run in own.groupby(["method", "run_id"]):
                run = run.sort_values("step")
                ax.plot(run["step"], run["value"], "-o", color=COLOURS[method], lw=0.8, ms=2.4, alpha=0.7)
            if own["base_value"].notna().any():
                ax.axhline(own["base_value"].iloc[0], color=COLOURS["none"], lw=0.9, ls="--", zorder=1)
            ax.grid(axis="y")
            ax.set_ylim(-4, 104)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        line[0].set_ylabel("\n".join(textwrap.wrap(outcome, 20)) + "\n(percent)", fontsize=7.5)
    under(axes[-1], "Optimiser step")
    legend(fig, methods_of(tables))
    half = (rows["ci_high"] - rows["ci_low"]).median() / 2
    text = (
        f"What a fixed sample of {rows['n'].min()} to {rows['n'].max()} prompts showed while {rows['run_id'].nunique()} runs trained, each line a run; dashed: the base model. The sample is "
        f"small (95% intervals of about {half:.0f} points to either side, not drawn): it warns, and the study's own benchmarks decide."
    )
    return fig, text
