"""The cache of results: the same work hits, anything else misses, two processes share it, and
nothing torn is served.
"""

import multiprocessing
import os
import time

import pandas as pd
import pytest

from conftest import said
from driftbook.batch import cache
from driftbook.study.tables import RATINGS, RESPONSES

KEY = {"settings": {"version": 1, "base": "abc"}, "inputs": [["adapter_model.safetensors", "00"]]}


def ratings(run_id="first", value=1.5):
    row = {
        "run_id": run_id,
        "benchmark": "utility",
        "prompt_id": "1",
        "metric": "nll",
        "value": value,
        "weight": 2.0,
        "unscored_reason": None,
    }
    return RATINGS.check(pd.DataFrame([row]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    return tmp_path


class Work:
    """Writes a table, and counts how often it was asked to."""

    def __init__(self, folder, value=1.5):
        self.folder, self.value, self.calls = folder, value, 0

    def __call__(self):
        self.calls += 1
        return [RATINGS.write(ratings(value=self.value), self.folder)]


@pytest.mark.slow
def test_the_same_work_is_done_once_and_takes_the_name_of_the_run_that_asks(folder):
    first, second = Work(folder / "a"), Work(folder / "b", value=9.0)
    cache.served(KEY, "first", folder / "a", first)
    [path] = cache.served(KEY, "second", folder / "b", second)
    assert (first.calls, second.calls) == (1, 0)
    assert RATINGS.read(path).equals(ratings("second"))
    assert path.parent == folder / "b"
    assert RATINGS.read(folder / "a").equals(ratings("first"))


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"version": 2, "base": "abc"}},
        {"settings": {"version": 1, "base": "abd"}},
        {"inputs": [["adapter_model.safetensors", "01"]]},
    ],
    ids=["version", "base", "adapter"],
)
def test_anything_else_misses(folder, change):
    work = Work(folder / "a")
    cache.served(KEY, "first", folder / "a", work)
    cache.served({**KEY, **change}, "first", folder / "a", work)
    assert work.calls == 2


def entry_of(folder):
    [found] = [path for path in (folder / "cache").iterdir() if path.is_dir()]
    return found


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "no record", "torn record"])
def test_a_damaged_entry_is_noticed_and_made_again(folder, harm):
    work = Work(folder / "a")
    cache.served(KEY, "first", folder / "a", work)
    table, record = entry_of(folder) / "ratings.parquet", entry_of(folder) / "entry.json"
    data = bytearray(table.read_bytes())
    match harm:
        case "flipped":
            data[len(data) // 2] ^= 1
            table.write_bytes(data)
        case "cut":
            table.write_bytes(data[:-7])
        case "gone":
            table.unlink()
        case "no record":
            record.unlink()
        case "torn record":
            record.write_text(record.read_text()[:20])
    with pytest.warns(UserWarning, match="damaged; it is computed again"):
        cache.served(KEY, "first", folder / "a", work)
    assert work.calls == 2
    assert cache.is_whole(entry_of(folder))
    cache.served(KEY, "first", folder / "a", work)
    assert work.calls == 2


def test_work_that_fails_leaves_nothing(folder):
    def fails():
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError):
        cache.served(KEY, "first", folder / "a", fails)
    work = Work(folder / "a")
    cache.served(KEY, "first", folder / "a", work)
    assert work.calls == 1


def _one_process(place, number):
    cache.FOLDER = place / "cache"

    def make():
        (place / f"made-by-{number}").touch()
        time.sleep(0.5)
        return [RATINGS.write(ratings(), place / str(number))]

    cache.served(KEY, f"run-{number}", place / str(number), make)


def test_two_processes_that_want_the_same_do_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_one_process, args=(tmp_path, number)) for number in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("made-by-*"))) == 1
    values = [RATINGS.read(tmp_path / str(number)).value.tolist() for number in (1, 2)]
    assert values == [[1.5], [1.5]]


def test_a_tables_content_is_its_rows_whatever_the_run_is_called_and_another_files_its_bytes(
    folder,
):
    paths = [
        RATINGS.write(frame, folder / name)
        for name, frame in (
            ("a", ratings("x")),
            ("b", ratings("y")),
            ("c", ratings("x", value=1.5000001)),
        )
    ]
    assert cache.content(paths[0]) == cache.content(paths[1]) != cache.content(paths[2])
    adapter = folder / "adapter_model.safetensors"
    adapter.write_bytes(b"\0" * 100)
    before = cache.content(adapter)
    adapter.write_bytes(b"\0" * 99 + b"\1")
    assert cache.content(adapter) != before
    assert cache.content(folder / "nothing") is None


def test_responses_are_kept_privately_and_each_study_forgets_its_own(folder):
    first, second, audit = folder / "a", folder / "b", folder / "audit" / "x" / "text"
    for number, homes in enumerate([[first], [second], [first, second], [audit]]):
        for home in homes:
            cache.served(
                {"a key": number},
                "r",
                home / "runs" / "r",
                lambda home=home: [RESPONSES.write(said("r"), home / "runs" / "r")],
            )
    cache.served({"other": 1}, "first", folder / "b", Work(folder / "b"))
    assert os.stat(cache.FOLDER).st_mode & 0o077 == 0
    unknown = cache.FOLDER / ("0" * 32)
    RESPONSES.write(RESPONSES.read(first / "runs" / "r"), unknown)
    killed = cache.FOLDER / ".new-x" / ("1" * 32)
    RESPONSES.write(RESPONSES.read(first / "runs" / "r"), killed)
    assert cache.forget(first) == 4  # its own, the shared one, and two that nobody knows
    assert len(list(cache.FOLDER.rglob("responses.parquet"))) == 2
    assert cache.forget(folder / "audit" / "x") == 1
    assert cache.forget(second) == 1
    assert not list(cache.FOLDER.rglob("responses.parquet"))
    assert len(list(cache.FOLDER.glob("*/ratings.parquet"))) == 1
