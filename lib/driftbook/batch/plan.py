"""The plan of a study: which keys each job stands for, written only where they changed, so that
Snakemake redoes just what depends on it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from driftbook.batch import keys
from driftbook.study import preregistration
from driftbook.study.files import (
    check_safetensors,
    check_writable,
    digest,
    file_digest,
    read_json,
    write_json,
)
from driftbook.study.study_file import Study

BYTES_PER_VARIANT = 2_000_000  # adapter and tables of one miniature variant, rounded up


def write(study: Study) -> None:
    """Write keys/<stage>/<name>.json for every job of the study, and forget jobs whose files are no
    longer what they recorded.

    Raises:
        ValueError: the output folder cannot be written, or a source is not to be had.
    """
    check_writable(study.folder, BYTES_PER_VARIANT * len(study.variants))
    (study.folder / "runs").mkdir(
        mode=0o700, exist_ok=True
    )  # it holds what models said to safety prompts
    preregistration.register(study)
    for path, value in _keys(study):
        if not path.exists() or read_json(path) != value:
            write_json(path, value)
    for stage in keys.stages(study):
        for base_model in study.bases:
            _forget_if_disturbed(study.folder, stage, base_model)


def _keys(study: Study) -> Iterator[tuple[Path, Any]]:
    folder = study.folder / "keys"
    for name, part in study.models.items():
        yield (
            folder / "prepare" / f"{name}.json",
            {"content": keys.declared(part, study), "data": _data(study)},
        )
    for stage in keys.stages(study):
        for base_model in study.bases:
            shared = keys.settings(stage, study, base_model, keys.declared)
            wanted = {
                variant.run_id: keys.key(shared, variant)
                for variant in study.of_stage(stage, base_model)
            }
            yield folder / stage / f"{base_model}.json", wanted
    yield (
        folder / "analysis.json",
        {
            "study": digest(study.model_dump(mode="json")),
            "variants": [v.run_id for v in study.variants],
        },
    )


def _data(study: Study) -> dict[str, str]:
    return {
        name: keys.declared(part, study)
        for name, part in {**study.data, **study.benchmarks}.items()
    }


def _mark(path: Path) -> dict | None:
    """A run's mark; None where it is lost or torn, so that the run is done again."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None


def _forget(folder: Path, job: Path) -> None:
    """Delete a job's mark and those of all that is made from all jobs: for a target that is there,
    Snakemake makes no missing input.
    """
    for mark in (job, *(folder / "jobs").glob("*.json")):
        mark.unlink()


def _forget_if_disturbed(folder: Path, stage: str, base_model: str) -> None:
    """Forget a job if a file that it read or wrote has changed since; an adapter that was changed
    on purpose stays as it is.
    """
    job = folder / "jobs" / stage / f"{base_model}.json"
    if not job.exists():
        return
    for run_id, result in read_json(job).items():
        if _mark(folder / "runs" / run_id / f"{stage}.done.json") != result:
            _forget(folder, job)
            return
        for name, known in {**result["inputs"], **result["files"]}.items():
            path = folder / "runs" / run_id / name
            found = file_digest(path)
            if found is not None and found != known and path.suffix == ".safetensors":
                check_safetensors(
                    path,
                    f"put the whole file back, or delete {path.parents[1]} to train the variant"
                    " again",
                )
            if found != known and not (stage == "train" and found is not None):
                _forget(folder, job)
                return
