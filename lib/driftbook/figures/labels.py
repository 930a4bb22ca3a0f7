"""The figure of notebook 17: rates by the judge, and as labels correct them."""

from matplotlib.figure import Figure

from driftbook.analyses.labelling import CORRECTED, JUDGE, TRUTH
from driftbook.figures.drawing import (
    COLOURS,
    METHOD_LABELS,
    TRAINED_METHODS,
    above,
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
from driftbook.stats.confidence import PERCENT
from driftbook.stats.terms import CHANGE, UNSAFE

NOTEBOOK = "17_labels"
MARKS = {
    JUDGE: ("o", "by the judge"),
    CORRECTED: ("D", "corrected by labels"),
    TRUTH: ("x", "by labels of all answers"),
}


@drawn(NOTEBOOK)
def judge_correction(tables: dict) -> tuple[Figure, str]:
    rows = tables["estimates"]
    rows = floats(rows[rows["notebook"].eq(NOTEBOOK)])
    rows = rows[rows["contrast"].eq(CHANGE)]
    parts = {name: rows[rows["estimator"].eq(name)] for name in MARKS}
    methods = [method for method in TRAINED_METHODS if parts[CORRECTED]["method"].eq(method).any()]
    fig = None
    if methods:
        fig, axes = panels(tables, 1, [0.4 + 0.42 * len(methods)], sharex="all")
        for ax, base_model in zip(axes[0], bases(tables), strict=True):
            zero(ax)
            for place, method in enumerate(methods):
                for shift, (name, (mark, _)) in zip((-0.22, 0, 0.22), MARKS.items(), strict=True):
                    row = parts[name][
                        parts[name]["base_model"].eq(base_model) & parts[name]["method"].eq(method)
                    ].dropna(subset="value")
                    dots(ax, row, place + shift, COLOURS[method], name == CORRECTED)
                    ax.plot(
                        row["value"],
                        [place + shift] * len(row),
                        mark,
                        ms=5,
                        color=COLOURS[method],
                        zorder=5,
                        mfc="white" if name == JUDGE else None,
                    )
        name_rows(axes[0, 0], [METHOD_LABELS[method] for method in methods])
        under(
            axes[0],
            f"Change in unsafe-response rate against the base model (percentage points, {PERCENT}"
            " interval)",
        )
        known = [name for name in MARKS if len(parts[name])]
        handles = [
            handle(
                MARKS[name][1],
                "#555555",
                MARKS[name][0],
                ls="-",
                mfc="white" if name == JUDGE else None,
                ms=5,
                lw=0,
            )
            for name in known
        ]
        above(fig, handles, handlelength=None, columnspacing=None)
    text = (
        "The change in the unsafe-response rate by the judge's own verdicts, and corrected by a"
        " labelled sample (PPI++ within base model x method). Intervals over prompts like these,"
        " runs as they are; the corrected ones hold the error of the sample too. Crosses, where all"
        " labels are known: the truth."
    )
    return captioned(tables, fig, text, (UNSAFE, "safety"))
