"""When the jobs of a study worked, drawn for its report."""

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from driftbook.figures import drawing

PAUSE = 120.0  # seconds without any work that are left out, as between two runs of make study
ROW = 0.3  # inches
OUTLINED = 60  # bars of a lane


def timeline(work: pd.DataFrame) -> Figure:
    """Lanes of work: a bar for each variant in a stage, by machine and job, over the minutes in
    which anything was done.

    `work` has stage, base_model, run_id, host, began, seconds (a row a variant and stage).
    """
    drawing.style()
    work = work.sort_values("began", kind="stable").reset_index(drop=True)
    work = work.assign(start=without_pauses(work), lane=lanes(work))
    stages = list(dict.fromkeys(work.stage))
    colours = dict(zip(stages, sns.color_palette("colorblind", len(stages)), strict=True))
    n = work.lane.nunique()
    # Of thin bars only the outline would be seen.
    outline = 0.3 if len(work) < OUTLINED * n else 0.0
    fig, ax = plt.subplots(figsize=(8, 1.1 + ROW * n))
    for stage, rows in work.groupby("stage", sort=False):
        bars = {"left": rows.start / 60, "width": rows.seconds / 60, "color": colours[stage]}
        ax.barh(rows.lane, height=0.72, linewidth=outline, edgecolor="white", label=stage, **bars)
    ax.set(xlabel="minutes of work, without pauses", ylabel="lane", ylim=(n - 0.5, -0.5))
    ax.set_yticks(range(n), [str(lane + 1) for lane in range(n)])
    fig.legend(loc="outside upper left", ncols=len(stages), frameon=False)
    return fig


def without_pauses(work: pd.DataFrame) -> pd.Series:
    """When each piece of work began, in seconds since the first, where times in which nothing was
    done for long are left out. Rows are in the order of `began`.
    """
    ended = (work.began + work.seconds).cummax().shift(fill_value=work.began.iloc[0])
    pauses = (work.began - ended).where(lambda gap: gap > PAUSE, 0.0)
    return work.began - work.began.iloc[0] - pauses.cumsum()


def lanes(work: pd.DataFrame) -> list[int]:
    """The lane of each piece of work: the first in which nothing else was being done on its
    machine. Rows are in the order of `began`.
    """
    free: list[tuple[str, float]] = []
    found = []
    for one in work.itertuples():
        lane = next(
            (k for k, (host, until) in enumerate(free) if host == one.host and until <= one.began),
            len(free),
        )
        ended = (one.host, one.began + one.seconds)
        free[lane : lane + 1] = [ended]
        found.append(lane)
    return found
