"""Training with a second objective: rules that make one gradient of two against references in
float64, KL to the base against plain forward passes, and trainings of every method.
"""

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from conftest import SMALL, local, one_sentence, variants_of, write_study
from driftbook.benchmarks.data import items
from driftbook.doctors.data import examine_data
from driftbook.models import adapters
from driftbook.study.study_file import Study, load
from driftbook.training import examples, objectives
from driftbook.training import fit as fitting
from driftbook.training.objectives import Change, Second
from driftbook.training.steps import Forward, plain
from fitted import Trainings

pytest_plugins = ["fitted"]
METHODS = ("lora", "ia3", "prompt_tuning", "p_tuning")
KINDS = {
    "kl": {"values": [0.5]},
    "safegrad": {"values": [1.0]},
    "pcgrad": {},
    "mgda": {},
    "drift_budget": {"values": [1e-6], "eta": 1e3},
}


# ---- rules
def pairs(conflict: bool):
    """Gradients in float64 that point apart, or do not."""
    random = np.random.default_rng(0)
    for _ in range(10):
        g, a = random.normal(size=(2, 7)) * random.uniform(0.1, 5, (2, 1))
        yield torch.tensor(g), torch.tensor(a if (g @ a < 0) == conflict else -a)


@pytest.mark.parametrize("conflict", [True, False])
def test_one_gradient_is_made_of_two_as_the_papers_say(conflict):
    for g, a in pairs(conflict):
        away = g - a * float(np.dot(g, a) / np.dot(a, a)) if conflict else g
        apart = a - g * float(np.dot(a, g) / np.dot(g, g)) if conflict else a
        for found, wanted in (
            (objectives.safegrad(g, a, 0.7), away + 0.7 * a),
            (objectives.pcgrad(g, a), away + apart),
        ):
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
        assert (objectives.safegrad(g, a, 0.0) @ a).abs() < 1e-9 or not conflict

        def length(share, g=g, a=a):
            return float((share * g + (1 - share) * a).norm() ** 2)

        best = minimize_scalar(length, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).x
        found = objectives.mgda(g, a)
        assert found @ found <= min(length(best), length(0.0), length(1.0)) + 1e-9
        assert min(found @ g, found @ a) >= found @ found - 1e-6  # neither loss rises along it
    zero = torch.zeros_like(g)
    assert torch.equal(objectives.safegrad(g, zero, 1.0), g)
    assert torch.equal(objectives.mgda(g, g), g)


def test_a_budget_s_multiplier_grows_above_it_and_ends_at_zero():
    second = Second(Change("drift_budget", value=0.5, eta=2.0), [], 1, 0)
    g, a = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    made = [second.joined(g, a, loss)[1].item() for loss in (0.1, 1.0, 0.75, 0.1, 0.1)]
    assert made == pytest.approx([0.0, 1.0, 1.5, 0.7, 0.0])
    assert second.record()["multiplier"] == 0
    assert second.record()["mean_alignment_loss"] == pytest.approx(2.05 / 5)


def test_every_example_is_seen_once_a_round_in_the_order_of_the_seed():
    seen = {}
    for seed in (1, 2):
        second = Second(Change("kl", value=1.0), list("abcdefg"), 3, seed)
        seen[seed] = [one for step in range(7) for one in second.members(step)]
        rounds = [seen[seed][i : i + 7] for i in (0, 7, 14)]
        assert all(sorted(one) == list("abcdefg") for one in rounds)
        assert rounds[0] != rounds[1]
    assert seen[1] != seen[2]


# ---- KL to the base
@pytest.fixture
def second_study(data_folder, tmp_path):
    """Makes a study of all methods whose runs are also trained with second objectives."""

    def make(kinds=KINDS, objective="sft", n=8, n_fair=5, dropout=0.1, **more):
        content = copy.deepcopy(SMALL)
        content["methods"]["lora"]["lora_dropout"] = dropout
        content["data"]["sft"]["n"] = content["data"]["dpo"]["n"] = n
        content["data"]["heldout"]["n"] = 2
        content["data"]["align"] = {"format": "alpaca", "n": 6, **local("data/safety_sft.json")}
        content["data"]["align"]["also"] = ["fair"]
        content["data"]["fair"] = {"format": "alpaca", "n": n_fair}
        content["data"]["fair"] |= local("data/fairness_sft.json")
        content["benchmarks"]["bbq"].pop("n")
        content["training"] = {"batch_size": 4, "max_length": 128}
        content["grid"][0]["objectives"] = [objective]
        content["mitigations"] = {
            kind: {"kind": kind, "blocks": ["main"], "data": "align", **settings}
            for kind, settings in kinds.items()
        }
        content.update(more)
        return load(write_study(tmp_path, content))

    return make


@pytest.fixture(params=["llama", "gemma"])
def moved(request, bases, second_study):
    """Models of all methods that have left their init, one after the other, with the examples."""
    base, study = bases[request.param], second_study()
    prepared = examples.prepare("sft", base, study, "sft", Change("kl", "align", 1.0))

    def each():
        generator = torch.Generator().manual_seed(0)
        for method in METHODS:
            model = adapters.create(variants_of(study, method)[0], base.model, base.tokenizer)
            try:
                for value in model.parameters():
                    if value.requires_grad:
                        value.data += 0.1 * torch.randn(value.shape, generator=generator)
                yield model.eval()
            finally:
                adapters.detach(model)

    return SimpleNamespace(models=each, prepared=prepared)


def test_the_divergence_and_its_gradient_are_those_of_plain_passes_one_at_a_time(moved):
    held = moved.prepared.alignment
    assert len(held) == 11
    for model in moved.models():
        wanted = 0.0
        for one in held:
            ids = torch.tensor([one.ids])
            own = model(input_ids=ids).logits[0, -len(one.ids) :][one.counted - 1].log_softmax(1)
            with torch.no_grad(), model.disable_adapter():
                base = model(input_ids=ids).logits[0][one.counted - 1].log_softmax(1)
            wanted = wanted + (base.exp() * (base - own)).sum()
        wanted = wanted / sum(len(one.counted) for one in held)
        assert wanted > 0.01
        parameters = [one for one in model.parameters() if one.requires_grad]
        slope = torch.autograd.grad(wanted, parameters)
        second, forward = Second(Change("kl", "align", 1.0), held, 5, 0), Forward(model)
        for linear in {forward.linear_head, False}:  # and the head of any other kind
            forward.linear_head = linear
            rows = [plain([one]) for one in held]
            loss = second.loss(forward, rows, held)
            assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5)
            for found, other in zip(torch.autograd.grad(loss, parameters), slope, strict=True):
                torch.testing.assert_close(found, other, atol=2e-5, rtol=1e-3)


def test_the_base_s_own_head_is_read_where_the_adapter_changes_it(bases, second_study):
    base, study = bases["llama"], second_study()
    held = examples.prepare("sft", base, study, "sft", Change("kl", "align", 1.0)).alignment[:2]
    [variant] = [one for one in variants_of(study, "lora") if not one.mitigation]
    settings = json.loads(variant.settings)
    settings["peft"]["target_modules"] = ["q_proj", "lm_head"]
    model = adapters.create(
        dataclasses.replace(variant, settings=json.dumps(settings)), base.model, base.tokenizer
    )
    try:
        forward, rows = Forward(model), [plain([one]) for one in held]
        assert not forward.linear_head
        assert max(float(one.max()) for [one] in forward.divergences(rows)) < 1e-5
        for name, value in model.named_parameters():
            value.data += 0.3 * ("lora_B" in name)
        found = torch.cat([one for [one] in forward.divergences(rows)])
        found.sum().backward()
        assert float(found.detach().min()) > 0.001
        trained = [one for one in model.parameters() if one.requires_grad]
        assert trained
        assert all(one.grad is not None for one in trained)
    finally:
        adapters.detach(model)


def test_alignment_examples_have_no_more_tokens_than_the_task_s(moved):
    made = moved.prepared
    tokens = [np.mean([len(one.ids) for one in some]) for some in (made.examples, made.alignment)]
    assert made.n_aligned == min(int(4 * tokens[0] / tokens[1]), 11)
    assert made.n_aligned >= 1


# ---- trainings
def trained(base, study, folder, method, kind=None, objective="sft"):
    [variant] = [
        one
        for one in variants_of(study, method, objective)
        if (one.repair or {}).get("kind") == kind
    ]
    way = examples.way(variant)
    prepared = examples.prepare(way[0], base, study, *way[1:])
    model = adapters.create(variant, base.model, base.tokenizer)
    try:
        facts, curve = fitting.fit(variant, model, base, prepared, study, folder)
        return SimpleNamespace(
            weights=adapters.state(model), said=json.loads(facts["trainer_arguments"]), curve=curve
        )
    finally:
        adapters.detach(model)
        base.model.eval()


@pytest.mark.parametrize(
    ("method", "objective", "kind"),
    [(method, "sft", kind) for method, kind in zip(METHODS, KINDS, strict=False)]
    + [("lora", "sft", "drift_budget"), ("lora", "dpo", "safegrad"), ("p_tuning", "dpo", "mgda")],
)
def test_every_method_trains_with_every_second_objective(
    bases, second_study, tmp_path, method, objective, kind
):
    base, study = bases["llama"], second_study(objective=objective)
    alone, both = (
        trained(base, study, tmp_path / str(one), method, one, objective) for one in (None, kind)
    )
    assert alone.curve["loss"][0] == both.curve["loss"][0]  # dropout draws the same numbers
    assert any(not torch.equal(alone.weights[name], one) for name, one in both.weights.items())
    assert "mean_cosine" not in alone.said
    assert both.said["alignment_examples_per_step"] >= 1
    assert 0 <= both.said["share_of_steps_in_conflict"] <= 1
    assert abs(both.said["mean_cosine"]) <= 1
    assert ("multiplier" in both.said) == (kind == "drift_budget")


@pytest.mark.parametrize("method", METHODS)
def test_without_weight_it_is_plain_fine_tuning_to_the_bit(
    bases, second_study, tmp_path, method, monkeypatch
):
    base, study = bases["llama"], second_study({"kl": {"values": [0.5]}})
    alone = trained(base, study, tmp_path / "alone", method)
    monkeypatch.setattr(objectives, "weighted", lambda g, a, weight: g + 0.0 * a)
    both = trained(base, study, tmp_path / "both", method, "kl")
    assert list(alone.curve["loss"]) == list(both.curve["loss"])
    for name, one in alone.weights.items():
        assert torch.equal(one, both.weights[name]), name


def test_passes_of_few_tokens_change_nothing(bases, second_study, tmp_path):
    base, found = bases["llama"], []
    for tokens in (None, 40):
        training = {"batch_size": 4, "max_length": 128, "tokens_per_batch": tokens}
        study = second_study({"safegrad": {"values": [1.0]}}, dropout=0.0, training=training)
        found.append(trained(base, study, tmp_path / str(tokens), "lora", "safegrad"))
    for name, one in found[0].weights.items():
        torch.testing.assert_close(one, found[1].weights[name], atol=1e-5, rtol=0)
    assert found[0].said["mean_cosine"] == pytest.approx(found[1].said["mean_cosine"], abs=1e-4)


@pytest.mark.parametrize(("method", "kind"), [("lora", "drift_budget"), ("p_tuning", "pcgrad")])
def test_a_training_that_was_killed_ends_in_the_same_bytes(
    bases, second_study, tmp_path, often, method, kind
):
    base = bases["mistral"]
    study = second_study({kind: KINDS[kind]})
    [variant] = [one for one in variants_of(study, method) if one.mitigation]
    made = {
        name: Trainings(base, study, "sft", tmp_path / name / "adapter", variant)
        for name in ("whole", "resumed")
    }
    assert made["whole"].train() == 0
    assert made["resumed"].killed(1) == 0
    assert made["resumed"].train() == 1
    assert made["resumed"].digest == made["whole"].digest
    records = [json.loads(one.facts["trainer_arguments"]) for one in made.values()]
    assert records[0] == records[1]
    assert kind != "drift_budget" or records[0]["multiplier"] > 0


# ---- fairness examples
def test_fairness_examples_are_none_of_the_benchmark_s_and_a_copied_item_is_found(second_study):
    study = second_study(n_fair=400)
    prepared = {("sft", "sft", Change("kl", "fair", 1.0), 0): None}
    found = examples.examined(prepared, study)
    assert set(found["data"]) == {"fair"}
    assert found["finding"].eq("multiple_choice").any()
    assert not found["finding"].isin(["benchmark_item", "benchmark_overlap"]).any()
    asked = items("bbq", study)
    passages = examples.item_passages(study)
    for row in asked.iloc[::20].itertuples():
        copied = f"{row.passage} {row.question} A : {row.ans0} B : {row.ans1} C : {row.ans2}"
        example = {"prompt": [{"role": "user", "content": copied}], "answer": "It is not known."}
        told = examine_data([example], {}, passages=passages).set_index("finding")
        assert told.loc["benchmark_item", "severity"] == "error"
        other = {"prompt": [{"role": "user", "content": copied[::-1]}], "answer": "Yes, it is."}
        assert "benchmark_item" not in set(examine_data([other], {}, passages=passages)["finding"])


# ---- what is refused
def content(**settings):
    made = copy.deepcopy(SMALL)
    made["mitigations"] = {"one": {"blocks": ["main"], **settings}}
    return made


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "kl", "values": [1.0]}, "needs data"),
        ({"kind": "safegrad", "data": "sft"}, "needs values"),
        ({"kind": "mgda", "data": "sft", "values": [1.0]}, "mgda has no values"),
        ({"kind": "pcgrad", "data": "safe"}, "alignment examples data.safe, which the study"),
        ({"kind": "pcgrad", "data": "heldout"}, "data.heldout, the held-out answers"),
        ({"kind": "kl", "data": "sft", "values": [0]}, "above 0"),
        ({"kind": "kl", "data": "sft", "values": [-1]}, "outside 0 to 1000"),
        ({"kind": "drift_budget", "data": "sft", "values": [0.1], "eta": 0}, "eta"),
        ({"kind": "kl", "data": "sft", "values": [1.0], "eta": 1.0}, "kl has no eta"),
        ({"kind": "constrained_sft"}, "by dpo"),
        ({"kind": "soup", "values": [0.5], "safety": "main"}, "to itself"),
        ({"kind": "soup", "values": [1.0], "safety": "main"}, "leaves nothing"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(settings, words, tmp_path, data_folder):
    made = content(**settings)
    if settings["kind"] == "soup":
        made["grid"][0]["methods"] = ["lora"]
    with pytest.raises(ValueError) as error:
        load(write_study(tmp_path, made)).variants  # noqa: B018
    assert words in one_sentence(error.value)


def test_an_untrained_adapter_has_no_second_objective():
    made = content(kind="kl", data="sft", values=[1.0])
    made["grid"][0]["objectives"] = ["untrained"]
    with pytest.raises(ValueError, match="runs by untrained"):
        Study(**made)
