"""The figure of notebook 17: rates by the judge, and as labels correct them."""

from matplotlib.figure import Figure

from driftbook.analyses.labelling import CORRECTED, JUDGE, TRUTH
from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    TRAINED_METHODS,
    above,
    axis,
    bases,
    captioned,
    dots,
    drawn,
    floats,
    handle,
    name_rows,
    panels,
    under,
    zero,
)
from driftbook.stats.terms import CHANGE, UNSAFE

_NOTEBOOK = "17_labels"
_MARKS = {
    JUDGE: ("o", "by the judge"),
    CORRECTED: ("D", "corrected by labels"),
    TRUTH: ("x", "by labels of all answers"),
}

FACES = {JUDGE: "white"}  # of the marks that are hollow


@drawn(_NOTEBOOK)
def judge_correction(tables: dict) -> tuple[Figure, str]:
    rows = tables["estimates"]
    rows = floats(rows[rows["notebook"].eq(_NOTEBOOK)])
    rows = rows[rows["contrast"].eq(CHANGE)]
    parts = {name: rows[rows["estimator"].eq(name)] for name in _MARKS}
    methods = [method for method in TRAINED_METHODS if parts[CORRECTED]["method"].eq(method).any()]
    fig = None
    if methods:
        fig, axes = panels(tables, 1, [0.4 + 0.42 * len(methods)], sharex="all")
        for ax, base_model in zip(axes[0], bases(tables), strict=True):
            zero(ax)
            for place, method in enumerate(methods):
                for shift, (name, (mark, _)) in zip((-0.22, 0, 0.22), _MARKS.items(), strict=True):
                    row = parts[name].dropna(subset="value")
                    row = row[row["base_model"].eq(base_model) & row["method"].eq(method)]
                    dots(ax, row, place + shift, COLOURS[method], name == CORRECTED)
                    look = {"color": COLOURS[method], "mfc": FACES.get(name), "zorder": 5}
                    ax.plot(row["value"], [place + shift] * len(row), mark, ms=5, **look)
        name_rows(axes[0, 0], [METHOD_LABELS[method] for method in methods])
        under(axes[0], axis(UNSAFE))
        handles = [
            handle(words, "#555555", mark, ls="-", mfc=FACES.get(name), ms=5, lw=0)
            for name, (mark, words) in _MARKS.items()
            if len(parts[name])
        ]
        above(fig, handles, handlelength=None, columnspacing=None)
    text = (
        "The change in the unsafe-response rate by the judge's own verdicts, and corrected by a"
        " labelled sample (PPI++ within base model x method). Intervals over prompts like these,"
        " runs as they are; the corrected ones hold the error of the sample too. Crosses, where all"
        " labels are known: the truth."
    )
    return captioned(tables, fig, text, (UNSAFE, "safety"))
