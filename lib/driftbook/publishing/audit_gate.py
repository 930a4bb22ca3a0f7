"""Whether an audited model may pass: conditions on the intervals of the differences to the base.

FAIL_IF="safety<-3,bias_ambiguous>5" says when to fail, in points of each area's own direction. A
condition is decided by the whole interval of the difference and not by its middle: the interval
lies inside the condition's region (fail), outside of it (pass), or on both sides (cannot tell). So
a model whose true difference lies outside a region is failed with at most half of the interval's
error, 2.5 % at 95 %, for each condition; and a pass is as sure. Several conditions are not adjusted
for one another. Unscored answers count at their worst, either way.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from driftbook.analyses import audit
from driftbook.publishing.audit_record import AREAS, areas_of, number_of, rows_of
from driftbook.stats.noninferiority import CANNOT_TELL
from driftbook.stats.picking import with_minus
from driftbook.stats.words import BETTER, NO_WORSE, WORSE

# exit statuses; the caller says COULD_NOT_RUN, where there is no record
PASS, FAIL, UNDECIDED, COULD_NOT_RUN = 0, 1, 2, 3
MEANINGS = {PASS: "pass", FAIL: "fail", UNDECIDED: CANNOT_TELL, COULD_NOT_RUN: "could not run"}
_SIGNS = "<>"
_EXAMPLE = "FAIL_IF='safety<-3,bias_ambiguous>5'"
_CONDITION = re.compile(r"\s*(?P<sign>[<>])\s*(?P<limit>[^,]*?)\s*(?:,|$)")


@dataclass(frozen=True)
class Condition:
    """Fail where the difference of `area` lies below (<) or above (>) `limit`, in points."""

    area: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.area}{self.sign}{self.limit:g}"

    def status(self, low: float | None, high: float | None) -> int:
        """What an interval of the difference says; an end that is not known is infinitely far."""
        low = -math.inf if low is None else low
        high = math.inf if high is None else high
        if self.sign == ">":
            low, high, limit = -high, -low, -self.limit
        else:
            limit = self.limit
        return FAIL if high < limit else PASS if low >= limit else UNDECIDED


# ---- conditions
def parse_gate(text: str, areas: Sequence[str] = AREAS) -> list[Condition]:
    """The conditions of FAIL_IF, separated by commas: an area, < or >, and a number of points.

    Raises:
        ValueError: the text is empty, or a condition has no known area, no sign or no number.
    """
    rest, found = text.strip(), []
    if not rest:
        raise ValueError(f"FAIL_IF is empty; give conditions such as {_EXAMPLE}, or leave it out")
    by_length = sorted(areas, key=len, reverse=True)  # a task's name may begin with another's
    while rest:
        fits = (area for area in by_length if rest.startswith(area))
        fits = (area for area in fits if rest[len(area) :].lstrip()[:1] in tuple(_SIGNS))
        if (area := next(fits, None)) is None:
            raise ValueError(_not_read(rest, areas))
        match = _CONDITION.match(rest, len(area))
        found.append(Condition(area, match["sign"], _points(match["limit"], rest)))
        rest, comma = rest[match.end() :].strip(), rest[: match.end()].endswith(",")
        if comma and not rest:
            raise ValueError(f"FAIL_IF ends in a comma; give conditions such as {_EXAMPLE}")
    return found


def _not_read(rest: str, areas: Sequence[str]) -> str:
    """Why the first condition cannot be read."""
    one = rest.partition(",")[0].strip()
    name = re.split("[<>]", one)[0].strip()
    if name in areas:
        return f"FAIL_IF: {one!r} has no sign; write it as {name}<-3 or {name}>3, in points"
    known = ", ".join(areas[:12]) + (" and others" if len(areas) > 12 else "")
    return f"FAIL_IF names no area in {one[:60]!r}; the areas are {known}"


def _points(text: str, rest: str) -> float:
    """The limit as a finite number of points."""
    try:
        value = float(text.replace("\N{MINUS SIGN}", "-"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text:
        one = rest.partition(",")[0].strip()
        raise ValueError(f"FAIL_IF: {one[:60]!r} has no number of points; write it as safety<-3")
    return value


# ---- status
def gate(record: Mapping[str, Any], conditions: Sequence[Condition] = ()) -> tuple[int, list[str]]:
    """The exit status (PASS, FAIL or UNDECIDED) and a sentence for each condition and verdict.

    Any condition that fails makes the status FAIL, else any that cannot be decided makes it
    UNDECIDED. An area that the record lacks cannot be decided. Without conditions the verdicts'
    words decide: any "worse" fails, else any "cannot tell" is undecided.
    """
    tested = [*_tested(record, conditions)] if conditions else [*_by_words(record)]
    if not tested:
        return UNDECIDED, ["The audit has no verdict, so nothing can be decided."]
    return worst(status for status, _ in tested), [sentence for _, sentence in tested]


def status_of(word: str) -> int:
    """The exit status of one verdict's word."""
    return {WORSE: FAIL, NO_WORSE: PASS, BETTER: PASS}.get(word, UNDECIDED)


def worst(statuses: Iterable[int]) -> int:
    """The status of several together: any failure fails, else any that is undecided is that."""
    found = set(statuses)
    return next(one for one in (FAIL, UNDECIDED, PASS) if one in found)


def _tested(
    record: Mapping[str, Any], conditions: Sequence[Condition]
) -> Iterator[tuple[int, str]]:
    for condition in conditions:
        rows = list(rows_of(record, condition.area))
        if not rows:
            has = ", ".join(dict.fromkeys(row["area"] for row in record["verdicts"])) or "none"
            yield (
                UNDECIDED,
                f"{condition}: {CANNOT_TELL}, since the audit did not ask about"
                f" {condition.area} (it has {has}).",
            )
        for row in rows:
            low, high = bounds(row, record["items"])
            status = condition.status(low, high)
            yield status, _sentence(condition, row, low, high, status)


def bounds(
    row: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """The ends of a verdict's interval, moved out by the unscored answers at their worst either
    way: a model whose answers cannot be read must not pass by those that can. Where one side of an
    item has a score (0 to 1), `items` of the record say how far the other can be from it.
    """
    low, high = (number_of(row, name) for name in ("ci_low", "ci_high"))
    n, lost = (number_of(row, name) or 0 for name in ("n_items", "n_unscored"))
    if None in (low, high) or not lost:
        return low, high
    most = 100.0 * (audit.AREAS[row["area"]].width if row["area"] in audit.AREAS else 1)
    key = row["area"], row.get("benchmark")
    own = (one for one in items if (one["area"], one.get("benchmark")) == key)
    ends = [[number_of(one, side) for side in audit.SIDES] for one in own]
    ends = [pair for pair in ends if None in pair]
    ends += [[None, None]] * (int(lost) - len(ends))
    # of a side without a score the lowest, 0, and the highest, 1
    least = sum((0 if new is None else new) - (1 if old is None else old) for old, new in ends)
    largest = sum((1 if new is None else new) - (0 if old is None else old) for old, new in ends)
    total = n + len(ends)
    return (n * low + most * least) / total, (n * high + most * largest) / total


def _sentence(
    condition: Condition, row: Mapping[str, Any], low: float | None, high: float | None, status: int
) -> str:
    """A condition's decision in words."""
    benchmark = row.get("benchmark")
    of = f" ({benchmark})" if benchmark and benchmark != row["area"] else ""
    start = f"{condition}{of}: {MEANINGS[status]}"
    if low is None and high is None:
        return f"{start}, since the difference has no interval."
    ends = " to ".join("unknown" if one is None else f"{one:.1f}" for one in (low, high))
    where = {FAIL: "lies wholly inside", PASS: "lies wholly outside", UNDECIDED: "reaches into"}
    lost = number_of(row, "n_unscored")
    more = f" with {lost:,.0f} unscored answers at their worst" if lost else ""
    said = f"the interval of the difference{more}, {ends} points, {where[status]} the region to"
    said += " fail in"
    if status == UNDECIDED:
        said += f" and out of it{'' if lost else _to_know(condition, row, low, high)}"
    return f"{start}, since {with_minus(said)}."


def _to_know(
    condition: Condition, row: Mapping[str, Any], low: float | None, high: float | None
) -> str:
    """About how many prompts could tell, if the difference stayed as it is: an interval's width
    falls with the square root of their number.
    """
    n, middle = number_of(row, "n_items"), number_of(row, "difference")
    if None in (n, middle, low, high) or middle == condition.limit:
        return ""
    needed = n * ((high - low) / 2 / (middle - condition.limit)) ** 2
    return f"; about {max(needed, n):,.0f} prompts could tell" if needed < 1e6 else ""


def _by_words(record: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    for area in areas_of(record):
        for row in rows_of(record, area):
            needed = number_of(row, "needed")
            more = "" if needed is None else f"; about {needed:,.0f} prompts could tell"
            yield status_of(row["word"]), f"{area}: {row['word']}{more}."
