"""Trainings that a mitigation changes: constrained fine-tuning against a slow version of its
formula, safety data mixed in, and snapshots along the way.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import SMALL, one_sentence, variants_of, write_study
from driftbook.models import adapters
from driftbook.study.study_file import load
from driftbook.training import examples
from driftbook.training import fit as fitting
from driftbook.training import steps as training_steps
from driftbook.training.objectives import Change
from test_mitigations import CONTENT

BETAS = (0.5, 2.0, 2.0, 0.1)


def held(betas):
    return Change("constrained_sft", betas=betas)


@pytest.fixture
def moved(bases, study, request):
    """A model of a method whose adapter has left its init, its examples and the base model."""
    base = bases["llama"]
    prepared = {
        betas: examples.prepare("sft", base, study, change=held(betas)).examples
        for betas in (BETAS, (1e-4,))
    }  # before the adapter is on the base, as notebook 02 does
    model = adapters.create(variants_of(study, request.param)[0], base.model, base.tokenizer)
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.05 * torch.randn(value.shape, generator=generator)
    yield SimpleNamespace(model=model.eval(), base=base, prepared=prepared)
    adapters.detach(model)


def logprobs(model, one) -> torch.Tensor:
    """Log-probabilities of the counted tokens by a plain forward pass."""
    logits = model(input_ids=torch.tensor([one.ids])).logits[0, -len(one.ids) :]
    return (
        logits[one.counted - 1]
        .log_softmax(1)
        .gather(1, torch.tensor(one.ids)[one.counted][:, None])[:, 0]
    )


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {
        name: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def ours(case, examples, trainer):
    rows = [training_steps.plain([one]) for one in examples]
    return trainer._loss(None, training_steps.Forward(case.model).logprobs(rows), rows, examples)


@pytest.mark.parametrize("moved", ["lora", "ia3", "prompt_tuning", "p_tuning"], indirect=True)
def test_the_loss_and_its_gradient_are_those_of_the_formula(moved):
    examples = moved.prepared[BETAS][:5]
    with torch.no_grad(), moved.model.disable_adapter():
        references = [logprobs(moved.model, one) for one in examples]
    total, at_start = 0.0, 0.0
    for one, reference in zip(examples, references, strict=True):
        for t, (gained, before) in enumerate(
            zip(logprobs(moved.model, one), reference, strict=True)
        ):
            beta = BETAS[min(t, len(BETAS) - 1)]
            total = total - 2 / beta * torch.log(torch.sigmoid(beta * (gained - before)))
            at_start += 2 / beta * np.log(2) + float(before)
    n = sum(len(one.counted) for one in examples)
    loss = ours(moved, examples, training_steps.ConstrainedSft)
    assert float(loss.detach()) == pytest.approx((float(total.detach()) - at_start) / n, abs=1e-4)
    found, wanted = gradients(moved.model, loss), gradients(moved.model, total / n)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-5 * (1 + float(value.abs().max()))), name


@pytest.mark.parametrize("moved", ["lora"], indirect=True)
def test_without_constraint_it_is_plain_fine_tuning_and_with_it_early_tokens_pull_less(moved):
    free = moved.prepared[1e-4,][:4]
    plain = ours(moved, free, training_steps.Sft)
    loss = ours(moved, free, training_steps.ConstrainedSft)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-3)
    one, other = (
        gradients(moved.model, loss),
        gradients(moved.model, ours(moved, free, training_steps.Sft)),
    )
    assert all(
        torch.allclose(one[name], value, rtol=2e-2, atol=1e-5) for name, value in other.items()
    )


def test_a_place_counts_from_the_beginning_of_each_answer(bases):
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    [one] = examples._constrained(
        [training_steps.Conversation(ids, np.array([2, 3, 4, 5, 8, 9]))],
        (0.5, 2.0, 0.1),
        bases["llama"],
    )
    assert one.betas.tolist() == [0.5, 2.0, 0.1, 0.1, 0.5, 2.0]
    with torch.no_grad():
        assert one.reference == pytest.approx(
            logprobs(bases["llama"].model, one).tolist(), abs=1e-4
        )


# ---- safety data mixed in
@pytest.fixture
def mixed_study(tmp_path, data_folder):
    return load(write_study(tmp_path, CONTENT))


def test_safety_examples_are_a_share_of_all(bases, mixed_study):
    plain, mixed = (
        examples.prepare("sft", bases["llama"], mixed_study, "sft", more)
        for more in (None, Change("mixing", "safety", 0.2))
    )
    assert len(mixed.examples) == 40
    assert (
        sum(one.ids not in [other.ids for other in plain.examples] for one in mixed.examples) == 8
    )
    assert mixed.revision != plain.revision
    with pytest.raises(ValueError) as error:
        examples.prepare("sft", bases["llama"], mixed_study, "sft", Change("mixing", "safety", 0.5))
    assert "raise its n" in one_sentence(error.value)


def test_a_variant_says_how_its_examples_are_prepared(mixed_study):
    ways = {
        one.repair["kind"] if one.mitigation else None: examples.way(one)
        for one in mixed_study.of_stage("train", "tiny-llama")
        if one.dataset == "sft"
    }
    assert ways[None] == ("sft", "sft", None, 0)
    assert ways["mixing"] == ("sft", "sft", Change("mixing", "safety", 0.2), 0)
    assert ways["constrained_sft"] == ("sft", "sft", held((0.5, 2.0, 2.0, 2.0, 2.0, 0.1)), 0)
    assert examples.named(ways["mixing"]) == "sft on sft, mixing 0.2 of safety"
    assert examples.named(ways["constrained_sft"]) == "sft on sft, constrained_sft"


# ---- snapshots
def test_snapshots_are_adapters_along_the_way_and_change_nothing(bases, tmp_path, data_folder):
    content = copy.deepcopy(SMALL)
    content["grid"][0] |= {"methods": ["lora"], "objectives": ["sft"], "epochs": [2]}
    plain = load(write_study(tmp_path, content))
    content["mitigations"] = {
        "average": {"kind": "average", "blocks": ["main"], "values": [0.5], "snapshots": 4}
    }
    watched = load(write_study(tmp_path, content))
    for name, study in (("plain", plain), ("watched", watched)):
        [variant] = [one for one in variants_of(study, "lora") if not one.mitigation]
        fitting.train(
            variant,
            bases["llama"],
            examples.prepare("sft", bases["llama"], study),
            study,
            tmp_path / name,
        )
    assert (tmp_path / "plain" / adapters.WEIGHTS).read_bytes() == (
        tmp_path / "watched" / adapters.WEIGHTS
    ).read_bytes()
    steps = sorted((tmp_path / "watched.snapshots").iterdir())
    assert [step.name for step in steps] == [f"step-{number:05d}" for number in (1, 2, 3, 4)]
    assert (steps[-1] / adapters.WEIGHTS).read_bytes() == (
        tmp_path / "watched" / adapters.WEIGHTS
    ).read_bytes()
    assert not (tmp_path / "plain.snapshots").exists()
