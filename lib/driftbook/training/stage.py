"""What the training of one variant writes: its adapter, its record, its curve, and its drift."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from driftbook.models import loading
from driftbook.models.loading import Loaded
from driftbook.study import folders
from driftbook.study.study_file import Study
from driftbook.study.tables import CURVES, DRIFT, RUNS
from driftbook.study.variants import Variant
from driftbook.training import drift, training
from driftbook.training.drift import Rates, Sample
from driftbook.training.training import Prepared, Way

Watch = tuple[Sample, Rates]  # a fixed sample, and what it shows of the base model


def prepare_all(variants: Sequence[Variant], base: Loaded, study: Study) -> dict[Way, Prepared]:
    """The examples of every objective and data set that these variants train on, in tokens."""
    ways = dict.fromkeys(training.way(one) for one in variants if one.dataset)
    return {way: training.prepare(way[0], base, study, *way[1:]) for way in ways}


def watch(base: Loaded, study: Study) -> Watch | None:
    """What is looked at while a variant trains; None where the study has no key `drift`."""
    sample = drift.sample_of(study, base, loading.load)
    return sample and (sample, sample.look(base.model, base.tokenizer))


def train_variant(
    variant: Variant,
    base: Loaded,
    study: Study,
    prepared: dict[Way, Prepared],
    watched: Watch | None = None,
) -> list[Path]:
    """The files of a trained variant, or of the base model itself, in the variant's folder.

    Raises:
        VariantFailure: the training failed; see `training.train`.
    """
    folder, looks = folders.folder(study, variant), None
    if variant.method == "none":
        trained = training.untouched(variant, base, study)
    else:
        if watched and variant.dataset:
            looks = drift.callback_of(study.drift, watched[0], base, watched[1], variant)
        examples = prepared.get(training.way(variant))
        trained = training.train(variant, base, examples, study, folder / "adapter", looks)
    files = [
        RUNS.write(pd.DataFrame([trained.record]), folder),
        CURVES.write(trained.curve, folder),
    ]
    files += [DRIFT.write(looks.rows, folder)] if looks else []
    return files + folders.adapter_files(study, variant)
