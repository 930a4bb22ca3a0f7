"""What outcomes and their units are called in figures and reports."""

import re

from driftbook.stats.terms import (
    ACCURACY_AMB,
    ACCURACY_DIS,
    BEGUN_BENIGN,
    BEGUN_HARMFUL,
    BIAS_AMB,
    BIAS_DIS,
    CORRECT,
    FLIPS,
    LOSS,
    REFUSED,
    UNREFUSED,
    UNSAFE,
)

# of outcomes, in the order of figures; a further outcome is called by its name up to the unit
SHORT = {
    UNSAFE: "unsafe-response rate",
    UNREFUSED: "non-refusal rate",
    REFUSED: "refusal rate",
    ACCURACY_AMB: "accuracy, ambiguous",
    ACCURACY_DIS: "accuracy, disambiguated",
    BIAS_AMB: "bias score, ambiguous",
    BIAS_DIS: "bias score, disambiguated",
    FLIPS: "order-dependent answers",
    LOSS: "loss on utility answers",
    CORRECT: "correct utility answers",
    BEGUN_HARMFUL: "probability that an answer begins as a refusal",
    BEGUN_BENIGN: "probability that an answer begins as a refusal",
}


def short_name(outcome: str) -> str:
    """An outcome in few words: those of SHORT, or its name up to its unit."""
    return SHORT.get(outcome, outcome.partition(" (")[0])


def unit_of(outcome: str, of_percent: str = "percentage points") -> str:
    """The unit of a change, from the brackets in the outcome's name: points of a scale ("1 to 10"),
    `of_percent` of percentages.
    """
    named = re.search(r"\(([^()]+)\)", outcome)
    unit = named[1] if named else "percent"
    return of_percent if unit == "percent" else "points" if " to " in unit else unit
