"""PEFT's published runs are read as they are."""

import json

import numpy as np
import pytest

from conftest import one_sentence
from driftbook.figures import peft_results as peft_figures
from driftbook.rereading import peft_front, peft_results
from peft_files import result, write

pytest_plugins = ["peft_files"]


def test_a_file_becomes_a_run_with_what_it_says(few):
    runs, points = peft_results.read(few)
    one = runs.set_index("file").loc["one.json"]
    assert (one["method"], one["method_class"], one["variant"], one["base_model"], one["rank"]) == (
        "lora",
        "adapter",
        "rank8",
        "Made-1B",
        8,
    )
    assert (
        one["k"],
        one["forgetting"],
        one["n_trainable"],
        one["seconds"],
        one["reported_seconds"],
    ) == (600, 0.05, 1_000_000, 90.0, 150.0)
    assert points.groupby("run_id").size().tolist() == [3, 3, 3]
    assert points["k"].tolist() == [10, 15, 20] * 3
    assert runs["run_id"].is_unique
    assert runs.set_index("file").loc["two.json", "method_class"] == "prompt"


def test_a_failed_run_is_counted_and_its_numbers_are_null(few):
    runs, points = peft_results.read(few)
    tables = peft_results.declared(runs, points)
    failed = tables["runs"].set_index("run_id").loc[runs.loc[~runs["ok"], "run_id"].item()]
    assert (failed["status"], failed["failure"]) == ("failed", "out of memory")
    measured = peft_results.measured(runs)
    assert set(measured["member"]) == set(runs.loc[runs["ok"], "run_id"])
    test = tables["rates"][tables["rates"]["benchmark"].eq(peft_results.TEST)]
    assert sorted(test["k"]) == [0, 600]
    assert failed.name not in set(test["run_id"])


def test_repeated_settings_are_told_from_new_ones(tmp_path):
    again = result()
    again["run_info"]["train_config"]["seed"] = 1
    runs, _ = peft_results.read(
        write(tmp_path / "results", one=result(), two=again, three=result("IA3"))
    )
    assert runs.set_index("file")["repetition"].to_dict() == {
        "one.json": 1,
        "two.json": 2,
        "three.json": 1,
    }
    assert "1 runs of 2 settings repeat" in peft_front.repeated(runs)
    assert "seed 0" in peft_front.repeated(runs[runs["seed"].eq(0)])


def spoilt(change):
    record = result()
    change(record)
    return record


BAD = {
    "a missing field": (
        lambda record: record["train_info"].pop("num_trainable_params"),
        "train_info.num_trainable_params",
    ),
    "a number that is text": (
        lambda record: record["train_info"].update(file_size="4 MB"),
        "file_size",
    ),
    "another base model": (
        lambda record: record["run_info"]["train_config"].update(model_id="maker/Made-7B"),
        "another base model",
    ),
    "other test data": (
        lambda record: record["meta_info"]["dataset_info"]["gsm8k"].update(sha="d" * 40),
        "another test data",
    ),
    "another template": (
        lambda record: record["run_info"]["train_config"].update(query_template="Q {query}"),
        "another prompt template",
    ),
    "other questions": (
        lambda record: record["train_info"]["metrics"][-1].update({"test accuracy": 0.5}),
        "1319 questions",
    ),
    "a share above one": (
        lambda record: record["train_info"]["metrics"][-1].update({"test accuracy": 2.0}),
        "1319 questions",
    ),
    "other validation questions": (
        lambda record: record["train_info"]["metrics"][0].update({"valid accuracy": 0.333}),
        "50 questions",
    ),
    "success without a test": (
        lambda record: record["train_info"]["metrics"].pop(),
        "no field test accuracy",
    ),
    "no metrics": (lambda record: record["train_info"].update(metrics={}), "metrics"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_named_in_a_sentence(name, tmp_path):
    change, word = BAD[name]
    folder = write(
        tmp_path / "results", good=result("IA3"), other=result("THIRD"), wrong=spoilt(change)
    )
    with pytest.raises(ValueError) as error:
        peft_results.read(folder)
    assert word in one_sentence(error.value)
    assert "wrong.json" in str(error.value)


def test_a_missing_empty_or_torn_folder_is_said_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no folder"):
        peft_results.located(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no result file"):
        peft_results.read(tmp_path)
    (tmp_path / "torn.json").write_text('{"run_info": {')
    with pytest.raises(ValueError, match="damaged"):
        peft_results.read(tmp_path)
    (tmp_path / "torn.json").write_text("[]")
    with pytest.raises(ValueError, match="no result file of PEFT"):
        peft_results.read(tmp_path)


def test_without_files_and_network_the_sentence_says_what_to_do(monkeypatch):
    import pooch

    monkeypatch.delenv("DRIFTBOOK_SHARED", raising=False)
    asked = []
    monkeypatch.setattr(
        pooch,
        "retrieve",
        lambda url, **_: asked.append(url) or (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(ValueError) as error:
        peft_results.located()
    assert "DRIFTBOOK_SHARED" in one_sentence(error.value)
    assert f"/{peft_results.PEFT_COMMIT}/method_comparison/MetaMathQA/results/" in asked[0]


def test_the_local_files_are_those_of_the_commit(real):
    known = peft_results.registry()
    assert known.str.fullmatch("[0-9a-f]{64}").all()
    assert (
        peft_results.provenance(real)
        == f"{len(known)} of {len(known)} files are those of huggingface/peft at"
        f" {peft_results.PEFT_COMMIT}, byte for byte."
    )


def test_other_files_are_not_passed_off_as_those_of_the_commit(few):
    assert peft_results.provenance(few).startswith("0 of 3 files")
    assert "are missing" in peft_results.provenance(few)


def test_real_files_are_counts_of_all_questions_and_their_own_methods_keep_their_names(real):
    runs, points = peft_results.read(real)
    assert len(runs) == len(peft_results.registry())
    assert runs["ok"].all()
    shares = [
        json.loads((real / name).read_text())["train_info"]["metrics"][-1]["test accuracy"]
        for name in runs["file"]
    ]
    assert np.allclose(runs["k"].astype(float) / 1319, shares, atol=1e-12)
    assert {"lora", "ia3", "prompt_tuning", "p_tuning"} <= set(runs["method"])
    assert set(runs.loc[runs["method_class"].eq("prompt"), "method"]) == {
        "prompt_tuning",
        "p_tuning",
        "prefix_tuning",
        "adaption_prompt",
    }
    assert (runs["seconds"] < runs["reported_seconds"]).all()
    assert (points.groupby("run_id").size() == 20).all()
    assert set(runs["method"]) <= set(peft_figures.METHOD_NAMES)
