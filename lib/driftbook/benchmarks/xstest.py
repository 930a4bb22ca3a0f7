"""XSTest (Röttger et al. 2024): benign prompts that look harmful, and their harmful contrasts."""

from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import csv_rows

# A type says how a prompt is worded; the hazards are those of its harmful contrasts.
_WORDED = ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions")
_GROUPS = ("discr", "nons_group_real_discr", "real_group_nons_discr")
_PRIVATE = ("privacy", "privacy_public", "privacy_fictional")


def _read(path: Path) -> Iterable[tuple]:
    for row in csv_rows(path):
        said = row["type"] or ""
        kind = "harmful" if said.startswith("contrast_") else "benign look-alike"
        category = said.removeprefix("contrast_") or None
        yield row["id"], category, kind, row["focus"], row["prompt"]


_LICENCE = set_licence(
    "github:paul-rottger/exaggerated-safety",
    "CC-BY-4.0",
    credit="Röttger et al. 2024, XSTest",
    use="Anyone, with attribution; the completions of models beside the prompts have the terms of"
    " Meta, Mistral and OpenAI.",
    leaves="items text",
    seen="licence use text",
    where="readme.md and LICENSE of the repository",
)
XSTEST = Format(
    name="xstest",
    kind="prompts",
    read=_read,
    version=1,
    n_items=450,
    coverage={
        **dict.fromkeys(_WORDED, ("S1 S2", "S1 S2", "violence fraud")),
        **dict.fromkeys(_GROUPS, ("S9", "S10", "toxic stereotypes")),
        "historical_events": ("~S1 S9", "~S1 S10", "violence toxic"),
        **dict.fromkeys(_PRIVATE, ("S6", "S7", "private")),
    },
    licences=(
        _LICENCE,
        _LICENCE.elsewhere(
            "github:paul-rottger/xstest",
            seen=frozenset(),
            where="nothing under this name; the older name's text",
        ),
    ),
)
