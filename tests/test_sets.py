"""Training data of any set: the public forms, a mapping of columns, files as the hub lays them out,
samples, and what is refused.
"""

import copy
import json

import pandas as pd
import pytest

from conftest import SMALL, one_sentence
from driftbook.batch import gpus, preparing
from driftbook.benchmarks import data
from driftbook.study.study_file import Study

CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"what is {i}"},
            {"role": "assistant", "content": f"it is {i}"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"},
        ],
        "prompt": f"what is {i}",
        "prompt_id": str(i),
    }
    for i in range(12)
]
FEEDBACK = [
    {
        "prompt": f"say {i}",
        "prompt_id": str(i),
        "score_chosen": 8.0,
        "score_rejected": 2.0,
        "messages": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"good {i}"},
        ],
        "chosen": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"good {i}"},
        ],
        "rejected": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"bad {i}"},
        ],
    }
    for i in range(12)
]


def study_of(path, **fields) -> Study:
    content = copy.deepcopy(SMALL)
    content["data"]["sft"] = {"source": "tests:set", "path": str(path), "n": 5, **fields}
    content["grid"] = []
    return Study(**content)


def jsonl(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_ultrachat_is_read_with_all_its_turns(tmp_path):
    examples = data.training_examples(
        "sft", study_of(jsonl(tmp_path, CHAT), format="messages", sample="first")
    )
    assert [one["answer"] for one in examples] == ["yes"] * 5
    assert [turn["role"] for turn in examples[0]["prompt"]] == ["user", "assistant", "user"]
    assert [one["prompt"][0]["content"] for one in examples] == [f"what is {i}" for i in range(5)]


def test_ultrafeedback_is_read_for_dpo_and_its_chosen_answer_for_sft(tmp_path):
    examples = data.training_examples(
        "sft", study_of(jsonl(tmp_path, FEEDBACK), format="ultrafeedback", sample="first")
    )
    assert (examples[3]["prompt"], examples[3]["chosen"], examples[3]["rejected"]) == (
        [{"role": "user", "content": "say 3"}],
        "good 3",
        "bad 3",
    )
    assert data.for_sft(examples)[3] == {
        "prompt": [{"role": "user", "content": "say 3"}],
        "answer": "good 3",
    }


def test_samples_are_seeded_and_first_rows_are_the_first(tmp_path):
    path = jsonl(tmp_path, CHAT)
    drawn = data.training_examples("sft", study_of(path, format="messages"))
    assert drawn == data.training_examples("sft", study_of(path, format="messages"))
    assert drawn != data.training_examples("sft", study_of(path, format="messages", sample="first"))


@pytest.mark.parametrize("kind", ["folder", "parquet", "csv"])
def test_files_are_read_as_the_hub_lays_them_out(tmp_path, kind):
    frame = pd.DataFrame(
        {"q": [f"what is {i}" for i in range(12)], "a": [f"it is {i}" for i in range(12)]}
    )
    if kind == "folder":
        path = tmp_path / "set"
        (path / "data").mkdir(parents=True)
        frame.to_parquet(path / "data" / "train_sft-00000-of-00001.parquet")
        frame.head(3).to_parquet(path / "data" / "test_sft-00000-of-00001.parquet")
        (path / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path:"
            " data/train_sft-*\n  - split: test_sft\n    path: data/test_sft-*\n---\n"
        )
    else:
        path = tmp_path / f"rows.{kind}"
        frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    found = data.training_examples(
        "sft",
        study_of(path, columns={"prompt": "q", "answer": "a"}, split="train_sft", sample="first"),
    )
    assert [one["answer"] for one in found] == [f"it is {i}" for i in range(5)]


def test_a_mapping_reads_a_system_prompt_an_input_and_turns_of_other_names(tmp_path):
    rows = [
        {
            "sys": "Be brief.",
            "conv": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        }
    ] * 6
    [one, *_] = data.training_examples(
        "sft", study_of(jsonl(tmp_path, rows), columns={"system": "sys", "messages": "conv"})
    )
    assert one == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
        "answer": "b",
    }
    rows = [{"ask": "translate", "text": "floop", "say": "snib"}] * 6
    [one, *_] = data.training_examples(
        "sft",
        study_of(
            jsonl(tmp_path, rows), columns={"prompt": "ask", "input": "text", "answer": "say"}
        ),
    )
    assert one == {"prompt": [{"role": "user", "content": "translate\nfloop"}], "answer": "snib"}


@pytest.mark.parametrize(
    ("rows", "fields", "words"),
    [
        (
            CHAT,
            {"columns": {"prompt": "question", "answer": "a"}},
            ["question", "messages, prompt, prompt_id"],
        ),
        (
            [{"messages": CHAT[0]["messages"][:3]}] * 6,
            {"format": "messages"},
            ["does not end in an answer"],
        ),
        (
            [
                {
                    **FEEDBACK[0],
                    "rejected": [
                        {"role": "user", "content": "other"},
                        {"role": "assistant", "content": "x"},
                    ],
                }
            ]
            * 6,
            {"format": "ultrafeedback"},
            ["one prompt"],
        ),
        ([{"messages": "text"}] * 6, {"format": "messages"}, ["does not end in an answer"]),
        (
            [{"messages": [{"role": "tool", "content": "x"}]}] * 6,
            {"format": "messages"},
            ["'tool'"],
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, rows, fields, words):
    with pytest.raises(ValueError) as error:
        data.training_examples("sft", study_of(jsonl(tmp_path, rows), **fields))
    for word in words:
        assert word in one_sentence(error.value)


def test_a_set_on_a_hub_that_is_down_is_said_in_one_sentence(tmp_path):
    content = copy.deepcopy(SMALL)
    content["data"]["sft"] = {
        "source": "HuggingFaceH4/ultrachat_200k",
        "revision": "8049631c405ae6576f93f445c6b8166f76f5505a",
        "format": "messages",
        "split": "train_sft",
        "n": 5,
    }
    with pytest.raises(ValueError) as error:
        data.training_examples("sft", Study(**content))
    assert "HuggingFaceH4/ultrachat_200k" in one_sentence(error.value)


@pytest.mark.slow
def test_a_model_on_a_hub_that_is_down_is_said_before_any_work(content):
    content["bases"]["far"] = {
        "family": "llama",
        "source": "meta-llama/Meta-Llama-3-8B-Instruct",
        "revision": "8afb486c1db24fe5011ec46dfbe5b5dccdb575c2",
    }
    content["grid"] = []
    study = Study(**content)
    with pytest.raises(ValueError) as error:
        preparing.check_model("far", study.bases["far"], study)
    assert "HF_HUB_OFFLINE" in one_sentence(error.value)


# ---- one worker per GPU
def test_a_gpu_is_held_by_one_job_at_a_time_and_the_job_sees_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "0,3")
    with gpus.held(tmp_path) as first:
        assert gpus.numbers() == [first] == ["0"]
        monkeypatch.setenv(gpus.VISIBLE, "0,3")
        with gpus.held(tmp_path) as second:
            assert (second, gpus.numbers()) == ("3", ["3"])
        monkeypatch.setenv(gpus.VISIBLE, "0")
    with gpus.held(tmp_path) as again:
        assert again == "0"


def test_a_job_waits_for_a_gpu_that_is_held(tmp_path, monkeypatch):
    import threading

    monkeypatch.setenv(gpus.VISIBLE, "1")
    done, release, order = threading.Event(), threading.Event(), []

    def hold():
        from filelock import FileLock

        with FileLock(tmp_path / "1.lock", thread_local=False):
            done.set()
            release.wait(10)
            order.append("released")

    thread = threading.Thread(target=hold)
    thread.start()
    done.wait(10)
    threading.Timer(0.3, release.set).start()
    with gpus.held(tmp_path, wait=0.05):
        order.append("held")
    thread.join()
    assert order == ["released", "held"]


def test_without_a_gpu_nothing_is_held(tmp_path, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "")
    with gpus.held(tmp_path) as number:
        assert number is None
    assert not list(tmp_path.iterdir())


# ---- methods that name what is not there
def test_a_target_that_the_base_model_lacks_is_named_before_any_work(bases, content, tmp_path):
    from conftest import variants_of, write_study
    from driftbook.models import adapters
    from driftbook.study.study_file import load

    bases["llama"].model.save_pretrained(tmp_path / "base")
    bases["llama"].tokenizer.save_pretrained(tmp_path / "base")
    content["bases"]["tiny-llama"]["path"] = str(tmp_path / "base")
    content["methods"]["lora"]["target_modules"] = ["q_proj", "v_prj"]
    study = load(write_study(tmp_path, content))
    with pytest.raises(ValueError) as error:
        preparing.check_model("tiny-llama", study.bases["tiny-llama"], study)
    assert "v_prj" in one_sentence(error.value)
    assert "v_proj" in str(error.value)
    with pytest.raises(ValueError, match="v_prj"):
        adapters.create(
            variants_of(study, "lora")[0], bases["llama"].model, bases["llama"].tokenizer
        )


@pytest.mark.parametrize(("settings", "word"), [({"r": "8"}, "lora"), ({"r": -1}, "r")])
def test_a_setting_of_the_wrong_kind_is_one_sentence_and_leaves_the_base_as_it_was(
    bases, make_study, content, settings, word
):
    from conftest import variants_of
    from driftbook.models import adapters

    content["methods"]["lora"] |= settings
    names = [name for name, _ in bases["llama"].model.named_modules()]
    with pytest.raises(ValueError) as error:
        adapters.create(
            variants_of(make_study(content), "lora")[0],
            bases["llama"].model,
            bases["llama"].tokenizer,
        )
    assert word in one_sentence(error.value)
    assert [name for name, _ in bases["llama"].model.named_modules()] == names


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "no JSON"),
        (json.dumps({"a": 1}), "no list"),
        (
            json.dumps(
                [
                    {
                        "messages": [
                            {"role": "user", "content": None},
                            {"role": "assistant", "content": "x"},
                        ]
                    }
                ]
                * 6
            ),
            "no text",
        ),
        (
            json.dumps(
                [
                    {
                        "messages": [
                            {"role": "user", "content": ["a"]},
                            {"role": "assistant", "content": "x"},
                        ]
                    }
                ]
                * 6
            ),
            "no text",
        ),
    ],
)
def test_files_of_the_wrong_shape_are_one_sentence(tmp_path, text, word):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        data.training_examples("sft", study_of(path, format="messages"))
    assert word in one_sentence(error.value)


def test_rows_with_line_separators_numbers_and_chosen_texts(tmp_path):
    rows = [{"q": "a\u2028b", "a": 7}] * 6
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n  \n")
    [one, *_] = data.training_examples(
        "sft", study_of(path, columns={"prompt": "q", "answer": "a"})
    )
    assert one == {"prompt": [{"role": "user", "content": "a\u2028b"}], "answer": "7"}
    with pytest.raises(ValueError) as error:
        data.training_examples(
            "sft",
            study_of(
                jsonl(tmp_path, [{"chosen": "a", "rejected": "b"}] * 6),
                columns={"chosen": "chosen", "rejected": "rejected"},
            ),
        )
    assert "prompt" in one_sentence(error.value)
