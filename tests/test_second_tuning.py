"""Runs and their repairs tuned once more: which variants, from which adapter, what is refused."""

import copy
import dataclasses
import json
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from peft import PeftModel

from conftest import one_sentence, write_study
from driftbook.batch import jobs, keys
from driftbook.models import adapters, loading
from driftbook.models.fingerprint import fingerprint
from driftbook.models.sampling import VariantFailure
from driftbook.study import folders
from driftbook.study.files import file_digest
from driftbook.study.study_file import load
from driftbook.study.tables import RUNS
from driftbook.training import examples, mitigations, repairs, stage
from driftbook.training import fit as fitting
from fitted import KillAfter, Killed
from test_mitigations import CONTENT

pytest_plugins = ["batches", "fitted"]
NOTHING = 1e-12  # a rate at which weights stay what they are
AGAIN = {"kind": "second_tuning", "data": "sft", "values": [NOTHING, 5.0e-3], "epochs": 2}
OF_LORA = AGAIN | {"blocks": ["main"], "of": ["rescale", "resta", "mixing"]}


def content(**mitigations) -> dict:
    """The study of all kinds of repairs, with these second tunings."""
    made = copy.deepcopy(CONTENT)
    made["mitigations"] |= {"again": OF_LORA, **mitigations}
    return made


@pytest.fixture(scope="module")
def study(data_folder, tmp_path_factory):
    return load(write_study(tmp_path_factory.mktemp("again"), content() | {"name": "again"}))


# ---- variants
def test_plain_runs_and_what_was_made_of_them_are_tuned_again_at_each_rate(study):
    again = [one for one in study.variants if one.made_in == "retune"]
    of = {one.run_id: one for one in study.variants}
    assert {one.mitigation for one in again} == {
        f"again {rate}{after}"
        for rate in ("1e-12", "0.005")
        for after in ("", *(f" after {one}" for one in WANTED))
    }
    for one in again:
        parent = of[one.parent_run_id]
        assert (one.objective, one.dataset, one.n_train, one.epochs) == ("sft", "sft", 32, 2)
        assert one.repair["of"] == parent.repair
        assert one.repair["first"]["learning_rate"] == parent.learning_rate == 5e-3
        assert one.seed != parent.seed
    seeds = {(one.repair["first"]["seed"], one.learning_rate): set() for one in again}
    for one in again:
        seeds[one.repair["first"]["seed"], one.learning_rate].add(one.seed)
    assert all(len(own) == 1 for own in seeds.values())  # plain and defended see the same order
    assert len(set.union(*seeds.values())) == len(seeds) == 2 * 2  # seeds, rates


WANTED = ("rescale 0.25", "rescale 0.75", "resta 0.5", "mixing 0.2")


def test_they_are_made_in_a_stage_of_their_own_after_all_others(study):
    assert keys.stages(study)[:3] == ("train", "mitigate", "retune")
    assert keys.page("retune") != keys.page("train")
    assert keys.notebook(keys.NOTEBOOKS["retune"]) == keys.notebook(keys.NOTEBOOKS["train"])
    every = [set(study.of_stage(one, "tiny-llama")) for one in keys.stages(study)[:3]]
    assert sum(map(len, every)) == len(set.union(*every)) == len(study.of_base("tiny-llama"))


WRONG = {
    "an unknown name": ({"of": ["rescal"]}, ["'rescal'", "rescale"]),
    "itself": ({"of": ["again"]}, ["'again'", "under of"]),
    "of nothing": ({"of": []}, ["needs of"]),
    "without data": ({"data": None}, ["needs data"]),
    "data that are not there": ({"data": "chat"}, ["data.chat", "expected one of sft"]),
    "the held-out answers": ({"data": "heldout"}, ["data.heldout"]),
    "a rate of nothing": ({"values": [0.0]}, ["above 0"]),
    "an encoder that is not kept": ({"blocks": ["main", "p_tuning"]}, ["p_tuning", "applies to"]),
    "of another block": ({"of": ["of_ia3"]}, ["of_ia3", "none of its blocks (main)"]),
    "a repair of another form": ({"blocks": ["ia3"], "of": ["of_ia3"]}, ["of_ia3", "of ia3"]),
    "a repair of a soft prompt": ({"blocks": ["prompts"], "of": ["rescale"]}, ["none of its"]),
    "a setting of another kind": ({"rank": 4}, ["has no rank"]),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_sentence(case, tmp_path, data_folder):
    changes, words = case
    wrong = {key: value for key, value in (OF_LORA | changes).items() if value is not None}
    more = content(again=wrong)
    more["grid"] += [block for block in BLOCKS if block["name"] not in names(more)]
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, more))
    said = one_sentence(error.value)
    assert all(word in said for word in words), said


def names(made: dict) -> set[str]:
    return {block["name"] for block in made["grid"]}


BLOCKS = [
    {"name": "p_tuning", "methods": ["p_tuning"], "objectives": ["sft"], "seeds": [1]}
    | {"learning_rates": {"p_tuning": [5.0e-3]}}
]


# ---- tunings
SOFT = AGAIN | {"blocks": ["prompts", "ia3"], "of": ["both"], "epochs": 1}


@pytest.fixture(scope="module")
def made(bases, data_folder, tmp_path_factory):
    """A study whose first run of each kind was trained, repaired and tuned again, in its folder;
    the base model is a random one.
    """
    wanted = content(soft=SOFT, both={"kind": "constrained_sft", "blocks": ["prompts", "ia3"]})
    return Made(load(write_study(tmp_path_factory.mktemp("made"), wanted)), bases["llama"])


class Made:
    def __init__(self, study, base):
        self.study, self.base = study, base
        self.of = {one.run_id: one for one in study.variants}
        self.examples = stage.prepare_all(study.of_stage("retune", "tiny-llama"), base, study)

    def make(self, variant) -> dict:
        """A variant with all that it is made of, unless it is there; its record."""
        place = folders.folder(self.study, variant)
        if not RUNS.path(place).is_file():
            others = [variant.parent_run_id, (variant.repair or {}).get("safety_run_id")]
            for run_id in filter(None, others):
                self.make(self.of[run_id])
            self.anew(variant)
        return RUNS.read(place).iloc[0].to_dict()

    def anew(self, variant):
        if variant.made_in == "mitigate":
            return stage.repair_variant(variant, self.base, self.study)
        own = self.examples | stage.prepare_all([variant], self.base, self.study)
        return stage.train_variant(variant, self.base, self.study, own)

    def named(self, mitigation: str, method="lora"):
        every = self.study.of_base("tiny-llama")
        return next(o for o in every if o.mitigation == mitigation and o.method == method)

    def logits(self, variant):
        ids = torch.arange(20)[None] + 10
        with (
            adapters.attached(self.base.model, folders.adapter(self.study, variant)) as model,
            torch.inference_mode(),
        ):
            return model(input_ids=ids).logits.clone()


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("again 1e-12", "lora"),
        ("again 1e-12 after resta 0.5", "lora"),
        ("soft 1e-12 after both", "ia3"),
        ("soft 1e-12 after both", "prompt_tuning"),
    ],
)
def test_at_no_rate_the_parent_stays_what_it_is_and_the_base_too(made, label, method):
    one, before = made.named(label, method), fingerprint(made.base.model)
    record, parent = made.make(one), made.of[one.parent_run_id]
    assert fingerprint(made.base.model) == before
    assert torch.allclose(made.logits(one), made.logits(parent), atol=1e-5)
    assert record["no_op"]
    assert record["kl_base"] == pytest.approx(made.make(parent)["kl_base"], abs=1e-6) != 0
    assert record["trained_seed"] == one.seed


def test_at_a_rate_it_learns_from_where_its_parent_was(made):
    for label in ("again 0.005", "again 0.005 after resta 0.5"):
        one = made.named(label)
        record, parent = made.make(one), made.make(made.of[one.parent_run_id])
        assert record["kl_init"] > 1e-4
        assert record["loss_first"] < parent["loss_first"]
        assert record["nll_base"] == pytest.approx(parent["nll_base"], abs=1e-6)


def test_it_keeps_its_parents_form_and_the_dropout_of_its_method_and_peft_loads_it(made):
    one = made.named("again 0.005 after resta 0.5")
    made.make(one)
    folder, parent = (folders.adapter(made.study, of) for of in (one, made.of[one.parent_run_id]))
    config, old = (json.loads((of / "adapter_config.json").read_text()) for of in (folder, parent))
    assert config["r"] == old["r"] == 2 * 4
    assert (config["lora_dropout"], old["lora_dropout"]) == (0.1, 0.0)
    fresh = copy.deepcopy(made.base.model)
    with torch.inference_mode():
        by_peft = PeftModel.from_pretrained(fresh, folder)(torch.arange(20)[None] + 10).logits
    assert torch.allclose(by_peft, made.logits(one), atol=1e-5)


def test_a_changed_parent_is_tuned_anew_and_nothing_else(finished):
    study = finished.study()
    base = loading.load(study.bases["tiny-llama"], "tiny-llama", study)
    every = {one.mitigation: one for one in study.of_stage("retune", "tiny-llama")}
    assert set(every) == {
        "again 0.005",
        "again 0.005 after resta 0.5",
        "again 0.005 after mixing 0.2",
    }
    prepared = stage.prepare_all(list(every.values()), base, study)

    def again() -> set[str]:
        """Which variants are made when the stage runs, as notebook 02 runs it."""
        done = jobs.run_variants(
            "retune",
            study,
            "tiny-llama",
            list(every.values()),
            lambda one: repairs.made_from(study, one),
            lambda one, _: stage.train_variant(one, base, study, prepared),
        )
        return set(done.run_id[~done.reused])

    assert again() == set()
    child = every["again 0.005 after resta 0.5"]
    path = finished.folder / "runs" / child.parent_run_id / "adapter" / adapters.WEIGHTS
    old = path.read_bytes()
    try:
        path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        assert again() == {child.run_id}
    finally:
        path.write_bytes(old)
        assert again() == {child.run_id}


def test_a_killed_one_goes_on_unless_its_parent_changed(made, tmp_path, often):
    one = made.named("again 0.005 after resta 0.5")
    made.make(one)
    digests = [file_digest(folders.adapter(made.study, one) / adapters.WEIGHTS)]

    def train(step=None) -> int:
        own, looks = made.examples[examples.way(one)], KillAfter(step)
        with pytest.raises(Killed) if step else nullcontext():
            fitting.train(one, made.base, own, made.study, tmp_path / "adapter", looks)
            digests.append(file_digest(tmp_path / "adapter" / adapters.WEIGHTS))
        return looks.began

    assert (train(3), train()) == (0, 3)
    assert digests[1] == digests[0]
    train(3)
    path = folders.adapter(made.study, made.of[one.parent_run_id]) / adapters.WEIGHTS
    old = path.read_bytes()
    path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    assert train() == 0
    path.write_bytes(old)


def test_of_a_failed_run_there_is_nothing_to_tune(made):
    one = made.named("again 0.005 after mixing 0.2")
    lost = dataclasses.replace(one, parent_run_id=made.named("rescale 0.75").run_id)
    with pytest.raises(VariantFailure) as error:
        made.anew(lost)
    assert "of which it is made" in one_sentence(error.value)
    assert mitigations.parent(made.study, one) == made.named("mixing 0.2")
    assert isinstance(made.make(one), dict)
    assert pd.notna(made.make(one)["adapter_sha256"])
