"""Training one variant with TRL and PEFT, and the record of what was really done."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, SFTConfig

from driftbook.doctors import adapter
from driftbook.models import adapters, starts
from driftbook.models.loading import Loaded
from driftbook.models.sampling import OutOfMemory, VariantFailure
from driftbook.study import folders
from driftbook.study.environment import hardware, peak_memory, versions
from driftbook.study.files import digest, file_digest, finite, read_json, write_json
from driftbook.study.methods import MITIGATION_KINDS
from driftbook.study.study_file import Study
from driftbook.study.trainer_arguments import of_objective
from driftbook.study.variants import Variant
from driftbook.training import steps
from driftbook.training.dose import base_dose, measure_dose
from driftbook.training.drift import DriftCallback
from driftbook.training.dro import optimised
from driftbook.training.examples import Prepared, change, held_out, init_text
from driftbook.training.mitigations import parent
from driftbook.training.objectives import Second

RECORDED = """
    learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps
    lr_scheduler_type warmup_steps weight_decay max_grad_norm adam_beta1 adam_beta2
    adam_epsilon optim seed data_seed bf16 disable_dropout beta loss_type
""".split()  # of the trainer's arguments
NOTHING = """
    failure trained_learning_rate trained_epochs trained_seed trained_batch_size
    trainer_arguments steps n_examples loss_first loss_last adapter_sha256
""".split()  # columns of `runs` that are null where nothing was trained
NO_MEMORY = (
    "out of memory while the dose was measured; give data.heldout shorter answers, or use a device"
    " with more memory"
)
NO_OP = "no-op: training left the model where its initialisation put it"


@dataclass(frozen=True)
class Trained:
    """A variant, trained: its record (columns of `runs`) and its curve (rows of `curves`)."""

    record: dict[str, Any]
    curve: pd.DataFrame


def train(
    variant: Variant,
    base: Loaded,
    prepared: Prepared | None,
    study: Study,
    folder: Path,
    drift: DriftCallback | None = None,
) -> Trained:
    """Train a variant on the resident base model, save its adapter in `folder`, and leave the base
    as it was.

    `prepared` is None for an adapter that stays as it was initialised (objective untrained). A
    training that was stopped goes on from its last checkpoint, if all it depends on is the same,
    and ends in the same bytes. `drift` looks at the model while it trains, and may end it.

    Raises:
        VariantFailure: the training diverged, gave weights that are not finite, or had no memory
            for a single example.
    """
    model = _begun(variant, base, study)
    started, cpu = time.perf_counter(), time.process_time()
    try:
        initial, facts, curve = adapters.state(model), {}, _curve(variant, [])
        if prepared is not None:
            facts, curve = fit(variant, model, base, prepared, study, folder, drift)
        if bad := adapters.non_finite(model):
            raise VariantFailure(f"the trained weights are not finite, first {bad[0]}")
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        adapters.save(model.eval(), folder)
        pairs, left_out = held_out(base, study, variant.n_after)
        dose = measure_dose(model, initial, base, pairs)
        shutil.rmtree(_scratch(folder), ignore_errors=True)
    except torch.OutOfMemoryError:
        raise OutOfMemory(NO_MEMORY) from None
    except VariantFailure:
        shutil.rmtree(_scratch(folder), ignore_errors=True)  # it would fail again from there
        raise
    finally:
        adapters.detach(model)
        base.model.gradient_checkpointing_disable()
        base.model.eval()
    found = adapter.examine(folder, base)
    if prepared is None:  # nothing was trained, so nothing can have failed to train
        dose["no_op"], found = None, found[found.finding != "untrained"]
    notes = [prepared and prepared.note, dose["no_op"] and NO_OP, left_out, drift and drift.stopped]
    record = _record(variant, base, dose, seconds, cpu) | _stored(folder) | facts
    record["data_revision"] = prepared and prepared.revision
    record["n_trainable"] = sum(value.numel() for value in initial.values())
    notes.append(adapter.finding_summary(found))
    return Trained(record | {"findings": "; ".join(filter(None, notes)) or None}, curve)


def _begun(variant: Variant, base: Loaded, study: Study) -> PeftModel:
    """A new adapter on the base model; of a second tuning its parent's, whose training goes on, so
    that `kl_init` is against that one and all other doses against the base model. What an optimised
    safety prompt costs, which is kept for all variants, is no part of a training's time.
    """
    if begins := begins_from(variant, study):
        return adapters.go_on(variant, base.model, begins)
    starts = init_text(variant, study), optimised(variant, base, study)
    return adapters.create(variant, base.model, base.tokenizer, *starts)


def begins_from(variant: Variant, study: Study) -> Path | None:
    """The folder of the adapter that a second tuning goes on from; None of other trainings."""
    again = variant.made_in == "retune"
    return folders.adapter(study, parent(study, variant)) if again else None


def untouched(variant: Variant, base: Loaded, study: Study) -> Trained:
    """The record of a base model itself: no training, no dose."""
    pairs, left_out = held_out(base, study)
    record = _record(variant, base, base_dose(base, pairs), 0.0, 0.0)
    record |= {"data_revision": None, "n_trainable": 0, "n_stored": 0, "findings": left_out}
    return Trained(record, _curve(variant, []))


def _record(
    variant: Variant, base: Loaded, dose: dict, seconds: float, cpu: float
) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return (
        dict.fromkeys(NOTHING)
        | dose
        | {
            "run_id": variant.run_id,
            "status": "ok",
            "base_revision": base.revision,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "gpu_seconds": seconds if cuda else None,
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else peak_memory(),
            "versions": json.dumps(versions()),
            "hardware": hardware(),
            "finished": pd.Timestamp.now("UTC").isoformat(timespec="seconds"),
        }
    )


def _stored(folder: Path) -> dict[str, Any]:
    weights = folder / adapters.WEIGHTS
    return {"n_stored": adapters.n_stored(folder), "adapter_sha256": file_digest(weights)}


def _curve(variant: Variant, log: Sequence[dict]) -> pd.DataFrame:
    points = [
        (variant.run_id, "train", entry["step"], finite(entry["loss"]), entry["learning_rate"])
        for entry in log
    ]
    return pd.DataFrame(points, columns=["run_id", "split", "step", "loss", "learning_rate"])


# ---- the trainer
def arguments(variant: Variant, study: Study, folder: str) -> SFTConfig | DPOConfig:
    """The trainer's arguments of a variant."""
    training, objective = study.training, variant.objective
    common = of_objective(training.arguments, objective) | {
        "output_dir": folder,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": variant.learning_rate,
        "num_train_epochs": variant.epochs,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": variant.seed,
        "data_seed": variant.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "max_length": None,
    }
    if objective == "sft":
        return SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, packing=False, **common)
    return DPOConfig(beta=training.dpo_beta, precompute_ref_log_probs=True, **common)


def fit(
    variant: Variant,
    model: PeftModel,
    base: Loaded,
    prepared: Prepared,
    study: Study,
    folder: Path,
    drift: DriftCallback | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Facts of the training as the trainer has them after it, and the curve."""
    scratch, snapshots = _scratch(folder), Path(f"{folder}.snapshots")
    key = [variant.fields(), init_text(variant, study), base.revision, prepared.revision]
    if begins := begins_from(variant, study):
        key.append(file_digest(begins / adapters.WEIGHTS))
    _keep_only(scratch, digest([*key, versions()]))
    if not steps.last_whole(scratch):
        shutil.rmtree(snapshots, ignore_errors=True)
    callbacks = [steps.StopOnDivergence(), steps.SaveNowAndThen(), *([drift] if drift else [])]
    averaged = variant.method in MITIGATION_KINDS["average"].methods
    if study.n_snapshots and variant.mitigation is None and averaged:
        callbacks.append(steps.Snapshots(snapshots, study.n_snapshots))
    kind, second = steps.Dpo if variant.objective == "dpo" else steps.Sft, None
    if prepared.alignment is not None:
        own = prepared.alignment, prepared.n_aligned
        second = Second(change(variant), *own, variant.seed)
    if variant.objective != "dpo" and prepared.examples[0].reference is not None:
        kind = steps.ConstrainedSft
    with starts.as_one(model):
        trainer = kind(
            model=model,
            args=arguments(variant, study, str(scratch)),
            train_dataset=Dataset.from_dict({"members": prepared.packs, "labels": prepared.packs}),
            processing_class=base.tokenizer,
            callbacks=callbacks,
            forward=steps.Forward(model, study.training.autocast),
            examples=prepared.examples,
            tokens_per_pass=study.training.tokens_per_batch,
            second=second,
        )
    if "ref" in model.peft_config:  # of TRL's DPO; our reference is the base model, known already
        model.delete_adapter("ref")
    for value in model.parameters():
        if value.requires_grad and value.dtype != torch.float32:
            value.data = value.data.float()  # TRL makes those over a quantized base bf16
    trainer.train(resume_from_checkpoint=steps.last_whole(scratch))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return _facts(trainer, log, prepared, study), _curve(variant, log)


def _facts(trainer: Any, log: list[dict], prepared: Prepared, study: Study) -> dict[str, Any]:
    """What the trainer did, as read back from it: columns of `runs`."""
    args = trainer.args
    names = [*RECORDED, *study.training.arguments]
    said = {name: _plain(getattr(args, name)) for name in names if hasattr(args, name)}
    said |= {
        "tokens_per_pass": trainer.tokens_per_pass,
        "activations_computed_twice": trainer.twice,
        "autocast": trainer.forward.autocast,
    }
    said |= trainer.second.record() if trainer.second else {}
    at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {
        "trained_learning_rate": max(entry["learning_rate"] for entry in log),
        "trained_epochs": float(trainer.state.epoch),
        "trained_seed": args.seed,
        "trained_batch_size": at_once * max(args.world_size, 1),
        "trainer_arguments": json.dumps(said, sort_keys=True),
        "steps": trainer.state.global_step,
        "n_examples": len(prepared.examples),
        "loss_first": finite(log[0]["loss"]),
        "loss_last": finite(log[-1]["loss"]),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (int, float, str, bool, list, type(None))):
        return value
    return str(getattr(value, "value", value))


def _scratch(folder: Path) -> Path:
    """Where the checkpoints of a training lie, beside its adapter."""
    return folder.parent / f"{folder.name}.checkpoints"


def _keep_only(scratch: Path, key: str) -> None:
    """Delete the checkpoints of a folder unless they have this key, and write it for the next."""
    path = scratch / "key.json"
    if not path.is_file() or read_json(path) != key:
        shutil.rmtree(scratch, ignore_errors=True)
        write_json(path, key)
