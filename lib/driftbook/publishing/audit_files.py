"""The last steps of notebook 21: what is checked before the work, and the files after it."""

from pathlib import Path
from typing import Any

from driftbook.analyses.training_compute import provider_share
from driftbook.publishing import licences
from driftbook.publishing.audit_finish import finish_audit
from driftbook.publishing.audit_gate import parse_gate
from driftbook.publishing.audit_page import write_audit_page
from driftbook.publishing.audit_record import read_audit
from driftbook.study.study_file import Study

PAGE = "audit.html"
OF_AN_AUDIT = ("base model", "judge", "benchmark")  # roles whose licences a record holds


def check_gate(fail_if: str, since: str) -> None:
    """Raise a ValueError where FAIL_IF cannot be read, or SINCE names no record of an audit."""
    if fail_if.strip():
        parse_gate(fail_if)
    if since.strip():
        read_audit(Path(since))


def write_audit(
    record: dict[str, Any], study: Study, folder: Path, fail_if: str = "", since: str = ""
) -> list[str]:
    """Write the record, its page, its card and ci.json; the sentences that say whether it passes.

    Raises:
        ValueError: an earlier audit cannot be compared with this one.
    """
    known = licences.of_study(study)
    known = known[known["role"].isin(OF_AN_AUDIT)].astype(object)
    rows = known.where(known.notna(), None).itertuples()
    said = [
        {"what": f"{row.role} {row.name}: {row.source}", "licence": row.licence} for row in rows
    ]
    frozen = record["candidate"]["kind"] == "adapter"
    share = provider_share(record["base"]["source"], None, frozen)
    record = {**record, "licences": said, "provider_share": share}
    _, sentences = finish_audit(record, folder, fail_if, since)
    write_audit_page(record, folder / PAGE)
    return sentences
