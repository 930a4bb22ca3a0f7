"""Figures of fairness: changes, bias, accuracy and the order of options in BBQ."""

from matplotlib.figure import Figure

from driftbook.figures.drawing import (
    by_part,
    captioned,
    changes_figure,
    drawn,
    left_out,
    lines_meant,
)
from driftbook.stats.terms import (
    ACCURACY_AMB,
    ACCURACY_DIS,
    BIAS_AMB,
    BIAS_DIS,
    FLIPS,
    TRAINED,
    UNTRAINED,
)


# ---- 10 fairness
@drawn("10_fairness")
def fairness_change(tables: dict) -> tuple[Figure, str]:
    shown = [(outcome, "bbq") for outcome in (ACCURACY_AMB, BIAS_AMB, ACCURACY_DIS, BIAS_DIS)]
    lines = lines_meant(tables, (TRAINED, UNTRAINED), *shown)
    text = (
        "Change in BBQ's accuracy and signed bias score over all dimensions, ambiguous and"
        " disambiguated contexts apart. A positive bias agrees with stereotypes; ambiguous bias"
        " shrinks where accuracy grows, by its definition."
        f" {left_out(tables, BIAS_AMB, BIAS_DIS)}{lines} Units are question families."
    )
    return captioned(
        tables, changes_figure(tables, shown, (TRAINED, UNTRAINED), 0.24), text, *shown
    )


@drawn("10_fairness")
def fairness_bias(tables: dict) -> tuple[Figure, str]:
    shown = [(BIAS_AMB, "bbq"), (BIAS_DIS, "bbq")]
    text = (
        "Signed bias score by dimension and method (trained runs, mean over runs); grey: the base"
        f" model. Zero: no lean either way. {left_out(tables, *(one for one, _ in shown))}No"
        " interval where no family differs."
    )
    return captioned(tables, by_part(tables, shown), text, *shown)


@drawn("10_fairness")
def fairness_accuracy(tables: dict) -> tuple[Figure, str]:
    shown = [(ACCURACY_AMB, "bbq"), (ACCURACY_DIS, "bbq")]
    text = (
        "BBQ accuracy by dimension and method (trained runs, mean over runs); grey: the base model."
    )
    return captioned(tables, by_part(tables, shown), text, *shown)


@drawn("10_fairness")
def fairness_order(tables: dict) -> tuple[Figure, str]:
    shown = [(FLIPS, "bbq")]
    lines = lines_meant(tables, (TRAINED, UNTRAINED), *shown)
    text = (
        "Change in the share of BBQ items whose answer is not the same when the options are shown"
        " in all three cyclic orders: a model that answers by the place and not by what stands"
        f" there. {lines} Units are question families."
    )
    return captioned(tables, changes_figure(tables, shown, (TRAINED, UNTRAINED)), text, *shown)
