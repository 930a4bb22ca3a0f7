"""What jobs ask of a cluster, and what is said of a cluster's file before any work; Slurm's own
commands are played. tests/test_slurm.py runs a study on a real one.
"""

import os
import re
from pathlib import Path

import pytest

from conftest import SMALL, one_sentence
from driftbook.batch import (
    cluster,
    cluster_jobs,
    costing,
    gpus,
    keys,
    rates,
    schedule,
    shards,
    sizes,
)
from driftbook.batch.cluster import Cluster
from driftbook.study.files import ROOT, digest
from driftbook.study.study_file import Study

A100 = Cluster(partition="gpu", jobs=8, gpu_memory=80, hours=24, cores=4)
LARGE = {"family": "llama", "answer_mode": "letters", "source": "no/Such-30B", "revision": "0" * 40}


def _requests(study: Study, asked: Cluster = A100) -> dict:
    return cluster_jobs.requests(asked, study, shards.dealt(study, 1, keep=False))


def study_with(base: dict) -> Study:
    """The small study with one base model in place of its own."""
    content = SMALL | {"name": "clustered", "bases": {"tiny-llama": base}}
    return Study(**content)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "slurm" / "cluster.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


# ---- the file
WHOLE = "partition: gpu\njobs: 2\ngpu_memory: 80\nhours: 24\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE.replace("gpu\n", "\n", 1), "names no partition"),
        (WHOLE + "acount: me\n", "unknown key 'acount'"),
        (WHOLE.replace("2", "0", 1), "jobs = 0"),
        (WHOLE.replace("hours: 24", "hours: soon"), "hours = 'soon'"),
        (WHOLE.replace("gpu_memory: 80\n", ""), "'gpu_memory' is missing"),
        (WHOLE + "jobs: 3\n", "jobs"),
        ("gpu\n", "holds no keys"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text, said, tmp_path):
    with pytest.raises(ValueError) as error:
        cluster.from_file(written(tmp_path, text))
    assert said in one_sentence(error.value)


def test_a_file_is_read_and_the_committed_one_only_lacks_its_partition(tmp_path):
    assert cluster.from_file(written(tmp_path, WHOLE)).partition == "gpu"
    assert cluster.read("local") is None
    committed = (ROOT / "profiles" / "slurm" / "cluster.yaml").read_text()
    everything = re.sub(r"^# (\w+:)", r"\1", committed, flags=re.MULTILINE)
    everything = everything.replace("partition: ", "partition: gpu ")
    found = cluster.from_file(written(tmp_path, everything))
    assert set(found.model_dump(exclude_none=True)) == set(Cluster.model_fields)
    with pytest.raises(ValueError, match="names no partition"):
        cluster.read("slurm")


# ---- what a job asks for
def test_every_job_of_the_plan_asks_and_only_models_get_a_gpu(bases):
    study = Study(**SMALL)
    found = _requests(study)
    dealt = shards.dealt(study, 1, keep=False)
    assert list(found) == list(schedule.jobs(study, rates.published_rates(), dealt))
    on_a_gpu = {name for name, asked in found.items() if asked["gpu"]}
    assert on_a_gpu == {name for name in found if "/" in name}
    for asked in found.values():
        assert cluster_jobs.LEAST_MINUTES <= asked["runtime"] <= 60 * A100.hours
        assert asked["mem_mb"] > costing.PROCESS_BYTES / 1e6
        assert asked["slurm_partition"] == "gpu"
        assert "slurm_account" not in asked


def test_a_large_base_asks_for_one_gpu_and_more_memory(bases):
    small = _requests(Study(**SMALL))["train/tiny-llama/0"]
    study = study_with(LARGE | {"dtype": "bfloat16"})
    large = _requests(study)["train/tiny-llama/0"]
    weights = sizes.weight_bytes(study.bases["tiny-llama"], study)
    assert (small["gpu"], large["gpu"], large["tasks"]) == (1, 1, 0)
    assert large["mem_mb"] > weights / 1e6 > small["mem_mb"]
    assert large["runtime"] > small["runtime"]


def test_weights_that_one_gpu_cannot_hold_are_refused_before_any_work(bases, slurm, monkeypatch):
    def refused(base, memory=80e9):
        try:
            sizes.check_fits(study_with(LARGE | base), memory)
        except ValueError as error:
            return one_sentence(error)
        return ""

    assert "tiny-llama take 120 GB and one GPU has 80 GB" in refused({})
    assert not refused({"dtype": "bfloat16"})
    assert refused({"source": "no/Such-8B"}, memory=20e9)
    assert not refused({"source": "no/such"}, memory=20e9), "nothing tells its size"
    judge = {"format": "wildguard", "source": "no/Such-7B", "revision": "0" * 40}
    two = {"a": judge, "b": judge | {"source": "no/Other-7B"}}
    with pytest.raises(ValueError, match="the weights of a and b take 56 GB"):
        sizes.check_fits(Study(**SMALL | {"judges": two, "primary": {}}), 24e9)
    slurm("nvidia-smi", "81559\n24564")
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    assert gpus.gpu_memory() == 24564 * 2**20
    monkeypatch.setenv(gpus.VISIBLE, "")
    assert gpus.gpu_memory() is None


def test_without_gpus_a_job_asks_for_the_memory_of_its_processes(bases):
    study = Study(**SMALL)
    on_cores = A100.model_copy(update={"gpu_memory": 0.0, "account": "us", "extra": "--exclude=n7"})
    found = _requests(study, on_cores)
    needed = costing.memory_by_base(study, on_cpu=True).loc["tiny-llama"] * 2**30 / 1e6
    for stage in keys.stages(study):
        asked = found[f"{stage}/tiny-llama/0"]
        assert (asked["gpu"], asked["tasks"]) == (0, 1)
        assert asked["mem_mb"] > needed.get(stage, needed["train"])
        assert (asked["slurm_account"], asked["slurm_extra"]) == ("us", "--exclude=n7")


def test_the_time_of_a_job_grows_with_its_work_up_to_the_files_hours():
    assert (
        cluster_jobs.minutes(3600, A100)
        == cluster_jobs.LEAST_MINUTES + 60 * cluster_jobs.TIME_FACTOR
    )
    assert cluster_jobs.minutes(1e9, A100) == 60 * 24
    assert cluster_jobs.minutes(1e9, A100.model_copy(update={"hours": 0.05})) == 3


# ---- Slurm
CONFIG = "AccountingStorageType   = accounting_storage/none\nMinJobAge               = 300 sec\n"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Plays a command of Slurm: it prints what is given, or fails with it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def play(name: str, said: str, status: int = 0) -> None:
        text = f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {status}\n"
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    play("scontrol", CONFIG)
    play("sinfo", "gpu\ncpu")
    return play


def test_the_state_of_jobs_is_asked_where_it_is_kept(slurm):
    study = Study(**SMALL)
    assert "--slurm-status-command=squeue" in cluster.arguments(A100, study)
    slurm("scontrol", CONFIG.replace("none", "slurmdbd"))
    assert "--slurm-status-command=sacct" in cluster.arguments(A100, study)
    assert "--jobs=8" in cluster.arguments(A100, study)


@pytest.mark.parametrize(
    ("command", "said", "status", "words"),
    [
        ("sinfo", "cpu", 0, "there is no partition 'gpu' on this cluster; it has cpu"),
        ("scontrol", CONFIG.replace("300", "60"), 0, "forgets jobs after 60 seconds"),
        ("scontrol", "Unable to contact slurm controller", 1, "Slurm does not answer"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_said_before_work(slurm, command, said, status, words):
    slurm(command, said, status)
    with pytest.raises(ValueError) as error:
        cluster.arguments(A100, Study(**SMALL))
    assert words in one_sentence(error.value)


def test_without_slurm_one_sentence_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError) as error:
        cluster.arguments(A100, Study(**SMALL))
    assert "scontrol is not found" in one_sentence(error.value)


def test_jobs_left_by_a_killed_driver_are_those_of_this_study_and_are_cancelled(slurm, tmp_path):
    study = Study(**SMALL)
    own, other = cluster.run_name(study.folder), cluster.run_name(study.folder / "another")
    slurm("squeue", f"12 {own}_a-b\n13 {other}_a-b\n14 bash")
    slurm("scancel", "")
    assert cluster.left(study) == ["12"]
    assert cluster.cancel(study) == 1


@pytest.mark.parametrize(
    ("row", "log", "words"),
    [
        ("7 FAILED n2", "", "it wrote no log"),
        ("7 FAILED n2", "script: 2: .venv/bin/python: not found\n", "is the checkout"),
        (
            "7 TIMEOUT n2",
            "x\nDUE TO TIME LIMIT\n\n",
            "job 7 on n2 ended as TIMEOUT: DUE TO TIME LIMIT",
        ),
        ("7 COMPLETED n2", "", "their files are not here"),
    ],
)
def test_what_a_job_could_not_say_itself_is_said(slurm, tmp_path, row, log, words):
    study = Study(**SMALL | {"name": f"stopped_{digest(words, 6)}"})
    own = cluster.run_name(study.folder)
    slurm("squeue", f"{row} {own}_a\n8 FAILED n1 another\n9 RUNNING n1 {own}_a")
    path = study.folder / "slurm" / "rule_train" / "7.log"
    path.parent.mkdir(parents=True)
    path.write_text(log)
    (study.folder / "snakemake.log").write_text(cluster.UNSEEN if "COMPLETED" in row else "")
    (found,) = cluster.stopped(study)
    assert words in found


def test_jobs_get_nothing_of_the_job_in_which_make_study_runs():
    given = {"SLURM_JOB_ID": "3", "SLURM_CONF": "slurm.conf", "SLURM_MEM_PER_NODE": "9"}
    given |= {"SBATCH_CPU_BIND": "q", gpus.VISIBLE: "0", "DRIFTBOOK_OUTPUTS": "here"}
    found = cluster.surroundings(A100, given)
    assert set(given) & set(found) == {"SLURM_CONF", "DRIFTBOOK_OUTPUTS"}
    assert found["OMP_NUM_THREADS"] == "4"
    outside = {"SBATCH_ACCOUNT": "us", gpus.VISIBLE: "0"}
    assert outside.items() <= cluster.surroundings(A100, outside).items()


def test_a_job_on_a_cluster_keeps_all_gpus_that_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    monkeypatch.setenv(gpus.GIVEN, "1")
    with gpus.held(tmp_path), gpus.held(tmp_path):
        assert gpus.numbers() == ["0", "1"]
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_reach_a_node_are_refused_before_work():
    cluster.check_paths({"the checkout": Path("a/b"), "the study file": Path("a ü $x/#b")})
    for what, name in (("the checkout", "a b"), ("the study file", "it's")):
        with pytest.raises(ValueError) as error:
            cluster.check_paths({what: Path(name)})
        assert what in one_sentence(error.value)
