"""Slurm for `make study PROFILE=slurm`: one small file says which cluster, and the plan's model of
cost says what each job asks of it. Snakemake's own Slurm plugin submits jobs and watches them.
"""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, ValidationError

from driftbook.batch import costing, gpus, rates, schedule
from driftbook.study.files import ROOT, digest
from driftbook.study.parts import Count, Part, Positive, Text
from driftbook.study.reading import yaml_value
from driftbook.study.study_file import Study

# A job that asks for too little is ended by Slurm; one that asks for twice too much waits longer.
TIME_FACTOR, MEMORY_FACTOR = 3.0, 1.3
LEAST_MINUTES = 10  # a node starts, and a slow file system reads a model
CUDA_BYTES = 3e9  # of a process on a GPU, in the memory of its node: torch's own, and CUDA's
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


def read(profile: str) -> Cluster | None:
    """The cluster of a profile; None for one without a cluster.yaml, which is this machine.

    Raises:
        ValueError: what is wrong in the file, in one sentence.
    """
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


# ---- what a job asks for
def requests(cluster: Cluster, study: Study) -> dict[str, dict[str, Any]]:
    """What every job of a study asks for, by its name in the plan, as Snakemake's resources: gpu,
    mem_mb, runtime in minutes, and where it may run. No GPU for what runs no model.

    GPUs are counted by the memory that a stage needs for a base model; `nodes` keeps two on one
    node, and `tasks` 0 has the plugin ask for no task a GPU.
    """
    on_cpu = not cluster.gpu_memory
    known = rates.here(study) or rates.USUAL if on_cpu else rates.published_rates()
    place = {
        "slurm_partition": cluster.partition,
        "slurm_account": cluster.account,
        "constraint": cluster.constraint,
        "qos": cluster.qos,
        "slurm_extra": cluster.extra,
    }
    fixed = {name: value for name, value in place.items() if value is not None}
    memory = costing.memory_by_base(study, on_cpu)
    found = {}
    for name, job in schedule.jobs(study, known).items():
        model = _model(name, study)
        needed = _device_bytes(name, study, memory) * MEMORY_FACTOR
        n_gpus = 0 if on_cpu or model is None else math.ceil(needed / (cluster.gpu_memory * 1e9))
        host = needed if on_cpu else _host_bytes(name, study) * MEMORY_FACTOR
        found[name] = {
            "gpu": n_gpus,
            "tasks": 0 if n_gpus else 1,
            "nodes": 1,
            "cpus_per_task": cluster.cores,
            "mem_mb": math.ceil(host / 1e6),
            "runtime": minutes(job.seconds, cluster),
            **fixed,
        }
    return found


def minutes(seconds: float, cluster: Cluster) -> int:
    """The minutes that a job is given for planned seconds, up to what the file allows."""
    wanted = LEAST_MINUTES + TIME_FACTOR * seconds / 60
    return max(1, math.floor(min(wanted, 60 * cluster.hours)))


def _model(job: str, study: Study) -> str | None:
    """The model that a job loads first; None where it runs none."""
    stage, _, rest = job.partition("/")
    name = rest.partition("/")[0]
    return next(iter(study.judges), None) if stage == "judge" else name or None


def _device_bytes(job: str, study: Study, memory: pd.DataFrame) -> float:
    """Bytes in which a job's models work; of a stage that the plan has no row for, what training
    takes, which is the most.
    """
    stage, _, rest = job.partition("/")
    name = rest.partition("/")[0]
    if name in memory.index:
        known = memory.loc[name]
        return float(known.get(stage, known["train"])) * 2**30
    if name in study.models:
        return costing.PROCESS_BYTES + costing.weight_bytes(study.models[name], study)
    return 2 * costing.PROCESS_BYTES  # an analysis: packages and tables


def _host_bytes(job: str, study: Study) -> float:
    """Bytes in the memory of the node of a job on a GPU: a model passes through it unquantised, and
    a repair reads the checkpoints of its pair there.
    """
    stage, _, rest = job.partition("/")
    name = rest.partition("/")[0]
    models = list(study.judges.values()) if stage == "judge" else []
    models += [study.models[name]] if name in study.models else []
    through = max((costing.weight_bytes_read(one, study) for one in models), default=0.0)
    pairs = len(getattr(study.models.get(name), "checkpoints", {})) if stage == "mitigate" else 0
    return CUDA_BYTES + costing.PROCESS_BYTES + (1 + pairs) * through


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
    rows = (line.split() for line in _said("squeue", "--me", "--noheader", "-o%A %j").splitlines())
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
    for number, state, node, name in (row.split() for row in rows):
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
