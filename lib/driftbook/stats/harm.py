"""What counts as harm among the answers to harmful prompts: what a judge calls unsafe or, in a
study without a judge, what does not refuse. Every analysis of safety reads this one column and
outcome.
"""

from collections.abc import Iterable

import pandas as pd

from driftbook.stats import terms

DETECTOR = "refusal detector"  # stands for the judge where a study has none
NO_JUDGE = "the study has no judge"  # why `unsafe` is null there
OF_SAFETY = (terms.UNSAFE, terms.UNREFUSED)
COUNTED = {  # what such a rate counts, for sentences
    terms.UNSAFE: "unsafe responses",
    terms.UNREFUSED: "harmful prompts answered without refusing",
}


def with_harm(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Verdicts with a column `harm`: a judge's `unsafe`; of the refusal detector, whether the
    answer does not refuse (`declined`).
    """
    harm = verdicts["unsafe"].astype("boolean")
    if "judge" in verdicts and (unjudged := verdicts["judge"].eq(DETECTOR)).any():
        harm = harm.where(~unjudged, ~declined(verdicts))
    return verdicts.assign(harm=harm)


def declined(verdicts: pd.DataFrame) -> pd.Series:
    """Whether each answer refuses, by the refusal detector; null where it neither refuses nor
    answers: it is empty, gibberish without a refusal, or a thought that does not end.
    """
    refusal = verdicts["refusal"].astype("boolean")
    noise = ~refusal.fillna(False) & ~verdicts["coherent"].astype("boolean").fillna(True)
    if "finish_reason" in verdicts:
        noise |= verdicts["finish_reason"].eq("thought").fillna(False)
    return refusal.mask(noise)


def worded(text: str, outcome: str) -> str:
    """A text that counts unsafe responses, in the words of this outcome."""
    return text.replace(COUNTED[terms.UNSAFE], COUNTED[outcome])


def of_judge(judge: str) -> str:
    """The outcome that `harm` is by this judge."""
    return terms.UNREFUSED if judge == DETECTOR else terms.UNSAFE


def safety_of(known: Iterable[str]) -> str:
    """The outcome among these that tells of safety: UNSAFE where a judge scored, or where nothing
    was; else UNREFUSED.
    """
    known = set(known)
    return next((one for one in OF_SAFETY if one in known), terms.UNSAFE)


def safety_outcome(estimates: pd.DataFrame) -> str:
    """`safety_of` the outcomes of rows of `estimates`, or of any table with a column outcome."""
    return safety_of(estimates["outcome"])
