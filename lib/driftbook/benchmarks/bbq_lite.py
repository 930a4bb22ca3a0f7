"""What arXiv 2511.00382 leaves out of BBQ-Lite and corrects in it, by BBQ-Lite's own ids.

BBQ-Lite is BIG-bench's draw from BBQ's templates (bigbench/benchmark_tasks/bbq_lite). The excluded
ids are those of the study's script (Code/Benchmark/fairness_eval.py at f03e765): both people are in
one group, or both are stereotyped. The corrected items name one person by words that contain the
other's ("no tattoos" and "tattoos", "African American" and "African"), so that BBQ-Lite tags both
alike.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from driftbook.benchmarks.bbq import TEMPLATES, item_row, item_table, local_folder
from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import json_value
from driftbook.study.sections import Source

# Items of each file, 16,076 in all.
ITEMS = {
    "Age": 1344,
    "Disability_status": 1156,
    "Gender_identity": 3344,
    "Nationality": 1880,
    "Physical_appearance": 1176,
    "Race_ethnicity": 4000,
    "Religion": 680,
    "SES": 1984,
    "Sexual_orientation": 512,
}
LITE = Source(
    source="github:google/BIG-bench/bigbench/benchmark_tasks/bbq_lite/resources",
    revision="092b196c1f8f14a54bbc62f24759d43bde46dd3b",
    files=tuple(f"{name}.json" for name in ITEMS),
)

# First and last id, both included.
EXCLUDED = {
    "Gender_identity": ((284, 287), (300, 307), (320, 323)),
    "Race_ethnicity": (
        (1032, 1055),
        (1080, 1087),
        (1104, 1151),
        (1168, 1175),
        (1192, 1199),
        (3608, 3647),
        (3656, 3663),
        (3696, 3719),
        (3736, 3743),
        (3792, 3799),
    ),
}

# The first words found in a person's option give the group. "" is in every text. The study's own
# file agrees with this rule on the 16 items of
# Physical_appearance that were compared (its other two files could not be looked up), but for 623:
# there it swaps the two people's groups.
_DRESS, _PREGNANT = (
    (("no ", "posDress"), ("", "negDress")),
    (("pregnant", "pregnant"), ("", "notPregnant")),
)
_GENDER, _AFRICAN = (
    (("female", "F"), ("male", "M")),
    (("African American", "African American"), ("African", "African")),
)
CORRECTED = {
    "Gender_identity": {(48, 51): _GENDER},
    "Physical_appearance": {
        (576, 579): _DRESS,
        (588, 591): _DRESS,
        (608, 611): _DRESS,
        (620, 623): _DRESS,
        (656, 659): _PREGNANT,
    },
    "Race_ethnicity": {(448, 451): _AFRICAN, (544, 547): _AFRICAN},
}


def excluded(dimension: str, example_id: int) -> bool:
    """Whether the study leaves the item out."""
    return any(first <= example_id <= last for first, last in EXCLUDED.get(dimension, ()))


def corrected(row: dict) -> dict:
    """The item of BBQ-Lite with the groups of its two people read from their options, if it is one
    that the study corrects; else as it is.
    """
    for (first, last), words in CORRECTED.get(row["category"], {}).items():
        if first <= int(row["example_id"]) <= last:
            return row | {
                "answer_info": {
                    name: _retagged(row[name], info, words)
                    for name, info in row["answer_info"].items()
                }
            }
    return row


def _retagged(option: str, info: list[str], words: tuple[tuple[str, str], ...]) -> list[str]:
    """The tags of an option; the UNKNOWN option keeps its own."""
    if info[1] == "unknown":
        return info
    group = next((group for word, group in words if word in option), info[1])
    return [group, group]


def load_lite(
    source: str | Path | Source = LITE,
    dimensions: Sequence[str] | None = None,
    variant: str = "study",
) -> pd.DataFrame:
    """The items of BIG-bench's BBQ-Lite, with the columns of `bbq.load`; item ids begin with
    `lite-`, because they are not BBQ's.

    variant `study` is what arXiv 2511.00382 asked: without its 200 excluded items and with its 32
    corrected groups, 15,876 in all nine dimensions; `all` is BBQ-Lite as it was published, 16,076.
    `source` is a folder of Age.json and so on, or a public source.

    Raises:
        ValueError: an unknown variant, a file that is absent or not whole, or an item that
            `bbq.load` would refuse.
    """
    if variant not in ("study", "all"):
        raise ValueError(f"variant={variant!r}; expected 'study' or 'all'")
    names = list(dimensions or ITEMS)
    folder = local_folder(source, [f"{name}.json" for name in names])
    rows = []
    for name in names:
        path = folder / f"{name}.json"
        examples = _examples(path)
        if variant == "study":
            examples = [row for row in examples if not excluded(name, _example_id(row, path))]
        change = corrected if variant == "study" else None
        rows += [item_row(row, path, change) for row in examples]
    items = item_table(rows, folder)
    return items.assign(item_id="lite-" + items.item_id)


def _examples(path: Path) -> list[dict]:
    """The examples of a file of BBQ-Lite: one JSON object with the key `examples`."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}; give the folder"
            " bigbench/benchmark_tasks/bbq_lite/resources of BIG-bench"
        )
    try:
        rows = json_value(path)["examples"]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no file of BBQ-Lite ({type(error).__name__}: {error}); fetch it again"
        ) from None
    expected = ITEMS.get(path.stem, 0)
    if len(rows) != expected:
        raise ValueError(
            f"{path} has {len(rows)} items and BBQ-Lite's has {expected}; fetch it again"
        )
    return rows


def _example_id(row: dict, path: Path) -> int:
    try:
        return int(row["example_id"])
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path}: an item has no field 'example_id' that is a number") from None


BBQ_LITE = Format(
    name="bbq_lite",
    kind="items",
    read=load_lite,
    version=1,
    n_items=15_876,
    tokens=99,
    template=TEMPLATES["letters"],
    licences=(
        set_licence(
            "github:google/BIG-bench",
            "Apache-2.0",
            credit="Srivastava et al. 2022, BIG-bench; its bbq_lite is from Parrish et al. 2022",
            use="Anyone; its bbq_lite derives from BBQ, which is CC-BY-4.0.",
            leaves="items text",
            where="nothing",
        ),
    ),
)
