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
    PeftModel,
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


A, B = np.ones((4, 48)), np.ones((48, 4))  # factors that fit the case's modules


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
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path / "out").merge_and_unload()
    after = {name: value.double() for name, value in loaded.state_dict().items()}
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


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_the_embedding_table_is_projected_with_the_table(tmp_path):
    """A tied checkpoint stores no lm_head.weight."""
    first, second = (tiny("llama", seed) for seed in (0, 1))
    for model in (first, second):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    first.save_pretrained(tmp_path / "aligned")
    second.save_pretrained(tmp_path / "unaligned")
    assert "lm_head.weight" not in load_file(tmp_path / "aligned" / "model.safetensors")
    v = first.lm_head.weight.double().detach() - second.lm_head.weight.double().detach()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], init_lora_weights=False)
    made = get_peft_model(first, config)
    change = made.base_model.model.lm_head.get_delta_weight("default").double().detach()
    adapters.save(made, tmp_path / "adapter")
    safe_lora.project(
        tmp_path / "adapter",
        tmp_path / "aligned",
        tmp_path / "unaligned",
        tmp_path / "out",
        select="top",
        value=1,
    )
    [update] = updates.read(tmp_path / "out")
    found = update.scale * update.b.double() @ update.a.double()
    wanted = torch.as_tensor(dense("approximate", v.numpy()) @ change.numpy())
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


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
# A change is a function of the case and of a folder to write in; it gives the arguments that
# differ from the case's.
def given(**arguments):
    return lambda case, folder: arguments


def the_cases(**names):
    """An argument that is another folder of the case."""
    return lambda case, folder: {name: case[other] for name, other in names.items()}


def unaligned(change, **dtype):
    """The unaligned checkpoint with its tensors changed."""

    def made(case, folder):
        tensors = change(load_file(case["unaligned"] / "model.safetensors"))
        return {"unaligned": written(folder / "other", tensors, **dtype)}

    return made


def every_tensor(change, **dtype):
    return unaligned(
        lambda tensors: {name: change(value) for name, value in tensors.items()}, **dtype
    )


def pickled(case, folder):
    (folder / "other").mkdir()
    (folder / "other" / "pytorch_model.bin").write_bytes(b"x")
    return {"unaligned": folder / "other"}


def pointer(case, folder):
    shutil.copytree(case["unaligned"], folder / "other")
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    (folder / "other" / "model.safetensors").write_text(text)
    return {"unaligned": folder / "other"}


def torn(case, folder):
    shutil.copytree(case["unaligned"], folder / "other")
    (folder / "other" / "model.safetensors").write_bytes(b"\x00" * 20)
    return {"unaligned": folder / "other"}


def adapter(a=A, b=B, **config):
    """An adapter of one module with these factors."""
    return lambda case, folder: {
        "adapter": lora_folder(folder / "other", {"model.layers.0.q": (a, b)}, **config)
    }


def stored(change):
    """An adapter whose file of weights holds other tensors."""

    def made(case, folder):
        arguments = adapter()(case, folder)
        weights = arguments["adapter"] / adapters.WEIGHTS
        save_file(change(load_file(weights)), weights)
        return arguments

    return made


def orphan(tensors: dict) -> dict:
    """A factor B whose A is under another adapter's name, as in a state that PEFT did not save."""
    first = next(name for name in tensors if "lora_A" in name)
    other = first.replace("layers.0", "layers.1").replace("lora_A", "lora_B.default")
    return {**tensors, other: tensors[first].T.contiguous()}


# what is wrong: the change, and a part of the sentence that refuses it
BAD = {
    "a factor by itself": (stored(orphan), "is no tensor of an update"),
    "git-lfs": (pointer, "git lfs pull"),
    "no folder": (
        lambda case, folder: {"unaligned": folder / "nowhere"},
        "no unaligned checkpoint",
    ),
    "no name": (given(unaligned="./nowhere"), "no unaligned checkpoint"),
    "the same twice": (the_cases(unaligned="aligned"), "V is zero"),
    "shorter": (every_tensor(lambda value: value[:-1]), "48 x 48 in the aligned and 47 x 48"),
    "renamed": (
        unaligned(
            lambda tensors: {f"transformer.{name}.x": value for name, value in tensors.items()}
        ),
        "has no weight of the module",
    ),
    "packed": (
        unaligned(lambda tensors: {**tensors, "model.layers.0.q.weight.absmax": torch.ones(1)}),
        "quantised",
    ),
    "integers": (every_tensor(lambda value: value.to(torch.int8), dtype=torch.int8), "quantised"),
    "broken": (every_tensor(lambda value: value * float("nan")), "NaN"),
    "pickled": (pickled, "pickles"),
    "torn": (torn, "torn"),
    "smaller": (adapter(np.ones((4, 40)), np.ones((40, 4))), "another base model"),
    "idle": (adapter(b=0 * B), "never trained"),
    "soft": (adapter(peft_type="PROMPT_TUNING"), "no weight update"),
    "pissa": (adapter(init_lora_weights="pissa_niter_4"), "changes the base model itself"),
    "a merged model": (the_cases(adapter="aligned"), "merged model and no adapter"),
    "no adapter": (lambda case, folder: {"adapter": folder / "nothing"}, "there is no adapter"),
    "out exists": (the_cases(out="adapter"), "is there already"),
    "operator": (given(operator="safe"), "operator='safe'"),
    "select": (given(select="best"), "select='best'"),
    "half a module": (given(select="top", value=0.5), "number of modules"),
    "more modules": (given(select="top", value=3), "the adapter has 2"),
    "endless modules": (given(select="top", value=float("inf")), "number of modules"),
    "a threshold": (given(value=1.5), "between 0 and 1"),
    "rank missing": (given(operator="subspace"), "needs rank"),
    "rank given": (given(rank=3), "takes no rank"),
    "rank too high": (given(operator="subspace", rank=49), "at most 48"),
    "rank negative": (given(operator="subspace", rank=-1), "whole number from 1"),
    "fan_in_fan_out": (adapter(fan_in_fan_out=True), "fan_in_fan_out"),
    "kasa": (adapter(kasa_config={"r": 4}), "kasa_config"),
    "parameters": (adapter(target_parameters=["x"]), "target_parameters"),
    "uneven": (adapter(b=np.ones((48, 3))), "ranks 4 and 3"),
    "nan": (adapter(a=np.nan * A), "not finite"),
    "unnamed": (
        stored(
            lambda tensors: {
                key.removeprefix(updates.PREFIX): value for key, value in tensors.items()
            }
        ),
        "does not begin with",
    ),
    "half": (
        stored(lambda tensors: {key: value for key, value in tensors.items() if "lora_A" in key}),
        "lora_B.weight",
    ),
}


@one_shape
@pytest.mark.parametrize(("change", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(case, tmp_path, change, sentence):
    usual = {name: case[name] for name in ("adapter", "aligned", "unaligned", "out")}
    arguments = usual | change(case, tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        safe_lora.project(**arguments)
    assert sentence in one_sentence(error.value)
    assert set(tmp_path.rglob("*")) == before


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
