"""Adapters in the forms in which trainers write them pass; what is something else is called so."""

import copy
import json
import shutil
import warnings
import zipfile

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import one_sentence
from driftbook.doctors.adapter import examine
from driftbook.models import adapter_forms, adapters
from driftbook.models.loading import Loaded
from examined import CONFIG, WEIGHTS, complaints, make, said

pytest_plugins = ["examined"]

TARGETS = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
STATES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n".format("0" * 64)
TRAINER = {"trainer_state.json": "{}", "README.md": "# card", **dict.fromkeys(STATES, "x")}
# what each trainer writes beside the two files, and its own keys of the configuration
FORMS = {
    "trl, a checkpoint": (TRAINER, {}),
    "several processes": ({"rng_state_0.pth": "x", "rng_state_1.pth": "x"}, {}),
    "both weights": ({"adapter_model.bin": "x"}, {}),
    "LLaMA-Factory": (
        {
            **TRAINER,
            "all_results.json": "{}",
            "train_results.json": "{}",
            "trainer_log.jsonl": "{}\n",
            "training_loss.png": "x",
            "value_head.bin": "x",
        },
        {},
    ),
    "axolotl": ({"config.json": "{}", "debug.log": "x", "README.md": "axolotl"}, {}),
    "unsloth": (
        {},
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
            "base_model_name_or_path": "unsloth/random-llama",
            "target_modules": r"(?:.*?(?:self_attn|attn).*?(?:q_proj|v_proj))",
        },
    ),
    "ms-swift": (
        {
            "args.json": "{}",
            "additional_config.json": '{"lora_dtype": null, "lorap_lr_ratio": null}',
        },
        {},
    ),
    "DeepSpeed": ({"zero_to_fp32.py": "x", "latest": "global_step500"}, {}),
    "MLX's words beside PEFT's": ({}, {"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}),
}
OTHERS = {  # warnings that are right: keys that the installed PEFT does not know
    "MLX's words beside PEFT's": {"settings": "warning"}
}


@pytest.mark.parametrize("form", FORMS)
def test_a_healthy_adapter_of_a_trainer_is_no_error(edited, llama, form):
    beside, settings = FORMS[form]
    folder = edited("lora", settings=settings)
    for name, content in beside.items():
        (folder / name).write_text(content)
    assert complaints(folder, llama) == complaints(folder) == OTHERS.get(form, {})
    for name in beside:
        told = said(folder, "pickle")
        assert (name in told) == name.endswith((".bin", ".pt", ".pth"))


def test_pickles_beside_an_adapter_are_called_what_they_are(edited):
    folder = edited("lora")
    for name in STATES:
        (folder / name).write_bytes(b"x")
    told = said(folder, "pickle")
    for what in ("trainer's arguments", "optimiser's", "schedule's", "random numbers'", "loss"):
        assert what in told


def test_torchtunes_form(edited, llama):
    folder = edited("lora")
    few = json.loads((folder / CONFIG).read_text())
    keys = ("r", "lora_alpha", "target_modules", "peft_type")
    (folder / CONFIG).write_text(json.dumps({key: few[key] for key in keys}))
    save_file({"model.norm.weight": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")
    (folder / "adapter_model.pt").write_bytes(b"x")
    assert complaints(folder, llama) == complaints(folder) == {}


def test_the_form_of_transformers_own_adapters(llama, tmp_path):
    model = copy.deepcopy(llama.model)
    model.add_adapter(
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    assert complaints(tmp_path / "adapter", llama) == {}


# ---- what PEFT attaches, asked of PEFT itself
@torch.no_grad()
def attached_logits(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    return model(torch.arange(5, 15).unsqueeze(0)).logits


def test_names_with_the_adapters_own_name_are_loaded(edited, folders, llama):
    folder = edited("lora")
    state = load_file(folder / WEIGHTS)
    save_file(
        {name.replace(".weight", ".default.weight"): value for name, value in state.items()},
        folder / WEIGHTS,
    )
    assert torch.equal(
        attached_logits(llama.model, folder), attached_logits(llama.model, folders["lora"])
    )
    assert complaints(folder, llama) == complaints(folder) == {}


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
)
def test_names_that_peft_passes_over_are_errors(edited, llama, renamed):
    folder = edited("lora")
    state = {renamed(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    plain = llama.model(torch.arange(5, 15).unsqueeze(0)).logits
    assert torch.equal(attached_logits(llama.model, folder), plain)
    assert complaints(folder, llama)["shapes"] == "error"


@pytest.fixture(scope="module")
def mixtral():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape)).eval()


def test_experts_saved_before_transformers_5_fit(mixtral, tmp_path):
    state, (width, inner) = {}, (16, 24)
    experts = [f"block_sparse_moe.experts.{i}.w{j}" for i in (0, 1) for j in (1, 2, 3)]
    for name in ["self_attn.q_proj", *experts]:
        into, out = (inner, width) if name.endswith("w2") else (width, inner)
        stem = f"base_model.model.model.layers.0.{name}.lora"
        state[f"{stem}_A.weight"] = torch.randn(2, into)
        state[f"{stem}_B.weight"] = torch.randn(width if "attn" in name else out, 2)
    tmp_path.joinpath("base").mkdir()
    mixtral.save_pretrained(tmp_path / "base")
    save_file(state, tmp_path / WEIGHTS)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 1}
    settings |= {"target_modules": ["q_proj", "w1", "w2", "w3"]}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    assert not torch.equal(
        attached_logits(mixtral, tmp_path), mixtral(torch.arange(5, 15).unsqueeze(0)).logits
    )
    table = examine(tmp_path, tmp_path / "base")
    assert not table.severity.eq("error").any()


MORE = {  # settings of LoRA, and methods, that put other tensors into the file
    "whole": LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"], **TARGETS),
    "tokens": LoraConfig(r=2, trainable_token_indices=[1, 2], **TARGETS),
    "a bias of its own": LoraConfig(r=2, lora_bias=True, **TARGETS),
    "layers": LoraConfig(r=2, layers_to_transform=[1], layers_pattern="layers", **TARGETS),
    "a parameter": LoraConfig(
        r=2, target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM"
    ),
    "vera": peft.VeraConfig(r=2, save_projection=False, **TARGETS),
    "vblora": peft.VBLoRAConfig(r=2, vector_length=16, num_vectors=4, topk=2, **TARGETS),
    "shira": peft.ShiraConfig(r=2, **TARGETS),
}


@pytest.mark.parametrize("kind", MORE)
def test_what_peft_itself_saved_is_no_error(llama, tmp_path, kind):
    folder = make(llama, MORE[kind], tmp_path / "adapter")
    assert torch.isfinite(attached_logits(llama.model, folder)).all()
    assert "error" not in complaints(folder, llama).values()
    if kind == "shira":
        assert "not compared" in said(folder, "not_examined", llama)


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
def test_another_task_is_attached_all_the_same(edited, folders, llama, task):
    folder = edited("lora", settings={"task_type": task})
    assert torch.equal(
        attached_logits(llama.model, folder), attached_logits(llama.model, folders["lora"])
    )
    assert complaints(folder, llama) == {"settings": "warning"}


# ---- what is something else
def whole_model(folder):
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"model.norm.weight": torch.ones(2)}, folder / "model.safetensors")


def mlx(folder):
    layer = "model.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_a": torch.ones(8, 4), f"{layer}.lora_b": torch.ones(4, 8)}
    save_file(pair, folder / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": 8, "model": "mlx-community/x"}
    settings["lora_parameters"] = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    (folder / CONFIG).write_text(json.dumps(settings))


def diffusers(folder):
    name = "unet.down_blocks.0.attentions.0.proj_in.lora.down.weight"
    save_file({name: torch.ones(4, 8)}, folder / "pytorch_lora_weights.safetensors")


def kohya(folder):
    name = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    save_file({name: torch.ones(4, 8)}, folder / "style.safetensors")


def pictures_by_peft(folder):
    name = "base_model.model.single_transformer_blocks.0.attn.to_q.lora_A.weight"
    save_file({name: torch.ones(4, 8)}, folder / WEIGHTS)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["to_q"]}')


def gguf(kind):
    value = len(kind).to_bytes(8, "little") + kind
    return b"GGUF" + bytes(20) + b"general.type" + (8).to_bytes(4, "little") + value


def nested(folder):
    for step in ("checkpoint-1000", "checkpoint-500"):
        (folder / step).mkdir()
        (folder / step / CONFIG).write_text("{}")


def pointers(folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / WEIGHTS).write_text(LFS)


def archive(folder):
    with zipfile.ZipFile(folder / "adapter.zip", "w") as file:
        file.writestr(CONFIG, "{}")


def web_page(folder):
    (folder / CONFIG).write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    (folder / WEIGHTS).write_bytes(b"x")


def pickled(folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


def written(name, content=b"x"):
    def write(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    return write


ELSE = {
    "a whole model": (whole_model, ("whole model (LlamaForCausalLM)", "base model")),
    "mlx": (mlx, ("MLX", "mlx_lm.fuse", "transposed")),
    "diffusers": (diffusers, ("diffusion",)),
    "kohya": (kohya, ("diffusion",)),
    "peft on pictures": (pictures_by_peft, ("diffusion",)),
    "gguf lora": (written("x.gguf", gguf(b"adapter")), ("LoRA in llama.cpp", "converted from")),
    "gguf model": (written("x.gguf", gguf(b"model")), ("whole model in GGUF", "base model")),
    "nested": (nested, ("checkpoint-500, checkpoint-1000", "such as checkpoint-1000")),
    "pointer": (pointers, ("pointer of git-lfs", "git lfs pull")),
    "web page": (web_page, ("web page", "download it again")),
    "archive": (archive, ("archive adapter.zip", "unpack")),
    "pickled": (pickled, ("pickle, adapter_model.bin", "never loaded", "safetensors")),
    "torchtune": (written("adapter_0.pt"), ("pickle, adapter_0.pt",)),
    "in parts": (written("adapter_model-00001-of-00002.safetensors"), ("in parts", WEIGHTS)),
    "fsdp": (written("pytorch_model_fsdp_0/__0_0.distcp"), ("FSDP", "gather")),
    "deepspeed": (written("global_step500/mp_rank_00_model_states.pt"), ("DeepSpeed",)),
    "empty": (lambda folder: None, ("is empty",)),
    "only hidden files": (written(".gitattributes"), ("is empty",)),
    "something": (written("notes.txt"), (f"neither {CONFIG} nor {WEIGHTS}",)),
}


@pytest.mark.parametrize("kind", ELSE)
def test_what_is_no_adapter_is_called_what_it_is(tmp_path, kind):
    make, words = ELSE[kind]
    folder = tmp_path / "given"
    folder.mkdir()
    make(folder)
    assert complaints(folder) == {"form": "error"}
    told = said(folder, "form")
    for word in words:
        assert word in told
    for forbidden in ("delete", "remove", "erase"):
        assert forbidden not in told


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("adapter.zip", b"PK\x03\x04", "unpack"),
        ("adapter.tar", b"x", "unpack"),
        ("adapter.tar.gz", b"\x1f\x8b", "unpack"),
        ("lora.gguf", gguf(b"adapter"), "llama.cpp"),
        (WEIGHTS, b"x", "give the folder"),
        (WEIGHTS, LFS.encode(), "git lfs pull"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word) as error:
        examine(tmp_path / name)
    one_sentence(error.value)


def test_a_pointer_is_named_when_it_is_attached(tmp_path, llama: Loaded):
    pointers(tmp_path)
    with (
        pytest.raises(ValueError, match="git lfs pull") as error,
        adapters.attached(llama.model, tmp_path),
    ):
        pass
    assert "delete" not in one_sentence(error.value)


def test_adapters_inside_of_an_adapter_are_noted(edited, folders):
    folder = edited("lora")
    for name in ("checkpoint-500", "reference"):  # a trainer's, and DPO's second adapter
        shutil.copytree(folders["lora"], folder / name)
    assert complaints(folder) == {}
    assert "checkpoint-500, reference" in said(folder, "form")
    assert adapter_forms.nested_adapters(folder) == ["checkpoint-500", "reference"]
