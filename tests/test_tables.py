"""Tables: what is written is read again; what does not fit the declaration, or is torn, is refused
in one sentence.
"""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import one_sentence
from driftbook.study.tables import CURVES, RATES, RESPONSES, RUNS, TABLES, VERDICTS

VALUES = {
    "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    "real": st.floats(allow_nan=False, allow_infinity=False),
    "whole": st.integers(-(2**53), 2**53),
    "truth": st.booleans(),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def frame_of(table, n=3, null=False) -> pd.DataFrame:
    """Rows that fit the table; with `null` everything that may be null is."""
    made = {
        "text": lambda i: f"täxt {i} \n 日本",
        "real": lambda i: i / 3,
        "whole": lambda i: i,
        "truth": lambda i: i % 2 == 0,
    }
    return pd.DataFrame(
        {
            name: [None if null and column.nullable else made[column.kind](i) for i in range(n)]
            for name, column in table.columns.items()
        }
    )


@every_table
@pytest.mark.parametrize("null", [False, True])
def test_what_is_written_is_read_again(table, tmp_path, null):
    frame = frame_of(table, null=null)
    path = table.write(frame, tmp_path)
    assert path == tmp_path / f"{table.name}.parquet"
    pd.testing.assert_frame_equal(table.read(tmp_path), table.check(frame))
    pd.testing.assert_frame_equal(table.read_all([path]), table.check(frame))
    assert list(tmp_path.iterdir()) == [path], "no half-written file stays behind"


@every_table
def test_any_values_survive(table, tmp_path):
    rows = st.fixed_dictionaries(
        {
            name: VALUES[column.kind] if not column.nullable else st.none() | VALUES[column.kind]
            for name, column in table.columns.items()
        }
    )

    @hypothesis_settings(max_examples=5, deadline=None)
    @given(
        st.lists(
            rows,
            min_size=0,
            max_size=4,
            unique_by=lambda row: tuple(row[name] for name in table.key),
        )
    )
    def property(rows):
        frame = pd.DataFrame(rows, columns=list(table.columns), dtype=object)
        table.write(frame, tmp_path)
        found = table.read(tmp_path)
        for name in table.columns:
            assert [None if pd.isna(value) else value for value in found[name]] == list(frame[name])

    property()


@every_table
def test_the_declaration_is_sound(table):
    assert set(table.key) <= set(table.columns)
    for name in table.key:
        # null where a test has none, or a probe is of no layer
        assert not table.columns[name].nullable or name in ("margin", "layer")
        assert not table.columns[name].volatile
    assert all(column.meaning for column in table.columns.values())
    assert list(table.empty().columns) == list(table.columns)


@every_table
def test_missing_and_undeclared_columns_are_refused(table, tmp_path):
    name = list(table.columns)[-1]
    with pytest.raises(ValueError) as error:
        table.write(frame_of(table).drop(columns=name), tmp_path)
    assert name in one_sentence(error.value)
    with pytest.raises(ValueError) as error:
        table.write(frame_of(table).assign(more=1), tmp_path)
    assert "more" in one_sentence(error.value)
    assert not list(tmp_path.iterdir())


@every_table
def test_undeclared_nulls_are_refused(table, tmp_path):
    for name, column in table.columns.items():
        frame = frame_of(table)
        frame[name] = [None, *frame[name].iloc[1:]]
        if column.nullable:
            assert table.check(frame)[name].isna().sum() == 1
        else:
            with pytest.raises(ValueError) as error:
                table.write(frame, tmp_path)
            assert name in one_sentence(error.value)


@every_table
def test_repeated_keys_are_refused(table, tmp_path):
    frame = frame_of(table)
    with pytest.raises(ValueError) as error:
        table.write(pd.concat([frame, frame.iloc[[1]]]), tmp_path)
    assert "repeated" in one_sentence(str(error.value).replace("\\n", " "))
    for path in ("one", "two"):
        table.write(frame, tmp_path / path)
    with pytest.raises(ValueError, match="repeated"):
        table.read_all([table.path(tmp_path / "one"), table.path(tmp_path / "two")])


def test_values_of_another_kind_are_refused(tmp_path):
    for column, value in (("k", "many"), ("n", 1.5), ("n", float("inf"))):
        with pytest.raises(ValueError) as error:
            RATES.write(frame_of(RATES).assign(**{column: value}), tmp_path)
        one_sentence(error.value)
    with pytest.raises(ValueError) as error:
        VERDICTS.check(frame_of(VERDICTS).assign(unsafe="safe"))
    one_sentence(error.value)


@every_table
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_file_is_named_in_a_sentence(table, tmp_path, kept):
    path = table.write(frame_of(table), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    for read in (lambda: table.read(tmp_path), lambda: table.read_all([path])):
        with pytest.raises(ValueError) as error:
            read()
        assert str(path) in one_sentence(error.value)
        assert "damaged" in str(error.value)


def test_a_file_of_another_table_is_refused(tmp_path):
    path = CURVES.write(frame_of(CURVES), tmp_path / "runs.parquet")
    with pytest.raises(ValueError) as error:
        RUNS.read(path)
    assert "missing columns" in str(error.value)


def test_a_flipped_byte_does_not_pass_for_other_values(tmp_path):
    """Parquet has no checksum of its own here: what a flip may not do is crash, or lose rows in
    silence.
    """
    path = RATES.write(frame_of(RATES, 50), tmp_path)
    content, before = path.read_bytes(), RATES.read(path)
    read = 0
    for at in np.random.default_rng(0).integers(0, len(content), 40):
        path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        try:
            found = RATES.read(path)
        except ValueError:
            continue
        read += 1
        assert len(found) == len(before)
    assert read < 40


def test_a_missing_table_says_what_writes_it(tmp_path):
    with pytest.raises(ValueError) as error:
        RUNS.read(tmp_path)
    assert "make study" in one_sentence(error.value)


def test_a_table_that_was_there_survives_a_write_that_fails(tmp_path):
    path = RATES.write(frame_of(RATES), tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        RATES.write(frame_of(RATES).drop(columns="k"), tmp_path)
    assert path.read_bytes() == before


def test_what_two_runs_must_share_leaves_out_the_volatile_and_the_order():
    one = frame_of(RUNS)
    other = one.iloc[::-1].assign(
        seconds=99.0,
        cpu_seconds=1.0,
        peak_memory=3.0,
        hardware="other",
        finished="later",
        versions="{}",
    )
    assert not RUNS.check(one).equals(RUNS.check(other))
    pd.testing.assert_frame_equal(
        RUNS.comparable(RUNS.check(one)), RUNS.comparable(RUNS.check(other))
    )
    changed = RUNS.comparable(RUNS.check(one.assign(nll=0.0)))
    assert not changed.equals(RUNS.comparable(RUNS.check(one)))
    assert {name for name, column in RUNS.columns.items() if column.volatile} == {
        "seconds",
        "cpu_seconds",
        "gpu_seconds",
        "peak_memory",
        "versions",
        "hardware",
        "finished",
    }
    assert not [
        name
        for name, table in TABLES.items()
        if name != "runs" and any(column.volatile for column in table.columns.values())
    ]


def test_only_responses_hold_text():
    assert [table.name for table in TABLES.values() if table.private] == ["responses"]
    assert "response" in RESPONSES.columns
    assert not [
        name
        for name, table in TABLES.items()
        if name != "responses" and {"response", "prompt", "text"} & set(table.columns)
    ]


def test_no_files_and_no_frames_give_an_empty_table():
    for table in TABLES.values():
        assert table.read_all([]).equals(table.empty())
        assert table.concat([table.empty()]).equals(table.empty())
