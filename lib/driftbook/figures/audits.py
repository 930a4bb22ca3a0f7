"""The figure of several audits of one base model."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from driftbook.figures.drawing import WIDTH, dots, name_rows, style, zero


def audits_compared(found: pd.DataFrame) -> Figure:
    """A panel per area, a row per audit: the difference to the base model with its interval, filled
    where the word is worse or better, and the band of the margin. `found` as
    analyses.audits.against_base.
    """
    style()
    areas, names = found["title"].unique(), list(found["name"].unique())
    height = 0.6 + 0.28 * len(names)
    size = (WIDTH, height * len(areas) + 0.3)
    fig, axes = plt.subplots(len(areas), 1, figsize=size, squeeze=False)
    for ax, area in zip(axes[:, 0], areas, strict=True):
        rows = found[found["title"].eq(area)].set_index("name").reindex(names)
        zero(ax)
        margin = rows["margin"].dropna().iloc[0]
        ax.axvspan(-margin, margin, color="#777777", alpha=0.12, lw=0)
        plain = rows.rename(columns={"difference": "value"})
        solid = rows["word"].isin(["worse", "better"])
        dots(ax, plain, range(len(names)), "#0072B2", solid.tolist())
        name_rows(ax, names)
        ax.set_title(f"{area}: {rows['worse'].dropna().iloc[0]} is worse", loc="left")
    axes[-1, 0].set_xlabel("difference to the base model, points")
    return fig
