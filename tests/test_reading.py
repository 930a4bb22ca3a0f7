"""Files are read as their formats say, numbers compared by value, repeated keys refused."""

import csv
import io
import json
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import one_sentence
from driftbook.benchmarks import data, general_text, gsm8k, hex_phi, reference_answers, summaries
from driftbook.study import reading
from driftbook.study.study_file import Study, load


def refusal(read, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        read(*arguments)
    return one_sentence(error.value)


# ---- numbers
@pytest.mark.parametrize(
    ("response", "final", "right"),
    [
        *(
            (text, "18", True)
            for text in ("$18.00.", "**18**", "18.0", "18%", "€ 18", "+18", "18,")
        ),
        *((text, "18", True) for text in (r"$\boxed{18}$", r"\boxed{\$18}", "18 m^2", "18 cm2")),
        *(
            (text, "18", True)
            for text in ("18 kg/m^{3}", "5-18", "from $5 - $18", "3*6=18", "18th")
        ),
        *((text, "18", False) for text in ("18.01", "180", "0.18", "18 or 19", "1.8", "-18", "")),
        ("5.50", "5.5", True),
        ("1.800", "1.8", True),
        ("1.800", "1800", False),
        *((text, "1,800", True) for text in ("1800", "1{,}800", r"1\,800", "1\u202f800.00")),
        ("1,00,000", "100000", True),
        *((text, "-5", True) for text in ("-5", "$-5", "-$5", "\N{MINUS SIGN}5", "x=-5", "**-5**")),
        *((text, "5", True) for text in ("10-5", "- 5 apples", "No.5", "pre-5")),
        *((text, "2", False) for text in ("1/2", r"\frac{1}{2}", "3:2", "3^2", "3^{2}", "1,2")),
        ("1.800.000", "1800000", False),
        ("0,500", "500", False),
        ("so 1/2.", "1/2", True),
        ("11/2", "1/2", False),
        ("18", "18 dollars", True),
        ("$18.00", "18%", True),
        ("**Food**.", "food", True),
        ("route 66", "route 66", True),
        ("66", "route 66", False),
    ],
)
def test_an_answer_is_right_by_value(response, final, right):
    assert gsm8k.is_correct(response, final) is right


@given(
    value=st.decimals(-(10**7), 10**7, places=2),
    other=st.decimals(-(10**7), 10**7, places=2),
    form=st.sampled_from(("{:f}", "{:,f}", "${:f}", "**{:,f}**", r"\boxed{{{:f}}}", "{:f} euros.")),
)
def test_a_number_is_the_decimal_that_was_written(value, other, form):
    text = "First 12, then " + form.format(value)
    assert gsm8k.last_number(text) == value
    assert gsm8k.is_correct(text, f"{other:f}") is (Decimal(value) == other)


def test_where_both_filters_of_lm_eval_agree_so_do_we():
    from lm_eval.filters.extraction import RegexFilter

    home = Path(find_spec("lm_eval").submodule_search_locations[0])
    task = reading.yaml_value(home / "tasks" / "gsm8k" / "gsm8k.yaml")
    patterns = [one["filter"][0] for one in task["filter_list"]]
    strict, flexible = (
        RegexFilter(one["regex_pattern"], one.get("group_select", 0)) for one in patterns
    )
    responses = [
        f"{words} {number}. #### {number}"
        for words in ("So 3 + 4 is 7, and he has", "It costs $12. That makes -3 and")
        for number in ("18", "1,800", "-5", "7", "0", "1234567")
    ]
    found = [
        one.apply([[text] for text in responses], [{}] * len(responses))
        for one in (strict, flexible)
    ]
    for text, [one], [two] in zip(responses, *found, strict=True):
        assert one == two
        assert gsm8k.last_number(text) == Decimal(one.replace(",", ""))


# ---- JSON
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(rows=st.lists(st.dictionaries(TEXTS, TEXTS), min_size=1, max_size=4))
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_are_what_was_written(tmp_path_factory, rows, end, mark):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = mark + "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    path.write_bytes(text.encode())
    assert [row for _, row in reading.json_lines(path)] == rows


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_no_mark_within_a_text_ends_a_line(tmp_path, content, mark):
    row = {"instruction": "say", "output": f"one{mark}two"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(reference_answers.load_answers(path).answer) == [f"one{mark}two"]
    content["data"]["sft"] |= {"path": str(path), "n": 1}
    assert data.training_examples("sft", Study(**content))[0]["answer"] == f"one{mark}two"


def test_a_torn_or_doubled_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": ')
    assert "a.jsonl: line 3 is torn" in refusal(list, reading.json_lines(path))
    path.write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    assert "line 2: an object has the key 'a' twice" in refusal(list, reading.json_lines(path))
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    assert "line 2 is not UTF-8" in refusal(list, reading.json_lines(path))


# ---- CSV
@given(
    rows=st.lists(st.tuples(TEXTS.filter(str.strip), TEXTS), min_size=1, max_size=4),
    delimiter=st.sampled_from(",;\t"),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_csv_is_what_was_written(tmp_path_factory, rows, delimiter, mark):
    path, out = tmp_path_factory.getbasetemp() / "rows.csv", io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("a", "b"), *rows])
    path.write_bytes((mark + out.getvalue() + "\r\n\r\n").encode())
    assert [tuple(row.values()) for row in reading.csv_rows(path)] == rows


def test_no_text_is_taken_for_a_number_or_for_nothing(tmp_path, content):
    said = ["007", "NA", "None", "null", "18.00", "1e5", "true"]
    path = tmp_path / "a.csv"
    frame = pd.DataFrame({"id": said, "dialogue": said, "summary": said})
    frame.to_csv(path)  # with pandas' column of row numbers
    assert list(summaries.load_summaries(path).answer) == said
    assert list(reading.csv_frame(path).id) == said
    columns = {"prompt": "dialogue", "answer": "summary"}
    content["data"]["sft"] = {"source": "tests:a", "path": str(path), "n": 7, "columns": columns}
    assert {one["answer"] for one in data.training_examples("sft", Study(**content))} == set(said)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3,bread, butter\n", "line 3 has 3 fields and the header has 2"),
        ("a,b\n1\n", "line 2 has 1 fields"),
        ('a,b\n"1\n2",x\n3,"y\n', "the row that begins in line 4 is no CSV"),
        ('a,b\n1,"he said "hi""\n', "line 2 is no CSV"),
        ("a,a\n1,2\n", "column 'a' twice"),
    ],
)
def test_a_row_that_would_lose_something_is_refused(tmp_path, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert words in refusal(reading.csv_rows, path)


# ---- one prompt a line
def test_prompts_of_one_a_line_are_whole(tmp_path):
    path = tmp_path / "category_1.csv"
    said = ["bread, butter and jam", 'say "hi", then go', '"so", two\nlines', "a;b", "ü\u2028x"]
    path.write_bytes(
        "\ufeff".encode()
        + "\r\n".join([*said[:2], '"""so"", two\nlines"', *said[3:], "", ""]).encode()
    )
    assert hex_phi.prompt_lines(path) == said
    pd.Series(said).to_csv(path, index=False, header=False)
    assert hex_phi.prompt_lines(path) == said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,one\n1,two\n", "row number"),
        ("1\tone\n2\ttwo\n3\tthree\n", "row number"),
        ("prompt\none\n", "header"),
        (",prompt\n0,one\n", "header"),
        ('"Prompt";"category"\n', "line 1 begins with a quotation mark"),
        ('one\n"two", he said\n', "line 2 begins with a quotation mark"),
        ('one\n"two\n', "line 2 begins with a quotation mark"),
    ],
)
def test_a_table_where_prompts_are_expected_is_refused(tmp_path, text, words):
    path = tmp_path / "category_1.csv"
    path.write_text(text)
    assert words in refusal(hex_phi.prompt_lines, path)


def test_paragraphs_are_between_blank_lines_of_any_kind(tmp_path):
    path, long = tmp_path / "a.txt", "word " * 50
    path.write_bytes(f"{long}\r\n\r\n{long}\n \n{long}\n\n{long}".encode())  # WikiText's are ' \n'
    assert len(general_text.load_text(path)) == 4


# ---- YAML
def test_a_repeated_key_of_a_study_file_is_named_with_its_lines(content, tmp_path):
    path = tmp_path / "twice.yaml"
    text = yaml.safe_dump(content, sort_keys=False)
    path.write_text(text.replace("methods:\n", "methods:\n  lora: {r: 64}\n", 1))
    lines = [i for i, line in enumerate(path.read_text().splitlines(), 1) if "  lora:" in line][:2]
    said = refusal(load, path)
    assert f"the key methods.lora stands twice, in lines {lines[0]} and {lines[1]}" in said
    path.write_text(text + "seed: 1\n")
    assert "the key seed stands twice" in refusal(load, path)
    path.write_text("grid:\n- {name: a, name: b}\n")
    assert "grid[0].name" in refusal(load, path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a", {"x": 3, "y": 2}),
        ("a: &a {x: 1}\nd: &d {<<: *a, x: 2}\nb: {<<: [*d, *a], z: 1}", {"x": 2, "z": 1}),
        ("b: {1: a, '1': b}", {1: "a", "1": "b"}),
        ("b: {<<: {x: 1}, <<: {y: 2}}", None),
        ("b: {true: 1, yes: 2}", None),
        ("b: {1: 1, 0x1: 2}", None),
    ],
)
def test_merges_are_no_repetition_and_equal_keys_are(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    if value is None:
        assert "twice" in refusal(reading.yaml_value, path)
    else:
        assert reading.yaml_value(path) == yaml.safe_load(text)
        assert reading.yaml_value(path)["b"] == value


def test_no_sentence_shows_the_text_of_a_prompt(tmp_path):
    """Where a header is missing or columns are swapped, a text stands where a column would."""
    from driftbook.benchmarks import general_text, own_prompts, summaries
    from driftbook.study.reading import csv_frame, json_rows

    text = "floop the glark and blorp it over and over"
    (tmp_path / "no header.csv").write_text(f"a,{text}\nb,{text} again\n")
    (tmp_path / "twice.csv").write_text(f"{text},{text}\n")
    (tmp_path / "swapped.csv").write_text(f"prompt_id,category,kind\n{text},a,{text}\n")
    (tmp_path / "twice.json").write_text(f'[{{"{text}": 1, "{text}": 2}}]')
    (tmp_path / "turns.json").write_text("[]")
    for read, name in (
        (general_text.GENERAL_TEXT.read, "no header.csv"),
        (summaries.SUMMARIES.read, "no header.csv"),
        (csv_frame, "twice.csv"),
        (json_rows, "twice.json"),
        (lambda path: list(own_prompts.OWN_PROMPTS.read(path)), "swapped.csv"),
    ):
        said = refusal(read, tmp_path / name)
        assert "glark" not in said
        assert f"a text of {len(text)} characters" in said


def test_what_is_nested_too_deeply_or_stands_for_too_much_is_refused(tmp_path):
    from driftbook.study.files import read_json, read_object
    from driftbook.study.reading import json_value, yaml_value

    (tmp_path / "a.json").write_text("[" * 100_000)
    (tmp_path / "b.json").write_text("null")
    (tmp_path / "c.yaml").write_text("[" * 5_000 + "]" * 5_000)
    (tmp_path / "d.yaml").write_text("a: &a [*a]")
    grown = "".join(f"{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
    (tmp_path / "e.yaml").write_text(f"0: &x0 [1, 1]\n{grown}")
    for read, name, words in (
        (read_json, "a.json", "damaged"),
        (json_value, "a.json", "torn or no JSON"),
        (read_object, "b.json", "no object"),
        (yaml_value, "c.yaml", "nested too deeply"),
        (yaml_value, "d.yaml", "nested too deeply"),
        (yaml_value, "e.yaml", "aliases that stand for"),
    ):
        assert words in refusal(read, tmp_path / name)
