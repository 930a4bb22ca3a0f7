"""The figure of how the miniature's models learned."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from driftbook.figures.drawing import style

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
    families, metrics = curves["family"].unique(), curves["metric"].unique()
    fig, axes = plt.subplots(
        len(families),
        len(metrics),
        figsize=(6.5, 1 + 1.1 * len(families)),
        sharex="row",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    titled = set()
    for (i, family), (j, metric) in (
        (a, b) for a in enumerate(families) for b in enumerate(metrics)
    ):
        here = curves[(curves["family"] == family) & (curves["metric"] == metric)]
        _points(axes[i, j], here)
        if here.empty:
            axes[i, j].set_axis_off()
        elif metric not in titled:
            title = METRICS.get(metric, metric.replace("_", " "))
            axes[i, j].set_title(title, loc="left", fontsize=7)
            titled.add(metric)
        axes[i, j].set_ylabel(family if j == 0 else "", fontsize=8)
    fig.supxlabel("CPU seconds of training", fontsize=8)
    fig.suptitle(
        "Share of held-out prompts, 95% interval; grey: stage 0, orange: unaligned, blue: aligned"
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
