"""Twins of a base model, made before a study begins: the base tuned by LoRA on examples of the
study, and the update merged into its weights.

An aligned twin has something to lose: it is tuned on refusals of harmful requests and on answers to
benign ones. Its placebo is tuned alike on answers alone, so that a difference between the two is
due to the refusals, and not to tuning.
"""

import tempfile
from pathlib import Path

from peft import PeftModel

from driftbook.models import loading
from driftbook.study.grid import twin_variant
from driftbook.study.study_file import Study
from driftbook.training import examples, fit


def build(name: str, study: Study, folder: Path) -> None:
    """Tune the twin of this name, and save its merged weights and its tokenizer in `folder`.

    Raises:
        ValueError: its examples cannot be trained on, or the training changed nothing.
        VariantFailure: the training diverged.
    """
    variant = twin_variant(study, name)
    base = loading.load(study.bases[variant.base_model], variant.base_model, study)
    prepared = examples.prepare("sft", base, study, variant.dataset)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        adapter = Path(scratch) / "adapter"  # its configuration names a path of this machine
        trained = fit.train(variant, base, prepared, study, adapter)
        if trained.record["no_op"]:
            raise ValueError(f"twins.{name}: {fit.NO_OP}; raise its learning_rate or its epochs")
        merged = PeftModel.from_pretrained(base.model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder, safe_serialization=True)
    base.tokenizer.save_pretrained(folder)


def check_disjoint(name: str, study: Study) -> None:
    """Raise a ValueError where a twin would be tuned on what a benchmark asks: then its refusals
    would show memory, and not alignment.
    """
    examples.check_apart(f"twins.{name} is tuned on", study.twins[name].data, study)
