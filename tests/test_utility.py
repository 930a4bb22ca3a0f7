"""Utility: what a question's file may say, when an answer is right, and that the loss is the
model's own.
"""

import json
import types

import numpy as np
import pytest
import torch

from conftest import FAMILIES, one_sentence
from driftbook.benchmarks import gsm8k, reference_answers, summaries, utility
from driftbook.benchmarks.format import Asking
from driftbook.models import adapters, conversations
from driftbook.models.conversations import conversation_ids
from driftbook.models.scoring import Scorer
from driftbook.study.tables import RATINGS


@pytest.mark.parametrize(
    ("response", "final", "right"),
    [
        ("The answer is 42.", "42", True),
        ("first 42, then 41", "42", False),
        ("it is 1,234 dollars", "1234", True),
        ("1234", "1,234", True),
        ("$-5", "-5", True),
        ("5", "-5", False),
        ("3.50", "3.5", True),
        ("", "42", False),
        ("no number", "42", False),
        ("142", "42", False),
        ("a kind of food .", "food", True),
        ("a kind of Food", "food", True),
        ("a kind of seafood", "food", False),
        ("", "food", False),
        ("so 7 + 5 = 12", "12", True),
        ("12 , as 7 + 5", "12", False),
    ],
)
def test_an_answer_is_right_by_its_last_number_or_by_its_word(response, final, right):
    assert gsm8k.is_correct(response, final) is right


def test_calculator_marks_and_the_final_answer_are_told_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"question": "How many?", "answer": "2+3 = <<2+3=5>>5 in all.\n#### 5"})
        + "\n\n" * 0
    )
    [row] = gsm8k.load_questions(path).itertuples()
    assert (row.prompt, row.answer, row.final) == ("How many?", "2+3 = 5 in all.", "5")


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "a"}',
        '{"answer": "#### 5"}',
        '{"question": "a", "answer": "5"}',
        '{"question": "", "answer": "#### 5"}',
        '{"question": "a", "answer": "x #### "}',
        '{"question": "a", "answer": "#### 5"',
        "[1]",
        "",
        '{"question": "a", "answer": 5}',
    ],
    ids=[
        "no answer",
        "no question",
        "no mark",
        "empty question",
        "empty final",
        "torn",
        "a list",
        "empty file",
        "a number",
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        gsm8k.load_questions(path)
    assert "rows.jsonl" in one_sentence(error.value)


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, None) for family in FAMILIES] + [("llama", "prompt_tuning"), ("gemma", "ia3")],
)
def test_both_measures_are_the_models_own(bases, adapter_folders, data_folder, family, method):
    base, items = bases[family], gsm8k.load_questions(data_folder / "utility.jsonl").head(10)
    with adapters.attached(base.model, adapter_folders[family, method]) as model:
        found = RATINGS.check(
            utility.rated(
                "utility", items, Scorer(model, base.tokenizer), "run", "gsm8k", Asking(6)
            )
        )
        assert len(found) == 2 * len(items)
        nll = found[found.metric == "nll"].set_index("prompt_id")
        correct = found[found.metric == "correct"].set_index("prompt_id")
        for row in items.itertuples():
            prompt, answer = conversations.conversation_ids(
                base.tokenizer, [{"role": "user", "content": row.prompt}], row.answer
            )
            with torch.inference_mode():
                logprobs = (
                    model(input_ids=torch.tensor([prompt + answer]))
                    .logits[0, -len(answer) - 1 : -1]
                    .log_softmax(1)
                )
            assert nll.value[row.prompt_id] == pytest.approx(
                -logprobs[range(len(answer)), answer].mean().item(), abs=1e-4
            )
            assert nll.weight[row.prompt_id] == len(answer)
            [said] = Scorer(model, base.tokenizer).generate(
                [conversations.ask(base.tokenizer, row.prompt)], 6
            )
            assert correct.value[row.prompt_id] == float(gsm8k.is_correct(said.text, row.final))


def test_the_reference_answer_is_right_by_its_own_measure(data_folder):
    items = gsm8k.load_questions(data_folder / "utility.jsonl")
    right = [gsm8k.is_correct(row.answer, row.final) for row in items.itertuples()]
    assert np.mean(right) == 1


# ---- held-out answers and summaries
def test_held_out_answers_are_rated_by_their_loss_alone(bases, data_folder):
    items = reference_answers.load_answers(data_folder / "heldout.json").head(6)
    base = bases["qwen2"]
    scorer = Scorer(base.model, base.tokenizer)
    found = utility.rated("gain", items, scorer, "run", "answers", Asking())
    for row, item in zip(found.itertuples(), items.itertuples(), strict=True):
        asked, said = conversation_ids(
            base.tokenizer, [{"role": "user", "content": item.prompt}], item.answer
        )
        with torch.no_grad():
            logits = base.model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
        assert row.value == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(said))), abs=1e-4
        )
        assert (row.metric, row.weight) == ("nll", len(said))


class Says:
    """A scorer whose answers are known."""

    def __init__(self, scorer, texts):
        self.token_logprobs, self.texts = scorer.token_logprobs, texts
        self.ask, self.answered = scorer.ask, scorer.answered

    def generate(self, prompts, most):
        return [types.SimpleNamespace(text=text) for text in self.texts]


def test_summaries_are_rated_by_the_words_they_share(bases, tmp_path):
    path = tmp_path / "samsum.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"d{i}", "dialogue": "A: hi", "summary": text}) + "\n"
            for i, text in enumerate(
                ["the cat sat", "the cat sat", "the cat sat", "cats are running"]
            )
        )
    )
    items = summaries.load_summaries(path)
    assert items.prompt.tolist() == ["Summarize this dialog:\nA: hi"] * 4
    scorer = Says(
        Scorer(bases["llama"].model, bases["llama"].tokenizer),
        ["the cat sat", "the dog", "", "a cat ran"],
    )
    found = utility.rated("utility", items, scorer, "run", "summaries", Asking(8))
    rouge = found[found.metric == "rouge1"].value.tolist()
    assert rouge == pytest.approx(
        [1, 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3), 0, 1 / 3]
    )  # the last one by stems: cat
    assert (found.metric == "nll").sum() == 4


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '[{"instruction": "x"}]', '[{"instruction": " ", "output": "y"}]', "no json"],
)
def test_answers_of_another_form_are_refused(tmp_path, text):
    path = tmp_path / "answers.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        reference_answers.load_answers(path)
    assert "answers.json" in one_sentence(error.value)


@pytest.mark.parametrize(
    "text", ["id,dialogue\n1,x\n", "id,dialogue,summary\n", "id,dialogue,summary\n1,,y\n", ""]
)
def test_summaries_of_another_form_are_refused(tmp_path, text):
    path = tmp_path / "samsum.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        summaries.load_summaries(path)
    assert "samsum.csv" in one_sentence(error.value)
