"""What others have published since the original study, as numbers to put beside its claims."""

import pandas as pd

from driftbook.rereading import original_study
from driftbook.study.files import ROOT

SINCE = ROOT / "data" / "published_since.csv"
SINCE_COLUMNS = (
    "bears_on",
    "source",
    "setting",
    "quantity",
    "unit",
    "value",
    "ci_low",
    "ci_high",
    "level",
    "more_is",
    "read",
)
DIGEST = "digest"  # read second-hand
TOPICS = ("repairs", "judges")  # what is no claim of the ledger


def published_since(*bears_on: str) -> pd.DataFrame:
    """Numbers published since, of these claims or topics (all where none is given), to read: what
    they bear on, source, setting, quantity, number with its interval and level, unit, what more of
    it means. A source that was read second-hand is marked (digest).

    Raises:
        ValueError: no number bears on one of the names given.
    """
    rows = pd.read_csv(SINCE)
    if unknown := [name for name in bears_on if name not in set(rows["bears_on"])]:
        known = ", ".join(rows["bears_on"].unique())
        raise ValueError(f"nothing published since bears on {unknown[0]!r}; known: {known}")
    rows = rows[rows["bears_on"].isin(bears_on or rows["bears_on"])].reset_index(drop=True)
    sentences = original_study.cited("claims").set_index("claim")["sentence"]
    second_hand = rows["read"].eq(DIGEST).map({True: " (digest)", False: ""})
    return pd.DataFrame(
        {
            "bears on": rows["bears_on"].map(sentences).fillna(rows["bears_on"]),
            "source": rows["source"] + second_hand,
            "setting": rows["setting"],
            "quantity": rows["quantity"],
            "number": [_number(row) for row in rows.itertuples()],
            "unit": rows["unit"],
            "more is": rows["more_is"],
        }
    )


def _number(row) -> str:
    if pd.isna(row.ci_low):
        return f"{row.value:g}"
    return f"{row.value:g} ({row.ci_low:g} to {row.ci_high:g}, {row.level:g} %)"
