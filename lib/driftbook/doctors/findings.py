"""Findings about an adapter and about a study, and how their sentences list names."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from driftbook.study.nameless import nameless

STUDY_COLUMNS = ["finding", "severity", "where", "sentence", "statistic", "p", "p_adjusted"]


@dataclass(frozen=True)
class Finding:
    """An error, warning or note; a sentence; and the module or tensor that shows it best."""

    severity: str
    finding: str
    sentence: str
    module: str | None = None


error, warning, note = (partial(Finding, name) for name in ("error", "warning", "note"))


def plain_sentence(text: str) -> str:
    """A sentence on one line, without users' names and folders: findings are published."""
    return nameless(" ".join(text.split()))


def named(names: Iterable, most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def times(shape: Iterable[int]) -> str:
    """A shape in words: 4 x 8."""
    return " x ".join(map(str, shape))


# ---- of a study
def finding_row(
    finding: str,
    severity: str,
    where,
    sentence: str,
    statistic: float | None = None,
    p: float | None = None,
    adjusted: float | None = None,
) -> dict:
    """A row of the study check; `where` is a name or several; the sentence is put on one line,
    nameless.
    """
    where = where if isinstance(where, str) else ", ".join(map(str, where))
    values = (finding, severity, where, plain_sentence(sentence), statistic, p, adjusted)
    return dict(zip(STUDY_COLUMNS, values, strict=True))


def unchecked_row(finding: str, why: str) -> dict:
    """The row of what could not be checked, and why."""
    return finding_row(finding, "note", "", f"not checked: {why}")


def some_of(names, total: int | None = None) -> str:
    """How many there are (of a total) and the first few names: 4 of 9 (a, b, c and 1 more)."""
    return f"{len(names)}{'' if total is None else f' of {total}'} ({named(names)})"
