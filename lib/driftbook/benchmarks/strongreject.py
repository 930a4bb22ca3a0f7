"""StrongREJECT (Souly et al. 2024): harmful prompts in strongreject_dataset.csv."""

from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import csv_rows


def _read(path: Path) -> Iterable[tuple]:
    """The set has no ids, so rows are numbered."""
    for number, row in enumerate(csv_rows(path)):
        yield f"sr-{number:03d}", row["category"], "harmful", row["source"], row["forbidden_prompt"]


STRONGREJECT = Format(
    name="strongreject",
    kind="prompts",
    read=_read,
    version=1,
    n_items=313,
    licences=(
        set_licence(
            "github:alexandrasouly/strongreject",
            "MIT",
            credit="Souly et al. 2024, StrongREJECT",
            use="Anyone; some of its prompts come from other sets.",
            leaves="items text",
            where="nothing but others' notes that say MIT",
        ),
    ),
)
