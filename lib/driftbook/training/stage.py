"""What the training or the repair of one variant writes: its adapter, its record, and more."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from driftbook.models import loading
from driftbook.models.loading import Loaded
from driftbook.study import folders
from driftbook.study.study_file import Study
from driftbook.study.tables import CURVES, DRIFT, MODULES, RUNS, SPECTRA
from driftbook.study.variants import Variant
from driftbook.training import drift, examples, fit, mitigations, repairs
from driftbook.training.drift import Rates, Sample
from driftbook.training.examples import Prepared, Way

Watch = tuple[Sample, Rates]  # a fixed sample, and what it shows of the base model


def prepare_all(variants: Sequence[Variant], base: Loaded, study: Study) -> dict[Way, Prepared]:
    """The examples of every objective and data set that these variants train on, in tokens."""
    ways = dict.fromkeys(examples.way(one) for one in variants if one.dataset)
    return {way: examples.prepare(way[0], base, study, *way[1:]) for way in ways}


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
        VariantFailure: the training failed (see `fit.train`), or that of the run which it goes on
            from.
    """
    folder, looks = folders.folder(study, variant), None
    if variant.method == "none":
        trained = fit.untouched(variant, base, study)
    else:
        if watched and variant.dataset:
            looks = drift.callback_of(study.drift, watched[0], base, watched[1], variant)
        own = prepared.get(examples.way(variant))
        repairs.check_made(study, variant)
        trained = fit.train(variant, base, own, study, folder / "adapter", looks)
    files = [
        RUNS.write(pd.DataFrame([trained.record]), folder),
        CURVES.write(trained.curve, folder),
    ]
    files += [DRIFT.write(looks.rows, folder)] if looks else []
    return files + folders.adapter_files(study, variant)


def repair_variant(variant: Variant, base: Loaded, study: Study) -> list[Path]:
    """The files of a repaired variant, in the variant's folder; see `repairs.make`."""
    folder = folders.folder(study, variant)
    record, modules = repairs.make(variant, study, base, folder)
    files = [RUNS.write(pd.DataFrame([record]), folder), MODULES.write(modules, folder)]
    return files if variant.parts else files + folders.adapter_files(study, variant)


def pair_spectra(base_model: str, study: Study) -> pd.DataFrame:
    """The table `spectra` of a base model's pairs, written for the study: of the modules that the
    first parent of its repairs updates, whatever shard is at work; empty where there is none, or no
    pair.
    """
    repaired = study.of_stage("mitigate", base_model)
    parents = [mitigations.parent(study, one) for one in repaired]
    made = [
        folders.adapter(study, one)
        for one in parents
        if one.method != "none" and all(path.exists() for path in folders.adapter_files(study, one))
    ]
    updating = [folder for folder in dict.fromkeys(made) if repairs.has_update(folder)]
    found = SPECTRA.empty()
    if updating and study.bases[base_model].pairs:
        found = repairs.study_spectra(study, base_model, updating[0])
    SPECTRA.write(found, study.folder / "spectra" / base_model)
    return found
