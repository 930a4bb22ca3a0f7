"""The plan of a study: the key of every job, written only where it changed, so that Snakemake
redoes just what depends on the change; and in words, what is to be done again and why.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from driftbook.batch import keys
from driftbook.study import code, preregistration, sources
from driftbook.study.consistency import TWIN
from driftbook.study.environment import MAKING
from driftbook.study.files import (
    check_safetensors,
    check_writable,
    file_digest,
    private_folder,
    read_json,
    read_object,
    write_json,
)
from driftbook.study.study_file import Study

BYTES_PER_VARIANT = 2_000_000  # adapter and tables of one miniature variant, rounded up
SHOWN = 3  # changes that are named for a job


def write(study: Study) -> str:
    """Write keys/<job>.json for every job of the study, and forget jobs whose files are no longer
    what they recorded; a sentence on what is to be done again, empty where nothing is.

    Raises:
        ValueError: the output folder cannot be written, or a source is not to be had.
    """
    check_writable(study.folder, BYTES_PER_VARIANT * len(study.variants))
    private_folder(study.folder)
    preregistration.register(study)
    changes: dict[str, list[str]] = {}
    for job, value in _keys(study):
        path, done = _path(study, "keys", job), job_mark(study, job)
        made_of = read_mark(done)
        if not path.exists() or read_json(path) != value:
            write_json(path, value)
        if made_of is None:
            continue
        known = {name: made_of.get(name) for name in value}
        if known != value:
            changes[job] = list(_differences(known, value))
            if known.get("made") != value.get("made"):
                done.unlink()  # a model is to be made again, and is an input of all stages
            elif path.stat().st_mtime <= done.stat().st_mtime:
                os.utime(path)  # the code changed while the job ran
        elif disturbed := _disturbed(study.folder, made_of.get("runs", {}), job.split("/")[0]):
            changes[job] = [disturbed]
            _forget(study.folder, done)
    return _in_words(changes, study)


def job_mark(study: Study, job: str) -> Path:
    """The file that says that a job is done; it holds the key that the job had at its start."""
    return _path(study, "jobs", job)


def job_key(study: Study, job: str) -> dict[str, Any]:
    """The key that a job has now; empty where the study was not planned."""
    path = _path(study, "keys", job)
    return read_json(path) if path.exists() else {}


def _path(study: Study, kind: str, job: str) -> Path:
    return study.folder / kind / f"{job}.json"


def _keys(study: Study) -> Iterator[tuple[str, Any]]:
    """Every job and its key: a stage and a base model, a model to prepare, or an analysis."""
    data = {
        name: sources.stated(part, study)
        for name, part in {**study.data, **study.benchmarks}.items()
    }
    makes = code.fingerprint(code.of_notebook(keys.notebook("01_prepare"), "prepared"))
    for name, part in study.models.items():
        content = {"content": sources.stated(part, study), "data": data}
        if given := getattr(part, "chat_template", None):
            content["template"] = given
        twins = {
            which: sources.stated(one, study)
            for which, one in getattr(part, "checkpoints", {}).items()
            if one.source.startswith(TWIN)
        }
        content |= {"twins of pairs": twins} if twins else {}
        found = _key(content, "01_prepare", MAKING)
        if twins or part.source.startswith(TWIN):  # compared with all that is asked
            found["asked"] = [one.model_dump(mode="json") for one in study.benchmarks.values()]
        yield f"prepare/{name}", {**found, "made": [content, makes]}
    for stage in keys.stages(study):
        for base_model in study.bases:
            shared = keys.settings(stage, study, base_model, sources.stated)
            variants = study.of_stage(stage, base_model)
            wanted = {variant.run_id: keys.result_key(shared, variant) for variant in variants}
            del shared["packages"]
            texts = keys.texts_of([variant.fields() for variant in variants])
            found = _key(shared, keys.NOTEBOOKS[stage], MAKING, texts)
            yield f"{stage}/{base_model}", {**found, "variants": wanted}
    settings = study.model_dump(mode="json")
    for job, name in {"collect": "08_collect", **keys.analyses(study)}.items():
        yield job, _key(settings, name, keys.FITTING)
    report = code.by_file(code.of_module("driftbook.publishing.report"))
    yield "report", {"settings": settings, "code": report}


def _key(
    settings: dict, notebook: str, packages: tuple[str, ...], texts: frozenset[str] = frozenset()
) -> dict[str, Any]:
    parts = code.of_notebook(keys.notebook(notebook))
    files = code.by_file(parts, keys.texts_of(settings) | texts)
    return {"settings": settings, "code": files, "packages": keys.versions(packages)}


# ---- what is no longer as it was recorded
def read_mark(path: Path) -> dict | None:
    """A mark; None where it is lost or torn, so that the work is done again."""
    try:
        return read_object(path)
    except (FileNotFoundError, ValueError):
        return None


def _forget(folder: Path, job: Path) -> None:
    """Delete a job's mark and those of all that is made from all jobs: for a target that is there,
    Snakemake makes no missing input.
    """
    for path in (job, *(folder / "jobs").glob("*.json")):
        path.unlink()


def _disturbed(folder: Path, runs: dict[str, dict], stage: str) -> str:
    """Which run of a job has a file that changed since the job read or wrote it, in words; an
    adapter that was changed on purpose stays as it is.
    """
    for run_id, result in runs.items():
        if read_mark(folder / "runs" / run_id / f"{stage}.done.json") != result:
            return f"the mark of {run_id} changed"
        for name, known in {**result["inputs"], **result["files"]}.items():
            path = folder / "runs" / run_id / name
            found = file_digest(path)
            if found is not None and found != known and path.suffix == ".safetensors":
                remedy = f"put the whole file back, or delete {path.parents[1]} to train it again"
                check_safetensors(path, remedy)
            if found != known and not (stage == "train" and found is not None):
                return f"{path.name} of {run_id} changed"
    return ""


# ---- in words
def _differences(old: Any, new: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
    """What differs between two keys, in the words of the study file and the names of files."""
    if words == ("made",):
        return
    if words == ("variants",):
        if more := len(set(new) - set(old or ())):
            yield f"{more} new variants"
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                yield from _differences(old.get(name), new.get(name), (*words, name))
    else:
        kind, *rest = words
        yield (
            f"code of {rest[0]}" if rest and kind == "code" else ".".join(rest) or f"{kind} unknown"
        )


def _in_words(changes: dict[str, list[str]], study: Study) -> str:
    """What is to be done again and why: `judge (code of benchmarks/judging.py), report (...)`."""
    by_stage: dict[str, list[str]] = {}
    for job, found in changes.items():
        known = by_stage.setdefault(job.split("/")[0], [])
        known += [change for change in found if change not in known]
    grouped: dict[tuple[str, ...], list[str]] = {}
    for stage, found in by_stage.items():
        grouped.setdefault(tuple(found), []).append(stage)
    analyses, parts = set(keys.analyses(study)), []
    for found, stages in grouped.items():
        some = [stage for stage in stages if stage in analyses]
        names = [stage for stage in stages if stage not in analyses or len(some) == 1]
        names += [f"{len(some)} analyses"] if len(some) > 1 else []
        more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
        parts.append(f"{', '.join(names)} ({', '.join([*found[:SHOWN], *more])})")
    after = " and what is made from it" if set(by_stage) - analyses - {"report"} else ""
    return f"to do again: {', '.join(parts)}{after}" if parts else ""
