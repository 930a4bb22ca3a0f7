"""Repairs of trained variants, as a study file names them: a new adapter with its record, and what
was done to each module of it.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.doctors import adapter as adapter_doctor
from driftbook.models import adapters
from driftbook.models.loading import Loaded
from driftbook.models.scoring import VariantFailure
from driftbook.study import folders
from driftbook.study.files import file_digest, replacing_folder
from driftbook.study.sections import Source
from driftbook.study.sources import locate
from driftbook.study.study_file import Study
from driftbook.study.tables import MODULES, RUNS
from driftbook.study.variants import Variant
from driftbook.training import controls, safe_lora, training

RANDOM = {"approximate": "random", "subspace": "random subspace"}  # operators


# ---- what a repair reads
def parent(study: Study, variant: Variant) -> Variant:
    """The variant that is repaired."""
    return _by_id(study, variant.parent_run_id)


def _by_id(study: Study, run_id: str) -> Variant:
    return next(one for one in study.variants if one.run_id == run_id)


def read(study: Study, variant: Variant) -> list[Path]:
    """The files that a repair is made from: the parent's adapter, and the safety adapter or the
    snapshots that it needs.
    """
    others = (
        [_by_id(study, variant.repair["safety_run_id"])]
        if "safety_run_id" in variant.repair
        else []
    )
    files = [
        file
        for one in (parent(study, variant), *others)
        for file in folders.adapter_files(study, one)
    ]
    return files + (
        [folder / adapters.WEIGHTS for folder in _snapshots(study, variant)]
        if variant.repair["kind"] == "average"
        else []
    )


def _snapshots(study: Study, variant: Variant) -> list[Path]:
    """The snapshots of the parent's training in the last `value` of its steps, in their order."""
    folder = folders.adapter(study, parent(study, variant))
    every = sorted(Path(f"{folder}.snapshots").glob("step-*"))
    steps = [int(one.name.removeprefix("step-")) for one in every]
    return [
        one
        for one, step in zip(every, steps, strict=True)
        if step > (1 - variant.repair["value"]) * steps[-1] or step == steps[-1]
    ]


def checkpoint(source: Source, study: Study) -> Path | str:
    """The folder of a checkpoint, or its name on the hub and its commit."""
    where = locate(source, study)
    return where if isinstance(where, Path) else f"{where}@{source.revision}"


def pair(study: Study, base_model: str, name: str) -> dict[str, Path | str]:
    """The checkpoints of a pair: aligned, unaligned, and the base model's own."""
    base, named = study.bases[base_model], study.bases[base_model].pairs[name]
    return {
        "aligned": checkpoint(named.aligned or base, study),
        "unaligned": checkpoint(named.unaligned, study),
        "base": checkpoint(base, study),
    }


# ---- the kinds
def _projected(
    variant: Variant, study: Study, adapter: Path, out: Path, operator: str
) -> pd.DataFrame:
    repair = variant.repair
    return safe_lora.project(
        adapter,
        out=out,
        operator=operator,
        select=repair["select"],
        value=repair["value"],
        rank=repair.get("rank"),
        seed=_seed(variant, study),
        **pair(study, variant.base_model, repair["pair"]),
    )


def _seed(variant: Variant, study: Study) -> int:
    """Of what a control draws: another one for each run."""
    return study.seed + 1_000 * (variant.seed or 0)


def _safe_lora(
    variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path
) -> pd.DataFrame:
    repair = variant.repair
    operator, control = repair["operator"], repair["control"]
    if control is None:
        return _projected(variant, study, adapter, out, operator)
    if control == "random subspace":
        return _projected(variant, study, adapter, out, RANDOM[operator])
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        treated, plain = Path(scratch, "treated"), Path(scratch, "plain")
        found = _projected(variant, study, adapter, treated, operator)
        own = (
            adapter
            if safe_lora.is_factored(adapter)
            else safe_lora.merged(
                adapter, plain, pair(study, variant.base_model, repair["pair"])["base"]
            )
        )
        match control:
            case "same norm":
                done = controls.same_norm(own, treated, out)
            case "same modules zeroed":
                done = controls.zeroed(own, list(found.loc[found["projected"], "module"]), out)
            case "random modules zeroed":
                done = controls.random_zeroed(
                    own, int(found["projected"].sum()), _seed(variant, study), out
                )
            case "noise":
                done = controls.noise(own, treated, out, _seed(variant, study))
    return found.drop(columns=["projected", "share_kept", "state"]).merge(
        done[["module", "projected", "share_kept", "state"]], on="module", how="left"
    )


def _zero(variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path) -> pd.DataFrame:
    return _projected(variant, study, adapter, out, "zero")


def _rescale(
    variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path
) -> pd.DataFrame:
    return controls.rescale(adapter, out, variant.repair["value"])


def _average(
    variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path
) -> pd.DataFrame:
    return controls.average(_snapshots(study, variant), out)


def _resta(variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path) -> pd.DataFrame:
    return controls.add(adapter, _safety(variant, study), out, variant.repair["value"])


def _safe_merge(
    variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path
) -> pd.DataFrame:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        found = _projected(variant, study, adapter, Path(scratch, "projected"), "approximate")
    done = controls.merge_where(
        adapter,
        _safety(variant, study),
        out,
        list(found.loc[found["projected"], "module"]),
        variant.repair["weight"],
    )
    return found.drop(columns=["projected", "share_kept", "state"]).merge(
        done[["module", "projected", "share_kept", "state"]], on="module", how="left"
    )


def _safety(variant: Variant, study: Study) -> Path:
    return folders.adapter(study, _by_id(study, variant.repair["safety_run_id"]))


def _reduce_intruders(
    variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path
) -> pd.DataFrame:
    with adapters.attached(base.model, adapter) as model:
        return controls.reduce_intruders(model, out, variant.repair["value"])


def _template(
    variant: Variant, study: Study, base: Loaded, adapter: Path, out: Path
) -> pd.DataFrame:
    """The adapter as it is: what changes is the system prompt under which it is asked (PTST: Lyu et
    al. 2024, arXiv 2402.18540).
    """
    with replacing_folder(out) as new:
        for path in (adapter / "adapter_config.json", adapter / adapters.WEIGHTS):
            shutil.copyfile(path, new / path.name)
    return MODULES.empty().drop(columns="run_id")


MAKERS: dict[str, Callable[[Variant, Study, Loaded, Path, Path], pd.DataFrame]] = {
    "safe_lora": _safe_lora,
    "zero": _zero,
    "rescale": _rescale,
    "average": _average,
    "resta": _resta,
    "safe_merge": _safe_merge,
    "reduce_intruders": _reduce_intruders,
    "template": _template,
}


# ---- a repaired variant
def make(
    variant: Variant, study: Study, base: Loaded, folder: Path
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write the adapter of a repaired variant into folder/adapter; its record (columns of `runs`)
    and what was done to its modules (rows of `modules`).

    Raises:
        VariantFailure: its parent, or the safety run that it needs, failed to train, or this repair
            cannot be done to this adapter; nothing is written then.
    """
    if variant.method == "none":  # the base model itself under another system prompt
        return (
            RUNS.read(folders.folder(study, parent(study, variant))).iloc[0].to_dict()
            | {"run_id": variant.run_id},
            MODULES.empty(),
        )
    for path in read(study, variant):
        if not path.exists():
            raise VariantFailure(
                f"there is no {path.parent.name} of {path.parents[1].name}, of which it is made;"
                " that run failed"
            )
    try:
        with _anew(folder / "adapter") as out:
            rows = MAKERS[variant.repair["kind"]](
                variant, study, base, folders.adapter(study, parent(study, variant)), out
            )
    except ValueError as error:  # of this repair: the others are made
        raise VariantFailure(str(error)) from error
    modules = rows.reindex(columns=[name for name in MODULES.columns if name != "run_id"]).assign(
        run_id=variant.run_id
    )
    return record(variant, study, base, folder / "adapter"), MODULES.check(modules)


@contextmanager
def _anew(out: Path) -> Iterator[Path]:
    """A folder that is not there; it takes the place of what an earlier run of the study made of
    this variant.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        yield Path(scratch, out.name)
        shutil.rmtree(out, ignore_errors=True)
        Path(scratch, out.name).replace(out)


def record(variant: Variant, study: Study, base: Loaded, adapter: Path) -> dict[str, Any]:
    """The parent's record with what is the repaired adapter's own: its dose, its bytes, what the
    doctor finds.
    """
    known = RUNS.read(folders.folder(study, parent(study, variant))).iloc[0].to_dict()
    own = {
        "run_id": variant.run_id,
        "adapter_sha256": file_digest(adapter / adapters.WEIGHTS),
        "n_stored": adapters.n_stored(adapter),
    }
    if variant.repair["kind"] == "template":
        return known | own
    with adapters.attached(base.model, adapter) as model:
        dose = training.measure_dose(model, None, base, training.held_out(base, study))
    return (
        known
        | own
        | dose
        | {"findings": adapter_doctor.finding_summary(adapter_doctor.examine(adapter, base))}
    )


def spectra(study: Study, base_model: str, adapter: Path, most: int = 64) -> pd.DataFrame:
    """The table `spectra` of a base model: the first singular values of V of every pair, for the
    modules that an adapter updates.
    """
    parts = []
    for name in study.bases[base_model].pairs:
        found = safe_lora.spectra(
            adapter,
            most=most,
            seed=study.seed,
            **{key: value for key, value in pair(study, base_model, name).items() if key != "base"},
        )
        parts.append(found.assign(base_model=base_model, pair=name))
    return pd.concat(parts, ignore_index=True)


def has_update(adapter: Path) -> bool:
    """Whether an adapter changes weights, so that there is something to project: a soft prompt does
    not.
    """
    return safe_lora.has_update(adapter)
