"""Trainings give TRL's own losses and weights, leave the base model as it was, and end in a
sentence where memory or the loss gives out.
"""

import copy
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOTrainer, SFTTrainer

from conftest import FAMILIES, one_sentence, variants_of
from driftbook.models import adapters, sampling
from driftbook.models.loading import Loaded
from driftbook.training import examples, steps
from driftbook.training import fit as fitting
from fitted import METHODS, OBJECTIVES, Fit, Trainings, Watch, conversations, same

pytest_plugins = ["fitted"]


def a_copy(base):
    """A base of its own, for tests that may leave something on it."""
    return Loaded(base.name, copy.deepcopy(base.model), base.tokenizer, base.revision)


# ---- TRL's own trainers
class TheirDpo(DPOTrainer):
    """TRL's DPO on rows that are tokenised, with the reference's log-probabilities that are
    there.
    """

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        return dataset


def theirs(base, study, objective, folder):
    [variant] = variants_of(study, next(iter(study.methods)), objective)
    made = examples.prepare(objective, base, study).examples
    model, arguments = (
        adapters.create(variant, base.model, base.tokenizer),
        fitting.arguments(variant, study, str(folder)),
    )
    if objective == "sft":
        rows = [
            {
                "input_ids": one.ids,
                "labels": [
                    t if i in set(one.counted.tolist()) else -100 for i, t in enumerate(one.ids)
                ],
            }
            for one in made
        ]
    else:
        rows = [
            {
                "prompt_ids": pair.chosen.ids[: pair.chosen.counted[0]],
                "chosen_ids": pair.chosen.ids[pair.chosen.counted[0] :],
                "rejected_ids": pair.rejected.ids[pair.rejected.counted[0] :],
                "ref_chosen_logps": pair.reference[0],
                "ref_rejected_logps": pair.reference[1],
            }
            for pair in made
        ]
    kind = SFTTrainer if objective == "sft" else TheirDpo
    try:
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
        )
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        trainer.train()
        losses = np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        return types.SimpleNamespace(losses=losses, weights=adapters.state(model))
    finally:
        adapters.detach(model)
        base.model.eval()


CASES = [
    (method, FAMILIES[i % 4], objective)
    for i, method in enumerate(METHODS)
    for objective in OBJECTIVES
]


CASES += [
    ("lora", "gemma", "sft"),
    ("prompt_tuning", "qwen2", "dpo"),
    ("prefix_tuning", "gemma", "dpo"),
]


@pytest.mark.parametrize(("method", "family", "objective"), CASES)
def test_losses_and_weights_are_those_of_trls_own_trainer(
    bases, a_study, tmp_path, method, family, objective
):
    study = a_study(method)
    ours = Fit(bases[family], study, objective, tmp_path / "adapter")
    other = theirs(bases[family], study, objective, tmp_path / "theirs")
    assert len(ours.losses) == 3
    same(ours, other, 1e-4)


# ---- no memory
def limited(patch, limit, spared=lambda forward: False):
    """Passes of more tokens than the limit find no memory; the sizes of those that do are kept."""
    found, logprobs = [], steps.Forward.logprobs

    def poor(self, rows):
        size = len(rows) * max(len(row.tokens) for row in rows)
        if size > limit and not spared(self):
            raise torch.OutOfMemoryError("pretended")
        found.append(size)
        return logprobs(self, rows)

    patch.setattr(steps.Forward, "logprobs", poor)
    return found


def checkpointing(forward):
    return forward.engine.model.is_gradient_checkpointing


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_without_memory_for_a_pass_half_as_much_is_put_into_one(
    bases, fit, monkeypatch, method, objective
):
    base = bases["llama"]
    ample = fit(base, method, objective)
    sizes = limited(monkeypatch, 130)
    poor = fit(base, method, objective)
    assert max(sizes) <= 130
    assert poor.said["tokens_per_pass"] < ample.said["tokens_per_pass"]
    assert not poor.said["activations_computed_twice"]
    same(ample, poor, 1e-5)


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("lora", "sft"),
        ("lora", "dpo"),
        ("ia3", "sft"),
        ("p_tuning", "sft"),
        ("prompt_tuning", "dpo"),
    ],
)
def test_without_memory_for_one_example_activations_are_computed_twice(
    bases, fit, monkeypatch, method, objective
):
    base = a_copy(bases["gemma"])
    ample = fit(base, method, objective)
    limited(monkeypatch, 8, checkpointing)
    poor = fit(base, method, objective)
    assert poor.said["activations_computed_twice"]
    same(ample, poor, 1e-5)
    assert not base.model.is_gradient_checkpointing


def test_what_a_pass_gave_before_memory_ran_out_is_not_counted_twice(bases, fit, monkeypatch):
    base, failed, logprobs = bases["llama"], [], steps.Forward.logprobs
    ample = fit(base, "lora", tokens_per_batch=64)

    def poor(self, rows):
        failed.append(len(failed))
        if len(failed) in (2, 9):  # not the first pass of its step
            raise torch.OutOfMemoryError("pretended")
        return logprobs(self, rows)

    monkeypatch.setattr(steps.Forward, "logprobs", poor)
    same(ample, fit(base, "lora", tokens_per_batch=64), 1e-5)


def test_memory_that_runs_out_in_the_backward_pass_changes_nothing(bases, fit, monkeypatch):
    from accelerate import Accelerator

    base, calls, backward = bases["llama"], [], Accelerator.backward
    ample = fit(base, "ia3", "dpo")

    def poor(self, loss, **kwargs):
        calls.append(0)
        backward(self, loss, **kwargs)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(Accelerator, "backward", poor)
    same(ample, fit(base, "ia3", "dpo"), 1e-5)


def test_what_found_no_memory_is_let_go_before_the_devices_memory_is_given_back(
    bases, fit, monkeypatch
):
    base, kept, seen, logprobs = bases["llama"], [], [], steps.Forward.logprobs

    def poor(self, rows):
        found = logprobs(self, rows)
        if not kept:
            activations = found[0][0].clone()
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("pretended")
        return found

    monkeypatch.setattr(steps.Forward, "logprobs", poor)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(kept[0]() is None))
    fit(base, "lora")
    assert seen == [True]


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_any_memory_it_is_the_variants_failure(
    bases, a_study, tmp_path, monkeypatch, method, objective
):
    base, study = a_copy(bases["qwen2"]), a_study(method)
    limited(monkeypatch, 8)
    with pytest.raises(sampling.VariantFailure) as error:
        Trainings(base, study, objective, tmp_path / "adapter").train()
    assert "memory" in one_sentence(error.value)
    assert not base.model.is_gradient_checkpointing
    assert not base.model.__dict__.keys() & {"forward", "peft_config"}


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_the_base_is_as_it_was_after_a_failure(bases, a_study, tmp_path, monkeypatch, method):
    base = a_copy(bases["qwen2"])
    before = snapshot(base.model)
    limited(monkeypatch, 8)
    with pytest.raises(sampling.VariantFailure):
        Trainings(base, a_study(method), "sft", tmp_path / "adapter").train()
    assert_untouched(base.model, before)


def test_no_hook_of_gradient_checkpointing_stays_on_the_base(bases, a_study, tmp_path, monkeypatch):
    base = a_copy(bases["llama"])
    before = snapshot(base.model)
    limited(monkeypatch, 8, checkpointing)
    Trainings(base, a_study("lora"), "sft", tmp_path / "adapter").train()
    assert_untouched(base.model, before)


def test_a_resumed_training_knows_how_little_memory_there_was(
    bases, a_study, tmp_path, monkeypatch, often
):
    base = a_copy(bases["llama"])
    one = Trainings(base, a_study("lora"), "sft", tmp_path / "adapter")
    limited(monkeypatch, 8, checkpointing)
    one.killed(2)
    failures = []
    less = steps._Steps._use_less
    monkeypatch.setattr(
        steps._Steps, "_use_less", lambda self, lengths: failures.append(1) or less(self, lengths)
    )
    assert one.train() == 2
    assert not failures
    assert not base.model.is_gradient_checkpointing


# ---- divergence
def said_of(losses, norms=None):
    """The step and the sentence at which a curve of losses is given up, None where it is not."""
    callback, state = steps.StopOnDivergence(), types.SimpleNamespace(global_step=0, log_history=[])
    for step, loss in enumerate(losses, 1):
        state.global_step, logs = (
            step,
            {"loss": loss, "grad_norm": 1.0 if norms is None else norms[step - 1]},
        )
        state.log_history.append(logs)
        try:
            callback.on_log(None, state, None, logs)
        except sampling.VariantFailure as error:
            return step, one_sentence(error)
    return None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "nan", torch.tensor(float("nan"))])
def test_a_loss_or_gradient_that_is_no_number_ends_training(bad):
    assert said_of([2, 1.9, bad, 1.8])[0] == 3
    step, sentence = said_of([2, 1.9, 1.8], [1, bad, 1])
    assert (step, "grad_norm" in sentence) == (2, True)


def test_a_loss_that_stays_high_ends_training_and_a_noisy_curve_does_not():
    random = np.random.default_rng(0)
    falling = 2 + 6 * np.exp(-np.arange(500) / 60)
    assert said_of(falling + random.normal(0, 0.6, 500)) is None
    assert said_of(np.where(np.arange(500) % 15 == 7, falling + 20, falling)) is None, (
        "spikes that pass"
    )
    assert said_of(np.full(500, 11.7) + random.normal(0, 2, 500)) is None, (
        "a training that learns nothing"
    )
    assert said_of([2.0] * 39) is None
    step, sentence = said_of([*falling[:100], *np.full(100, 14.0)])
    assert step == 120
    assert "14.0" in sentence
    assert "diverged" in sentence
    assert said_of([2.0] * 20 + [5.1] * 20)[0] == 40
    assert said_of([2.0] * 20 + [4.9] * 100) is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_training_whose_gradient_is_no_number_is_the_variants_failure(
    bases, a_study, tmp_path, monkeypatch, objective
):
    base, logprobs = a_copy(bases["llama"]), steps.Forward.logprobs
    monkeypatch.setattr(
        steps.Forward,
        "logprobs",
        lambda self, rows: [[part * float("nan") for part in row] for row in logprobs(self, rows)],
    )
    one = Trainings(base, a_study("ia3"), objective, tmp_path / "adapter")
    with pytest.raises(sampling.VariantFailure) as error:
        one.train()
    assert "diverged" in one_sentence(error.value)
    assert "step 1" in str(error.value)


def test_a_resumed_training_remembers_where_its_loss_began(bases, a_study, tmp_path, often):
    one, seen = Trainings(bases["llama"], a_study("ia3"), "sft", tmp_path / "adapter"), []
    one.killed(2)

    class Look(Watch):
        def on_train_end(self, args, state, control, **kwargs):
            seen.append(
                len(
                    next(
                        callback
                        for callback in kwargs_of(one)
                        if isinstance(callback, steps.StopOnDivergence)
                    ).losses
                )
            )

    def kwargs_of(_):
        return found

    found, init = [], steps.StopOnDivergence.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            steps.StopOnDivergence, "__init__", lambda self: found.append(self) or init(self)
        )
        fitting.train(one.variant, one.base, one.prepared, one.study, one.folder, Look())
    assert seen == [3]


# ---- mixed precision
@pytest.fixture(scope="module")
def half(bases):
    """The Llama in bf16."""
    return Loaded(
        "half",
        copy.deepcopy(bases["llama"].model).to(torch.bfloat16),
        bases["llama"].tokenizer,
        "half",
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "ln_tuning"])
def test_adapters_are_fp32_over_a_base_in_bf16(half, fit, method, autocast):
    done = fit(half, method, "dpo" if autocast else "sft", n=4, autocast=autocast)
    assert {value.dtype for value in done.weights.values()} == {torch.float32}
    assert np.isfinite(done.losses).all()
    assert done.said["autocast"] == autocast


def test_autocast_changes_the_arithmetic_of_lora_and_not_that_of_ia3(half, a_study):
    """LoRA's product is fp32 by itself and bf16 under autocast. PEFT's IA3 scales in fp32 in both,
    and rounds what it scaled to the base's bf16.
    """
    made, found = conversations([30, 20]), {}
    for method, scales in (("lora", (0.0, 0.1)), ("ia3", (1.0, 1.001, 1.01))):
        model = adapters.create(variants_of(a_study(method), method)[0], half.model, half.tokenizer)
        try:
            for scale in scales:
                for name, value in model.named_parameters():
                    if "lora_B" in name or "ia3" in name:
                        value.data.fill_(scale)
                for autocast in (False, True):
                    found[method, scale, autocast] = torch.cat(
                        steps.Forward(model, autocast).logprobs([steps.plain(made)])[0]
                    ).detach()
        finally:
            adapters.detach(model)
    assert torch.equal(found["lora", 0.0, False], found["lora", 0.0, True])
    assert not torch.equal(found["lora", 0.1, False], found["lora", 0.1, True])
    for autocast in (
        False,
        True,
    ):  # a change below 2^-9 is half of bf16's last place or less: nothing is left of it
        assert torch.equal(found["ia3", 1.0, autocast], found["ia3", 1.001, autocast])
        assert not torch.equal(found["ia3", 1.0, autocast], found["ia3", 1.01, autocast])
    assert torch.equal(found["ia3", 1.01, False], found["ia3", 1.01, True])


# ---- the base stays as it is
def snapshot(model):
    names = [name for name, _ in model.named_modules()]
    hooks = {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
        for name, module in model.named_modules()
    }
    kept = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return {name: value.clone() for name, value in model.state_dict().items()}, names, hooks, kept


CHECKPOINTING = {
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
}  # which transformers leaves, switched off


def assert_untouched(model, before):
    weights, names, hooks, kept = before
    after, names_after, hooks_after, kept_after = snapshot(model)
    assert names_after == names
    assert hooks_after == hooks
    assert weights.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    for name in names:
        assert set(kept_after[name]) - CHECKPOINTING == set(kept[name]) - CHECKPOINTING, name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not {"forward", "peft_config"} & set(model.__dict__)
    assert not model.is_gradient_checkpointing
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_as_it_was(bases, a_study, tmp_path, method):
    base, study = bases["gemma"], a_study(method, n=4)
    before = snapshot(base.model)
    for objective in OBJECTIVES:
        Trainings(base, study, objective, tmp_path / objective / "adapter").train()
        assert_untouched(base.model, before)


def test_the_base_is_as_it_was_after_a_kill(bases, a_study, tmp_path):
    base = a_copy(bases["llama"])
    before = snapshot(base.model)
    Trainings(base, a_study("dora"), "dpo", tmp_path / "adapter").killed(1)
    assert_untouched(base.model, before)


def test_dropout_is_on_in_sft_and_off_in_dpo_as_in_trl(bases, fit):
    base = bases["llama"]
    for objective, differs in (("sft", True), ("dpo", False)):
        one, other = (
            fit(base, "lora", objective, dropout=dropout).losses for dropout in (0.0, 0.5)
        )
        assert (abs(one[-1] - other[-1]) > 1e-4) == differs


def test_a_folder_that_holds_only_a_note_of_another_key_is_emptied(tmp_path):
    (tmp_path / "key.json").write_text('"other"')
    (tmp_path / "checkpoint-3").mkdir()
    fitting._keep_only(Path(tmp_path), "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]
