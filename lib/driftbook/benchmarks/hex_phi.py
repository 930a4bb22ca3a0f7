"""HEx-PHI (Qi et al. 2023): harmful prompts in eleven categories, a file each."""

import re
from collections.abc import Iterable
from pathlib import Path

from driftbook.benchmarks.format import Format, set_licence
from driftbook.study.reading import utf8_text

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
# a field in quotation marks, or a line that begins with none
_LINE = re.compile(r'"((?:[^"]|"")*)"[ \t]*\r?(?:\n|\Z)|([^"\r\n][^\n]*?|)\r?(?:\n|\Z)')
_MARK, _NUMBERED = re.compile(r"[,;\t]"), re.compile(r"(\d+)[,;\t](?=\S)", re.ASCII)
_HEADERS = {"", "0", "id", "index", "prompt", "prompts", "text", "question", "query", "request"}
_HEADERS |= {"instruction", "input", "goal", "behavior", "category", "unnamed: 0"}


def _read(folder: Path) -> Iterable[tuple]:
    """category_N.csv, one prompt a line: see `prompt_lines`; a missing category is left out (the
    gated set has ten today).
    """
    for number, category in enumerate(CATEGORIES, 1):
        path = folder / f"category_{number}.csv"
        if path.exists():
            for row, prompt in enumerate(prompt_lines(path), 1):
                yield f"{number}-{row:02d}", category, "harmful", None, prompt


def prompt_lines(path: Path) -> list[str]:
    """The prompts of a file with one a line and no header. A line that begins with a quotation mark
    is a CSV field, which may hold line breaks; any other line is the prompt as it is, with its
    commas. Blank lines at the end are no prompts.

    Raises:
        ValueError: the file has a header or a column of row numbers, a field in quotation marks has
            others beside it, or one is not closed.
    """
    text, at, found = utf8_text(path).rstrip("\r\n\t "), 0, []
    while at < len(text):
        match = _LINE.match(text, at)
        if match is None:
            line = text.count("\n", 0, at) + 1
            raise ValueError(
                f"{path}: line {line} begins with a quotation mark and is not one field in"
                " quotation marks; put the whole prompt in them and double those within it"
            )
        quoted, plain = match.groups()
        found.append(plain if quoted is None else quoted.replace('""', '"'))
        at = match.end()
    _check_no_table(found, path)
    return found


def _check_no_table(lines: list[str], path: Path) -> None:
    """Raise a ValueError where the lines have a header or are numbered, as pandas writes them."""
    parts = [part.strip().lower() for part in _MARK.split(lines[0])] if lines else []
    if any(parts) and _HEADERS.issuperset(parts):
        raise ValueError(
            f"{path}: line 1 says {lines[0]!r}, which is a header, and this form has none; remove"
            " it (pandas: to_csv(header=False, index=False)), or name the format csv"
        )
    numbers = [match and int(match[1]) for match in map(_NUMBERED.match, lines)]
    if (
        numbers
        and numbers[0] in (0, 1)
        and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    ):
        raise ValueError(
            f"{path}: line 1 begins with a row number, as every line does; remove the column"
            " (pandas: to_csv(header=False, index=False))"
        )


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
