"""The register of a study: what its file declared, with hash and date, and whether any answer had
been seen by then.

A register is a record and no lock: who deletes it, or edits it, is not stopped. Its hash and date
can be sent elsewhere before the study runs.
"""

from datetime import UTC, datetime
from typing import Any

from driftbook.study.files import digest, read_json, write_json
from driftbook.study.study_file import Study

# once a run has one of these, somebody may have seen an outcome
SEEN = (
    "*/verdicts.parquet",
    "*/answers.parquet",
    "*/ratings.parquet",
    "*/drift.parquet",
    "*/**/drift.json",
)
FAMILIES = "primary"
# what the tests are made from, and the rule that ends a training early
STUDY_PARTS = {
    "seed",
    "date",
    "bases",
    "twins",
    "judges",
    "raters",
    "methods",
    "data",
    "training",
    "grid",
    "base_repetitions",
    "benchmarks",
    "drift",
    "mitigations",
}
_PATHS = {"path"}  # where a file lies on this machine


def declared(study: Study) -> dict[str, Any]:
    """The families of primary tests with their margins, and every section of the study file that
    their results depend on: grid and seeds, benchmarks with their sizes, judges with their
    thresholds, and the rule that stops a training.
    """
    found = study.model_dump(mode="json", include={FAMILIES, *STUDY_PARTS})
    return {name: _without_paths(section) for name, section in found.items()}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(one) for key, one in value.items() if key not in _PATHS}
    return [_without_paths(one) for one in value] if isinstance(value, list) else value


def register(study: Study) -> None:
    """Add what is declared to outputs/<study>/primary.json, where it is new, with the date and the
    number of runs of which an answer had been seen by then.
    """
    entries, now = registered(study), declared(study)
    if not entries or entries[-1]["declared"] != now:
        runs = study.folder / "runs"
        seen = {path.relative_to(runs).parts[0] for name in SEEN for path in runs.glob(name)}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"hash": digest(now), "declared": now, "registered": when}
        write_json(study.folder / "primary.json", [*entries, {**entry, "runs_scored": len(seen)}])


def registered(study: Study) -> list[dict[str, Any]]:
    """Every state of the declaration that was registered, oldest first; empty where none was."""
    path = study.folder / "primary.json"
    return read_json(path) if path.exists() else []


def deviations(study: Study) -> list[str]:
    """What was declared, changed or dropped after the first run was scored, a sentence each;
    nothing where all was declared before, or where there are no primary tests.
    """
    entries, now = registered(study), declared(study)
    before = [entry["declared"] for entry in entries if not entry["runs_scored"]]
    first = before[-1] if before else {FAMILIES: {}}
    if not now[FAMILIES] and not first[FAMILIES]:
        return []
    last = (
        f"{entries[-1]['runs_scored']} runs had been scored"
        if entries
        else "it was never registered by make study"
    )
    found = _of_families(first[FAMILIES], now[FAMILIES], last)
    return found + [
        f"{name}: changed when {last}, so the tests are not those declared: "
        + _changes(first.get(name) or {}, now[name])
        for name in sorted(STUDY_PARTS)
        if before and first.get(name) != now[name]
    ]


def _of_families(first: dict, now: dict, last: str) -> list[str]:
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


def _changes(old: Any, new: Any, at: str = "") -> str:
    """What differs, by the keys that lead there."""
    if all(
        isinstance(side, list) and any(isinstance(x, dict) for x in side) for side in (old, new)
    ):
        old, new = (dict(enumerate(side, 1)) for side in (old, new))  # the blocks of a grid
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{at or 'it'} was {old!r} and is {new!r}"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(
        _changes(old.get(name), new.get(name), f"{at} {name}".strip()) for name in names
    )
