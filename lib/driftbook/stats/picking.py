"""Rows of the table `estimates`, and how they are read as text."""

import re

import pandas as pd


def picked(estimates: pd.DataFrame, **wanted: str | list[str]) -> pd.DataFrame:
    """The rows in which each named column has the wanted value, or one of the wanted values."""
    keep = pd.Series(True, index=estimates.index)
    for column, values in wanted.items():
        keep &= estimates[column].isin([values] if isinstance(values, str) else values)
    return estimates[keep]


def in_words(
    rows: pd.DataFrame, index: list[str], columns: str = "method", places: int = 2
) -> pd.DataFrame:
    """A table of estimates as text with their intervals, for reading: "1.20 [0.10, 2.30]"."""
    ends = rows[["value", "ci_low", "ci_high"]].itertuples(index=False)
    rows = rows.assign(shown=[plain(*row, places) for row in ends])
    kept = {"values": "shown", "aggfunc": "first", "sort": False}
    return rows.pivot_table(index=index, columns=columns, **kept).fillna("")


def plain(value: float, low: float, high: float, places: int = 2) -> str:
    """A number without a unit, with its interval."""
    if pd.isna(value):
        return "not estimable"
    interval = "" if pd.isna(low) else f" [{low:.{places}f}, {high:.{places}f}]"
    return with_minus(f"{value:.{places}f}{interval}")


def with_minus(text: str) -> str:
    """The text with true minus signs before digits."""
    return re.sub(r"-(?=\d)", "−", text)
