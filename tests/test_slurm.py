"""A small study on a real Slurm of two nodes (tests/slurm/cluster.sh), also where a node or the
driver is lost. `make test-slurm` runs it.
"""

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batches import Batch, said
from conftest import SMALL
from driftbook.batch.cluster import run_name
from driftbook.study.files import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SCRIPT = ROOT / "tests" / "slurm" / "cluster.sh"
CLUSTER = "partition: test\njobs: 4\ngpu_memory: 80\nhours: 0.5\n"
COLLECTED = "jobs/collect.json"  # all that runs a model, and no analysis
PATIENCE = 600  # seconds
N_KILLS = int(os.environ.get("DRIFTBOOK_KILLS", 0))  # 20 for the whole trial, a quarter of an hour
VICTIMS = ("driver", "job", "node")


def cluster(*words: str) -> None:
    subprocess.run([SCRIPT, *words], check=True, timeout=120)


@pytest.fixture
def batch(standins, tmp_path) -> Iterator[Batch]:
    """The small study, to be run on the cluster; its jobs are ended when the test is."""
    made = Batch(tmp_path / "on a cluster, ü $x #", SMALL | {"name": "clustered"})
    profile = tmp_path / "slurm"
    shutil.copytree(ROOT / "profiles" / "slurm", profile)
    (profile / "cluster.yaml").write_text(CLUSTER)
    made.profile = str(profile)
    yield made
    for number, *_ in jobs(made, "pending,running"):
        subprocess.run(["scancel", number], check=True)


def jobs(batch: Batch, states: str = "all") -> list[tuple[str, str, str]]:
    """Number, state and node of each of the batch's jobs that Slurm remembers."""
    own = run_name(batch.folder)
    command = ["squeue", "--noheader", f"--states={states}", "--format=%A|%T|%N|%j"]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [line.split("|") for line in rows.splitlines()]
    return [(number, state, node) for number, state, node, name in found if name.startswith(own)]


def wait_for(what, process: subprocess.Popen):
    """The first true value of `what()` while a batch runs."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(f"the batch ended or waited too long: exit {process.poll()}")


def finish(process: subprocess.Popen, batch: Batch) -> None:
    assert process.wait(PATIENCE) == 0, (batch.outputs / "driver.log").read_text()[-3000:]


def running_on(batch: Batch, node: str) -> list[str]:
    return [number for number, _, where in jobs(batch, "running") if where == node]


def test_a_study_on_two_nodes_outlives_the_loss_of_one_and_ends_as_on_one_machine(batch, tmp_path):
    process = batch.start(COLLECTED)
    lost = wait_for(lambda: running_on(batch, "n1"), process)
    cluster("lose", "n1")
    finish(process, batch)
    cluster("regain", "n1")
    ended = {number: (state, node) for number, state, node in jobs(batch)}
    assert {ended[number] for number in lost} <= {("COMPLETED", "n1"), ("COMPLETED", "n2")}
    assert {state for state, _ in ended.values()} == {"COMPLETED"}
    assert_as_on_one_machine(batch, tmp_path)


def assert_as_on_one_machine(batch: Batch, tmp_path: Path) -> None:
    alone = Batch(tmp_path / "alone", batch.content)
    here = alone.run(COLLECTED)
    assert here.returncode == 0, said(here)
    assert batch.tables().keys() == alone.tables().keys()
    for name, table in alone.tables().items():
        assert table.equals(batch.tables()[name]), name


@pytest.mark.skipif(not N_KILLS, reason="DRIFTBOOK_KILLS says how many kills there are to be")
def test_kills_at_any_moment_lose_nothing_and_double_nothing(batch, tmp_path):
    """The driver, a job's processes or a whole node; where the study has ended too soon, it is
    begun anew.
    """
    seed = int.from_bytes(os.urandom(4))
    print(f"moments of this run: random.Random({seed})")
    rng, done = random.Random(seed), {}
    process = batch.start(COLLECTED)
    for number in range(N_KILLS):
        end = time.monotonic() + rng.uniform(2, 20)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        if process.poll() == 0:
            shutil.rmtree(batch.folder)
            process, done = batch.start(COLLECTED), {}
            wait_for(lambda: jobs(batch, "running"), process)
        strike(VICTIMS[number % len(VICTIMS)], batch, process, rng)
        marks = {path: path.stat().st_mtime_ns for path in batch.folder.glob("runs/*/*.done.json")}
        again = [path for path, when in done.items() if marks.get(path) != when]
        assert not again, f"seed {seed}, kill {number}: done again: {again}"
        done = marks
        if process.poll() is not None:
            process = batch.start(COLLECTED)
    process.wait(PATIENCE)
    finish(batch.start(COLLECTED), batch)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), f"seed {seed}"
    assert not list(batch.folder.rglob(".lease.*")), f"seed {seed}: leases stay behind"
    assert_as_on_one_machine(batch, tmp_path)


def strike(victim: str, batch: Batch, process: subprocess.Popen, rng: random.Random) -> None:
    """Kill one of a batch's processes, jobs or nodes; the driver where no job runs."""
    there = jobs(batch, "running")
    if victim == "driver" or not there:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return
    job, _, node = rng.choice(there)
    if victim == "node":
        cluster("lose", node)
        cluster("regain", node)
    else:
        subprocess.run(["scancel", "--signal=KILL", "--full", job], check=False)


def test_the_jobs_of_a_killed_driver_go_on_and_a_second_one_ends_the_study(batch):
    first = batch.start(COLLECTED)
    left = set(wait_for(lambda: running_on(batch, "n1") + running_on(batch, "n2"), first))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(2)
    known = {number: state for number, state, _ in jobs(batch)}
    assert {known[number] for number in left} <= {"RUNNING", "COMPLETED", "COMPLETING"}
    finish(batch.start(COLLECTED), batch)
    assert (batch.folder / COLLECTED).is_file()


def test_a_driver_that_is_a_job_itself_starts_jobs_of_their_own_size(batch):
    log = batch.outputs / "driver.log"
    script = f"#!/bin/sh\nexec {shlex.join(batch.command(COLLECTED))}\n"
    command = ["sbatch", "--wait", "--mem=3000", "--gpus=1", f"--chdir={ROOT}", f"--output={log}"]
    ended = subprocess.run(
        command, input=script, text=True, env=batch.environment, timeout=PATIENCE
    )
    assert ended.returncode == 0, log.read_text()[-3000:]


def test_the_first_jobs_of_a_study_end_on_nodes(batch):
    """The short one, which CI runs."""
    first = ["jobs/prepare/tiny-llama.json", "jobs/train/tiny-llama/0.json"]
    finish(batch.start(*first), batch)
    ended = jobs(batch)
    assert {(state, node in ("n1", "n2")) for _, state, node in ended} == {("COMPLETED", True)}
    assert len(ended) == len(first), "a job each"
    assert all((batch.folder / name).is_file() for name in first)
    assert list(batch.folder.glob("runs/*/adapter"))


def test_a_partition_that_is_not_there_is_said_before_any_work(batch):
    Path(batch.profile, "cluster.yaml").write_text(CLUSTER.replace("test", "fast"))
    ended = batch.run()
    assert ended.returncode == 2
    assert "there is no partition 'fast' on this cluster; it has test" in ended.stderr
    assert not jobs(batch)
