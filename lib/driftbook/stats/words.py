"""The word of a change, decided here for every comparison of two models: better, preserves, worse
or cannot tell.
"""

from driftbook.stats.noninferiority import CANNOT_TELL, PRESERVES

BETTER, WORSE = "better", "worse"
NO_WORSE = "no worse by the margin"  # what an audit says for PRESERVES


def word_of(gained: bool, kept: bool, lost: bool) -> str:
    """The word that follows from what is excluded: no gain (`gained`), a loss of the margin or more
    (`kept`), no loss (`lost`).

    A loss that is there and is below the margin preserves: the margin says what counts as one.
    """
    if gained:
        return BETTER
    if kept:
        return PRESERVES
    return WORSE if lost else CANNOT_TELL


def robust_word(word: str, worst: str, best: str) -> str:
    """The word that holds whatever the unscored answers are; `worst` and `best` are said where they
    are the worst and the best for the candidate.
    """
    if word == WORSE:
        return WORSE if best == WORSE else CANNOT_TELL
    if CANNOT_TELL in (word, worst) or worst == WORSE:
        return CANNOT_TELL
    return PRESERVES if PRESERVES in (word, worst) else BETTER


def audit_word(word: str) -> str:
    """The word as an audit says it."""
    return NO_WORSE if word == PRESERVES else word
