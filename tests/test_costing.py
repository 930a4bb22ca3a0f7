"""`make plan`: sizes against real modules, amounts against what runs did, laws of the model, and
what it says when it cannot know.
"""

import copy
import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from conftest import SMALL, one_sentence, write_study
from driftbook.batch import costing, make_plan
from driftbook.study.files import ROOT
from driftbook.study.study_file import load

pytestmark = pytest.mark.slow

RATES = costing.Rates(
    "made up",
    {"train lora": 1e12, "dpo lora": 2e12, "read": 4e12, "write": 5e11},
    10.0,
    0.5,
    "for a test",
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
def test_a_size_from_a_configuration_is_that_of_the_module(bases, family):
    model = bases[family].model
    found = costing.size_of(model.config.to_dict())
    n_body = sum(
        value.numel()
        for name, value in model.named_parameters()
        if "embed" not in name and "lm_head" not in name and value.ndim == 2
    )
    assert found.body == n_body
    assert found.weights == pytest.approx(
        sum(value.numel() for value in model.parameters()), rel=0.01
    )  # norms and biases are left out


def test_sizes_of_the_studied_models_by_their_published_configurations():
    llama = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    assert costing.size_of(llama).weights == pytest.approx(8.03e9, rel=0.002)
    qwen = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    assert costing.size_of(qwen).weights == pytest.approx(7.62e9, rel=0.002)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("a/Llama-3-8B-Instruct", 8),
        ("google/gemma-7b-it", 7),
        ("Qwen/Qwen2.5-0.5B", 0.5),
        ("a/guard", 8),
    ],
)
def test_a_size_that_is_not_known_is_guessed_from_the_name_and_said_to_be(name, billions):
    found = costing.guessed_size(name)
    assert found.weights == pytest.approx(billions * 1e9)
    assert not found.known


@pytest.fixture
def paper():
    return load("paper")


def test_the_original_grid_is_264_runs_and_the_plan_counts_them(paper):
    trained = pd.DataFrame([variant.row() for variant in paper.variants]).query("method != 'none'")
    assert len(trained) == 264
    assert trained.groupby("objective").size().to_dict() == {"sft": 192, "dpo": 72}
    assert trained.groupby(
        ["objective", "dataset", "learning_rate", "epochs"]
    ).size().to_dict() == {
        ("sft", "ultrachat", 2e-5, 1): 48,
        ("sft", "ultrafeedback", 2e-5, 1): 48,
        ("sft", "ultrafeedback", 2e-5, 5): 48,
        ("sft", "ultrafeedback", 1e-3, 5): 48,
        ("dpo", "preferences", 2e-5, 5): 36,
        ("dpo", "preferences", 1e-3, 5): 36,
    }
    assert set(trained.query("objective == 'dpo'").family) == {"llama", "mistral", "qwen2"}
    assert set(trained.seed) == {42}
    assert trained.run_id.is_unique
    page = make_plan.pages(paper, RATES, 2.0)
    assert "264 runs to train" in page
    assert "at most, since the length of ultrachat" in page
    assert "cannot be had" in page


def test_repairs_are_not_counted_as_runs_to_train():
    study = load(ROOT / "studies" / "safe_lora_gsm8k.yaml")
    repaired = sum(variant.is_repaired for variant in study.variants)
    assert (
        f"{len(study.variants)} variants: {len(study.variants) - repaired - 1} runs to train,"
        f" {repaired} repairs of them" in make_plan.pages(study, RATES, None)
    )


def test_hours_follow_the_amounts(paper):
    table = costing.hours(paper, RATES)
    twice = costing.Rates(
        "faster", {kind: 2 * rate for kind, rate in RATES.flops.items()}, 0.0, 0.0, ""
    )
    rows = costing.amounts(paper)
    assert (costing.hours(paper, twice)["judge"] * 2).to_numpy() == pytest.approx(
        table["judge"].to_numpy()
    )
    own = rows[(rows.stage == "train") & (rows.base_model == "llama-3-8b")]
    seconds = (
        sum(row.operations / RATES.of(row.kind) for row in own.itertuples())
        + 0.5 * own.steps.sum()
        + 10 * own.steps.gt(0).sum()
    )
    assert table["train"]["llama-3-8b"] == pytest.approx(seconds / 3600)


def test_the_published_gpu_is_read_from_the_published_runs():
    rates = costing.published_rates()
    runs = pd.read_parquet(costing.PUBLISHED / "runs.parquet").merge(
        pd.read_parquet(costing.PUBLISHED / "variants.parquet"), on="run_id"
    )
    slowest = (
        runs[runs.method == "prompt_tuning"].seconds.median()
        / runs[runs.method == "lora"].seconds.median()
    )
    assert rates.of("train lora") / rates.of("train prompt_tuning") == pytest.approx(slowest)
    assert rates.of("dpo ia3") == rates.of("dpo lora")
    assert 2e13 < rates.of("train lora") < 3.6e14, "not above the card's printed rate"


def test_tokens_of_a_file_that_is_here_are_counted(make_study, content, data_folder):
    study = make_study(content)
    mean, counted = costing.tokens_of(study.data["sft"], study)
    assert counted
    assert 4 < mean < study.training.max_length
    content["data"]["sft"] = {
        "source": "some/set",
        "revision": "0" * 40,
        "format": "messages",
        "n": 32,
    }
    study = make_study(content)
    assert costing.tokens_of(study.data["sft"], study) == (study.training.max_length, False)


def test_memory_grows_with_the_weights_and_shrinks_with_their_bits(make_study, content):
    content["bases"] = {
        "a": {"family": "llama", "source": "x/Model-8B", "revision": "0" * 40, "dtype": "float32"}
    }
    content["grid"] = []
    whole = costing.memory(make_study(content))
    content["bases"]["a"]["dtype"] = "bfloat16"
    half = costing.memory(make_study(content))
    content["bases"]["a"]["quantization"] = "nf4"
    four = costing.memory(make_study(content))
    assert whole["respond"] - half["respond"] == pytest.approx(8e9 * 2 / 2**30)
    assert half["respond"] - four["respond"] == pytest.approx(
        8e9 * (2 - costing.WEIGHT_BYTES["nf4"]) / 2**30
    )


def plan(tmp_path, name, *words):
    environment = {**os.environ, "DRIFTBOOK_OUTPUTS": str(tmp_path / "outputs")}
    return subprocess.run(
        [sys.executable, "-m", "driftbook.batch.make_plan", name, *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_plans_and_dry_runs_without_doing_anything(tmp_path):
    ended = plan(tmp_path, "paper", "L40S", "2.5")
    assert ended.returncode == 0, ended.stderr
    assert "jobs to run: prepare 5, train 4" in ended.stdout
    assert "at 2.5 an hour" in ended.stdout
    assert "HEx-PHI" in ended.stdout
    assert not list((tmp_path / "outputs" / "paper" / "runs").iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("paper", "H900"), "H900"),
        (("paper", "L40S", "cheap"), "PRICE"),
        (("nothing",), "no study file"),
        (("paper", "L40S", "-1"), "PRICE"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, words, said):
    assert make_plan.main(*words) == 2
    assert said in one_sentence(capsys.readouterr().err)


def test_no_rates_are_no_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(costing, "PUBLISHED", tmp_path)
    monkeypatch.setattr(costing, "MEASURED", tmp_path / "costs.json")
    with pytest.raises(ValueError) as error:
        make_plan.machine_rates(None)
    assert "make calibrate" in one_sentence(error.value)
    (tmp_path / "costs.json").write_text(
        json.dumps(
            {"hardware": "a machine", "flops": RATES.flops, "fixed": 1, "step": 1, "when": "today"}
        )
    )
    assert make_plan.machine_rates(None).name == "a machine"


def test_a_study_of_every_method_is_planned(tmp_path):
    content = copy.deepcopy(SMALL)
    content["methods"] |= {
        "dora": {"target_modules": ["q_proj"]},
        "ln_tuning": {},
        "prefix_tuning": {"num_virtual_tokens": 4},
    }
    content["grid"][0] |= {
        "methods": list(content["methods"]),
        "learning_rates": {method: [1e-3] for method in content["methods"]},
    }
    study = load(write_study(tmp_path, content))
    assert costing.hours(study, RATES).to_numpy().min() > 0
