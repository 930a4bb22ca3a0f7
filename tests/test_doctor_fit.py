"""The adapter doctor says where an adapter does not fit its base model, tokenizer or template."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import PEFT_METHODS
from driftbook.doctors import adapter_fit
from driftbook.doctors.adapter import examine, finding_summary
from driftbook.models.loading import Loaded
from examined import CONFIG, WEIGHTS, complaints, make, said, saved

pytest_plugins = ["examined"]


# ---- does it fit
@pytest.mark.parametrize("method", [*PEFT_METHODS, "dora", "prefix"])
def test_another_width(bases, llama, folders, tmp_path, method):
    from driftbook.miniature.families import build_model

    wide = Loaded(
        "wide", build_model("llama", llama.tokenizer, 0, width=96), llama.tokenizer, "revision"
    )
    assert complaints(folders[method], wide)["shapes"] == "error"
    assert " for " in said(folders[method], "shapes", wide)
    assert complaints(folders[method], saved(wide, tmp_path / "wide"))["shapes"] == "error"


def test_modules_that_the_base_has_not(edited, llama):
    old = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    renamed = edited(
        "lora", lambda state: state.update({old.replace("layers.1", "layers.7"): state.pop(old)})
    )
    table = examine(renamed, llama)
    shapes = table[table.finding == "shapes"]
    assert shapes.severity.tolist()[:2] == [
        "error",
        "error",
    ]  # one has no place, and one is lacking
    assert "layers.7.self_attn.q_proj" in shapes.sentence.iloc[0]
    assert old in shapes.sentence.iloc[1]
    assert shapes.module.tolist()[:2] == [
        "model.layers.7.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_targets_that_the_base_has_not(edited, llama):
    folder = edited("lora", settings={"target_modules": ["c_attn"]})
    assert complaints(folder, llama)["shapes"] == "error"
    assert "c_attn" in said(folder, "shapes", llama)


def test_another_rank_than_the_configuration_says(edited, llama):
    folder = edited("lora", settings={"r": 8})
    assert complaints(folder)["shapes"] == "error"
    assert complaints(folder, llama)["shapes"] == "error"


def test_files_without_numbers(edited, folders, llama):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    folder = edited(
        "lora", lambda state: state.update({name: torch.empty(0)})
    )  # an unsharded save of ZeRO-3
    assert complaints(folder) == complaints(folder, llama) == {"shapes": "error"}
    assert name in said(folder, "shapes")
    for method, path in folders.items():
        save_file({}, folder / WEIGHTS)
        shutil.copy(path / CONFIG, folder)
        assert complaints(folder) == {"shapes": "error"}, method
        assert complaints(folder, llama) == {"shapes": "error"}, method
    for method in PEFT_METHODS:
        save_file({"other": torch.ones(2)}, folder / WEIGHTS)
        shutil.copy(folders[method] / CONFIG, folder)
        assert complaints(folder) == {"shapes": "error"}, method


@pytest.mark.parametrize(
    ("named", "same"),
    [
        ("random-llama", True),
        ("someone/random-llama", True),
        ("/another/machine/random-llama", True),
        ("someone/random-qwen2", False),
        ("~/.cache/huggingface/hub/models--someone--random-llama/snapshots/0a1b", True),
        ("RANDOM-LLAMA", True),
        ("random", False),
    ],
)
def test_the_base_that_it_was_trained_on(edited, llama, local, named, same):
    folder = edited("lora", settings={"base_model_name_or_path": named})
    expected = {} if same else {"base": "warning"}
    assert complaints(folder, llama) == complaints(folder, local) == expected


def test_two_organisations_have_two_models():
    assert not adapter_fit.same_model("meta/llama-3", "other/llama-3")
    assert adapter_fit.same_model("meta/llama-3", "hub/models--meta--llama-3/snapshots/0a1b")


def test_another_revision(edited, llama):
    folder = edited(
        "ia3", settings={"base_model_name_or_path": "random-llama", "revision": "0a1b2c"}
    )
    assert complaints(folder, llama) == {"base": "warning"}
    same = Loaded(llama.name, llama.model, llama.tokenizer, "0a1b2c" + 34 * "0")
    assert complaints(folder, same) == {}


def test_a_base_folder_that_cannot_be_read(folders, tmp_path):
    assert complaints(folders["lora"], tmp_path / "nowhere") == {"base": "error"}


def test_a_base_folder_without_weights_still_tells_shapes(folders, local, tmp_path):
    shutil.copytree(local, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for method in ("lora", "prompt_tuning"):
        assert complaints(folders[method], tmp_path / "bare") == {}
        assert "not to be had" in said(folders[method], "not_examined", tmp_path / "bare")


# ---- tokenizer and template
@pytest.fixture
def with_tokenizer(edited, llama):
    folder = edited("lora")
    llama.tokenizer.save_pretrained(folder)
    return folder


def test_the_same_tokenizer_is_no_finding(with_tokenizer, llama, local):
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        path.name for path in with_tokenizer.iterdir()
    }
    assert complaints(with_tokenizer, llama) == complaints(with_tokenizer, local) == {}


def test_another_chat_template(with_tokenizer, llama, local):
    path = with_tokenizer / "chat_template.jinja"
    path.write_text(path.read_text().replace("user", "asker") + "{{ bos_token }}")
    assert (
        complaints(with_tokenizer, llama)
        == complaints(with_tokenizer, local)
        == {"chat_template": "warning"}
    )


def test_a_chat_template_in_the_old_place(with_tokenizer, llama):
    (with_tokenizer / "chat_template.jinja").unlink()
    path = with_tokenizer / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": llama.tokenizer.chat_template}))
    assert complaints(with_tokenizer, llama) == {}
    path.write_text(
        json.dumps(settings | {"chat_template": [{"name": "default", "template": "another"}]})
    )
    assert complaints(with_tokenizer, llama) == {"chat_template": "warning"}


def test_other_tokens_other_ids_and_another_end_token(with_tokenizer, llama):
    path = with_tokenizer / "tokenizer.json"
    whole = json.loads(path.read_text())
    words, added = whole["model"]["vocab"], {token["content"] for token in whole["added_tokens"]}
    plain = [word for word in words if word not in added]
    swapped = words | {plain[0]: words[plain[1]], plain[1]: words[plain[0]]}
    path.write_text(json.dumps(whole | {"model": whole["model"] | {"vocab": swapped}}))
    assert complaints(with_tokenizer, llama) == {"tokenizer": "warning"}
    assert "2 of its" in said(with_tokenizer, "tokenizer", llama)
    path.write_text(
        json.dumps(whole | {"model": whole["model"] | {"vocab": words | {"zzz": len(words)}}})
    )
    assert f"{len(words) + 1} tokens" in said(with_tokenizer, "tokenizer", llama)
    path.write_text(json.dumps(whole)[:-9])
    assert complaints(with_tokenizer, llama) == {"tokenizer": "warning"}
    path.write_text(json.dumps(whole))
    settings = with_tokenizer / "tokenizer_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"eos_token": {"content": "<|pad|>"}})
    )
    assert complaints(with_tokenizer, llama) == {"tokenizer": "warning"}
    assert "eos_token" in said(with_tokenizer, "tokenizer", llama)


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary(llama, tmp_path):
    grown = copy.deepcopy(llama.model)
    grown.resize_token_embeddings(len(llama.tokenizer) + 3)
    model = get_peft_model(
        grown,
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    assert complaints(tmp_path / "grown", llama) == {"vocabulary": "error"}
    assert f"{len(llama.tokenizer) + 3} rows" in said(tmp_path / "grown", "vocabulary", llama)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(copy.deepcopy(llama.model), tmp_path / "grown")


def test_an_embedding_table_of_its_own_is_written_over_the_bases(edited, folders, llama):
    assert any(
        "embed_tokens.base_layer" in name for name in load_file(folders["embedding"] / WEIGHTS)
    )  # the base's own: no finding
    folder = edited(
        "embedding",
        lambda state: state["base_model.model.model.embed_tokens.base_layer.weight"].add_(0.5),
    )
    assert complaints(folder, llama) == {"vocabulary": "warning"}


# ---- settings that change what is scored
@pytest.mark.parametrize(
    ("settings", "severity", "word"),
    [
        ({"task_type": "SEQ_CLS"}, "warning", "SEQ_CLS"),
        ({"trust_remote_code": True}, "warning", "remote code"),
        ({"init_lora_weights": "pissa_niter_4"}, "error", "random numbers"),
        ({"alora_invocation_tokens": [5]}, "error", "acts only behind"),
        ({"a_new_setting": 3}, "warning", "a_new_setting"),
        (
            {
                "auto_mapping": {
                    "base_model_class": "GPT2LMHeadModel",
                    "parent_library": "transformers.models",
                }
            },
            "warning",
            "GPT2LMHeadModel",
        ),
    ],
)
def test_odd_settings(edited, llama, settings, severity, word):
    folder = edited("lora", settings=settings)
    assert complaints(folder, llama)["settings"] == severity
    assert word in said(folder, "settings", llama)


def test_trained_biases_stay_when_peft_takes_the_adapter_off(bases, tmp_path):
    base = bases["qwen2"]  # whose q, k and v have biases
    config = LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = make(base, config, tmp_path / "biased")
    assert complaints(folder, base) == {}
    assert "PEFT's unload does not undo" in said(folder, "settings", base)
    model = copy.deepcopy(base.model)
    before = model.get_submodule("model.layers.0.self_attn.q_proj").bias.clone()
    off = PeftModel.from_pretrained(model, folder).unload()
    assert not torch.equal(off.get_submodule("model.layers.0.self_attn.q_proj").bias, before)


def test_virtual_tokens_without_a_task_are_left_out(edited, llama):
    folder = edited("prompt_tuning", settings={"task_type": None})
    assert complaints(folder, llama) == {"settings": "warning"}
    ids = torch.arange(5, 15).unsqueeze(0)
    model = PeftModel.from_pretrained(copy.deepcopy(llama.model), folder)
    assert torch.equal(model(ids).logits, llama.model(ids).logits)


def test_whole_modules_are_noted(llama, tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"
    )
    folder = make(llama, config, tmp_path / "whole")
    assert complaints(folder, llama) == {}
    assert "norm" in said(folder, "settings", llama)


def test_the_summary_joins_what_is_wrong(edited, llama):
    folder = edited(
        "lora", settings={"base_model_name_or_path": "someone/else", "task_type": "SEQ_CLS"}
    )
    parts = finding_summary(examine(folder, llama)).split("; ")
    assert len(parts) == len(complaints(folder, llama)) >= 2
    assert "trained on someone/else" in parts[0]
