"""One worker per GPU: a job holds a GPU by a lock that its end releases, and sees no other. On a
cluster a job has what it was given.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from driftbook.study.files import users_folder

VISIBLE = "CUDA_VISIBLE_DEVICES"
GIVEN = "DRIFTBOOK_GPUS_GIVEN"  # set where a cluster gives each job GPUs that no other job has


def numbers() -> list[str]:
    """The GPUs that may be used: those that CUDA_VISIBLE_DEVICES names (a cluster sets it), else
    all of the machine.
    """
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    return sorted(
        (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int
    )


def gpu_memory() -> float | None:
    """Bytes of the smallest GPU that may be used, as the driver says, since torch takes seconds to
    import; None without one, or where no driver answers.
    """
    if not (known := numbers()):
        return None
    query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={','.join(known)}", *query]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return min(float(line) for line in said.stdout.splitlines()) * 2**20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def at_once() -> int:
    """How many jobs run at a time on this machine: one a GPU, else one a core."""
    return len(numbers()) or os.cpu_count() or 1


@contextlib.contextmanager
def held(folder: Path | None = None, wait: float = 5.0) -> Iterator[str | None]:
    """The number of a GPU that no other job of this user holds, waited for; None on a machine
    without one. Processes started meanwhile see it alone. None too where a cluster gives GPUs to
    jobs: there the one of every job may be called 0.
    """
    known = numbers()
    if not known or os.environ.get(GIVEN):
        yield None
        return
    folder = folder or users_folder("gpus")
    before = os.environ.get(VISIBLE)
    while True:
        for number in known:
            lock = FileLock(folder / f"{number.replace('/', '_')}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            os.environ[VISIBLE] = number
            try:
                yield number
            finally:
                os.environ.pop(VISIBLE) if before is None else os.environ.update({VISIBLE: before})
                lock.release()
            return
        time.sleep(wait)
