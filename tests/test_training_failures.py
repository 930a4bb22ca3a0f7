"""What a training does where it fails, and the adapter that it leaves on disk."""

import pandas as pd
import pytest
import torch

from conftest import one_sentence, write_study
from driftbook.batch import jobs
from driftbook.models import adapters, sampling
from driftbook.study import folders
from driftbook.study.files import read_json, write_json
from driftbook.study.study_file import load
from driftbook.study.tables import RUNS
from driftbook.training import examples
from driftbook.training import fit as fitting

pytest_plugins = ["fitted"]


# ---- failures
@pytest.fixture
def poisoned(monkeypatch):
    """Makes every adapter of one method hold a NaN from the start."""
    create = adapters.create

    def broken(variant, *rest):
        model = create(variant, *rest)
        if variant.method == "lora":
            next(value for name, value in model.named_parameters() if "lora_A" in name).data[
                0, 0
            ] = float("nan")
        return model

    monkeypatch.setattr(adapters, "create", broken)


@pytest.mark.parametrize("objective", ["sft", "dpo", "untrained"])
def test_divergence_is_the_variants_failure_and_the_base_is_clean(
    bases, trained, poisoned, objective
):
    base, ids = bases["llama"].model, torch.tensor([list(range(20, 60))])
    before = base(input_ids=ids).logits
    with pytest.raises(sampling.VariantFailure) as error:
        trained("lora", objective, again="poisoned")
    assert any(word in one_sentence(error.value) for word in ("diverged", "not finite"))
    assert torch.equal(base(input_ids=ids).logits, before)
    assert trained("ia3", again="after the poison", n=16).record["status"] == "ok"


def training(study, base, prepared):
    """The work of a job that trains the study's variants."""

    def work(variant, folder):
        done = (
            fitting.untouched(variant, base, study)
            if variant.method == "none"
            else fitting.train(variant, base, prepared, study, folder / "adapter")
        )
        return [
            RUNS.write(pd.DataFrame([done.record]), folder),
            *folders.adapter_files(study, variant),
        ]

    return work


def run_job(stage, study, work):
    return jobs.run_variants(stage, study, "tiny-llama", study.variants, lambda variant: [], work)


def test_a_failed_variant_is_recorded_and_the_job_goes_on(
    bases, content, tmp_path, data_folder, poisoned
):
    content["name"] = "failing"
    content["grid"][0] |= {"objectives": ["sft"], "methods": ["lora", "ia3"]}
    content["data"]["sft"]["n"] = 16
    prepared = examples.prepare("sft", bases["llama"], load(write_study(tmp_path, content)))
    # any file: its bytes are the base's identity here
    content["bases"]["tiny-llama"]["path"] = content["data"]["sft"]["path"]
    study = load(write_study(tmp_path, content))
    work = training(study, bases["llama"], prepared)
    done = run_job("train", study, work).set_index("run_id")
    failed = next(variant for variant in study.variants if variant.method == "lora")
    assert done.status.to_dict() == {
        variant.run_id: "failed" if variant is failed else "ok" for variant in study.variants
    }
    mark = read_json(folders.folder(study, failed) / "train.done.json")
    assert "diverged" in one_sentence(mark["failure"])
    assert not (study.folder / "jobs").exists(), "it was not planned"
    assert jobs.failed_before(study, failed, "respond")
    again = run_job("respond", study, lambda variant, folder: [])
    assert failed.run_id not in set(again.run_id), (
        "a later stage must not score what has no adapter"
    )
    assert run_job("train", study, work).reused.all()


@pytest.mark.parametrize(
    ("failed", "lost"),
    [
        ("train", {"respond", "judge", "answer", "utility"}),
        ("respond", {"judge"}),
        ("answer", set()),
        ("utility", set()),
        ("judge", set()),
    ],
)
def test_a_failure_keeps_back_what_builds_on_it_and_nothing_else(make_study, content, failed, lost):
    """Stages that do not build on each other run in any order, so none may look at another's
    mark.
    """
    content["name"] = "lost"
    study = make_study(content)
    variant, stages = study.variants[1], ("train", "respond", "judge", "answer", "utility")
    for stage in stages:
        write_json(
            folders.folder(study, variant) / f"{stage}.done.json",
            {"status": "failed" if stage == failed else "ok"},
        )
    assert {stage for stage in stages if jobs.failed_before(study, variant, stage)} == lost


@pytest.mark.slow
def test_any_other_error_stops_the_job_and_names_the_variant(content, tmp_path, data_folder):
    content["name"] = "stopping"
    content["bases"]["tiny-llama"]["path"] = content["data"]["sft"]["path"]
    study = load(write_study(tmp_path, content))
    with pytest.raises(RuntimeError) as error:
        jobs.run_variants(
            "train",
            study,
            "tiny-llama",
            study.variants[1:],
            lambda variant: [],
            lambda variant, folder: 1 / 0,
        )
    assert study.variants[1].run_id in one_sentence(error.value)
    assert not (folders.folder(study, study.variants[1]) / "train.done.json").exists()


# ---- adapters on disk
@pytest.fixture
def adapter_copy(trained, tmp_path):
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    for path in trained("lora").folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refusal(base, folder) -> str:
    before = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError) as error, adapters.attached(base, folder):
        pass
    assert {name for name, _ in base.named_modules()} == before, (
        "an adapter that was refused must leave nothing behind"
    )
    assert not {"forward", "peft_config"} & set(base.__dict__)
    return one_sentence(error.value)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_torn_adapter_is_named(bases, adapter_copy, kept):
    path = adapter_copy / adapters.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    assert str(adapter_copy) in refusal(bases["llama"].model, adapter_copy)


def test_a_pickled_adapter_is_never_loaded(bases, adapter_copy):
    (adapter_copy / adapters.WEIGHTS).rename(adapter_copy / "adapter_model.bin")
    assert "pickle" in refusal(bases["llama"].model, adapter_copy)


def test_an_adapter_of_another_base_is_refused_and_the_base_stays_clean(
    bases, adapter_copy, data_folder
):
    from driftbook.miniature.families import build_model

    narrow = build_model("llama", bases["llama"].tokenizer, 0, width=32)
    assert "does not fit" in refusal(narrow, adapter_copy)


def test_an_adapter_with_a_damaged_configuration_is_refused(bases, adapter_copy):
    (adapter_copy / "adapter_config.json").write_text("{")
    assert str(adapter_copy) in refusal(bases["llama"].model, adapter_copy)
