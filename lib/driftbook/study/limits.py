"""Limits for what a file from elsewhere makes us compute: of time, of memory and of size."""

import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MEMORY = 4 * 2**30  # bytes more than there were before
WAITS = 4  # times the seconds of work that a busy machine may take for it
MOST_SAID = 4000  # bytes, which a pipe takes at once


def tried(seconds: float, what: str, work: Callable[[], object]) -> None:
    """Do `work` in a copy of this process, for so many seconds of work and within MEMORY: what a
    library does outside of Python, or in another thread than the first, no signal ends, but a
    process can be killed. What the work makes is lost; it may then be done here.

    Raises:
        ValueError: what the work raised, or that it takes longer or fails, in a sentence that
            begins with `what`.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # of other threads, which the copy has not
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            _copied(seconds, what, work, writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        there, _, _ = select.select([reading], [], [], WAITS * seconds)
        said = os.read(reading, MOST_SAID).decode() if there else ""
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if said == _DONE:
        return
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not said and by in (signal.SIGPROF, signal.SIGKILL):
        said = f"{what} takes longer than {seconds:g} s; give another"
    raise ValueError(said or f"{what} ends its process; give another")


_DONE = "done"


def _copied(seconds: float, what: str, work: Callable[[], object], writing: int) -> None:
    """In the copy: do the work within the limits, and say how it ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library's own last words
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process, also inside a library
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _limit_memory(resource.getrlimit(resource.RLIMIT_AS))
    said = _DONE
    try:
        work()
    except ValueError as error:
        said = str(error)
    except BaseException as error:  # a library in Rust panics with one that is no Exception
        first = (str(error).splitlines() or [""])[0]
        said = f"{what} fails ({type(error).__name__}: {first}); give another"
    os.write(writing, said.encode(errors="replace")[:MOST_SAID] or b" ")


def _limit_memory(most: tuple[int, int]) -> None:
    """Limit what the process may hold, where the system says how much it holds."""
    held = Path("/proc/self/statm")
    if held.is_file():
        wanted = int(held.read_text().split()[0]) * resource.getpagesize() + MEMORY
        lower = [wanted, *(one for one in most if one != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(lower), most[1]))


def too_large(path: Path, most: int) -> str | None:
    """In words how much too large a file is; None where it is not, or is not there."""
    size = path.stat().st_size if path.is_file() else 0
    return (
        None if size <= most else f"{path.name} has {size:,} bytes, and at most {most:,} are read"
    )
