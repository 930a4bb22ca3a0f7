"""Figures of notebook 14: repairs, their controls and the frontier; what alignment changed, and
what the cosine measures.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from driftbook.analyses import repairs
from driftbook.analyses.repairs import (
    AGAINST_PARENT,
    DECLINED,
    GAIN,
    JUST_LESS,
    JUST_MORE,
    MINUS,
    PARENT,
)
from driftbook.figures.drawing import (
    WIDTH,
    above,
    bases,
    dots,
    drawn,
    floats,
    handle,
    intervals_of,
    name_rows,
    nothing,
    panels,
    short_name,
    under,
    zero,
)
from driftbook.figures.ticks import few_ticks
from driftbook.stats import harm
from driftbook.stats.confidence import ALPHA, INTERVAL, PERCENT
from driftbook.stats.populations import counted
from driftbook.stats.terms import (
    ACCURACY_AMB,
    BIAS_AMB,
    CHANGE,
    CORRECT,
    MITIGATION,
    REFUSED,
    UNREFUSED,
    UNSAFE,
)

_NAMES = {
    UNSAFE: "unsafe responses\n(points)",
    UNREFUSED: "harmful prompts\nnot refused (points)",
    DECLINED: "refusals of harmful\n(points)",
    REFUSED: "refusals of benign\n(points)",
    GAIN: "gain of fine-tuning\n(nats per token)",
    ACCURACY_AMB: "accuracy, ambiguous\n(points)",
    BIAS_AMB: "bias, ambiguous\n(points)",
    CORRECT: "correct answers\n(points)",
}
SAFE, NULL, OTHER = "#0072B2", "#D55E00", "#009E73"
PAIRS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#D55E00")
RESCALED = {JUST_LESS: "rescaled, just less gain", JUST_MORE: "rescaled, just more gain"}
DIFFERENCE_IN = {
    UNSAFE: "unsafe responses (percentage points",
    UNREFUSED: "harmful prompts not refused (percentage points",
    GAIN: "gain of fine-tuning (nats per token",
}


def small_legend(fig: Figure, handles: list[Line2D], columns: int) -> None:
    above(fig, handles, columns, fontsize=7, handletextpad=0.5)


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
    made = bases(tables)
    rows = _rows(tables, AGAINST_PARENT, "all" if len(made) > 1 else made[0])
    if rows.empty:
        return nothing("Nothing to draw: no repair was done on every base model.")
    known = repairs.repairs(tables["variants"], tables["runs"])
    kinds = dict(zip(known["name"], known["kind"], strict=True))
    order = _order(rows)
    shown = [outcome for outcome in _NAMES if rows["outcome"].eq(outcome).any()]
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
        ax.set_title(_NAMES[outcome], fontsize=7)
        few_ticks(ax)
    for line in axes:
        name_rows(line[0], [name.replace("_", " ") for name in order])
        line[0].tick_params(axis="y", labelsize=7)
    under(axes[-1], f"Change against the parent, the run that was repaired ({INTERVAL})")
    return (
        fig,
        (
            "What each repair changed against the run that it was made from, at the level chosen"
            f" on other prompts, in the mean of {counted(len(made), 'base model')}; lines:"
            f" {PERCENT} intervals. Left is less. A repair that deletes the adapter takes back all"
            f" of the gain.{intervals_of(rows)}"
        ),
    )


def _minus_controls(rows: pd.DataFrame, controlled: list[str]) -> pd.DataFrame:
    """The differences of these repairs to their controls and to the rescaled runs around them."""
    rows = rows[
        rows["notebook"].eq("14_safe_lora")
        & rows["outcome"].isin([*harm.OF_SAFETY, GAIN])
        & rows["contrast"].isin([MINUS, *RESCALED])
    ]
    rows = rows.assign(against=rows["against"].where(rows["contrast"].eq(MINUS), rows["contrast"]))
    return floats(rows[rows["group"].eq(MITIGATION) & rows["member"].isin(controlled)])


@drawn("14_safe_lora")
def controls(tables: dict) -> tuple[Figure, str]:
    """Safe LoRA minus each of its controls, by base model and over all."""
    kinds = repairs.repairs(tables["variants"], tables["runs"])
    own = kinds["kind"].eq("safe_lora") & kinds["control"].notna()
    controlled = list(dict.fromkeys(kinds.loc[own, "name"]))
    rows = _minus_controls(tables["estimates"], controlled)
    if rows.empty:
        return nothing("Nothing to draw: no repair has controls.")
    every = list(dict.fromkeys(zip(rows["member"], rows["against"], strict=True)))
    columns, what = bases(tables), harm.COUNTED[harm.safety_outcome(rows)]
    columns += ["all"] * (len(columns) > 1)
    shown = [outcome for outcome in (*harm.OF_SAFETY, GAIN) if rows["outcome"].eq(outcome).any()]
    fig, axes = plt.subplots(
        len(shown),
        len(columns),
        figsize=(WIDTH, 0.9 + 0.19 * len(every) * len(shown) + 0.5 * len(shown)),
        sharey="row",
        sharex="row",
        squeeze=False,
    )
    for number, (line, outcome) in enumerate(zip(axes, shown, strict=True)):
        # rescaled runs are chosen by their gain
        lines = [one for one in every if outcome != GAIN or one[1] not in RESCALED]
        for ax, base_model in zip(line, columns, strict=True):
            zero(ax)
            own = rows[rows["outcome"].eq(outcome) & rows["base_model"].eq(base_model)]
            places = [lines.index(one) for one in zip(own["member"], own["against"], strict=True)]
            colours = [SAFE if name == controlled[0] else OTHER for name in own["member"]]
            dots(ax, own, places, colours, own["p_adjusted"].lt(ALPHA).tolist())
            if number == 0:
                ax.set_title("all" if base_model == "all" else base_model, fontsize=7.5)
            few_ticks(ax)
        minus = [f"{name.replace('_', ' ')} − {RESCALED.get(to, to)}" for name, to in lines]
        name_rows(line[0], minus)
        line[0].tick_params(axis="y", labelsize=6.5)
        under(line, f"Difference in {DIFFERENCE_IN[outcome]}, {INTERVAL})")
    return (
        fig,
        (
            "Safe LoRA and its rank-k form minus their controls, the same seed's run of each, at"
            f" the level chosen on other prompts: {what} (less is better) and gain (more"
            " is better). Filled: the difference is not chance after Holm's adjustment within its"
            " family. A row at zero: the control does the same, so what it dropped was not what"
            f" worked. Only a repair with fewer {what} than the rescaled run that keeps"
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
    scored = set(rows.loc[rows["value"].notna(), "outcome"])
    shown = [one for one in (ACCURACY_AMB, BIAS_AMB) if one in scored]
    if not shown:
        return nothing("Nothing to draw: no repair was scored on BBQ on every base model.")
    known = repairs.repairs(tables["variants"], tables["runs"])
    styles = {
        PARENT: ("fine-tuned", "#777777"),
        repairs.leading(known): ("after Safe LoRA", SAFE),
        repairs.leading(known, "rescale"): ("after rescaling", NULL),
    }
    rows = floats(rows).assign(name=rows["member"], dimension=rows["category"])
    order = sorted(rows["dimension"].unique())
    names = [name for name in styles if rows["name"].eq(name).any()]
    shape = {"figsize": (WIDTH, 1 + 0.4 * len(order)), "sharey": True, "squeeze": False}
    fig, [axes] = plt.subplots(1, len(shown), **shape)
    for ax, outcome in zip(axes, shown, strict=True):
        zero(ax)
        for place, name in enumerate(names):
            own = rows[rows["outcome"].eq(outcome) & rows["name"].eq(name)]
            at = np.array([order.index(dimension) for dimension in own["dimension"]])
            at = at + 0.22 * (place - (len(names) - 1) / 2)
            dots(ax, own, at, styles[name][1], name != PARENT)
        ax.set_title(short_name(outcome).capitalize())
    name_rows(axes[0], [dimension.replace("_", " ") for dimension in order])
    scale = "percentage points; bias score: points of -100 to 100"
    under(axes, f"Change against the base model ({scale}), {INTERVAL}")
    faces = {name: "white" if name == PARENT else styles[name][1] for name in names}
    small_legend(fig, [handle(*styles[name], mfc=faces[name]) for name in names], 3)
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
    pairs = list(dict.fromkeys(rows["pair"]))
    kinds = list(dict.fromkeys(rows["module"].str.rpartition(".")[2]))
    fig, axes = panels(tables, len(kinds), [1.5] * len(kinds))
    for line, kind in zip(axes, kinds, strict=True):
        for ax, base_model in zip(line, bases(tables), strict=True):
            own = rows[rows["base_model"].eq(base_model) & rows["module"].str.endswith(f".{kind}")]
            for (pair, _), part in own.groupby(["pair", "module"], sort=False):
                part, colour = part.sort_values("index"), PAIRS[pairs.index(pair) % len(PAIRS)]
                share = part["singular_value"] ** 2 / part["norm_v"] ** 2
                ax.plot(part["index"], share, color=colour, lw=0.9, alpha=0.8)
            if len(own):
                out, columns = own[["out_features", "in_features"]].iloc[0].astype(int)
                n = int(own["index"].max())
                random = _random_spectrum(out, columns, n)
                ax.plot(np.arange(1, n + 1), random, color="black", lw=0.9, ls=":")
            ax.set_yscale("log")
            ax.set_xscale("log")
            ax.grid(axis="y")
        line[0].set_ylabel(f"{kind}\nshare of ||V||²")
    under(axes[-1], "Number of the singular value, from the largest")
    handles = [
        Line2D([], [], color=PAIRS[i % len(PAIRS)], lw=1.2, label=f"pair: {pair}")
        for i, pair in enumerate(pairs)
    ] + [handle("random matrix of the same norm", "black", "", ls=":")]
    small_legend(fig, handles, 4)
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
    titles = {"cosine": "cos(dW, C dW)", "energy": "energy in V's first k directions"}
    for ax, (value, title) in zip(axes, titles.items(), strict=True):
        for i, name in enumerate(names):
            own = rows[rows["name"].eq(name)]
            if value == "cosine" and not own["cosine"].notna().any():
                continue
            x, y = own[f"{value}_null"].astype(float), own[value].astype(float)
            ax.plot(x, y, "o", ms=3, mew=0, alpha=0.5, color=PAIRS[i % len(PAIRS)])
        ends = [0, max(ax.get_xlim()[1], ax.get_ylim()[1])]
        ax.plot(ends, ends, color="#777777", lw=0.9, ls="--", zorder=1)
        ax.set(xlim=ends, ylim=ends, title=title)
        ax.set(xlabel="of an update in a random direction", ylabel="of the update")
        ax.grid(axis="both")
    shades = {name.replace("_", " "): PAIRS[i % len(PAIRS)] for i, name in enumerate(names)}
    small_legend(fig, [handle(*one, ms=4) for one in shades.items()], 5)
    return (
        fig,
        (
            f"Each dot is a module of a run ({rows['parent_run_id'].nunique()} runs): the number by"
            " which Safe LoRA selects it, against the number that an update in a random direction"
            " has. On the dashed line the update has nothing to do with V; the published cosine is"
            " high wherever V is spread out, whatever the update."
        ),
    )


def _by_layer(module: str) -> list[tuple[int, str]]:
    """The parts of a module's name, its layer as a number: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


@drawn("14_safe_lora", "modules")
def touched(tables: dict) -> tuple[Figure, str]:
    """Which modules were projected at each level, and how much of their update was kept."""
    known = repairs.repairs(tables["variants"], tables["runs"])
    rows = repairs.touched(tables["modules"], known)
    rows = rows[rows["name"].eq(repairs.leading(known))]
    if rows.empty:
        return nothing("Nothing to draw: no run was repaired by Safe LoRA.")
    order = sorted(rows["module"].unique(), key=_by_layer)
    fig, axes = panels(tables, 1, [0.5 + 0.22 * len(order)])
    for ax, base_model in zip(axes[0], bases(tables), strict=True):
        own = rows[rows["base_model"].eq(base_model)]
        levels = sorted(own["value"].unique())
        for row in own.itertuples():
            at = levels.index(row.value), order.index(row.module)
            ax.plot(*at, "o", ms=2 + 9 * row.projected, color=SAFE, alpha=0.85, mew=0)
            if row.projected > 0:
                look = {"va": "center", "fontsize": 5.5, "color": "#444444"}
                words = f"{row.share_kept:.0%}"
                ax.annotate(words, at, xytext=(8, 0), textcoords="offset points", **look)
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
