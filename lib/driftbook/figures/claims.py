"""The ledger of the original study's claims as a figure: three readings of each."""

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from driftbook.figures.drawing import WIDTH, above, drawn, floats, zero
from driftbook.figures.original_study import mark, named_rows
from driftbook.rereading import original_ledger as ledger
from driftbook.rereading import original_quantifiers as quantifiers
from driftbook.rereading import original_study
from driftbook.rereading.original_analysis import SAFETY
from driftbook.rereading.original_claims import MARGIN
from driftbook.stats.confidence import INTERVAL, PERCENT

VERDICT_STYLE = {
    quantifiers.STANDS: ("o", "#222222", "#222222"),
    quantifiers.FALLS: ("X", "#B3001B", "#B3001B"),
    quantifiers.DEPENDS: ("D", "#666666", "#666666"),
    quantifiers.OPEN: ("o", "white", "#888888"),
}
_DECIDED = (quantifiers.STANDS, quantifiers.FALLS, quantifiers.OPEN)
_MARKED = (-60, -MARGIN, 0, MARGIN, 40)  # marked on the axis of points


@drawn("24_original_claims")
def original_claims(tables: dict) -> tuple[Figure, str]:
    rows = floats(tables["estimates"])
    rows = rows[rows["notebook"].eq(ledger.CLAIMS_NOTEBOOK)]
    claims = rows[rows["group"].eq(ledger.CLAIM)].set_index("member")
    sentences = original_study.cited("claims").set_index("claim")["sentence"]
    names = [name for name in sentences.index if name in claims.index]
    fig, (mean, count, share) = plt.subplots(
        1, 3, figsize=(WIDTH, 1.2 + 0.36 * len(names)), width_ratios=[3.2, 0.9, 1.5], sharey=True
    )
    _axes(mean, count, share)
    read = ledger.deciding(rows).set_index(["member", "estimator"])
    cells = rows[rows["group"].eq(ledger.CELL) & rows["outcome"].eq(SAFETY)]
    for place, name in enumerate(names):
        own = cells.loc[cells["member"].eq(name), "value"]
        mean.plot(own, [place + 0.18] * len(own), "|", ms=5, color="#888888", mew=0.6, zorder=2)
        _claim(mean, count, share, place, read.loc[name] if name in read.index else None)
        _verdict(share, place, claims.loc[name, "contrast"])
    labels = ["\n".join(textwrap.wrap(sentences[name], 30)) for name in names]
    named_rows([mean, count, share], labels)
    count.tick_params(bottom=False, labelbottom=False)
    above(
        fig,
        [mark(word, *VERDICT_STYLE[word]) for word in _DECIDED]
        + [mark("a cell", "|", "#888888", "#888888", 6)],
        frameon=False,
        fontsize=7.5,
        handlelength=None,
    )
    found = ledger.counts(claims.reset_index())
    words = ", ".join(f"{word}: {found[word]}" for word in VERDICT_STYLE)
    return fig, (
        f"The original study's {len(names)} claims on its own public data, each in three readings"
        f" ({words}). Left: the mean over cells with its {INTERVAL} over rounds, and the cells"
        " (ticks), in points of safety; the scale is logarithmic beyond the margin of"
        f" {MARGIN:.0f} points. Middle: cells outside the claim, by their own numbers. Right: the"
        f" share of cells as claimed, and between what it lies at {PERCENT} (partial conjunctions)."
        " Each mark has the verdict of its own reading, which also has to hold when the base"
        " models' one scores are uncertain; a claim has a verdict only where its three readings"
        " agree. A claim about spread has two ratios of standard deviations in place of the mean"
        " and the count. No form that leaves runs out decides; the table estimates holds them all."
    )


def _axes(mean: Axes, count: Axes, share: Axes) -> None:
    """Scales, guides and names of the three panels."""
    zero(mean)
    mean.set_xscale("symlog", linthresh=MARGIN, linscale=1.3)
    mean.xaxis.set_major_locator(FixedLocator(_MARKED))
    mean.xaxis.set_minor_locator(NullLocator())
    mean.xaxis.set_major_formatter("{x:g}")
    mean.set_xlim(-95, 60)
    mean.set_xlabel("Mean over cells, and each cell\n(points of safety)")
    mean.tick_params(axis="x", labelsize=7.5)
    mean.set_title("mean over cells")
    count.set_title("every")
    count.patch.set_visible(False)
    count.set_xlim(0, 1)
    count.grid(visible=False)
    share.axvline(quantifiers.HALF, color="#777777", lw=0.9, zorder=1)
    share.set_xlim(-4, 104)
    share.xaxis.set_major_locator(FixedLocator([0, 50, 100]))
    share.set_xlabel("Cells as claimed\n(percent)")
    share.set_title("share")


def _claim(mean: Axes, count: Axes, share: Axes, place: int, read: pd.DataFrame | None) -> None:
    """The three readings of a claim, or that there are none."""
    small = {"fontsize": 7, "va": "center", "color": "#555555"}
    if read is None:
        at = mean.get_yaxis_transform()
        mean.text(0.02, place, "no public data", transform=at, ha="left", **small)
        return
    for reading, row in read.iterrows():
        look = small | {"color": VERDICT_STYLE[row["contrast"]][2], "weight": "bold"}
        interval = f"{row['value']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
        if reading == quantifiers.MEAN:
            _dot(mean, row, place - 0.12)
        elif reading == quantifiers.SHARE:
            _dot(share, row, place)
        elif reading == quantifiers.EVERY:
            n = row["outcome"].partition("(of ")[2].rstrip(")")
            count.text(0.5, place, f"{row['value']:.0f} of {n}\noutside", ha="center", **look)
        else:
            shift, word = (
                (-0.2, "all runs") if reading == quantifiers.TOTAL else (0.2, "equal runs")
            )
            at = mean.get_yaxis_transform()
            text = f"SD ratio {interval}, {word}"
            mean.text(
                0.02, place + shift, text, transform=at, ha="left", **look | {"fontsize": 6.5}
            )


def _dot(ax: Axes, row: pd.Series, place: float) -> None:
    marker, face, edge = VERDICT_STYLE[row["contrast"]]
    ax.plot([row["ci_low"], row["ci_high"]], [place] * 2, color=edge, lw=1.2, zorder=3)
    ax.plot(row["value"], place, marker, mfc=face, mec=edge, ms=5.5, mew=1, zorder=4, clip_on=False)


def _verdict(ax: Axes, place: int, verdict: str) -> None:
    """The claim's own verdict, at the right."""
    look = {"fontsize": 7.5, "va": "center", "ha": "left", "transform": ax.get_yaxis_transform()}
    words, edge = "\n".join(textwrap.wrap(verdict, 14)), VERDICT_STYLE[verdict][2]
    weight = "bold" if verdict in (quantifiers.STANDS, quantifiers.FALLS) else "normal"
    ax.text(1.06, place, words, color=edge, weight=weight, **look)
