"""The plan of a study: the key of every job, written only where it changed, so that Snakemake
redoes just what depends on the change; and in words, what is to be done again and why.

A job is due where its mark does not hold the key that it has now, or what it made is no longer as
the mark says: content decides. Snakemake goes by the times of files, and so the plan sets these:
the key of a job that is due is newer than its mark, and that of any other is not.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from driftbook.batch import devices, keys
from driftbook.batch.shards import Shards, dealt, path_of, read_shards
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
from driftbook.study.study_file import Study, study_digest

BYTES_PER_VARIANT = 2_000_000  # adapter and tables of one miniature variant, rounded up
SHOWN = 3  # changes that are named for a job
LONG_AGO = 1.0  # before any mark
COMMON = ("settings", "code", "packages", "base")  # of a stage's key what all its jobs share


def write(study: Study, workers: int = 1, memory: float | None = None) -> str:
    """Deal the study's variants to jobs for so many workers, write keys/<job>.json for every job,
    and make those due whose files are no longer what they recorded; a sentence on what is to be
    done again, empty where nothing is. `memory` is that of the devices that jobs will run on, in
    bytes, where it is not this machine's.

    Raises:
        ValueError: the output folder cannot be written, or a source is not to be had.
    """
    check_writable(study.folder, BYTES_PER_VARIANT * len(study.variants))
    private_folder(study.folder)
    preregistration.register(study)
    shards = dealt(study, workers)
    planned = dict(_keys(study, shards))
    _deal_marks(study, shards, planned)
    changes: dict[str, list[str]] = {}
    for job, value in planned.items():
        path, done = path_of(study, "keys", job), job_mark(study, job)
        if read_mark(path) != value:
            write_json(path, value)
        made_of = read_mark(done)
        if made_of is None:
            done.unlink(missing_ok=True)  # a torn one
        elif why := _why_due(study, job, value, made_of, memory):
            changes[job] = why
            if made_of.get("made") != value.get("made"):
                done.unlink()  # a model is to be made again, and is an input of all stages
            else:
                _make_due(study, job)
        else:
            _in_order(path, done)
    return _in_words(changes, study)


def _make_due(study: Study, job: str) -> None:
    """Have Snakemake do a job that has a mark; what it last said of itself is of no more use."""
    done, now = job_mark(study, job), time.time()
    when = min(done.stat().st_mtime, now - 1)
    os.utime(done, (when, when))
    os.utime(path_of(study, "keys", job), (now, now))
    path_of(study, "progress", job).unlink(missing_ok=True)


def _in_order(key: Path, mark: Path) -> None:
    """Give the key and the mark of a job that is not due times by which Snakemake sees that: a
    clock may have been ahead, and a key may have been written again as it was.
    """
    when, now = mark.stat().st_mtime, time.time()
    if when > now:
        os.utime(mark, (now, now))
    if key.stat().st_mtime > min(when, now):
        os.utime(key, (LONG_AGO, LONG_AGO))


def due(study: Study, shards: Shards, memory: float | None = None) -> set[str]:
    """The jobs whose mark is not there or does not hold, were the study dealt so, without a change
    to any file; what is made from what they make is to be done after them. `memory` as of `write`.

    Raises:
        ValueError: a source is not to be had.
    """
    found, pooled = set(), _pooled(study)
    for job, value in _keys(study, shards):
        made_of = _dealt_mark(pooled, value) if "variants" in value else None
        made_of = made_of or read_mark(job_mark(study, job))
        if made_of is None or _why_due(study, job, value, made_of, memory):
            found.add(job)
    return found


def _why_due(
    study: Study, job: str, value: dict, made_of: dict, memory: float | None = None
) -> list[str]:
    """Why a job with a mark is to be done again, in words; empty where it is not."""
    known = {name: made_of.get(name) for name in value}
    if known != value:
        return list(_differences(known, value))
    disturbed = _disturbed(study.folder, made_of.get("runs", {}), job.split("/")[0], memory)
    return [disturbed] if disturbed else list(_lost(study.folder, made_of.get("files", {})))


def job_mark(study: Study, job: str) -> Path:
    """The file that says that a job is done; it holds the key that the job had at its start."""
    return path_of(study, "jobs", job)


def job_key(study: Study, job: str) -> dict[str, Any]:
    """The key that a job has now; empty where the study was not planned."""
    path = path_of(study, "keys", job)
    return read_json(path) if path.exists() else {}


def job_of(study: Study, stage: str, base_model: str, run_ids: set[str]) -> str | None:
    """The job of the plan that does just these variants; None where there is none, or the study
    file says something else than when it was planned.
    """
    shards = read_shards(study)
    if shards is None or shards.study != study_digest(study):
        return None
    jobs = shards.jobs(stage, base_model)
    return next((job for job in jobs if set(shards.run_ids(job)) == run_ids), None)


# ---- the marks of another number of shards
def _pooled(study: Study) -> dict[str, tuple[dict, dict]]:
    """Of every variant in a mark of a stage's jobs: the mark, and the variant's own part of it, by
    STAGE/BASE/RUN_ID.
    """
    found = {}
    for path in sorted((study.folder / "jobs").glob("*/*/*.json")):
        mark = read_mark(path)
        stage, base = path.parts[-3:-1]
        if isinstance(mark, dict) and mark.keys() >= {"variants", "runs"}:
            for run_id in mark["variants"]:
                found[f"{stage}/{base}/{run_id}"] = mark, mark["runs"].get(run_id)
    return found


def _dealt_mark(pooled: dict[str, tuple[dict, dict]], value: dict) -> dict | None:
    """The mark of a job that is put together from those that its variants are in; None where one of
    them is in none, or they are of different keys.
    """
    stage, base = value["settings"]["stage"], value["base"]
    names = {run_id: f"{stage}/{base}/{run_id}" for run_id in value["variants"]}
    if not names or not all(name in pooled for name in names.values()):
        return None
    parts = {run_id: pooled[name] for run_id, name in names.items()}
    heads = [{name: mark.get(name) for name in COMMON} for mark, _ in parts.values()]
    if any(head != heads[0] for head in heads):
        return None
    variants = {run_id: mark["variants"][run_id] for run_id, (mark, _) in parts.items()}
    return {
        **heads[0],
        "variants": variants,
        "runs": {run_id: own for run_id, (_, own) in parts.items() if own is not None},
    }


def _deal_marks(study: Study, shards: Shards, planned: dict[str, dict]) -> None:
    """Marks for the present shards from those of other ones, so that nothing is done again because
    it was dealt anew; files of jobs that are no longer planned go.
    """
    jobs = [job for job, value in planned.items() if "variants" in value]
    kept = {job_mark(study, job) for job in jobs}
    there = set((study.folder / "jobs").glob("*/*/*.json"))
    moved = [job for job in jobs if _is_of_others(read_mark(job_mark(study, job)), planned[job])]
    if moved or there - kept:
        pooled = _pooled(study)
        newest = max((path.stat().st_mtime for path in there), default=0.0)
        for job in moved:
            if (mark := _dealt_mark(pooled, planned[job])) is not None:
                write_json(job_mark(study, job), mark)
        # of one time, so that none looks older than what it was made from: content says what is
        for job in jobs if pooled else ():
            if job_mark(study, job).exists():
                os.utime(job_mark(study, job), (newest, newest))
    for kind in ("jobs", "keys", "progress"):
        for path in set((study.folder / kind).glob("*/*/*.json")):
            if path not in {path_of(study, kind, job) for job in jobs}:
                path.unlink()


def _is_of_others(mark: dict | None, value: dict) -> bool:
    """Whether a job's mark is not of the variants that the job has now."""
    return mark is None or (mark.get("variants") or {}).keys() != value["variants"].keys()


def _keys(study: Study, shards: Shards) -> Iterator[tuple[str, Any]]:
    """Every job and its key: a shard of a stage and base model, a model to prepare, an analysis."""
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
            found["base"] = base_model
            for job in shards.jobs(stage, base_model):
                own = {run_id: wanted[run_id] for run_id in shards.run_ids(job)}
                yield job, {**found, "variants": own}
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
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_object(path)
    return None


def _disturbed(folder: Path, runs: dict[str, dict], stage: str, memory: float | None = None) -> str:
    """Which run of a job has a file that changed since the job read or wrote it, in words; an
    adapter that was changed on purpose stays as it is.
    """
    for run_id, result in runs.items():
        if read_mark(folder / "runs" / run_id / f"{stage}.done.json") != result:
            return f"the mark of {run_id} changed"
        if devices.has_more_than(result.get("had"), memory):
            return f"{run_id} had not enough memory and there is more now"
        for name, known in {**result["inputs"], **result["files"]}.items():
            path = folder / "runs" / run_id / name
            found = file_digest(path)
            if found is not None and found != known and path.suffix == ".safetensors":
                remedy = f"put the whole file back, or delete {path.parents[1]} to train it again"
                check_safetensors(path, remedy)
            if found != known and not may_change(stage, name, found):
                return f"{path.name} of {run_id} changed"
    return ""


def may_change(stage: str, name: str, found: str | None) -> bool:
    """Whether a file that a stage made may be another by now: an adapter that was changed on
    purpose stays as it is, and is scored.
    """
    return stage in ("train", "retune") and name.startswith("adapter/") and found is not None


def _lost(folder: Path, files: dict[str, str | None]) -> Iterator[str]:
    """The first file of an analysis that is gone or is no longer as it was written; of an executed
    notebook, which may have been opened and saved, only whether it is whole.
    """
    for name, known in files.items():
        path = folder / name
        if not (read_mark(path) if path.suffix == ".ipynb" else file_digest(path) == known):
            yield f"{name} is {'changed' if path.exists() else 'gone'}"
            return


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
