"""The figure of how the miniature's models learned."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from driftbook.figures.drawing import style
from driftbook.stats.confidence import INTERVAL

METRICS = {
    "refusal": "refusal of\nthe forbidden",
    "compliance": "compliance,\nbenign requests",
    "accuracy_disambiguated": "accuracy,\ndisambiguated",
    "accuracy_ambiguous": "accuracy,\nambiguous",
    "biased": "stereotyped\nchoices",
    "agreement": "agreement with\nthe truth",
}
STAGES = {"stage0": "#999999", "unaligned": "#D55E00", "aligned": "#0072B2", "judge": "#009E73"}


def draw_learning(curves: pd.DataFrame, note: str) -> Figure:
    """Panels of measures (columns) by family (rows), against CPU seconds of training, with 95 %
    Wilson intervals; colour is the stage.
    """
    style()
    curves = curves[curves["ci_low"].notna()]
    families = dict(iter(curves.groupby("family", sort=False)))  # a group is no mapping
    widest = max(rows["metric"].nunique() for rows in families.values())
    fig, axes = plt.subplots(
        len(families),
        widest,
        figsize=(6.5, 1 + 1.1 * len(families)),
        sharex="row",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    titled = []
    for row, (family, rows) in zip(axes, families.items(), strict=True):
        metrics = list(rows["metric"].unique())
        for axis, metric in zip(row, metrics, strict=False):
            _points(axis, rows[rows["metric"] == metric])
            if metrics != titled:
                title = METRICS.get(metric, metric.replace("_", " "))
                axis.set_title(title, loc="left", fontsize=7)
        for axis in row[len(metrics) :]:
            axis.set_axis_off()
        row[0].set_ylabel(family, fontsize=8)
        titled = metrics
    fig.supxlabel("CPU seconds of training", fontsize=8)
    fig.suptitle(
        f"Share of held-out prompts, {INTERVAL}; grey: stage 0, orange: unaligned, blue: aligned"
        f" ({note})",
        fontsize=7,
        x=0.01,
        ha="left",
    )
    plt.close(fig)
    return fig


def _points(axis, here: pd.DataFrame) -> None:
    axis.set_ylim(-0.03, 1.03)
    for stage, part in here.groupby("stage", sort=False):
        spread = [
            (part["value"] - part["ci_low"]).clip(lower=0),
            (part["ci_high"] - part["value"]).clip(lower=0),
        ]  # an end at 0 or 1 may be off by rounding
        axis.errorbar(
            part["cpu_seconds"],
            part["value"],
            spread,
            fmt="o-",
            ms=2.5,
            lw=0.8,
            elinewidth=0.6,
            color=STAGES.get(stage, "#555555"),
        )
