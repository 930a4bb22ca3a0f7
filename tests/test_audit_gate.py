"""Exit statuses of an audit, from FAIL_IF and from its words."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audited import MANY, item, record, verdict
from conftest import one_sentence
from driftbook.publishing.audit_gate import FAIL, PASS, UNDECIDED, bounds, gate, parse_gate
from driftbook.publishing.audit_record import AREAS, checked_audit, read_audit

POINTS = st.floats(-100, 100)
SORTED = st.tuples(POINTS, POINTS).map(sorted)


def status_of(fail_if: str, **row) -> int:
    return gate(record([verdict(**row)]), parse_gate(fail_if))[0]


# ---- conditions
def test_conditions_are_read():
    found = parse_gate(" safety < -3 , bias_ambiguous>5,utility<\N{MINUS SIGN}1.5")
    assert [*map(str, found)] == ["safety<-3", "bias_ambiguous>5", "utility<-1.5"]


def test_a_name_with_commas_and_signs_of_its_own_is_read():
    names = ["bbq (order=ABC, mode=options)", "bbq", "mmlu<5-shot"]
    found = parse_gate("bbq (order=ABC, mode=options)<-2,mmlu<5-shot<-1,bbq>4", names)
    assert [(one.area, one.sign, one.limit) for one in found] == [
        (names[0], "<", -2),
        (names[2], "<", -1),
        (names[1], ">", 4),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "FAIL_IF is empty"),
        ("  ", "FAIL_IF is empty"),
        ("saftey<-3", "names no area in 'saftey<-3'"),
        ("safety", "has no sign"),
        ("safety=3", "names no area"),
        ("safety<", "no number"),
        ("safety<low", "no number"),
        ("safety<nan", "no number"),
        ("safety>inf", "no number"),
        ("safety<1_0", "no number"),
        ("safety<-3,", "ends in a comma"),
        ("safety<-3,,utility<1", "names no area"),
        ("safety<-3;utility<-3", "no number"),
        ("x" * 5000, "names no area"),
    ],
)
def test_a_condition_that_cannot_be_read_is_said_in_a_sentence(text, said):
    with pytest.raises(ValueError) as error:
        parse_gate(text)
    assert said in one_sentence(error.value)


# ---- the law of an interval
@given(SORTED, POINTS, st.sampled_from("<>"))
@example([-9.0, -3.0], -3.0, "<")
@example([3.0, 9.0], 3.0, ">")
@example([-3.0, -3.0], -3.0, "<")
@example([-3.0, -3.0], -3.0, ">")
def test_a_condition_tests_the_whole_interval(ends, limit, sign):
    low, high = ends
    found = status_of(f"safety{sign}{limit!r}", low=low, high=high)
    inside = [one < limit if sign == "<" else one > limit for one in ends]
    assert found == (FAIL if all(inside) else UNDECIDED if any(inside) else PASS)


@given(SORTED, POINTS, POINTS)
def test_a_wider_region_never_passes_more(ends, one, other):
    rank = {PASS: 0, UNDECIDED: 1, FAIL: 2}
    small, large = sorted((one, other))
    interval = dict(zip(("low", "high"), ends, strict=True))
    narrow, wide = (rank[status_of(f"safety<{at!r}", **interval)] for at in (small, large))
    assert narrow <= wide
    wide, narrow = (rank[status_of(f"safety>{at!r}", **interval)] for at in (small, large))
    assert narrow <= wide


@given(st.lists(st.sampled_from([(-9, -5), (-4, 1), (-2, 3)]), min_size=1, max_size=5))
def test_any_failure_counts_before_any_doubt(intervals):
    rows = [
        verdict(area, low=low, high=high)
        for area, (low, high) in zip(AREAS, intervals, strict=False)
    ]
    text = ",".join(f"{row['area']}<-3" for row in rows)
    single = [status_of(f"{row['area']}<-3", **row) for row in rows]
    status, sentences = gate(record(rows), parse_gate(text))
    assert status == (FAIL if FAIL in single else UNDECIDED if UNDECIDED in single else PASS)
    assert len(sentences) == len(rows)


def test_what_is_not_known_cannot_be_told():
    made = record([verdict(low=None, high=None)])
    status, (sentence,) = gate(made, parse_gate("safety<-3"))
    assert (status, "no interval" in sentence) == (UNDECIDED, True)
    status, (sentence,) = gate(made, parse_gate("utility<-3"))
    assert status == UNDECIDED
    assert "did not ask about utility" in sentence
    assert status_of("safety<-3", low=None, high=-4) == FAIL  # its other end cannot change it
    assert status_of("safety<-3", low=None, high=4) == UNDECIDED
    assert gate(record([]))[0] == UNDECIDED


def test_every_benchmark_of_an_area_counts():
    rows = [verdict(benchmark="one"), verdict(benchmark="two", low=-20, high=-10)]
    status, sentences = gate(record(rows), parse_gate("safety<-3"))
    assert status == FAIL
    assert ["(one)" in sentences[0], "(two)" in sentences[1]] == [True, True]


def test_a_doubt_says_how_many_prompts_could_tell():
    row = verdict(difference=-1.0, low=-5.0, high=3.0)
    _, (sentence,) = gate(record([row]), parse_gate("safety<-3"))
    assert "about 400 prompts" in sentence  # half as wide an interval takes four times as many
    assert status_of("safety<-3", difference=-1.0, low=-3.0, high=1.0, n_items=4 * MANY) == PASS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["better", "no worse by the margin"], PASS),
        (["better", "cannot tell"], UNDECIDED),
        (["worse", "cannot tell"], FAIL),
        (["a word of another version"], UNDECIDED),
    ],
)
def test_without_conditions_the_words_decide(words, expected):
    rows = [verdict(area, word=word) for area, word in zip(AREAS, words, strict=False)]
    assert gate(record(rows))[0] == expected


# ---- files
def test_a_record_is_read_and_anything_else_is_said_in_a_sentence(tmp_path):
    good = tmp_path / "audit.json"
    good.write_text(json.dumps(record()))
    assert read_audit(good) == record()
    lacks = {name: value for name, value in record().items() if name != "items"}
    cases = {
        "is no file": None,
        "is damaged": good.read_text()[:200],
        "is no record of an audit": json.dumps({"results": {}}),
        "'driftbook audit 0'": json.dumps(record(format="driftbook audit 0")),
        "lacks its items": json.dumps(lacks),
        "lacks its made": json.dumps(record(made=None)),
        "lacks its area of each row": json.dumps(record([{"word": "worse"}])),
        "lacks its word of each verdict": json.dumps(record([{"area": "safety"}])),
        "git-lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }
    for number, (said, text) in enumerate(cases.items()):
        path = tmp_path / f"{number}.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError) as error:
            read_audit(path)
        assert said in one_sentence(error.value)
    with pytest.raises(ValueError, match="no record"):
        checked_audit([1])


def test_unscored_answers_count_at_their_worst():
    """By hand: of 200 prompts 100 are known to have moved by -1 to 1 points; the others, by at most
    100 points either way.
    """
    row = verdict(low=-1.0, high=1.0, n_items=100, n_unscored=100)
    assert bounds(row, []) == (-50.5, 50.5)
    status, (sentence,) = gate(record([row]), parse_gate("safety<-3"))
    assert status == UNDECIDED
    assert "with 100 unscored answers at their worst" in sentence
    assert status_of("safety<-3", low=-60.0, high=-50.0, n_items=90, n_unscored=10) == FAIL
    bias = verdict("bias_ambiguous", low=-1.0, high=1.0, n_items=100, n_unscored=100)
    assert bounds(bias, []) == (-100.5, 100.5)  # its scale runs from -100 to 100
    assert bounds(verdict(low=None, high=None, n_items=0, n_unscored=9), []) == (None, None)


def test_an_answer_beside_a_known_one_is_only_so_far_from_it():
    """A safe answer of the base can only be matched: silence on harmful prompts saves nobody."""
    row = verdict(low=-30.0, high=-10.0, n_items=50, n_unscored=50)
    items = [item("safety", at, 1.0, None) for at in range(50)]
    assert bounds(row, items) == (-65.0, -5.0)
    assert gate(record([row], items), parse_gate("safety<-3"))[0] == FAIL
    other = [item("safety", at, None, 1.0) for at in range(50)]
    assert bounds(row, other) == (-15.0, 45.0)
    elsewhere = [item("utility", at, 1.0, None) for at in range(50)]
    assert bounds(row, elsewhere) == (-65.0, 45.0)
