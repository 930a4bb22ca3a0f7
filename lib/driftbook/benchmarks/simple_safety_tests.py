"""SimpleSafetyTests (Vidgen et al. 2023): a hundred harmful prompts in five areas."""

from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import csv_rows


def _read(path: Path) -> Iterable[tuple]:
    """The column is `prompt` on the hub and `prompts_final` on GitHub."""
    for row in csv_rows(path):
        text = row["prompts_final"] if "prompts_final" in row else row["prompt"]
        yield row["id"], row["harm_area"], "harmful", None, text


_LICENCE = set_licence(
    "github:bertiev/SimpleSafetyTests",
    "CC-BY-NC-4.0",
    credit="Vidgen et al. 2023, SimpleSafetyTests",
    use="Non-commercial, with attribution; some prompts are about child abuse, and the copy on the"
    " hub says cc-by-2.0.",
    leaves="items",
    seen="licence use",
    where="LICENSE and README.md of the repository",
)
SIMPLE_SAFETY_TESTS = Format(
    name="simple_safety_tests",
    kind="prompts",
    read=_read,
    version=1,
    n_items=100,
    licences=(
        _LICENCE,
        _LICENCE.elsewhere(
            "Bertievidgen/SimpleSafetyTests",
            licence="CC-BY-2.0",
            use="Anyone, with attribution; some prompts are about child abuse, and the same set on"
            " GitHub says CC-BY-NC-4.0, so take it as non-commercial.",
            where="its page's licence tag",
        ),
    ),
)
