"""A lease: who works on a run in a stage, so that no two do, and nobody waits for the dead.

A lease is a file in the run's folder that its holder rewrites every few seconds with a higher
number. On the holder's own machine the process itself is asked. From any other, a lease whose
number stands still for PATIENCE seconds, by the watcher's own clock, is one of the dead; clocks of
two machines are never compared. It is taken over by making the next one, which only one watcher
can; who was taken over all the same (it had been stopped, say) finds that out before it marks its
result, whose files are the same bytes whoever writes them.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from driftbook.study.files import digest, private_folder, write_json

JOBS = "notebooks"  # the folder of a study in which its jobs are shown
BEAT = 5.0  # seconds between two numbers
PATIENCE = 60.0  # seconds that a number may stand still: a shared folder shows it late


class Lost(Exception):
    """Another process has taken this work over."""


@dataclass
class Watch:
    """What a process has seen of the leases of others: by file, their last words and since when."""

    seen: dict[Path, tuple[str, float]] = field(default_factory=dict)

    def is_dead(self, path: Path) -> bool:
        """Whether the holder of a lease is dead, as far as can be told by now."""
        try:
            words = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False  # it was just given back
        holder = _parsed(words)
        if holder.get("machine") == machine():
            return not is_alive(holder)
        known, since = self.seen.get(path, (None, 0.0))
        if words != known:
            self.seen[path] = words, time.monotonic()
            return False
        return time.monotonic() - since > PATIENCE


class Lease:
    """The lease that this process holds."""

    def __init__(self, path: Path):
        self.path = path
        self.words = own_words() | {
            "job": os.environ.get("SLURM_JOB_ID"),
            "token": uuid.uuid4().hex,
            "beat": 0,
            "held": 0.0,  # seconds
        }
        self._since = time.monotonic()

    def check(self) -> None:
        """Raises Lost where another process has taken over."""
        last = _leases(self.path.parent, _stage(self.path))[-1:]
        if last != [self.path] or not self.is_own():
            raise Lost

    def is_own(self) -> bool:
        """Whether its file still holds this process's words."""
        return words_of(self.path).get("token") == self.words["token"]

    def give_back(self) -> None:
        """Delete its file, unless another process has it by now."""
        if self.is_own():
            self.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Show that this process lives."""
        if not self.is_own():
            return
        self.words["beat"] += 1
        self.words["held"] = time.monotonic() - self._since
        new = self.path.with_name(f".new-{self.words['token']}")
        with contextlib.suppress(OSError):  # a full disk ends a work where its result is written
            new.write_text(json.dumps(self.words), encoding="utf-8")
            os.replace(new, self.path)


@contextlib.contextmanager
def leased(folder: Path, stage: str, watch: Watch) -> Iterator[Lease | None]:
    """The lease of a run's stage; None where another process works on it."""
    private_folder(folder)
    lease = _taken(folder, stage, watch)
    if lease is None:
        yield None
        return
    with _beating(lease):
        yield lease


@contextlib.contextmanager
def shown(folder: Path, job: str) -> Iterator[None]:
    """As long as the block lasts, a lease says in a folder that a job lives, of whose half-written
    files none is to be taken away; it keeps nobody from the same job.
    """
    lease = Lease(folder / f".lease.{digest(job)}.1")
    with contextlib.suppress(OSError):  # a full disk is said where results are written
        write_json(lease.path, lease.words)
    with _beating(lease):
        yield


@contextlib.contextmanager
def _beating(lease: Lease) -> Iterator[None]:
    """Rewrites a lease every BEAT seconds, and deletes it at the end."""
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(BEAT):
            lease.beat()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lease.give_back()


def living(folder: Path, watch: Watch | None = None) -> bool:
    """Whether a process may be at work in a folder: it holds a lease and is not known to be
    dead.
    """
    watch = watch or Watch()
    dead = [watch.is_dead(path) for path in folder.glob(".lease.*")]  # each is to be seen
    return not all(dead)


def clear_dead(folder: Path) -> None:
    """Delete the leases of a folder in which nobody lives: of jobs, and of runs that were
    finished.
    """
    of_jobs = folder.name == JOBS
    for path in folder.glob(".lease.*"):
        if of_jobs or (folder / f"{_stage(path)}.done.json").exists():
            path.unlink(missing_ok=True)


def holder(folder: Path, stage: str) -> dict:
    """Who holds the lease of a stage: host, pid, job; empty where nobody does."""
    found = _leases(folder, stage)
    return words_of(found[-1]) if found else {}


def record_death(folder: Path, stage: str, key: str | None) -> None:
    """Count a kernel that died while it worked on a run, where its job is there to say so; `key` is
    that of the planned result.
    """
    for path in _leases(folder, stage):
        if Watch().is_dead(path):
            died = {"key": key, "n": deaths(folder, stage, key) + 1}
            write_json(folder / f".deaths.{stage}.json", died)
            return


def deaths(folder: Path, stage: str, key: str | None) -> int:
    """How many kernels died at a run's stage, of this key, since it was last done."""
    known = words_of(folder / f".deaths.{stage}.json")
    return known.get("n", 0) if known.get("key") == key else 0


def forget_deaths(folder: Path, stage: str) -> None:
    """Forget them."""
    (folder / f".deaths.{stage}.json").unlink(missing_ok=True)


def own_words() -> dict:
    """What tells this process from any other: machine, host, pid, and when it began."""
    here = {"machine": machine(), "host": socket.gethostname()}
    return here | {"pid": os.getpid(), "started": began(os.getpid())}


def machine() -> str:
    """What tells whether a process can be asked: this host and, in a container, its own ones."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _taken(folder: Path, stage: str, watch: Watch) -> Lease | None:
    others = _leases(folder, stage)
    if others and not watch.is_dead(others[-1]):
        return None
    number = 1 + (_number(others[-1]) if others else 0)
    lease = Lease(folder / f".lease.{stage}.{number}")
    try:
        file = lease.path.open("x", encoding="utf-8")
    except FileExistsError:
        return None
    try:
        with file:
            file.write(json.dumps(lease.words))
    except OSError:  # a full disk
        lease.path.unlink(missing_ok=True)
        raise
    for path in others:
        path.unlink(missing_ok=True)
    return lease


def _leases(folder: Path, stage: str) -> list[Path]:
    """The leases of a stage, the valid one last."""
    found = [path for path in folder.glob(f".lease.{stage}.*") if _number(path)]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    found = re.fullmatch(r"\.lease\.\w+\.(\d+)", path.name)
    return int(found[1]) if found else 0


def _stage(path: Path) -> str:
    return path.name.split(".")[2]


def _parsed(words: str) -> dict:
    try:
        found = json.loads(words)
    except ValueError:
        return {}  # it is being written
    return found if isinstance(found, dict) else {}


def words_of(path: Path) -> dict:
    """What a lease or a lock says; empty where it is gone."""
    with contextlib.suppress(OSError):
        return _parsed(path.read_text(encoding="utf-8", errors="replace"))
    return {}


def is_alive(holder: dict) -> bool:
    """Whether a process of this machine, by pid and start (`began`), still runs; a later one may
    have its pid.
    """
    try:
        process = psutil.Process(holder["pid"])
        same = began(holder["pid"]) == holder["started"]
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError, KeyError, TypeError, ValueError):
        return False


def began(pid: int) -> float:
    """When a process began, as a number that no change of the clock moves: ticks since the machine
    started, where the system says them.

    Raises:
        OSError, psutil.Error: there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return psutil.Process(pid).create_time()
