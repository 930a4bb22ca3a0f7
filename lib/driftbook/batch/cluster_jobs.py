"""What each job asks of a cluster, by the plan's model of cost."""

import math
from typing import Any

import pandas as pd

from driftbook.batch import costing, schedule, sizes
from driftbook.batch.cluster import Cluster
from driftbook.batch.shards import Shards
from driftbook.study.study_file import Study

# A job that asks for too little is ended by Slurm; one that asks for twice too much waits longer.
TIME_FACTOR, MEMORY_FACTOR = 3.0, 1.3
LEAST_MINUTES = 10  # a node starts, and a slow file system reads a model
CUDA_BYTES = 3e9  # of a process on a GPU, in the memory of its node: torch's own, and CUDA's


def requests(cluster: Cluster, study: Study, shards: Shards) -> dict[str, dict[str, Any]]:
    """What every job of a study asks for, by its name in the plan, as Snakemake's resources: gpu,
    mem_mb, runtime in minutes, and where it may run. One GPU for what runs a model; `tasks` 0 has
    the plugin ask for no task a GPU.
    """
    on_cpu = not cluster.gpu_memory
    known = schedule.known_rates(study, cluster)
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
    for name, job in schedule.jobs(study, known, shards).items():
        model = _model(name, study)
        needed = _device_bytes(name, study, memory) * MEMORY_FACTOR
        n_gpus = 0 if on_cpu or model is None else 1
        host = needed if on_cpu else _host_bytes(name, study) * MEMORY_FACTOR
        found[name] = {
            "gpu": n_gpus,
            "tasks": 0 if n_gpus else 1,
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
        return costing.PROCESS_BYTES + sizes.weight_bytes(study.models[name], study)
    return 2 * costing.PROCESS_BYTES  # an analysis: packages and tables


def _host_bytes(job: str, study: Study) -> float:
    """Bytes in the memory of the node of a job on a GPU: a model passes through it unquantised, and
    a repair reads the checkpoints of its pair there.
    """
    stage, _, rest = job.partition("/")
    name = rest.partition("/")[0]
    models = list(study.judges.values()) if stage == "judge" else []
    models += [study.models[name]] if name in study.models else []
    through = max((sizes.weight_bytes_read(one, study) for one in models), default=0.0)
    pairs = len(getattr(study.models.get(name), "checkpoints", {})) if stage == "mitigate" else 0
    return CUDA_BYTES + costing.PROCESS_BYTES + (1 + pairs) * through
