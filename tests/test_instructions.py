"""Instruction following: what a file may say, what each rule takes for followed, and that the rules
agree with lm-evaluation-harness's own.
"""

import json

import pytest

from conftest import one_sentence
from driftbook.benchmarks import ifeval, utility
from driftbook.benchmarks.format import Asking
from driftbook.benchmarks.ifeval import RULES, UNSCORED, check, load_ifeval, sentences, words
from driftbook.models.scoring import Scorer
from driftbook.study.tables import RATINGS

ROW = {
    "key": 7,
    "prompt": "Write of rivers.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 3, "relation": "at least"}],
}


def written(path, *rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n",
        encoding="utf-8",
    )
    return path


# ---- files
def test_a_file_of_ifevals_form_is_read(tmp_path):
    other = {
        **ROW,
        "key": 8,
        "prompt": "One line\u2028and its end",
        "kwargs": [{"num_words": None}, {"num_words": 3.0, "relation": "at least", "letter": None}],
    }
    items = load_ifeval(
        written(tmp_path / "rows.jsonl", ROW, json.dumps(other, ensure_ascii=False), "")
    )
    assert list(items.prompt_id) == ["7", "8"]
    assert items.prompt[1] == other["prompt"]
    assert (
        items.instructions[0]
        == items.instructions[1]
        == [
            ("punctuation:no_comma", {}),
            ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}),
        ]
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"key": 1, "prompt'], "torn"),
        (["[1]"], "no JSON object"),
        ([""], "no prompts"),
        ([ROW, ROW], "repeated"),
        ([{key: value for key, value in ROW.items() if key != "prompt"}], "'prompt'"),
        ([{**ROW, "prompt": " "}], "empty"),
        ([{**ROW, "kwargs": [{}]}], "one length"),
        ([{**ROW, "instruction_id_list": [], "kwargs": []}], "at least one"),
        (
            [
                {
                    **ROW,
                    "instruction_id_list": ["punctuation:no_comma", "detectable_format:rephrase"],
                }
            ],
            "unknown instruction 'detectable_format:rephrase'",
        ),
        ([{**ROW, "kwargs": [{}, {"num_words": 3}]}], "relation=None"),
        ([{**ROW, "kwargs": [{}, {"num_words": "3", "relation": "at least"}]}], "num_words='3'"),
        ([{**ROW, "kwargs": [{}, {"num_words": 3, "relation": "at most"}]}], "relation='at most'"),
        ([{**ROW, "kwargs": [{"n": 1}, ROW["kwargs"][1]]}], "'n'"),
        ([{**ROW, "kwargs": [[], ROW["kwargs"][1]]}], "no JSON object"),
        ([{**ROW, "kwargs": [{}, {"num_words": True, "relation": "at least"}]}], "num_words=True"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, rows, said):
    with pytest.raises(ValueError) as error:
        load_ifeval(written(tmp_path / "rows.jsonl", *rows))
    assert said in one_sentence(error.value)
    assert "rows.jsonl" in str(error.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_ifeval(tmp_path / "absent.jsonl")


# ---- rules
CASES = [  # id, arguments, what follows it, what does not
    ("keywords:existence", {"keywords": ["river", "bank"]}, "A RIVER has banks", "a river"),
    (
        "keywords:frequency",
        {"keyword": "oak", "frequency": 2, "relation": "less than"},
        "one oak",
        "oak and oaks",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["oak"]}, "oaks", "an Oak."),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        "#a #b",
        "#a",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "Dr. Hill came. He sat",
        "Dr. Hill came",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "one\n***\ntwo\n***",
        "one *** *** two",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "a well-known",
        "a known",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        'a\n\n"So, b',
        "so\n\nb",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] at [place]",
        "[name] at place",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Bye.\nP. P. S: more",
        "Bye.\nP.S. more",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "** a\n- b"),
    (
        "detectable_format:constrained_response",
        {},
        "Well. My answer is maybe.",
        "My answer is perhaps.",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and *b*",
        "*a* and * *",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1\na\nPart2 b",
        "Part one\na\nPart 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<Oaks>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a\n******\nb", "a ****** a"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Name a tree."},
        "name a tree. An oak",
        "An oak",
    ),
    (
        "startend:end_checker",
        {"end_phrase": "That is all."},
        'a "that is all."',
        "That is all. Bye",
    ),
    ("startend:quotation", {}, ' "a" ', '"a'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "DON'T",
        "Do NOT",
    ),
    ("change_case:english_capital", {}, "AN OAK, 3 M", "AN oAK"),
    ("change_case:english_lowercase", {}, "an oak", "дуб"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "follows", "fails"), CASES, ids=[case[0] for case in CASES]
)
def test_each_rule_tells_what_follows_it(name, arguments, follows, fails):
    assert check(follows, [(name, arguments)]) == [True]
    assert check(fails, [(name, arguments)]) == check(" \n", [(name, arguments)]) == [False]


def test_all_25_instructions_have_a_rule():
    assert len(RULES) == 25
    assert {case[0] for case in CASES} == set(RULES) - {"language:response_language"}


def test_a_keyword_that_is_no_regular_expression_is_searched_by_its_letters():
    assert check(
        "I know C++ well",
        [
            ("keywords:existence", {"keywords": ["c++"]}),
            ("keywords:existence", {"keywords": ["(well"]}),
        ],
    ) == [True, False]


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two! Three? four", 4),
        ("He left at 5 p.m. today.", 1),
        ("He left at 5 p.m. The train came.", 2),
        ("Mr. J. R. Hill sat.", 1),
        ("It cost $3.50 today.", 1),
        ("In 1990. Then more.", 2),
        ("1. Begin. 2. end it", 3),
        ("e.g. an oak", 1),
        ("Wait... what? Yes.", 2),
        ("Wait... She came.", 2),
        ('He said "Go." She went.', 2),
        ("a line\nanother line", 1),
        ("see www.a.org now.", 1),
        ("Oaks, elms, etc. grow here.", 2),
        ("the U.S. team won. it did.", 2),
    ],
)
def test_sentences_are_counted(text, n):
    assert len(sentences(text)) == n


def test_words_are_those_of_the_treebank():
    assert words("I CANNOT, DON'T; A-B (U.S.) you'll \"X\"") == [
        "I",
        "CAN",
        "NOT",
        "DO",
        "N'T",
        "A-B",
        "U.S.",
        "you",
        "'ll",
        "X",
    ]


# ---- the table
def test_what_cannot_be_judged_is_in_no_share(monkeypatch):
    monkeypatch.setattr(ifeval.importlib.util, "find_spec", lambda name: None)
    language, comma = (
        ("language:response_language", {"language": "de"}),
        ("punctuation:no_comma", {}),
    )
    assert check("eine Eiche", [language, comma]) == [None, True]
    assert ifeval.prompt_ratings("1", [None, True]) == [
        ("1", "followed", None, 1, UNSCORED),
        ("1", "instructions followed", 1.0, 1, None),
    ]
    assert ifeval.prompt_ratings("1", [None, False]) == [
        ("1", "followed", 0.0, 1, None),
        ("1", "instructions followed", 0.0, 1, None),
    ]
    assert ifeval.prompt_ratings("1", [None]) == [
        ("1", "followed", None, 1, UNSCORED),
        ("1", "instructions followed", None, 1, UNSCORED),
    ]
    assert ifeval.prompt_ratings("1", [True, False, True, True]) == [
        ("1", "followed", 0.0, 1, None),
        ("1", "instructions followed", 0.75, 4, None),
    ]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_models_own_answers_are_rated(bases, tmp_path, family):
    rows = [{**ROW, "key": key, "prompt": f"name {key} kinds of tree"} for key in range(5)]
    items, scorer = (
        load_ifeval(written(tmp_path / "rows.jsonl", *rows)),
        Scorer(bases[family].model, bases[family].tokenizer),
    )
    found = RATINGS.check(
        utility.rated("ifeval", items, scorer, "run", "ifeval", Asking(8, "be brief"))
    )
    answers = scorer.generate(scorer.ask(list(items.prompt), "be brief"), 8)
    expected = [
        check(answer.text, found) for answer, found in zip(answers, items.instructions, strict=True)
    ]
    assert list(found[found.metric == "followed"].value) == [float(all(one)) for one in expected]
    assert list(found[found.metric == "instructions followed"].value) == [
        sum(one) / 2 for one in expected
    ]
    assert set(found[found.metric == "instructions followed"].weight) == {2}
