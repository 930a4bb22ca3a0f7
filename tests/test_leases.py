"""Leases: two processes never work on one run, and nobody waits for the dead or trusts another
machine's clock.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftbook.batch import leases, make_study, notebooks

HELD = """
import sys, time
from pathlib import Path
from driftbook.batch import leases
with leases.leased(Path(sys.argv[1]), "train", leases.Watch()) as lease:
    print(lease is not None, flush=True)
    time.sleep(60)
"""


def take(folder, watch=None):
    return leases.leased(folder, "train", watch or leases.Watch())


def elsewhere(folder, beat, number=1, stage="train"):
    """A lease of a process on another machine, at some beat."""
    words = {"machine": "n2 pid:[1]", "host": "n2", "pid": os.getpid(), "started": 0, "beat": beat}
    folder.mkdir(exist_ok=True)
    (folder / f".lease.{stage}.{number}").write_text(json.dumps(words))


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    return now


def test_a_lease_is_held_by_one_and_given_back(tmp_path):
    with take(tmp_path) as first:
        assert first is not None
        with take(tmp_path) as second:
            assert second is None
        with leases.leased(tmp_path, "respond", leases.Watch()) as other:
            assert other is not None, "another stage is other work"
        assert leases.holder(tmp_path, "train")["pid"] == os.getpid()
        assert leases.living(tmp_path)
        first.check()
    assert not list(tmp_path.iterdir())
    assert leases.holder(tmp_path, "train") == {}
    assert not leases.living(tmp_path)


def test_of_many_at_once_one_holds_it(tmp_path):
    held, start = [], threading.Barrier(8)
    done = threading.Barrier(8)

    def work():
        start.wait()
        with take(tmp_path) as lease:
            held.append(lease)
            done.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in held) == 1


def test_a_killed_process_of_this_machine_is_not_waited_for(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with take(tmp_path) as lease:
        assert lease is None, "it lives"
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie is as dead as any
    with take(tmp_path) as lease:
        assert lease is not None
        assert len(list(tmp_path.glob(".lease.*"))) == 1, "the dead one's is gone"
    holder.wait()


def test_another_process_with_the_pid_of_a_dead_one_is_not_taken_for_it(tmp_path):
    with take(tmp_path) as lease:
        words = {**lease.words, "started": lease.words["started"] - 100}
    (tmp_path / ".lease.train.1").write_text(json.dumps(words))
    with take(tmp_path) as lease:
        assert lease is not None


def test_a_lease_of_another_machine_expires_by_the_watchers_clock_alone(tmp_path, clock):
    watch = leases.Watch()
    elsewhere(tmp_path, 1)
    for beat in range(2, 6):  # as long as it beats it is respected, however slow
        with take(tmp_path, watch) as lease:
            assert lease is None
        clock[0] += leases.PATIENCE - 1
        elsewhere(tmp_path, beat)
    with take(tmp_path, watch) as lease:
        assert lease is None
    clock[0] += leases.PATIENCE + 1
    with take(tmp_path, watch) as lease:
        assert lease is not None
        assert lease.path.name.endswith(".2")


def test_what_a_job_elsewhere_is_writing_stays_until_it_is_known_to_be_dead(tmp_path, clock):
    """A notebook and a progress file, of which no run's lease says anything."""
    (tmp_path / "runs" / "a" / ".new-1").mkdir(parents=True)
    written = [tmp_path / leases.JOBS / ".new-2", tmp_path / "progress" / "train" / ".new-3"]
    for path in written:
        path.mkdir(parents=True)
    watch = leases.Watch()
    for beat in range(1, 4):
        elsewhere(tmp_path / leases.JOBS, beat)
        assert make_study.clear_unfinished(tmp_path, watch)
        clock[0] += leases.PATIENCE + 1
        assert all(path.is_dir() for path in written)
    assert not (tmp_path / "runs" / "a" / ".new-1").exists(), "nobody works on this run"
    assert not make_study.clear_unfinished(tmp_path, watch)
    assert not list(tmp_path.rglob(".*"))


def test_a_job_shows_that_it_lives_while_its_notebook_is_written(tmp_path, monkeypatch):
    output, seen = tmp_path / leases.JOBS / "02_train.a.0.ipynb", []

    def execute(notebook, written, parameters):
        seen.append(leases.living(output.parent))
        with leases.shown(output.parent, output.name):  # nor does it keep anybody from the job
            seen.append(len(list(output.parent.glob(".lease.*"))))

    monkeypatch.setattr(notebooks, "execute", execute)
    assert notebooks.run_notebook("02_train.ipynb", str(output), "{}") == 0
    assert seen == [True, 1]
    assert not list(output.parent.iterdir())


def test_who_was_stopped_and_taken_over_finds_out_before_it_writes(tmp_path):
    with take(tmp_path) as lease:
        elsewhere(tmp_path, 1, number=2)
        with pytest.raises(leases.Lost):
            lease.check()
    assert [path.name for path in tmp_path.iterdir()] == [".lease.train.2"], "not its own"


@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"null", b"{}", b'{"machine": 3}']))
@settings(max_examples=40, deadline=None)
def test_a_torn_lease_is_that_of_another_machine(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("torn")
    (folder / ".lease.train.1").write_bytes(words)
    watch = leases.Watch()
    with take(folder, watch) as lease:
        assert lease is None
    watch.seen = {path: (said, since - 1e6) for path, (said, since) in watch.seen.items()}
    with take(folder, watch) as lease:
        assert lease is not None
