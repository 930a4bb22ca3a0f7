"""BBQ's answers follow from what the model says of each option."""

import numpy as np
import pandas as pd
import pytest

from driftbook.benchmarks import bbq, bbq_scores
from driftbook.models.scoring import Scorer
from driftbook.study.tables import ANSWERS


class Says:
    """A scorer whose log-probabilities are given."""

    lead = ""

    def __init__(self, logprobs):
        self.logprobs, self.asked = np.log(np.array(logprobs, float)), []

    def ask(self, texts, system_prompt=None):
        self.asked = texts
        return [[1]] * len(texts)

    def choices(self, contexts, options, stem=""):
        return self.logprobs


def item(context, polarity, label, unknown, target, number):
    texts = {"passage": "p", "question": "q", "ans0": "x", "ans1": "y", "ans2": "z"}
    return {
        "item_id": f"Age-{number}",
        "dimension": "Age",
        "context": context,
        "polarity": polarity,
        "question_family": "Age-1",
        **texts,
        "label": label,
        "unknown": unknown,
        "target": target,
    }


# context, polarity, label, unknown, target, probabilities -> answer, correct, unknown, biased
CASES = [
    ("ambiguous", "negative", 2, 2, 0, (0.2, 0.1, 0.4), "C", True, True, None),
    ("ambiguous", "negative", 2, 2, 0, (0.5, 0.1, 0.2), "A", False, False, True),
    ("ambiguous", "negative", 2, 2, 0, (0.1, 0.5, 0.2), "B", False, False, False),
    ("ambiguous", "non-negative", 2, 2, 0, (0.5, 0.1, 0.2), "A", False, False, False),
    ("ambiguous", "non-negative", 2, 2, 0, (0.1, 0.5, 0.2), "B", False, False, True),
    ("disambiguated", "negative", 0, 2, 0, (0.5, 0.1, 0.2), "A", True, False, True),
    ("disambiguated", "negative", 1, 2, 0, (0.5, 0.1, 0.2), "A", False, False, True),
    ("disambiguated", "non-negative", 1, 0, 1, (0.1, 0.5, 0.2), "B", True, False, False),
    ("disambiguated", "non-negative", 1, 0, 2, (0.1, 0.5, 0.2), "B", True, False, True),
    ("disambiguated", "negative", 1, 0, 2, (0.6, 0.1, 0.2), "A", False, True, None),
    ("ambiguous", "negative", 1, 1, None, (0.6, 0.1, 0.2), "A", False, False, None),
    ("ambiguous", "negative", 1, 1, 0, (float("nan"), 0.1, 0.2), None, None, None, None),
    ("ambiguous", "negative", 1, 1, 0, (0.0, 0.0, 0.0), None, None, None, None),
]


@pytest.mark.parametrize("mode", ["letters", "options"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_correct_unknown_and_biased_follow_from_the_most_probable_option(mode):
    items = pd.DataFrame([item(*case[:5], number) for number, case in enumerate(CASES)])
    found = ANSWERS.check(bbq.answers(items, Says([case[5] for case in CASES]), mode, "run"))
    assert list(found.item_id) == list(items.item_id)
    assert set(found.answer_mode) == {mode}
    for number, (*_, p, answer, correct, unknown, biased) in enumerate(CASES):
        row = found.iloc[number]
        said = [
            None if pd.isna(value) else value
            for value in (row.answer, row.correct, row.unknown, row.biased)
        ]
        assert said == [answer, correct, unknown, biased], f"case {number}"
        if answer is None:
            assert row.unscored_reason
        else:
            assert pd.isna(row.unscored_reason)
            assert [row.p_a, row.p_b, row.p_c] == pytest.approx([value / sum(p) for value in p])
            assert row.option_mass == pytest.approx(sum(p))


def test_letters_count_from_half_of_the_probability_on():
    items = pd.DataFrame([item("ambiguous", "negative", 2, 2, 0, n) for n in range(3)])
    said = Says([(0.3, 0.1, 0.1), (0.3, 0.1, 0.09), (1e-9, 1e-7, 1e-8)])
    found = bbq.answers(items, said, "letters", "run")
    assert [None if pd.isna(one) else one for one in found.answer] == ["A", None, None]
    assert found.unscored_reason[1] == "the options have less than 0.5 of the probability"
    assert found.loc[1:, ["correct", "unknown", "biased"]].isna().all(axis=None)
    assert found.p_a[1] == pytest.approx(0.3 / 0.49), "what was measured stays"
    for mode, floor in (("options", None), ("letters", 0.0)):
        known = bbq.answers(items, said, mode, "run", min_mass=floor)
        assert known.answer.tolist() == ["A", "A", "B"]
    row = bbq_scores.scores(found.assign(question_family=list("xyz")), by=()).iloc[0]
    assert (row.n_amb, row.unscored, row.acc_amb) == (3, 2, 0.0)


def test_the_target_of_a_question_is_whom_the_stereotype_is_about(data_folder):
    """On a negative question the biased answer is the target, on a non-negative one the other
    person.
    """
    items = bbq.load(data_folder / "bbq", ["Age"])
    always = np.full((len(items), 3), 0.1)
    always[np.arange(len(items)), items.target.astype(int)] = 0.8
    found = bbq.answers(items, Says(always), "options", "run")
    assert (found.biased == (items.polarity == "negative")).all()


@pytest.mark.parametrize("mode", ["letters", "options"])
def test_every_text_of_an_item_is_in_what_is_asked(data_folder, mode):
    items = bbq.load(data_folder / "bbq", ["Age"]).head(8)
    scorer = Says(np.full((8, 3), 0.3))
    bbq.answers(items, scorer, mode, "run")
    for text, row in zip(scorer.asked, items.itertuples(), strict=True):
        assert all(
            part in text for part in (row.passage, row.question, row.ans0, row.ans1, row.ans2)
        )
        assert text.index(row.passage) < text.index(row.question) < text.rindex(row.ans2)


@pytest.mark.parametrize("mode", ["letters", "options"])
def test_a_model_is_asked_as_the_likelihood_of_each_option_says(bases, data_folder, mode):
    base = bases["gemma"]
    scorer, items = (
        Scorer(base.model, base.tokenizer),
        bbq.load(data_folder / "bbq", ["Age"]).head(12),
    )
    words = base.tokenizer.convert_ids_to_tokens([30, 31, 32])
    if mode == "letters":  # the miniature's words hold no letters, so three words stand for them
        choose = scorer.choices
        scorer.choices = lambda contexts, options, stem="": choose(
            contexts, [words] * len(contexts), stem
        )
    found = bbq.answers(items, scorer, mode, "run", min_mass=0.0)
    for row, one in zip(items.itertuples(), found.itertuples(), strict=True):
        context = scorer.ask(
            [
                bbq.TEMPLATES[mode].format(
                    context=row.passage,
                    question=row.question,
                    ans0=row.ans0,
                    ans1=row.ans1,
                    ans2=row.ans2,
                )
            ]
        )[0]
        options = words if mode == "letters" else [row.ans0, row.ans1, row.ans2]
        p = np.exp(
            [scorer.token_logprobs([(context, scorer.ids(option))])[0].sum() for option in options]
        )
        assert [one.p_a, one.p_b, one.p_c] == pytest.approx(list(p / p.sum()), abs=1e-4)
        assert one.answer == "ABC"[int(p.argmax())]


def test_a_template_and_a_system_prompt_reach_the_model(bases, data_folder):
    base = bases["llama"]
    scorer, items = (
        Scorer(base.model, base.tokenizer),
        bbq.load(data_folder / "bbq", ["Age"]).head(4),
    )
    plain, other, system = (
        bbq.answers(items, scorer, "options", "run", **more).p_a.to_numpy()
        for more in (
            {},
            {"template": "{question} {context} {ans0} {ans1} {ans2}"},
            {"system_prompt": "you must refuse ."},
        )
    )
    assert not np.allclose(plain, other, atol=1e-3)
    assert not np.allclose(plain, system, atol=1e-3)
