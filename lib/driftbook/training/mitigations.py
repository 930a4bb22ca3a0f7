"""How each mitigation is done to an adapter: one function a kind, by the kind's name.

A mitigation is one entry in study/methods.py (MITIGATION_KINDS) and one function here, which writes
an adapter into the folder `one.out` and returns a row per module as controls.py describes it; those
done while training (`when="training"`) are in examples.py, steps.py and objectives.py.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from driftbook.doctors.adapter_files import CONFIG
from driftbook.models import adapters
from driftbook.models.loading import Loaded
from driftbook.study import folders
from driftbook.study.files import replacing_folder
from driftbook.study.sections import Source
from driftbook.study.sources import locate
from driftbook.study.study_file import Study
from driftbook.study.tables import MODULES
from driftbook.study.variants import Variant
from driftbook.training import controls
from driftbook.training.checkpoints import open_checkpoint as open_checkpoint
from driftbook.training.safe_lora import as_lora, is_factored, project

RANDOM = {"approximate": "random", "subspace": "random subspace"}  # operators
DONE = ["projected", "share_kept", "state"]  # columns that say what was done to a module


@dataclass(frozen=True)
class Repair:
    """A variant to be made: from its parent's adapter into the new folder `out`."""

    variant: Variant
    study: Study
    base: Loaded
    adapter: Path
    out: Path

    @property
    def settings(self) -> dict[str, Any]:
        return self.variant.repair

    @property
    def seed(self) -> int:
        """Of what a control draws: another one for each run."""
        return self.study.seed + 1_000 * (self.variant.seed or 0)

    @property
    def pair(self) -> dict[str, Path | str]:
        return pair(self.study, self.variant.base_model, self.settings["pair"])

    @property
    def safety(self) -> Path:
        """The safety run's adapter."""
        safe = by_id(self.study, self.settings["safety_run_id"])
        return folders.adapter(self.study, safe)

    def projected(self, operator: str, out: Path) -> pd.DataFrame:
        """Safe LoRA's projection of the parent's adapter into a folder."""
        settings = {name: self.settings.get(name) for name in ("select", "value", "rank")}
        where = {"out": out, "seed": self.seed, **self.pair}
        return project(self.adapter, operator=operator, **settings, **where)


def by_id(study: Study, run_id: str) -> Variant:
    """The variant of a run."""
    return next(one for one in study.variants if one.run_id == run_id)


def parent(study: Study, variant: Variant) -> Variant:
    """The variant that is repaired."""
    return by_id(study, variant.parent_run_id)


def snapshots(study: Study, variant: Variant) -> list[Path]:
    """The snapshots of the parent's training in the last `value` of its steps, in their order."""
    folder = folders.adapter(study, parent(study, variant))
    every = sorted(Path(f"{folder}.snapshots").glob("step-*"))
    steps = [int(one.name.removeprefix("step-")) for one in every]
    if not steps:  # that training failed
        return []
    first = (1 - variant.repair["value"]) * steps[-1]
    pairs = zip(every, steps, strict=True)
    return [one for one, step in pairs if step > first or step == steps[-1]]


def checkpoint(source: Source, study: Study) -> Path | str:
    """The folder of a checkpoint, or its name on the hub and its commit."""
    where = locate(source, study)
    return where if isinstance(where, Path) else f"{where}@{source.revision}"


def pair(study: Study, base_model: str, name: str) -> dict[str, Path | str]:
    """The checkpoints of a pair: aligned, unaligned, and the base model's own."""
    base, named = study.bases[base_model], study.bases[base_model].pairs[name]
    sources = {"aligned": named.aligned or base, "unaligned": named.unaligned, "base": base}
    return {what: checkpoint(source, study) for what, source in sources.items()}


# ---- the kinds
def safe_lora(one: Repair) -> pd.DataFrame:
    """Safe LoRA, or one of its controls."""
    operator, control = one.settings["operator"], one.settings["control"]
    if control is None:
        return one.projected(operator, one.out)
    if control == "random subspace":
        return one.projected(RANDOM[operator], one.out)
    with tempfile.TemporaryDirectory(dir=one.out.parent) as scratch:
        treated, own = Path(scratch, "treated"), one.adapter
        found = one.projected(operator, treated)
        if not is_factored(own):
            own = as_lora(own, Path(scratch, "plain"), one.pair["base"])
        modules = list(found.loc[found["projected"], "module"])
        match control:
            case "same norm":
                done = controls.same_norm(own, treated, one.out)
            case "same modules zeroed":
                done = controls.zeroed(own, modules, one.out)
            case "random modules zeroed":
                done = controls.random_zeroed(own, len(modules), one.seed, one.out)
            case "noise":
                done = controls.noise(own, treated, one.out, one.seed)
    return _with_done(found, done)


def _with_done(found: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """What was found in each module by Safe LoRA, and what was done to it instead."""
    return found.drop(columns=DONE).merge(done[["module", *DONE]], on="module", how="left")


def zero(one: Repair) -> pd.DataFrame:
    """The modules deleted that Safe LoRA would project."""
    return one.projected("zero", one.out)


def rescale(one: Repair) -> pd.DataFrame:
    """The whole update made smaller."""
    return controls.rescaled(one.adapter, one.out, one.settings["value"])


def average(one: Repair) -> pd.DataFrame:
    """The mean of the last snapshots of the training."""
    return controls.averaged(snapshots(one.study, one.variant), one.out)


def resta(one: Repair) -> pd.DataFrame:
    """A safety run's update added."""
    return controls.add(one.adapter, one.safety, one.out, one.settings["value"])


def soup(one: Repair) -> pd.DataFrame:
    """A weighted sum of the update and a safety run's, with weights that sum to one."""
    return controls.mixed(one.adapter, one.safety, one.out, one.settings["value"])


def safe_merge(one: Repair) -> pd.DataFrame:
    """A safety run's update mixed in where Safe LoRA would project."""
    with tempfile.TemporaryDirectory(dir=one.out.parent) as scratch:
        found = one.projected("approximate", Path(scratch, "projected"))
    modules, weight = list(found.loc[found["projected"], "module"]), one.settings["weight"]
    done = controls.merge_where(one.adapter, one.safety, one.out, modules, weight)
    return _with_done(found, done)


def reduce_intruders(one: Repair) -> pd.DataFrame:
    """Intruder dimensions taken out."""
    with adapters.attached(one.base.model, one.adapter) as model:
        return controls.intruders_reduced(model, one.out, one.settings["value"])


def template(one: Repair) -> pd.DataFrame:
    """The adapter under another system prompt (PTST: Lyu et al. 2024, arXiv 2402.18540)."""
    with replacing_folder(one.out) as new:
        for name in (CONFIG, adapters.WEIGHTS):
            shutil.copyfile(one.adapter / name, new / name)
    return MODULES.empty().drop(columns="run_id")


def mod(one: Repair) -> pd.DataFrame:
    """Nothing is written: the run is answered by the product of the distributions of its parts
    (MOD: Shi et al. 2024, arXiv 2406.18853; see models/products.py).
    """
    return MODULES.empty().drop(columns="run_id")
