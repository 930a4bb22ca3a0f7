"""Figures of notebook 14: repairs, their controls and the frontier; what alignment changed, and
what the cosine measures.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import stdtrit

from driftbook.analyses import repairs
from driftbook.analyses.repairs import (
    AGAINST_PARENT,
    ALL,
    DECLINED,
    GAIN,
    JUST_LESS,
    JUST_MORE,
    KEPT,
    MINUS,
    PARENT,
    REPORT,
)
from driftbook.figures.drawing import (
    SHORT,
    WIDTH,
    above,
    bases,
    dots,
    drawn,
    floats,
    handle,
    name_rows,
    nothing,
    panels,
    under,
    zero,
)
from driftbook.stats.confidence import INTERVAL, PERCENT, UPPER
from driftbook.stats.terms import (
    ACCURACY_AMB,
    BIAS_AMB,
    CHANGE,
    CORRECT,
    MITIGATION,
    REFUSED,
    UNSAFE,
)
from driftbook.study.methods import CONTROLS

NAMES = {
    UNSAFE: "unsafe responses\n(points)",
    DECLINED: "refusals of harmful\n(points)",
    REFUSED: "refusals of benign\n(points)",
    GAIN: "gain of fine-tuning\n(nats per token)",
    ACCURACY_AMB: "accuracy, ambiguous\n(points)",
    BIAS_AMB: "bias, ambiguous\n(points)",
    CORRECT: "correct answers\n(points)",
}
SAFE, NULL, OTHER = "#0072B2", "#D55E00", "#009E73"
STYLES = {
    None: (SAFE, "o"),
    "same norm": ("#999999", "s"),
    "same modules zeroed": ("#555555", "X"),
    "random modules zeroed": ("#999999", "x"),
    "random subspace": ("#AA8866", "D"),
    "noise": ("#CC79A7", "^"),
}
PAIRS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#D55E00")
RESCALED = {JUST_LESS: "rescaled, just less gain", JUST_MORE: "rescaled, just more gain"}
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


def _legend(fig: Figure, handles: list[Line2D], columns: int) -> None:
    above(fig, handles, columns, fontsize=7, handletextpad=0.5)


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


@drawn("14_safe_lora", "frontier")
def frontier(tables: dict) -> tuple[Figure, str]:
    """The gain kept against unsafe answers, over-refusal and fairness, for Safe LoRA, its controls,
    rescaling and the others.
    """
    rows = tables["frontier"]
    if rows.empty or not rows["outcome"].eq(KEPT).any():
        return nothing(
            "Nothing to draw: the study repairs no runs, or its runs gained nothing to keep."
        )
    points = _points(tables)
    name, ys = (
        repairs.leading(points),
        [outcome for outcome in (UNSAFE, REFUSED, ACCURACY_AMB) if outcome in points],
    )
    fig, axes = panels(tables, len(ys), [2.1, *[1.5] * (len(ys) - 1)], sharex="all")
    for line, y in zip(axes, ys, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            own = points[points["base_model"].eq(base_model)]
            ax.axhline(
                own.loc[own["name"].eq(repairs.BASE), y].mean(),
                color="#777777",
                lw=0.9,
                ls="--",
                zorder=1,
            )
            ax.grid(axis="y")
            rescaled = own[
                own["kind"].eq("rescale")
                | (
                    own["name"].eq(PARENT)
                    & own["run_id"].isin(own["parent_run_id"][own["kind"].eq("rescale")])
                )
            ]
            curve = [
                _mean(ax, part, y, NULL, "v")
                for _, part in rescaled.fillna({"value": 1.0}).groupby("value")
            ]
            ax.plot(
                *np.array([(0.0, own.loc[own["name"].eq(repairs.BASE), y].mean()), *curve]).T,
                color=NULL,
                lw=1,
                zorder=2,
            )
            safe = own[own["name"].eq(name)]
            for control in dict.fromkeys(safe["control"].where(safe["control"].notna(), None)):
                of = safe[
                    safe["control"].isna() if control is None else safe["control"].eq(control)
                ]
                colour, mark = STYLES[control]
                line_of = [_mean(ax, part, y, colour, mark) for _, part in of.groupby("value")]
                ax.plot(
                    *np.array(line_of).T, color=colour, lw=1 if control is None else 0.6, zorder=2
                )
            others = own[
                own["control"].isna()
                & own["name"].ne(name)
                & ~own["kind"].isin(["rescale", PARENT, repairs.BASE])
                & own[KEPT].notna()
            ]
            for _, part in others.groupby(["name", "value"], dropna=False, sort=False):
                _mean(ax, part, y, OTHER, "P")
            ax.set_xlim(*EDGES)
        line[0].set_ylim(bottom=max(-4, line[0].get_ylim()[0]))
        line[0].set_ylabel("\n".join(textwrap.wrap(SHORT[y], 18)) + "\n(percent)")
    under(
        axes[-1],
        f"Gain of fine-tuning that is kept (percent of the parent's), {INTERVAL}s over seeds",
    )
    marks = [
        ("Safe LoRA", *STYLES[None]),
        ("rescaling", NULL, "v"),
        *(
            (f"control: {name}", *STYLES[name])
            for name in CONTROLS
            if points["control"].eq(name).any()
        ),
        ("other repairs", OTHER, "P"),
    ]
    handles = [
        handle(name, colour, mark, mfc="none" if mark == "o" else colour)
        for name, colour, mark in marks
    ] + [handle("base model", "#777777", "", ls="--", lw=0.9)]
    _legend(fig, handles, 4)
    n = (
        points.loc[points["control"].isna() | points["name"].eq(name), [KEPT, "run_id"]]
        .dropna()["run_id"]
        .nunique()
    )
    means = points.groupby(["base_model", "name", "value", "control"], dropna=False)[KEPT].mean()
    return fig, (
        f"{n} runs on the report half of the prompts: what is left of the gain of fine-tuning, and"
        " what became of safety, over-refusal and fairness. Small marks: seeds; large marks: means"
        f" with {PERCENT} t intervals over seeds; lines join the levels of one repair. Right is the"
        " fine-tuned parent, left the base model. A repair is worth something where it lies below"
        " the line of rescaling, which only makes the update smaller; a control at the same place"
        " says what it was that worked."
        + (
            " An arrow at the edge: the mean lies beyond it."
            if (means < EDGES[0]).any() or (means > EDGES[1]).any()
            else ""
        )
    )


def _rows(tables: dict, contrast: str, base_model: str | None = None) -> pd.DataFrame:
    rows = tables["estimates"]
    rows = rows[
        rows["notebook"].eq("14_safe_lora")
        & rows["contrast"].eq(contrast)
        & rows["group"].eq(MITIGATION)
    ]
    rows = floats(rows)
    return rows if base_model is None else rows[rows["base_model"].eq(base_model)]


def _order(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows["member"]))


@drawn("14_safe_lora")
def mitigations(tables: dict) -> tuple[Figure, str]:
    """What each repair changed against its parent, at its chosen level, over all base models."""
    rows = _rows(tables, AGAINST_PARENT, "all")
    if rows.empty:
        return nothing("Nothing to draw: no repair was done on every base model.")
    known = repairs.repairs(tables["variants"], tables["runs"])
    kinds = dict(zip(known["name"], known["kind"], strict=True))
    order, shown = _order(rows), [outcome for outcome in NAMES if rows["outcome"].eq(outcome).any()]
    fig, axes = plt.subplots(
        -(-len(shown) // 4),
        min(4, len(shown)),
        figsize=(WIDTH, 0.6 + (0.45 + 0.19 * len(order)) * -(-len(shown) // 4)),
        sharey=True,
        squeeze=False,
    )
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, outcome in zip(axes.flat, shown, strict=False):
        zero(ax)
        own = rows[rows["outcome"].eq(outcome)]
        places = [order.index(name) for name in own["member"]]
        dots(
            ax,
            own,
            places,
            [
                {"rescale": NULL, "safe_lora": SAFE}.get(kinds[order[place]], OTHER)
                for place in places
            ],
        )
        ax.set_title(NAMES[outcome], fontsize=7)
        ax.locator_params(axis="x", nbins=4)
    for line in axes:
        name_rows(line[0], [name.replace("_", " ") for name in order])
        line[0].tick_params(axis="y", labelsize=7)
    under(axes[-1], f"Change against the parent, the run that was repaired ({INTERVAL})")
    return (
        fig,
        (
            "What each repair changed against the run that it was made from, at the level chosen"
            f" on other prompts, in the mean of {len(bases(tables))} base models; lines: {PERCENT}"
            " intervals over seeds and prompts. Left is less. A repair that deletes the adapter"
            " takes back all of the gain."
        ),
    )


@drawn("14_safe_lora", "frontier")
def restored(tables: dict) -> tuple[Figure, str]:
    """Refusals of harmful prompts and unsafe responses of the base model, of the fine-tuned runs,
    and of every repair of them at every level.
    """
    rows, colours = tables["frontier"], {DECLINED: SAFE, UNSAFE: NULL}
    shown = [outcome for outcome in colours if rows["outcome"].eq(outcome).any()]
    if not shown:
        return nothing("Nothing to draw: the study repairs no runs, or asks no harmful prompts.")
    points = _points(tables)
    points = points[points["control"].isna()].assign(
        place=lambda rows: [
            (
                ""
                if name == repairs.BASE
                else objective
                if objective == dataset
                else f"{objective} on {dataset}"
            )
            for name, objective, dataset in zip(
                rows["name"], rows["objective"], rows["dataset"], strict=True
            )
        ],
        label=lambda rows: (
            rows["name"]
            .str.replace("_", " ")
            .str.cat(rows["value"].map(lambda value: "" if np.isnan(value) else f" {value:g}"))
        ),
    )
    first = {repairs.BASE: 0, PARENT: 1}
    order = (
        points[["place", "label", "name"]]
        .drop_duplicates(["place", "label"])
        .assign(rank=lambda rows: rows["name"].map(first).fillna(2))
        .sort_values(["place", "rank"], kind="stable")
    )
    places = {
        key: place for place, key in enumerate(zip(order["place"], order["label"], strict=True))
    }
    fig, axes = panels(tables, 1, [0.3 + 0.19 * len(places)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        for (where, label), part in points[points["base_model"].eq(base_model)].groupby(
            ["place", "label"], sort=False
        ):
            for outcome, shift in zip(shown, (-0.16, 0.16), strict=False):
                values, at = part[outcome].dropna().to_numpy(), places[where, label] + shift
                if len(values):
                    mean, half, colour = values.mean(), _half(values), colours[outcome]
                    ax.plot(
                        values,
                        np.full(len(values), at),
                        "o",
                        ms=1.6,
                        color=colour,
                        alpha=0.3,
                        mew=0,
                        zorder=2,
                    )
                    ax.plot(
                        np.clip([mean - half, mean + half], 0, 100),
                        [at, at],
                        color=colour,
                        lw=1,
                        zorder=3,
                    )
                    ax.plot(mean, at, "o", ms=3.5, color=colour, zorder=4)
        for place in (place for place, rank in enumerate(order["rank"]) if rank == 1):
            ax.axhline(place - 0.5, color="#cccccc", lw=0.7, zorder=1)
        ax.set(xlim=(-4, 104), xticks=[0, 50, 100])
    name_rows(
        axes[0, 0],
        [
            f"fine-tuned by {where}" if name == PARENT else label
            for where, label, name in zip(
                order["place"], order["label"], order["name"], strict=True
            )
        ],
    )
    axes[0, 0].tick_params(axis="y", labelsize=7)
    under(axes[0], f"Percent of the harmful prompts of the report half, {INTERVAL} over seeds")
    _legend(
        fig,
        [
            handle(
                {DECLINED: "refusals", UNSAFE: "unsafe responses"}[outcome], colours[outcome], ms=4
            )
            for outcome in shown
        ],
        2,
    )
    return (
        fig,
        (
            "What fine-tuning did to refusals and to unsafe responses in each family, and what"
            " every repair of it at every level brought back: below each fine-tuning its own"
            " repairs. Small dots: seeds; large ones: means. How much of the gain is left stands in"
            " the frontier: a repair that deletes the adapter is the base model again."
        ),
    )


@drawn("14_safe_lora")
def controls(tables: dict) -> tuple[Figure, str]:
    """Safe LoRA minus each of its controls, by base model and over all."""
    rows = tables["estimates"]
    rows = rows[
        rows["notebook"].eq("14_safe_lora")
        & rows["outcome"].isin([UNSAFE, GAIN])
        & rows["contrast"].isin([MINUS, *RESCALED])
    ]
    rows = rows.assign(against=rows["against"].where(rows["contrast"].eq(MINUS), rows["contrast"]))
    kinds = repairs.repairs(tables["variants"], tables["runs"])
    own = kinds["kind"].eq("safe_lora") & kinds["control"].notna()
    controlled = list(dict.fromkeys(kinds.loc[own, "name"]))
    rows = floats(rows[rows["group"].eq(MITIGATION) & rows["member"].isin(controlled)])
    if rows.empty:
        return nothing("Nothing to draw: no repair has controls.")
    every = list(dict.fromkeys(zip(rows["member"], rows["against"], strict=True)))
    columns = [*bases(tables), "all"]
    shown = [outcome for outcome in (UNSAFE, GAIN) if rows["outcome"].eq(outcome).any()]
    fig, axes = plt.subplots(
        len(shown),
        len(columns),
        figsize=(WIDTH, 0.9 + 0.19 * len(every) * len(shown) + 0.5 * len(shown)),
        sharey="row",
        sharex="row",
        squeeze=False,
    )
    for number, (line, outcome) in enumerate(zip(axes, shown, strict=True)):
        lines = [
            one for one in every if outcome == UNSAFE or one[1] not in RESCALED
        ]  # which are chosen by their gain
        for ax, base_model in zip(line, columns, strict=True):
            zero(ax)
            own = rows[rows["outcome"].eq(outcome) & rows["base_model"].eq(base_model)]
            places = [lines.index(one) for one in zip(own["member"], own["against"], strict=True)]
            dots(
                ax,
                own,
                places,
                [SAFE if name == controlled[0] else OTHER for name in own["member"]],
                own["p_adjusted"].lt(0.05).tolist(),
            )
            if number == 0:
                ax.set_title("all" if base_model == "all" else base_model, fontsize=7.5)
            ax.locator_params(axis="x", nbins=4)
        name_rows(
            line[0],
            [
                f"{name.replace('_', ' ')} − {RESCALED.get(contrast, contrast)}"
                for name, contrast in lines
            ],
        )
        line[0].tick_params(axis="y", labelsize=6.5)
        what = "unsafe responses (percentage points"
        what = what if outcome == UNSAFE else "gain of fine-tuning (nats per token"
        under(line, f"Difference in {what}, {INTERVAL})")
    return (
        fig,
        (
            "Safe LoRA and its rank-k form minus their controls, the same seed's run of each, at"
            " the level chosen on other prompts: unsafe responses (less is better) and gain (more"
            " is better). Filled: the difference is not chance after Holm's adjustment within its"
            " family. A row at zero: the control does the same, so what it dropped was not what"
            " worked. Only a repair with fewer unsafe responses than the rescaled run that keeps"
            " just less of the gain does what a smaller update cannot."
        ),
    )


@drawn("14_safe_lora")
def fairness_dimensions(tables: dict) -> tuple[Figure, str]:
    """BBQ by dimension: what fine-tuning changed against the base model, and what of it is left
    after the repair.
    """
    rows = tables["estimates"]
    rows = rows[
        rows["notebook"].eq("14_safe_lora")
        & rows["group"].eq(repairs.BY_DIMENSION)
        & rows["base_model"].eq("all")
        & rows["contrast"].eq(CHANGE)
    ]
    if rows.empty:
        return nothing("Nothing to draw: no repair was scored on BBQ on every base model.")
    known = repairs.repairs(tables["variants"], tables["runs"])
    styles = {
        PARENT: ("fine-tuned", "#777777"),
        repairs.leading(known): ("after Safe LoRA", SAFE),
        repairs.leading(known, "rescale"): ("after rescaling", NULL),
    }
    rows = floats(rows).assign(name=rows["member"], dimension=rows["category"])
    order, names = (
        sorted(rows["dimension"].unique()),
        [name for name in styles if rows["name"].eq(name).any()],
    )
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 1 + 0.4 * len(order)), sharey=True)
    for ax, outcome in zip(axes, (ACCURACY_AMB, BIAS_AMB), strict=True):
        zero(ax)
        for place, name in enumerate(names):
            own = rows[rows["outcome"].eq(outcome) & rows["name"].eq(name)]
            at = np.array([order.index(dimension) for dimension in own["dimension"]]) + 0.22 * (
                place - (len(names) - 1) / 2
            )
            dots(ax, own, at, styles[name][1], name != PARENT)
        ax.set_title(SHORT[outcome].capitalize())
    name_rows(axes[0], [dimension.replace("_", " ") for dimension in order])
    under(
        axes,
        f"Change against the base model (percentage points; bias score: points of -100 to 100),"
        f" {INTERVAL}",
    )
    _legend(
        fig,
        [
            handle(
                styles[name][0], styles[name][1], mfc="white" if name == PARENT else styles[name][1]
            )
            for name in names
        ],
        3,
    )
    return (
        fig,
        (
            f"BBQ by dimension ({len(order)} of them), in the mean of the base models: what"
            " fine-tuning changed, and what is left of it after Safe LoRA and after rescaling,"
            " each at its chosen level. BBQ took no part in that choice."
        ),
    )


@drawn("14_safe_lora", "spectra")
def spectra(tables: dict) -> tuple[Figure, str]:
    """Singular values of what separates two checkpoints, against those of a random matrix of the
    same norm.
    """
    rows = tables["spectra"]
    if rows.empty:
        return nothing("Nothing to draw: the study has no pairs of checkpoints.")
    pairs, kinds = (
        list(dict.fromkeys(rows["pair"])),
        list(dict.fromkeys(rows["module"].str.rpartition(".")[2])),
    )
    fig, axes = panels(tables, len(kinds), [1.5] * len(kinds))
    for line, kind in zip(axes, kinds, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            own = rows[rows["base_model"].eq(base_model) & rows["module"].str.endswith(f".{kind}")]
            for (pair, _), part in own.groupby(["pair", "module"], sort=False):
                part = part.sort_values("index")
                ax.plot(
                    part["index"],
                    part["singular_value"] ** 2 / part["norm_v"] ** 2,
                    color=PAIRS[pairs.index(pair) % len(PAIRS)],
                    lw=0.9,
                    alpha=0.8,
                )
            if len(own):
                out, columns, n = (
                    *own[["out_features", "in_features"]].iloc[0].astype(int),
                    int(own["index"].max()),
                )
                ax.plot(
                    np.arange(1, n + 1),
                    _random_spectrum(out, columns, n),
                    color="black",
                    lw=0.9,
                    ls=":",
                )
            ax.set_yscale("log")
            ax.set_xscale("log")
            ax.grid(axis="y")
        line[0].set_ylabel(f"{kind}\nshare of ||V||²")
    under(axes[-1], "Number of the singular value, from the largest")
    handles = [
        Line2D([], [], color=PAIRS[i % len(PAIRS)], lw=1.2, label=f"pair: {pair}")
        for i, pair in enumerate(pairs)
    ] + [handle("random matrix of the same norm", "black", "", ls=":")]
    _legend(fig, handles, 4)
    return (
        fig,
        (
            "How the squared norm of V, the difference of two checkpoints, is spread over its"
            " singular values, a line per module; dotted: a random matrix of the same size"
            " (Marchenko and Pastur). A line that falls faster than the dotted one has directions"
            " of its own. Where the placebo pair, made with benign data only, falls alike, a steep"
            " fall says nothing of safety."
        ),
    )


def _random_spectrum(out: int, columns: int, n: int) -> np.ndarray:
    """The shares of the squared norm that the n largest singular values of a Gaussian matrix have:
    quantiles of Marchenko and Pastur's law (1967).
    """
    small, large = sorted((out, columns))
    ratio = small / large
    x = np.linspace((1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2, 4001)[1:-1]
    mass = np.sqrt((x[-1] - x + 1e-12) * (x - x[0] + 1e-12)) / x
    share = np.cumsum(mass) / mass.sum()
    return np.interp(1 - (np.arange(n) + 0.5) / small, share, x) / small


@drawn("14_safe_lora", "modules")
def cosine(tables: dict) -> tuple[Figure, str]:
    """The cosine and the energy of each module's update against what chance gives."""
    known = repairs.repairs(tables["variants"], tables["runs"])
    rows = (
        tables["modules"]
        .merge(known[known["kind"].eq("safe_lora") & known["control"].isna()], on="run_id")
        .drop_duplicates(["parent_run_id", "module", "name"])
    )
    if rows.empty:
        return nothing("Nothing to draw: no run was repaired by Safe LoRA.")
    names = list(dict.fromkeys(rows["name"]))
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    for ax, (value, null, title) in zip(
        axes,
        (
            ("cosine", "cosine_null", "cos(dW, C dW)"),
            ("energy", "energy_null", "energy in V's first k directions"),
        ),
        strict=True,
    ):
        for i, name in enumerate(names):
            own = rows[rows["name"].eq(name)]
            if value == "cosine" and not own["cosine"].notna().any():
                continue
            ax.plot(
                own[null].astype(float),
                own[value].astype(float),
                "o",
                ms=3,
                mew=0,
                alpha=0.5,
                color=PAIRS[i % len(PAIRS)],
                label=name.replace("_", " "),
            )
        ends = [0, max(ax.get_xlim()[1], ax.get_ylim()[1])]
        ax.plot(ends, ends, color="#777777", lw=0.9, ls="--", zorder=1)
        ax.set(
            xlim=ends,
            ylim=ends,
            xlabel="of an update in a random direction",
            ylabel="of the update",
            title=title,
        )
        ax.grid(axis="both")
    _legend(
        fig,
        [
            handle(name.replace("_", " "), PAIRS[i % len(PAIRS)], ms=4)
            for i, name in enumerate(names)
        ],
        5,
    )
    return (
        fig,
        (
            f"Each dot is a module of a run ({rows['parent_run_id'].nunique()} runs): the number by"
            " which Safe LoRA selects it, against the number that an update in a random direction"
            " has. On the dashed line the update has nothing to do with V; the published cosine is"
            " high wherever V is spread out, whatever the update."
        ),
    )


@drawn("14_safe_lora", "modules")
def touched(tables: dict) -> tuple[Figure, str]:
    """Which modules were projected at each level, and how much of their update was kept."""
    known = repairs.repairs(tables["variants"], tables["runs"])
    rows = repairs.touched(tables["modules"], known)
    rows = rows[rows["name"].eq(repairs.leading(known))]
    if rows.empty:
        return nothing("Nothing to draw: no run was repaired by Safe LoRA.")
    order = sorted(rows["module"].unique())
    fig, axes = panels(tables, 1, [0.5 + 0.22 * len(order)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        own = rows[rows["base_model"].eq(base_model)]
        levels = sorted(own["value"].unique())
        for row in own.itertuples():
            ax.plot(
                levels.index(row.value),
                order.index(row.module),
                "o",
                ms=2 + 9 * row.projected,
                color=SAFE,
                alpha=0.85,
                mew=0,
            )
            if row.projected > 0:
                ax.annotate(
                    f"{row.share_kept:.0%}",
                    (levels.index(row.value), order.index(row.module)),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=5.5,
                    color="#444444",
                )
        ax.set_xticks(range(len(levels)), [f"{value:g}" for value in levels])
        ax.set_xlim(-0.5, len(levels) - 0.2)
    name_rows(
        axes[0, 0],
        [module.removeprefix("model.layers.").replace("self_attn.", "") for module in order],
    )
    axes[0, 0].tick_params(axis="y", labelsize=6.5)
    under(axes[0], "Level of Safe LoRA (number of modules, or threshold)")
    return (
        fig,
        (
            "The size of a dot is the share of runs in which Safe LoRA touched the module at that"
            " level; beside it the share of the update's norm that is left on average over runs."
            " Little left means: close to deleting it."
        ),
    )


@drawn("14_safe_lora", "modules")
def published_threshold(tables: dict) -> tuple[Figure, str]:
    """The published share of modules below a threshold, and that of the study's runs."""
    known, there = (
        repairs.published_thresholds(),
        repairs.repairs(tables["variants"], tables["runs"]),
    )
    rows = (
        tables["modules"]
        .merge(
            there[there["name"].eq(repairs.leading(there)) & there["control"].isna()], on="run_id"
        )
        .drop_duplicates(["parent_run_id", "module"])
    )
    fig, ax = plt.subplots(figsize=(WIDTH, 2.5))
    ax.plot(
        known["threshold"],
        known["share"],
        "s-",
        color="#555555",
        ms=3.5,
        label="Hsu et al. 2024, Llama-2-7B-Chat, as published",
    )
    grid = np.linspace(0, 1, 101)
    for i, base_model in enumerate(bases(tables)):
        own = np.sort(
            rows.loc[rows["base_model"].eq(base_model), "cosine"].dropna().to_numpy(float)
        )
        if len(own):
            ax.plot(
                grid,
                100 * np.searchsorted(own, grid) / len(own),
                color=PAIRS[i % len(PAIRS)],
                lw=1.1,
                label=base_model,
            )
    ax.grid(axis="both")
    ax.set(xlabel="threshold of the cosine", ylabel="modules below it (percent)")
    ax.legend(fontsize=7, loc="lower right")
    return (
        fig,
        (
            "The share of modules that Safe LoRA projects at a threshold: as published for 64"
            " modules of Llama-2-7B-Chat after Dialog Summary, and here. The published numbers were"
            " not measured by us."
        ),
    )
