"""The record that an audit ends in, `audit.json`: its name, its areas, and how it is read.

Everything that is said of an audit (page, card, exit status, difference to an earlier one) is a
function of this record alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from driftbook.analyses import audit
from driftbook.analyses.audit import AUDIT_FORMAT
from driftbook.study.files import finite, not_the_file
from driftbook.study.reading import json_value

AREAS = tuple(audit.AREAS)
_LISTS = ("verdicts", "categories", "items", "judges", "not_tested", "licences", "doctor")
_TABLES = ("candidate", "base", "how", "dose", "provider_share")
_TEXTS = ("name", "made")
_NEEDED = ("area", "worse", "word")


def read_audit(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        ValueError: there is no such file, it is damaged, or it is no record of this format.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the audit.json that an audit wrote")
    if why := not_the_file(path):
        raise ValueError(f"{path}: {why}")
    try:
        value = json_value(path)
    except ValueError as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged: {said}; copy the file again") from None
    return checked_audit(value, str(path))


def checked_audit(value: Any, name: str = "the record") -> dict[str, Any]:
    """The value, where it is a record of this format.

    Raises:
        ValueError: it is another format or an older one, or lacks a part.
    """
    said = value.get("format") if isinstance(value, dict) else None
    if not isinstance(said, str) or not said.startswith("driftbook audit"):
        raise ValueError(
            f"{name} is no record of an audit; give the audit.json that an audit wrote"
        )
    if said != AUDIT_FORMAT:
        raise ValueError(
            f"{name} is of the format {said!r} and not {AUDIT_FORMAT!r}; audit the model again with"
            " this version"
        )
    wrong = [one for one in _LISTS if not isinstance(value.get(one), list)]
    wrong += [one for one in _TEXTS if not isinstance(value.get(one), str)]
    wrong += [one for one in _TABLES if not isinstance(value.get(one), dict)]
    rows = [row for part in ("verdicts", "items") if part not in wrong for row in value[part]]
    if not all(isinstance(row, dict) and isinstance(row.get("area"), str) for row in rows):
        wrong.append("area of each row")
    elif any(one not in row for row in value.get("verdicts") or () for one in _NEEDED):
        wrong.append("word of each verdict")
    if wrong:
        raise ValueError(f"{name} is damaged: it lacks its {wrong[0]}; copy the file again")
    return value


def areas_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The areas of every audit and those that this one has besides, such as a probe; of logs their
    tasks alone.
    """
    own = [row["area"] for row in record["verdicts"]]
    usual = () if record["candidate"].get("kind") == "log" else AREAS
    return tuple(dict.fromkeys([*usual, *own]))


def number_of(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number in a row, else None."""
    value = row.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return finite(value) if is_number else None


def rows_of(record: Mapping[str, Any], area: str) -> Iterator[dict[str, Any]]:
    """The verdicts of an area: one, or one for each benchmark or judge."""
    return (row for row in record["verdicts"] if row["area"] == area)
