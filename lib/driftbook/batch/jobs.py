"""One stage for one base model: variants are looped over, each result is written whole with a mark,
and a finished one is skipped.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from driftbook.batch import cache, keys, plan
from driftbook.models.sampling import VariantFailure
from driftbook.study import progress
from driftbook.study.files import file_digest, private_folder, read_object, write_json
from driftbook.study.folders import folder
from driftbook.study.study_file import Study
from driftbook.study.variants import Variant

Work = Callable[[Variant, Path], list[Path]]


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
    nothing to score.
    """
    made = "mitigate" if variant.is_repaired else "train"
    needed = {"train": (), "mitigate": (), "judge": (made, "respond")}.get(stage, (made,))
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
    shared, rows = keys.settings(stage, study, base_model), []
    planned = plan.job_key(study, f"{stage}/{base_model}")
    with progress.reported(progress_path(study, stage, base_model), len(variants)) as told:
        for variant in variants:
            told.begin(variant.run_id)
            reused = True
            if not failed_before(study, variant, stage):
                key = keys.result_key(shared, variant)
                reused = _is_finished(stage, study, variant, key, inputs)
                status = (
                    _mark(stage, study, variant)["status"]
                    if reused
                    else _do(stage, study, variant, shared, inputs, work)
                )
                rows.append((variant.run_id, status, reused))
            told.end(variant.run_id, worked=not reused)
    if {variant.run_id for variant in variants} == {
        variant.run_id for variant in study.of_stage(stage, base_model)
    }:
        done = {
            run_id: _mark(stage, study, variant)
            for variant in variants
            if (run_id := variant.run_id) in {row[0] for row in rows}
        }
        write_json(plan.job_mark(study, f"{stage}/{base_model}"), {**planned, "runs": done})
    return pd.DataFrame(rows, columns=["run_id", "status", "reused"])


def _mark_path(stage: str, study: Study, variant: Variant) -> Path:
    return folder(study, variant) / f"{stage}.done.json"


def _mark(stage: str, study: Study, variant: Variant) -> dict:
    return read_object(_mark_path(stage, study, variant))


def _is_finished(
    stage: str, study: Study, variant: Variant, key: str, inputs: Callable[[Variant], list[Path]]
) -> bool:
    """Whether the mark is of this key and nothing it names has changed. An adapter changed after
    training is not trained again.
    """
    path = _mark_path(stage, study, variant)
    try:
        mark = read_object(path) if path.exists() else {}
    except ValueError:  # a torn mark is no mark
        return False
    if mark.get("key") != key or mark["inputs"] != _digests(study, variant, inputs(variant)):
        return False
    found = {name: file_digest(folder(study, variant) / name) for name in mark["files"]}
    return all(found.values()) if stage == "train" else found == mark["files"]


def _do(
    stage: str,
    study: Study,
    variant: Variant,
    shared: dict,
    inputs: Callable[[Variant], list[Path]],
    work: Work,
) -> str:
    path = _mark_path(stage, study, variant)
    path.unlink(missing_ok=True)
    private_folder(path.parent)
    read, failure, files = _digests(study, variant, inputs(variant)), None, []
    try:
        files = _work(stage, variant, path.parent, shared, inputs(variant), work)
    except VariantFailure as error:
        failure = str(error)
    except Exception as error:
        raise RuntimeError(
            f"{stage} of {variant.run_id}: {type(error).__name__}: {error}"
        ) from error
    status = "ok" if failure is None else "failed"
    write_json(
        path,
        {
            "key": keys.result_key(shared, variant),
            "status": status,
            "failure": failure,
            "inputs": read,
            "files": _digests(study, variant, files),
        },
    )
    return status


def _work(
    stage: str, variant: Variant, folder: Path, shared: dict, inputs: list[Path], work: Work
) -> list[Path]:
    """The files of a piece of work. What is scored is kept for all studies by what it depends on,
    whatever the variant is called there.
    """
    if stage in ("train", "mitigate"):
        return work(variant, folder)
    key = {
        "settings": keys.made_by(shared, variant),
        "system_prompt": variant.system_prompt,
        "template": variant.template,
        "inputs": {path.name: cache.content(path) for path in inputs},
    }
    if stage == "respond" and any(
        isinstance(part, dict) and part.get("samples") for part in shared.values()
    ):
        key["repetition"] = variant.repetition  # each draws answers of its own
    return cache.served(key, variant.run_id, folder, lambda: work(variant, folder))


def _digests(study: Study, variant: Variant, paths: list[Path]) -> dict[str, str | None]:
    return {
        os.path.relpath(path, folder(study, variant)): file_digest(path) for path in paths
    }  # of a repaired one also its parent's


def progress_path(study: Study, stage: str, name: str) -> Path:
    """The file in which a job says how far it is, for the live display of make study."""
    return study.folder / "progress" / f"{stage}.{name}.json"
