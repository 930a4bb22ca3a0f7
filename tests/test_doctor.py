"""The adapter doctor: silent about healthy adapters of every method, and one sentence for each
sickness put into them.
"""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, PEFT_METHODS, one_sentence
from driftbook.doctors import adapter_files, adapter_fit, adapter_weights
from driftbook.doctors.adapter import examine, finding_summary
from driftbook.models.loading import Loaded

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXTRA = {
    "dora": LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "rslora": LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=["q_proj"],
        rank_pattern={"0.self_attn.q_proj": 2},
        alpha_pattern={"1.self_attn.q_proj": 3},
        task_type="CAUSAL_LM",
    ),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def make(base: Loaded, config, folder: Path, scale: float = 0.05) -> Path:
    """An adapter made by PEFT on a copy of the base, its trained numbers moved by noise."""
    generator = torch.Generator().manual_seed(0)
    model = get_peft_model(copy.deepcopy(base.model), copy.deepcopy(config))
    for value in (v for v in model.parameters() if v.requires_grad):
        value.data += scale * torch.randn(value.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(bases) -> Loaded:
    return bases["llama"]


@pytest.fixture(scope="session")
def folders(adapter_folders, llama, tmp_path_factory) -> dict[str, Path]:
    """A healthy adapter of each method on the Llama."""
    made = {method: adapter_folders["llama", method] for method in PEFT_METHODS}
    place = tmp_path_factory.mktemp("extra")
    return made | {name: make(llama, config, place / name) for name, config in EXTRA.items()}


@pytest.fixture(scope="session")
def local(llama, tmp_path_factory) -> Path:
    """The Llama's folder."""
    return saved(llama, tmp_path_factory.mktemp("base") / "random-llama")


def saved(base: Loaded, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    copy.deepcopy(base.model).to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def edited(folders, tmp_path):
    """Copies a healthy adapter and changes its tensors or settings."""

    def edit(method: str, tensors=None, settings=None) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(folders[method], folder)
        if tensors:
            state = load_file(folder / WEIGHTS)
            tensors(state)
            save_file(state, folder / WEIGHTS)
        if settings:
            (folder / CONFIG).write_text(
                json.dumps(json.loads((folder / CONFIG).read_text()) | settings)
            )
        return folder

    return edit


def complaints(adapter: Path, base=None) -> dict[str, str]:
    """{finding: severity} of the errors and warnings, after checking that the table is fit to be
    published.
    """
    table = examine(adapter, base)
    assert list(table.columns) == ["finding", "severity", "sentence", "module"]
    assert set(table.severity) <= {"error", "warning", "note"}
    for sentence in table.sentence:
        assert str(adapter.parent) not in one_sentence(sentence)
        assert "; " not in sentence
    assert (finding_summary(table) is None) == (not table.severity.isin(["error", "warning"]).any())
    return dict(table[table.severity != "note"][["finding", "severity"]].itertuples(index=False))


def said(adapter: Path, finding: str, base=None) -> str:
    """The sentences of one kind of finding."""
    table = examine(adapter, base)
    return " | ".join(table.sentence[table.finding == finding])


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
def test_a_pickle_is_refused_and_never_opened(edited, name):
    folder = edited("lora")
    (folder / name).write_bytes(
        b"cos\nsystem\n(S'exit 1'\ntR."
    )  # would end the process if it were opened
    assert complaints(folder) == {"pickle": "error"}
    assert name in said(folder, "pickle")


def test_weights_in_a_pickle_only_are_both_missing_and_refused(edited):
    folder = edited("lora")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert complaints(folder) == {"pickle": "error", "weights": "error"}


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
        ({"task_type": "SEQ_CLS"}, "error", "SEQ_CLS"),
        ({"trust_remote_code": True}, "warning", "remote code"),
        ({"init_lora_weights": "pissa_niter_4"}, "warning", "pissa"),
        ({"alora_invocation_tokens": [5]}, "warning", "invocation"),
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


def test_trained_biases_stay_when_the_adapter_is_taken_off(bases, tmp_path):
    base = bases["qwen2"]  # whose q, k and v have biases
    config = LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = make(base, config, tmp_path / "biased")
    assert complaints(folder, base) == {"settings": "warning"}
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
