"""The figure of notebook 14 that shows every arm in all goals at once, beside what it costs."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from driftbook.analyses import joint, repairs
from driftbook.figures.drawing import (
    COLOURS,
    WIDTH,
    bases,
    dots,
    drawn,
    floats,
    handle,
    name_rows,
    nothing,
    under,
    zero,
)
from driftbook.figures.repairs import small_legend
from driftbook.figures.ticks import few_ticks
from driftbook.stats import harm, terms
from driftbook.stats.confidence import INTERVAL
from driftbook.stats.populations import counted
from driftbook.study.methods import METHOD_LABELS

_PANELS = {
    terms.UNSAFE: "unsafe responses\n(points)",
    terms.UNREFUSED: "harmful prompts\nnot refused (points)",
    terms.REFUSED: "refusals of benign\n(points)",
    terms.ACCURACY_AMB: "accuracy, ambiguous\n(points)",
    terms.CORRECT: "correct answers\n(points)",
    repairs.GAIN: "gain of the task\n(nats per token)",
    joint.FRONT: "on the front\n(percent)",
    joint.VOLUME: "volume added to\nrescaling's (percent)",
    joint.SECONDS: "CPU seconds of\ntraining (times)",
}
_LESS = (terms.UNSAFE, terms.UNREFUSED, terms.REFUSED)  # of which less is better


def _rows(tables: dict) -> pd.DataFrame:
    """What is drawn, over all base models or the one that a study has; of the front the mean."""
    rows = tables["estimates"]
    where = joint.over(rows)
    rows = rows[rows["group"].eq(terms.MITIGATION) & rows["notebook"].eq("14_safe_lora")]
    rows = rows[rows["contrast"].isin([terms.CHANGE, terms.LEVEL])]
    rows = floats(rows[rows["outcome"].isin(list(_PANELS))])
    front = rows[rows["outcome"].eq(joint.FRONT)]
    keys = ["outcome", "method", "member"]
    front = front.groupby(keys, as_index=False, sort=False)["value"].mean()
    rows = rows[rows["base_model"].eq(where) & rows["outcome"].ne(joint.FRONT)]
    return pd.concat([rows, front], ignore_index=True)


def _panel(ax: Axes, rows: pd.DataFrame, outcome: str, place: dict[tuple[str, str], int]) -> None:
    """One outcome: a dot for each arm, and the lines against which it is read."""
    at = [place.get(key) for key in zip(rows["method"], rows["member"], strict=True)]
    own = rows.assign(place=at).dropna(subset="place")
    if outcome in joint.SPENT:
        ax.axvline(1, color="#777777", lw=0.9, zorder=1)
    elif own["contrast"].eq(terms.CHANGE).any():
        zero(ax)
        if outcome != repairs.GAIN:
            side = 1 if outcome in _LESS else -1
            ax.axvline(side * joint.HARM_MARGIN, color="#777777", lw=0.7, ls="--", zorder=1)
    dots(ax, own, list(own["place"]), [COLOURS[method] for method in own["method"]])
    ax.set_title(_PANELS[outcome], fontsize=7)
    few_ticks(ax)
    if outcome == joint.FRONT:
        ax.set(xlim=(-4, 104), xticks=[0, 50, 100])


@drawn("14_safe_lora")
def gains_at_once(tables: dict) -> tuple[Figure, str]:
    """Every arm at its chosen level against the base model, in all goals, with its place on the
    front and its cost.
    """
    rows = _rows(tables)
    if not rows["outcome"].eq(joint.VOLUME).any():
        return nothing("Nothing to draw: no repair or objective was judged on every base model.")
    changes = rows[rows["contrast"].eq(terms.CHANGE)]
    order = list(dict.fromkeys(zip(changes["method"], changes["member"], strict=True)))
    order.sort(key=lambda one: (list(COLOURS).index(one[0]), one[1] != repairs.PARENT))
    place = {one: i for i, one in enumerate(order)}
    shown = [name for name in _PANELS if rows["outcome"].eq(name).any()]
    n_lines = -(-len(shown) // 4)
    height = 0.7 + (0.5 + 0.16 * len(order)) * n_lines
    look = {"figsize": (WIDTH, height), "sharey": True, "squeeze": False}
    fig, axes = plt.subplots(n_lines, min(4, len(shown)), **look)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, outcome in zip(axes.flat, shown, strict=False):
        _panel(ax, rows[rows["outcome"].eq(outcome)], outcome, place)
    names = [
        "fine-tuned alone" if name == repairs.PARENT else name.replace("_", " ")
        for _, name in order
    ]
    for line in axes:
        name_rows(line[0], names)
        line[0].tick_params(axis="y", labelsize=7)
    under(
        axes[-1], f"Change against the base model ({INTERVAL}); front, volume and cost are levels"
    )
    methods = list(dict.fromkeys(method for method, _ in order))
    small_legend(fig, [handle(METHOD_LABELS[one], COLOURS[one]) for one in methods], len(methods))
    safety = harm.safety_outcome(changes)
    n = int(changes.loc[changes["outcome"].eq(safety), "n_runs"].max())
    return fig, (
        f"Each arm at its chosen level against the base model, in the mean of"
        f" {counted(len(bases(tables)), 'base model')}, up to {n} runs an arm, on the report half."
        f" Dashed: the margin of {joint.HARM_MARGIN:g} points of harm. The front: how often nothing"
        " is as good in safety, over-refusal, accuracy in ambiguous contexts and the task's gain,"
        " and better in one, in the mean of the base models. The volume: what an arm dominates and"
        " no base model, plain run or rescaled run does, in percent of the box between the worst"
        " and the best mean. Seconds: times those of the plain run, with the training that a soup"
        f" or a product needs too. {joint.joint_sentence(tables['estimates'])}"
    )
