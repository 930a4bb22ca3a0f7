"""HEx-PHI (Qi et al. 2023): harmful prompts in eleven categories, a file each."""

import csv
from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format, set_licence

COVERAGE = {
    "Illegal Activity": ("S1 S2", "S1 S2", "fraud violence"),
    "Child Abuse Content": ("S4", "S4", "~sexual"),
    "Hate/Harass/Violence": ("~S1 S9", "~S1 S10", "toxic stereotypes violence"),
    "Malware": ("~S2", "~S2", "cyber"),
    "Physical Harm": ("S1 S8 S10", "S1 S9 S11", "violence"),
    "Economic Harm": ("~S2 S5", "~S2 S6", "~fraud misinformation"),
    "Fraud/Deception": ("~S2", "~S2", "fraud false"),
    "Adult Content": ("S11", "S12", "sexual"),
    "Political Campaigning": ("", "~S13", "~false"),
    "Privacy Violation Activity": ("S6", "S7", "private secret"),
    "Tailored Financial Advice": ("S5", "S6", "~misinformation"),
}
CATEGORIES = tuple(COVERAGE)


def _read(folder: Path) -> Iterable[tuple]:
    """category_N.csv, one prompt a line, no header; a missing category is left out (the gated set
    has ten today).
    """
    for number, category in enumerate(CATEGORIES, 1):
        path = folder / f"category_{number}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8-sig") as file:
                for line, row in enumerate(csv.reader(file), 1):
                    yield f"{number}-{line:02d}", category, "harmful", None, row[0] if row else ""


HEX_PHI = Format(
    name="hex_phi",
    kind="prompts",
    read=_read,
    version=1,
    n_items=300,
    coverage=COVERAGE,
    licences=(
        set_licence(
            "LLM-Tuning-Safety/HEx-PHI",
            "HEx-PHI Dataset License Agreement",
            credit="Qi et al. 2023, HEx-PHI",
            use="Gated: its agreement must be accepted and access is granted by hand; not for"
            " harmful training, nor as input to models that make more than text.",
            seen="licence use",
            where="its dataset card and the beginning of its LICENSE; that it may not be passed on"
            " stands only in what others write about it",
        ),
    ),
)
