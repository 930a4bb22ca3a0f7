"""A batch that is killed at any moment leaves no process behind and, run again, ends in the tables
of one that was never killed.
"""

import contextlib
import copy
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from batches import SMOKE, Batch, said
from conftest import OUTPUTS
from driftbook.study.study_file import Study
from driftbook.study.tables import TABLES
from executed import run_notebook

pytest_plugins = ["batches"]
KILLED = copy.deepcopy(SMOKE) | {"name": "killed", "grid": SMOKE["grid"][:3]}
del KILLED["mitigations"], KILLED["bases"]["tiny-other"], KILLED["benchmarks"]["safety"]["truth"]
COLLECT = "jobs/collect.json"
N_KILLS = int(os.environ.get("DRIFTBOOK_KILLS", 2))  # 50 for the whole trial, some 20 minutes
VICTIMS = ("all", "driver", "one")
WRITTEN = ("variants", "runs", "prompts", "responses", "verdicts", "answers", "ratings")


RUN_IDS = {variant.run_id for variant in Study(**KILLED).variants}


@pytest.fixture(scope="module")
def uninterrupted(finished) -> dict[str, pd.DataFrame]:
    """The tables of the same variants in a study that was never killed."""
    return {
        name: table[table["run_id"].isin(RUN_IDS)] if "run_id" in table else table
        for name, table in finished.tables().items()
    }


def assert_same(
    run: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame], names, said=""
) -> None:
    for name in names:
        one, two = (tables[name].reset_index(drop=True) for tables in (run, other))
        pd.testing.assert_frame_equal(one, two, obj=f"{name} {said}", check_exact=True)


def test_a_kill_at_any_moment_ends_in_equal_tables_and_leaves_no_process(
    uninterrupted, finished, new_batch
):
    """First everything is killed at once, as by a loss of power; then the driver alone, whose
    children must end by themselves; then, where more kills are asked for, any one process, after
    which the batch ends by itself. What was finished by then is never done again.
    """
    run = new_batch(OUTPUTS / "interrupted", KILLED)
    seed = int.from_bytes(os.urandom(4))
    print(f"moments of this run: random.Random({seed})")
    rng = random.Random(seed)
    n_files = 40 + sum(1 for one in RUN_IDS for _ in (finished.folder / "runs" / one).rglob("*"))
    done: dict[Path, int] = {}
    for number in range(N_KILLS):
        driver = run.start(COLLECT)
        there = _n_files(run.folder)
        most = max(there + 5, int(0.8 * n_files))
        _wait_for_files(run, driver, rng.randrange(max(9, there - 5), most), 30 if number else 600)
        time.sleep(rng.random())
        victim = VICTIMS[number % len(VICTIMS)]
        if victim == "one" and (others := [pid for pid in run.processes() if pid != driver.pid]):
            _kill(rng.choice(others))
        else:
            _kill(driver.pid)
        if victim == "all":
            _kill_all(run)
        driver.wait(300)
        assert _gone(run, 20), (
            f"seed {seed}: still there:"
            f" {[Path(f'/proc/{pid}/cmdline').read_bytes()[-200:] for pid in run.processes()]}"
        )
        marks = {path: path.stat().st_mtime_ns for path in run.folder.glob("runs/*/*.done.json")}
        again = [path for path, when in done.items() if marks.get(path) != when]
        assert not again, f"seed {seed}, kill {number} ({victim}): done again: {again}"
        done = marks
    ended = run.run(COLLECT)
    assert ended.returncode == 0, f"seed {seed}: {said(ended)}"
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), f"seed {seed}"
    tables = run.tables()
    assert set(tables) >= {*WRITTEN, "curves", "rates"}
    # the truth gives labels and a mitigation gives spectra, of which this study has neither
    assert_same(uninterrupted, tables, set(tables) - {"labels", "spectra"}, f"(seed {seed})")
    left = [str(path.relative_to(run.folder)) for path in run.folder.rglob(".new-*")]
    assert not left, f"seed {seed}: half-written files stay behind"
    leases = list(run.folder.rglob(".lease.*"))
    assert not leases, f"seed {seed}: leases stay behind: {leases}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _n_files(folder: Path) -> int:
    """How many files a folder has; os.walk, since others go while it is walked."""
    return sum(len(files) for _, _, files in os.walk(folder))


def _wait_for_files(run: Batch, driver: subprocess.Popen, n: int, seconds: float = 600) -> None:
    """Until the study's folder has n files, or the batch is through, or so long."""
    deadline = time.time() + seconds
    while driver.poll() is None and time.time() < deadline and _n_files(run.folder) < n:
        time.sleep(0.05)


def _kill_all(run: Batch) -> None:
    while found := run.processes():
        for pid in found:
            _kill(pid)


def _gone(run: Batch, seconds: float) -> bool:
    deadline = time.time() + seconds
    while run.processes() and time.time() < deadline:
        time.sleep(0.2)
    return not run.processes()


@pytest.mark.slow
def test_training_does_not_depend_on_the_batch_or_on_the_order_of_variants(
    uninterrupted, new_batch, monkeypatch
):
    """The same variants again, in reverse order, in this process: no Snakemake, no warm kernel."""
    run = new_batch(OUTPUTS / "by_hand", KILLED)
    reverse = [variant.run_id for variant in reversed(run.study().variants)]
    given = {"study": str(run.file), "base_model": "tiny-llama", "run_ids": reverse}
    run_notebook("02_train", run.folder, monkeypatch, **given)
    made = {
        name: TABLES[name].comparable(
            TABLES[name].read_all(sorted(run.folder.glob(f"runs/*/{name}.parquet")))
        )
        for name in ("runs", "curves")
    }
    assert_same(uninterrupted, made, made)


@pytest.mark.slow
def test_where_there_are_gpus_the_jobs_of_a_killed_driver_end_with_it(new_batch):
    """Kernels are not forked there, so nothing but the driver's pid ties a job to it."""
    run = new_batch(OUTPUTS / "killed_on_gpus", KILLED)
    run.environment["CUDA_VISIBLE_DEVICES"] = "0,1"  # as on a machine with two; torch finds none
    driver = run.start(COLLECT)
    deadline = time.time() + 120
    while driver.poll() is None and not _kernels(run) and time.time() < deadline:
        time.sleep(0.1)
    assert _kernels(run)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert _gone(run, 20)


def _kernels(run: Batch) -> list[int]:
    """The batch's processes that are kernels of notebooks."""
    lines = {pid: Path(f"/proc/{pid}/cmdline") for pid in run.processes()}
    with contextlib.suppress(OSError):
        return [pid for pid, line in lines.items() if b"ipykernel" in line.read_bytes()]
    return []


def test_a_polite_end_ends_the_batch_and_says_so(new_batch):
    """SIGTERM, as `kill` and a scheduler send it; Ctrl-C and a closed terminal have its handler."""
    run = new_batch(OUTPUTS / "interrupt", KILLED)
    driver = run.start(COLLECT)
    _wait_for_files(run, driver, 4)
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(30) == 130
    assert _gone(run, 20)
    last = (run.outputs / "driver.log").read_text().strip().splitlines()[-1]
    assert "goes on from here" in last
