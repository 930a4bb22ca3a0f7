"""Prompts of your own in a CSV file: prompt_id, category, prompt, and a fourth column `kind`, which
may say which prompts are benign look-alikes.
"""

from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format
from driftbook.study.reading import csv_rows, in_short

KINDS = ("harmful", "benign look-alike")


def _read(path: Path) -> Iterable[tuple]:
    for row in csv_rows(path):
        kind = row.get("kind") or "harmful"
        if kind not in KINDS:
            raise ValueError(
                f"{path}: prompt {in_short(row['prompt_id'])} is of the kind {in_short(kind)};"
                f" expected {' or '.join(KINDS)}"
            )
        yield row["prompt_id"], row["category"], kind, None, row["prompt"]


OWN_PROMPTS = Format(name="csv", kind="prompts", read=_read, version=1, n_items=100)  # a guess
