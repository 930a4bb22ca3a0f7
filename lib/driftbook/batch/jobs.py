"""One stage for one base model: variants are looped over, each result is written whole with a mark,
and a finished one is skipped.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from driftbook.batch import cache, devices, keys, leases, plan
from driftbook.batch.shards import path_of
from driftbook.models.sampling import OutOfMemory, VariantFailure
from driftbook.study import progress
from driftbook.study.files import file_digest, private_folder, read_object, write_json
from driftbook.study.folders import folder
from driftbook.study.methods import MAKING_STAGES
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

Work = Callable[[Variant, Path], list[Path]]
DEATHS = 3  # of a kernel at one piece of work, after which that is its failure
WORKED, REUSED = "worked", "reused"


@dataclass(frozen=True)
class _Task:
    """What a job does for each variant: its stage and study, the settings that its variants share,
    the files that are read of a variant, and the work itself.
    """

    stage: str
    study: Study
    shared: dict
    inputs: Callable[[Variant], list[Path]]
    work: Work


def job_variants(
    study: Study, base_model: str, run_ids: Sequence[str], stage: str = "respond"
) -> list[Variant]:
    """The variants of a stage's job, all of one base model; without run_ids the first one that is
    not the base model itself.

    Raises:
        ValueError: a run_id that the study does not have.
    """
    variants = {variant.run_id: variant for variant in study.of_stage(stage, base_model)}
    unknown = [run_id for run_id in run_ids if run_id not in variants]
    if unknown:
        raise ValueError(
            f"run_id={unknown[0]!r} is no variant of {base_model} for the stage {stage} in the"
            f" study {study.name}; it has {', '.join(list(variants)[:3]) or 'none'}, ..."
        )
    wanted = (
        list(run_ids)
        or [run_id for run_id, variant in variants.items() if variant.method != "none"][:1]
        or list(variants)[:1]
    )
    return [variants[run_id] for run_id in wanted]


def failed_before(study: Study, variant: Variant, stage: str) -> bool:
    """Whether a stage that this one builds on recorded a failure of this variant, so that there is
    nothing to score; a repair or a second tuning says itself that what it is made from failed.
    """
    made = variant.made_in
    needed = () if stage in MAKING_STAGES else (made, "respond") if stage == "judge" else (made,)
    marks = [folder(study, variant) / f"{earlier}.done.json" for earlier in needed]
    return any(mark.exists() and read_object(mark)["status"] == "failed" for mark in marks)


def run_variants(
    stage: str,
    study: Study,
    base_model: str,
    variants: Sequence[Variant],
    inputs: Callable[[Variant], list[Path]],
    work: Work,
) -> pd.DataFrame:
    """Do `work(variant, its folder)` for each variant that is not finished, and return run_id,
    status and whether it was there already.

    `work` writes the variant's files whole and returns their paths. A variant is finished if its
    mark holds the same key and the bytes of its inputs and files are still those of the mark. Its
    own failure (VariantFailure) is recorded and the job goes on.

    Raises:
        RuntimeError: anything else that goes wrong; the sentence names the variant.
    """
    private_folder(study.folder)
    task, found = _Task(stage, study, keys.settings(stage, study, base_model), inputs, work), {}
    job = plan.job_of(study, stage, base_model, {variant.run_id for variant in variants})
    planned, watch = plan.job_key(study, job) if job else {}, leases.Watch()
    # what another process died of, or works on, comes last
    waiting = sorted(variants, key=lambda one: bool(leases.holder(folder(study, one), stage)))
    with progress.reported(progress_path(study, job or stage), len(variants)) as told:
        while waiting:
            busy = []
            for variant in waiting:
                told.begin(variant.run_id)
                try:
                    found[variant.run_id] = _done(task, variant, planned, watch)
                    told.end(variant.run_id, worked=found[variant.run_id] == WORKED)
                except leases.Lost:
                    busy.append(variant)
            if waiting := busy:  # others work on these, in another batch or for a lost one
                time.sleep(leases.BEAT)
    did = [variant for variant in variants if found[variant.run_id]]
    marks = {variant.run_id: _mark(stage, study, variant) for variant in did}
    if job and plan.job_key(study, job) == planned:  # else it was dealt anew meanwhile
        write_json(plan.job_mark(study, job), {**planned, "runs": marks})
    rows = [(name, mark["status"], found[name] == REUSED) for name, mark in marks.items()]
    return pd.DataFrame(rows, columns=["run_id", "status", "reused"])


def _done(task: _Task, variant: Variant, planned: dict, watch: leases.Watch) -> str:
    """Do a variant unless it is finished: WORKED, REUSED, or nothing where there is nothing to do.

    Raises:
        leases.Lost: another process works on it.
    """
    stage, own = task.stage, folder(task.study, variant)
    if failed_before(task.study, variant, stage):
        _mark_path(stage, task.study, variant).unlink(missing_ok=True)  # of when it had not failed
        return ""
    if _is_finished(task, variant):
        return REUSED
    with leases.leased(own, stage, watch) as lease:
        if lease is None:
            raise leases.Lost
        if _is_finished(task, variant):  # by who held it before
            return REUSED
        key = planned.get("variants", {}).get(variant.run_id)
        died = leases.deaths(own, stage, key) >= DEATHS
        _do(replace(task, work=_died) if died else task, variant, lease)
        leases.forget_deaths(own, stage)
    return WORKED


def _died(variant: Variant, folder: Path) -> list[Path]:
    raise OutOfMemory(
        f"the process that worked on it was killed {DEATHS} times; probably there was too little"
        " memory"
    )


def _mark_path(stage: str, study: Study, variant: Variant) -> Path:
    return folder(study, variant) / f"{stage}.done.json"


def _mark(stage: str, study: Study, variant: Variant) -> dict:
    return read_object(_mark_path(stage, study, variant))


def _is_finished(task: _Task, variant: Variant) -> bool:
    """Whether the mark is of the variant's key and nothing it names has changed. An adapter changed
    after training is not trained again.
    """
    path = _mark_path(task.stage, task.study, variant)
    try:
        mark = read_object(path) if path.exists() else {}
    except ValueError:  # a torn mark is no mark
        return False
    if mark.get("key") != keys.result_key(task.shared, variant):
        return False
    if mark["inputs"] != _digests(task.study, variant, task.inputs(variant)):
        return False
    if devices.has_more_than(mark.get("had")):
        return False
    found = {name: file_digest(path.parent / name) for name in mark["files"]}
    return all(
        found[name] == known or plan.may_change(task.stage, name, found[name])
        for name, known in mark["files"].items()
    )


def _do(task: _Task, variant: Variant, lease: leases.Lease) -> None:
    stage, study = task.stage, task.study
    path, began = _mark_path(stage, study, variant), time.time()
    path.unlink(missing_ok=True)
    private_folder(path.parent)
    read, failure, had, files = _digests(study, variant, task.inputs(variant)), None, None, []
    try:
        files = _work(task, variant, path.parent)
    except VariantFailure as error:
        failure = str(error)
        had = devices.device_memory() if isinstance(error, OutOfMemory) else None
    except Exception as error:
        if not devices.lacked_memory(error):
            raise RuntimeError(
                f"{stage} of {variant.run_id}: {type(error).__name__}: {error}"
            ) from error
        failure, had = f"out of memory: {error}", devices.device_memory()
    lease.check()
    if failure is not None and stage in MAKING_STAGES:  # nothing is made of an older one
        for name in ("adapter", "adapter.snapshots"):
            shutil.rmtree(path.parent / name, ignore_errors=True)
    write_json(
        path,
        {
            "key": keys.result_key(task.shared, variant),
            "status": "ok" if failure is None else "failed",
            "failure": failure,
            **({} if had is None else {"had": had}),
            "inputs": read,
            "files": _digests(study, variant, files),
            "work": {"host": lease.words["host"], "began": began, "seconds": time.time() - began},
        },
    )


def _work(task: _Task, variant: Variant, folder: Path) -> list[Path]:
    """The files of a piece of work. What is scored is kept for all studies by what it depends on,
    whatever the variant is called there.
    """
    if task.stage in MAKING_STAGES:
        return task.work(variant, folder)
    key = {
        "settings": keys.made_by(task.shared, variant),
        "system_prompt": variant.system_prompt,
        "template": variant.template,
        # a list, since the parts of a product have files of the same names
        "inputs": [[path.name, cache.content(path)] for path in task.inputs(variant)],
        "weights": list(variant.parts.values()),
    }
    if task.stage == "respond" and any(
        isinstance(part, dict) and part.get("samples") for part in task.shared.values()
    ):
        key["repetition"] = variant.repetition  # each draws answers of its own
    return cache.served(key, variant.run_id, folder, lambda: task.work(variant, folder))


def _digests(study: Study, variant: Variant, paths: list[Path]) -> dict[str, str | None]:
    return {
        os.path.relpath(path, folder(study, variant)): file_digest(path) for path in paths
    }  # of a repaired one also its parent's


def progress_path(study: Study, job: str) -> Path:
    """The file in which a job says how far it is, for the live display of make study."""
    return path_of(study, "progress", job)
