"""When a study will be done: its jobs, what each waits for, and how they fall on the cores."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from driftbook.batch import cluster, gpus, keys
from driftbook.batch.shards import Shards, read_shards
from driftbook.study.files import write_json
from driftbook.study.study_file import Study, load

if TYPE_CHECKING:
    from driftbook.batch.rates import Rates


@dataclass(frozen=True)
class Piece:
    """A variant in a stage: its seconds of one device, and of each count that is made while it is
    done how many there are, and their seconds.
    """

    seconds: float
    counts: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def share(self, reached: Mapping[str, float]) -> float:
        """The share of its seconds that is done where so much of its counts is reached."""
        done = sum(
            seconds * min(1.0, reached.get(what, 0.0) / n)
            for what, (n, seconds) in self.counts.items()
            if n
        )
        return min(1.0, done / self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class PlannedJob:
    """A job: the seconds that it takes besides its pieces, its pieces by run_id, and the jobs that
    it waits for.
    """

    overhead: float
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.overhead + sum(piece.seconds for piece in self.pieces.values())


def jobs(study: Study, rates: Rates, shards: Shards) -> dict[str, PlannedJob]:
    """Every job of a study by its name, STAGE/BASE/SHARD or NAME, in the order of the data."""
    # here, since who shows what is left reads a plan and need not import models
    from driftbook.batch import costing

    analyses, found = keys.analyses(study), {}
    pieces = _pieces(costing.seconds(study, rates))
    for name in study.models:
        found[f"prepare/{name}"] = PlannedJob(rates.job, pieces.get(("prepare", name), {}))
    for stage in keys.stages(study):
        for base in study.bases:
            models = [base, *(study.judges if stage == "judge" else ())]
            prepared = [f"prepare/{one}" for one in models]
            known = pieces.get((stage, base), {})
            for job in shards.jobs(stage, base):
                own = {run_id: known[run_id] for run_id in shards.run_ids(job) if run_id in known}
                after = (*shards.before(job, study), *prepared)
                found[job] = PlannedJob(rates.job, own, after)
    scored = tuple(name for name in found if not name.startswith("prepare/"))
    found["collect"] = PlannedJob(rates.analysis, after=scored)
    for analysis in analyses:
        others = [one for one in keys.AFTER.get(analysis, ()) if one in analyses]
        found[analysis] = PlannedJob(rates.analysis, after=("collect", *others))
    return found | {"report": PlannedJob(rates.analysis, after=tuple(analyses))}


def _pieces(rows) -> dict[tuple[str, str], dict[str, Piece]]:
    """The pieces of each stage and base model."""
    by = ["stage", "base_model", "run_id"]
    told: dict[tuple, dict[str, tuple[float, float]]] = {}
    counted = rows[rows.what.ne("")].groupby([*by, "what"], sort=False)[["n", "seconds"]].sum()
    for (*piece, what), n, seconds in counted.itertuples():
        told.setdefault(tuple(piece), {})[what] = float(n), float(seconds)
    found: dict[tuple[str, str], dict[str, Piece]] = {}
    for (stage, base, run_id), seconds in rows.groupby(by, sort=False).seconds.sum().items():
        piece = Piece(float(seconds), told.get((stage, base, run_id), {}))
        found.setdefault((stage, base), {})[run_id] = piece
    return found


def finish(plan: Mapping[str, PlannedJob], n_at_once: int) -> float:
    """Seconds until all jobs are done, `n_at_once` at a time, each begun as soon as what it waits
    for is done and a place is free, in the order of the plan.
    """
    waiting, running, now = dict(plan), [], 0.0
    done: set[str] = set()
    while waiting or running:
        ready = [
            name
            for name, job in waiting.items()
            if all(one in done or one not in plan for one in job.after)
        ]
        for name in ready[: n_at_once - len(running)]:
            heapq.heappush(running, (now + waiting.pop(name).seconds, name))
        if not running:
            raise ValueError(f"jobs wait for each other: {', '.join(waiting)}")
        now, ended = heapq.heappop(running)
        done.add(ended)
    return now


def known_rates(study: Study, asked: cluster.Cluster | None) -> Rates:
    """The rates by which jobs are planned: those of this machine where they were measured, else of
    a usual core or a published GPU, which the finished work corrects. This machine's say nothing of
    a cluster's GPUs.
    """
    from driftbook.batch import rates

    if asked and asked.gpu_memory:
        return rates.published_rates()
    on_cpu = asked or not gpus.numbers()
    return rates.here(study) or (rates.USUAL if on_cpu else rates.published_rates())


def write_plan(study: Study, path: Path, asked: cluster.Cluster | None = None) -> None:
    """Write the jobs of a planned study as they are on this machine, or on a cluster."""
    shards = read_shards(study)
    if shards is None:
        return
    kept = {
        name: {
            "overhead": job.overhead,
            "pieces": {one: [piece.seconds, piece.counts] for one, piece in job.pieces.items()},
            "after": job.after,
        }
        for name, job in jobs(study, known_rates(study, asked), shards).items()
    }
    write_json(path, kept)


def main(study: str, path: str, profile: str) -> int:
    """Write the plan of a study file's work with a profile; the exit status."""
    write_plan(load(study), Path(path), cluster.read(profile))
    return 0
