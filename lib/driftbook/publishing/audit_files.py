"""The files of an audit: its record, page and card, and what the gate says of it."""

from pathlib import Path
from typing import Any

from driftbook.publishing import licences
from driftbook.study.files import check_writable, read_json, write_json
from driftbook.study.study_file import Study

RECORD, PAGE, GATE = "audit.json", "audit.html", "gate.json"


def write_audit(
    record: dict[str, Any], study: Study, folder: Path, fail_if: str = "", since: str = ""
) -> dict[str, Any]:
    """Write audit.json, audit.html, card.md and gate.json; what the gate says: status, sentences,
    page.
    """
    check_writable(folder)
    known = licences.of_study(study)
    record = record | {
        "licences": [
            {"what": f"{row.role} {row.name}: {row.source}", "licence": row.licence}
            for row in known.itertuples()
            if row.role in ("base model", "judge", "benchmark")
        ]
    }
    write_json(folder / RECORD, record)
    status = 1 if any(row["word"] == "worse" for row in record["verdicts"]) else 0
    said = [row["sentence"] for row in record["verdicts"]]
    found = {"status": status, "sentences": said, "page": str(folder / PAGE)}
    write_json(folder / GATE, found)
    return found
