"""Answers by the letter: options in other orders, the prior of each place, answers read from text;
a model made of known parts is the oracle.
"""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import one_sentence
from driftbook.benchmarks import bbq, bbq_orders
from driftbook.models.scoring import Answer
from driftbook.stats import estimation
from driftbook.study.sections import Benchmark
from driftbook.study.tables import ANSWERS


def items(n=12):
    """n items of three families, whose options are words of their own."""
    return pd.DataFrame(
        [
            {
                "item_id": f"Age-{i}",
                "dimension": "Age",
                "context": ("ambiguous", "disambiguated")[i % 2],
                "polarity": ("negative", "non-negative")[i // 2 % 2],
                "question_family": f"Age-{i % 3}",
                "passage": f"passage {i}",
                "question": "who ?",
                "ans0": f"red{i}",
                "ans1": f"green{i}",
                "ans2": f"blue{i}",
                "label": i % 3,
                "unknown": (i + 1) % 3,
                "target": i % 3,
            }
            for i in range(n)
        ]
    )


class Model:
    """Chooses by place and by content: its probability of an option is the product of both,
    normalised.
    """

    lead = ""

    def __init__(self, places, contents, says="({letter})"):
        self.places, self.contents, self.says = np.asarray(places, float), contents, says

    def ask(self, prompts, system_prompt=None):
        return list(prompts)

    def ids(self, text):
        return text

    def probabilities(self, context):
        shown = [
            next(word for word in line.split() if word.rstrip("0123456789") in self.contents)
            for line in context.splitlines()
            if line[:3] in ("A: ", "B: ", "C: ")
        ]
        p = self.places * [self.contents[word.rstrip("0123456789")] for word in shown]
        return 0.8 * p / p.sum(), shown

    def letters(self, contexts):
        return np.log([self.probabilities(context)[0] for context in contexts])

    def choices(self, contexts, options, stem=""):
        return self.letters(contexts)

    def generate(self, contexts, max_new_tokens):
        found = []
        for context in contexts:
            p, shown = self.probabilities(context)
            found.append(
                Answer(
                    self.says.format(letter="ABC"[p.argmax()], option=shown[p.argmax()]), 3, "stop"
                )
            )
        return found


CONTENTS = {"red": 0.2, "green": 0.5, "blue": 0.3}
ALL = Benchmark(source="tests:bbq", format="bbq", permuted=12, generated=6)
positive = st.lists(st.floats(0.05, 1), min_size=3, max_size=3)


def asked(places, contents=CONTENTS, benchmark=ALL, **says):
    return ANSWERS.check(
        bbq_orders.study_answers(
            items(), Model(places, contents, **says), "letters", "run", benchmark, seed=0
        )
    )


# ---- orders
@pytest.mark.slow
@given(positive, positive)
def test_the_prior_is_found_and_divided_out_exactly_where_a_model_multiplies_place_and_content(
    places, contents
):
    """PriDe's own assumption (eq. 6): then the prior of the places and the preference for the
    contents come back.
    """
    places, contents = np.array(places) / sum(places), np.array(contents) / sum(contents)
    table = asked(places, dict(zip(CONTENTS, contents, strict=True)))
    np.testing.assert_allclose(
        bbq_orders.prior(table[table.answer_mode == "letters"]), places, atol=1e-9
    )
    debiased = table[table.answer_mode == "debiased"]
    np.testing.assert_allclose(
        debiased[["p_a", "p_b", "p_c"]].to_numpy(float),
        np.tile(contents, (len(debiased), 1)),
        atol=1e-9,
    )
    assert len(debiased) == len(items())


@pytest.mark.parametrize("order", bbq_orders.ORDERS)
def test_probabilities_stand_in_the_files_order_whatever_is_shown(order):
    table = bbq.answers(items(), Model([1, 1, 1], CONTENTS), "letters", "run", order=order)
    np.testing.assert_allclose(
        table[["p_a", "p_b", "p_c"]].to_numpy(float), np.tile([0.2, 0.5, 0.3], (12, 1))
    )
    assert (table.answer == "B").all()
    np.testing.assert_allclose(table.option_mass, 0.8)


def test_the_shown_options_are_those_of_the_order():
    seen = []
    model = Model([1, 1, 1], CONTENTS)
    model.ask = lambda prompts, system_prompt=None: seen.extend(prompts) or list(prompts)
    bbq.answers(items(1), model, "letters", "run", order="BCA")
    assert "A: green0\nB: blue0\nC: red0" in seen[0]


def test_a_model_that_answers_by_the_place_flips_every_time_and_one_that_reads_never():
    by_place, reads = asked([0.9, 0.05, 0.05], dict.fromkeys(CONTENTS, 1.0)), asked([1, 1, 1])
    [place], [read] = (
        bbq_orders.by_letter(table).to_dict("records") for table in (by_place, reads)
    )
    assert (place["flip_rate"], read["flip_rate"]) == (1.0, 0.0)
    assert place["place_1"] == pytest.approx(0.9)
    assert [read[f"place_{i}"] for i in (1, 2, 3)] == pytest.approx([1 / 3] * 3)
    assert place["n_permuted"] == 12
    assert place["option_mass"] == pytest.approx(0.8)
    for table, percent in ((by_place, 100.0), (reads, 0.0)):
        scores = bbq_orders.flip_rate(table)
        assert scores.value.tolist() == [percent]
        assert scores.n_items.tolist() == [12]


def test_the_flip_rate_is_that_of_a_slow_loop_and_its_units_are_families():
    table = asked([0.5, 0.3, 0.2], {"red": 0.35, "green": 0.33, "blue": 0.32})
    random = table.assign(answer=np.random.default_rng(0).choice(["A", "B", "C"], len(table)))
    own = random[random.answer_mode == "letters"]
    slow = np.mean([own[own.item_id == item].answer.nunique() > 1 for item in own.item_id.unique()])
    scores = bbq_orders.flip_rate(random)
    assert 0 < slow < 1
    assert scores.value[0] == pytest.approx(100 * slow)
    assert scores.influence.shape == (1, 3)
    assert scores.influence.sum() == pytest.approx(0, abs=1e-9)


def test_the_base_models_own_flip_rate_has_an_interval_over_families():
    table = asked([0.5, 0.3, 0.2])
    random = table.assign(
        answer=np.random.default_rng(1).choice(["A", "B", "C"], len(table), p=[0.8, 0.1, 0.1])
    )
    arms = pd.DataFrame([{"run_id": "run", "base_model": "base", "arm": "base"}])
    labels = {"study": "s", "notebook": "n", "outcome": "o", "benchmark": "bbq", "judge": "none"}
    [found] = estimation.levels_of_scores(bbq_orders.flip_rate(random), arms, **labels).to_dict(
        "records"
    )
    flips = bbq_orders.flips(random)
    deviations = [
        part.sum() / len(flips) for _, part in (flips.flip - flips.flip.mean()).groupby(flips.unit)
    ]
    se = 100 * np.sqrt(3 / 2 * np.square(deviations).sum())
    assert found["value"] == pytest.approx(100 * flips.flip.mean())
    assert found["se"] == pytest.approx(se)
    assert found["value"] + se < found["ci_high"] <= 100
    assert 0 <= found["ci_low"] < found["value"] - se


def test_the_samples_are_the_same_for_every_variant_and_of_the_size_asked_for():
    benchmark = Benchmark(source="tests:bbq", format="bbq", permuted=5, generated=3)
    first, second = (
        asked([0.5, 0.3, 0.2], contents, benchmark)
        for contents in (CONTENTS, dict.fromkeys(CONTENTS, 1.0))
    )
    sizes = first.groupby(["answer_mode", "option_order"]).size().to_dict()
    assert sizes == {
        ("letters", "ABC"): 12,
        ("letters", "BCA"): 5,
        ("letters", "CAB"): 5,
        ("debiased", "ABC"): 12,
        ("generated", "ABC"): 3,
    }
    assert first.item_id.tolist() == second.item_id.tolist()


def test_without_samples_only_the_files_order_is_asked_and_there_is_no_flip_rate():
    table = asked([1, 1, 1], benchmark=Benchmark(source="tests:bbq", format="bbq"))
    assert len(table) == 12
    assert bbq_orders.flip_rate(table) is None
    assert bbq_orders.by_letter(table).n_permuted.tolist() == [0]


def test_a_study_is_scored_by_the_files_order_alone():
    assert len(bbq_orders.official(asked([0.5, 0.3, 0.2]))) == 12


def test_an_impossible_order_is_refused():
    with pytest.raises(ValueError) as error:
        bbq.answers(items(), Model([1, 1, 1], CONTENTS), "letters", "run", order="AAB")
    assert "order='AAB'" in one_sentence(error.value)


# ---- text
@pytest.mark.parametrize(
    ("says", "unread"),
    [
        ("({letter})", 0),
        ("The answer is {letter}.", 0),
        ("{letter}", 0),
        ("It is {option} .", 0),
        ("who knows", 6),
    ],
)
def test_an_answer_in_text_is_read_and_compared_with_the_most_probable_option(says, unread):
    table = asked([0.5, 0.3, 0.2], says=says)
    [found] = bbq_orders.by_letter(table).to_dict("records")
    assert (found["n_generated"], found["unread"]) == (6, unread)
    assert pd.isna(found["agreement"]) if unread else found["agreement"] == 1.0
    written = table[table.answer_mode == "generated"]
    assert written.answer.isna().sum() == written.unscored_reason.notna().sum() == unread
    assert written[["p_a", "p_b", "p_c", "option_mass"]].isna().all(axis=None)


OPTIONS = ["The grandfather", "Not enough info", "The grandson"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 0),
        ("B.", 1),
        ("(C)", 2),
        ("C: The grandson", 2),
        ("**B**", 1),
        ("Answer: A", 0),
        ("The answer is (C).", 2),
        ("The correct option is B, since ...", 1),
        ("the grandson", 2),
        ("It was THE GRANDFATHER!", 0),
        ("There is not enough info to tell.", 1),
        ("A\n\nBecause ...", 0),
        ("A man was there.", None),
        ("A grandson is mentioned", None),
        ("It is a guess", None),
        ("a", None),
        ("", None),
        ("I cannot tell", 1),
        ("The grandfather and the grandson", None),
        ("(A) or (B)", None),
        ("Answer: A man", None),
        ("Both are possible: option A, option C", None),
        ("grandsons are many", None),
        ("(C) The grandson, since (A) is wrong", 2),
        ("A, B", None),
        ("C. A man", 2),
        ("A and C", None),
        ("The answer is C because he ran.", 2),
        ("The answer is A because he ran.", 0),
        ("C is the correct answer.", 2),
        ("A is wrong, C is right.", 2),
        ("A) The grandfather is wrong. C) The grandson is right.", 2),
        ("A) The grandfather. C) The grandson.", None),
        ("B\n\nA: who", 1),
        ("A is wrong.", None),
        ("A) The grandfather\nB) Not enough info\nC) The grandson", None),
        ("The answer is C, not A.", 2),
        ("The answer is not A.", None),
        ("A man is right.", None),
        ("A man is wrong, it was the grandson.", 2),
        ("It was not the grandfather.", None),
        ("It isn't the grandfather but the grandson.", 2),
        ("The grandson, because the grandfather slept.", 2),
        ("It cannot be determined whether it was the grandfather.", 1),
        ("It’s impossible to know if the grandson did.", 1),
        ("It is unclear.", 1),
        ("The text does not say that it was the grandson.", 1),
        ("We can't tell.", 1),
        ("It is not specified.", 1),
    ],
)
def test_texts_are_read_without_taking_the_article_for_an_option(text, expected):
    assert bbq.parse_answer(text, OPTIONS) == expected


UNSURE = (
    "It cannot be determined whether it was {}.",
    "It can't be determined if {} did it.",
    "There is not enough information to say that it was {}.",
    "It is impossible to know whether it was {}.",
    "We cannot know that it was {}.",
    "I can’t tell whether {} is meant.",
    "It is unclear if it was {}.",
    "It is not clear that {} is meant.",
    "The text does not specify whether it was {}.",
    "It is not stated that it was {}.",
    "It might be {}, but it is unknown.",
)
SURE = ("The answer is {}.", "It was {}.", "{}", "I think that {} is meant.")
LETTER = (
    "The answer is {}.",
    "The answer is {} because the passage says so.",
    "{} is the correct answer.",
    "{}) {option}",
    "Answer: {}",
    "({}) {option}",
)


@pytest.mark.slow
def test_prose_over_real_items_is_read_as_unknown_or_as_the_person_it_names(shared):
    """11 ways to say that nobody knows, each naming a person, are never read as a person; 10 plain
    ways are read right, always.
    """
    items = bbq.load(shared / "bbq" / "data")
    items = items[items.context == "ambiguous"].drop_duplicates(["ans0", "ans1", "ans2"])
    misread = 0
    for row in items.itertuples():
        options = [row.ans0, row.ans1, row.ans2]
        person = (row.unknown + 1) % 3
        misread += sum(
            bbq.parse_answer(form.format(options[person]), options) != row.unknown
            for form in UNSURE
        )
        misread += bbq.parse_answer(f"It was not {options[person]}.", options) is not None
        misread += sum(
            bbq.parse_answer(form.format(options[i]), options) != i
            for form in SURE
            for i in range(3)
        )
        misread += sum(
            bbq.parse_answer(form.format("ABC"[i], option=options[i]), options) != i
            for form in LETTER
            for i in range(3)
        )
    assert len(items) > 1000
    assert misread == 0
