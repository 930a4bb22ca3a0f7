"""Positions of the audit page's figures, which its template draws: the effects with their
intervals, and how an interval narrows from look to look.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
# Of one small figure of the looks, in pixels: its size, and the room for its labels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 180, 42, 8, 8, 42


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten, about as
    many as asked for.
    """
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def signed(value: float) -> str:
    """A tick's label with its sign: "+10", "−5", "0"."""
    return f"{value:+g}".replace("-", "−") if value else "0"


def forest(rows: Sequence[Row]) -> dict[str, Any]:
    """The effects: for each row (difference, ci_low, ci_high, margin, worse) the places of its
    parts in percent of the width, and the ticks of the axis that all share.
    """
    ends = [0.0]
    for row in rows:
        ends += _known(row, ("difference", "ci_low", "ci_high"))
        ends += [_bad_side(row) * row["margin"]] if row.get("margin") is not None else []
    low, high = _widened(ends, 0.05)

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    placed = []
    for row in rows:
        zero, edge = at(0.0), at(_bad_side(row) * (row.get("margin") or 0.0))
        placed.append(
            {
                "dot": at(row.get("difference")),
                "low": at(row.get("ci_low")),
                "high": at(row.get("ci_high")),
                "zero": zero,
                "band": min(zero, edge),
                "band_width": round(abs(zero - edge), 2),
            }
        )
    marks = [{"at": at(tick), "label": signed(tick)} for tick in ticks(low, high, 7)]
    return {"rows": placed, "ticks": [mark for mark in marks if 3 <= mark["at"] <= 97]}


def narrowing(looks: Sequence[Row], verdict: Row) -> dict[str, Any]:
    """One area's looks: of each its place and its interval's ends in pixels of a figure of WIDTH x
    HEIGHT, with the ticks of both axes and the places of no difference and of the margin.
    """
    ends = [0.0]
    for look in looks:
        ends += _known(look, ("difference", "ci_low", "ci_high"))
    margin = verdict.get("margin")
    edge = None if margin is None else _bad_side(verdict) * margin
    low, high = _widened([*ends, *([] if edge is None else [edge])], 0.06)
    most = max([look["n_items"] for look in looks] + [1])

    def across(n: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * n / (most * 1.04), 1)

    def down(value: float | None) -> float | None:
        inner = HEIGHT - TOP - BOTTOM
        return None if value is None else round(TOP + inner * (high - value) / (high - low), 1)

    return {
        "points": [
            {
                "x": across(look["n_items"]),
                "dot": down(look.get("difference")),
                "low": down(look.get("ci_low")),
                "high": down(look.get("ci_high")),
            }
            for look in looks
        ],
        "x_ticks": [{"at": across(n), "label": f"{n:,.0f}"} for n in ticks(0, most, 4)],
        "y_ticks": [{"at": down(v), "label": signed(v)} for v in ticks(low, high)],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "zero": down(0.0),
        "margin": down(edge),
    }


def _bad_side(row: Row) -> int:
    """-1 where a fall is worse, 1 where a rise is."""
    return 1 if row.get("worse") == "rise" else -1


def _known(row: Row, keys: Iterable[str]) -> list[float]:
    return [row[key] for key in keys if row.get(key) is not None]


def _widened(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of the values with a share of it added on both sides; of one value, one point."""
    low, high = min(values), max(values)
    more = share * (high - low) or 1.0
    return low - more, high + more
