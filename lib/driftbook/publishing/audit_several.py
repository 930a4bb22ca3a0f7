"""ADAPTERS="a b c": several adapters of one base model, audited one after another and compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.analyses.audit import in_short
from driftbook.analyses.audits import against_base, against_each_other, check_together
from driftbook.figures.audits import audits_compared
from driftbook.figures.drawing import save_figure
from driftbook.publishing.audit_gate import status_of, worst
from driftbook.stats.confidence import INTERVAL
from driftbook.study.files import replacing


def write_several(
    records: Mapping[str, dict[str, Any]], margin: float, folder: Path
) -> tuple[int, pd.DataFrame, pd.DataFrame]:
    """Compare audits by name: the exit status (any "worse" fails, else any "cannot tell" is
    undecided), a table of each against the base model, and one of each against each other. Writes
    both as Markdown with a figure.

    Raises:
        ValueError: they are not of the same base model, asked the same way.
    """
    check_together(records)
    own = against_base(records, margin)
    tables = {"Each against the base model": shown(own)}
    pairs = against_each_other(records, margin) if len(records) > 1 else pd.DataFrame()
    if len(pairs):
        tables["Each against each other: the words are about the one named first"] = shown(pairs)
    caption = (
        "Difference of each adapter to their base model, an area per panel, with its"
        f" {INTERVAL}. Filled: worse or better; grey band: the margin of {margin:g} points. Tests"
        f" are adjusted over all {len(own)} comparisons. Each row is one adapter, not its recipe."
    )
    save_figure(audits_compared(own), folder, "audits", caption, "make audit")
    parts = [f"## {title}\n\n{table.to_markdown()}\n" for title, table in tables.items()]
    with replacing(folder / "audits_compared.md") as new:
        new.write_text("# Adapters compared\n\n" + "\n".join(parts), encoding="utf-8")
    status = worst(map(status_of, own["word"]))
    return status, *(tables.values() if len(pairs) else (shown(own), pairs))


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """A row per name, a column per area: difference, interval and word."""
    cells = [in_short(row) for row in found.to_dict("records")]
    table = found[["name", "title"]].assign(cell=cells)
    order = table["title"].unique()
    return table.pivot(index="name", columns="title", values="cell")[order]
