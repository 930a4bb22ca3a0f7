"""How soft prompts begin: permuted, frozen, optimised, and out of P-Tuning's encoder."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from conftest import local, one_sentence, variants_of
from driftbook.batch import preparing
from driftbook.models import adapters, starts
from driftbook.models.engine import Engine
from driftbook.models.sampling import VariantFailure
from driftbook.models.scoring import Scorer, engine_of
from driftbook.study.files import read_json
from driftbook.study.methods import ENCODED_INITS, INITS, TEXT_INITS
from driftbook.training import dro, examples
from driftbook.training import fit as fitting
from fitted import Trainings

pytest_plugins = ["fitted"]

DRO = {"harmful": "forbidden", "harmless": "sft", "steps": 6, "learning_rate": 0.01}
FROM_TEXT = [("prompt_tuning", init) for init in TEXT_INITS]
FROM_TEXT += [("p_tuning", init) for init in TEXT_INITS if init in ENCODED_INITS]


@pytest.fixture
def begun(make_study, content):
    """Makes a study of one method, of which a soft prompt begins in one way."""

    def make(init, method="prompt_tuning", changes=None, objective="sft", **training):
        content["methods"] = {method: {"num_virtual_tokens": 4}}
        content["data"]["forbidden"] = {"format": "alpaca", "n": 8, **local("data/safety_sft.json")}
        content["data"]["sft"]["n"] = 8
        content["data"]["heldout"]["n"] = 2
        content["training"] = {"batch_size": 4, "max_length": 128, **training}
        block = {"methods": [method], "objectives": [objective, "untrained"], "inits": [init]}
        content["grid"][0] |= block
        given = content | ({"dro": DRO} if init == "dro" else {}) | (changes or {})
        return make_study({key: one for key, one in given.items() if one is not None})

    return make


def created(base, study, rows=None):
    method = next(iter(study.methods))
    [variant] = variants_of(study, method)
    text = examples.init_text(variant, study)
    return variant, adapters.create(variant, base.model, base.tokenizer, text, rows)


def text_of(base, data_folder, init, n=None):
    text = read_json(data_folder / "init_texts.json")[TEXT_INITS[init]]
    return starts.text_rows(base.model, base.tokenizer, text, n)


# ---- permuted
def test_the_permuted_start_has_the_lengths_of_the_text_and_no_row_of_it(bases, begun, data_folder):
    base = bases["gemma"]
    variant, model = created(base, begun("safety_permuted"))
    rows = model.get_prompt(1)[0].detach()
    adapters.detach(model)
    text = text_of(base, data_folder, "safety_permuted", 4)
    torch.testing.assert_close(rows.norm(dim=1), text.norm(dim=1))
    torch.testing.assert_close(rows @ rows.T, text @ text.T)  # one permutation for all
    assert torch.cosine_similarity(rows, text).abs().max() < 0.6
    other = starts.permuted(text, variant.seed + 1)
    assert not torch.equal(rows, other)
    assert torch.equal(rows, starts.permuted(text, variant.seed))


# ---- frozen
def test_frozen_rows_do_not_change_by_a_bit_whatever_decays_and_resumes(
    bases, begun, data_folder, tmp_path, often
):
    base = bases["llama"]
    study = begun("safety_frozen", weight_decay=0.5, arguments={"optim": "sgd"})
    one = Trainings(base, study, "sft", tmp_path / "adapter")
    one.killed(1)
    assert one.train() == 1
    front = text_of(base, data_folder, "safety_frozen")
    saved = adapters_rows(tmp_path / "adapter")
    assert torch.equal(saved[: len(front)], front)
    assert len(saved) == len(front) + 4
    _, model = created(base, study)
    begins = model.get_prompt(1)[0].detach()
    adapters.detach(model)
    assert (saved != begins)[len(front) :].any(1).all()  # what is trained did move
    assert torch.equal(begins[: len(front)], front)
    table = {tuple(row) for row in base.model.get_input_embeddings().weight.tolist()}
    assert all(tuple(row) in table for row in begins[len(front) :].tolist())


def adapters_rows(folder):
    from safetensors.torch import load_file

    return load_file(folder / adapters.WEIGHTS)["prompt_embeddings"]


def test_of_a_frozen_start_the_suffix_is_counted_and_the_dose_sees_the_whole(
    bases, begun, tmp_path
):
    base, study = bases["llama"], begun("safety_frozen")
    [untrained] = variants_of(study, "prompt_tuning", "untrained")
    record = fitting.train(untrained, base, None, study, tmp_path / "adapter").record
    width = base.model.config.hidden_size
    assert record["n_trainable"] == 4 * width
    assert record["n_stored"] > record["n_trainable"]
    assert record["kl_init"] < 1e-9 < 1e-3 < record["kl_base"]


def test_examples_leave_room_for_what_is_frozen(bases, begun, data_folder, monkeypatch):
    base, study = bases["llama"], begun("safety_frozen")
    monkeypatch.setattr(examples, "context_length", lambda _: 40)
    front = len(text_of(base, data_folder, "safety_frozen"))
    assert examples.longest(base, study) == 40 - 4 - front


# ---- what is saved
@pytest.mark.parametrize(("method", "init"), FROM_TEXT)
def test_peft_itself_loads_what_was_saved_and_gives_the_same_logits(
    bases, begun, tmp_path, method, init
):
    base, study = bases["llama"], begun(init, method)
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) if init == "dro" else None
    _, model = created(base, study, rows)
    ids = torch.tensor([[5, 9, 11, 7]])
    with torch.no_grad():
        wanted = model(ids).logits
        adapters.save(model.eval(), tmp_path)
    soft = Engine(model, engine_of(model).ways).soft_prompt
    adapters.detach(model)
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0, atol=1e-5)
    with adapters.attached(base.model, tmp_path) as attached:
        torch.testing.assert_close(Scorer(attached, base.tokenizer).engine.soft_prompt, soft)


# ---- P-Tuning
@pytest.mark.parametrize("init", [init for init in TEXT_INITS if init in ENCODED_INITS])
def test_the_encoder_gives_the_start(bases, begun, data_folder, init):
    base = bases["gemma"]
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) if init == "dro" else None
    variant, model = created(base, begun(init, "p_tuning"), rows)
    found = model.get_prompt(1)[0].detach()
    adapters.detach(model)
    wanted = text_of(base, data_folder, init, 4) if rows is None else rows
    wanted = starts.permuted(wanted, variant.seed) if init == "safety_permuted" else wanted
    assert (found - wanted).norm() / wanted.norm() < 1e-4


def test_the_encoder_gives_tokens_of_the_vocabulary_by_the_seed(bases, begun):
    base, found = bases["llama"], []
    study = begun("vocabulary", "p_tuning")
    [variant] = variants_of(study, "p_tuning")
    for seed in (1, 1, 2):
        one = dataclasses.replace(variant, seed=seed)
        model = adapters.create(one, base.model, base.tokenizer)
        found.append(model.get_prompt(1)[0].detach())
        adapters.detach(model)
    table = base.model.get_input_embeddings().weight
    assert (torch.cdist(found[0], table).min(1).values < 1e-3).all()
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_an_encoder_too_small_for_its_start_is_refused(bases, begun):
    base, few = bases["llama"], {"num_virtual_tokens": 12, "encoder_hidden_size": 4}
    study = begun("safety_text", "p_tuning", {"methods": {"p_tuning": few}})
    with pytest.raises(ValueError) as error:
        created(base, study)
    assert "relative error" in one_sentence(error.value)
    assert "encoder_hidden_size" in str(error.value)


def test_before_any_work_too(begun, standins):
    few = {"num_virtual_tokens": 12, "encoder_hidden_size": 4}
    for settings in ({"num_virtual_tokens": 12}, few):
        study = begun("safety_text", "p_tuning", {"methods": {"p_tuning": settings}})
        source = study.bases["tiny-llama"]
        if settings is not few:
            preparing.check_model("tiny-llama", source, study)
    with pytest.raises(ValueError) as error:
        preparing.check_model("tiny-llama", source, study)
    assert "methods.p_tuning: the encoder" in one_sentence(error.value)


# ---- DRO
def a_space(width=64, m=3, seed=0):
    rng = np.random.default_rng(seed)
    components = np.linalg.qr(rng.normal(size=(width, m)))[0]
    parts = components, *rng.normal(size=(2, m))
    return dro.Space(*(torch.tensor(part, dtype=torch.float32) for part in parts))


def test_the_loss_is_the_papers():
    """In float64, with a whole orthonormal basis and the logarithms written out."""
    rng, space = np.random.default_rng(1), a_space(width=10)
    states, before = rng.normal(size=(2, 7, 10))
    harmful = np.array([1.0, 1, 1, 0, 0, 0, 1])
    v, refusal, harm = (
        part.double().numpy() for part in (space.components, space.refusal, space.harm)
    )
    u = np.linalg.svd(np.eye(10) - v @ v.T)[0][:, :7]
    total = 0.0
    for weight, slope in ((1.0, refusal), (1e-2, harm)):
        p = 1 / (1 + np.exp(-(states @ v @ slope - before @ v @ slope)))
        total -= weight * np.mean(harmful * np.log(p) + (1 - harmful) * np.log(1 - p))
    total += 1e-3 * np.mean(((states - before) @ u) ** 2)
    made = (torch.tensor(one, dtype=torch.float32) for one in (states, before, harmful))
    assert float(dro.dro_loss(*made, space)) == pytest.approx(total, rel=1e-5)


def test_the_probes_find_their_direction_and_the_space_its_plane():
    rng, harmful = np.random.default_rng(0), np.repeat([1.0, 0.0], 60)
    refused = np.where(rng.random(120) < 0.9, harmful, 1 - harmful)
    states = rng.normal(size=(120, 12)) * 0.1
    states[:, 3] += 4 * harmful
    states[:, 5] += 3 * refused
    refused[:5] = np.nan  # not known: no answer to read
    space = dro.space_of(torch.tensor(states), harmful, refused, 2)
    assert space.components[[3, 5]].norm() > 1.4  # both lie in the plane
    of_refusal, of_harm = space.components @ space.refusal, space.components @ space.harm
    assert of_refusal[5] > of_refusal[3].abs()
    assert of_harm[3] > of_harm[5].abs()


@pytest.mark.parametrize(("refused", "word"), [(0.0, "none"), (1.0, "all")])
def test_without_any_or_with_all_refused_there_is_no_direction(refused, word):
    with pytest.raises(VariantFailure, match=f"refuses {word}"):
        dro.space_of(torch.randn(20, 8), np.repeat([1.0, 0.0], 10), np.full(20, refused), 2)


def test_the_safety_prompt_is_optimised_once_by_the_study_and_not_by_the_variant(
    bases, begun, data_folder, monkeypatch
):
    base, study, looked = bases["llama"], begun("dro"), []

    def refusals(scorer, asked, _):  # a random model refuses nothing
        looked.append(scorer)
        return np.repeat([1.0, 0.0], len(asked) // 2)

    monkeypatch.setattr(dro, "_refusals", refusals)
    [variant], losses = variants_of(study, "prompt_tuning"), []
    loss = dro.dro_loss
    monkeypatch.setattr(dro, "dro_loss", lambda *of: losses.append(loss(*of)) or losses[-1])
    rows = dro.optimised(variant, base, study)
    assert float(losses[0]) == pytest.approx(1.01 * np.log(2), rel=1e-4)  # nothing has moved
    assert float(losses[-1]) < float(losses[0])
    assert len(losses) == 2 + DRO["steps"]
    text = text_of(base, data_folder, "dro", 4)
    assert 0 < (rows - text).norm() < text.norm()
    other = dataclasses.replace(variant, seed=variant.seed + 1)
    assert torch.equal(dro.optimised(other, base, study), rows)
    assert len(looked) == 2  # it was kept
    dro._KEPT.pop(base.model)
    assert torch.equal(dro.optimised(variant, base, study), rows)
    dro._KEPT.pop(base.model)
    monkeypatch.setattr(dro, "dro_loss", lambda *of: -loss(*of))
    with pytest.raises(VariantFailure, match="did not fall"):
        dro.descend(
            engine_of(base.model),
            *dro.anchors(base, study),
            text,
            a_space(),
            study.dro.model_copy(update={"steps": 0}),
            0,
        )
    assert dro.optimised(dataclasses.replace(variant, init="random"), base, study) is None


# ---- refusals
BAD = {
    "no frozen token of an encoder": ("safety_frozen", "p_tuning", {}, ["p_tuning has no init"]),
    "dro without its prompts": ("dro", "prompt_tuning", {"dro": None}, ["dro needs dro"]),
    "dro of unknown data": (
        "dro",
        "prompt_tuning",
        {"dro": DRO | {"harmful": "x"}},
        ["dro.harmful"],
    ),
    "dro of held-out data": (
        "dro",
        "prompt_tuning",
        {"dro": DRO | {"harmless": "heldout"}},
        ["dro.harmless"],
    ),
    "dro of one set": ("dro", "prompt_tuning", {"dro": DRO | {"harmless": "forbidden"}}, ["twice"]),
    "dro of few": ("dro", "prompt_tuning", {"dro": DRO | {"dimensions": 5}}, ["too few"]),
    "dro for nobody": ("random", "prompt_tuning", {"dro": DRO}, ["no soft prompt begins so"]),
    "no texts": ("safety_permuted", "prompt_tuning", {"init_texts": None}, ["init_texts"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_start_that_cannot_be_made_is_refused_as_the_file_is_read(begun, case):
    init, method, changes, said = BAD[case]
    with pytest.raises(ValueError) as error:
        begun(init, method, changes)
    sentence = one_sentence(error.value)
    assert all(word in sentence for word in said)


@pytest.mark.parametrize(
    ("text", "said"), [('{"task": "a"}', "no text"), ('{"safety": " "}', "no text"), ("[]", "list")]
)
def test_a_text_that_is_missing_is_refused_before_any_work(begun, standins, tmp_path, text, said):
    study = begun("safety_text")
    (tmp_path / "texts.json").write_text(text)
    texts = study.init_texts.model_copy(update={"path": str(tmp_path / "texts.json")})
    study = study.model_copy(update={"init_texts": texts})
    with pytest.raises(ValueError) as error:
        preparing.check_model("tiny-llama", study.bases["tiny-llama"], study)
    assert said in one_sentence(error.value)


def test_anchors_that_a_benchmark_asks_are_refused_before_any_work(begun, standins, monkeypatch):
    study = begun("dro")
    name, source = "tiny-llama", study.bases["tiny-llama"]
    preparing.check_model(name, source, study)
    asked = [
        {"prompt": [{"role": "user", "content": text}], "answer": "no ."}
        for text in examples.asked_texts(study)["over_refusal"]
    ]
    monkeypatch.setattr(examples, "training_examples", lambda *_: asked)
    with pytest.raises(ValueError) as error:
        preparing.check_model(name, source, study)
    assert "dro.harmful is data.forbidden" in one_sentence(error.value)


def test_a_text_of_no_tokens_is_refused(bases):
    with pytest.raises(ValueError) as error:
        starts.token_ids(bases["llama"].tokenizer, "")
    assert "no tokens" in one_sentence(error.value)


def test_every_start_is_known_to_the_methods_that_have_it():
    assert set(TEXT_INITS) < set(INITS)
    assert set(INITS) - set(ENCODED_INITS) == {"safety_frozen"}


def test_preferences_train_behind_frozen_rows_too(bases, begun, data_folder, content, tmp_path):
    base = bases["llama"]
    content["data"]["dpo"]["n"] = 8
    study = begun("safety_frozen", objective="dpo")
    one = Trainings(base, study, "dpo", tmp_path / "adapter")
    one.train()
    front = text_of(base, data_folder, "safety_frozen")
    saved = adapters_rows(tmp_path / "adapter")
    assert torch.equal(saved[: len(front)], front)
    assert len(saved) == len(front) + 4
