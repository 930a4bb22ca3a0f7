"""Mitigations in a study file: which variants they make, what is refused, and one small study of
all kinds through the real batch.
"""

import copy
import dataclasses
import json

import pandas as pd
import pytest
import torch

from batches import SMOKE
from conftest import local, one_sentence, write_study
from driftbook.batch import collecting, jobs, keys, preparing
from driftbook.models import adapters, loading
from driftbook.models.sampling import VariantFailure
from driftbook.models.scoring import Scorer
from driftbook.study import folders
from driftbook.study.methods import MADE_IN, MITIGATION_KINDS
from driftbook.study.study_file import Study, load
from driftbook.study.tables import MODULES, RUNS
from driftbook.training import mitigations, repairs
from driftbook.training.examples import held_out

pytest_plugins = ["batches"]
CONTENT = copy.deepcopy(SMOKE) | {"name": "mitigated", "analyses": ["safe_lora"]}
CONTENT["grid"] = CONTENT["grid"][:4]
for _number in (0, 3):
    CONTENT["grid"][_number]["seeds"] = [1, 2]


def changed(*path, value) -> dict:
    """The content with another value at a path."""
    content = copy.deepcopy(CONTENT)
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return content


# ---- variants
def test_each_value_and_each_control_is_a_variant_with_its_parent_named():
    study = Study(**CONTENT)
    variants = {variant.run_id: variant for variant in study.variants}
    assert len(variants) == len(study.variants)
    repaired = [one for one in variants.values() if one.mitigation and one.made_in != "retune"]
    main = [one for one in repaired if variants[one.parent_run_id].method == "lora"]
    assert {one.mitigation for one in main} >= {
        "safe_lora 2",
        "safe_lora 2, same norm",
        "of_all 4, same modules zeroed",
        "subspace 0.5, random subspace",
        "template",
        "mixing 0.2",
        "constrained",
    }
    assert (
        sum(one.repair["name"] == "safe_lora" for one in main) == 2 * 6
    )  # seeds, itself and five controls
    for one in repaired:
        parent = variants[one.parent_run_id]
        assert parent.mitigation is None
        assert (parent.base_model, parent.method, parent.seed, parent.objective) == (
            one.base_model,
            one.method,
            one.seed,
            one.objective,
        )
        assert one.made_in == MADE_IN[MITIGATION_KINDS[one.repair["kind"]].when]
        assert json.loads(one.settings) == json.loads(parent.settings) | {"mitigation": one.repair}


def test_a_parent_is_the_same_variant_with_and_without_mitigations():
    plain = {key: value for key, value in CONTENT.items() if key not in ("mitigations", "analyses")}
    without = [variant.run_id for variant in Study(**plain).variants]
    assert without == [
        variant.run_id for variant in Study(**CONTENT).variants if not variant.mitigation
    ]


def test_a_stage_gets_what_it_makes():
    study = Study(**CONTENT)
    making = ("train", "mitigate", "retune")
    trained, repaired, again, every = (
        study.of_stage(stage, "tiny-llama") for stage in (*making, "respond")
    )
    assert keys.stages(study) == (*making, "respond", "judge", "answer", "utility")
    assert set(trained) | set(repaired) | set(again) == set(every)
    assert len(trained) + len(repaired) + len(again) == len(every)
    assert {one.repair["kind"] for one in trained if one.mitigation} == {
        "mixing",
        "constrained_sft",
        "safegrad",
    }
    assert set(keys.analyses(study)) == {"safe_lora"}


def test_a_safety_run_is_that_of_the_same_repetition():
    study = Study(**CONTENT)
    variants = {variant.run_id: variant for variant in study.variants}
    merged = [
        one
        for one in variants.values()
        if one.mitigation and one.repair["kind"] in ("resta", "safe_merge", "soup", "mod")
    ]
    assert len(merged) == 8
    for one in merged:
        safety = variants[one.repair["safety_run_id"]]
        assert (safety.dataset, safety.method) == ("safety", one.method)
        assert safety.repetition == one.repetition


def test_another_checkpoint_of_a_pair_is_another_variant_and_another_key():
    other = changed(
        "bases",
        "tiny-llama",
        "pairs",
        "alignment",
        "unaligned",
        value={"source": "someone/else", "revision": "a" * 40},
    )
    before, after = Study(**CONTENT), Study(**other)
    gone = {one.run_id for one in before.variants} - {one.run_id for one in after.variants}
    assert gone == {
        one.run_id
        for one in before.variants
        if one.mitigation and one.repair.get("pair") == "alignment"
    }
    stages = [
        stage
        for stage in keys.stages(before)
        if keys.settings(stage, before, "tiny-llama", str_of)
        != keys.settings(stage, after, "tiny-llama", str_of)
    ]
    assert stages == ["mitigate"]


def str_of(source, study) -> str:
    return source.source


# ---- what is refused
M = ("mitigations", "safe_lora")
WRONG = {
    "no such pair": ((*M, "pair"), "chat", ["'safe_lora'", "'chat'", "bases.tiny-llama", "pairs:"]),
    "no such block": ((*M, "blocks"), ["man"], ["'man'", "main, ia3"]),
    "a soft prompt": (
        (*M, "blocks"),
        ["prompts"],
        ["prompt_tuning", "no weight update", "template, mod, mixing, constrained_sft"],
    ),
    "averaging of IA3": (
        ("mitigations", "average", "blocks"),
        ["ia3"],
        ["weight averaging", "ia3", "lora"],
    ),
    "no pair": ((*M, "pair"), None, ["needs pair"]),
    "no values": (
        ("mitigations", "rescale"),
        {"kind": "rescale", "blocks": ["main"]},
        ["needs values"],
    ),
    "half a module": ((*M, "values"), [1.5], ["1.5", "number of modules"]),
    "a factor above one": (("mitigations", "rescale", "values"), [2.0], ["outside 0 to 1"]),
    "a value twice": (("mitigations", "rescale", "values"), [0.5, 0.5], ["repeats"]),
    "a value that is text": (("mitigations", "rescale", "values"), ["1e-1"], ["is text to YAML"]),
    "a setting of another kind": (("mitigations", "rescale", "rank"), 4, ["rescale has no rank"]),
    "a subspace without rank": (
        ("mitigations", "subspace"),
        {
            "kind": "safe_lora",
            "blocks": ["main"],
            "pair": "alignment",
            "operator": "subspace",
            "values": [0.5],
        },
        ["needs rank"],
    ),
    "a control of nothing": (
        ("mitigations", "exact", "controls"),
        ["random subspace"],
        ["no meaning for the exact operator"],
    ),
    "an unknown control": ((*M, "controls"), ["placebo"], ["placebo", "'same norm'"]),
    "no such safety block": (("mitigations", "resta", "safety"), "safer", ["'safer'"]),
    "a safety block without the method": (
        ("mitigations", "resta", "safety"),
        "ia3",
        ["no run of lora"],
    ),
    "no such data": (("mitigations", "mixing", "data"), "safe", ["data.safe"]),
    "all of the data": (("mitigations", "mixing", "values"), [1.0], ["leaves nothing"]),
    "two blocks of one name": (("grid", 1, "name"), "main", ["two blocks of the name 'main'"]),
    "a reserved name": (
        ("mitigations", "parent"),
        {"kind": "rescale", "blocks": ["main"], "values": [0.5]},
        ["'parent'", "another name"],
    ),
    "a module trained whole": (
        ("methods", "lora", "modules_to_save"),
        ["lm_head"],
        ["trains modules_to_save"],
    ),
    "an init that changes the base": (
        ("methods", "lora", "init_lora_weights"),
        "pissa",
        ["changes the base model itself"],
    ),
    "the same checkpoint twice": (
        ("bases", "tiny-llama", "pairs", "alignment", "unaligned"),
        local("llama/aligned"),
        ["the same checkpoint", "V is zero"],
    ),
    "safety added to itself": (("mitigations", "resta", "safety"), "main", ["to itself"]),
    "held-out answers mixed in": (
        ("mitigations", "mixing", "data"),
        "heldout",
        ["held-out answers"],
    ),
    "the last snapshot alone": (
        ("mitigations", "average", "values"),
        [0.2],
        ["the last one alone"],
    ),
    "a number in place of a list": (
        ("mitigations", "rescale", "values"),
        0.5,
        ["write a list, [0.5]"],
    ),
    "a number of modules as threshold": ((*M, "select"), "threshold", ["say select: top"]),
    "a misspelt twin": (
        ("bases", "tiny-llama", "pairs", "alignment"),
        {"unalligned": local("llama/stage0")},
        ["did you mean 'unaligned'"],
    ),
    "biases that a control would leave": (
        ("methods", "lora", "bias"),
        "lora_only",
        ["trains bias", "methods.lora"],
    ),
    "constrained preferences": (("grid", 0, "objectives"), ["dpo"], ["by dpo"]),
    "a comma": (
        ("mitigations", "a, b"),
        {"kind": "rescale", "blocks": ["main"], "values": [0.5]},
        ["no comma"],
    ),
    "an unknown kind": ((*M, "kind"), "safelora", ["safelora", "'safe_lora'"]),
    "an unknown analysis": (("analyses",), ["safelora"], ["safelora", "'safe_lora'"]),
    "an analysis of nothing": (("mitigations",), {}, ["no mitigations"]),
    "an unknown key": ((*M, "treshold"), 1, ["did you mean"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_sentence(case, tmp_path):
    path, value, words = case
    if case is WRONG["an unknown key"]:
        words = ["unknown key"]
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, changed(*path, value=value))).variants  # noqa: B018
    said = one_sentence(error.value)
    assert all(word in said for word in words), said


# ---- the batch
def test_every_kind_and_control_is_made_and_scored(finished):
    study = finished.study()
    runs = collecting.runs(study).set_index("run_id")
    assert runs.status.eq("ok").all()
    assert set(runs.index) == {variant.run_id for variant in study.variants}
    for variant in study.variants:
        scored = {path.name for path in finished.run_folder(variant).glob("*.done.json")}
        assert scored == {
            f"{stage}.done.json"
            for stage in (variant.made_in, "respond", "judge", "answer", "utility")
        }


def of(batch, label: str, method: str = "lora"):
    """The variants of a mitigation, by their parents."""
    return {
        one.parent_run_id: one
        for one in batch.study().variants
        if one.mitigation == label and one.method == method
    }


def test_a_repair_keeps_its_parent_and_has_a_record_of_its_own(finished):
    runs, modules = (
        collecting.runs(finished.study()).set_index("run_id"),
        finished.tables()["modules"],
    )
    for parent, one in of(finished, "safe_lora 2").items():
        assert runs.adapter_sha256[one.run_id] != runs.adapter_sha256[parent]
        assert runs.trainer_arguments[one.run_id] == runs.trainer_arguments[parent]
        own = modules[modules.run_id == one.run_id]
        assert own.projected.sum() == 2
        assert len(own) == 4
        assert (own.share_kept[own.projected] < 1).all()
    for parent, one in of(finished, "template").items():
        assert runs.adapter_sha256[one.run_id] == runs.adapter_sha256[parent]
    zeroed = of(finished, "of_all 4, same modules zeroed")
    assert (
        runs.kl_base[[one.run_id for one in zeroed.values()]].abs() < 1e-6
    ).all()  # all four modules: the base model again
    assert runs.no_op[[one.run_id for one in zeroed.values()]].all()


def test_controls_keep_what_they_say(finished):
    modules = finished.tables()["modules"].set_index(["run_id", "module"])
    for parent, treated in of(finished, "safe_lora 2").items():
        kept = modules.share_kept[treated.run_id].astype(float)
        for control in ("same norm", "noise"):
            same = modules.share_kept[
                of(finished, f"safe_lora 2, {control}")[parent].run_id
            ].astype(float)
            assert same.to_numpy() == pytest.approx(kept.to_numpy(), rel=1e-4)
        zeroed = modules.loc[of(finished, "safe_lora 2, same modules zeroed")[parent].run_id]
        assert zeroed.projected.tolist() == modules.projected[treated.run_id].tolist()
        assert (
            modules.projected[
                of(finished, "safe_lora 2, random modules zeroed")[parent].run_id
            ].sum()
            == 2
        )


def test_rescaling_moves_the_dose_between_the_base_and_the_parent(finished):
    runs = collecting.runs(finished.study()).set_index("run_id")
    for parent, quarter in of(finished, "rescale 0.25").items():
        assert (
            0
            < runs.kl_base[quarter.run_id]
            < runs.kl_base[of(finished, "rescale 0.75")[parent].run_id]
            < runs.kl_base[parent]
        )


def test_a_product_has_a_dose_and_no_weights(finished):
    study, runs = finished.study(), collecting.runs(finished.study()).set_index("run_id")
    variants = {one.run_id: one for one in study.variants}
    base = loading.load(study.bases["tiny-llama"], "tiny-llama", study)
    pairs = held_out(base, study)[0]
    for parent, one in of(finished, "mod 0.5").items():
        assert not (finished.run_folder(one) / "adapter").exists()
        assert runs.loc[one.run_id, ["adapter_sha256", "n_stored", "findings"]].isna().all()
        assert set(one.parts) == {parent, one.repair["safety_run_id"]}
        mixed = 0.0
        for run_id in one.parts:
            with adapters.attached(base.model, folders.adapter(study, variants[run_id])) as model:
                found = Scorer(model, base.tokenizer).distributions(pairs)
            mixed = mixed + 0.5 * torch.cat(found).double()
        said = torch.tensor([token for _, answer in pairs for token in answer])
        nll = -mixed.log_softmax(1).gather(1, said[:, None]).mean()
        assert runs.nll[one.run_id] == pytest.approx(float(nll), abs=1e-4)
        assert 0 < runs.kl_base[one.run_id] < runs.kl_base[parent]


def test_trained_mitigations_are_trained_otherwise(finished):
    runs = collecting.runs(finished.study()).set_index("run_id")
    for parent, mixed in of(finished, "mixing 0.2").items():
        assert runs.n_examples[mixed.run_id] == runs.n_examples[parent] + 8  # 8 of 40 are a fifth
    for parent, held in of(finished, "constrained").items():
        assert runs.n_examples[held.run_id] == runs.n_examples[parent]
        # a training of few steps shows that it differs, not which of the two moves less
        assert 0 < runs.kl_base[held.run_id] != runs.kl_base[parent]
    for parent, held in of(finished, "safegrad 1").items():
        assert runs.n_examples[held.run_id] == runs.n_examples[parent]
        assert 0 < runs.kl_base[held.run_id] != runs.kl_base[parent]
        said = json.loads(runs.trainer_arguments[held.run_id])
        assert said["alignment_examples_per_step"] >= 1


def test_a_changed_parent_is_repaired_anew_and_nothing_else(finished):
    study = finished.study()
    base, variants = (
        loading.load(study.bases["tiny-llama"], "tiny-llama", study),
        list(study.of_stage("mitigate", "tiny-llama")),
    )

    def again() -> set[str]:
        """Which variants are made when the stage runs, as notebook 03 runs it."""

        def work(variant, folder):
            record, modules = repairs.make(variant, study, base, folder)
            return [
                RUNS.write(pd.DataFrame([record]), folder),
                MODULES.write(modules, folder),
                *folders.adapter_files(study, variant),
            ]

        done = jobs.run_variants(
            "mitigate",
            study,
            "tiny-llama",
            variants,
            lambda variant: repairs.made_from(study, variant),
            work,
        )
        return set(done.run_id[~done.reused])

    assert again() == set()
    parent = next(iter(of(finished, "rescale 0.25")))
    children = {one.run_id for one in variants if one.parent_run_id == parent}
    assert any(one.parts for one in variants if one.run_id in children)
    path = finished.folder / "runs" / parent / "adapter" / "adapter_model.safetensors"
    old = path.read_bytes()
    try:
        path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        assert again() == children
    finally:
        path.write_bytes(old)
        assert again() == children


def test_a_repair_that_cannot_be_done_is_a_failed_run_and_its_sentence_is_kept(finished, tmp_path):
    study = finished.study()
    base, one = (
        loading.load(study.bases["tiny-llama"], "tiny-llama", study),
        next(iter(of(finished, "of_all 4").values())),
    )
    settings = json.loads(one.settings)
    settings["mitigation"]["value"] = 99
    with pytest.raises(VariantFailure, match="the adapter has 4"):
        repairs.make(dataclasses.replace(one, settings=json.dumps(settings)), study, base, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_twin_that_cannot_be_read_is_told_before_any_training(standins, tmp_path):
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "pytorch_model.bin").write_bytes(b"x")
    study = load(
        write_study(
            tmp_path,
            changed(
                "bases",
                "tiny-llama",
                "pairs",
                "alignment",
                "unaligned",
                value={"source": "a/b", "path": str(tmp_path / "twin")},
            ),
        )
    )
    with pytest.raises(ValueError) as error:
        preparing.prepare("tiny-llama", study)
    assert "pickles" in one_sentence(error.value)


def test_spectra_of_every_pair_are_there(finished):
    spectra = finished.tables()["spectra"]
    assert set(spectra.pair) == {"alignment", "instruction", "placebo"}
    assert spectra.groupby("pair").module.nunique().eq(4).all()
    assert (
        spectra.groupby(["pair", "module"]).singular_value.apply(lambda s: (s**2).sum())
        <= spectra.groupby(["pair", "module"]).norm_v.first() ** 2 * 1.001
    ).all()
    assert isinstance(spectra, pd.DataFrame)


def test_a_mitigation_is_one_entry_and_one_function_of_its_name():
    after = {kind for kind, known in MITIGATION_KINDS.items() if known.when in ("after", "test")}
    assert after == {
        name
        for name, one in vars(mitigations).items()
        if getattr(one, "__annotations__", {}).get("one") is mitigations.Repair
    }
