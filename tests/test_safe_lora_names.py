"""Safe LoRA on adapters that PEFT saved, found by name, and what it refuses."""

import shutil

import numpy as np
import pytest
import torch
from peft import (
    BeftConfig,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from conftest import one_sentence
from driftbook.models import adapters
from driftbook.training import safe_lora, updates
from driftbook.training.checkpoints import open_checkpoint
from safe_lora_cases import dense, lora_folder, one_shape, tiny, written

pytest_plugins = ["safe_lora_cases"]


# ---- real adapters of PEFT, by name
LORAS = {
    "grouped queries, patterns": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 7},
            alpha_pattern={"v_proj": 3},
        ),
    ),
    "a regex, rsLoRA": (
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=r".*layers\.1.*(q_proj|o_proj)", use_rslora=True
        ),
    ),
    "some layers": (
        "llama",
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    ),
    "rank of the rows": ("llama", LoraConfig(r=16, lora_alpha=8, target_modules=["k_proj"])),
    "biases": (
        "qwen2",
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="all"),
    ),
    "a bias of B": (
        "qwen2",
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_bias=True),
    ),
    "DoRA": (
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True
        ),
    ),
    "DoRA with biases": (
        "qwen2",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True, bias="lora_only"
        ),
    ),
    "DoRA with trained tokens": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            use_dora=True,
            trainable_token_indices=[1, 3],
        ),
    ),
    "DoRA with a module trained whole": (
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]
        ),
    ),
    "IA3": (
        "llama",
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
}


@pytest.mark.parametrize(("kind", "config"), LORAS.values(), ids=LORAS)
def test_the_loaded_adapter_adds_what_the_dense_form_says(kind, config, tmp_path):
    base, other = tiny(kind), tiny(kind, seed=1)
    base.save_pretrained(tmp_path / "aligned")
    other.save_pretrained(tmp_path / "unaligned")
    before, unaligned = (
        {name: value.double().clone() for name, value in model.state_dict().items()}
        for model in (base, other)
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    adapters.save(model, tmp_path / "adapter")
    merged = {name: value.double() for name, value in model.merge_and_unload().state_dict().items()}
    rows = safe_lora.project(
        tmp_path / "adapter",
        tmp_path / "aligned",
        tmp_path / "unaligned",
        tmp_path / "out",
        select="top",
        value=1,
    )
    with adapters.attached(tiny(kind), tmp_path / "out") as loaded:
        after = {
            name: value.double() for name, value in loaded.merge_and_unload().state_dict().items()
        }
    touched = set(rows.module[rows.projected])
    for name, start in before.items():
        module = name.rpartition(".")[0]
        change = merged[name] - start
        if module in touched:
            v = (before[f"{module}.weight"] - unaligned[f"{module}.weight"]).numpy()
            change = torch.as_tensor(dense("approximate", v) @ change.numpy())
        assert torch.allclose(
            after[name], start + change, atol=2e-5 * (1 + float(change.abs().max()))
        ), name
    assert touched


TARGETS = {"target_modules": ["q_proj", "k_proj", "down_proj"]}


OTHERS = {
    "LoHa": LoHaConfig(r=2, alpha=4, **TARGETS),
    "LoKr": LoKrConfig(r=2, alpha=4, **TARGETS),
    "MiSS": MissConfig(r=4, **TARGETS),
    "VeRA": VeraConfig(r=4, **{**TARGETS, "target_modules": ["q_proj"]}),
    "FourierFT": FourierFTConfig(n_frequency=20, scaling=50.0, **TARGETS),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_another_method_is_converted_without_loss_and_then_projected(config, tmp_path):
    base, other = tiny("llama"), tiny("llama", seed=1)
    base.save_pretrained(tmp_path / "aligned")
    other.save_pretrained(tmp_path / "unaligned")
    before = {name: value.double().clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    adapters.save(model, tmp_path / "adapter")
    wanted = {
        name: value.double() - before[name]
        for name, value in model.merge_and_unload().state_dict().items()
    }
    with pytest.raises(ValueError, match=r"updates\.converted"):
        safe_lora.project(
            tmp_path / "adapter", tmp_path / "aligned", tmp_path / "unaligned", tmp_path / "out"
        )
    made = updates.read(updates.converted(tmp_path / "adapter", tiny("llama"), tmp_path / "lora"))
    assert {f"{one.module}.weight" for one in made} == {
        name for name, value in wanted.items() if value.any()
    }
    for one in made:
        change = wanted[f"{one.module}.weight"]
        assert (
            float((one.scale * one.b.double() @ one.a.double() - change).norm() / change.norm())
            < 1e-5
        )
    rows = safe_lora.project(
        tmp_path / "lora",
        tmp_path / "aligned",
        tmp_path / "unaligned",
        tmp_path / "out",
        select="top",
        value=1,
    )
    assert rows.projected.sum() == 1


def test_what_peft_cannot_convert_is_refused(tmp_path):
    for name, config in {
        "biases": BeftConfig(target_modules=["v_proj"]),
        "saved": LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }.items():
        adapters.save(get_peft_model(tiny("llama"), config), tmp_path / name)
        with pytest.raises(ValueError) as error:
            updates.converted(tmp_path / name, tiny("llama"), tmp_path / "out")
        assert name in one_sentence(error.value)
        assert not (tmp_path / "out").exists()


# ---- what is refused
@one_shape
def test_bad_input_is_one_sentence_and_nothing_is_written(case, tmp_path):
    def said(match: str, **changes):
        arguments = {
            name: case[name] for name in ("adapter", "aligned", "unaligned", "out")
        } | changes
        before = set(tmp_path.rglob("*"))
        with pytest.raises(ValueError) as error:
            safe_lora.project(**arguments)
        assert match in one_sentence(error.value)
        assert set(tmp_path.rglob("*")) == before

    def other(name: str, change) -> object:
        tensors = load_file(case["unaligned"] / "model.safetensors")
        return written(tmp_path / name, change(tensors))

    shorter = other(
        "shorter", lambda tensors: {name: value[:-1] for name, value in tensors.items()}
    )
    renamed = other(
        "renamed",
        lambda tensors: {f"transformer.{name}.x": value for name, value in tensors.items()},
    )
    packed = other(
        "packed", lambda tensors: {**tensors, "model.layers.0.q.weight.absmax": torch.ones(1)}
    )
    broken = other(
        "broken", lambda tensors: {name: value * float("nan") for name, value in tensors.items()}
    )
    integers = written(
        tmp_path / "integers",
        {
            name: value.to(torch.int8)
            for name, value in load_file(case["unaligned"] / "model.safetensors").items()
        },
        dtype=torch.int8,
    )
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    torn = tmp_path / "torn"
    shutil.copytree(case["unaligned"], torn)
    (torn / "model.safetensors").write_bytes(b"\x00" * 20)
    smaller = lora_folder(
        tmp_path / "smaller", {"model.layers.0.q": (np.ones((4, 40)), np.ones((40, 4)))}
    )
    idle = lora_folder(
        tmp_path / "idle", {"model.layers.0.q": (np.ones((4, 48)), np.zeros((48, 4)))}
    )
    soft = lora_folder(
        tmp_path / "soft",
        {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))},
        peft_type="PROMPT_TUNING",
    )
    pissa = lora_folder(
        tmp_path / "pissa",
        {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))},
        init_lora_weights="pissa_niter_4",
    )
    said("no unaligned checkpoint", unaligned=tmp_path / "nowhere")
    said("no unaligned checkpoint", unaligned="./nowhere")
    said("V is zero", unaligned=case["aligned"])
    said("48 x 48 in the aligned and 47 x 48", unaligned=shorter)
    said("has no weight of the module", unaligned=renamed)
    said("quantised", unaligned=packed)
    said("quantised", unaligned=integers)
    said("NaN", unaligned=broken)
    said("pickles", unaligned=pickled)
    said("torn", unaligned=torn)
    said("another base model", adapter=smaller)
    said("never trained", adapter=idle)
    said("no weight update", adapter=soft)
    said("changes the base model itself", adapter=pissa)
    said("merged model and no adapter", adapter=case["aligned"])
    said("there is no adapter", adapter=tmp_path / "nothing")
    said("is there already", out=case["adapter"])
    said("operator='safe'", operator="safe")
    said("select='best'", select="best")
    said("number of modules", select="top", value=0.5)
    said("the adapter has 2", select="top", value=3)
    said("between 0 and 1", value=1.5)
    said("needs rank", operator="subspace")
    said("takes no rank", rank=3)
    said("at most 48", operator="subspace", rank=49)
    said("whole number from 1", operator="subspace", rank=-1)
    said("number of modules", select="top", value=float("inf"))
    for key, value in {
        "fan_in_fan_out": True,
        "kasa_config": {"r": 4},
        "target_parameters": ["x"],
    }.items():
        said(
            key,
            adapter=lora_folder(
                tmp_path / key,
                {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))},
                **{key: value},
            ),
        )
    said(
        "ranks 4 and 3",
        adapter=lora_folder(
            tmp_path / "uneven", {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 3)))}
        ),
    )
    said(
        "not finite",
        adapter=lora_folder(
            tmp_path / "nan", {"model.layers.0.q": (np.full((4, 48), np.nan), np.ones((48, 4)))}
        ),
    )
    bare = lora_folder(
        tmp_path / "bare", {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))}
    )
    whole = load_file(bare / adapters.WEIGHTS)
    for name, tensors, word in (
        (
            "unnamed",
            {key.removeprefix(updates.PREFIX): value for key, value in whole.items()},
            "does not begin with",
        ),
        ("half", {key: value for key, value in whole.items() if "lora_A" in key}, "lora_B.weight"),
    ):
        torn_one = lora_folder(
            tmp_path / name, {"model.layers.0.q": (np.ones((4, 48)), np.ones((48, 4)))}
        )
        save_file(tensors, torn_one / adapters.WEIGHTS)
        said(word, adapter=torn_one)


def test_a_soft_prompt_of_peft_is_refused(tmp_path):
    model = get_peft_model(
        tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    adapters.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="safety template at test time"):
        safe_lora.project(tmp_path / "adapter", tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_with_more_or_less_before_them_are_found(tmp_path):
    folder = written(
        tmp_path / "one",
        {
            "language_model.model.layers.0.q.weight": np.ones((2, 2)),
            "layers.1.q.weight": np.ones((2, 2)),
        },
    )
    found = open_checkpoint(folder, "aligned")
    assert found.name("model.layers.0.q.weight") == "language_model.model.layers.0.q.weight"
    assert found.name("model.layers.1.q.weight") == "layers.1.q.weight"
    assert found.name("model.layers.2.q.weight") is None


@one_shape
def test_spectra_are_those_of_v(case):
    found = safe_lora.spectra(case["adapter"], case["aligned"], case["unaligned"], most=5)
    for module, part in found.groupby("module"):
        assert part.singular_value.tolist() == pytest.approx(
            np.linalg.svd(case["v"][module], compute_uv=False)[:5].tolist(), rel=1e-4
        )
        assert part["index"].tolist() == [1, 2, 3, 4, 5]
