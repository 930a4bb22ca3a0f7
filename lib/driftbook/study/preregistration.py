"""The register of a study's primary tests: what its file declared, with hash and date, and whether
any answer had been scored by then.

A register is a record and no lock: who deletes it, or edits it, is not stopped. Its hash and date
can be sent elsewhere before the study runs.
"""

from datetime import UTC, datetime
from typing import Any

from driftbook.study.files import digest, read_json, write_json
from driftbook.study.study_file import Study

SCORED = (
    "verdicts",
    "answers",
    "ratings",
)  # once a run has one of these, somebody may have seen an outcome


def declared(study: Study) -> dict[str, Any]:
    """The families of primary tests as the study file has them now."""
    return {name: family.model_dump(mode="json") for name, family in study.primary.items()}


def register(study: Study) -> None:
    """Add what is declared to outputs/<study>/primary.json, where it is new, with the date and the
    number of runs that were scored by then.
    """
    entries, now = registered(study), declared(study)
    if not entries or entries[-1]["declared"] != now:
        scored = {
            path.parent.name
            for name in SCORED
            for path in (study.folder / "runs").glob(f"*/{name}.parquet")
        }
        when = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            study.folder / "primary.json",
            [
                *entries,
                {
                    "hash": digest(now),
                    "declared": now,
                    "registered": when,
                    "runs_scored": len(scored),
                },
            ],
        )


def registered(study: Study) -> list[dict[str, Any]]:
    """Every state of the declaration that was registered, oldest first; empty where none was."""
    path = study.folder / "primary.json"
    return read_json(path) if path.exists() else []


def deviations(study: Study) -> list[str]:
    """What was declared, changed or dropped after the first run was scored, a sentence each;
    nothing where all was declared before.
    """
    entries = registered(study)
    before = [entry["declared"] for entry in entries if not entry["runs_scored"]]
    first, now = (before[-1] if before else {}), declared(study)
    last = (
        f"{entries[-1]['runs_scored']} runs had been scored"
        if entries
        else "it was never registered by make study"
    )
    found = [
        f"{name}: declared when {last}, so its tests are exploratory"
        for name in now
        if name not in first
    ]
    found += [
        f"{name}: changed when {last}: {_changes(first[name], now[name])}"
        for name in now
        if name in first and first[name] != now[name]
    ]
    return found + [
        f"{name}: declared at first, and no longer tested" for name in first if name not in now
    ]


def _changes(old: dict, new: dict) -> str:
    return "; ".join(
        f"{key} was {old[key]!r} and is {new[key]!r}" for key in new if old.get(key) != new[key]
    )
