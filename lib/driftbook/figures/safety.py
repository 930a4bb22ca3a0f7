"""Figures of safety and over-refusal."""

from itertools import combinations

import pandas as pd
from matplotlib.figure import Figure

from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    OVER_REFUSAL,
    TRAINED_METHODS,
    axis,
    bases,
    by_part,
    captioned,
    changes_figure,
    dots,
    drawn,
    harm_name,
    harm_of,
    intervals_of,
    lines_meant,
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
from driftbook.stats import influence, populations
from driftbook.stats.comparisons import DIFFERENCE
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.terms import (
    AS_CONFIGURED,
    CHANGE,
    CHANGE_HERE,
    NO_OP,
    SETTINGS,
    TRAINED,
    UNTRAINED,
)


@drawn("09_safety")
def safety_change(tables: dict) -> tuple[Figure, str]:
    groups = (TRAINED, UNTRAINED, NO_OP)
    text = (
        f"Change in the {harm_name(tables)}, a base model per panel, zero at the base model"
        " itself. Hollow: controls that training left as they were (no-op) or that were never"
        f" trained. Small dots: single runs. {lines_meant(tables, groups, safety_of(tables))}"
    )
    shown = safety_of(tables)
    return captioned(tables, changes_figure(tables, [shown], groups, 0.35), text, shown)


@drawn("09_safety")
def over_refusal(tables: dict) -> tuple[Figure, str]:
    lines = lines_meant(tables, (TRAINED, UNTRAINED), safety_of(tables), OVER_REFUSAL)
    text = (
        f"Above: change in the {harm_name(tables)} to harmful prompts. Below: change in the"
        " refusal rate to benign prompts that look harmful. Both down is a model that answers"
        f" more, not a safer one. {lines}"
    )
    return captioned(
        tables,
        changes_figure(tables, [safety_of(tables), OVER_REFUSAL], (TRAINED, UNTRAINED)),
        text,
        safety_of(tables),
        OVER_REFUSAL,
    )


@drawn("09_safety")
def safety_settings(tables: dict) -> tuple[Figure, str]:
    rows = _by_setting(pick(tables, harm_of(tables), CHANGE, "safety"))
    known = influence.arms(tables["variants"], tables["runs"]).sort_values(
        ["objective", "learning_rate", "epochs"], ascending=[False, True, True]
    )
    groups = tuple(known["setting"].drop_duplicates())
    pairs = [
        pair
        for method in TRAINED_METHODS
        for pair in present(rows[rows["method"].eq(method)], groups)
    ]
    fig = None
    if pairs:
        fig, axes = panels(tables, 1, [0.5 + 0.21 * len(pairs)])
        here = _by_setting(pick(tables, harm_of(tables), CHANGE_HERE, "safety"))
        runs = of_runs(tables, *safety_of(tables))
        for ax, base_model in zip(axes[0], bases(tables), strict=True):
            method_rows(
                ax,
                *(frame[frame["base_model"].eq(base_model)] for frame in (rows, here, runs)),
                pairs,
            )
        name_rows(
            axes[0, 0],
            [
                f"{METHOD_LABELS[method]}, {group.replace('sft', 'SFT').replace('dpo', 'DPO')}"
                for method, group in pairs
            ],
        )
        axes[0, 0].tick_params(axis="y", labelsize=6.5)
        under(axes[0], axis(harm_of(tables)))
    text = (
        f"Change in the {harm_name(tables)} by method, objective, learning rate and epochs: what"
        f" settings do within a method. {lines_meant(tables, [SETTINGS], safety_of(tables))}"
    )
    return captioned(tables, fig, text, safety_of(tables))


def _by_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of settings, each a group by the name of its settings."""
    rows = rows[rows["group"].eq(SETTINGS)]
    return rows.assign(group=rows["member"])


@drawn("09_safety")
def safety_category(tables: dict) -> tuple[Figure, str]:
    rate = harm_name(tables).capitalize()
    fig = by_part(tables, [safety_of(tables)], f"{rate} by category (percent, {INTERVAL})")
    text = (
        f"{rate} by category of the benchmark and method (trained runs, mean over"
        " runs); grey: the base model, interval over prompts."
    )
    return captioned(tables, fig, text, safety_of(tables))


@drawn("09_safety")
def methods_compared(tables: dict) -> tuple[Figure, str]:
    pairs = list(combinations(methods_of(tables), 2))
    if not pairs:
        return nothing("Nothing to draw: fewer than two methods were trained.")
    every = pick(tables, harm_of(tables), DIFFERENCE, "safety")
    every = every[every["group"].eq(AS_CONFIGURED)]
    rows = [
        every[every["method"].eq(method) & every["against"].eq(other)] for method, other in pairs
    ]
    fig = None
    if any(len(part) for part in rows):
        fig, axes = panels_with_all(tables, 1.3 + 0.24 * len(pairs))
        for base_model, ax in axes.items():
            zero(ax)
            for place, (part, (method, _)) in enumerate(zip(rows, pairs, strict=True)):
                row = part[part["base_model"].eq(base_model)]
                dots(ax, row, place, COLOURS[method])
        line = list(axes.values())
        names = [f"{METHOD_LABELS[method]} − {METHOD_LABELS[other]}" for method, other in pairs]
        name_rows(line[0], names)
        under(
            line,
            f"Difference in {harm_name(tables)} between methods (percentage points, {INTERVAL})",
        )
    known = populations.over_seeds(every) is not False
    text = (
        "Each pair of methods, as configured: the change of the first less the change of the"
        " second. Right of zero the first is the less safe one."
        + intervals_of(every)
        + " Each method has a run spread of its own." * known
        + " Not adjusted for the number of pairs."
    )
    return captioned(tables, fig, text, safety_of(tables))
