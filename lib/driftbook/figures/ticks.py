"""The numbers along an axis."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter


class _Roomy(MaxNLocator):
    """At most six steps, and no more than have room for their numbers."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        size = FontProperties(size=plt.rcParams["xtick.labelsize"]).get_size_in_points()
        width = 72 * self.axis.axes.get_window_extent().width / self.axis.figure.dpi
        for steps in (6, 4, 3, 2):
            self.set_params(nbins=steps)
            ticks = super().tick_values(vmin, vmax)
            longest = max(map(len, self.axis.major.formatter.format_ticks(ticks)))
            room = width * np.diff(ticks).min() / (vmax - vmin)
            if room > 0.6 * size * (longest + 1):  # a digit is about .6 of its size wide
                break
        return ticks


def few_ticks(ax: Axes) -> None:
    """Few numbers along a narrow panel, none on another."""
    ax.xaxis.set_major_locator(_Roomy(steps=[1, 2, 5, 10]))


def number_axis(ax: Axes, values: pd.Series) -> None:
    """A readable axis for a cost: logarithmic where it spans much, with k and M for thousands and
    millions.
    """
    known = values.dropna().astype(float)
    known = known[known > 0]
    if len(known) and known.max() > 5 * known.min():
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
