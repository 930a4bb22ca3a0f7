"""Utility: what a question's file may say, when an answer is right, and that the loss is the model's own."""

import json

import numpy as np
import pytest
import torch

from conftest import FAMILIES, one_sentence
from driftbook import adapters, models, utility
from driftbook.scoring import Scorer
from driftbook.tables import RATINGS


@pytest.mark.parametrize(
    ("response", "final", "right"),
    [
        ("The answer is 42.", "42", True), ("first 42, then 41", "42", False), ("it is 1,234 dollars", "1234", True), ("1234", "1,234", True),
        ("$-5", "-5", True), ("5", "-5", False), ("3.50", "3.5", False), ("", "42", False), ("no number", "42", False), ("142", "42", False),
        ("a kind of food .", "food", True), ("a kind of Food", "food", True), ("a kind of seafood", "food", False), ("", "food", False),
        ("so 7 + 5 = 12", "12", True), ("12 , as 7 + 5", "12", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_by_its_last_number_or_by_its_word(response, final, right):
    assert utility.is_correct(response, final) is right


def test_calculator_marks_and_the_final_answer_are_told_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "2+3 = <<2+3=5>>5 in all.\n#### 5"}) + "\n\n" * 0)
    [row] = utility.load(path).itertuples()
    assert (row.prompt, row.answer, row.final) == ("How many?", "2+3 = 5 in all.", "5")


@pytest.mark.parametrize(
    "text",
    ['{"question": "a"}', '{"answer": "#### 5"}', '{"question": "a", "answer": "5"}', '{"question": "", "answer": "#### 5"}', '{"question": "a", "answer": "x #### "}',
     '{"question": "a", "answer": "#### 5"', "[1]", "", '{"question": "a", "answer": 5}'],
    ids=["no answer", "no question", "no mark", "empty question", "empty final", "torn", "a list", "empty file", "a number"],
)  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        utility.load(path)
    assert "rows.jsonl" in one_sentence(error.value)


@pytest.mark.parametrize(("family", "method"), [(family, None) for family in FAMILIES] + [("llama", "prompt_tuning"), ("gemma", "ia3")])
def test_both_measures_are_the_models_own(bases, adapter_folders, data_folder, family, method):
    base, items = bases[family], utility.load(data_folder / "utility.jsonl").head(10)
    with adapters.attached(base.model, adapter_folders[family, method]) as model:
        found = RATINGS.check(utility.ratings(items, Scorer(model, base.tokenizer), "utility", "run", 6))
        assert len(found) == 2 * len(items)
        nll = found[found.metric == "nll"].set_index("prompt_id")
        correct = found[found.metric == "correct"].set_index("prompt_id")
        for row in items.itertuples():
            prompt, answer = models.conversation_ids(base.tokenizer, [{"role": "user", "content": row.prompt}], row.answer)
            with torch.inference_mode():
                logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 : -1].log_softmax(1)
            assert nll.value[row.prompt_id] == pytest.approx(-logprobs[range(len(answer)), answer].mean().item(), abs=1e-4)
            assert nll.weight[row.prompt_id] == len(answer)
            [said] = Scorer(model, base.tokenizer).generate([models.ask(base.tokenizer, row.prompt)], 6)
            assert correct.value[row.prompt_id] == float(utility.is_correct(said.text, row.final))


def test_the_reference_answer_is_right_by_its_own_measure(data_folder):
    items = utility.load(data_folder / "utility.jsonl")
    right = [utility.is_correct(row.answer, row.final) for row in items.itertuples()]
    assert np.mean(right) == 1
