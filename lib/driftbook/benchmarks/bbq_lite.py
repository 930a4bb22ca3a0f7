"""What arXiv 2511.00382 leaves out of BBQ-Lite and corrects in it, by BBQ-Lite's own ids. Loaded by
`bbq.load_lite`.

BBQ-Lite is BIG-bench's draw from BBQ's templates (bigbench/benchmark_tasks/bbq_lite). The excluded
ids are those of the study's script (Code/Benchmark/fairness_eval.py at f03e765): both people are in
one group, or both are stereotyped. The corrected items name one person by words that contain the
other's ("no tattoos" and "tattoos", "African American" and "African"), so that BBQ-Lite tags both
alike.
"""

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
PUBLIC = Source(
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
