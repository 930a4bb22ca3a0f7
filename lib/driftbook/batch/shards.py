"""How the variants of a study are dealt to jobs: a stage of a base model is done in as many shards
as keep the workers busy, each with its share of the planned seconds.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from driftbook.batch import keys
from driftbook.study.files import read_json, write_json
from driftbook.study.study_file import Study, study_digest

FILE = "shards.json"
UNKNOWN = 60.0  # seconds of a variant whose cost cannot be planned: its model is not at hand
NEARLY = 1.05  # times the shortest time
SPREAD = 2  # counts of shards tried on either side of a base model's own share of the workers


@dataclass(frozen=True)
class Shards:
    """The jobs of a study's stages: for STAGE/BASE the run_ids of each shard, in the study's order;
    dealt for so many workers, from a study file of this digest.
    """

    study: str
    workers: int
    of: Mapping[str, list[list[str]]]

    def jobs(self, stage: str, base: str) -> list[str]:
        """The names of the jobs of a stage and base model: STAGE/BASE/NUMBER."""
        return [f"{stage}/{base}/{number}" for number in range(len(self.of[f"{stage}/{base}"]))]

    def run_ids(self, job: str) -> list[str]:
        """The run_ids of a job."""
        stage, base, number = job.split("/")
        return self.of[f"{stage}/{base}"][int(number)]

    def before(self, job: str, study: Study) -> list[str]:
        """The jobs whose results a job reads: of the stages before, the shards that made what its
        own variants are; a repair may start from any run of its base model.
        """
        stage, base, _ = job.split("/")
        making = [one for one in keys.stages(study) if one in ("train", "mitigate")]
        needed = ["respond"] if stage == "judge" else making[: keys.stages(study).index(stage)]
        if stage == "mitigate":
            return self.jobs("train", base)
        own = set(self.run_ids(job))
        return [
            name
            for one in needed
            for name in self.jobs(one, base)
            if own.intersection(self.run_ids(name))
        ]


def dealt(study: Study, workers: int, keep: bool = True) -> Shards:
    """The shards of a study, dealt for so many workers, and kept in its folder; dealt anew where
    the workers or the variants are others.
    """
    due = {
        f"{stage}/{base}": [one.run_id for one in study.of_stage(stage, base)]
        for stage in keys.stages(study)
        for base in study.bases
    }
    known, found = read_shards(study), Shards(study_digest(study), workers, {})
    same = known and known.workers == workers and known.of.keys() == due.keys()
    if same and all(sorted(chain(*known.of[name])) == sorted(due[name]) for name in due):
        found = Shards(found.study, workers, known.of)
    else:
        costs, start = _costs(study, due) if workers > 1 else ({}, 0.0)
        for stage in keys.stages(study):
            names = [f"{stage}/{base}" for base in study.bases]
            own = {name: [costs.get(name, {}).get(one, 0.0) for one in due[name]] for name in names}
            counts = _counts([sum(own[name]) for name in names], workers, start)
            for name, n in zip(names, counts, strict=True):
                found.of[name] = _deal(due[name], own[name], n)
    if keep and found != known:
        write_json(study.folder / FILE, found.__dict__)
    return found


def read_shards(study: Study) -> Shards | None:
    """The shards that a study was last dealt to; None where it was not, or they cannot be read."""
    try:
        return Shards(**read_json(study.folder / FILE))
    except (OSError, ValueError, TypeError):
        return None


def of_key(path: Path) -> list[str]:
    """The run_ids of the job whose key is in this file, in the study's order."""
    stage, base, number = path.with_suffix("").parts[-3:]
    return read_json(path.absolute().parents[3] / FILE)["of"][f"{stage}/{base}"][int(number)]


def _costs(study: Study, due: Mapping[str, list[str]]) -> tuple[dict[str, dict[str, float]], float]:
    """The planned seconds of each variant, by STAGE/BASE and run_id, on a usual core, since only
    their ratios matter here; and those of a job's start.
    """
    # here, since who only reads what was dealt need not import models, which takes seconds
    from driftbook.batch import costing
    from driftbook.batch.rates import USUAL

    try:
        rows = costing.seconds(study, USUAL)
    except (ValueError, OSError):
        every = {name: dict.fromkeys(run_ids, UNKNOWN) for name, run_ids in due.items()}
        return every, USUAL.job
    sums = rows.groupby(["stage", "base_model", "run_id"], sort=False).seconds.sum()
    found: dict[str, dict[str, float]] = {}
    for (stage, base, run_id), seconds in sums.items():
        found.setdefault(f"{stage}/{base}", {})[run_id] = float(seconds)
    return found, USUAL.job


def _counts(costs: Sequence[float], workers: int, start: float) -> list[int]:
    """How many shards each base model's part of a stage has: the fewest, since each loads its model
    once, with which all are done nearly as soon as they can be; none is shorter than a job's start.
    """
    whole = sum(costs)
    if workers == 1 or not whole:
        return [1] * len(costs)
    tried = {
        cost / n
        for cost in costs
        for share in [workers * cost / whole]
        for n in range(max(1, math.floor(share) - SPREAD), math.ceil(share) + SPREAD + 1)
        if cost
    }
    ways = [
        [max(1, min(math.ceil(cost / each - 1e-9), math.floor(cost / start))) for cost in costs]
        for each in tried
    ]
    ends = [_finish(costs, counts, workers, start) for counts in ways]
    near = [way for way, end in zip(ways, ends, strict=True) if end <= NEARLY * min(ends)]
    return min(near, key=sum)


def _finish(costs: Sequence[float], counts: Sequence[int], workers: int, start: float) -> float:
    """Seconds until all shards are done, the longest first, each with the start of a job."""
    lengths = [cost / n + start for cost, n in zip(costs, counts, strict=True) for _ in range(n)]
    ends = [0.0] * workers
    for seconds in sorted(lengths, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def _deal(run_ids: Sequence[str], costs: Sequence[float], n: int) -> list[list[str]]:
    """n shards, or as many as there are variants, with about equal costs: the dearest first, each
    to the shard that has the least.
    """
    n = max(1, min(n, len(run_ids)))
    heap, owner = [(0.0, number) for number in range(n)], {}
    for place in sorted(range(len(run_ids)), key=lambda place: (-costs[place], place)):
        load, number = heap[0]
        heapq.heapreplace(heap, (load + costs[place], number))
        owner[place] = number
    return [[run_ids[place] for place in sorted(owner) if owner[place] == k] for k in range(n)]


def path_of(study: Study, kind: str, job: str) -> Path:
    """A job's file of a kind (keys, jobs, progress)."""
    return study.folder / kind / f"{job}.json"
