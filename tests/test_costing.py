"""`make plan`: sizes against real modules, amounts against what runs did, laws of the model, and
what it says when it cannot know.
"""

import copy
import json
import runpy
import shutil
import sys

import pandas as pd
import pytest

from conftest import SMALL, one_sentence, write_study
from driftbook.batch import (
    calibrating,
    checking,
    costing,
    lengths,
    make_plan,
    rates,
    schedule,
    shards,
    sizes,
)
from driftbook.study.files import ROOT
from driftbook.study.study_file import load

pytestmark = pytest.mark.slow

RATES = rates.Rates(
    "made up",
    {"train lora": 1e12, "dpo lora": 2e12, "read": 4e12, "write": 5e11},
    10.0,
    0.5,
    "for a test",
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
def test_a_size_from_a_configuration_is_that_of_the_module(bases, family):
    model = bases[family].model
    found = sizes.size_of(model.config.to_dict())
    n_body = sum(
        value.numel()
        for name, value in model.named_parameters()
        if "embed" not in name and "lm_head" not in name and value.ndim == 2
    )
    assert found.body == n_body
    assert found.weights == pytest.approx(
        sum(value.numel() for value in model.parameters()), rel=0.01
    )  # norms and biases are left out


def test_operations_are_those_that_torch_counts(bases):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = bases["llama"].model
    ids, own = torch.arange(40)[None] % 50, sizes.size_of(model.config.to_dict())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counts = {str(one): n for one, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for one, n in counts.items() if "attention" not in one)
    assert costing.operations(own, lengths.Amount(40, 40, 0), 2) == pytest.approx(products)


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
    assert sizes.size_of(llama).weights == pytest.approx(8.03e9, rel=0.002)
    qwen = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    assert sizes.size_of(qwen).weights == pytest.approx(7.62e9, rel=0.002)


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
    found = sizes.guessed_size(name)
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
    assert "cannot be used" in page


def test_repairs_are_not_counted_as_runs_to_train():
    study = load(ROOT / "studies" / "safe_lora_gsm8k.yaml")
    repaired = sum(variant.made_in == "mitigate" for variant in study.variants)
    assert (
        f"{len(study.variants)} variants: {len(study.variants) - repaired - 1} runs to train,"
        f" {repaired} repairs of them" in make_plan.pages(study, RATES, None)
    )


def test_hours_follow_the_amounts(paper):
    table = costing.hours(paper, RATES)
    twice = rates.Rates(
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


def test_a_job_tries_a_layout_once_for_the_base_and_each_method_on_weights(make_study, content):
    rows = costing.amounts(make_study(content)).query("kind == 'read probe'")
    found = rows.groupby("stage").run_id.agg(lambda ids: [one.split(".")[1] for one in ids])
    stages = ("train", "respond", "answer", "utility")
    assert found.to_dict() == {stage: ["none", "lora", "ia3"] for stage in stages}


def test_the_published_gpu_is_read_from_the_published_runs():
    found = rates.published_rates()
    runs = pd.read_parquet(rates.PUBLISHED / "runs.parquet").merge(
        pd.read_parquet(rates.PUBLISHED / "variants.parquet"), on="run_id"
    )
    slowest = (
        runs[runs.method == "prompt_tuning"].seconds.median()
        / runs[runs.method == "lora"].seconds.median()
    )
    assert found.of("train lora") / found.of("train prompt_tuning") == pytest.approx(slowest)
    assert found.of("dpo ia3") == found.of("dpo lora")
    assert 2e13 < found.of("train lora") < 3.6e14, "not above the card's printed rate"


def test_tokens_of_a_file_that_is_here_are_counted(make_study, content, data_folder):
    study = make_study(content)
    found, counted = lengths.Lengths(study, "tiny-llama").trained("sft", False, 32, False)
    assert counted
    assert 32 * 4 < found.tokens < 32 * study.training.max_length
    assert found.places < found.tokens, "the head is computed at the answers alone"
    content["data"]["sft"] = {
        "source": "some/set",
        "revision": "0" * 40,
        "format": "messages",
        "n": 32,
    }
    study = make_study(content)
    found, counted = lengths.Lengths(study, "tiny-llama").trained("sft", False, 32, False)
    assert (found.tokens, counted) == (32 * study.training.max_length, False)


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
        8e9 * (2 - sizes.WEIGHT_BYTES["nf4"]) / 2**30
    )


def test_the_command_plans_and_dry_runs_without_doing_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("driftbook.study.content.OUTPUTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_plan", "paper", "L40S", "2.5"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(make_plan.__file__, run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "jobs to run: prepare 5, train " in said
    assert "at 2.5 an hour" in said
    assert "HEx-PHI" in said
    assert not list(tmp_path.iterdir())


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


def test_this_machine_is_measured_once_and_said_to_be(make_study, content, monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "MEASURED", tmp_path / "rates")
    study, measured = make_study(content), []

    def measure(*given):
        measured.append(given)
        kept = {"name": "a machine", "flops": RATES.flops, "fixed": 1.0, "step": 0.1}
        return kept | {"when": "today", "model": "few layers", "on_cpu": True, "job": 30.0}

    monkeypatch.setattr(calibrating, "measurement", measure)
    first, again = (make_plan.chosen_rates(None, study) for _ in range(2))
    assert (first.name, len(measured)) == ("a machine", 1), "the second plan reads what was kept"
    assert first == again
    page = make_plan.pages(study, first, None)
    assert "planned for a machine (measured on this machine, today, on few layers)" in page
    assert "hours of one core" in page
    for file in (tmp_path / "rates").iterdir():
        file.write_text("torn")
    assert rates.here(study) is None


def test_a_measurement_of_a_tiny_model_gives_every_rate(make_study, content, monkeypatch):
    for name, small in (("N_EXAMPLES", 2), ("LENGTHS", (8, 16)), ("BODY", 1e4), ("HEAD", 1e4)):
        monkeypatch.setitem(getattr(calibrating, name), "cpu", small)
    content["grid"][0] |= {"methods": ["lora", "ia3"]}
    content["grid"][0]["learning_rates"] = {"lora": [1e-3], "ia3": [1e-2]}
    study = make_study(content)
    shape = sizes.Size(4e4, 6.4e3, 2, 32, 32, 200)
    found = calibrating.measurement(study, shape)
    kinds = {f"{word} {method}" for word in ("train", "dpo") for method in ("lora", "ia3")}
    assert kinds | {"read", "write", "stream"} == set(found["flops"])
    assert min(found["flops"].values()) > 0
    assert found["on_cpu"]


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


# ---- when it will be done
def test_jobs_wait_for_each_other_and_fill_the_cores():
    Job = schedule.PlannedJob
    plan = {
        "a": Job(4.0),
        "b": Job(2.0),
        "c": Job(1.0, after=("b",)),
        "d": Job(5.0, after=("a", "c")),
    }
    assert schedule.finish(plan, 1) == 12
    assert schedule.finish(plan, 2) == 9, "b and c go beside a, and d waits for both"
    assert schedule.finish({"d": plan["d"]}, 2) == 5, "what is no longer there is done"
    with pytest.raises(ValueError, match="wait for each other"):
        schedule.finish({"a": Job(1.0, after=("b",)), "b": Job(1.0, after=("a",))}, 2)


def test_the_jobs_of_a_plan_are_those_of_the_batch(make_study, content):
    study = make_study(content)
    plan = schedule.jobs(study, RATES, shards.dealt(study, 1, keep=False))
    table = costing.hours(study, RATES)
    train = plan["train/tiny-llama/0"]
    assert set(train.pieces) == {one.run_id for one in study.variants}
    assert train.seconds == pytest.approx(table.loc["tiny-llama", "train"] * 3600)
    assert plan["judge/tiny-llama/0"].after[0] == "respond/tiny-llama/0"
    assert set(plan["report"].after) < set(plan)
    piece = next(one for one in train.pieces.values() if "steps" in one.counts)
    n, seconds = piece.counts["steps"]
    assert piece.share({"steps": n / 2}) == pytest.approx(seconds / 2 / piece.seconds)
    assert piece.share({"steps": 9 * n}) <= 1


# ---- how long texts are
def test_amounts_are_what_the_scorer_computes(make_study, content, standins, monkeypatch):
    """Tokens of a benchmark that is read or answered, against those that enter the model."""
    from driftbook.benchmarks import data
    from driftbook.models import loading
    from driftbook.models.engine import Engine
    from driftbook.models.scoring import Scorer

    study = make_study(content)
    base = loading.load(study.bases["tiny-llama"], "tiny-llama", study)
    scorer, seen, run = Scorer(base.model, base.tokenizer), [], Engine.run

    def counted(self, inputs, *rest):
        seen.append(inputs.shape[0] * inputs.shape[1])
        return run(self, inputs, *rest)

    monkeypatch.setattr(Engine, "run", counted)
    prompts = data.prompts("over_refusal", study)
    contexts = scorer.ask(list(prompts.prompt))
    scorer.letters(contexts)
    known = lengths.Lengths(study, "tiny-llama")
    read = known.read("over_refusal")
    assert (read.tokens, read.places) == (sum(seen), len(prompts))
    seen.clear()
    monkeypatch.setattr("driftbook.models.scoring.end_tokens", lambda *given: [-1])
    scorer.generate(contexts, 5)
    written = known.written("over_refusal", 5)
    assert written.tokens + written.new - len(prompts) == sum(seen), "the last token is not read"
    assert written.passes == 5


def test_a_classifier_is_charged_for_the_answer_alone(make_study, content):
    study = make_study(content)
    judge = study.judges["tiny-guard"]
    classifier = judge.model_copy(update={"format": "classifier", "label": "harm"})
    whole, own = (costing._judging(study, one, 10, 100, 24) for one in (judge, classifier))
    assert whole / own > (100 + 24 + costing.VERDICT_TOKENS) / 24
    amount = lengths.Amount(240, 0, 24)
    assert own == costing.operations(sizes.size(judge, study), amount, 2)


# ---- what notebook 01 would refuse
def test_what_would_be_refused_later_is_said_while_it_is_planned(
    make_study, content, standins, tmp_path, monkeypatch
):
    source = standins / "llama" / "aligned"
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    content["bases"]["tiny-llama"]["path"] = str(bare)
    content["data"]["sft"]["n"] = 10**6
    lines = make_plan.pages(make_study(content), RATES, None).splitlines()
    [template] = [line for line in lines if line.startswith("NO tiny-llama:")]
    assert "no chat template" in one_sentence(template)
    assert any(line.startswith("NO data.sft:") and "lower n" in line for line in lines)
    assert "2 of" in lines[-1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    said = checking.refusals(make_study(content), {"runs": 1.0}, gpu_memory=1e3)
    assert "make room" in one_sentence(said["disk"])
    assert "one GPU has 0 GB" in one_sentence(said["memory"])
