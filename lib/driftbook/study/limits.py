"""Limits for what a file from elsewhere makes us compute: of time, of memory and of size."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = 4 * 2**30  # bytes more than there were before


class _TimeUp(BaseException):
    """No Exception, so that nothing that tries one way after the other passes over it."""


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Do what the block does, in this time and within MEMORY; in a thread other than the first one
    without a limit, since no signal ends it there.

    Raises:
        ValueError: it takes longer; the sentence begins with `what`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise _TimeUp

    before, most = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _limit_memory(most)
    try:
        yield
    except _TimeUp:
        raise ValueError(f"{what} takes longer than {seconds:g} s; give another") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, most)


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
