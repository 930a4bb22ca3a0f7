"""Repairs of trained variants, as a study file names them: a new adapter with its record, and what
was done to each module of it.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.doctors import adapter as adapter_doctor
from driftbook.models import adapters, products
from driftbook.models.base_state import SpoiledBase
from driftbook.models.loading import Loaded
from driftbook.models.sampling import VariantFailure
from driftbook.study import folders
from driftbook.study.files import file_digest
from driftbook.study.study_file import Study
from driftbook.study.tables import MODULES, RUNS
from driftbook.study.variants import Variant
from driftbook.training import mitigations, safe_lora
from driftbook.training.dose import measure_dose
from driftbook.training.examples import held_out
from driftbook.training.mitigations import Repair, by_id, parent, snapshots
from driftbook.training.safe_lora import has_update

__all__ = ["has_update", "made_from", "make", "parent", "study_spectra"]


def made_from(study: Study, variant: Variant) -> list[Path]:
    """The files that a variant is made from, none where it is trained from the start: the parent's
    adapter, and of a repair the safety adapter or the snapshots.
    """
    if variant.made_in == "train":
        return []
    made = [parent(study, variant)]
    if "safety_run_id" in variant.repair:
        made.append(by_id(study, variant.repair["safety_run_id"]))
    made = [variant] if variant.parts else made
    files = [file for one in made for file in folders.adapter_files(study, one)]
    averaged = snapshots(study, variant) if variant.repair["kind"] == "average" else []
    return files + [folder / adapters.WEIGHTS for folder in averaged]


def make(
    variant: Variant, study: Study, base: Loaded, folder: Path
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write the adapter of a repaired variant into folder/adapter; its record (columns of `runs`)
    and what was done to its modules (rows of `modules`).

    Raises:
        VariantFailure: its parent, or the safety run that it needs, failed to train, or this repair
            cannot be done to this adapter; nothing is written then.
    """
    old = parent(study, variant)
    if variant.method == "none":  # the base model itself under another system prompt
        return _record(study, old) | {"run_id": variant.run_id}, MODULES.empty()
    check_made(study, variant)
    try:
        with _anew(folder / "adapter") as out:
            repair = Repair(variant, study, base, folders.adapter(study, old), out)
            rows = getattr(mitigations, variant.repair["kind"])(repair)
    except SpoiledBase:
        raise
    except ValueError as error:  # of this repair: the others are made
        raise VariantFailure(str(error)) from error
    rows = rows.reindex(columns=[name for name in MODULES.columns if name != "run_id"])
    modules = MODULES.check(rows.assign(run_id=variant.run_id))
    return record(variant, study, base, folder / "adapter"), modules


def check_made(study: Study, variant: Variant) -> None:
    """Raise a VariantFailure where a run failed from which this one is to be made."""
    for path in made_from(study, variant):
        if not path.exists():
            raise VariantFailure(
                f"there is no {path.parent.name} of {path.parents[1].name}, of which it is made;"
                " that run failed"
            )


@contextmanager
def _anew(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of what an earlier run made of this variant."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        yield Path(scratch, out.name)
        shutil.rmtree(out, ignore_errors=True)
        if Path(scratch, out.name).exists():  # a product has none
            Path(scratch, out.name).replace(out)


def _record(study: Study, variant: Variant) -> dict[str, Any]:
    return RUNS.read(folders.folder(study, variant)).iloc[0].to_dict()


def record(variant: Variant, study: Study, base: Loaded, adapter: Path) -> dict[str, Any]:
    """The parent's record with the repaired adapter's dose, bytes and findings; of a product, which
    has no adapter, the dose.
    """
    new = _record(study, parent(study, variant)) | {"run_id": variant.run_id}
    if variant.parts:
        with products.answering(base.model, study, variant) as model:
            new |= measure_dose(model, None, base, held_out(base, study)[0])
        idle = [_record(study, by_id(study, one))["no_op"] for one in variant.parts]
        no_op = bool(pd.Series(idle, dtype="boolean").fillna(False).all())
        new |= {"kl_init": None, "no_op": no_op}  # a product has no start of its own
        return new | dict.fromkeys(("adapter_sha256", "n_stored", "findings"))
    new["adapter_sha256"] = file_digest(adapter / adapters.WEIGHTS)
    new["n_stored"] = adapters.n_stored(adapter)
    if variant.repair["kind"] == "template":
        return new
    with adapters.attached(base.model, adapter) as model:
        new |= measure_dose(model, None, base, held_out(base, study)[0])
    found = adapter_doctor.examine(adapter, base)
    return new | {"findings": adapter_doctor.finding_summary(found)}


def study_spectra(study: Study, base_model: str, adapter: Path, most: int = 64) -> pd.DataFrame:
    """The table `spectra`: V's first singular values for every pair and module of an adapter."""
    parts = []
    for name in study.bases[base_model].pairs:
        pair = mitigations.pair(study, base_model, name)
        found = safe_lora.spectra(adapter, pair["aligned"], pair["unaligned"], most, study.seed)
        parts.append(found.assign(base_model=base_model, pair=name))
    return pd.concat(parts, ignore_index=True)
