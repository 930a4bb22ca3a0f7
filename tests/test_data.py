"""Training examples and prompts: samples are of the study's seed, forms are checked, templates keep
what was said.
"""

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import FAMILIES, one_sentence
from driftbook.benchmarks import data, hex_phi
from driftbook.models import conversations, loading
from driftbook.models.scoring import Scorer
from driftbook.study.study_file import Study


def study_with(content, tmp_path, **files) -> Study:
    """The study with other files behind some of its data or benchmarks: name=(file name, text)."""
    for name, (file, text) in files.items():
        (tmp_path / file).write_text(text)
        (content["data"] if name in content["data"] else content["benchmarks"])[name]["path"] = str(
            tmp_path / file
        )
    return Study(**content)


# ---- training examples
def test_a_sample_is_of_the_studys_seed_and_of_its_size(content, data_folder):
    one, again = (
        data.training_examples("sft", Study(**content)),
        data.training_examples("sft", Study(**content)),
    )
    other = data.training_examples("sft", Study(**{**content, "seed": 1}))
    assert len(one) == 32
    assert one == again != other
    content["data"]["sft"]["n"] = 16
    assert data.training_examples("sft", Study(**content)) == one[:16]


def test_what_an_example_says(content, tmp_path):
    rows = [
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
        {"instruction": "do", "output": "done"},
    ]
    content["data"]["sft"]["n"] = 3
    examples = data.training_examples(
        "sft", study_with(content, tmp_path, sft=("a.json", json.dumps(rows)))
    )
    assert sorted(example["prompt"][0]["content"] for example in examples) == [
        "do",
        "do",
        "do\nthis",
    ]
    assert all(example["answer"] == "done" for example in examples)


def test_a_preference_of_many_turns_keeps_them_in_order(content, tmp_path):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"},
    ]
    row = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    content["data"]["dpo"]["n"] = 1
    [example] = data.training_examples(
        "dpo", study_with(content, tmp_path, dpo=("a.json", json.dumps([row])))
    )
    assert [(turn["role"], turn["content"]) for turn in example["prompt"]] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert (example["chosen"], example["rejected"]) == ("good", "bad")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sft", "[]", ["0 rows", "lower n"]),
        ("sft", json.dumps([{"instruction": "a", "output": "b"}] * 5), ["5 rows", "32"]),
        ("sft", json.dumps([{"instruction": "a"}] * 40), ["output", "alpaca"]),
        ("sft", json.dumps([{"instruction": "a", "output": "b"}] * 40)[:-20], ["no JSON"]),
        ("sft", json.dumps({"instruction": "a"}), ["sft"]),
        ("sft", json.dumps(["text"] * 40), ["alpaca"]),
        ("sft", json.dumps([{"instruction": "a", "output": ""}] * 40), ["empty"]),
        ("sft", json.dumps([{"instruction": " ", "output": "b"}] * 40), ["empty"]),
        (
            "dpo",
            json.dumps([{"instruction": "a", "output": "b"}] * 40),
            ["conversations", "preference"],
        ),
        (
            "dpo",
            json.dumps(
                [
                    {
                        "conversations": [{"from": "tool", "value": "x"}],
                        "chosen": {"value": "a"},
                        "rejected": {"value": "b"},
                    }
                ]
                * 40
            ),
            ["tool"],
        ),
        (
            "dpo",
            json.dumps(
                [{"conversations": [], "chosen": {"value": "a"}, "rejected": {"value": "b"}}] * 40
            ),
            ["dpo"],
        ),
    ],
    ids=[
        "no rows",
        "few rows",
        "no output",
        "torn",
        "no list",
        "strings",
        "empty answer",
        "empty prompt",
        "no turns key",
        "unknown role",
        "no turns",
    ],
)
def test_data_of_another_form_is_refused(content, tmp_path, name, text, words):
    with pytest.raises(ValueError) as error:
        data.training_examples(name, study_with(content, tmp_path, **{name: ("a.json", text)}))
    for word in words:
        assert word in one_sentence(error.value)


# ---- prompts
def test_prompts_have_ids_of_their_own_and_a_kind(study):
    for name, n in (("safety", 33), ("over_refusal", 30)):
        frame = data.prompts(name, study)
        assert (len(frame), frame.prompt_id.is_unique) == (n, True)
        assert set(frame.kind) <= {"harmful", "benign look-alike"}
        pd.testing.assert_frame_equal(frame, data.prompts(name, study))
    assert set(data.prompts("over_refusal", study).kind) == {"harmful", "benign look-alike"}


def test_all_prompts_are_read_where_no_size_is_given_and_a_sample_is_some_of_them(
    content, data_folder
):
    sampled = data.prompts("safety", Study(**content))
    del content["benchmarks"]["safety"]["n"]
    whole = data.prompts("safety", Study(**content))
    assert len(whole) == 330
    assert whole.category.value_counts().eq(30).all()
    assert list(whole[whole.prompt_id.isin(sampled.prompt_id)].prompt) == list(sampled.prompt), (
        "in the file's order"
    )
    content["benchmarks"]["safety"]["n"] = 1000
    assert data.prompts("safety", Study(**content)).equals(whole)


def test_a_category_that_is_not_there_is_left_out(content, data_folder, tmp_path):
    for number in (1, 3):
        (tmp_path / f"category_{number}.csv").write_text(
            (data_folder / "safety" / f"category_{number}.csv").read_text()
        )
    content["benchmarks"]["safety"] |= {"path": str(tmp_path), "n": None}
    frame = data.prompts("safety", Study(**content))
    assert set(frame.category) == {hex_phi.CATEGORIES[0], hex_phi.CATEGORIES[2]}
    assert set(frame.prompt_id.str.partition("-")[0]) == {"1", "3"}


@pytest.mark.parametrize(
    ("name", "form", "text", "words"),
    [
        ("over_refusal", "xstest", "", ["no prompts"]),
        ("over_refusal", "xstest", "id,prompt\n1,how ?\n", ["type", "xstest"]),
        ("over_refusal", "xstest", "id,prompt,type,focus\n7,  ,homonyms,x\n", ["empty", "7"]),
        (
            "over_refusal",
            "xstest",
            "id,prompt,type,focus\n1,how ?,homonyms,x\n1,what ?,homonyms,x\n",
            ["repeated", "1"],
        ),
        ("over_refusal", "xstest", "id,prompt,type,focus\n1,how ?\n", ["over_refusal"]),
        ("safety", "ailuminate", "release_prompt_id,prompt_text\n1,how ?\n", ["hazard"]),
        ("safety", "csv", "prompt_id,category\n1,a\n", ["prompt"]),
        ("safety", "csv", "prompt_id,category,prompt\n1,a,b\0c\n", []),
    ],
    ids=[
        "empty file",
        "no type",
        "empty prompt",
        "repeated id",
        "short row",
        "no hazard",
        "no prompt",
        "null byte",
    ],
)
def test_prompts_of_another_form_are_refused(content, tmp_path, name, form, text, words):
    content["benchmarks"][name] |= {"format": form, "n": None}
    study = study_with(content, tmp_path, **{name: ("a.csv", text)})
    if words:
        with pytest.raises(ValueError) as error:
            data.prompts(name, study)
        for word in words:
            assert word in one_sentence(error.value)
    else:
        assert len(data.prompts(name, study)) == 1


def test_an_empty_line_among_the_prompts_is_refused(content, tmp_path):
    (tmp_path / "category_1.csv").write_text("how ?\n\nwhat ?\n")
    content["benchmarks"]["safety"] |= {"path": str(tmp_path), "n": None}
    with pytest.raises(ValueError) as error:
        data.prompts("safety", Study(**content))
    assert "empty" in one_sentence(error.value)


def test_an_empty_folder_has_no_prompts(content, tmp_path):
    (tmp_path / "none").mkdir()
    content["benchmarks"]["safety"] |= {"path": str(tmp_path / "none")}
    with pytest.raises(ValueError) as error:
        data.prompts("safety", Study(**content))
    assert "no prompts" in one_sentence(error.value)


def test_commas_quotes_lines_and_unicode_survive(content, tmp_path):
    said = ['a, "quoted" text', "two\nlines", "日本語 ñ 👍🏽", "=1+1"]
    text = pd.DataFrame({"id": range(4), "prompt": said, "type": "homonyms", "focus": "x"}).to_csv(
        index=False
    )
    content["benchmarks"]["over_refusal"]["n"] = None
    assert (
        list(
            data.prompts(
                "over_refusal",
                study_with(content, tmp_path, over_refusal=("a.csv", "\ufeff" + text)),
            ).prompt
        )
        == said
    )


# ---- conversations
words = st.lists(
    st.sampled_from(["how", "is", "it", "done", "?", "please", "explain", "a", "safe", "word"]),
    min_size=1,
    max_size=6,
).map(" ".join)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_split_where_its_answer_begins(bases, family):
    tokenizer = bases[family].tokenizer

    @given(prompts=st.lists(words, min_size=1, max_size=4), answer=words)
    def property(prompts, answer):
        messages = [
            message
            for prompt in prompts
            for message in (
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": "it is safe"},
            )
        ][:-1]
        prompt, rest = conversations.conversation_ids(tokenizer, messages, answer)
        whole = conversations.chat_ids(
            tokenizer, [*messages, {"role": "assistant", "content": answer}], generation=False
        )
        assert prompt + rest == whole
        assert prompt == conversations.chat_ids(tokenizer, messages)
        said = rest[: rest.index(tokenizer.eos_token_id)]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer

    property()


def test_a_base_whose_tokenizer_does_not_fit_is_refused(bases):
    from driftbook.miniature.families import build_model, build_tokenizer

    base = bases["llama"]
    short = base.tokenizer.__class__(
        tokenizer_object=base.tokenizer.backend_tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eot_id|>",
    )
    model = build_model("llama", base.tokenizer, 0, width=32)
    for tokenizer, word in (
        (short, "template"),
        (_with_more_tokens(build_tokenizer("llama")), "do not belong together"),
        (_without_end(build_tokenizer("llama")), "end-of-sequence"),
    ):
        with pytest.raises(ValueError) as error:
            loading.check_fit("tiny", model, tokenizer)
        assert word in one_sentence(error.value)
        assert str(error.value).startswith("tiny")


def _with_more_tokens(tokenizer):
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    return tokenizer


def _without_end(tokenizer):
    tokenizer.eos_token = None
    return tokenizer


# ---- ids beyond the embedding table
def _one_more(tokenizer, **kind):
    """Gemma 3's tokenizers have a token behind the last row, the mark of an image."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]}, **kind)
    return tokenizer


def test_a_special_token_that_no_conversation_needs_may_be_beyond_the_table(bases):
    from driftbook.miniature.families import build_model, build_tokenizer

    tokenizer = build_tokenizer("llama")
    model = build_model("llama", tokenizer, 0, width=32)
    _one_more(tokenizer)
    loading.check_fit("tiny", model, tokenizer)
    scorer, rows = Scorer(model, tokenizer), model.get_input_embeddings().num_embeddings
    asked = conversations.ask(tokenizer, "what is <image_soft_token> ?")
    assert max(asked) < rows, "in a conversation it is text"
    with pytest.raises(ValueError) as error:
        scorer.token_logprobs([(scorer.ids("it is"), scorer.ids("<image_soft_token>") * 2)])
    assert "<image_soft_token>" in one_sentence(error.value)
    assert "no embedding" in str(error.value)


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_a_token_beyond_the_table_that_is_needed(role):
    from driftbook.miniature.families import build_model, build_tokenizer

    tokenizer = build_tokenizer("llama")
    model = build_model("llama", tokenizer, 0, width=32)
    tokenizer.add_special_tokens({role: "<more>"})
    if role == "pad_token":  # padding is masked, so another token serves
        loading.check_fit("tiny", model, tokenizer)
        assert tokenizer.pad_token == tokenizer.eos_token
        return
    with pytest.raises(ValueError, match="do not belong together"):
        loading.check_fit("tiny", model, tokenizer)


def test_a_template_that_writes_a_token_beyond_the_table_is_refused(bases):
    from driftbook.miniature.families import build_model, build_tokenizer

    tokenizer = build_tokenizer("llama")
    model = build_model("llama", tokenizer, 0, width=32)
    _one_more(tokenizer).chat_template = "<image_soft_token>" + tokenizer.chat_template
    with pytest.raises(ValueError, match="do not belong together"):
        loading.check_fit("tiny", model, tokenizer)
