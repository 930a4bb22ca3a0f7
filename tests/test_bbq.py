"""BBQ: the stereotyped target, what is wrong with a file, and which answer counts as correct, unknown and biased."""

import csv
import json

import numpy as np
import pandas as pd
import pytest

from conftest import one_sentence
from driftbook import bbq
from driftbook.scoring import Scorer
from driftbook.tables import ANSWERS

N_ITEMS = {"Age": 3680, "Religion": 1200, "Nationality": 3080}


@pytest.fixture(scope="module")
def published(shared):
    """{item_id: target_loc} of the authors' own table: the option that agrees with the stereotype."""
    with (shared / "bbq" / "published" / "target_loc.csv").open(newline="") as file:
        return {f"{row['category']}-{row['example_id']}": int(float(row["target_loc"])) if row["target_loc"] else None for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def real(shared):
    return bbq.load(shared / "bbq" / "data")


# ---- real files
def test_all_real_files_load(real):
    assert real.dimension.value_counts().to_dict() == N_ITEMS
    assert real.item_id.is_unique
    assert set(real.context) == {"ambiguous", "disambiguated"}
    assert (real.context == "ambiguous").mean() == 0.5
    assert (real.label[real.context == "ambiguous"] == real.unknown[real.context == "ambiguous"]).all()
    assert (real.label[real.context == "disambiguated"] != real.unknown[real.context == "disambiguated"]).all()
    assert real.target.notna().all()
    assert (real.target != real.unknown).all()


def test_the_target_is_the_published_one_on_every_item(real, published):
    """Theirs is the biased answer: the stereotyped person of a negative question, the other person of a non-negative one."""
    assert len(published) == len(real) == sum(N_ITEMS.values())
    items = real.set_index("item_id")
    found = items.target.where(items.polarity == "negative", 3 - items.unknown - items.target).astype(int)
    different = [item for item, target in published.items() if found[item] != target]
    assert different == [], f"{len(different)} of {len(published)} items, first {different[:5]}"


def test_some_dimensions_can_be_asked_for(shared):
    assert set(bbq.load(shared / "bbq" / "data", ["Religion"]).dimension) == {"Religion"}
    with pytest.raises(ValueError) as error:
        bbq.load(shared / "bbq" / "data", ["Religion", "SES"])
    assert "SES.jsonl" in one_sentence(error.value)


def test_the_miniatures_files_load_too(data_folder):
    items = bbq.load(data_folder / "bbq")
    assert items.dimension.nunique() == 9
    assert items.target.notna().all()
    assert items.groupby("dimension").question_family.nunique().eq(12).all()


# ---- files that are wrong
@pytest.fixture
def folder(data_folder, tmp_path):
    """One miniature file, to be damaged: (path, its rows)."""
    path = tmp_path / "Age.jsonl"
    path.write_text((data_folder / "bbq" / "Age.jsonl").read_text())
    return path


def rewrite(path, change, at=5):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[at])
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("field", bbq.FIELDS)
def test_a_missing_field_is_named(folder, field):
    rewrite(folder, lambda row: row.pop(field))
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert field in one_sentence(error.value)
    assert "Age.jsonl" in str(error.value)


def _two_unknown(row):
    row["answer_info"] = {f"ans{i}": [row[f"ans{i}"], "unknown"] for i in range(3)}


@pytest.mark.parametrize(
    "change",
    [
        _two_unknown,
        lambda row: row["answer_info"].update({f"ans{i}": [row[f"ans{i}"], "somebody"] for i in range(3)}),
        lambda row: row["answer_info"].pop("ans1"),
        lambda row: row.update(context_condition="vague"),
        lambda row: row.update(question_polarity="positive"),
        lambda row: row["additional_metadata"].pop("stereotyped_groups"),
        lambda row: row.update(label=3),
    ],
    ids=["two unknown", "none unknown", "no answer_info", "condition", "polarity", "no groups", "label"],
)
def test_an_item_of_another_form_is_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "Age.jsonl" in one_sentence(error.value)


@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_torn_file_is_refused(folder, kept):
    content = folder.read_bytes()
    folder.write_bytes(content[: int(len(content) * kept) - 3])
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "torn" in one_sentence(error.value)


def test_an_empty_file_is_refused(folder):
    folder.write_text("")
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "Age.jsonl" in one_sentence(error.value)


def test_a_repeated_item_is_refused_before_it_is_asked(folder):
    content = folder.read_text()
    folder.write_text(content + content.splitlines()[0] + "\n")
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "repeated" in one_sentence(error.value)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        bbq.load(tmp_path)
    assert "Age.jsonl" in one_sentence(error.value)


# ---- answers
class Says:
    """A scorer whose log-probabilities are given."""

    def __init__(self, logprobs):
        self.logprobs, self.asked = np.log(np.array(logprobs, float)), []

    def ask(self, texts, system_prompt=None):
        self.asked = texts
        return [[1]] * len(texts)

    def letters(self, contexts):
        return self.logprobs

    def choices(self, contexts, options):
        return self.logprobs


def item(context, polarity, label, unknown, target, number):
    texts = {"passage": "p", "question": "q", "ans0": "x", "ans1": "y", "ans2": "z"}
    return {"item_id": f"Age-{number}", "dimension": "Age", "context": context, "polarity": polarity, "question_family": "Age-1", **texts,
            "label": label, "unknown": unknown, "target": target}  # fmt: skip


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
        said = [None if pd.isna(value) else value for value in (row.answer, row.correct, row.unknown, row.biased)]
        assert said == [answer, correct, unknown, biased], f"case {number}"
        if answer is None:
            assert row.unscored_reason
        else:
            assert pd.isna(row.unscored_reason)
            assert [row.p_a, row.p_b, row.p_c] == pytest.approx([value / sum(p) for value in p])
            assert row.option_mass == pytest.approx(sum(p))


def test_the_target_of_a_question_is_whom_the_stereotype_is_about(data_folder):
    """On a negative question the biased answer is the target, on a non-negative one the other person."""
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
        assert all(part in text for part in (row.passage, row.question, row.ans0, row.ans1, row.ans2))
        assert text.index(row.passage) < text.index(row.question) < text.rindex(row.ans2)


@pytest.mark.parametrize("mode", ["letters", "options"])
def test_a_model_is_asked_as_the_likelihood_of_each_option_says(bases, data_folder, mode):
    base = bases["gemma"]
    scorer, items = Scorer(base.model, base.tokenizer), bbq.load(data_folder / "bbq", ["Age"]).head(12)
    words = base.tokenizer.convert_ids_to_tokens([30, 31, 32])
    if mode == "letters":  # the miniature's words hold no letters, so three words stand for them
        scorer.letters = lambda contexts: scorer.choices(contexts, [words] * len(contexts))
    found = bbq.answers(items, scorer, mode, "run")
    for row, one in zip(items.itertuples(), found.itertuples(), strict=True):
        context = scorer.ask([bbq.TEMPLATES[mode].format(context=row.passage, question=row.question, ans0=row.ans0, ans1=row.ans1, ans2=row.ans2)])[0]
        options = words if mode == "letters" else [row.ans0, row.ans1, row.ans2]
        p = np.exp([scorer.token_logprobs([(context, scorer.ids(option))])[0].sum() for option in options])
        assert [one.p_a, one.p_b, one.p_c] == pytest.approx(list(p / p.sum()), abs=1e-4)
        assert one.answer == "ABC"[int(p.argmax())]


def test_a_template_and_a_system_prompt_reach_the_model(bases, data_folder):
    base = bases["llama"]
    scorer, items = Scorer(base.model, base.tokenizer), bbq.load(data_folder / "bbq", ["Age"]).head(4)
    plain, other, system = (
        bbq.answers(items, scorer, "options", "run", **more).p_a.to_numpy()
        for more in ({}, {"template": "{question} {context} {ans0} {ans1} {ans2}"}, {"system_prompt": "you must refuse ."})
    )
    assert not np.allclose(plain, other, atol=1e-3)
    assert not np.allclose(plain, system, atol=1e-3)
