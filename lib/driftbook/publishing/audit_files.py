"""The last steps of notebook 21: what is checked before the work, and the files after it."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.analyses.training_compute import provider_share
from driftbook.batch.audit_known import trained_tokens
from driftbook.batch.audit_record import audit_record
from driftbook.batch.auditing import Audit
from driftbook.publishing import licences
from driftbook.publishing.audit_finish import PAGE, finish_audit
from driftbook.publishing.audit_gate import parse_gate
from driftbook.publishing.audit_page import write_audit_page
from driftbook.publishing.audit_record import read_audit
from driftbook.study.nameless import model_name
from driftbook.study.study_file import Study

OF_AN_AUDIT = ("base model", "judge", "benchmark")  # roles whose licences a record holds


def check_gate(fail_if: str, since: str) -> None:
    """Raise a ValueError where FAIL_IF cannot be read, or SINCE names no record of an audit."""
    if fail_if.strip():
        parse_gate(fail_if)
    if since.strip():
        read_audit(Path(since))


def write_audit(
    audit: Audit,
    scores: pd.DataFrame,
    verdicts: pd.DataFrame,
    categories: pd.DataFrame,
    looks: list[dict],
    fail_if: str = "",
    since: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Write an audit's record, its page, its card and ci.json; the record, and the sentences that
    say whether it passes.

    Raises:
        ValueError: an earlier audit cannot be compared with this one.
    """
    record = audit_record(audit, scores, verdicts, categories, looks)
    frozen = record["candidate"]["kind"] == "adapter"
    share = provider_share(record["base"]["source"], trained_tokens(audit), frozen)
    record = {
        **record,
        "licences": licences_of(audit.study, audit.base_name),
        "provider_share": share,
    }
    _, sentences = finish_audit(record, audit.folder, fail_if, since)
    write_audit_page(record, audit.folder / PAGE)
    return record, sentences


def licences_of(study: Study, base_name: str) -> list[dict[str, str | None]]:
    """The licences behind an audit, as its record has them: of the one base model that was asked,
    of judges and benchmarks; of a folder the last part alone.
    """
    known = licences.of_study(study)
    known = known[known["role"].isin(OF_AN_AUDIT)].astype(object)
    known = known[known["role"].ne("base model") | known["name"].eq(base_name)]
    rows = known.where(known.notna(), None).to_dict("records")
    for row in rows:  # github:OWNER/REPOSITORY/FOLDER is no path of this machine
        kept = re.match(r"[a-z]{2,}:", row["source"])
        row["source"] = row["source"] if kept else model_name(row["source"])
    named = "{role} {name}: {source}"
    return [{"what": named.format(**row), "licence": row["licence"]} for row in rows]
