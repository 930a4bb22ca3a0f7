"""Figure of notebook 12: soft prompts that begin in different ways, against each other."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from driftbook.analyses.starts import (
    AT_START,
    BY_TRAINING,
    DOSE_GAIN,
    NULL,
    named,
    start_sentence,
    told,
)
from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    WIDTH,
    above,
    dots,
    drawn,
    floats,
    handle,
    harm_of,
    intervals_of,
    name_rows,
    nothing,
    short_name,
    unit_of,
    zero,
)
from driftbook.stats import terms
from driftbook.stats.confidence import ALPHA, BELOW, PERCENT

AGAINST = {terms.REFUSED: "refusals, benign prompts", DOSE_GAIN: "gain on held-out answers"}
SHIFT = 0.17  # of the two marks of a row


@drawn("12_tradeoffs")
def starts(tables: dict) -> tuple[Figure, str]:
    estimates = tables["estimates"]
    wanted = (
        harm_of(tables),
        terms.REFUSED,
        terms.ACCURACY_AMB,
        terms.BIAS_AMB,
        terms.CORRECT,
        DOSE_GAIN,
    )
    trained, untrained = (floats(told(estimates, one)) for one in (BY_TRAINING, AT_START))
    known = set(trained.loc[trained["value"].notna(), "outcome"])
    shown = [outcome for outcome in wanted if outcome in known]
    if not shown:
        return nothing(
            "Nothing to draw: no soft prompt began in two ways, each with its untrained prompt."
        )
    rows = trained.drop_duplicates(["method", "member", "against"])
    order = list(rows[["method", "member", "against"]].itertuples(index=False, name=None))
    lines = -(-len(shown) // 3)
    height = 0.95 + lines * (0.55 + 0.2 * len(order))
    fig, axes = plt.subplots(lines, 3, figsize=(WIDTH, height), sharey=True, squeeze=False)
    for ax, outcome in zip(axes.flat, shown, strict=False):
        _panel(ax, outcome, trained, untrained, order)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        name_rows(ax, [_label(start, other) for _, start, other in order])
        ax.tick_params(axis="y", labelsize=7)
    methods = list(dict.fromkeys(rows["method"]))
    marks = [handle(METHOD_LABELS[one], COLOURS[one], ls="-", lw=1) for one in methods]
    above(
        fig, [*marks, handle("untrained prompts", COLOURS["none"], ls="-", lw=1, marker="s", ms=3)]
    )
    tested = trained[trained["outcome"].ne(DOSE_GAIN)]
    text = (
        "What a soft prompt begins as, against the random start (last rows: the safety text against"
        " itself with its coordinates permuted), in the mean over base models. Coloured: how much"
        " more a trained prompt moved from the untrained prompt of its own start than one with the"
        f" other start did; filled where Holm's adjusted p value is {BELOW} (a family for each"
        " method, gains apart). Grey: how much the untrained prompts differ. Lines are"
        f" {PERCENT} intervals, not adjusted.{intervals_of(tested)} "
        f"{start_sentence(estimates)}"
    )
    return fig, text


def _label(start: str, other: str) -> str:
    return f"{named(start)} − permuted" if other == NULL else named(start)


def _panel(
    ax: Axes, outcome: str, trained: pd.DataFrame, untrained: pd.DataFrame, order: list[tuple]
) -> None:
    """One outcome: a row per method and pair of starts."""
    zero(ax)
    for place, key in enumerate(order):
        if place and key[0] != order[place - 1][0]:
            ax.axhline(place - 0.5, color="#cccccc", lw=0.6, zorder=0)
        for rows, shift in ((trained, -SHIFT), (untrained, SHIFT)):
            row = rows[rows["outcome"].eq(outcome)]
            for column, value in zip(("method", "member", "against"), key, strict=True):
                row = row[row[column].eq(value)]
            if shift < 0:
                dots(ax, row, place + shift, COLOURS[key[0]], row["p_adjusted"].lt(ALPHA).tolist())
            else:
                _square(ax, row, place + shift)
    ax.set_title(AGAINST.get(outcome, short_name(outcome)), fontsize=8)
    ax.set_xlabel(unit_of(outcome), fontsize=7.5)


def _square(ax: Axes, rows: pd.DataFrame, place: float) -> None:
    for row in rows.dropna(subset="value").itertuples():
        ax.plot([row.ci_low, row.ci_high], [place] * 2, color=COLOURS["none"], lw=0.8, zorder=2)
        ax.plot(row.value, place, "s", ms=2.6, color=COLOURS["none"], zorder=2)
