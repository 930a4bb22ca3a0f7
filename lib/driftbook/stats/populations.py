"""What the intervals of some estimates hold for, in words: read from their column `population`,
never typed.
"""

import re

import pandas as pd

SEEDS, RUNS = "seeds like these", "these runs"
NO_SEEDS = (
    "nothing is known of other seeds, since no setting was run twice or its runs all lie at 0 or"
    " 100 percent"
)


def parts_of(rows: pd.DataFrame) -> list[list[str]]:
    """The parts (seeds, prompts, base models) of each population of rows with an interval."""
    known = rows.loc[rows["ci_low"].notna(), "population"].dropna().unique()
    return [[part.strip() for part in re.split("[;,]", one)] for one in known]


def over_seeds(rows: pd.DataFrame) -> bool | None:
    """Whether the intervals hold for other seeds; None where some do and others do not, or where
    there is no interval.
    """
    found = {any(SEEDS in part for part in parts) for parts in parts_of(rows)}
    return found.pop() if len(found) == 1 else None


def over_prompts(rows: pd.DataFrame) -> str:
    """What the intervals say of prompts: "prompts like these", "these prompts", or both."""
    parts = {part for one in parts_of(rows) for part in one if "prompts" in part}
    if len(like := {one for one in parts if "like these" in one}) > 1:
        parts = parts - like | {"prompts (or families of them) like these"}
    return " or ".join(sorted(parts)) or "these prompts"


def held_for(rows: pd.DataFrame) -> str:
    """The seeds (or runs) and the prompts that the intervals hold for.

    "seeds like these and prompts like these", or "these runs and prompts like these" with
    NO_SEEDS; "" where no row has an interval.
    """
    if not parts_of(rows):
        return ""
    seeds, prompts = over_seeds(rows), over_prompts(rows)
    if seeds is None:
        return f"{prompts}, and for seeds like these where something is known of them"
    return f"{SEEDS} and {prompts}" if seeds else f"{RUNS} and {prompts} ({NO_SEEDS})"


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 run", "4 runs"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
