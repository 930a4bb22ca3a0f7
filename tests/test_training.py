"""Training: what the seed reaches, what the record says, whose loss and reference it is, the dose,
failures, and that the base stays as it is.
"""

import copy
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset

from conftest import FAMILIES, PEFT_METHODS, one_sentence, variants_of
from driftbook.benchmarks import data
from driftbook.models import adapters, scoring
from driftbook.study import methods
from driftbook.study.files import file_digest, read_json
from driftbook.study.tables import CURVES, RUNS
from driftbook.training import examples, steps
from driftbook.training import fit as fitting
from driftbook.training.dose import measure_dose, starts_at_base
from fitted import study_of

pytest_plugins = ["fitted"]


DOSE = ["nll", "nll_base", "dose_nll", "kl_base", "kl_init", "no_op"]


def weights(folder) -> str:
    return file_digest(folder / adapters.WEIGHTS)


# ---- seeds
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_the_seed_reaches_the_initial_weights(bases, make_study, content, method):
    content["grid"][0]["seeds"] = [1, 2]
    base, states = bases["llama"], []
    for variant in [
        *variants_of(make_study(content), method),
        variants_of(make_study(content), method)[0],
    ]:
        model = adapters.create(variant, base.model, base.tokenizer)
        states.append(torch.cat([value.flatten() for value in adapters.state(model).values()]))
        adapters.detach(model)
    one, other, again = states
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (method == "ia3"), (
        "IA3 alone starts from ones, whatever the seed"
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_seed_reaches_the_order_of_the_data(trained, objective):
    one, other = (
        trained("ia3", objective, seed, n=48, batch=8) for seed in (1, 2)
    )  # IA3's init and dropout are the same for all seeds
    if objective == "sft":
        assert one.record["loss_first"] != pytest.approx(other.record["loss_first"], abs=1e-6)
    assert not np.allclose(one.curve.loss, other.curve.loss, atol=1e-7)


@pytest.mark.slow
def test_the_seed_reaches_dropout(trained, monkeypatch):
    create = adapters.create

    def same_init(variant, *rest):
        model = create(dataclasses.replace(variant, seed=0), *rest)
        torch.manual_seed(variant.seed)
        return model

    monkeypatch.setattr(adapters, "create", same_init)
    # every step sees all examples, so order cannot matter; at the first step LoRA's B is zero, and
    # dropout cannot matter either
    without, no_difference = (
        trained("lora", seed=seed, again="same init", dropout=0.0, batch=16, epochs=3).curve.loss
        for seed in (1, 2)
    )
    np.testing.assert_allclose(without, no_difference, atol=1e-4)
    one, other = (
        trained("lora", seed=seed, again="same init", dropout=0.5, batch=16, epochs=3).curve.loss
        for seed in (1, 2)
    )
    assert abs(one.iloc[-1] - other.iloc[-1]) > 1e-3
    assert abs(one.iloc[-1] - without.iloc[-1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "objective"),
    [*((method, "sft") for method in PEFT_METHODS), ("lora", "dpo"), ("prompt_tuning", "dpo")],
)
def test_the_same_seed_gives_bitwise_the_same_adapter_whatever_was_trained_in_between(
    trained, method, objective
):
    one = trained(method, objective)
    trained("p_tuning" if method == "lora" else "lora", "sft", seed=3)
    torch.manual_seed(12345)
    again = trained(method, objective, again=1)
    assert weights(one.folder) == weights(again.folder)
    pd.testing.assert_frame_equal(one.curve, again.curve)
    assert {name: one.record[name] for name in DOSE} == {name: again.record[name] for name in DOSE}


@pytest.mark.slow
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_another_seed_gives_another_adapter(trained, method):
    assert weights(trained(method).folder) != weights(trained(method, seed=2, n=48, batch=8).folder)


# ---- the record
def test_the_record_holds_what_the_trainer_used_and_not_what_was_asked_for(trained, monkeypatch):
    asked = fitting.arguments

    def other(variant, study, folder):
        arguments = asked(variant, study, folder)
        (
            arguments.learning_rate,
            arguments.num_train_epochs,
            arguments.per_device_train_batch_size,
            arguments.seed,
        ) = (3e-3, 2, 8, 17)
        return arguments

    monkeypatch.setattr(fitting, "arguments", other)
    one = trained("lora", again="other arguments", n=32, batch=16)
    assert one.variant.learning_rate == 5e-3
    found = {
        name: one.record[name]
        for name in (
            "trained_learning_rate",
            "trained_epochs",
            "trained_batch_size",
            "trained_seed",
            "steps",
            "n_examples",
        )
    }
    assert found == {
        "trained_learning_rate": pytest.approx(3e-3),
        "trained_epochs": 2,
        "trained_batch_size": 8,
        "trained_seed": 17,
        "steps": 8,
        "n_examples": 32,
    }


def test_the_record_of_an_ordinary_training_is_what_was_asked_for(trained):
    one = trained("lora", n=24, batch=8, epochs=2)
    record = one.record
    assert record["trained_learning_rate"] == pytest.approx(one.variant.learning_rate)
    assert (
        record["trained_epochs"],
        record["trained_batch_size"],
        record["steps"],
        record["n_examples"],
    ) == (2, 8, 6, 24)
    assert (record["status"], record["failure"]) == ("ok", None)
    assert record["trained_seed"] == one.variant.seed
    said = json.loads(record["trainer_arguments"])
    assert (
        said["per_device_train_batch_size"],
        said["gradient_accumulation_steps"],
        said["lr_scheduler_type"],
    ) == (8, 1, "cosine")
    assert (said["tokens_per_pass"], said["activations_computed_twice"], said["autocast"]) == (
        steps.TOKENS_PER_PASS["cpu"],
        False,
        False,
    )
    assert record["adapter_sha256"] == weights(one.folder)
    assert (
        record["n_trainable"] == record["n_stored"] == 2 * 2 * (64 * 4 + 4 * 64)
    )  # layers, modules, A and B
    assert list(one.curve.step) == list(range(1, 7))
    RUNS.check(pd.DataFrame([record]))
    CURVES.check(one.curve)


def test_a_warmup_is_not_taken_for_the_peak(trained):
    one = trained("ia3", n=48, batch=8, warmup=0.5)
    rates = list(one.curve.learning_rate)
    assert rates[0] < max(rates) <= one.variant.learning_rate
    assert one.record["trained_learning_rate"] == pytest.approx(one.variant.learning_rate)


def test_p_tuning_trains_more_than_it_stores(trained):
    record = trained("p_tuning").record
    assert record["n_trainable"] > record["n_stored"] == 4 * 64


@pytest.mark.parametrize(
    ("method", "objective"),
    [("lora", "sft"), ("ia3", "dpo"), ("prompt_tuning", "dpo"), ("p_tuning", "sft")],
)
def test_a_folder_of_an_adapter_holds_it_and_nothing_else(trained, method, objective):
    names = sorted(
        str(path.relative_to(trained(method, objective).folder))
        for path in trained(method, objective).folder.rglob("*")
    )
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


# ---- settings and init
@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_a_method_whose_default_targets_differ_by_family_needs_them_named(
    make_study, content, method
):
    content["methods"][method] = {}
    with pytest.raises(ValueError) as error:
        make_study(content)
    assert "target_modules" in one_sentence(error.value)


def test_a_setting_that_pefts_method_does_not_have_is_refused(make_study, content):
    content["methods"]["lora"]["rank"] = 4
    with pytest.raises(ValueError) as error:
        adapters.config(variants_of(make_study(content), "lora")[0])
    assert "rank" in one_sentence(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("LoraConfig", {"layers_pattern": "h"}, "layers_to_transform"),  # PEFT's own words
        ("AdaLoraConfig", {}, "update_and_allocate"),
        ("AdaLoraConfig", {"total_step": 9}, "update_and_allocate"),
        ("AdamssConfig", {"use_asa": True}, "update_and_allocate"),
        ("AdamssConfig", {}, None),
        ("VeraConfig", {}, None),
    ],
)
def test_a_method_that_needs_a_step_of_its_own_in_training_is_refused(
    study, monkeypatch, name, settings, said
):
    mine = methods.PeftMethod("Mine", "adapter", name, "#123456")
    monkeypatch.setitem(methods.PEFT_METHODS, "lora", mine)
    variant = variants_of(study, "lora")[0]
    made = json.dumps(json.loads(variant.settings) | {"peft": settings})
    variant = dataclasses.replace(variant, settings=made)
    if said is None:
        assert type(adapters.config(variant)).__name__ == name
        return
    with pytest.raises(ValueError) as error:
        adapters.config(variant)
    assert "methods.lora" in one_sentence(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("init", ["task_text", "safety_text"])
def test_an_init_from_text_is_the_embeddings_of_its_tokens(bases, data_folder, tmp_path, init):
    base, study = bases["gemma"], study_of(tmp_path, init=init)
    variant = variants_of(study, "prompt_tuning")[0]
    text = read_json(data_folder / "init_texts.json")[init.removesuffix("_text")]
    model = adapters.create(variant, base.model, base.tokenizer, examples.init_text(variant, study))
    found = model.prompt_encoder["default"].embedding.weight.detach()
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"][: len(found)]
    assert base.tokenizer.unk_token_id not in ids
    embedded = base.model.get_input_embeddings()(
        torch.tensor(ids)
    )  # what the layers see: Gemma's embedding scales its rows
    assert torch.equal(found, embedded)
    assert found.std() > 2 * base.model.get_input_embeddings().weight.std()
    adapters.detach(model)


def test_a_text_shorter_than_the_prompt_is_repeated(bases, tmp_path):
    base = bases["llama"]
    variant = variants_of(study_of(tmp_path), "prompt_tuning")[0]
    model = adapters.create(variant, base.model, base.tokenizer, "who are")
    rows = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(rows[:2], rows[2:])
    adapters.detach(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_init_from_the_vocabulary_is_embeddings_of_tokens_and_a_random_one_is_not(
    bases, tmp_path, family
):
    base = bases[family]
    table = {
        tuple(row)
        for row in base.model.get_input_embeddings()(torch.arange(len(base.tokenizer))).tolist()
    }
    found = {}
    for init in ("vocabulary", "random"):
        variant = variants_of(study_of(tmp_path, init=init), "prompt_tuning")[0]
        model = adapters.create(variant, base.model, base.tokenizer)
        found[init] = [
            tuple(row) in table for row in model.prompt_encoder["default"].embedding.weight.tolist()
        ]
        adapters.detach(model)
    assert all(found["vocabulary"])
    assert not any(found["random"])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_an_untrained_variant_is_saved_as_it_was_initialised(bases, trained, method):
    base, one = bases["llama"], trained(method, "untrained")
    model = adapters.create(one.variant, base.model, base.tokenizer)
    initial = scoring.Scorer(model, base.tokenizer).engine.soft_prompt
    adapters.detach(model)
    with adapters.attached(base.model, one.folder) as model:
        assert torch.equal(scoring.Scorer(model, base.tokenizer).engine.soft_prompt, initial)
    assert (one.record["steps"], one.record["trained_learning_rate"], one.record["no_op"]) == (
        None,
        None,
        None,
    )
    assert one.record["kl_init"] == pytest.approx(0, abs=1e-9)
    assert one.record["kl_base"] > 1e-3
    assert one.curve.empty


# ---- the data that is trained on
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_labels_are_those_of_trls_own_preparation(bases, study, family):
    base = bases[family]
    asked = data.training_examples("sft", study)
    rows = [
        {
            "prompt": example["prompt"],
            "completion": [{"role": "assistant", "content": example["answer"]}],
        }
        for example in asked
    ]
    arguments = trl.SFTConfig(
        output_dir="unused",
        max_length=128,
        report_to="none",
        use_cpu=True,
        completion_only_loss=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=copy.deepcopy(base.model).requires_grad_(True),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )
    theirs, ours = trainer.train_dataset, examples.prepare("sft", base, study).examples
    assert [one.ids for one in ours] == theirs["input_ids"]
    assert [
        [token if i in set(one.counted) else -100 for i, token in enumerate(one.ids)]
        for one in ours
    ] == theirs["labels"]
    assert all(0 < len(one.counted) < len(one.ids) for one in ours)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "lora"), ("gemma", "prompt_tuning"), ("qwen2", "ia3"), ("mistral", "p_tuning")],
)
def test_rows_and_reference_of_dpo_are_those_that_trl_computes_itself(bases, study, family, method):
    base = bases[family]
    rows = [
        {
            "prompt": example["prompt"],
            **{
                key: [{"role": "assistant", "content": example[key]}]
                for key in ("chosen", "rejected")
            },
        }
        for example in data.training_examples("dpo", study)
    ]
    arguments = trl.DPOConfig(
        output_dir="unused",
        max_length=None,
        precompute_ref_log_probs=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(base.model).requires_grad_(True),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=adapters.config(variants_of(study, method, "dpo")[0]),
    )
    theirs, ours = trainer.train_dataset, examples.prepare("dpo", base, study).examples
    for i, name in enumerate(("chosen", "rejected")):
        sides = [getattr(pair, name) for pair in ours]
        assert [one.ids[: one.counted[0]] for one in sides] == theirs["prompt_ids"]
        assert [one.ids[one.counted[0] :] for one in sides] == theirs[f"{name}_ids"]
        np.testing.assert_allclose(
            [pair.reference[i] for pair in ours], theirs[f"ref_{name}_logps"], atol=1e-4, rtol=1e-6
        )


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_first_loss_of_dpo_is_log_two_because_reference_and_model_are_the_same(trained, method):
    assert trained(method, "dpo").record["loss_first"] == pytest.approx(np.log(2), abs=1e-4)


def test_rows_that_are_too_long_are_cut_or_left_out_and_counted(bases, data_folder, tmp_path):
    base, study = bases["llama"], study_of(tmp_path, max_length=128)
    lengths = sorted(len(one.ids) for one in examples.prepare("sft", base, study).examples)
    assert examples.prepare("sft", base, study).note is None
    short = study_of(tmp_path, max_length=lengths[-1] - 1)
    prepared = examples.prepare("sft", base, short)
    cut = sum(length >= lengths[-1] for length in lengths)
    assert max(len(one.ids) for one in prepared.examples) == lengths[-1] - 1
    assert f"0 examples left out, {cut} cut" in prepared.note
    with pytest.raises(ValueError) as error:
        examples.prepare("sft", base, study_of(tmp_path, max_length=2))
    assert "max_length" in one_sentence(error.value)


def written_pairs(monkeypatch, made: list[dict]) -> None:
    """These preferences in the place of the study's."""
    known = data.training_examples
    monkeypatch.setattr(
        examples, "training_examples", lambda name, of: made if name == "dpo" else known(name, of)
    )


def test_preferences_that_can_teach_nothing_are_left_out(bases, data_folder, tmp_path, monkeypatch):
    base, study = bases["llama"], study_of(tmp_path, max_length=128)
    whole = data.training_examples("dpo", study)[:4]
    tied = [
        one | {"rejected": one["chosen"] + end}
        for one, end in zip(whole[:2], ("", " \n"), strict=True)
    ]
    long = [one | {"chosen": f"{'a ' * 200}b", "rejected": f"{'a ' * 200}c"} for one in whole[:1]]
    written_pairs(monkeypatch, [*whole, *tied, *long])
    prepared = examples.prepare("dpo", base, study)
    assert len(prepared.examples) == len(whole)
    assert "3 of 7 preferences left out" in prepared.note
    assert prepared.note.count("; ") == 1  # and what was cut
    written_pairs(monkeypatch, whole)
    kept = examples.prepare("dpo", base, study)
    assert [one.reference for one in kept.examples] == [one.reference for one in prepared.examples]
    assert kept.note is None


def test_a_set_without_a_difference_is_refused(bases, data_folder, tmp_path, monkeypatch):
    base, study = bases["llama"], study_of(tmp_path)
    pairs = data.training_examples("dpo", study)
    written_pairs(monkeypatch, [one | {"rejected": one["chosen"]} for one in pairs])
    with pytest.raises(ValueError, match="no preference can teach") as error:
        examples.prepare("dpo", base, study)
    one_sentence(error.value)
    assert len(examples.prepare("sft", base, study, data="dpo").examples) == len(pairs)


# ---- dose
def created(base, study, method, noise=0.0):
    model = adapters.create(variants_of(study, method)[0], base.model, base.tokenizer)
    initial = adapters.state(model)
    if noise:
        generator = torch.Generator().manual_seed(0)
        for value in (parameter for parameter in model.parameters() if parameter.requires_grad):
            value.data.add_(torch.empty(value.shape).normal_(generator=generator), alpha=noise)
    return model, initial


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_the_dose_of_an_adapter_at_its_init(bases, study, method):
    base = bases["mistral"]
    model, initial = created(base, study, method)
    dose = measure_dose(model, initial, base, examples.held_out(base, study)[0])
    adapters.detach(model)
    assert dose["kl_init"] == pytest.approx(0, abs=1e-7)
    assert dose["no_op"]
    if method in ("lora", "ia3"):
        assert dose["kl_base"] == pytest.approx(0, abs=1e-7)
        assert dose["dose_nll"] == pytest.approx(0, abs=1e-5)
    else:
        assert dose["kl_base"] > 1e-3


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_an_adapter_that_starts_at_the_base_is_the_base_to_the_bit(bases, study, method):
    base = bases["llama"]
    [pair] = examples.held_out(base, study)[0][:1]
    plain = _distributions(base.model, *pair)
    model, initial = created(base, study, method)
    begun = _distributions(model, *pair)
    adapters.detach(model)
    assert starts_at_base(initial) == (method in ("lora", "ia3"))
    if starts_at_base(initial):
        assert np.array_equal(begun, plain)
        moved = {name: value + 1e-6 for name, value in initial.items()}
        assert not starts_at_base(moved)


@pytest.mark.parametrize(
    ("family", "method"),
    [*zip(FAMILIES, PEFT_METHODS, strict=True), ("gemma", "lora"), ("llama", "prompt_tuning")],
)
def test_the_dose_is_what_a_slow_and_plain_version_finds(bases, study, family, method):
    base = bases[family]
    pairs, _ = examples.held_out(base, study)
    model, initial = created(base, study, method, noise=0.1)
    dose = measure_dose(model, initial, base, pairs)
    after = [_distributions(model, *pair) for pair in pairs]
    with adapters.swapped(model, initial):
        before = [_distributions(model, *pair) for pair in pairs]
    adapters.detach(model)
    plain = [_distributions(base.model, *pair) for pair in pairs]
    assert dose["nll"] == pytest.approx(_nll(after, pairs), abs=1e-4)
    assert dose["nll_base"] == pytest.approx(_nll(plain, pairs), abs=1e-4)
    assert dose["dose_nll"] == pytest.approx(_nll(plain, pairs) - _nll(after, pairs), abs=2e-4)
    assert dose["kl_base"] == pytest.approx(_kl(after, plain), abs=1e-4)
    assert dose["kl_init"] == pytest.approx(_kl(after, before), abs=1e-4)
    assert dose["kl_init"] > 1e-3
    assert not dose["no_op"]


@torch.inference_mode()
def _distributions(model, prompt, answer) -> np.ndarray:
    """Probabilities before each token of the answer, by the model's own forward on this one
    example.
    """
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    return logits[-len(answer) - 1 : -1].softmax(1).numpy()


def _nll(distributions, pairs) -> float:
    return -np.mean(
        np.log(
            [
                p[t, token]
                for p, (_, answer) in zip(distributions, pairs, strict=True)
                for t, token in enumerate(answer)
            ]
        )
    )


def _kl(distributions, others) -> float:
    return np.mean(
        [
            sum(p[t] * np.log(p[t] / q[t]))
            for p, q in zip(distributions, others, strict=True)
            for t in range(len(p))
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_base_model_is_that_of_transformers(bases, make_study, content, family):
    base, study = bases[family], make_study(content)
    record = fitting.untouched(study.variants[0], base, study).record
    losses, counts = [], []
    for prompt, answer in examples.held_out(base, study)[0]:
        with torch.inference_mode():
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses.append(
                base.model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
            )
        counts.append(len(answer))
    assert record["nll"] == pytest.approx(np.average(losses, weights=counts), abs=1e-4)
    assert (record["dose_nll"], record["kl_base"], record["no_op"]) == (0, 0, None)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_a_tiny_rate_is_a_no_op_and_a_large_one_is_not(trained, method):
    tiny, large = trained(method, rate=1e-7).record, trained(method).record
    assert tiny["no_op"]
    assert "no-op" in tiny["findings"]
    assert not large["no_op"]
    assert large["kl_init"] > 10 * tiny["kl_init"]


# ---- the base stays as it is
@pytest.mark.parametrize(
    ("method", "objective"),
    [(method, objective) for method in PEFT_METHODS for objective in ("sft", "dpo")],
)
def test_the_base_is_bitwise_the_same_after_training(bases, trained, method, objective):
    base = bases["llama"].model
    ids = torch.tensor([list(range(20, 60))])
    before, names = base(input_ids=ids).logits, [name for name, _ in base.named_modules()]
    record = trained(method, objective, again="base unchanged", n=8).record
    assert record["steps"] == 1
    assert torch.equal(base(input_ids=ids).logits, before)
    assert [name for name, _ in base.named_modules()] == names
    assert not {"forward", "peft_config"} & set(base.__dict__)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not base.training
