"""How far a running study is: what is being done, how much is done, and the time left, by the plan
and by how long the work took that is done by now.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from driftbook.batch import keys
from driftbook.batch.schedule import Piece, PlannedJob, finish
from driftbook.batch.shards import Shards, path_of
from driftbook.study.study_file import Study

LINE_EVERY = 20.0  # seconds between two lines where no terminal shows a bar
TRUST = 20.0  # seconds of finished work that weigh as much as the plan
COUNTED = {"steps": "steps", "read": "texts read", "written": "answers written"}


@dataclass(frozen=True)
class Part:
    """A part of the work, a job of the plan: its stage, what it is about, how many units are done
    and asked for, whether it is being worked on, and what it says of itself (study/progress.py).
    """

    job: str
    stage: str
    about: str
    done: int
    total: int
    active: bool
    told: Mapping = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, float]:
        return self.told.get("counts") or {}


def clock_of(folder: Path) -> Callable[[], float]:
    """The clock by which the files of a folder get their times: that of the machine which holds
    them, and this one's where nothing can be written there.
    """
    now = time.time()
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"now")
        file.flush()
        now = os.fstat(file.fileno()).st_mtime
    ahead = now - time.monotonic()
    return lambda: time.monotonic() + ahead


def parts(study: Study, shards: Shards, started: float, now: float) -> list[Part]:
    """All parts of the work, from the marks and progress files in the study's folder; `started`
    tells this batch's files from older ones. Both times are of the folder's clock.
    """

    def part(job: str, total: int, n_shards: int = 1) -> Part:
        return _part(study, job, total, n_shards, started, now)

    found = [part(f"prepare/{name}", 1) for name in study.models]
    for stage in keys.stages(study):
        for base in study.bases:
            jobs = shards.jobs(stage, base)
            found += [part(job, len(shards.run_ids(job)), len(jobs)) for job in jobs]
    others = ("collect", *keys.analyses(study), "report")
    return found + [part(name, 1) for name in others]


def _part(study: Study, job: str, total: int, shards: int, started: float, now: float) -> Part:
    stage, *names = job.split("/")
    about = names[0] if names else stage
    if shards > 1:
        about += f" {int(names[1]) + 1}/{shards}"
    told, progress = {}, path_of(study, "progress", job)
    with contextlib.suppress(json.JSONDecodeError, FileNotFoundError):
        if (when := progress.stat().st_mtime) >= started:
            told = json.loads(progress.read_text())
            # by the job's own clock until it said so, and by the folder's since then
            told["spent"] = told.get("spent", 0.0) + max(0.0, now - when)
    if is_done(study, job):
        return Part(job, stage, about, total, total, False, told)
    return Part(job, stage, about, told.get("done", 0), total, bool(told), told)


def is_done(study: Study, job: str) -> bool:
    """Whether a job has a mark that the plan did not call due."""
    mark, key = path_of(study, "jobs", job), path_of(study, "keys", job)
    with contextlib.suppress(FileNotFoundError):
        when = mark.stat().st_mtime
        return not (key.exists() and key.stat().st_mtime > when)
    return False


# ---- the time left
class Outlook:
    """The time left of a study by its plan: the jobs of `schedule.jobs`, `n_at_once` at a time."""

    def __init__(self, plan: Mapping[str, PlannedJob], n_at_once: int):
        self.plan, self.n_at_once = plan, n_at_once

    def left(self, found: Sequence[Part]) -> float:
        """Seconds until all is done."""
        factors = self.factors(found)
        usual = factors[""]
        rest: dict[str, PlannedJob] = {}
        for part in sorted(found, key=lambda one: not one.active):
            if part.done < part.total and part.job in self.plan:
                factor = factors.get(part.stage, usual)
                rest[part.job] = _rest(self.plan[part.job], part, factor, min(usual, 2.0))
        return finish(rest, self.n_at_once)

    def factors(self, found: Sequence[Part]) -> dict[str, float]:
        """How many times as long as planned the pieces of a stage took; of all stages under "".

        With little done the plan counts as TRUST seconds of work that took as long as planned, and
        all stages together as much for a single one.
        """
        took: dict[str, float] = {}
        planned: dict[str, float] = {}
        for part in found:
            for seconds, expected in _taken(part, self.plan.get(part.job)):
                took[part.stage] = took.get(part.stage, 0.0) + seconds
                planned[part.stage] = planned.get(part.stage, 0.0) + expected
        usual = (sum(took.values()) + TRUST) / (sum(planned.values()) + TRUST)
        factors = {
            stage: (took[stage] + TRUST * usual) / (planned[stage] + TRUST) for stage in took
        }
        return factors | {"": usual}


def _taken(part: Part, job: PlannedJob | None) -> Iterator[tuple[float, float]]:
    """Seconds that pieces took, and those planned for what of them is done."""
    if job is None:
        return
    for run_id, seconds in (part.told.get("seconds") or {}).items():
        if run_id in job.pieces:
            yield seconds, job.pieces[run_id].seconds
    piece = _current(part, job)
    if piece and (share := piece.share(part.counts)):
        yield part.told["spent"], share * piece.seconds


def _current(part: Part, job: PlannedJob) -> Piece | None:
    """The piece that is being done."""
    return job.pieces.get(part.told.get("run_id")) if part.active else None


def _rest(job: PlannedJob, part: Part, factor: float, usual: float) -> PlannedJob:
    """What is left of a job, its pieces `factor` times as long as planned."""
    left = dict(list(job.pieces.items())[part.done :])
    pieces = {name: replace(one, seconds=one.seconds * factor) for name, one in left.items()}
    if piece := _current(part, job):
        whole, share = piece.seconds * factor, piece.share(part.counts)
        seconds = whole * (1 - share)
        if not share:  # nothing of it is counted yet
            seconds = max(whole - part.told["spent"], whole / 10)
        pieces[part.told["run_id"]] = replace(piece, seconds=seconds)
    overhead = job.overhead * usual * (0.2 if part.active else 1.0)
    return replace(job, overhead=overhead, pieces=pieces)


def read_plan(path: Path) -> dict[str, PlannedJob] | None:
    """The plan that `schedule.write_plan` wrote; None where it is not there."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return {
        name: PlannedJob(
            job["overhead"],
            {run_id: Piece(seconds, counts) for run_id, (seconds, counts) in job["pieces"].items()},
            tuple(job["after"]),
        )
        for name, job in kept.items()
    }


# ---- the display
@contextlib.contextmanager
def display(study: Study, plan: Path, n_at_once: int) -> Iterator:
    """A function that shows the state of the work so many seconds after its start: a live bar on a
    terminal; elsewhere a line when the stage changes, and every LINE_EVERY seconds. The plan is
    read once it is there.
    """
    console = Console()
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(study.name, total=None, left="")
        shown, known = {"stage": "", "at": 0.0}, {"outlook": None}

        def show(found: list[Part], seconds: float) -> None:
            if known["outlook"] is None and (jobs := read_plan(plan)):
                known["outlook"] = Outlook(jobs, n_at_once)
            text, done, total, left = summary(found, known["outlook"])
            progress.update(task, description=text, completed=done, total=total, left=left)
            stage = text.partition(" ")[0]
            due = stage != shown["stage"] or seconds - shown["at"] >= LINE_EVERY
            if not console.is_terminal and due:
                console.print(
                    f"{seconds:5.0f} s  {text}  ({done} of {total} done"
                    f"{', ' + left if left else ''})",
                    highlight=False,
                    soft_wrap=True,
                )
                shown["at"] = seconds
            shown["stage"] = stage

        yield show


def summary(found: Sequence[Part], outlook: Outlook | None = None) -> tuple[str, int, int, str]:
    """What is being done in words, variants and steps done, all of them, and the time left."""
    active = [part for part in found if part.active] or [
        part for part in found if part.done < part.total
    ][:1]
    text = "finished"
    if active:
        same = [part for part in active if part.stage == active[0].stage]
        text = f"{active[0].stage} {', '.join(part.about for part in same)}"
        words = [progress_words(part, outlook) for part in active if part.counts]
        text += f": {'; '.join(words)}" if words else ""
    left = "" if outlook is None else time_left(outlook.left(found))
    return text, sum(part.done for part in found), sum(part.total for part in found), left


def progress_words(part: Part, outlook: Outlook | None) -> str:
    """What is counted in the piece that is being done: `variant 3 of 5, 12 of 24 steps`."""
    job = outlook and outlook.plan.get(part.job)
    piece = _current(part, job) if job else None
    known = piece.counts if piece else {}
    counts = [
        f"{int(n)} of {max(known[what][0], n):.0f} {COUNTED.get(what, what)}"
        if what in known
        else f"{int(n)} {COUNTED.get(what, what)}"
        for what, n in part.counts.items()
    ]
    place = f"{part.stage} variant {min(part.done + 1, part.total)} of {part.total}"
    return ", ".join([place, *counts])


def time_left(seconds: float) -> str:
    """Seconds in words; nothing where none are left."""
    if seconds > 5400:
        return f"about {seconds / 3600:.1f} h left"
    if seconds > 90:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds:.0f} s left" if seconds >= 0.5 else ""
