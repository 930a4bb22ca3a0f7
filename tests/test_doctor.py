"""The adapter doctor: silent about healthy adapters of every method, and one sentence for each
sickness put into them.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, PEFT_METHODS, one_sentence
from driftbook.doctors import adapter_files, adapter_weights
from driftbook.doctors.adapter import examine
from driftbook.models.loading import Loaded
from examined import CONFIG, EXTRA, WEIGHTS, complaints, make, said, saved

pytest_plugins = ["examined"]


# ---- the healthy
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_nothing_is_wrong_with_a_healthy_adapter(bases, adapter_folders, family, method):
    for base in (None, bases[family]):
        assert complaints(adapter_folders[family, method], base) == {}


@pytest.mark.parametrize("method", EXTRA)
def test_nothing_is_wrong_with_a_healthy_adapter_of_another_method(llama, folders, local, method):
    for base in (None, llama, local):
        assert complaints(folders[method], base) == {}


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_base_in_a_folder_is_read_as_a_loaded_one(bases, adapter_folders, tmp_path, family):
    folder = saved(bases[family], tmp_path / "base")
    for method in PEFT_METHODS:
        loaded, read = (
            examine(adapter_folders[family, method], base) for base in (bases[family], folder)
        )
        assert loaded.equals(read)
        assert len(loaded) >= 2


def test_the_loaded_base_is_left_as_it_was(llama, folders):
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    for folder in folders.values():
        examine(folder, llama)
    after = llama.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(llama.model, "peft_config")


def test_methods_that_the_doctor_does_not_measure_are_named(folders, llama):
    assert "PREFIX_TUNING" in said(folders["prefix"], "not_examined", llama)
    assert "no base model was given" in said(folders["lora"], "not_examined")


# ---- files
def test_a_missing_folder_raises(tmp_path):
    with pytest.raises(ValueError, match="does not exist") as error:
        examine(tmp_path / "nowhere")
    one_sentence(error.value)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "state.pkl"]
)
def test_a_pickle_beside_the_weights_is_noted_and_never_opened(edited, name):
    folder = edited("lora")
    (folder / name).write_bytes(
        b"cos\nsystem\n(S'exit 1'\ntR."
    )  # would end the process if it were opened
    assert complaints(folder) == {}
    assert name in said(folder, "pickle")


def test_weights_in_a_pickle_only_are_refused(edited):
    folder = edited("lora")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert complaints(folder) == {"form": "error"}
    (folder / "adapter_model.bin").unlink()
    assert complaints(folder) == {"weights": "error"}


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-1], lambda b: b[:5], lambda b: b[:8] + b"[" + b[9:], lambda b: b""]
)
def test_torn_weights(edited, spoil):
    folder = edited("ia3")
    (folder / WEIGHTS).write_bytes(spoil((folder / WEIGHTS).read_bytes()))
    assert complaints(folder) == {"weights": "error"}


def test_a_configuration_that_cannot_be_used(edited):
    folder = edited("lora")
    for text, finding in (
        ('{"peft_type": "LOR', "config"),
        ("[]", "config"),
        ('{"peft_type": "NEW"}', "peft_type"),
        ("{}", "peft_type"),
    ):
        (folder / CONFIG).write_text(text)
        assert complaints(folder) == {finding: "error"}
    (folder / CONFIG).unlink()
    assert complaints(folder) == {"config": "error"}


KEYS = [
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "task_type",
    "auto_mapping",
    "revision",
    "base_model_name_or_path",
    "use_dora",
    "init_lora_weights",
    "peft_type",
    "layers_to_transform",
    "target_parameters",
    "trainable_token_indices",
]


ODD = [None, 0, -1, "", "x", [], ["x"], {}, {"x": "y"}, 1e400, "PREFIX_TUNING", "IA3"]


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), min_size=1))
def test_no_configuration_makes_the_doctor_raise(folders, llama, tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("odd")
    shutil.copy(folders["lora"] / WEIGHTS, folder)
    (folder / CONFIG).write_text(
        json.dumps(json.loads((folders["lora"] / CONFIG).read_text()) | settings)
    )
    complaints(folder, llama)


# ---- numbers
@pytest.mark.parametrize("method", [*PEFT_METHODS, "dora", "prefix"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_one_number_that_is_not_finite(edited, llama, method, value):
    touched = []

    def spoil(state):
        name = sorted(state)[-1]
        state[name].view(-1)[3] = value
        touched.append(name)

    folder = edited(method, spoil)
    assert complaints(folder, llama) == {"non_finite": "error"}
    assert touched[0] in said(folder, "non_finite")
    assert ", 1 numbers in all" in said(folder, "non_finite")


@pytest.mark.parametrize(("method", "factor"), [("lora", 100.0), ("dora", 1e4), ("ia3", 50.0)])
def test_one_exploded_module(edited, llama, method, factor):
    part = {"lora": "lora_B", "dora": "magnitude", "ia3": "ia3_l"}[method]

    def explode(state):
        next(value for name, value in sorted(state.items()) if part in name and ".1." in name).mul_(
            factor
        )

    folder = edited(method, explode)
    assert complaints(folder, llama) == {"exploded": "warning"}
    assert "1 of " in said(folder, "exploded", llama)
    assert ".layers.1." in said(folder, "exploded", llama)


def test_without_a_base_a_lora_module_is_judged_against_the_others(edited):
    def explode(state):
        state["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].mul_(100)

    folder = edited("lora", explode)
    assert complaints(folder) == {"exploded": "warning"}
    assert "model.layers.1.self_attn.v_proj" in said(folder, "exploded")


def test_norms_of_one_scale_hold_no_outlier():
    rng = np.random.default_rng(0)
    found = sum(
        adapter_weights.norm_outliers(np.exp(0.5 * rng.standard_normal(64))).any()
        for _ in range(200)
    )
    assert found == 0
    assert adapter_weights.norm_outliers(np.array([1.0, 1.0, 1.0, 1.0, 11.0])).tolist() == [
        False
    ] * 4 + [True]
    assert not adapter_weights.norm_outliers(np.array([1.0, 1.0, 1.0, 1.0, 9.0])).any()


# ---- distance from init, against what PEFT itself merges
@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "embedding"])
def test_the_distance_is_that_of_the_weights_that_peft_merges(llama, folders, method):
    base = copy.deepcopy(llama.model)
    if method == "embedding":  # tied to the head, which PEFT would merge into as well
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    merged = PeftModel.from_pretrained(copy.deepcopy(base), folders[method]).merge_and_unload()
    adapter = adapter_files.AdapterFiles(folders[method])
    opened, rng = adapter_files.open_base(llama), np.random.default_rng(0)
    modules = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name in adapter.shapes
        if ".lora_" in name
    }
    assert len(modules) >= 2
    for module in modules:
        old, new = (model.get_submodule(module).weight.double() for model in (base, merged))
        parts = {
            m[2]: name
            for name in adapter.shapes
            if (m := adapter_weights.PART.match(name)) and m[1] == module
        }
        change = adapter_weights.lora_change(adapter, module, parts, opened, rng)
        assert change.ratio == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        assert change.ratio > 0.01
        if method != "dora":
            assert change.per_entry == pytest.approx(
                float((new - old).square().mean().sqrt()), rel=1e-4
            )


@pytest.mark.parametrize("method", ["lora", "embedding", "ia3"])
def test_an_adapter_at_its_init_did_nothing(edited, llama, method):
    def reset(state):
        for name, value in state.items():
            if "lora_B" in name or "embedding_A" in name:
                value.zero_()
            if "ia3" in name:
                value.fill_(1)

    folder = edited(method, reset)
    for base in (None, llama):
        found = complaints(folder, base)
        assert found["untrained"] == "warning"
        assert found.keys() <= {"untrained", "vocabulary"}
        assert "nothing" in said(folder, "untrained", base) or method == "embedding"


def test_dora_at_its_init_may_still_have_trained_magnitudes(llama, tmp_path):
    folder = make(llama, EXTRA["dora"], tmp_path / "dora", scale=0)
    assert complaints(folder, llama) == {"untrained": "warning"}
    assert "only its other tensors (4)" in said(folder, "untrained", llama)


def test_part_of_a_lora_at_its_init_is_a_note(edited, llama):
    folder = edited(
        "lora",
        lambda state: state[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        ].zero_(),
    )
    assert complaints(folder, llama) == {}
    assert "in 1 of its 4 modules" in said(folder, "untrained", llama)


# ---- no-ops in the dtype of the base
def test_half_a_unit_in_the_last_place_of_bfloat16():
    """The two bounds of the docstring, over every significand of bfloat16 and its float32
    neighbours.
    """
    eps = torch.finfo(torch.bfloat16).eps
    assert eps == 2**-7
    up, down = torch.tensor([1 + eps / 2, 1 - eps / 4])
    assert up.bfloat16() == down.bfloat16() == 1
    assert torch.nextafter(up, torch.tensor(2.0)).bfloat16() > 1
    assert torch.nextafter(down, torch.tensor(0.0)).bfloat16() < 1
    activations = 1 + eps * torch.arange(128)
    for factor in (1 + eps / 4, 1 - eps / 4):
        assert torch.equal((activations * factor).bfloat16().float(), activations)
    assert not torch.equal((activations * (1 + eps / 2)).bfloat16().float(), activations)


@pytest.mark.parametrize(
    ("off", "finding", "words"),
    [
        (2**-7, {}, "0.0% of its scales are 1"),
        (2**-8, {"no_op": "warning"}, "part of the activations"),
        (2**-9, {"no_op": "warning"}, "merged or not"),
        (2e-5, {"no_op": "warning"}, "merged or not"),
        (-(2**-8), {}, "0.0% of its scales are 1"),
        (-(2**-9), {"no_op": "warning"}, "merged or not"),
    ],
)
def test_ia3_that_bfloat16_rounds_away(edited, llama, tmp_path, off, finding, words):
    folder = edited("ia3", lambda state: [value.fill_(1 + off) for value in state.values()])
    half = saved(llama, tmp_path / "half", torch.bfloat16)
    assert complaints(folder, half) == finding
    assert words in said(folder, "no_op", half)
    assert complaints(folder, llama) == {}  # in float32 it does something
    assert complaints(folder) == {}  # nothing is known of the base's dtype: a note
    assert ("bfloat16" in said(folder, "no_op")) or not finding


def test_ia3_that_is_said_to_do_nothing_moves_no_logit(edited, llama):
    folder = edited("ia3", lambda state: [value.fill_(1 + 2**-9) for value in state.values()])
    half = copy.deepcopy(llama.model).bfloat16()
    ids = torch.arange(5, 25).unsqueeze(0)
    alone = half(ids).logits
    attached = PeftModel.from_pretrained(half, folder)
    assert torch.equal(attached(ids).logits, alone)
    for name, value in attached.named_parameters():
        if "ia3" in name:
            assert value.dtype == torch.float32
            value.data.fill_(1 + 2**-7)
    assert not torch.equal(attached(ids).logits, alone)


@pytest.mark.parametrize(("factor", "finding"), [(1e-9, {"no_op": "warning"}), (1.0, {})])
def test_lora_that_bfloat16_rounds_away_when_merged(edited, llama, tmp_path, factor, finding):
    folder = edited(
        "lora",
        lambda state: [value.mul_(factor) for name, value in state.items() if "lora_B" in name],
    )
    half = saved(llama, tmp_path / "half", torch.bfloat16)
    assert complaints(folder, half) == finding
    assert "bfloat16" in said(folder, "no_op", half)
    old = copy.deepcopy(llama.model).bfloat16()
    new = PeftModel.from_pretrained(copy.deepcopy(old), folder).merge_and_unload()
    same = all(
        torch.equal(a, b)
        for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True)
    )
    assert same == bool(finding)
    assert complaints(folder, llama) == {}


def test_dora_whose_magnitudes_alone_moved_is_no_noop(edited, llama, tmp_path):
    def shrink(state):
        for name, value in state.items():
            value.mul_(1e-9 if "lora_B" in name else 1.5 if "magnitude" in name else 1)

    folder = edited("dora", shrink)
    half = saved(llama, tmp_path / "half", torch.bfloat16)
    assert complaints(folder, half) == {}
    assert "changes 100.00% of" in said(folder, "no_op", half)


# ---- soft prompts
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_norm_of_a_soft_prompt_is_compared_with_what_the_embedding_gives(
    bases, adapter_folders, family
):
    base, folder = bases[family], adapter_folders[family, "prompt_tuning"]
    tokens = load_file(folder / WEIGHTS)["prompt_embeddings"]
    given = base.model.get_input_embeddings()(
        torch.arange(len(base.model.get_input_embeddings().weight))
    )
    ratio = float(tokens.norm(dim=1).median() / given.norm(dim=1).median())
    assert f"is {ratio:.3g} times" in said(folder, "soft_prompt", base)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_a_soft_prompt_of_another_scale(edited, llama, method):
    folder = edited(method, lambda state: state["prompt_embeddings"].mul_(100))
    assert complaints(folder, llama) == {"soft_prompt": "warning"}


def test_pefts_random_init_is_recognised(llama, tmp_path):
    small = copy.deepcopy(llama.model)
    small.get_input_embeddings().weight.data.mul_(
        0.02 / float(small.get_input_embeddings().weight.std())
    )  # the scale of real embeddings
    base = Loaded("small", small, llama.tokenizer, "revision")
    torch.manual_seed(0)
    folder = make(
        base,
        PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
        tmp_path / "random",
        scale=0,
    )
    assert complaints(folder, base) == {"soft_prompt": "warning"}
    assert "N(0, 1)" in said(folder, "soft_prompt", base)


def test_rows_of_the_embedding_table_were_never_trained(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_weights, "TABLE_ROWS", 100)
    config = PromptTuningConfig(
        num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
    )
    folder = make(llama, config, tmp_path / "untrained", scale=0)
    assert complaints(folder, llama) == {"untrained": "warning"}
    state = load_file(folder / WEIGHTS)
    state["prompt_embeddings"][0, 5] += 1e-3
    save_file(state, folder / WEIGHTS)
    assert complaints(folder, llama) == {}
