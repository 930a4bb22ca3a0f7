"""Which categories of the benchmarks a judge's list of hazards covers."""

from collections.abc import Sequence

import pandas as pd

from driftbook.benchmarks.format import COVERED_JUDGES
from driftbook.benchmarks.formats import FORMATS
from driftbook.benchmarks.judges import JUDGES


def hazard_names(judge_format: str) -> dict[str, str]:
    """The names of a judge's hazard codes, of this version only; empty for a judge that has no list
    of hazards.

    Raises:
        ValueError: there is no such format.
    """
    if judge_format not in JUDGES:
        raise ValueError(f"format={judge_format!r}; expected one of {', '.join(JUDGES)}")
    return dict(JUDGES[judge_format].hazards)


def _codes(judge_format: str) -> dict[str, str]:
    """A judge's hazard codes by category: those that the benchmarks declare, and its own."""
    codes = dict(JUDGES[judge_format].coverage)
    if judge_format in COVERED_JUDGES:
        at = COVERED_JUDGES.index(judge_format)
        codes |= {name: row[at] for one in FORMATS.values() for name, row in one.coverage.items()}
    return codes


def coverage(judge_format: str, categories: Sequence[str]) -> pd.DataFrame:
    """One row per category: covered (full, partly, no), codes (the judge's, with their names).

    It is our reading of the published definitions. A judge that grades by a rubric has no list to
    miss a category; covered is null for a category that no benchmark and no judge declares.
    """
    names = hazard_names(judge_format)
    if JUDGES[judge_format].contexts is None:
        said = {"covered": None, "codes": "its own label, of the answer alone"}
        return pd.DataFrame({"category": list(categories), **said})
    if not names:
        return pd.DataFrame({"category": list(categories), "covered": "full", "codes": None})
    known = _codes(judge_format)
    rows = [(category, *_covered(known.get(category), names)) for category in categories]
    return pd.DataFrame(rows, columns=["category", "covered", "codes"], dtype=object)


def _covered(codes: str | None, names: dict[str, str]) -> tuple[str | None, str | None]:
    if not codes:
        return (None if codes is None else "no"), None
    named = [f"{code} {names[code]}" for code in codes.removeprefix("~").split()]
    return ("partly" if codes.startswith("~") else "full"), "; ".join(named)
