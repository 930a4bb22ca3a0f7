"""Figures of the mixed-effects models: what they say of each method, side by side."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from driftbook.analyses import marginal_means
from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    TRAINED_METHODS,
    WIDTH,
    above,
    axis,
    bases,
    captioned,
    dots,
    drawn,
    handle,
    harm_name,
    harm_of,
    method_rows,
    methods_of,
    name_rows,
    nothing,
    of_runs,
    panels,
    panels_with_all,
    pick,
    present,
    safety_of,
    under,
    zero,
)
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.terms import AS_CONFIGURED, CHANGE, NO_OP, PRIMARY, TRAINED, UNSAFE

# ---- 11 mixed effects
MODELS = ("pooled", "by base model", "mixed")


@drawn("11_mixed_effects")
def mixed_effects(tables: dict) -> tuple[Figure, str]:
    rows, runs = (
        pick(tables, harm_of(tables), CHANGE, "safety", "mixed"),
        of_runs(tables, *safety_of(tables)),
    )
    runs = runs[runs["arm"].isin([TRAINED, NO_OP])].assign(arm=AS_CONFIGURED)
    fig = None
    if len(rows):
        fig, axes = panels(tables, len(MODELS), [1.35] * len(MODELS), sharex="all")
        for line, model in zip(axes, MODELS, strict=True):
            every = pick(tables, harm_of(tables), CHANGE, "safety", model)
            for ax, base_model in zip(line, bases(tables), strict=True):
                own = every[every["base_model"].eq("all" if model == "pooled" else base_model)]
                method_rows(
                    ax,
                    own,
                    own[:0],
                    runs[runs["base_model"].eq(base_model)],
                    present(every, (AS_CONFIGURED,)),
                )
            name_rows(
                line[0], [METHOD_LABELS[method] for method, _ in present(every, (AS_CONFIGURED,))]
            )
            line[0].set_ylabel(model, fontweight="bold")
        under(axes[-1], axis(harm_of(tables)))
    text = (
        "Three models of the same run x category differences. Pooled: one mean per method, base"
        " models ignored (the same in every panel). By base model: each panel on its own. Mixed:"
        " all together, settings held at the methods' own middle, run and category as random. Small"
        " dots: single runs."
    )
    return captioned(tables, fig, text, safety_of(tables))


ESTIMATORS = {
    "primary": PRIMARY,
    "linear mixed": "mixed",
    "linear, one run variance": "mixed, one run variance",
    "logistic, crossed": "crossed",
    "logistic, maximal": "maximal",
}
_MARKS = ("o", "s", "D", "^", "v")


@drawn("11_mixed_effects")
def models_compared(tables: dict) -> tuple[Figure, str]:
    found = {
        name: pick(tables, harm_of(tables), CHANGE, "safety", one)
        for name, one in ESTIMATORS.items()
    }
    found = {name: rows[rows["group"].eq(AS_CONFIGURED)] for name, rows in found.items()}
    methods = [
        method
        for method in TRAINED_METHODS
        if any(part["method"].eq(method).any() for part in found.values())
    ]
    fig = None
    if methods and any(len(part) for name, part in found.items() if name != "primary"):
        fig, axes = panels_with_all(tables, 0.9 + 0.62 * len(methods))
        shifts = np.linspace(-0.3, 0.3, len(found))
        for base_model, ax in axes.items():
            zero(ax)
            for place, method in enumerate(methods):
                for shift, mark, part in zip(shifts, _MARKS, found.values(), strict=True):
                    row = part[part["base_model"].eq(base_model) & part["method"].eq(method)]
                    row, at = row.dropna(subset="value"), place + shift
                    dots(ax, row, at, COLOURS[method])
                    look = {"color": COLOURS[method], "mec": "white", "mew": 0.5, "zorder": 5}
                    ax.plot(row["value"], [at] * len(row), mark, ms=4.5, **look)
        line = list(axes.values())
        name_rows(line[0], [METHOD_LABELS[method] for method in methods])
        under(line, axis(harm_of(tables)))
        handles = [
            handle(name, "#555555", mark, ls="-", lw=0)
            for name, mark in zip(found, _MARKS, strict=True)
        ]
        above(fig, handles, handlelength=0.8, columnspacing=1, fontsize=7)
    judged = harm_of(tables) == UNSAFE
    none = "without a single unsafe answer" if judged else "that refuses every harmful prompt"
    text = (
        "The same change by several estimators. Primary: item by item, two-way errors. Linear"
        " mixed: run x category differences, a run variance for each method, and one for all."
        " Logistic: single verdicts with effects of run, prompt and prompt x method, and the"
        f" maximal model; a base model {none} has no logit, so its rows are missing."
    )
    return captioned(tables, fig, text, safety_of(tables))


@drawn("11_mixed_effects")
def mixed_terms(tables: dict) -> tuple[Figure, str]:
    contrasts = {
        "SFT instead of DPO": marginal_means.OBJECTIVE,
        "Ten times the learning rate": marginal_means.RATE,
    }
    found = {
        title: pick(tables, harm_of(tables), contrast, "safety", "mixed")
        for title, contrast in contrasts.items()
    }
    found = {title: rows for title, rows in found.items() if rows["value"].notna().any()}
    if not found:
        return nothing("Nothing to draw: no method was trained by SFT and DPO or at two rates.")
    shape = {"figsize": (WIDTH, 2.4), "sharey": True, "sharex": True, "squeeze": False}
    fig, [axes] = plt.subplots(1, len(found), **shape)
    for ax, (title, rows) in zip(axes, found.items(), strict=True):
        zero(ax)
        ax.set_title(title)
        for place, method in enumerate(methods_of(tables)):
            row = rows[rows["method"].eq(method)]
            dots(ax, row, place, COLOURS[method])
    name_rows(axes[0], [METHOD_LABELS[method] for method in methods_of(tables)])
    under(axes, f"Difference in {harm_name(tables)} (percentage points, {INTERVAL})")
    text = (
        "What objective and learning rate do within each method, from the mixed model (run-level"
        " degrees of freedom)."
    )
    return captioned(tables, fig, text, safety_of(tables))
