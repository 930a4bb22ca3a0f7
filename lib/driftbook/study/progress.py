"""How far a job is inside a piece of work: loops count what they do, and a small file says it at
most once a second to whoever shows it. Without a file the counts cost nothing.

What is counted: `steps` of a training, texts `read` (log-probabilities) and texts `written`
(answers), each of the piece of work that is being done.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from driftbook.study.files import write_json

EVERY = 1.0  # seconds between two writes


class Progress:
    """The progress of a job: how many pieces of work are done, of how many, the seconds that each
    took which was not there already, and the counts of the one that is being done.
    """

    def __init__(self, path: Path, of: int):
        self.path, self.of, self.done = path, of, 0
        self.run_id: str | None = None
        self.counts: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._since = self._written = 0.0  # by a clock that nobody sets

    def begin(self, run_id: str) -> None:
        """A piece of work begins."""
        self.run_id, self.counts, self._since = run_id, {}, time.monotonic()
        self._write()

    def end(self, run_id: str, worked: bool) -> None:
        """It ended; `worked` says that it was not there already."""
        if worked:
            self.seconds[run_id] = time.monotonic() - self._since
        self.run_id, self.counts, self.done = None, {}, self.done + 1
        self._write()

    def reach(self, what: str, n: float) -> None:
        """So much of a count is done by now."""
        self.counts[what] = n
        if time.monotonic() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        told = {"done": self.done, "of": self.of, "seconds": self.seconds}
        current = {"run_id": self.run_id, "counts": self.counts}
        write_json(self.path, told | current | {"spent": self._written - self._since})


_current: list[Progress] = []  # of this process, which does one job at a time


@contextmanager
def reported(path: Path, of: int) -> Iterator[Progress]:
    """As long as the block lasts, what loops count is written to a file."""
    found = Progress(path, of)
    _current.append(found)
    try:
        yield found
    finally:
        _current.remove(found)


def reach(what: str, n: float) -> None:
    """Say that so much of a count is done in the piece of work that is being done."""
    if _current:
        _current[-1].reach(what, n)


def advance(what: str, n: float) -> None:
    """Say that so much more of a count is done."""
    if _current:
        _current[-1].reach(what, _current[-1].counts.get(what, 0.0) + n)
