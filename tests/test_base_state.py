"""The base model is, to the bit, what it was before an adapter, whatever the adapter did to it; and
each tensor of an adapter's file does something, or the adapter is refused by name.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftType, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import FAMILIES, one_sentence, variants_of
from driftbook.batch.opened import Job
from driftbook.doctors import adapter as doctor
from driftbook.models import adapters
from driftbook.models.base_state import BaseState, SpoiledBase
from driftbook.models.fingerprint import fingerprint, model_hash, remembered_fingerprint
from driftbook.models.loading import Loaded
from driftbook.models.scoring import Scorer
from driftbook.study.files import OUTPUTS, read_json

TEXTS = [[7, 8, 9, 10, 11], [7, 8, 9, 12, 13, 14, 15], [20, 21]]
ANSWERS = [[16, 17], [18], [19, 5, 6]]
TARGETS = ["q_proj", "v_proj"]


def model(**settings) -> LlamaForCausalLM:
    """The same random Llama every time."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            **(shape | heads | {"initializer_range": 0.3, "attention_bias": True} | settings)
        )
    )
    return made.eval().requires_grad_(False)


def shaken(made):
    """The trained parameters far from their init."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return made.eval()


@torch.inference_mode()
def own(made) -> np.ndarray:
    """Log-probabilities of the answers by the model's own forward, one text at a time."""
    found = []
    for text, answer in zip(TEXTS, ANSWERS, strict=True):
        logits = made(input_ids=torch.tensor([text + answer]), use_cache=False).logits[0]
        rows = logits.log_softmax(-1)[-len(answer) - 1 : -1]
        found += rows[range(len(answer)), answer].tolist()
    return np.array(found)


def scored(made, tokenizer) -> np.ndarray:
    pairs = list(zip(TEXTS, ANSWERS, strict=True))
    return np.concatenate(Scorer(made, tokenizer).token_logprobs(pairs))


def lora(**settings) -> LoraConfig:
    plain = {"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(plain | settings))


@pytest.fixture
def tokenizer(bases):
    return bases["llama"].tokenizer


# ---- every method of the installed PEFT
SOFT = {"num_virtual_tokens": 3}
NEEDED = {
    "ADALORA": {"total_step": 9},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": SOFT,
    "CPT": {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"target_modules": ["q_proj"]},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MULTITASK_PROMPT_TUNING": SOFT | {"num_tasks": 2, "num_ranks": 1},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PREFIX_TUNING": SOFT,
    "PROMPT_TUNING": SOFT,
    "P_TUNING": SOFT | {"encoder_hidden_size": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [7, 16]},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "r": 2, "topk": 2},
    "VERA": {"target_modules": ["q_proj"], "r": 4},
    "WAVEFT": {"n_frequency": 20},
}
OWN = tuple(PeftType)  # not our own type, whose change shows where its ids stand
WITHOUT_TARGETS = ("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "TRAINABLE_TOKENS")


def saved_adapter(configuration, folder, **settings):
    """The folder of a shaken adapter, and the model with it as PEFT made it."""
    made = shaken(get_peft_model(model(**settings), configuration))
    made.save_pretrained(folder)
    return folder, made


def config_of(method: str, kind: type):
    settings = NEEDED.get(method, {})
    targeted = "num_virtual_tokens" not in settings and method not in WITHOUT_TARGETS
    given = ({"target_modules": TARGETS} if targeted else {}) | settings
    return kind(task_type="CAUSAL_LM", **given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted(m.value for m in PEFT_TYPE_TO_CONFIG_MAPPING if m in OWN))
def test_each_method_is_undone_to_the_bit_or_refused_by_name(tokenizer, tmp_path, method):
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    base = model()
    before, alone = fingerprint(base), own(base)
    if method in adapters.UNSCORED_METHODS:
        tmp_path.joinpath(adapters.WEIGHTS).touch()
        save_file({"x": torch.zeros(1)}, tmp_path / adapters.WEIGHTS)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
        with pytest.raises(ValueError, match=method), adapters.attached(base, tmp_path):
            pass
        assert "error" in set(doctor.examine(tmp_path).severity)
    else:
        folder, made = saved_adapter(config_of(method, kind), tmp_path / "adapter")
        with adapters.attached(base, folder) as attached:
            assert np.abs(own(attached) - own(made)).max() < 1e-5, "PEFT's own, as it was saved"
            assert np.abs(scored(attached, tokenizer) - own(made)).max() < 1e-4
            assert np.abs(own(made) - alone).max() > 1e-3
        found = doctor.examine(folder, Loaded("x", base, tokenizer, "r"))
        assert set(found.finding[found.severity == "error"]) <= {"tokenizer"}
    assert before.differences(fingerprint(base)) == []
    assert (own(base) == alone).all()


# ---- settings that change the base itself
CHANGING = {
    "bias all": {"bias": "all"},
    "bias of LoRA's modules": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "a norm": {"modules_to_save": ["norm"]},
    "table and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied with the head": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA of the table": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of the head": {"target_modules": ["q_proj", "lm_head"]},
    "some tokens": {"trainable_token_indices": [7, 16]},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_the_base_is_undone(tokenizer, tmp_path, name, tied):
    settings = {"tie_word_embeddings": tied}
    folder, made = saved_adapter(lora(**CHANGING[name]), tmp_path / "adapter", **settings)
    plain, _ = saved_adapter(lora(), tmp_path / "plain", **settings)
    base, fresh = model(**settings), model(**settings)
    before = fingerprint(base)
    with adapters.attached(base, folder) as attached:
        assert np.abs(scored(attached, tokenizer) - own(made)).max() < 1e-4
    assert before.differences(fingerprint(base)) == []
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    assert not any(value.requires_grad for value in base.parameters())
    with adapters.attached(base, plain) as after, adapters.attached(fresh, plain) as first:
        assert (own(after) == own(first)).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGING)
def test_a_variant_trained_after_another_is_the_variant_trained_alone(
    make_study, content, tokenizer, name
):
    [plain] = variants_of(make_study(content), "lora")[:1]
    given = {"r": 2, "target_modules": TARGETS} | CHANGING[name]
    first = dataclasses.replace(plain, settings=json.dumps({"peft": given}))

    def trained(variant, base) -> dict:
        made = adapters.create(variant, base, tokenizer)
        rate = torch.optim.SGD([one for one in made.parameters() if one.requires_grad], 0.1)
        for _ in range(2):
            made(
                input_ids=torch.tensor(TEXTS[1:2]), labels=torch.tensor(TEXTS[1:2])
            ).loss.backward()
            rate.step()
        found = adapters.state(made)
        adapters.detach(made)
        return found

    base, fresh = model(), model()
    before = fingerprint(base)
    assert trained(first, base)
    assert before.differences(fingerprint(base)) == []
    after, alone = trained(plain, base), trained(plain, fresh)
    assert all(torch.equal(after[key], alone[key]) for key in alone)


# ---- what cannot be used is refused, and leaves nothing
def refusal(base, folder) -> str:
    before = fingerprint(base)
    with pytest.raises(ValueError) as error, adapters.attached(base, folder):
        pass
    assert before.differences(fingerprint(base)) == []
    return one_sentence(error.value)


def edited(folder, change, **settings):
    tensors = change(load_file(folder / adapters.WEIGHTS))
    save_file(tensors, folder / adapters.WEIGHTS)
    known = read_json(folder / "adapter_config.json") | settings
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


def renamed(tensors: dict) -> dict:
    return {name.replace("model.layers", "language_model.layers"): v for name, v in tensors.items()}


def without(part: str):
    return lambda tensors: {name: v for name, v in tensors.items() if part not in name}


A, B = (f"base_model.model.model.layers.1.self_attn.v_proj.lora_{part}.weight" for part in "AB")
MISFITS = {
    "another prefix": (renamed, {}, "8 of its 8 tensors (base_model"),
    "some of another prefix": (
        lambda one: {**one, A.replace("layers.1", "layers.9"): one[A].clone()},
        {},
        "1 of its 9 tensors (base_model.model.model.layers.9",
    ),
    "a module without tensors": (without("layers.1"), {}, "4 of its 8 tensors that its conf"),
    "half of a module": (lambda one: {k: v for k, v in one.items() if k != B}, {}, B),
    "other sizes": (dict, {"r": 4}, "lora_A.default.weight is [2, 32] in its file and [4, 32]"),
    "a whole module without tensors": (dict, {"modules_to_save": ["norm"]}, "norm.weight"),
    "biases without tensors": (
        dict,
        {"bias": "all"},
        "that its configuration asks for (base_model",
    ),
    "an unknown method": (dict, {"peft_type": "NEWEST"}, "NEWEST"),
    "random residual": (dict, {"init_lora_weights": "pissa_niter_4"}, "random numbers"),
    "activated LoRA": (dict, {"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_of_which_a_part_would_do_nothing_is_refused(tmp_path, name):
    change, settings, word = MISFITS[name]
    folder, _ = saved_adapter(lora(), tmp_path / "adapter")
    said = refusal(model(), edited(folder, change, **settings))
    assert word in said
    assert str(folder) in said


def test_a_soft_prompt_of_another_width_is_refused_with_both_sizes(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    folder, _ = saved_adapter(config, tmp_path / "adapter", hidden_size=64, head_dim=16)
    edited(folder, dict, token_dim=32)
    said = refusal(model(), folder)
    assert "[3, 64]" in said
    assert "[3, 32]" in said


def test_a_pointer_of_git_lfs_is_called_that_and_nothing_is_to_be_deleted(tmp_path):
    folder, _ = saved_adapter(lora(), tmp_path / "adapter")
    path = folder / adapters.WEIGHTS
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    path.write_text(pointer)
    assert "git lfs pull" in refusal(model(), folder)
    path.write_bytes(b"torn")
    said = refusal(model(), folder)
    assert "delete" not in said
    mine = OUTPUTS / "of_this_test" / "adapter"
    mine.mkdir(parents=True)
    (mine / adapters.WEIGHTS).write_bytes(b"torn")
    assert f"delete {mine.parent}" in refusal(model(), mine)


# ---- a base that could not be put back
def test_a_spoiled_base_is_never_scored_and_is_loaded_anew(
    tokenizer, make_study, content, monkeypatch, tmp_path
):
    folder, _ = saved_adapter(lora(), tmp_path / "adapter")
    study = make_study(content)
    loads = []

    def load(*_):
        loads.append(Loaded("x", model(), tokenizer, "r"))
        return loads[-1]

    monkeypatch.setattr("driftbook.models.loading.load", load)
    monkeypatch.setattr("driftbook.study.folders.adapter", lambda *_: folder)
    job = Job("respond", study, next(iter(study.bases)), list(study.variants))
    spoiled = job.base.model
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"), job.attached(study.variants[0]):
        spoiled.model.norm.weight.data.add_(1)  # as no version shows
    with pytest.raises(SpoiledBase, match=r"model\.norm\.weight"):
        Scorer(spoiled, tokenizer)
    with pytest.raises(SpoiledBase), adapters.attached(spoiled, None):
        pass
    with job.attached(study.variants[0]):
        pass
    assert len(loads) == 2
    assert fingerprint(job.base.model) == fingerprint(model())


# ---- the fingerprint
CHANGES = {
    "one bit": lambda one: one.model.norm.weight.view(torch.int32)[3].bitwise_xor_(1),
    "rows that change places": lambda one: one.lm_head.weight.copy_(one.lm_head.weight.flip(0)),
    "a buffer": lambda one: one.model.rotary_emb.inv_freq.mul_(2),
    "a hook": lambda one: one.model.layers[0].register_forward_hook(lambda *_: None),
    "a forward of its own": lambda one: setattr(one, "forward", one.forward),
    "another type": lambda one: setattr(one.model, "norm", torch.nn.LayerNorm(32)),
    "tied": lambda one: setattr(one.lm_head, "weight", one.model.embed_tokens.weight),
    "a setting": lambda one: setattr(one.config, "rms_norm_eps", 1e-3),
    "a dtype": lambda one: one.lm_head.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_sees_every_change_and_a_state_undoes_it(name):
    one = model()
    before, state = fingerprint(one), BaseState(one)
    state.copy([*one.parameters(), *one.buffers()])
    with torch.no_grad():
        CHANGES[name](one)
    assert before.differences(fingerprint(one))
    assert before.hex != model_hash(one)
    state.restore("a test")
    assert before == fingerprint(one)


def test_the_hash_is_of_the_numbers_and_not_of_the_object(bases):
    assert model_hash(model()) == model_hash(copy.deepcopy(model()))
    assert len({model_hash(bases[family].model) for family in FAMILIES}) == len(FAMILIES)


def test_large_tensors_are_read_whole():
    """Each place of a tensor counts, in blocks and in their rest: one is changed at a time."""
    table = torch.nn.Embedding(70_001, 33)
    before, weight = fingerprint(table), table.weight.data.view(-1)
    for place in (0, 1, 8_185, 8_186, 523_903, 523_904, weight.numel() - 1):
        kept = float(weight[place])
        weight[place] = kept + 1
        assert before.differences(fingerprint(table)) == ["weight"]
        weight[place] = kept
    assert before == fingerprint(table)
    for size in (33, 1_024, 523_904):  # rows that change places; 523,904 numbers are a block
        rows = weight[: 2 * size].view(2, -1)
        rows.copy_(rows.flip(0))
        assert before != fingerprint(table)
        rows.copy_(rows.flip(0))
    assert before == fingerprint(table)


def test_what_is_remembered_is_read_again_once_it_is_touched():
    one = model()
    before = remembered_fingerprint(one)
    with torch.no_grad():
        one.lm_head.weight[0, 0] += 1
    assert before.differences(remembered_fingerprint(one)) == ["lm_head.weight"]


# ---- the study file
@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"init_lora_weights": "eva"}, "from data"),
        ({"init_lora_weights": "pissa_niter_4"}, "random numbers"),
        ({"alora_invocation_tokens": [5]}, "acts only behind"),
    ],
)
def test_a_study_cannot_ask_for_what_could_not_be_scored(make_study, content, setting, word):
    content["methods"]["lora"] |= setting
    with pytest.raises(ValueError, match=word) as error:
        make_study(content)
    assert "methods.lora" in one_sentence(error.value)
