"""Slurm for `make study PROFILE=slurm`: one small file says which cluster. Snakemake's own Slurm
plugin submits jobs and watches them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from driftbook.batch import gpus
from driftbook.study.files import ROOT, digest
from driftbook.study.parts import Count, Part, Positive, Text
from driftbook.study.reading import yaml_value
from driftbook.study.study_file import Study

FINISHED_SECONDS = 120  # Slurm must remember a finished job so long, where no database does
# What a job's environment says of that job alone; sbatch would read much of it as options.
OF_A_JOB = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC)_|CUDA_VISIBLE_DEVICES$")
NOT_FAILED = ("COMPLETED", "COMPLETING", "CONFIGURING", "PENDING", "RUNNING")
UNSEEN = "completed successfully, but some output files are missing"  # Snakemake's words
OF_A_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS"}


class Cluster(Part):
    """What a user says about the cluster: see profiles/slurm/cluster.yaml."""

    partition: Text
    jobs: Count
    gpu_memory: Annotated[float, Field(ge=0)]
    hours: Positive
    cores: Count = 1
    account: Text | None = None
    constraint: Text | None = None
    qos: Text | None = None
    extra: Text | None = None

    @property
    def device(self) -> str:
        """The kind of device on which models run, as `keys.device` names it."""
        return "cuda" if self.gpu_memory else "cpu"

    @property
    def memory(self) -> float:
        """Bytes of memory that a job's GPU has; 0 where models run on cores."""
        return self.gpu_memory * 1e9


def read(profile: str) -> Cluster | None:
    """The cluster of a profile; None for one without a cluster.yaml, which is this machine.

    Raises:
        ValueError: there is no such profile, or what is wrong in the file, in one sentence.
    """
    known = sorted(path.name for path in (ROOT / "profiles").iterdir())
    if profile not in known and not (os.path.isabs(profile) and Path(profile).is_dir()):
        raise ValueError(f"there is no profile {profile!r}; profiles/ has {', '.join(known)}")
    path = ROOT / "profiles" / profile / "cluster.yaml"
    return from_file(path) if path.is_file() else None


def from_file(path: Path) -> Cluster:
    """The cluster that a file describes.

    Raises:
        ValueError: what is wrong in it, in one sentence.
    """
    where, known = f"profiles/{path.parent.name}/{path.name}", list(Cluster.model_fields)
    content = yaml_value(path)
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no keys; it takes {', '.join(known)}")
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; it takes {', '.join(known)}")
    given = {key: value for key, value in content.items() if value is not None}
    if "partition" not in given:
        raise ValueError(f"{where} names no partition; set it to one that `sinfo` lists")
    try:
        return Cluster(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0]
        if problem["type"] == "missing":
            raise ValueError(f"{where}: {key!r} is missing") from None
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise ValueError(f"{where}: {key} = {problem['input']!r}: {message}") from None


# ---- Slurm
def arguments(cluster: Cluster, study: Study) -> list[str]:
    """What Snakemake is told besides the profile, after Slurm was asked for it.

    Raises:
        ValueError: no Slurm answers, it does not know the partition, or it forgets finished jobs.
    """
    settings = _asked("show", "config")
    if "slurmdbd" not in settings.get("AccountingStorageType", ""):
        remembered = int(settings["MinJobAge"].split()[0])
        if remembered < FINISHED_SECONDS:
            raise ValueError(
                f"this Slurm has no accounting database and forgets jobs after {remembered}"
                f" seconds, so their end is missed; set MinJobAge to {FINISHED_SECONDS} or more"
            )
        status = "squeue"
    else:
        status = "sacct"
    known = _said("sinfo", "--noheader", "--format=%R").split()
    if cluster.partition not in known:
        raise ValueError(
            f"there is no partition {cluster.partition!r} on this cluster; it has"
            f" {', '.join(sorted(set(known)))}"
        )
    return [
        f"--jobs={cluster.jobs}",
        f"--slurm-status-command={status}",
        f"--slurm-jobname-prefix={run_name(study.folder)}",
        f"--slurm-logdir={study.folder / 'slurm'}",
    ]


def run_name(folder: Path) -> str:
    """What the names of a study's jobs on the cluster begin with, by the study's folder."""
    return f"driftbook_{digest(str(folder), 12)}"


def surroundings(cluster: Cluster, found: Mapping[str, str]) -> dict[str, str]:
    """The environment of jobs on a cluster, from that of `make study`: as many threads as cores,
    the GPUs that Slurm gave, and nothing of a Slurm job in which `make study` itself runs, whose
    size and GPUs are not theirs.
    """
    inside = "SLURM_JOB_ID" in found
    kept = {
        name: value
        for name, value in found.items()
        if not inside or name in OF_A_CLUSTER or not OF_A_JOB.match(name)
    }
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**kept, **dict.fromkeys(threads, str(cluster.cores)), gpus.GIVEN: "1"}


def check_paths(paths: Mapping[str, Path]) -> None:
    """Raise a ValueError where a path cannot be carried to another node: Snakemake writes paths
    into a shell's line as Python would write them.
    """
    for what, path in paths.items():
        marks = r"\s'\"\\$`&;|<>()*?#" if what == "the checkout" else r"'\\"
        if mark := re.search(f"[{marks}]", str(path)):
            raise ValueError(
                f"{what} {str(path)!r} has the character {mark[0]!r}, with which jobs on a cluster"
                " do not start; rename it"
            )


def left(study: Study) -> list[str]:
    """The numbers of a study's jobs that still wait or run, as after a driver was killed."""
    rows = (
        line.split(maxsplit=1)
        for line in _said("squeue", "--me", "--noheader", "-o%A %j").splitlines()
    )
    return [number for number, name in rows if name.startswith(run_name(study.folder))]


def cancel(study: Study) -> int:
    """End a study's jobs that still wait or run; how many there were."""
    numbers = left(study)
    if numbers:
        _said("scancel", *numbers)
    return len(numbers)


def stopped(study: Study) -> list[str]:
    """Why jobs of a study failed on the cluster, in sentences, where a job itself could not say it
    since it did not begin, or not on the files that are here. The plugin deletes Slurm's logs of
    jobs that went well.
    """
    rows = _said("squeue", "--me", "--noheader", "--states=all", "-o%A %T %B %j").splitlines()
    logs = {path.stem: path for path in study.folder.glob("slurm/**/*.log")}
    shared = f"is {study.folder} on a file system that the nodes share with {os.uname().nodename}?"
    found = []
    for number, state, node, name in (row.split(maxsplit=3) for row in rows):
        if not name.startswith(run_name(study.folder)) or state in NOT_FAILED:
            continue
        text = logs[number].read_text(errors="replace") if number in logs else ""
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        if not last:
            last = f"it wrote no log; {shared}"
        elif last.endswith("not found"):
            last += f"; is the checkout {ROOT} on a file system that the nodes share?"
        found.append(f"job {number} on {node} ended as {state}: {last}")
    log = study.folder / "snakemake.log"
    if log.exists() and UNSEEN in log.read_text(errors="replace"):
        found.append(f"jobs ended well on the cluster and their files are not here; {shared}")
    return found


def _asked(*words: str) -> dict[str, str]:
    rows = (line.partition("=") for line in _said("scontrol", *words).splitlines())
    return {name.strip(): value.strip() for name, _, value in rows if value}


def _said(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        ValueError: it is not there, or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"there is no Slurm here: {command[0]} is not found; say PROFILE=slurm on a login node"
        )
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if said.returncode:
        why = " ".join((said.stderr or said.stdout).split())
        raise ValueError(f"Slurm does not answer: {command[0]}: {why}")
    return said.stdout
