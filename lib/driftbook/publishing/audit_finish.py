"""An audit's last step: its record, what is made of it, and its exit status, in one folder.

FOLDER/audit.json, card.md (the section for a model card), model_card.md (a whole card with that
section and its metadata), every_eval_ever.json and ci.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from driftbook.publishing.audit_card import audited_card, card_section
from driftbook.publishing.audit_formats import ci_json, every_eval_ever
from driftbook.publishing.audit_gate import COULD_NOT_RUN, gate, parse_gate
from driftbook.publishing.audit_record import areas_of, checked_audit
from driftbook.publishing.audit_since import since
from driftbook.study.files import read_json, replacing

CI_FILE, PAGE = "ci.json", "audit.html"
# what is made of a record, which itself stays: SINCE may name it
MADE = (PAGE, "card.md", "model_card.md", "every_eval_ever.json")
MADE += ("audits_compared.md", "audits.png", "audits.md")  # of several together
NOT_ENDED = "this audit has not ended: it is still running, or it was stopped"


def finish_audit(
    record: Mapping[str, Any], folder: Path, fail_if: str = "", earlier: str = ""
) -> tuple[int, list[str]]:
    """Write all files of an audit, and return its exit status and the sentences that say why.

    `fail_if` and `earlier` are FAIL_IF and SINCE as a user gives them, empty where not given.

    Raises:
        ValueError: the record lacks a part, FAIL_IF cannot be read, or the earlier audit cannot be
            read or compared; nothing is written then.
    """
    checked_audit(record)
    conditions = parse_gate(fail_if, areas_of(record)) if fail_if.strip() else []
    changes = since(record, earlier) if earlier.strip() else None
    status, sentences = gate(record, conditions)
    if changes is not None:
        sentences += [row["sentence"] for row in changes["areas"]] + changes["notes"]
    texts = {
        "audit.json": as_json(record),
        "card.md": card_section(record),
        "model_card.md": str(audited_card(record)),
        "every_eval_ever.json": as_json(every_eval_ever(record)),
        CI_FILE: ci_json(record, status, sentences, changes),
    }
    for name, text in texts.items():
        with replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8")
    return status, sentences


def begin(folder: Path) -> None:
    """Begin an audit in this folder: until it ends, ci.json says that it has not."""
    could_not_run(folder, NOT_ENDED)


def has_not_ended(folder: Path) -> bool:
    """Whether the audit that was begun in this folder has said nothing since."""
    return read_json(folder / CI_FILE)["sentences"] == [NOT_ENDED]


def could_not_run(folder: Path, sentence: str) -> int:
    """The exit status of an audit that could not run; ci.json says why, and what an earlier audit
    made here goes, since it would be read as this one's.
    """
    for name in MADE:
        (folder / name).unlink(missing_ok=True)
    with replacing(folder / CI_FILE) as new:
        new.write_text(ci_json(None, COULD_NOT_RUN, [sentence]), encoding="utf-8")
    return COULD_NOT_RUN


def as_json(value: Any) -> str:
    """JSON as it is written: no NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
